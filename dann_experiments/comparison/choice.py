"""Chooses among the arms of a comparison without target labels, from the maps and the metrics of their runs.

The rule, and how well it did on pairs with labels: docs/selection.md.
"""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dann_experiments.comparison.disagreement import CHUNK, votes_on
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.comparison.target_maps import TargetMaps, maps_of
from dann_experiments.config import Config
from dann_experiments.config.store_names import labels_in_store
from dann_experiments.names import SOURCE_VAL, Metric, Tag
from dann_experiments.prediction.rasters import NODATA
from dann_experiments.scores.agreement import count_agreement, kappa
from dann_experiments.scores.selection import SCORES
from dann_experiments.tracking.store import Store
from dann_experiments.training.random_states import torch_threads

log = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.2
"""Kappa below which no arm is chosen: up to here agreement is slight (Landis & Koch 1977)."""
COLUMNS = (
    "arm", "kind", "seeds", "source_kept", "guard", *(name.removeprefix(Metric.SELECT) for name in SCORES),
    "seed_agreement", "consensus", "share_distance",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What the scores without labels say about the arms."""

    table: pd.DataFrame
    """One row per arm: `COLUMNS`, see `choice_table`."""
    arm: str | None
    """The arm to trust; None = no choice without labels."""
    reason: str

    @property
    def line(self) -> str:
        """The choice in one sentence."""
        return (
            f"Chosen without labels: {self.arm}. {self.reason}"
            if self.arm
            else f"Cannot choose without labels. {self.reason}"
        )


def choice_table(
    arms: Sequence[Arm], runs: Sequence[ArmRun], maps: TargetMaps, class_names: Sequence[str]
) -> pd.DataFrame:
    """Return the scores without labels of each arm that has maps.

    - `source_kept`: share of the seeds whose source is kept (docs/selection.md); NaN if that is not known.
    - `guard`: share of the seeds in which the guard of the target warned (docs/guards.md); NaN for arms that train nothing.
    - `entropy`, `infomax`, `snd`, `bnm`: means over seeds of the `select/` metrics; NaN where runs do not have them.
    - `seed_agreement`: mean Cohen's kappa of the maps of two seeds, over all pairs; NaN with one seed.
    - `consensus`: mean kappa of the maps with the majority of all *other* arms, each with one vote (after
      EnsV, Hu et al. 2023, which compares with the mean of all candidates' probabilities).
    - `share_distance`: how far the mean predicted class shares are from the source's true ones, as the share of pixels that would
      have to change (total variation), 0..1.
    """
    count = len(class_names)
    consensus = _with_the_others(maps, count)
    expected = _source_shares(runs, class_names)
    rows = []
    for arm in (one for one in arms if one.name in consensus):
        own, of_seeds = [run for run in runs if run.arm == arm.name], maps.of(arm.name)
        pairs = itertools.combinations(of_seeds.values(), 2)
        shares = np.mean([_shares(ids, count) for ids in of_seeds.values()], 0)
        trained = arm.kind in ("control", "adapted")
        among_seeds = _mean_of(kappa(count_agreement(one, other, count, NODATA)) for one, other in pairs)
        rows.append(
            {
                "arm": arm.name, "kind": arm.kind, "seeds": len(of_seeds), "source_kept": _mean(own, Metric.SOURCE_KEPT),
                "guard": _mean_of(float(Tag.GUARD in run.tags) for run in own) if trained else math.nan,
                **{name.removeprefix(Metric.SELECT): _mean(own, name) for name in SCORES},
                "seed_agreement": among_seeds, "consensus": consensus[arm.name],
                "share_distance": float(np.abs(shares - expected).sum() / 2),
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _with_the_others(maps: TargetMaps, num_classes: int) -> dict[str, float]:
    """Return for each arm the mean kappa of its maps with the majority of the others; NaN without others."""
    counts = {key: np.zeros((num_classes, num_classes), np.int64) for key in maps.ids}
    for start in range(0, maps.pixels, CHUNK):
        part = slice(start, min(start + CHUNK, maps.pixels))
        votes = {arm: votes_on(maps, part, num_classes, [arm]) for arm in maps.arms}
        total = np.sum(list(votes.values()), 0)
        for (arm, seed), ids in maps.ids.items():
            others = (total - votes[arm]).argmax(0).astype(np.uint8)
            counts[arm, seed] += count_agreement(ids[part], others, num_classes, NODATA)
    alone = len(maps.arms) < 2
    return {
        arm: math.nan if alone else _mean_of(kappa(counts[arm, seed]) for seed in maps.of(arm)) for arm in maps.arms
    }


def _shares(ids: np.ndarray, count: int) -> np.ndarray:
    pixels = np.bincount(ids, minlength=256)[:count]
    return pixels / max(pixels.sum(), 1)


def _source_shares(runs: Sequence[ArmRun], class_names: Sequence[str]) -> np.ndarray:
    """Return the source's true class shares (K,), NaN if no run has them."""
    names = [f"{Metric.TRUE_SHARE}{SOURCE_VAL}/{name}" for name in labels_in_store(class_names).values()]
    known = next((run.metrics for run in runs if any(name in run.metrics for name in names)), {})
    shares = np.array([known.get(name, 0.0) for name in names])
    return shares if shares.any() else np.full(len(names), np.nan)


def _mean(runs: Sequence[ArmRun], metric: str) -> float:
    return _mean_of(run.metrics[metric] for run in runs if metric in run.metrics)


def _mean_of(values) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def choice_of(config: Config, store: Store, arms: Sequence[Arm], runs: Sequence[ArmRun]) -> Choice | None:
    """Predict the target's training images with all models and choose; None, with a warning, if images or models are missing."""
    try:
        with tempfile.TemporaryDirectory() as folder, torch_threads(config.threads):
            maps = maps_of(config, store, arms, runs, Path(folder))
            return choose(arms, runs, maps, config.class_names)
    except (OSError, ValueError) as error:  # ValueError includes InputError
        log.warning("There is no choice without target labels: %s", error)
        return None


def choose(arms: Sequence[Arm], runs: Sequence[ArmRun], maps: TargetMaps, class_names: Sequence[str]) -> Choice:
    """Return the choice among the arms that have maps."""
    table = choice_table(arms, runs, maps, class_names)
    return Choice(table, *chosen_arm(table))


def chosen_arm(table: pd.DataFrame) -> tuple[str | None, str]:
    """Return the arm that the rule chooses, None if it cannot choose, and the reason.

    Among the arms whose source is kept, and in which the guard did not warn, in more than half of the seeds: the one whose maps
    agree most from seed to seed. Networks that differ in nothing but chance and disagree cannot all be right (Jiang et al. 2022
    estimate the error by it). None with fewer than two seeds, or if the best agreement is below `LEAST_AGREEMENT`.
    """
    rows = table.to_dict("records")
    if all(row["seeds"] < 2 for row in rows):
        return None, "Arms are chosen by the agreement between seeds, which takes two seeds or more."
    kept = [row for row in rows if not row["source_kept"] <= 0.5 and not row["guard"] >= 0.5]
    if not kept:
        return None, "In every arm the source was forgotten, or the guard warned; label some tiles."
    known = [row for row in kept if not math.isnan(row["seed_agreement"])]
    if not known:
        return None, "The maps of every arm are one class each, whose agreement says nothing; label some tiles."
    best = max(known, key=lambda row: row["seed_agreement"])
    kappa_of_best = f"kappa {best['seed_agreement']:.2f}"
    if best["seed_agreement"] < LEAST_AGREEMENT:
        return None, f"In every arm the maps differ from seed to seed (at most {kappa_of_best}); label some tiles."
    dropped = [str(row["arm"]) for row in rows if row not in kept]
    left_out = f" Left out, as the source was forgotten or the guard warned: {', '.join(dropped)}." if dropped else ""
    return str(best["arm"]), f"Its maps agree most from seed to seed ({kappa_of_best}).{left_out}"
