"""The report of a comparison: collects the numbers for its page and summary, which the `reports` room draws.

Scores are shown in IoU points: 100 x the fraction that a run logs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dann_experiments.comparison.floors import floor_of
from dann_experiments.comparison.result import Arm, Comparison, Panel
from dann_experiments.comparison.verdict import (
    CONFIDENCE,
    EXPLAINED_SHARE,
    MIN_SEEDS,
    NEAR_ZERO,
    SMALLEST_GAIN,
    Interval,
    Verdict,
    paired,
)
from dann_experiments.config.comparison import KIND_WORDS
from dann_experiments.config.store_names import labels_in_store
from dann_experiments.names import CURVES, DOMAINS, Metric, SetName, Tag
from dann_experiments.reports import images, pages
from dann_experiments.reports.colors import (
    COLORS,
    GRAY,
    IGNORED_COLOR,
    INK,
    MUTED,
    NAVY,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    YELLOW,
    class_colors,
    paint,
)  # fmt: skip
from dann_experiments.reports.plots import features
from dann_experiments.reports.plots.arm_curves import Histories, arm_curves_figure, curve_limits
from dann_experiments.reports.plots.classes import classes_figure
from dann_experiments.reports.plots.rows import Row, rows_figure
from dann_experiments.reports.plots.series import finite
from dann_experiments.reports.plots.style import NOT_LABELED, inline_svg
from dann_experiments.reports.plots.summary import Headline
from dann_experiments.reports.plots.summary import draw_summary as draw
from dann_experiments.reports.tables import MINUS, decimal, short

KIND_COLORS = {
    "source_only": GRAY,
    "statistics": YELLOW,
    "test_statistics": COLORS[12],
    "masks": COLORS[11],
    "control": ORANGE,
    "oracle": NAVY,
}
ADAPTED_COLORS = (TEAL, PURPLE, COLORS[9], RED, COLORS[10], "#5b6ee1", COLORS[16], COLORS[17], COLORS[15], COLORS[14])
OUTCOME_COLORS = {
    "helped": TEAL,
    "hurt": "#c0392b",
    "no evidence": MUTED,
    "explained by BatchNorm statistics": "#b26a00",
    "at the floor": "#b26a00",
    "at the cost of a class": "#c0392b",
}
OUTCOME_MARKS = {
    "helped": "▲", "hurt": "▼", "no evidence": "○", "explained by BatchNorm statistics": "≈", "at the floor": "▁",
    "at the cost of a class": "◑",
}  # fmt: skip
SCORE_COLUMNS = (Metric.SOURCE_VAL_IOU, Metric.TARGET_VAL_IOU, Metric.SOURCE_TEST_IOU, Metric.TARGET_TEST_IOU)
GAP_COLUMNS = (Metric.PROBE_ACCURACY, Metric.A_DISTANCE, Metric.DOMAIN_ACCURACY_VAL)
COMMIT_TAG, ALIGNMENT_TAG = "mlflow.source.git.commit", Tag.ALIGNMENT


def write_page(path: Path, comparison: Comparison, links: Mapping[str, str] = {}) -> None:
    """Write the page of a comparison.

    `links`: run id -> address of the run, and `rule` -> address of the page that explains the verdict. Addresses that are not
    `http`, `https`, `file` or relative are left out.
    """
    confidence = confidence_of(comparison.verdicts)
    finite_metrics = {name for run in comparison.runs for name, value in run.metrics.items() if math.isfinite(value)}
    columns = [name for name in SCORE_COLUMNS if name in finite_metrics or name in SCORE_COLUMNS[:2]]
    of_each = {name: sorted(one for one in finite_metrics if one.startswith(f"{name}.")) for name in columns}
    columns = [one for name in columns for one in (name, *of_each[name])]  # of several domains, each after their mean
    kinds = [first_of_kind(comparison.arms, kind) for kind in ("source_only", "control")]
    order = {arm.name: number for number, arm in enumerate(comparison.arms)}
    scores = {arm.name: seed_scores(comparison, arm.name, comparison.metric) for arm in comparison.arms}
    pages.write_page(
        path,
        "comparison.html.j2",
        comparison=comparison,
        kind_words=KIND_WORDS,
        seeds=len({run.seed for run in comparison.runs}),
        colors=arm_colors(comparison.arms),
        outcome_marks=OUTCOME_MARKS,
        confidence=confidence,
        percent=_percent,
        nan=math.nan,
        min_seeds=MIN_SEEDS,
        smallest_gain=SMALLEST_GAIN,
        explained_share=EXPLAINED_SHARE,
        near_zero=NEAR_ZERO,
        floors={name: floor_of(comparison.runs, name) for name in (*columns, comparison.metric)},
        links={key: address for key, address in links.items() if pages.safe_address(address)},
        score_columns=columns + [comparison.metric] * (comparison.metric not in columns),
        baselines=[arm for arm in kinds if arm is not None],
        score=lambda arm, metric: mean_of(seed_scores(comparison, arm, metric), confidence),
        class_score=lambda arm, name, kind=Metric.CLASS_IOU: mean_of(
            dict(enumerate(class_scores(comparison, arm, name, kind))), confidence
        ),
        class_tables=_class_tables(comparison),
        passes=_passes(comparison),
        difference=lambda arm, other: paired(scores[arm], scores[other], confidence),
        figures=_figures(comparison, confidence),
        **_tiles(comparison),
        gap_columns=[
            name for name in GAP_COLUMNS if any(seed_scores(comparison, arm.name, name) for arm in comparison.arms)
        ],
        alignment=[
            (run, run.tags[ALIGNMENT_TAG])
            for run in comparison.runs
            if ALIGNMENT_TAG in run.tags and comparison.panel_seed in (None, run.seed)
        ],
        selection=[] if comparison.selection is None else comparison.selection.to_dict("records"),
        runs=sorted(comparison.runs, key=lambda run: (order.get(run.arm, len(order)), run.arm, run.seed)),
        commit_tag=COMMIT_TAG,
        settings=list(dict.fromkeys(key for arm in comparison.arms for key in arm.overrides)),
    )


def draw_summary(path: Path, comparison: Comparison) -> None:
    """Draw a PNG, 1600 pixels wide: verdicts, scores per arm and seed, curves, and up to five rows of tiles."""
    confidence, colors = confidence_of(comparison.verdicts), arm_colors(comparison.arms)
    seeds = len({run.seed for run in comparison.runs})
    panels = comparison.panels[:5]
    # only source only, control and the first adapted arm; other arms only if all of these are missing
    names, kinds = shown_arms(comparison, panels), {arm.name: arm.kind for arm in comparison.arms}
    brief = [next((n for n in names if kinds.get(n) == kind), None) for kind in ("source_only", "control", "adapted")]
    names = [name for name in brief if name is not None] or names[:3]
    draw(
        path,
        comparison.title.replace("->", "→"),
        f"judged by {comparison.metric}, {seeds} seed{'' if seeds == 1 else 's'}",
        [_headline(verdict) for verdict in comparison.verdicts],
        _score_rows(comparison, confidence),
        f"Each seed, mean and {_percent(confidence)} interval",
        f"{comparison.metric}, IoU points",
        {arm.name: (colors[arm.name], histories(comparison, arm.name)) for arm in comparison.arms},
        _tile_columns(panels, names, len(comparison.class_names)) if panels else [],
        comparison.class_names,
        _has_unlabeled(panels, len(comparison.class_names)),
    )


# ---- numbers


def seed_scores(comparison: Comparison, arm: str, metric: str) -> dict[int, float]:
    """Return seed -> last value of the metric, for the runs that have one."""
    found = {run.seed: run.metrics.get(metric, np.nan) for run in comparison.runs_of(arm)}
    return {seed: float(value) for seed, value in found.items() if np.isfinite(value)}


def _passes(comparison: Comparison) -> dict[str, float]:
    """Return arm -> batches that networks take per training step; without arms that train nothing, and old runs."""
    found = {arm.name: seed_scores(comparison, arm.name, Metric.PASSES) for arm in comparison.arms}
    return {arm: max(of_seeds.values()) for arm, of_seeds in found.items() if of_seeds}


def class_scores(comparison: Comparison, arm: str, class_name: str, kind: str = Metric.CLASS_IOU) -> np.ndarray:
    """Return the IoU of one class on the judged set, (n,) in 0..1, one value per run that has it. `kind`: the prefix of another
    metric of classes."""
    name = f"{kind}{comparison.metric.removeprefix(Metric.IOU)}/{labels_in_store(comparison.class_names)[class_name]}"
    return np.array(list(seed_scores(comparison, arm, name).values()))


def histories(comparison: Comparison, arm: str) -> Histories:
    """Return metric -> one curve per seed, only curves with a finite value."""
    found = {name: [run.history.get(name, ()) for run in comparison.runs_of(arm)] for name in CURVES}
    return {name: [curve for curve in curves if finite(curve)] for name, curves in found.items()}


def mean_of(scores: Mapping[int, float], confidence: float) -> Interval:
    """Return the mean of an arm's scores with its confidence interval."""
    return paired(scores, dict.fromkeys(scores, 0.0), confidence)


