"""Ends what dead processes left open: trials that nobody runs, and runs that nobody will close."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping

from mlflow.exceptions import MlflowException
from optuna.trial import TrialState

from dann_experiments.tracking.orphans import close_orphan, close_orphans
from dann_experiments.tracking.processes import is_elsewhere, live_process
from dann_experiments.tracking.store import Store, without_secrets
from sweeps.study import SWEEP_RUNS, Sweep, stale_trials

log = logging.getLogger(__name__)
ORPHAN_SECONDS = 30.0  # workers see their driver's end at once and close their runs
UNNAMED_SECONDS = 10.0  # longest time between claiming a trial and storing who did


def reap_at_start(study: Sweep, store: Store, one_machine: bool) -> None:
    """End what earlier drivers left, and put their trials in again. The caller is the study's only driver on this machine;
    `one_machine`: in the world (its storage is a file)."""
    for trial in study.trials(TrialState.RUNNING):
        worker = study.worker_of(trial)
        if worker is not None:
            if is_elsewhere(worker[1]) and not one_machine:
                continue  # alive or not: its heartbeat tells
            _end_orphan(worker[1])
        study.give_back(trial, "its worker died, and its driver too")
    study.put_in_again()
    if one_machine:  # wherever the earlier drivers were (a container's host name changes), they are gone
        for run_id in study.attribute(SWEEP_RUNS) or []:
            with contextlib.suppress(Exception):  # deleted, or in another store
                if store.client.get_run(run_id).info.status == "RUNNING":
                    close_orphan(store, run_id, "sweep")
    close_runs(study, store)


def reap_dead_workers(study: Sweep, store: Store, tokens: Iterable[str], reason: str) -> None:
    """Give back the running trials of workers that ended, put them in again, and close their runs."""
    ended = set(tokens)
    for trial in study.trials(TrialState.RUNNING):
        worker = study.worker_of(trial)
        if worker is not None and worker[0] in ended:
            study.give_back(trial, reason)
    study.put_in_again()
    close_runs(study, store)


def give_back_unnamed(study: Sweep) -> None:
    """Give back trials whose worker died between claiming and saying so. For when no worker of the study is left."""
    for trial in study.trials(TrialState.RUNNING):
        if study.worker_of(trial) is None:
            study.give_back(trial, "its worker died while claiming it")
    study.put_in_again()


class Watch:
    """Looks for trials whose worker cannot be asked: of other machines, or killed while claiming."""

    def __init__(self, study: Sweep, store: Store) -> None:
        self._study, self._store = study, store
        self._unnamed: dict[int, float] = {}

    def look(self) -> None:
        """Give back what is found."""
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
    """Close as KILLED the runs that are open without anybody left to write them: of the study's trials that have ended, and
    of processes of this machine that are gone (an earlier driver, a pretraining). A store that does not answer is left
    alone: the next call finds them again."""
    finished = {trial.number for trial in study.trials() if trial.state.is_finished()}
    sweep_runs = study.attribute(SWEEP_RUNS) or []

    def has_ended(tags: Mapping[str, str]) -> bool:
        own = tags.get("dann.job") == "trial" and tags.get("dann.sweep_run_id") in sweep_runs
        return own and int(tags["dann.trial"]) in finished

    try:
        close_orphans(store, "sweep", has_ended)
    except MlflowException as error:
        log.warning(
            "The tracking store does not answer (%s); runs are closed later.", without_secrets(str(error))[:200]
        )


def _end_orphan(process_name: str) -> None:
    """Wait for a worker that outlived its driver to close its run; end it if it does not."""
    import psutil

    process = live_process(process_name)
    if process is None:
        return
    with contextlib.suppress(psutil.Error):
        try:
            process.wait(ORPHAN_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(5)
