"""Reads metrics of runs back from the store as they were logged: the one place where jobs, sweeps and comparisons do so.

MLflow's database stores, and servers in front of them, keep infinity as the largest float, 1.797e308, and NaN as NaN. Taken as
it comes, a mean over values of which one was infinite is finite, and 1e307 looks like a score.
"""

from __future__ import annotations

import math
from typing import Any

from dann_experiments.tracking.spool import Point

STORED_INFINITY = 1e308  # from here on a stored value stands for infinity; no metric of a network is that large


def as_logged(value: float) -> float:
    """A stored value as it was logged: infinite from `STORED_INFINITY` on."""
    return math.copysign(math.inf, value) if abs(value) >= STORED_INFINITY else value


def last_values(run: Any) -> dict[str, float]:
    """The last value of each metric of a run, as it was logged."""
    return {name: as_logged(value) for name, value in run.data.metrics.items()}


def logged_points(client: Any, run_id: str, name: str) -> list[Point]:
    """Every value of one metric of a run, as it was logged, by step; the store gives them by time."""
    points = client.get_metric_history(run_id, name)
    found = (Point(name, as_logged(point.value), point.timestamp, point.step) for point in points)
    return sorted(found, key=lambda point: (point.step, point.timestamp))


def context_of(dataset_input: Any) -> str:
    """The set that a data set of a run is, such as `target val`; an empty text if the run does not say."""
    return next((tag.value for tag in dataset_input.tags if tag.key == "mlflow.data.context"), "")
