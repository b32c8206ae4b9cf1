"""Resumes a run that was killed: finds the run, its settings and its checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dann_experiments.checkpoints import files
from dann_experiments.config import Config, InputError, flatten, load_config, replace
from dann_experiments.config.atomic_write import writing
from dann_experiments.config.parsing import given_settings
from dann_experiments.jobs.identity import as_pretrained
from dann_experiments.names import RESUME_AUTO, Job, Key, Tag
from dann_experiments.tracking.deleted import is_deleted
from dann_experiments.tracking.processes import is_elsewhere, live_process
from dann_experiments.tracking.run import PARAM_PREFIX
from dann_experiments.tracking.store import (
    Store,
    check_room,
    in_one_line,
    known_run,
    open_store,
    whole_run_id,
    without_secrets,
)

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
"""Folder in a run's folder and among its artifacts."""
SETTINGS = "config.yaml"
FOLDER_PARAM = f"{PARAM_PREFIX}tracking.folder"
MAY_DIFFER = (
    "tracking.uri", "tracking.experiment", "tracking.folder", "tracking.images", "tracking.system_metrics",
    "trainer.enable_progress_bar", "trainer.checkpoint_every_n_steps",
    "trainer.checkpoint_every_minutes", "trainer.checkpoints_kept", "data.num_workers", "data.memory_gb", "data.disk_cache_gb",
    "data.root", "data.embedded.folder",
)  # fmt: skip
"""Settings that change no result: a resumed run uses their current values."""


@dataclass(frozen=True)
class _Recorded:
    """The settings that a run recorded."""

    config: Config
    from_store: bool
    """True if they come from the tracking store instead of the run's own folder."""


