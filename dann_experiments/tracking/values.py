"""Reads metrics of runs from the store as they were logged. Jobs, sweeps and comparisons all read them through this module.

MLflow's database stores, and servers in front of them, keep infinity as the largest float, 1.797e308, and NaN as NaN. Without
conversion, the mean of values that include an infinite one would be finite, and 1e307 would look like a score.
"""

from __future__ import annotations

import math
from typing import Any

from dann_experiments.tracking.spool import Point

STORED_INFINITY = 1e308  # stored values from here on mean infinity; no metric of a network is that large


def as_logged(value: float) -> float:
    """Return a stored value as it was logged: infinite from `STORED_INFINITY` on."""
    return math.copysign(math.inf, value) if abs(value) >= STORED_INFINITY else value


def last_values(run: Any) -> dict[str, float]:
    """Return the last value of each metric of a run, as it was logged."""
    return {name: as_logged(value) for name, value in run.data.metrics.items()}


def logged_points(client: Any, run_id: str, name: str) -> list[Point]:
    """Return every value of one metric of a run, as it was logged, ordered by step (the store orders them by time)."""
    points = client.get_metric_history(run_id, name)
    found = (Point(name, as_logged(point.value), point.timestamp, point.step) for point in points)
    return sorted(found, key=lambda point: (point.step, point.timestamp))


def context_of(dataset_input: Any) -> str:
    """Return which set a run's data set is, such as `target val`; an empty text if the run does not record it."""
    return next((tag.value for tag in dataset_input.tags if tag.key == "mlflow.data.context"), "")
