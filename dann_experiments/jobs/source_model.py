"""The source model that adaptation starts from: the one given, the newest that fits, or a new one."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from torch import nn

from dann_experiments.config import Config, InputError
from dann_experiments.jobs.pretrain import pretrain_with
from dann_experiments.jobs.setup import Data, source_digest
from dann_experiments.models.files import load_into, read_weights
from dann_experiments.tracking.store import Store

log = logging.getLogger(__name__)


def find_or_make_source_model(config: Config, store: Store, data: Data) -> str:
    """`pretrained_checkpoint.path`, or the model of the newest finished pretraining run with the same network settings
    and source data, or of a new pretraining run."""
    if config.domain_adaptation.pretrained_checkpoint.path is not None:
        return config.domain_adaptation.pretrained_checkpoint.path
    run_id = newest_pretraining(store, source_digest(config, data))
    if run_id is None:
        log.info("No finished pretraining run of this network and source data: pretraining first, as a run of its own.")
        run_id = pretrain_with(config, store, use_claimed=False).run_id
    else:
        log.info("Starting from pretraining run %s (give source_checkpoint to start from another).", run_id)
    return f"runs:/{run_id}/model"


def newest_pretraining(store: Store, digest: str) -> str | None:
    """The id of the newest finished pretraining run with this digest, in any experiment of the store."""
    experiments = [experiment.experiment_id for experiment in store.client.search_experiments()]
    wanted = (
        f"tags.`dann.job` = 'pretrain' and tags.`dann.source_digest` = '{digest}' and attributes.status = 'FINISHED'"
    )
    runs = store.client.search_runs(experiments, wanted, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


def chosen_by_target_labels(store: Store, source_run_id: str | None) -> bool:
    """Whether the run that a model comes from chose by target labels: what is made from it then did so too."""
    if source_run_id is None:
        return False
    return store.client.get_run(source_run_id).data.tags.get("dann.selected_with_target_labels") == "true"


def load_source_model(config: Config, network: nn.Module, path: str, store: Store) -> str | None:
    """Load the checkpoint at `path` (file, folder, runs:/, models:/) into `network`; the id of the run that made it."""
    settings = config.domain_adaptation.pretrained_checkpoint
    with tempfile.TemporaryDirectory() as folder:
        local, run_id = fetch(path, Path(folder), store)
        weights = read_weights(local, settings.source_format)
    left_out = load_into(network, weights, settings.strict_loading, path)
    for problem in left_out:
        log.warning("checkpoint %s: %s", path, problem)
    return run_id


def fetch(path: str, folder: Path, store: Store) -> tuple[Path, str | None]:
    """A local copy of a checkpoint, and the run it belongs to if the store says so."""
    if not path.startswith(("runs:/", "models:/")):
        return Path(path).expanduser(), None
    import mlflow
    from mlflow.exceptions import MlflowException

    key = "domain_adaptation.pretrained_checkpoint.path"
    try:
        if path.startswith("runs:/"):
            run_id, _, inside = path.removeprefix("runs:/").partition("/")
            path = f"runs:/{run_id}/{inside or 'model'}"
            store.client.get_run(run_id)
        else:
            run_id = _registered_run(path, store)
        local = mlflow.artifacts.download_artifacts(artifact_uri=path, dst_path=str(folder), tracking_uri=store.uri)
        return Path(local), run_id
    except (MlflowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key} is {path!r}, which the tracking store does not give: {reason}") from None


def _registered_run(path: str, store: Store) -> str | None:
    name, at, alias = path.removeprefix("models:/").partition("@")
    if at:
        return store.client.get_model_version_by_alias(name, alias).run_id
    name, _, version = name.partition("/")
    return store.client.get_model_version(name, version).run_id