def confidence_of(verdicts: Sequence[Verdict]) -> float:
    """Return the confidence level of the verdicts' intervals; CONFIDENCE without verdicts."""
    return verdicts[0].confidence if verdicts else CONFIDENCE


def arm_colors(arms: Sequence[Arm]) -> dict[str, str]:
    """Return arm -> color: one per kind, and a different one per adapted arm."""
    adapted = itertools.cycle(ADAPTED_COLORS)
    return {arm.name: KIND_COLORS.get(arm.kind) or next(adapted) for arm in arms}


def first_of_kind(arms: Sequence[Arm], kind: str) -> Arm | None:
    """Return the first arm of a kind; None if there is none."""
    return next((arm for arm in arms if arm.kind == kind), None)


def shown_arms(comparison: Comparison, panels: Sequence[Panel]) -> list[str]:
    """Return the arms with a prediction in any of these panels, in the comparison's order."""
    found = {name for panel in panels for name in panel.predictions}
    known = [arm.name for arm in comparison.arms if arm.name in found]
    return known + sorted(found - set(known))


# ---- parts of the page and the summary


def _class_tables(comparison: Comparison) -> list[tuple[str, str]]:
    """Return title and prefix of the metrics per class that any run has."""
    kinds = {
        "IoU": Metric.CLASS_IOU,
        "Average precision: how well its probability ranks the pixels, without a threshold; chance gives the true share": (
            Metric.AVERAGE_PRECISION
        ),
        "Predicted share of the pixels": Metric.SHARE,
        "True share of the pixels": Metric.TRUE_SHARE,
    }
    names, judged = (
        {name for run in comparison.runs for name in run.metrics},
        comparison.metric.removeprefix(Metric.IOU),
    )
    return [
        (title, kind) for title, kind in kinds.items() if any(name.startswith(f"{kind}{judged}/") for name in names)
    ]


