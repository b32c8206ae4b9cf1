"""Runs the trials of a study: starts workers, puts back the trials of dead ones, and stops a sweep that keeps failing."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import Config, config_to_dict
from dann_experiments.tracking.run import TrackedRun
from dann_experiments.tracking.store import Store
from dann_experiments.workers.pool import Ended, Pool
from dann_experiments.workers.processes import available_cores
from sweeps.cleanup import Watch, give_back_trials_of, give_back_unnamed
from sweeps.errors import SweepFailed
from sweeps.progress import StudyProgress
from sweeps.settings import SweepConfig, study_folder
from sweeps.study import HALT, STORAGE_ERRORS, Sweep
from sweeps.worker import PATIENCE_SECONDS, PAUSE_SECONDS, Task

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
IDLE_DEATHS = 3  # stop after so many workers in a row died before they claimed a trial: all of them would


def run_trials(
    study: Sweep, sweep: SweepConfig, config: Config, store: Store, address: str, run: TrackedRun, pool: Pool,
    decoded: Path | None = None,
) -> None:  # fmt: skip
    """Run workers until no trial is waiting or the time is up.

    `address`: the storage of the study; `run`: the run of the sweep; `decoded`: folder in which workers share decoded data.
    Raises SweepFailed if too many trials failed in a row or workers keep dying.
    """
    study.set_attribute(HALT, None)
    threads = pool.count * (config.threads or 1)
    if sweep.launcher == "processes" and threads > available_cores():
        log.warning("%d workers of %d threads each share %d cores.", pool.count, config.threads or 1, available_cores())
    deadline = None if sweep.timeout is None else time.time() + sweep.timeout
    pool.logs = study_folder(study.name) / "logs"
    scheduler = _Scheduler(study, sweep, config, store, address, run, pool, deadline, decoded)
    try:
        with StudyProgress(study, pool.count, deadline) as progress:
            away_since: float | None = None
            while True:
                try:
                    if scheduler.is_over():
                        break
                    progress.refresh()
                    away_since = None
                except STORAGE_ERRORS as error:  # a database that restarts: workers wait for it too
                    away_since = away_since or time.monotonic()
                    if time.monotonic() - away_since > PATIENCE_SECONDS:
                        raise
                    log.warning("The study's storage does not answer (%s); waiting.", type(error).__name__)
                    time.sleep(PAUSE_SECONDS)
            progress.refresh()
    finally:
        give_back_trials_of(pool.stop(), study, store, "stopped with its worker")
        if sweep.launcher == "processes":
            give_back_unnamed(study)  # of workers killed while claiming a trial


class _Scheduler:
    """Starts and watches the workers of one driver."""

    def __init__(
        self, study: Sweep, sweep: SweepConfig, config: Config, store: Store, address: str, run: TrackedRun, pool: Pool,
        deadline: float | None, decoded: Path | None,
    ) -> None:  # fmt: skip
        self.study, self.sweep, self.store, self.run, self.pool = study, sweep, store, run, pool
        self.address, self.deadline, self.decoded = address, deadline, decoded
        self.tracking = config_to_dict(config)["tracking"] | {"uri": store.uri}
        self.watch = Watch(study, store)
        self.before = {trial.number for trial in study.trials() if trial.state.is_finished()}
        self.finished = len(self.before)
        self.begun = False  # False until workers have been started: before that there is nothing to wait for
        self.idle_deaths = 0
        self.last_death = ""
        self.scorer: str | None = None
        """Token of the task that also scores the source model."""

    def is_over(self) -> bool:
        """Wait briefly for tasks to end, clean up after them and start new ones. Return True if nothing is left to do."""
        for ended in self.pool.wait(POLL_SECONDS if self.begun else 0.0):
            self._task_ended(ended)
        self.begun = True
        self.watch.look()
        counts = self.study.counts()
        self._log_progress(counts)
        cause = _hopeless(self.study, self.before, self.sweep.max_failures)
        if self.idle_deaths >= IDLE_DEATHS:
            cause = (
                f"{self.idle_deaths} workers in a row ended before they took a trial; the last one {self.last_death}"
            )
        if cause is not None:
            self.study.set_attribute(HALT, cause)
            raise SweepFailed(cause)
        late = self.deadline is not None and time.time() >= self.deadline
        running = len(self.pool.running)
        if not running and (late or not counts["waiting"]) and not counts["running"]:
            self._end(counts, late)
            return True
        if counts["waiting"] and not late:
            for _ in range(min(self.pool.count, counts["waiting"] + counts["running"]) - running):
                task = self._task()
                self.pool.submit(task.token, task)
        return False

    def _task_ended(self, ended: Ended) -> None:
        token = str(ended.key)
        reason = ended.death or (None if ended.error is None else f"stopped with {ended.error}")
        give_back_trials_of([token], self.study, self.store, f"its worker {reason or 'ended'}")
        self.scorer = None if self.scorer == token else self.scorer
        if reason is None:
            self.idle_deaths = 0
            return
        log.warning("worker %s %s", token, reason)
        found = [self.study.worker_of(trial) for trial in self.study.trials()]
        worked = any(worker is not None and worker[0] == token for worker in found)
        self.idle_deaths, self.last_death = (0 if worked else self.idle_deaths + 1), reason

    def _task(self) -> Task:
        token = uuid.uuid4().hex[:8]
        self.scorer = self.scorer or token
        return Task(
            self.address, self.study.name, self.tracking, self.run.run_id, token, self.deadline,
            tuple(self.sweep.allowed_classes), self.scorer == token, self.decoded,
        )  # fmt: skip

    def _log_progress(self, counts: Mapping[str, int]) -> None:
        done = counts["complete"] + counts["pruned"] + counts["fail"]
        if done <= self.finished:
            return
        self.finished = done
        values: dict[str, float] = {f"sweep/{state}": counts[state] for state in ("complete", "pruned", "fail")}
        best = self.study.best()
        if best is not None and best.value is not None:
            values["sweep/best"] = best.value
        self.run.log_metrics(values, step=done)

    def _end(self, counts: Mapping[str, int], late: bool) -> None:
        if counts["fail"] and counts["fail"] == sum(counts.values()):
            raise SweepFailed(f"every trial failed, most of them with: {_common_cause(self.study)}")
        if late and counts["waiting"]:
            log.warning("timeout: %d trials have not been run; `resume` will run them.", counts["waiting"])


def _hopeless(study: Sweep, before: set[int], max_failures: int) -> str | None:
    """Return the reason to stop the sweep if the last `max_failures` trials failed; None otherwise."""
    ended = [t for t in study.counted() if t.state.is_finished() and t.number not in before and t.datetime_complete]
    ended.sort(key=lambda trial: trial.datetime_complete or 0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    last = ended[-max_failures:]
    if len(last) < max_failures or any(trial.state != TrialState.FAIL for trial in last):
        return None
    reason, count = _reasons(last).most_common(1)[0]
    return f"the last {max_failures} trials failed, {count} of them with: {reason}"


def _common_cause(study: Sweep) -> str:
    return _reasons(study.trials(TrialState.FAIL)).most_common(1)[0][0]


def _reasons(trials: list[FrozenTrial]) -> Counter[str]:
    return Counter(str(trial.user_attrs.get("error", "unknown")) for trial in trials)
