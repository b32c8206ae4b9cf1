"""Hyperparameter search with Optuna; `dann-sweep --help` lists the commands.

Public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweeps.driver import SweepResult, find_study, resume_sweep, run_sweep
    from sweeps.errors import SweepFailed
    from sweeps.report import config_of, trials_table
    from sweeps.settings import SweepConfig

_HOMES = {
    "SweepConfig": "settings",
    "SweepFailed": "driver",
    "SweepResult": "driver",
    "config_of": "report",
    "find_study": "driver",
    "resume_sweep": "driver",
    "run_sweep": "driver",
    "trials_table": "report",
}

__all__ = [
    "SweepConfig",
    "SweepFailed",
    "SweepResult",
    "config_of",
    "find_study",
    "resume_sweep",
    "run_sweep",
    "trials_table",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
