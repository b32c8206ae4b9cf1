"""The order of trials: those that kept the source before those that forgot it, then by value, then by number.

The one place that decides which trial is best, for reports, the command line, `confirm` and pruners: Optuna's storages break
ties each in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import optuna
from optuna.trial import FrozenTrial

from dann_experiments.names import Metric

FORGETTING = "source_forgetting"
"""Optuna constraint: how much more the source's IoU fell than `monitor.forgetting_threshold` allows; at most 0 if it was kept."""


def set_forgetting(trial: optuna.Trial, drop: float | None, threshold: float) -> None:
    """Store with a running trial how much its model forgot, as a constraint that samplers know.

    `drop`: how far the source's IoU fell below its value at the start; the constraint is not set if it is not known (None, NaN).
    """
    if drop is not None and math.isfinite(drop):
        trial.set_constraint(FORGETTING, drop - threshold)


def forgot(trial: FrozenTrial) -> bool:
    """Return whether the model of a trial forgot the source; False if that is not known, as in studies of earlier versions."""
    return any(value > 0 for value in trial.constraints.values())


def mean_forgot(trials: Sequence[FrozenTrial]) -> bool:
    """Return whether the source was forgotten in the mean over trials with the same settings, where it is known."""
    known = [trial.constraints[FORGETTING] for trial in trials if FORGETTING in trial.constraints]
    return bool(known) and math.fsum(known) > 0


def drop_of(trial: FrozenTrial) -> float | None:
    """Return how far the source's IoU fell below its value at the start; None if that is not known."""
    return trial.user_attrs.get("scores", {}).get(Metric.SOURCE_DROP)


def order(forgets: bool, value: float, number: int, maximizes: bool) -> tuple[bool, float, int]:
    """Return a key by which trials are sorted, best first. `value`: of the objective."""
    return forgets, -value if maximizes else value, number


def ranked(trials: Iterable[FrozenTrial], maximizes: bool) -> list[FrozenTrial]:
    """Return complete trials, best first."""
    return sorted(trials, key=lambda trial: order(forgot(trial), _value(trial), trial.number, maximizes))


def passed_over(trials: Sequence[FrozenTrial], maximizes: bool) -> FrozenTrial | None:
    """Return the complete trial with the best value if another one won because this one forgot the source; otherwise None."""
    best = next(iter(ranked(trials, maximizes)), None)
    by_value = min(trials, key=lambda trial: order(False, _value(trial), trial.number, maximizes), default=None)
    if best is None or by_value is None or not forgot(by_value) or forgot(best):
        return None
    return by_value


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
