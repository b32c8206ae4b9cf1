"""Did adaptation help? The rule that turns scores over seeds into a verdict (docs/verdict.md; checked by benchmarks/verdict.py).

D: adapted, C: lambda = 0 control (target images forwarded, no adversary), S: source only. A point is 0.01 of a score of 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from scipy.special import stdtrit

if TYPE_CHECKING:
    import pandas as pd

Outcome = Literal[
    "helped", "hurt", "no evidence", "explained by BatchNorm statistics", "at the floor", "at the cost of a class"
]

CONFIDENCE = 0.95
"""Confidence of each two-sided interval if one arm is judged."""
MIN_SEEDS = 3
"""With two seeds the interval (Student's t, one degree of freedom) is 25 standard errors wide: too wide to decide anything."""
SMALLEST_GAIN = 0.01
"""One IoU point. A smaller gain may be real but is not worth a second training; another split or checkpoint changes more."""
EXPLAINED_SHARE = 0.5
"""Share of the gain over source only that the control must reach by itself to explain the gain."""
NEAR_ZERO = 0.05
"""A class that ends with a lower IoU and lost half or more is as good as not mapped any more."""
_SAME = 1e-9  # differences this close count as equal: subtraction has errors of about 1e-16


@dataclass(frozen=True)
class Interval:
    """Paired differences over seeds: their mean and its confidence interval."""

    mean: float
    """Mean difference; NaN without seeds."""
    low: float
    """Lower end of the confidence interval of the mean; NaN with fewer than two seeds."""
    high: float
    std: float
    """Standard deviation of the differences (n - 1); NaN with fewer than two seeds."""
    n: int
    """Number of seeds that both arms have."""


@dataclass(frozen=True)
class ClassScores:
    """The IoU of one class over seeds, in each arm that a verdict compares; seed -> IoU, 0 to 1."""

    adapted: Mapping[int, float]
    control: Mapping[int, float]
    source_only: Mapping[int, float]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one adapted arm, with its reason."""

    arm: str
    outcome: Outcome
    metric: str
    against_source: Interval
    """D - S."""
    against_control: Interval
    """D - C."""
    control_against_source: Interval
    """C - S."""
    confidence: float
    """Confidence of each interval, after the correction for several arms."""
    reason: str
    """The part of the rule that decided, with numbers in points."""
    against_floor: Interval | None = None
    """D less the mean IoU of the best constant prediction; None if that is not known."""

    @property
    def line(self) -> str:
        """Arm, outcome and reason as one printed line."""
        return f"{self.arm}: {self.outcome}. {self.reason}"


def paired(a: Mapping[int, float], b: Mapping[int, float], confidence: float = CONFIDENCE) -> Interval:
    """Return the difference a - b over the seeds that both have, with a two-sided Student's t interval of its mean.

    `a`, `b`: seed -> score; NaN and infinity count as missing. Raises ValueError for a `confidence` outside of 0 to 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1, as in 0.95.")
    differences = [a[seed] - b[seed] for seed in a if seed in b and math.isfinite(a[seed]) and math.isfinite(b[seed])]
    n = len(differences)
    mean = math.fsum(differences) / n if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan, n)
    std = math.sqrt(math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1))
    half = _quantile(confidence, n - 1) * std / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, std, n)


@lru_cache
def _quantile(confidence: float, freedom: int) -> float:
    """Return half the width of a two-sided Student's t interval, in standard errors."""
    return float(stdtrit(freedom, 0.5 + confidence / 2))


