"""One worker: a process that claims and runs trials until none waits. Nothing heavy is imported before `work` is called."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

STORE_PATIENCE_SECONDS, STORE_PAUSE_SECONDS = 600.0, 5.0  # a tracking server that restarts is waited for


@dataclass(frozen=True)
class Task:
    """What a worker must be told; everything else stands in the study."""

    storage: str
    study: str
    tracking: dict[str, Any]
    """`tracking.*` of the settings, with the store's real address (the study does not hold it: it may have a password)."""
    sweep_run_id: str
    token: str
    """Name that the driver gave this worker."""
    folder: str
    """Current folder of the driver: relative paths in the settings mean the same in the worker."""
    log_file: str | None = None
    deadline: float | None = None
    """time.time() after which no further trial is claimed."""
    gpu: str | None = None
    """What CUDA_VISIBLE_DEVICES becomes; None = as found."""


def process_main(task: Task) -> None:
    """A worker as a process of its own: with a log file, ending with its driver."""
    if task.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpu
    os.environ.pop("MLFLOW_RUN_ID", None)
    if task.log_file is not None:
        Path(task.log_file).parent.mkdir(parents=True, exist_ok=True)
        file = open(task.log_file, "a", buffering=1)  # noqa: SIM115  (open as long as the process)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver stops its workers itself
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    work(task)


def work(task: Task) -> None:
    """Claim and run trials until none waits, the time is over or the study is halted."""
    os.chdir(task.folder)
    from optuna.exceptions import UpdateFinishedTrialError

    from dann_experiments.command_line import quiet_libraries
    from dann_experiments.config import replace
    from dann_experiments.config.errors import StoreAway
    from dann_experiments.config.parsing import config_from_dict, load_settings
    from sweeps.objective import run_trial
    from sweeps.settings import SweepConfig
    from sweeps.space import read_stored
    from sweeps.study import DEFINITION, HALT, SETTINGS, Sweep, heartbeats, open_storage, process_name

    quiet_libraries()
    study = Sweep(open_storage(task.storage), task.study)
    definition, settings = study.attribute(DEFINITION), study.attribute(SETTINGS)
    sweep = load_settings(SweepConfig, None, {**settings, "objective": definition["objective"]})
    base = config_from_dict(definition["config"])
    base = replace(base, {f"tracking.{key}": value for key, value in task.tracking.items()})
    space = read_stored(definition["space"])
    me, answered = process_name(), time.monotonic()
    while not study.attribute(HALT) and (task.deadline is None or time.time() < task.deadline):
        trial = study.claim(me, task.token)
        if trial is None:
            return
        logging.getLogger(__name__).info("trial %d", trial.number)
        try:
            with heartbeats(study.storage, trial):
                run_trial(study, space, sweep, base, trial, task.sweep_run_id)
            answered = time.monotonic()
        except StoreAway as error:
            study.give_back(trial, f"stopped: {error}", stopped=True)
            if time.monotonic() - answered > STORE_PATIENCE_SECONDS:
                raise
            time.sleep(STORE_PAUSE_SECONDS)
        except UpdateFinishedTrialError:  # it was slow to show life and others gave it back
            logging.getLogger(__name__).warning("trial %d was given back meanwhile", trial.number)
        except (KeyboardInterrupt, SystemExit):  # its run is closed as KILLED by now
            study.give_back(trial, "stopped", stopped=True)
            raise


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _end_with_the_driver() -> None:
    """A driver that was killed cannot stop its workers: they see its end themselves."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        with contextlib.suppress(Exception):
            print("The driver is gone: stopping.", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
