"""What a worker of a sweep does: claim trials of the study and run them until none waits."""

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
PATIENCE_SECONDS, PAUSE_SECONDS = 600.0, 5.0  # a tracking server or database that restarts is waited for


@dataclass(frozen=True)
class Task:
    """What a worker needs to know; everything else is in the study."""

    storage: str = field(repr=False)  # it may hold a password
    study: str
    tracking: dict[str, Any] = field(repr=False)
    """`tracking.*` of the settings, with the store's real address (the study does not hold it: it may have a password)."""
    sweep_run_id: str
    token: str
    """The driver's name for this task, stored with each trial that it claims."""
    deadline: float | None = None
    """time.time() after which no further trial is claimed."""
    classes: tuple[str, ...] = ()
    """The `class_path`s that the driver allows; what the study says of them does not count."""
    scores_source: bool = False
    """Whether it scores the source model as it is, after its first trial."""
    decoded: Path | None = None
    """Folder in which the workers share their decoded data; None = each has its own."""


def work(task: Task) -> None:
    """Claim and run trials until none waits, the time is over or the study is halted."""
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
    trial, why = None, ""  # a trial that is held after an error, to be given back
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
        except UpdateFinishedTrialError:  # it was slow to show life, and others gave it back
            log.warning("a trial was given back meanwhile")
            trial = None
        except (KeyboardInterrupt, SystemExit):  # the trial's run has been closed as KILLED
            if trial is not None:
                study.give_back(trial, "stopped", stopped=True)
            raise