def judge(
    arm: str,
    metric: str,
    adapted: Mapping[int, float],
    control: Mapping[int, float],
    source_only: Mapping[int, float],
    arms: int = 1,
    confidence: float = CONFIDENCE,
    floor: float = math.nan,
    classes: Mapping[str, ClassScores] = {},
) -> Verdict:
    """Judge one adapted arm by its scores over seeds (seed -> score, 0 to 1, higher is better), each arm's seeds paired.

    arms: number of adapted arms judged in the same comparison. Each interval then has confidence 1 - (1 - confidence) / arms
    (Bonferroni), because the best of many arms would exceed any fixed level by luck.
    control may be empty: then only harm can be shown. floor: the mean IoU of the best constant prediction (`floor/SET`), above
    which D must be; NaN if it is not known: then this is not asked. classes: class -> its IoUs; none if they are not known. Each
    class has an interval of `confidence`, uncorrected. Raises ValueError for scores that look like percentages.
    """
    if arms < 1:
        raise ValueError(
            f"arms is {arms}; it is the number of adapted arms judged together, including this one: at least 1."
        )
    for name, scores in (("adapted", adapted), ("control", control), ("source_only", source_only)):
        large = [score for score in scores.values() if math.isfinite(score) and abs(score) > 2]
        if large:
            raise ValueError(f"{name} scores of {arm} hold {large[0]:g}; {metric} must be from 0 to 1, not in percent.")
    for_classes, confidence = confidence, 1 - (1 - confidence) / arms
    against_source = paired(adapted, source_only, confidence)
    against_control = paired(adapted, control, confidence)
    control_against_source = paired(control, source_only, confidence)
    against_floor = paired(adapted, dict.fromkeys(adapted, floor), confidence) if math.isfinite(floor) else None
    lost = {
        "source only": _lost(
            {n: (of.adapted, of.source_only) for n, of in classes.items()}, against_source, for_classes
        ),
        "the control": _lost({n: (of.adapted, of.control) for n, of in classes.items()}, against_control, for_classes),
    }
    outcome, why = _decide(
        against_source, against_control, control_against_source, confidence, against_floor, floor, lost
    )
    reason = f"On {metric}, {why}{_left_out(adapted, control, source_only)}"
    return Verdict(
        arm, outcome, metric, against_source, against_control, control_against_source, confidence, reason, against_floor
    )


@dataclass(frozen=True)
class _Lost:
    """The classes, in words, whose IoU falls to near 0 or by more than the mean IoU gains."""

    surely: list[str]
    """Beyond noise."""
    perhaps: list[str]
    """On average, but not told from noise."""


def _lost(
    classes: Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]], gain: Interval, confidence: float
) -> _Lost:
    """Return the classes that are lost; `classes`: class -> its IoUs in D and in the arm that D is compared with."""
    found = _Lost([], [])
    for name, (ours, theirs) in classes.items():
        change = paired(ours, theirs, confidence)
        if change.n < MIN_SEEDS or not _at_least(-change.mean, SMALLEST_GAIN):
            continue
        shared = [
            ours[seed] for seed in ours if math.isfinite(ours[seed]) and math.isfinite(theirs.get(seed, math.nan))
        ]
        left = math.fsum(shared) / len(shared)
        gone = left < NEAR_ZERO and -change.mean >= left - _SAME
        if gone or -change.mean > gain.mean + _SAME:
            low, high = _points(change.low), _points(change.high)
            (found.surely if change.high < 0 else found.perhaps).append(
                f"the IoU of {name} falls by {-change.mean * 100:.1f} points to {left * 100:.1f} "
                f"({confidence * 100:.4g} % interval {low} to {high})"
            )
    return found


