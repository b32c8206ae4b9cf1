"""Keeps workers going until no trial is left: starts them, gives back what dead ones held, stops what is hopeless."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import Config, config_to_dict, replace
from dann_experiments.tracking.processes import available_cores, default_workers, visible_gpus
from dann_experiments.tracking.run import TrackedRun
from dann_experiments.tracking.store import Store
from sweeps.errors import SweepFailed
from sweeps.launchers import Launcher, ProcessLauncher, RayLauncher
from sweeps.progress import Progress
from sweeps.reaping import Watch, give_back_unnamed, reap_dead_workers
from sweeps.settings import SweepConfig
from sweeps.study import HALT, STORAGE_ERRORS, Sweep, study_folder
from sweeps.worker import PATIENCE_SECONDS, PAUSE_SECONDS, Task

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
IDLE_DEATHS = 3  # workers in a row that die before they claim a trial: something is wrong with all of them


@dataclass(frozen=True)
class Crew:
    """Who runs the trials."""

    launcher: Launcher
    count: int
    """Trials at a time."""
    decoded: Path | None = None
    """Where the workers share their decoded data."""


@contextlib.contextmanager
def crew_for(sweep: SweepConfig, config: Config, decoded: Path | None = None) -> Iterator[Crew]:
    """The launcher that the settings name. Raises InputError where there is no Ray cluster, or none that holds a trial."""
    if sweep.launcher == "ray":
        launcher = RayLauncher(sweep.ray_address, sweep.cpus_per_trial, sweep.gpus_per_trial or 0.0)
        crew = Crew(launcher, sweep.workers or max(1, launcher.capacity))
    else:
        gpus = visible_gpus(config.trainer.accelerator)
        if sweep.gpus_per_trial is not None and not gpus:
            log.warning("gpus_per_trial has no effect: there is no GPU that trainer.accelerator may use.")
        crew = Crew(ProcessLauncher(gpus), worker_count(sweep, gpus), decoded)
    try:
        yield crew
    finally:
        crew.launcher.close()


def with_threads(config: Config, sweep: SweepConfig) -> Config:
    """The cores shared among the workers. Stored with the study: the last digits of a result depend on it."""
    if sweep.launcher == "ray":
        share = max(1, int(sweep.cpus_per_trial))
    else:
        share = max(1, available_cores() // worker_count(sweep, visible_gpus(config.trainer.accelerator)))
    if config.threads is not None and config.threads <= share:
        return config
    log.info("threads: %d for each trial, so that the workers share the cores.", share)
    return replace(config, {"threads": share})


def keep_going(
    study: Sweep, sweep: SweepConfig, config: Config, store: Store, address: str, run: TrackedRun, crew: Crew
) -> None:
    """Run until no trial waits, or the time is over. Raises SweepFailed when it is hopeless."""
    study.set_attribute(HALT, None)
    threads = crew.count * (config.threads or 1)
    if sweep.launcher == "processes" and threads > available_cores():
        log.warning("%d workers of %d threads each share %d cores.", crew.count, config.threads or 1, available_cores())
    deadline = None if sweep.timeout is None else time.time() + sweep.timeout
    launcher, shift = crew.launcher, _Shift(study, sweep, config, store, address, run, crew, deadline)
    try:
        with Progress(study, crew.count, deadline) as progress:
            away_since: float | None = None
            while True:
                try:
                    if shift.is_over():
                        break
                    progress.update()
                    away_since = None
                except STORAGE_ERRORS as error:  # a database that restarts: the workers wait for it as well
                    away_since = away_since or time.monotonic()
                    if time.monotonic() - away_since > PATIENCE_SECONDS:
                        raise
                    log.warning("The study's storage does not answer (%s); waiting.", type(error).__name__)
                    time.sleep(PAUSE_SECONDS)
            progress.update()
    finally:
        tokens = launcher.alive
        launcher.stop()
        reap_dead_workers(study, store, tokens, "stopped with its worker")
        if sweep.launcher == "processes":
            give_back_unnamed(study)  # killed in the moment of claiming


class _Shift:
    """One driver's time with a study."""

    def __init__(
        self, study: Sweep, sweep: SweepConfig, config: Config, store: Store, address: str, run: TrackedRun, crew: Crew,
        deadline: float | None,
    ) -> None:  # fmt: skip
        self.study, self.sweep, self.store, self.run, self.deadline = study, sweep, store, run, deadline
        self.launcher, self.count = crew.launcher, crew.count
        self.address, self.decoded = address, crew.decoded
        self.tracking = config_to_dict(config)["tracking"] | {"uri": store.uri}
        self.watch = Watch(study, store)
        self.before = {trial.number for trial in study.trials() if trial.state.is_finished()}
        self.finished = len(self.before)
        self.begun = False  # whether workers have been started: until then there is nothing to wait for
        self.idle_deaths = 0
        self.last_death = ""
        self.scorer: str | None = None
        """Token of the worker that scores the source model beside the trials of the others."""

    def is_over(self) -> bool:
        """Wait a moment for workers to end, look after what they left, start new ones; True when nothing is left to do."""
        for token, reason in self.launcher.wait(POLL_SECONDS if self.begun else 0.0).items():
            self._worker_ended(token, reason)
        self.begun = True
        self.watch.look()
        counts = self.study.counts()
        self._log_progress(counts)
        cause = _hopeless(self.study, self.before, self.sweep.max_failures)
        if self.idle_deaths >= IDLE_DEATHS:
            cause = f"{self.idle_deaths} workers in a row died before they took a trial, the last one {self.last_death}"
        if cause is not None:
            self.study.set_attribute(HALT, cause)
            raise SweepFailed(cause)
        late = self.deadline is not None and time.time() >= self.deadline
        alive = len(self.launcher.alive)
        if not alive and (late or not counts["waiting"]) and not counts["running"]:
            self._end(counts, late)
            return True
        if counts["waiting"] and not late:
            for _ in range(min(self.count, counts["waiting"] + counts["running"]) - alive):
                self.launcher.start(self._task())
        return False

    def _worker_ended(self, token: str, reason: str | None) -> None:
        how = f"its worker was {reason}" if reason else "its worker ended"
        reap_dead_workers(self.study, self.store, [token], how)
        self.scorer = None if self.scorer == token else self.scorer
        if reason is None:
            self.idle_deaths = 0
            return
        log.warning("worker %s was %s", token, reason)
        found = [self.study.worker_of(trial) for trial in self.study.trials()]
        worked = any(worker is not None and worker[0] == token for worker in found)
        self.idle_deaths, self.last_death = (0 if worked else self.idle_deaths + 1), reason

    def _task(self) -> Task:
        token = uuid.uuid4().hex[:8]
        self.scorer = self.scorer or token
        logs = str((study_folder(self.study.name) / "logs" / f"worker-{token}.log").resolve())
        return Task(
            self.address, self.study.name, self.tracking, self.run.run_id, token, os.getcwd(), logs, self.deadline,
            classes=tuple(self.sweep.allowed_classes), scores_source=self.scorer == token,
            decoded=None if self.decoded is None else str(self.decoded),
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
            log.warning("timeout: %d trials have not been run; `resume` runs them.", counts["waiting"])


def _hopeless(study: Sweep, before: set[int], max_failures: int) -> str | None:
    """Why the sweep should stop: the last `max_failures` trials failed."""
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


def worker_count(sweep: SweepConfig, gpus: list[str]) -> int:
    """Processes at a time: as given, else as many as the GPUs hold, else one a core up to the usual limit."""
    if sweep.workers is not None:
        return sweep.workers
    return default_workers(gpus * int(1 / (sweep.gpus_per_trial or 1.0) + 1e-6))