def _row(name: str, color: str, values: Mapping[int, float], interval: Interval) -> Row:
    points = {seed: 100 * value for seed, value in values.items()}
    return Row(name, color, points, 100 * interval.mean, 100 * interval.low, 100 * interval.high)


def _score_rows(comparison: Comparison, confidence: float) -> list[Row]:
    colors = arm_colors(comparison.arms)
    scores = {arm.name: seed_scores(comparison, arm.name, comparison.metric) for arm in comparison.arms}
    return [_row(short(arm), colors[arm], found, mean_of(found, confidence)) for arm, found in scores.items()]


def _difference_rows(comparison: Comparison) -> list[Row]:
    """Return the differences that the verdicts use; the last one is control against source only."""
    colors = arm_colors(comparison.arms)
    source, control = (first_of_kind(comparison.arms, kind) for kind in ("source_only", "control"))
    found: list[tuple[str, Arm | None, Interval]] = []
    for verdict in comparison.verdicts:
        found += [(verdict.arm, source, verdict.against_source), (verdict.arm, control, verdict.against_control)]
    found += [(control.name, source, verdict.control_against_source) for verdict in comparison.verdicts[:1] if control]
    rows = []
    for name, other, interval in found:
        if other is not None and interval.n:
            ours, theirs = (seed_scores(comparison, arm, comparison.metric) for arm in (name, other.name))
            each = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
            rows.append(
                _row(f"{short(name, 18)} {MINUS} {short(other.name, 18)}", colors.get(name, MUTED), each, interval)
            )
    return rows


