"""Keeps the time of a process up to its first training step, or with START_UNTIL=end up to its end; `benchmarks/start.py` and
`benchmarks/waits.py` lay it as `sitecustomize.py` where every Python process that they start reads it. Seconds of a part are its
own: what a part within it takes is that one's.
"""

from __future__ import annotations

import atexit
import functools
import importlib.machinery
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

WATCHED = {
    "dann_experiments.config.parsing": {"load_config": "settings"},
    "dann_experiments.tracking.store": {"open_store": "store"},
    "dann_experiments.jobs.build": {
        "find_data": "data", "make_network": "network", "make_taps": "network", "make_method": "network",
    },
    "dann_experiments.jobs.build_training": {"make_loop": "trainer"},
    "dann_experiments.jobs.checks": {"checked_sets": "data"},
    "dann_experiments.jobs.identity": {"source_digest": "data", "run_digest": "data"},
    "dann_experiments.jobs.source_model": {"find_or_make_source_model": "network", "load_source_model": "network"},
    "dann_experiments.tracking.run": {"TrackedRun.log_params": "run", "TrackedRun.log_inputs": "run"},
    "dann_experiments.tracking.sender": {"Sender.__init__": "run"},
    "dann_experiments.jobs.run_training": {"describe_run": "run"},
    "dann_experiments.jobs.pictures": {"Album.__init__": "before", "Album.add": "before"},
    "dann_experiments.training.alignment": {"Alignment.__init__": "before", "Alignment.measure": "before"},
    "pytorch_lightning.trainer.trainer": {"Trainer._run_sanity_check": "baseline"},
    "dann_experiments.training.module": {"AdaptationModule.training_step": "step"},
}  # fmt: skip
_parts: dict[str, float] = {}
_open: list[list[Any]] = []  # [part, when it began, seconds of parts within it]
_main = threading.main_thread()
_began = time.perf_counter()
_until_end = os.environ.get("START_UNTIL") == "end"


def _enter(part: str) -> None:
    _open.append([part, time.perf_counter(), 0.0])


def _leave() -> None:
    part, began, within = _open.pop()
    taken = time.perf_counter() - began
    _parts[part] = _parts.get(part, 0.0) + taken - within
    if _open:
        _open[-1][2] += taken


def mark() -> None:
    """Write down that this process has come to its first step."""
    now = time.time()
    while _open:
        _leave()
    parts = {**_parts, "other": time.perf_counter() - _began - sum(_parts.values())}
    path = Path(os.environ["START_MARKS"]) / f"{os.getpid()}"
    path.write_text(json.dumps({"time": now, "parts": parts}))
    os.replace(path, path.with_suffix(".mark"))


def _timed(function: Any, part: str) -> Any:
    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        if part == "step" and "step" not in _parts and not _until_end:
            mark()
            _parts["step"] = 0.0
        if threading.current_thread() is not _main or ("step" in _parts and not _until_end):
            return function(*arguments, **named)
        _enter(part)
        try:
            return function(*arguments, **named)
        finally:
            _leave()
            if part == "baseline" and not _until_end:
                _enter("first batch")

    return timed


def _watch(name: str, module: Any) -> None:
    for path, part in WATCHED.get(name, {}).items():
        *classes, last = path.split(".")
        holder = module
        for one in classes:
            holder = getattr(holder, one)
        if not hasattr(holder, last):  # an earlier version
            continue
        setattr(holder, last, _timed(getattr(holder, last), part))


def _with_time(loader: Any) -> None:
    run = loader.exec_module

    @functools.wraps(run)
    def exec_module(self: Any, module: Any) -> None:
        counts = threading.current_thread() is _main and (not _open or _open[-1][0] != "imports")
        if counts:
            _enter("imports")
        try:
            run(self, module)
        finally:
            if counts:
                _leave()
        _watch(module.__name__, module)

    loader.exec_module = exec_module


if "START_MARKS" in os.environ and __name__ == "sitecustomize":
    _with_time(importlib.machinery.SourceFileLoader)
    if _until_end:
        atexit.register(mark)
