"""Cleans up after dead processes: puts their trials back into the study and closes their MLflow runs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping

from mlflow.exceptions import MlflowException
from optuna.trial import TrialState

from dann_experiments.names import Job, Tag
from dann_experiments.tracking.processes import is_elsewhere, live_process
from dann_experiments.tracking.stale_runs import close_stale_run, close_stale_runs
from dann_experiments.tracking.store import Store, without_secrets
from dann_experiments.workers.pool import Key
from sweeps.study import SWEEP_RUNS, Sweep, stale_trials

log = logging.getLogger(__name__)
LEAVE_SECONDS = 30.0  # time for workers to close their runs: they notice at once that their driver is gone
UNNAMED_SECONDS = 10.0  # longest time between claiming a trial and storing the name of the worker


def clean_up_at_start(study: Sweep, store: Store, one_machine: bool) -> None:
    """End the workers of earlier drivers, put their trials back into the study and close their runs.

    The caller is the only driver of the study on this machine. `one_machine`: the storage of the study is a file, so there is
    no driver on other machines either.
    """
    for trial in study.trials(TrialState.RUNNING):
        worker = study.worker_of(trial)
        if worker is not None:
            if is_elsewhere(worker[1]) and not one_machine:
                continue  # its heartbeat shows whether it is alive
            _end_stale_worker(worker[1])
        study.give_back(trial, "its worker died, and its driver too")
    study.put_in_again()
    if one_machine:  # earlier drivers are gone, even those with another host name (that of a container changes)
        for run_id in study.attribute(SWEEP_RUNS) or []:
            with contextlib.suppress(Exception):  # deleted, or in another store
                if store.client.get_run(run_id).info.status == "RUNNING":
                    close_stale_run(store, run_id, "sweep")
    close_runs(study, store)


def give_back_trials_of(tasks: Iterable[Key], study: Sweep, store: Store, reason: str) -> None:
    """Put the running trials of tasks (tokens) that have ended back into the study, and close their runs."""
    ended = set(tasks)
    for trial in study.trials(TrialState.RUNNING):
        worker = study.worker_of(trial)
        if worker is not None and worker[0] in ended:
            study.give_back(trial, reason)
    study.put_in_again()
    close_runs(study, store)


def give_back_unnamed(study: Sweep) -> None:
    """Put back trials whose worker died between claiming them and storing its name. Call it when no worker is left."""
    for trial in study.trials(TrialState.RUNNING):
        if study.worker_of(trial) is None:
            study.give_back(trial, "its worker died while claiming it")
    study.put_in_again()


class Watch:
    """Looks for trials of dead workers that the pool cannot report: on other machines, or killed while claiming a trial."""

    def __init__(self, study: Sweep, store: Store) -> None:
        self._study, self._store = study, store
        self._unnamed: dict[int, float] = {}

    def look(self) -> None:
        """Put the trials of dead workers back into the study."""
        gone = [(trial, "its heartbeat stopped") for trial in stale_trials(self._study)]
        now = time.monotonic()
        for trial in self._study.trials(TrialState.RUNNING):
            if self._study.worker_of(trial) is not None:
                self._unnamed.pop(trial.number, None)
            elif now - self._unnamed.setdefault(trial.number, now) > UNNAMED_SECONDS:
                gone.append((trial, "its worker died while claiming it"))
        given_back = [trial.number for trial, reason in gone if self._study.give_back(trial, reason)]
        self._study.put_in_again()
        if given_back:
            close_runs(self._study, self._store)


def close_runs(study: Sweep, store: Store) -> None:
    """Close open runs as KILLED if their trial has ended or their process on this machine (a driver, a pretraining) is gone.

    If the tracking store does not answer, a later call closes them.
    """
    finished = {trial.number for trial in study.trials() if trial.state.is_finished()}
    sweep_runs = study.attribute(SWEEP_RUNS) or []

    def has_ended(tags: Mapping[str, str]) -> bool:
        own = tags.get(Tag.JOB) == Job.TRIAL and tags.get(Tag.SWEEP_RUN_ID) in sweep_runs
        return own and int(tags[Tag.TRIAL]) in finished

    try:
        close_stale_runs(store, "sweep", has_ended)
    except MlflowException as error:
        log.warning(
            "The tracking store does not answer (%s); runs will be closed later.", without_secrets(str(error))[:200]
        )


def _end_stale_worker(process_name: str) -> None:
    """Wait until a worker whose driver is gone has closed its run; kill it if it takes too long."""
    import psutil

    process = live_process(process_name)
    if process is None:
        return
    with contextlib.suppress(psutil.Error):
        try:
            process.wait(LEAVE_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(5)
