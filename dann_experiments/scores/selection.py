"""The label-free scores that choose a checkpoint or a trial: their metric names and how their values are compared.

All four measure confidence or diversity of predictions, not whether they are correct: a confident, wrong network may score well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dann_experiments.names import Metric

"""1 where the source's IoU is within `monitor.forgetting_threshold` of its baseline, else 0."""


@dataclass(frozen=True)
class Score:
    """The direction and the worst value of a score."""

    better: Literal["max", "min"]
    worst: float
    """A value outside of the score's range 0..1, so that it loses against every measured value."""


SCORES: Mapping[str, Score] = MappingProxyType(
    {
        Metric.SELECT_ENTROPY: Score("min", 2.0),
        Metric.SELECT_INFOMAX: Score("max", -1.0),
        Metric.SELECT_SND: Score("max", -1.0),
        Metric.SELECT_BNM: Score("max", -1.0),
    }
)
"""The scores by their full metric name."""


def choice_value(metric: str, metrics: Mapping[str, float]) -> float:
    """Return the value of `metric` by which a checkpoint or a trial is chosen; `metrics`: all its metrics.

    A `select/` score counts as its worst value if `select/source_kept` is 0, so that a network that forgot the source is chosen
    only if there is no other, and if it is NaN (no pixel with data, or logits that are not finite). Without `select/source_kept`
    the source counts as kept. Other metrics are returned unchanged. Raises KeyError if `metric` is missing.

    >>> choice_value("select/bnm", {"select/bnm": 0.8, "select/source_kept": 0.0})
    -1.0
    """
    value = float(metrics[metric])
    score = SCORES.get(metric)
    if score is not None and (math.isnan(value) or metrics.get(Metric.SOURCE_KEPT, 1.0) == 0):
        return score.worst
    return value
