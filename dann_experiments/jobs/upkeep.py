"""Cleans up what killed processes and unavailable stores left: open runs, and folders that were not sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dann_experiments.config import Config, InputError
from dann_experiments.names import Tag
from dann_experiments.tracking.logged_model import models_without_run
from dann_experiments.tracking.processes import live_process
from dann_experiments.tracking.stale_runs import RUNNING, close_stale_runs
from dann_experiments.tracking.store import experiment_ids, found_runs, open_store
from dann_experiments.tracking.sync import Leftover, leftovers, sync


@dataclass(frozen=True)
class Health:
    """The result of `doctor`."""

    closed: list[str]
    """Ids of the stale runs that were closed."""
    running: int
    """Number of runs whose process is alive on this machine."""
    elsewhere: list[str]
    """Ids of open runs of other machines, or of programs that do not record which process writes them."""
    leftovers: list[Path]
    """Folders of runs in `tracking.folder`."""
    models_without_run: list[str] = field(default_factory=list)
    """Ids of models whose run was deleted: MLflow deletes runs without their models."""


def sync_runs(config: Config) -> Iterator[Leftover]:
    """Send every run's folder in `tracking.folder` to the store, and yield the results one by one. Raises InputError if the store
    does not answer or the folder does not exist."""
    folder = Path(config.tracking.folder)
    if not folder.is_dir():
        raise InputError(
            f"tracking.folder is {str(folder)!r}, which is not a folder; set it to the folder in which runs kept their files."
        )
    return sync(open_store(config.tracking.uri, config.tracking.experiment, for_runs=False), folder)


def doctor(config: Config) -> Health:
    """Close the stale runs of this machine in all experiments of the store. Raises InputError if the store does not answer."""
    store = open_store(config.tracking.uri, config.tracking.experiment, for_runs=False)
    experiments = experiment_ids(store)
    closed = close_stale_runs(store, "doctor", experiments=experiments)
    open_runs = found_runs(store, experiments, RUNNING)
    processes = {run.info.run_id: run.data.tags.get(Tag.PROCESS) for run in open_runs}
    here = {run_id for run_id, process in processes.items() if process is not None and live_process(process)}
    elsewhere = [run_id for run_id in processes if run_id not in here]
    lone = models_without_run(store, experiments)
    return Health(closed, len(here), elsewhere, leftovers(Path(config.tracking.folder)), lone)
