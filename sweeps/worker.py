"""The worker of a sweep: claims trials of the study and runs them until none is waiting."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError

from dann_experiments.command_line import quiet_libraries
from dann_experiments.config import replace
from dann_experiments.config.errors import StoreAway
from dann_experiments.config.parsing import config_from_dict, load_settings
from dann_experiments.data import shared_cache
from dann_experiments.jobs.source_model import keep_source_models
from dann_experiments.tracking.processes import process_name
from sweeps.objective import run_trial, score_source_model
from sweeps.settings import SweepConfig
from sweeps.space import read_stored
from sweeps.study import DEFINITION, HALT, SETTINGS, STORAGE_ERRORS, Sweep, heartbeats, open_storage

log = logging.getLogger(__name__)
PATIENCE_SECONDS, PAUSE_SECONDS = 600.0, 5.0  # how long, and how often, a server or database that restarts is retried


@dataclass(frozen=True)
class Task:
    """The input of a worker. Everything else is in the study."""

    storage: str = field(repr=False)  # it may hold a password
    study: str
    tracking: dict[str, Any] = field(repr=False)
    """The settings `tracking.*` with the full address of the store, which the study does not store: it may contain a password."""
    sweep_run_id: str
    token: str
    """The driver's id of this task, stored with each trial that the worker claims."""
    deadline: float | None = None
    """time.time() after which no further trial is claimed."""
    classes: tuple[str, ...] = ()
    """The `class_path` values that the driver allows. Those stored in the study are ignored."""
    scores_source: bool = False
    """True if this worker also scores the unadapted source model, after its first trial."""
    decoded: Path | None = None
    """Folder in which the workers share their decoded data; None = each has its own."""


def work(task: Task) -> None:
    """Claim and run trials until none is waiting, the time is up or the study is halted."""
    quiet_libraries()
    shared_cache.share(task.decoded)
    keep_source_models()
    study = Sweep(open_storage(task.storage), task.study)
    definition, settings = study.attribute(DEFINITION), study.attribute(SETTINGS)
    own = {"objective": definition["objective"], "allow_class_path": list(task.classes)}
    sweep = load_settings(SweepConfig, None, {**settings, **own})
    base = config_from_dict(definition["config"])
    base = replace(base, {f"tracking.{key}": value for key, value in task.tracking.items()})
    space = read_stored(definition["space"])
    me, answered, ran = process_name(), time.monotonic(), False
    to_score = task.scores_source
    trial, why = None, ""  # a claimed trial to put back after an error, and the reason
    while True:
        try:
            if trial is not None:
                study.give_back(trial, why, stopped=True)
                trial = None
            if to_score and ran:
                score_source_model(study, base)
                to_score = False
            if study.attribute(HALT) or (task.deadline is not None and time.time() >= task.deadline):
                return
            trial = study.claim(me, task.token)
            if trial is None:
                return
            log.info("trial %d", trial.number)
            with heartbeats(study.storage, trial):
                run_trial(study, space, sweep, base, trial, task.sweep_run_id)
            trial, answered, ran = None, time.monotonic(), True
        except (StoreAway, *STORAGE_ERRORS) as error:
            why = f"stopped: {type(error).__name__}"
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise
            log.warning("%s: waiting for the store", why)
            time.sleep(PAUSE_SECONDS)
        except UpdateFinishedTrialError:  # its heartbeat was late, and another process put the trial back
            log.warning("another process has meanwhile put this trial back into the study")
            trial = None
        except (KeyboardInterrupt, SystemExit):  # the trial's run has been closed as KILLED
            if trial is not None:
                study.give_back(trial, "stopped", stopped=True)
            raise
