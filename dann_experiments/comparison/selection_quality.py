"""Measures, with target labels, how well label-free scores choose: rank correlation and regret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr  # comes with scikit-learn

from dann_experiments.names import Metric
from dann_experiments.scores.selection import SCORES, choice_value

LAST = "last"
COLUMNS = ("score", "better", "groups", "candidates", "spearman", "regret", "regret_kept")


def score_quality(choices: pd.DataFrame, oracle: str = Metric.TARGET_VAL_IOU) -> pd.DataFrame:
    """Compare choosing by each score with choosing by `oracle`, which needs labels (higher is better).

    `choices` has one row per candidate, in order of time: `group` (only candidates of one group compete: the epochs of a run, or
    the trials of a sweep), the oracle, and any of the `select/` scores, `iou/source_val` and `select/source_kept`.
    Candidates without an oracle value do not count.

    The result has one row per `select/` score in `choices`, one for `iou/source_val`, the naive choice, and one for `last`, the
    last candidate of a group, with these columns:

    - `score`, `better` (max or min), `groups` and `candidates`: the number of those that were evaluated. A group in which no
      candidate has a value of the score is left out.
    - `spearman`: mean over groups of the rank correlation with the oracle, -1..1, positive if better scores mean better oracle
      values. Groups of one candidate and those in which the score or the oracle is constant do not count; NaN if no group
      counts. For `last` it shows whether later is better.
    - `regret`: mean over groups of the group's best oracle value minus that of the candidate with the best score (the first
      of several); in IoU, 0 or more.
    - `regret_kept`: the same if only candidates with `select/source_kept` = 1 may be chosen: by `choice_value` for a `select/`
      score; for the others all candidates compete if none is kept. The best oracle value is still that of the whole group. NaN
      without that column.

    A NaN score counts as the worst value, as it does in a choice.
    """
    known = choices[oracle].notna().to_numpy(bool)
    groups: dict[object, list[int]] = {}  # row numbers, in order of time
    for number in np.flatnonzero(known).tolist():
        groups.setdefault(choices["group"].iloc[number], []).append(number)
    names = [name for name in (oracle, Metric.SOURCE_KEPT, *SCORES, Metric.SOURCE_VAL_IOU) if name in choices.columns]
    values = {name: choices[name].to_numpy(float) for name in names}
    parts = [{name: column[numbers] for name, column in values.items()} for numbers in groups.values()]
    scores = [name for name in (*SCORES, Metric.SOURCE_VAL_IOU) if name in values]
    rows = [_quality(name, parts, oracle, Metric.SOURCE_KEPT in values) for name in (*scores, LAST)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


Group = Mapping[str, np.ndarray]  # column -> values of its candidates


def _quality(name: str, groups: Sequence[Group], oracle: str, kept_known: bool) -> dict[str, object]:
    used = [group for group in groups if name == LAST or not np.isnan(group[name]).all()]
    correlations, regrets, regrets_kept = [], [], []
    for group in used:
        truth = group[oracle]
        merits = _merits(name, group, truth.size, kept_only=False)
        if len(np.unique(truth)) > 1 and len(np.unique(merits)) > 1:
            correlations.append(spearmanr(merits, truth).statistic)  # pyright: ignore[reportAttributeAccessIssue]
        regrets.append(truth.max() - truth[merits.argmax()])
        if kept_known:
            chosen = _merits(name, group, truth.size, kept_only=True).argmax()
            regrets_kept.append(truth.max() - truth[chosen])
    return {
        "score": name,
        "better": SCORES[name].better if name in SCORES else "max",
        "groups": len(used),
        "candidates": sum(group[oracle].size for group in used),
        "spearman": _mean(correlations),
        "regret": _mean(regrets),
        "regret_kept": _mean(regrets_kept),
    }


def _merits(name: str, group: Group, count: int, kept_only: bool) -> np.ndarray:
    """Return the values to maximize: the score, or minus the score if smaller is better."""
    if name in SCORES:
        names = (name, Metric.SOURCE_KEPT) if kept_only else (name,)
        values = [choice_value(name, {key: group[key][index] for key in names}) for index in range(count)]
        return np.array(values) * (-1 if SCORES[name].better == "min" else 1)
    merits = np.arange(count, dtype=float) if name == LAST else group[name]
    merits = np.where(np.isnan(merits), -np.inf, merits)
    if kept_only:
        kept = group[Metric.SOURCE_KEPT] != 0  # NaN means unknown and counts as kept, as in choice_value
        merits = np.where(kept, merits, -np.inf) if kept.any() else merits
    return merits


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def per_epoch_choices(
    history: Mapping[str, Sequence[tuple[int, float]]], group: str, oracle: str = Metric.TARGET_VAL_IOU
) -> pd.DataFrame:
    """Return the validations of a run as candidates for `score_quality`; `history`: metric -> [(step, value)] in order.

    One row per step at which the oracle and every `select/` score of the run were measured, in order of steps, with the columns
    `group`, `step`, the oracle, `iou/source_val` and all `select/` metrics of the run; NaN if a metric has no value at a step. Of
    several values at one step the last counts. A run without the oracle or without `select/` scores has no rows.
    """
    by_step = {name: dict(points) for name, points in history.items()}
    scores = [name for name in SCORES if by_step.get(name)]
    needed = [by_step.get(oracle, {}), *(by_step[name] for name in scores)]
    steps = sorted(set.intersection(*(set(values) for values in needed))) if scores else []
    names = [oracle, Metric.SOURCE_VAL_IOU, *(name for name in history if name.startswith(Metric.SELECT))]
    columns = {name: [by_step.get(name, {}).get(step, float("nan")) for step in steps] for name in names}
    return pd.DataFrame({"group": [group] * len(steps), "step": steps} | columns)
