"""The source model that adaptation starts from: the one given, the newest that fits, or a new one."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dann_experiments.config import Config, InputError
from dann_experiments.config.errors import NotWritten
from dann_experiments.config.paths import local_path
from dann_experiments.data.samples import file_digest
from dann_experiments.jobs.pretrain import pretrain_with
from dann_experiments.jobs.setup import Data, source_digest
from dann_experiments.models.files import load_into, read_weights
from dann_experiments.tracking.store import Store, check_room, in_one_line, newest_finished

log = logging.getLogger(__name__)
_kept: dict[Any, tuple[Mapping[str, Tensor], str | None, str]] | None = None  # the last one, in a process that keeps it
CHECKPOINT_KEY = "domain_adaptation.pretrained_checkpoint.path"


def find_or_make_source_model(config: Config, store: Store, data: Data, resume: str | None = None) -> str:
    """`pretrained_checkpoint.path`, or the model of the newest finished pretraining run with the same network settings
    and source data, or of a new pretraining run; with `resume` auto, of an unfinished one that goes on."""
    if config.domain_adaptation.pretrained_checkpoint.path is not None:
        return config.domain_adaptation.pretrained_checkpoint.path
    run_id = newest_finished(store, {"dann.job": "pretrain", "dann.source_digest": source_digest(config, data)})
    if run_id is None:
        log.info("No finished pretraining run of this network and source data: pretraining first, as a run of its own.")
        run_id = pretrain_with(config, store, use_claimed=False, resume=resume).run_id
    else:
        log.info("Starting from pretraining run %s (give source_checkpoint to start from another).", run_id)
    return f"runs:/{run_id}/model"


def chosen_by_target_labels(store: Store, source_run_id: str | None) -> bool:
    """Whether the run that a model comes from chose by target labels: what is made from it then did so too."""
    if source_run_id is None:
        return False
    return store.client.get_run(source_run_id).data.tags.get("dann.selected_with_target_labels") == "true"


def digest_of_model(store: Store, path: str, local: Path, run_id: str | None) -> str:
    """What tells the model at `path`, fetched to `local`, from others: of a run's model the run's `dann.digest` (another run
    with that digest made the same), of a file the digest of its bytes, of anything else a run keeps its address."""
    inside = path.partition("/")[2].partition("/")[2] if path.startswith("runs:/") else ""
    if run_id is not None and inside in ("", "model"):
        known = store.client.get_run(run_id).data.tags.get("dann.digest")
        if known is not None:
            return known
    if path.startswith("runs:/"):
        return path
    digest = hashlib.blake2b(digest_size=16)  # a file may be written anew, an alias moved
    for file in sorted(file for file in local.rglob("*") if file.is_file()) if local.is_dir() else [local]:
        digest.update(file.relative_to(local).as_posix().encode() + file_digest(file))
    return digest.hexdigest()


def load_source_model(config: Config, network: nn.Module, path: str, store: Store) -> tuple[str | None, str]:
    """Load the checkpoint at `path` (file, folder, runs:/, models:/) into `network`; the id of the run that made it, and
    `digest_of_model`."""
    format_ = config.domain_adaptation.pretrained_checkpoint.source_format
    identity = None if _kept is None else (_identity(path, store), format_, store.uri)
    if _kept is not None and identity in _kept:
        weights, run_id, digest = _kept[identity]
        _load(config, network, weights, path)
        return run_id, digest
    with fetched(path, store) as (local, run_id):
        weights = read_weights(local, format_)
        _load(config, network, weights, path)
        digest = digest_of_model(store, path, local, run_id)
    if _kept is not None:
        _kept.clear()
        _kept[identity] = ({name: tensor.clone() for name, tensor in weights.items()}, run_id, digest)
    return run_id, digest


def keep_source_models() -> None:
    """From now on this process keeps the last source model that it loaded, for jobs that start from the same one."""
    global _kept
    _kept = {}


def _identity(path: str, store: Store) -> Any:
    """What tells a source model from others, an alias that was moved and a file that was written anew included, without asking
    for the model itself."""
    if path.startswith("models:/"):
        with contextlib.suppress(Exception):  # whoever fetches it tells what is wrong
            return _registered(path, store)
        return None
    if path.startswith("runs:/"):
        return path
    place = local_path(path, CHECKPOINT_KEY).resolve()
    files = sorted(place.rglob("*")) if place.is_dir() else [place] if place.exists() else []
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def load_weights(config: Config, network: nn.Module, local: Path, path: str) -> None:
    """Load the weights in the file or folder `local`, which the settings call `path`, into `network`."""
    format_ = config.domain_adaptation.pretrained_checkpoint.source_format
    _load(config, network, read_weights(local, format_), path)


def _load(config: Config, network: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    checkpoint = config.domain_adaptation.pretrained_checkpoint
    left_out = load_into(network, weights, checkpoint.strict_loading, path, checkpoint.source_prefix)
    for problem in left_out:
        log.warning("checkpoint %s: %s", path, problem)


@contextlib.contextmanager
def fetched(path: str, store: Store, key: str = CHECKPOINT_KEY) -> Iterator[tuple[Path, str | None]]:
    """`fetch`, with a folder for the copy that is gone after the block. Raises InputError if nothing is there."""
    with tempfile.TemporaryDirectory() as folder:
        local, run_id = fetch(path, Path(folder), store, key)
        if not os.path.exists(local):  # never raises, whatever the name
            raise InputError(
                f"{key} is {path}, which does not exist; give a file, a folder, runs:/ID or models:/NAME@ALIAS."
            )
        if not (local.is_file() or local.is_dir()):  # a pipe gives nothing, /dev/zero never ends
            raise InputError(f"{key} is {path}, which is neither a file nor a folder; give one.")
        yield local, run_id


def fetch(path: str, folder: Path, store: Store, key: str = CHECKPOINT_KEY) -> tuple[Path, str | None]:
    """A local copy of a model (file, folder, runs:/ID[/path], models:/NAME@ALIAS or /VERSION), and the run it belongs to if
    the store says so. `key` names the setting in errors."""
    if not path.startswith(("runs:/", "models:/")):
        return local_path(path, key), None
    import mlflow
    from mlflow.exceptions import MlflowException

    given = path
    try:
        if path.startswith("runs:/"):
            run_id, _, inside = path.removeprefix("runs:/").partition("/")
            path = f"runs:/{run_id}/{inside or 'model'}"
            store.client.get_run(run_id)
            check_room(store, run_id, inside or "model", folder)
        else:
            path, run_id = _registered(path, store)
        local = mlflow.artifacts.download_artifacts(artifact_uri=path, dst_path=str(folder), tracking_uri=store.uri)
        return Path(local), run_id
    except NotWritten:
        raise
    except (MlflowException, OSError, ValueError) as error:
        raise InputError(f"{key} is {given!r}, which the tracking store does not give: {in_one_line(error)}") from None


def _registered(path: str, store: Store) -> tuple[str, str | None]:
    """Where a registered model's files are, and its run. Asked of our own client: MLflow would look a `models:/` address up
    in the registry of the process, which need not be that of the settings' store."""
    name, at, alias = path.removeprefix("models:/").partition("@")
    if at:
        found = store.client.get_model_version_by_alias(name, alias)
    else:
        name, _, version = name.partition("/")
        found = store.client.get_model_version(name, version)
    return store.client.get_model_version_download_uri(found.name, found.version), found.run_id or None
