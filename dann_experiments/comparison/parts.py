"""Which part made the gain? Compares arms of a comparison that differ in one part: the adversary, or a companion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.comparison.verdict import paired
from dann_experiments.names import Metric, Tag

if TYPE_CHECKING:
    import pandas as pd

ADVERSARY = "adversary"
OWN_SETTINGS = ("domain_adaptation.method.", "domain_adaptation.companions")
"""Settings in which arms with different parts differ."""


def parts_of(run: ArmRun) -> frozenset[str]:
    """Return the parts of an adaptation, by the tags of its run: `adversary` for DANN, and the names of its companions.

    >>> sorted(parts_of(ArmRun("DANN", 0, "", {}, {}, {"dann.method": "dann", "dann.companions": "entropy"}, False)))
    ['adversary', 'entropy']
    """
    companions = [name for name in run.tags.get(Tag.COMPANIONS, "").split(", ") if name]
    return frozenset(companions + ([ADVERSARY] if run.tags.get(Tag.METHOD) == "dann" else []))


def rule_notes(arms: Sequence[Arm], runs: Sequence[ArmRun], scores: Mapping[str, Mapping[int, float]]) -> Iterator[str]:
    """Yield notes about arms that score the masks of a rule: what they leave open, and what networks trained on them add.

    `scores`: arm -> seed -> score, 0..1."""
    for rule in (arm for arm in arms if arm.kind == "masks" and scores.get(arm.name)):
        open_share = max(run.metrics.get(Metric.RULE_OPEN, 0.0) for run in runs if run.arm == rule.name)
        if open_share > 0:
            yield (
                f"{rule.name}: its masks leave up to {100 * open_share:.1f} % of the labeled pixels of a set open. These are not "
                "counted, so its score is that of fewer pixels; masks made with margin 0 are scored on all."
            )
        trained = {run.arm for run in runs if "weak_labels" in run.tags.get(Tag.COMPANIONS, "").split(", ")}
        for name in (arm.name for arm in arms if arm.name in trained and scores.get(arm.name)):
            gain = paired(scores[name], scores[rule.name])
            if gain.n and not (gain.low > 0 if math.isfinite(gain.low) else gain.mean > 0):
                yield (
                    f"{name} is {100 * gain.mean:+.1f} points against {rule.name}, the masks that it is trained on: it is "
                    "not shown that the network knows more than the rule."
                )


def part_table(arms: Sequence[Arm], runs: Sequence[ArmRun], scores: Mapping[str, Mapping[int, float]]) -> pd.DataFrame:
    """Return what each part adds: one row per pair of trained arms that differ in this part alone.

    `scores`: arm -> seed -> score, 0..1. Columns: part, arm (with it), without (the other arm), and of the paired difference over
    seeds mean, low and high (95 % interval, not corrected for the number of rows) and n. Empty without such a pair.
    """
    import pandas as pd

    found = {
        arm.name: parts_of(run)
        for arm in arms
        for run in runs
        if run.arm == arm.name and arm.kind in ("control", "adapted")
    }
    others = {
        arm.name: {key: value for key, value in arm.overrides.items() if not key.startswith(OWN_SETTINGS)}
        for arm in arms
    }
    rows = []
    for arm, parts in found.items():
        for other, fewer in found.items():
            if len(parts - fewer) == 1 and fewer < parts and others[arm] == others[other]:
                difference = paired(scores[arm], scores[other])
                rows.append(
                    {
                        "part": next(iter(parts - fewer)), "arm": arm, "without": other, "mean": difference.mean,
                        "low": difference.low, "high": difference.high, "n": difference.n,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows, columns=["part", "arm", "without", "mean", "low", "high", "n"])