def _decide(
    source: Interval,
    control: Interval,
    shift: Interval,
    confidence: float,
    above: Interval | None,
    floor: float,
    lost: Mapping[str, _Lost],
) -> tuple[Outcome, str]:
    """Apply the rule to D - S, D - C, C - S, D - floor (None if unknown) and the classes lost: its parts are checked in this
    order."""

    def said(difference: Interval) -> str:
        if difference.n < 2:
            return f"unknown, {_seeds(difference.n)} shared"
        low, high = _points(difference.low), _points(difference.high)
        return f"{_points(difference.mean)} points ({confidence * 100:.4g} % interval {low} to {high}, {_seeds(difference.n)})"

    smallest = f"{SMALLEST_GAIN * 100:.1f} point"
    if source.n < MIN_SEEDS:
        return "no evidence", f"{_seeds(source.n)} shared with source only: at least {MIN_SEEDS} seeds are needed."
    if _no_spread(source):
        return "no evidence", _seed_changed_nothing(source, "source only")
    if source.high < 0 and _at_least(-source.mean, SMALLEST_GAIN):
        return "hurt", f"it loses against source only, {said(source)}, wholly below 0 and by at least {smallest}."

    against_source = f"{said(source)} against source only"
    beats_source = source.low > 0 and _at_least(source.mean, SMALLEST_GAIN)
    if beats_source and above is not None and not (above.low > 0 and _at_least(above.mean, SMALLEST_GAIN)):
        return "at the floor", (
            f"{against_source}, but it is not shown to be above the floor: {said(above)} against the {floor * 100:.1f} of a map "
            f"that is one class everywhere.{_and_classes(lost['source only'].surely)}"
        )
    if beats_source and lost["source only"].surely:
        return "at the cost of a class", _at_the_cost(against_source, "source only", lost["source only"].surely)
    if control.n == 0:
        return "no evidence", (
            f"{against_source}, but without the lambda = 0 control nothing can be concluded: target images forwarded without an "
            "adversary may do the same."
        )
    if control.n < MIN_SEEDS:
        return "no evidence", f"{_seeds(control.n)} shared with the control: at least {MIN_SEEDS} seeds are needed."
    if _no_spread(control):
        return "no evidence", _seed_changed_nothing(control, "the control")
    against_both = f"{against_source} and {said(control)} against the lambda = 0 control"
    beats_control = control.low > 0 and _at_least(control.mean, SMALLEST_GAIN)
    if beats_source and beats_control:
        if lost["the control"].surely:
            return "at the cost of a class", _at_the_cost(against_both, "the control", lost["the control"].surely)
        for other, of in lost.items():
            if of.perhaps:
                return "no evidence", (
                    f"{against_both}, but against {other} {_listed(of.perhaps)}: on average, a class is lost while the mean "
                    "rises, and that is not told from noise."
                )
        return "helped", f"{against_both}: both wholly above 0 and at least {smallest} on average."

    if beats_source:
        # the control's own gain must be certain as well: with a noisy control, its mean reaches half of a gain that
        # the adversary made in one of five cases (docs/verdict.md)
        shown = shift.n >= MIN_SEEDS and not _no_spread(shift) and shift.low > 0
        if shown and _at_least(shift.mean, EXPLAINED_SHARE * source.mean):
            return "explained by BatchNorm statistics", (
                f"{against_both}, which by itself gains {said(shift)}, {shift.mean / source.mean * 100:.0f} % of it. What the "
                "control also does explains the gain: forwarding target images (BatchNorm statistics) and training for longer."
            )
        doubt = f"is below {smallest}" if control.low > 0 else "is not wholly above 0"
        return "no evidence", (
            f"{against_both}: the gain over the control {doubt}, so the adversary's part is not shown, and neither is it that "
            f"the control by itself gives {EXPLAINED_SHARE * 100:.0f} % of the gain or more ({said(shift)})."
        )
    if beats_control:
        if shift.mean < 0:
            return "no evidence", (
                f"{against_both}: adapting repairs what forwarding the target broke ({said(shift)} for the control), but is "
                "not shown to beat the source model."
            )
        return "no evidence", f"{against_both}: better than the control, but not shown to beat the source model."
    if source.low > 0 or source.high < 0:
        return "no evidence", f"{against_both}: a difference below {smallest} is too small to matter."
    return "no evidence", f"{against_both}: the interval against source only contains 0."


def _at_the_cost(gains: str, other: str, lost: list[str]) -> str:
    return (
        f"{gains}, but against {other} {_listed(lost)}: the mean rises while a class is lost, so look at the classes, not at "
        "the mean."
    )


def _and_classes(lost: list[str]) -> str:
    return f" Against source only, {_listed(lost)}." if lost else ""


def _listed(lost: list[str]) -> str:
    """Return the first three of the classes in words."""
    more = f" and {len(lost) - 3} more classes fall" if len(lost) > 3 else ""
    return "; ".join(lost[:3]) + more


