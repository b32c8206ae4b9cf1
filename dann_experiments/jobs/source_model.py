"""Finds or makes the source model that adaptation starts from: the one in the settings, the newest that fits, or a new one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dann_experiments.checkpoints.weights import load_into, read_weights
from dann_experiments.config import Config, flatten
from dann_experiments.config.paths import local_path
from dann_experiments.jobs.identity import source_digest
from dann_experiments.jobs.pretrain import pretrain_with
from dann_experiments.names import Job, Key, Tag
from dann_experiments.tracking.fetch_model import digest_of_model, fetched, registered, with_whole_run_id
from dann_experiments.tracking.run import PARAM_PREFIX
from dann_experiments.tracking.store import Store, experiment_ids, newest_finished

log = logging.getLogger(__name__)
OF_PRETRAINING = ("seed", "loss", "class_weights", "pretraining.")
_kept: dict[Any, tuple[Mapping[str, Tensor], str | None, str]] | None = None  # the last one, if this process keeps it


def find_or_make_source_model(
    config: Config, store: Store, digests: Mapping[str, str], resume: str | None = None
) -> str:
    """Return the address of the source model: `pretrained_checkpoint.path`, else the model of the newest finished pretraining run
    with the same network settings and source data (`digests` of the sets, by name), of the same seed if there is one, else that
    of a new pretraining run. With `resume` auto an unfinished pretraining run is resumed instead of a new one."""
    if config.domain_adaptation.pretrained_checkpoint.path is not None:
        return with_whole_run_id(config.domain_adaptation.pretrained_checkpoint.path, store)
    fitting = {Tag.JOB: Job.PRETRAIN, Tag.SOURCE_DIGEST: source_digest(config, digests)}
    places = experiment_ids(store)
    run_id = newest_finished(
        store, fitting, places, {f"{PARAM_PREFIX}seed": config.seed}
    )  # `compare` leaves one for each seed
    run_id = run_id or newest_finished(store, fitting, places)
    if run_id is None:
        log.info("No finished pretraining run has this network and source data: pretraining first, in a separate run.")
        run_id = pretrain_with(config, store, main_job=False, resume=resume).run_id
    else:
        log.info("Starting from pretraining run %s (set source_checkpoint to start from another model).", run_id)
        _warn_of_other_pretraining(config, store, run_id)
    return f"runs:/{run_id}/model"


def _warn_of_other_pretraining(config: Config, store: Store, run_id: str) -> None:
    """Warn if the source model was trained with another seed, loss or other `pretraining.*` settings than those given, which
    then have no effect: any model of the same network and source data is used (decision 4)."""
    known = store.client.get_run(run_id).data.params
    as_before = flatten(Config())  # older runs have no params of settings that came later
    trained = {key: known.get(PARAM_PREFIX + key, str(value)) for key, value in as_before.items()}
    other = [
        f"{key} {trained[key]} (yours: {value})"
        for key, value in flatten(config).items()
        if key.startswith(OF_PRETRAINING) and trained[key] != str(value)
    ]
    if other:
        log.warning(
            "That run was trained with %s. To train a source model with your settings: `pretrain`. Of those with your seed, "
            "the newest is used.",
            ", ".join(other),
        )  # fmt: skip


def chosen_by_target_labels(store: Store, source_run_id: str | None) -> bool:
    """Return whether the run that made a model chose it by target labels, which then also holds for all results based on it."""
    if source_run_id is None:
        return False
    return store.client.get_run(source_run_id).data.tags.get(Tag.SELECTED_WITH_TARGET_LABELS) == "true"


def load_source_model(config: Config, network: nn.Module, path: str, store: Store) -> tuple[str | None, str]:
    """Load the checkpoint at `path` (file, folder, runs:/, models:/) into `network`; return the id of the run that made it, if
    known, and its `digest_of_model`. Raises InputError if it does not exist or does not fit."""
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
    """Make this process keep the last source model that it loads, for further jobs that start from the same one."""
    global _kept
    _kept = {}


def load_weights(config: Config, network: nn.Module, local: Path, path: str) -> None:
    """Load the weights in the file or folder `local` into `network`; `path`: its address in the settings, for messages."""
    format_ = config.domain_adaptation.pretrained_checkpoint.source_format
    _load(config, network, read_weights(local, format_), path)


def _load(config: Config, network: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    checkpoint = config.domain_adaptation.pretrained_checkpoint
    for problem in load_into(network, weights, checkpoint.strict_loading, path, checkpoint.source_prefix):
        log.warning("checkpoint %s: %s", path, problem)


def _identity(path: str, store: Store) -> Any:
    """Return what identifies a source model, without fetching it. It changes if an alias is moved or a file rewritten."""
    if path.startswith("models:/"):
        with contextlib.suppress(Exception):  # the error is reported when the model is fetched
            return registered(path, store)
        return None
    if path.startswith("runs:/"):
        return path
    place = local_path(path, Key.SOURCE_MODEL).resolve()
    files = sorted(place.rglob("*")) if place.is_dir() else [place] if place.exists() else []
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