def settings_to_resume(run_id: str, job: str, file: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """Return the settings of run `run_id`, for its job with `resume=run_id`.

    The user's current settings, from `file` and `overrides`, replace the run's own if they do not change results. Raises
    InputError for other settings that differ, and for a run that cannot be resumed.
    """
    given = given_settings(file, overrides)
    store = open_store(given.get("tracking.uri"), given.get("tracking.experiment"), for_runs=False)
    recorded = _recorded(store, _unfinished(store, run_id, job), given.get("tracking.folder"))
    _refuse_foreign_class(recorded, given.get(Key.CLASS_PATH))
    return _agreed(job, recorded.config, replace(recorded.config, {"tracking.uri": None, **given}))


def as_the_run(store: Store, run_id: str, job: str, config: Config) -> Config:
    """Return `config` with what the run determined itself, such as its source model. Raises InputError if settings that change
    results differ, and for a run that cannot be resumed."""
    recorded = _recorded(store, _unfinished(store, run_id, job), config.tracking.folder)
    _refuse_foreign_class(recorded, config.domain_adaptation.method.class_path)
    if config.domain_adaptation.pretrained_checkpoint.path is None:
        path = recorded.config.domain_adaptation.pretrained_checkpoint.path
        config = replace(config, {Key.SOURCE_MODEL: path})
    return _agreed(job, recorded.config, config)


def run_to_go_on(store: Store, job: str, resume: str | None, digest: str, config: Config) -> str | None:
    """Return the id of the run to resume: `resume`, or for `auto` the newest unfinished run of this job and digest in the
    experiment. Return None for a new run. Raises InputError if the run that `resume` names has another digest."""
    if resume is None:
        return None
    if resume != RESUME_AUTO:
        run = _unfinished(store, resume, job)
        if run.data.tags.get(Tag.DIGEST) != digest:
            raise InputError(
                f"resume is {resume}, but its data or source model have changed since: its dann.digest is "
                f"{run.data.tags.get('dann.digest')}, now it is {digest}. Restore the files, or start a new run without resume."
            )
        return run.info.run_id
    run = _newest_unfinished(store, job, digest)
    if run is None:
        log.info("resume=auto: there is no unfinished %s run with these settings; a new run is started.", job)
        return None
    threads = run.data.params.get(f"{PARAM_PREFIX}threads")
    if threads not in (None, str(config.threads)):
        raise InputError(
            f"threads is {config.threads}, but {threads} in run {run.info.run_id}, which resume=auto found; the last digits "
            "of its results depend on it: set the same number, or leave resume out."
        )
    log.info("resume=auto: resuming run %s.", run.info.run_id)
    return run.info.run_id


def folder_of_runs(store: Store, run_id: str | None, folder: str) -> Path:
    """Return the parent of the run's folder: `folder` for new runs and for runs in it, else where the run's folder was before."""
    if run_id is not None and not (Path(folder) / run_id).exists():
        before = store.client.get_run(run_id).data.params.get(FOLDER_PARAM)
        if before is not None and (Path(before) / run_id).exists():
            return Path(before)
    return Path(folder)


def checkpoint_to_go_on_from(store: Store, run_id: str, folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a run in its `folder`, fetched there from its artifacts if necessary; None if
    there is none, so that the run starts from its beginning. Files that are newer than the checkpoint are removed."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.exists():
        _fetch(store, run_id, folder)
    found = files.ready_to_resume(checkpoints)
    if found is None:
        log.info("Run %s has no checkpoint to resume from: it starts from its beginning.", run_id)
    else:
        log.info("Run %s resumes from %s.", run_id, found)
    return found


def _unfinished(store: Store, run_id: str, job: str) -> Any:
    """Return the run, or raise InputError if it cannot be resumed."""
    run_id = whole_run_id(store, run_id)
    run = known_run(store, run_id)
    if run is None:
        raise InputError(
            f"resume is {run_id!r}, but the tracking store {without_secrets(store.uri)} has no such run; use the id of a run, "
            "or auto."
        )
    if is_deleted(run):
        raise InputError(
            f"resume is {run_id}, which was deleted in the store; restore it: mlflow runs restore --run-id {run_id}."
        )
    found = run.data.tags.get(Tag.JOB)
    if found != job:
        raise InputError(f"resume is {run_id}, a run of {found}; {job} can resume only its own runs.")
    if run.info.status == "FINISHED":
        raise InputError(f"resume is {run_id}, which is FINISHED: there is nothing left to do. Leave resume out.")
    process = run.data.tags.get(Tag.PROCESS)
    if run.info.status == "RUNNING" and process is not None:
        alive = live_process(process)
        if alive is not None:
            raise InputError(
                f"resume is {run_id}, which process {alive.pid} is still writing; stop that process first (kill {alive.pid})."
            )
        if is_elsewhere(process):
            log.warning(
                "Run %s was being written on another machine (%s), which cannot be checked from here: make sure it has ended.",
                run_id, process,
            )  # fmt: skip
    return run


def _newest_unfinished(store: Store, job: str, digest: str) -> Any | None:
    wanted = (
        f"tags.`dann.job` = '{job}' and tags.`dann.digest` = '{digest}' and attributes.status != 'FINISHED' "
        "and attributes.status != 'SCHEDULED'"
    )
    for run in store.client.search_runs([store.experiment_id], wanted, order_by=["attributes.start_time DESC"]):
        if run.info.run_id == store.claimed_run_id:  # the run that `mlflow run` created for this process
            continue
        process = run.data.tags.get(Tag.PROCESS)
        if run.info.status != "RUNNING" or process is None:
            return run
        if is_elsewhere(process):
            log.warning(
                "resume=auto skips run %s: it was being written on another machine (%s), which cannot be checked from here. "
                "If that process has ended, use resume=%s.", run.info.run_id, process, run.info.run_id,
            )  # fmt: skip
        elif live_process(process) is None:
            return run
    return None


def _recorded(store: Store, run: Any, folder: str | None) -> _Recorded:
    """Read the settings that a run recorded in its folder, or among its artifacts."""
    run_id = run.info.run_id
    folders = (folder, run.data.params.get(FOLDER_PARAM), Config().tracking.folder)
    for place in filter(None, folders):
        if (Path(place) / run_id / SETTINGS).is_file():
            return _Recorded(load_config(Path(place) / run_id / SETTINGS), from_store=False)
    with tempfile.TemporaryDirectory() as fetched:
        try:
            path = store.client.download_artifacts(run_id, SETTINGS, fetched)
        except Exception as error:
            raise InputError(
                f"resume is {run_id}, whose {SETTINGS} is neither in {Path(folders[0] or folders[1] or folders[2]) / run_id} "
                f"nor among its artifacts ({without_secrets(str(error))}). If its files are elsewhere, set tracking.folder; "
                "otherwise start a new run."
            ) from None
        return _Recorded(load_config(path), from_store=True)


def _refuse_foreign_class(recorded: _Recorded, given: str | None) -> None:
    """Refuse a class that only the store names: its settings may be a stranger's, and must not decide what is imported."""
    wanted = recorded.config.domain_adaptation.method.class_path
    if recorded.from_store and wanted not in (None, given):
        raise InputError(
            f"{Key.CLASS_PATH} is {wanted!r} in the settings of this run in the tracking store, and would be imported; "
            f"if you trust it, set it yourself: --{Key.CLASS_PATH} {wanted}."
        )


def _agreed(job: str, recorded: Config, wanted: Config) -> Config:
    """Return `wanted`; raise InputError if it differs from the run's own settings in one that changes results."""
    if job == Job.PRETRAIN:  # as in the settings that the run recorded
        wanted = as_pretrained(wanted)
    if wanted.trainer.precision == "auto":  # the run recorded what that was
        wanted = replace(wanted, {"trainer.precision": recorded.trainer.precision})
    before, now = flatten(recorded), flatten(wanted)
    for key in [*before, *(key for key in now if key not in before)]:
        if key not in MAY_DIFFER and before.get(key) != now.get(key):
            raise InputError(
                f"{key} is {now.get(key)!r}, but {before.get(key)!r} in the run to resume, which keeps its own settings; "
                "leave it out (and --config, if it is set there), or start a new run without resume."
            )
    return wanted


def _fetch(store: Store, run_id: str, folder: Path) -> None:
    """Fetch the checkpoints among a run's artifacts, if it has any."""
    if any(item.path == CHECKPOINTS for item in store.client.list_artifacts(run_id)):
        part = folder / f"{CHECKPOINTS}.part"  # so that an incomplete copy is not taken for a complete one
        with writing(folder / CHECKPOINTS, part):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            location = store.client.get_run(run_id).info.artifact_uri
            check_room(store, location, CHECKPOINTS, f"{CHECKPOINTS} of run {run_id}", part)
            try:
                store.client.download_artifacts(run_id, CHECKPOINTS, str(part))
            except Exception as error:
                raise InputError(
                    f"the {CHECKPOINTS} of run {run_id} cannot be copied from the tracking store to {folder} "
                    f"({in_one_line(error)}); check that both can be reached and have room, then start again."
                ) from error
            os.replace(part / CHECKPOINTS, folder / CHECKPOINTS)
            part.rmdir()