def _figures(comparison: Comparison, confidence: float) -> dict[str, Any]:
    svg, colors = inline_svg, arm_colors(comparison.arms)
    label = f"{comparison.metric}, IoU points"
    scores = svg(rows_figure(_score_rows(comparison, confidence), label), "scores", "Score of each arm and seed")
    differences = classes = ""
    if rows := _difference_rows(comparison):
        figure = rows_figure(rows, "difference in IoU points: right of 0 is better", differences=True)
        differences = svg(figure, "differences", "Paired differences between arms")
    curves = {arm.name: histories(comparison, arm.name) for arm in comparison.arms}
    trained = {arm.name: curves[arm.name] for arm in comparison.arms if arm.kind in ("control", "adapted")}
    trained = {arm: found for arm, found in trained.items() if _has_curve(found)}
    limits = curve_limits(list(trained.values()))
    lambdas = [value for found in curves.values() for curve in found[Metric.LAMBDA] for _, value in finite(curve)]
    drawn = [
        (
            arm,
            svg(
                arm_curves_figure(found, limits, max(lambdas, default=0), comparison.domains),
                f"curves{number}",
                f"Curves of {arm}",
            ),
        )
        for number, (arm, found) in enumerate(trained.items())
    ]
    by_class = {
        arm.name: {name: 100 * class_scores(comparison, arm.name, name) for name in comparison.class_names}
        for arm in comparison.arms
    }
    if any(len(values) for found in by_class.values() for values in found.values()):
        classes = svg(classes_figure(comparison.class_names, colors, by_class), "classes", "IoU of each class and arm")
    names = sorted(comparison.features, key=lambda name: ("before", "after", name).index(name))
    clouds = {name: (comparison.features[name].source, comparison.features[name].target) for name in names}
    projected = [
        (how, svg(features.features_figure(clouds, how), how, f"Features of both domains by {how.upper()}"))
        for how in (("pca", "umap") if features.has_umap() else ("pca",))
        if clouds
    ]
    return {
        "scores": scores, "differences": differences, "curves": drawn, "classes": classes, "features": projected,
    }  # fmt: skip


def _has_curve(found: Histories) -> bool:
    """Return whether a validation IoU was measured more than once."""
    names = [Metric.iou(SetName(domain, "val")) for domain in DOMAINS]
    return any(len(finite(curve)) > 1 for name in names for curve in found[name])


def _tile_columns(
    panels: Sequence[Panel], names: Sequence[str], count: int
) -> list[tuple[str, list[np.ndarray | None]]]:
    """Return title and pictures per column: images, ground truth if known, then the arms."""
    maps = [("truth", [panel.truth for panel in panels])] if any(panel.truth is not None for panel in panels) else []
    maps += [(name, [panel.predictions.get(name) for panel in panels]) for name in names]
    painted = [(name, [None if ids is None else paint(ids, count) for ids in found]) for name, found in maps]
    return [("image", [panel.image for panel in panels]), *painted]


def _tiles(comparison: Comparison) -> dict[str, Any]:
    panels, count = comparison.panels, len(comparison.class_names)
    names = shown_arms(comparison, panels)
    columns = _tile_columns(panels, names, count)
    rows = []
    for row, panel in enumerate(panels):
        tiles = [_tile(name, pictures[row], panel) for name, pictures in columns]
        for name, tile in zip(names, tiles[len(columns) - len(names) :], strict=True):
            if tile and panel.truth is not None:
                tile["right"] = images.data_uri(images.faded(panel.truth, panel.predictions[name], count))
                tile["iou"] = images.tile_iou(panel.truth, panel.predictions[name], count)
        rows.append(tiles)
    colors = ["#" + bytes(color).hex() for color in np.round(255 * class_colors(count)).astype(np.uint8)]
    legend = list(zip(colors, comparison.class_names, strict=True))
    return {
        "tiles": rows,
        "tile_columns": [name for name, _ in columns],
        "tile_side": round(max(min(1060 / len(columns) - 6, 190), 84)),
        "with_truth": len(columns) > 1 + len(names),
        "legend": legend + [(IGNORED_COLOR, NOT_LABELED)] * _has_unlabeled(panels, count),
    }


def _tile(name: str, pixels: np.ndarray | None, panel: Panel) -> dict[str, Any] | None:
    if pixels is None:
        return None
    image = images.data_uri(pixels, photo=pixels is panel.image)
    return {"name": name, "image": image, "small": max(pixels.shape[:2]) <= images.SMALL, "right": "", "iou": math.nan}


def _has_unlabeled(panels: Sequence[Panel], count: int) -> bool:
    truths = [panel.truth for panel in panels if panel.truth is not None]
    return any(((truth < 0) | (truth >= count)).any() for truth in truths)


def _headline(verdict: Verdict) -> Headline:
    others = (("source only", verdict.against_source), ("the control", verdict.against_control))
    differences = [
        f"{decimal(interval.mean, '+.1f', 100)} points against {other}" for other, interval in others if interval.n
    ]
    text = f"{OUTCOME_MARKS.get(verdict.outcome, '')} {short(verdict.arm, 40)}: {verdict.outcome}"
    return Headline(text, OUTCOME_COLORS.get(verdict.outcome, INK), verdict.reason, ",  ".join(differences))


def _percent(share: float) -> str:
    return f"{share * 100:.4g} %"