def _at_least(value: float, bound: float) -> bool:
    """Return `value >= bound` up to rounding: in floats, 0.51 - 0.50 is above 0.01, but 0.61 - 0.60 is below."""
    return value >= bound - _SAME


def _no_spread(difference: Interval) -> bool:
    """Return whether every seed gave the same difference."""
    return difference.std < _SAME


def _seed_changed_nothing(difference: Interval, other: str) -> str:
    if difference.mean == 0:
        alike = "both trained alike, as they do if lambda is 0 in every step, or " * (other == "the control")
        return (
            f"all {_seeds(difference.n)} give exactly the scores of {other}: {alike}both give the same maps, perhaps of one "
            "class everywhere. There is nothing to compare."
        )
    return (
        f"all {_seeds(difference.n)} give exactly the same difference from {other} ({_points(difference.mean)} points): the seed "
        "changed nothing, so this is one run counted several times and its spread is unknown."
    )


def _left_out(*arms: Mapping[int, float]) -> str:
    """Return a sentence about seeds that some arm lacks; arms without any score are ignored."""
    finite = [{seed for seed, score in arm.items() if math.isfinite(score)} for arm in arms]
    present = [seeds for seeds in finite if seeds]
    if not present:
        return ""
    missing = len(set().union(*(set(arm) for arm in arms)) - set.intersection(*present))
    if not missing:
        return ""
    lack = "lacks a score in some arm and is" if missing == 1 else "lack a score in some arm and are"
    return f" {_seeds(missing)} {lack} left out there: if a run failed, the rest may look too good."


def _points(value: float) -> str:
    return f"{value * 100:+.1f}"


def _seeds(n: int) -> str:
    return f"{n} seed" if n == 1 else f"{n} seeds"


def difference_table(
    frame: pd.DataFrame, source_only: str | None, control: str | None, confidence: float = CONFIDENCE
) -> pd.DataFrame:
    """Compare every arm and metric with source only and with the control, over seeds.

    frame: columns arm, seed, metric, value, one row per run and metric; the IoU of a class is a metric too.
    source_only, control: names of these arms; None if there is none.
    Returns one row per arm and metric, in the order of the frame: arm, metric, n, mean, std, and for `source` and `control`
    `minus_source` (mean of the paired differences), `minus_source_low`, `minus_source_high`, `minus_source_n`. NaN means unknown,
    also in the rows of the arm itself. The intervals only describe: they are not corrected for the number of rows. Raises
    ValueError for an arm that has two values of a metric for one seed, and for an unknown `source_only` or `control`.
    """
    import pandas as pd

    repeated = frame.duplicated(["arm", "seed", "metric"])
    if repeated.any():
        row = frame[repeated].iloc[0]
        raise ValueError(
            f"Arm {row['arm']} has {row['metric']} twice for seed {row['seed']}; keep one run per arm and seed."
        )
    arms = set(frame["arm"])
    for argument, name in (("source_only", source_only), ("control", control)):
        if name is not None and name not in arms:
            raise ValueError(
                f"{argument} is {name!r}, but the frame's arms are {sorted(arms)}; give one of them or None."
            )
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for arm, seed, metric, value in zip(*(frame[column] for column in ("arm", "seed", "metric", "value")), strict=True):
        scores.setdefault((arm, metric), {})[seed] = value
    rows = []
    for (arm, metric), values in scores.items():
        alone = paired(values, dict.fromkeys(values, 0.0), confidence)
        row = {"arm": arm, "metric": metric, "n": alone.n, "mean": alone.mean, "std": alone.std}
        for label, name in (("source", source_only), ("control", control)):
            other = scores.get((name, metric), {}) if name not in (None, arm) else {}
            difference = paired(values, other, confidence)
            row |= {f"minus_{label}": difference.mean, f"minus_{label}_low": difference.low,
                    f"minus_{label}_high": difference.high, f"minus_{label}_n": difference.n}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)
