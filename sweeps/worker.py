"""One worker: a process that claims and runs trials until none waits. Nothing heavy is imported before `work` is called."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_SECONDS, PAUSE_SECONDS = 600.0, 5.0  # a tracking server or database that restarts is waited for


@dataclass(frozen=True)
class Task:
    """What a worker must be told; everything else stands in the study."""

    storage: str = field(repr=False)  # it may hold a password
    study: str
    tracking: dict[str, Any] = field(repr=False)
    """`tracking.*` of the settings, with the store's real address (the study does not hold it: it may have a password)."""
    sweep_run_id: str
    token: str
    """Name that the driver gave this worker."""
    folder: str
    """Current folder of the driver: relative paths in the settings mean the same in the worker."""
    log_file: str | None = None
    deadline: float | None = None
    """time.time() after which no further trial is claimed."""
    classes: tuple[str, ...] = ()
    """The `class_path`s that the driver allows; what the study says of that does not count."""
    scores_source: bool = False
    """Whether it scores the source model as it is, after its first trial."""
    decoded: str | None = None
    """Folder in which the workers share their decoded data; None = each has its own."""
    gpu: str | None = None
    """What CUDA_VISIBLE_DEVICES becomes; None = as found."""


def process_main(task: Task, environment: dict[str, str]) -> None:
    """A worker as a process of its own: with a log file and the driver's environment, ending with its driver."""
    from dann_experiments.tracking.processes import become_worker

    become_worker(task.log_file, environment)
    try:
        work(task)
    except Exception:
        from dann_experiments.tracking.store import without_secrets

        print(without_secrets(traceback.format_exc()), file=sys.stderr)
        sys.exit(1)


def work(task: Task) -> None:
    """Claim and run trials until none waits, the time is over or the study is halted."""
    if task.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpu
    os.chdir(task.folder)
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

    quiet_libraries()
    shared_cache.share(None if task.decoded is None else Path(task.decoded))
    keep_source_models()
    log = logging.getLogger(__name__)
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
        except UpdateFinishedTrialError:  # it was slow to show life and others gave it back
            log.warning("a trial was given back meanwhile")
            trial = None
        except (KeyboardInterrupt, SystemExit):  # its run is closed as KILLED by now
            if trial is not None:
                study.give_back(trial, "stopped", stopped=True)
            raise
