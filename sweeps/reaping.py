"""Ends what dead processes left open: trials that nobody runs, and runs that nobody will close."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from optuna.trial import TrialState

from dann_experiments.tracking.store import Store
from sweeps.study import Sweep, is_elsewhere, live_process, stale_trials

ORPHAN_SECONDS = 30.0  # workers see their driver's end at once and close their runs
UNNAMED_SECONDS = 10.0  # longest time between claiming a trial and storing who did


def reap_at_start(study: Sweep, store: Store, one_machine: bool) -> int:
    """End what earlier drivers left; returns how many trials were put in again. The caller is the study's only driver on
    this machine; `one_machine`: in the world (its storage is a file)."""
    count = 0
    for trial in study.trials(TrialState.RUNNING):
        worker = study.worker_of(trial)
        if worker is not None:
            if is_elsewhere(worker[1]) and not one_machine:
                continue  # alive or not: its heartbeat tells
            _end_orphan(worker[1])
        count += study.give_back(trial, "its worker died, and its driver too")
    study.repair()
    close_runs(study, store)
    return count


def reap_dead_workers(study: Sweep, store: Store, tokens: Iterable[str], reason: str) -> None:
    """Give back the running trials of workers that ended, and close their runs."""
    ended = set(tokens)
    for trial in study.trials(TrialState.RUNNING):
        worker = study.worker_of(trial)
        if worker is not None and worker[0] in ended:
            study.give_back(trial, reason)
    close_runs(study, store)


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
        if [True for trial, reason in gone if self._study.give_back(trial, reason)]:
            close_runs(self._study, self._store)


def close_runs(study: Sweep, store: Store) -> None:
    """Close as KILLED the study's runs that are open without anybody left to write them."""
    escaped = study.name.replace("'", "")
    wanted = f"tags.`dann.study` = '{escaped}' and attributes.status = 'RUNNING'"
    finished = {trial.number for trial in study.trials() if trial.state.is_finished()}
    for run in store.client.search_runs([store.experiment_id], wanted, max_results=1000):
        tags = run.data.tags
        if tags.get("dann.job") == "sweep":
            driver = tags.get("dann.driver", "")
            over = not is_elsewhere(driver) and live_process(driver) is None if driver else True
        else:
            over = int(tags.get("dann.trial", -1)) in finished
        if over:
            store.client.set_tag(run.info.run_id, "dann.closed_by", "sweep: its process was gone")
            store.client.set_terminated(run.info.run_id, "KILLED")


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
