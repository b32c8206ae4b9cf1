"""The floor of a comparison's scores and the IoUs of its classes, from the metrics of its runs: what the verdict asks beside
the mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.comparison.verdict import MIN_SEEDS, SMALLEST_GAIN, ClassScores, paired
from dann_experiments.config.store_names import labels_in_store
from dann_experiments.names import Metric
from dann_experiments.scores.floor import near_floor

ArmScores = Mapping[str, Mapping[int, float]]
"""Arm -> seed -> score."""


def floor_of(runs: Sequence[ArmRun], metric: str) -> float:
    """Return the floor of an `iou/...` metric, 0..1, which is the same for all runs because they are scored on the same images;
    NaN if no run has it: earlier versions did not measure it."""
    name = Metric.floor(metric.removeprefix(Metric.IOU))
    found = (run.metrics.get(name, math.nan) for run in runs)
    return next((value for value in found if math.isfinite(value)), math.nan)


def classes_of(
    runs: Sequence[ArmRun], metric: str, class_names: Sequence[str], arms: tuple[str, str, str]
) -> dict[str, ClassScores]:
    """Return class -> its IoUs in the set of `metric`, for the classes that an adapted run has; `arms`: the adapted arm, the
    control and source only (an unknown name: no scores)."""
    stored = labels_in_store(class_names)
    found = {}
    for label in class_names:
        name = Metric.class_iou(metric.removeprefix(Metric.IOU), stored[label])
        adapted, control, source = (
            {run.seed: run.metrics[name] for run in runs if run.arm == arm and name in run.metrics} for arm in arms
        )
        if adapted:
            found[label] = ClassScores(adapted, control, source)
    return found


def floor_notes(arms: Sequence[Arm], scores: ArmScores, metric: str, floor: float) -> Iterator[str]:
    """Yield notes about arms whose scores are not above the floor, or one that the floor is unknown."""
    if not math.isfinite(floor):
        yield (
            f"These runs do not have the floor of {metric} (earlier versions did not measure it), so the verdict does not ask "
            "whether the scores are above it: evaluate a model again to see it."
        )
        return
    low = [arm.name for arm in arms if scores.get(arm.name) and not _above(scores[arm.name], floor)]
    if low:
        yield (
            f"{', '.join(low)}: {metric} is within noise of the floor or below it. The floor is {floor * 100:.1f} points, the "
            "score of a map that is the most frequent class everywhere; look at the classes."
        )


def _above(scores: Mapping[int, float], floor: float) -> bool:
    """Return whether an arm is above the floor: by its interval, with too few seeds by what seeds usually differ."""
    above = paired(scores, dict.fromkeys(scores, floor))
    if above.n < MIN_SEEDS:
        return not near_floor(floor + above.mean, floor)
    return above.low > 0 and above.mean >= SMALLEST_GAIN
