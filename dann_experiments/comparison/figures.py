"""The figures of a comparison: for its page (SVG whose colours follow the page's theme) and the PNG summary.

Scores are drawn in IoU points, 100 x the fraction that a run logs.
Letters: K classes, H x W pixels, N images, C features, n seeds.
"""

from __future__ import annotations

import importlib.util
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.decomposition import PCA

from dann_experiments.comparison.result import Arm, ArmRun, Comparison, FeatureCloud, Panel
from dann_experiments.comparison.verdict import CONFIDENCE, Interval, Verdict, paired
from dann_experiments.config.names import labels_in_store
from dann_experiments.tracking.figures import COLOURS, DOMAIN_COLOURS, IGNORED_COLOUR, class_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
Projection = Literal["pca", "umap"]
Points = Sequence[tuple[int, float]]

INK, MUTED, GRID, PAPER = "#1f2328", "#656d76", "#d8dee4", "#ffffff"
TRAIN_COLOUR, HELD_OUT_COLOUR, LAMBDA_COLOUR = COLOURS[2], COLOURS[7], COLOURS[8]
KIND_COLOURS = {"source_only": COLOURS[6], "statistics": COLOURS[3], "control": COLOURS[8], "oracle": COLOURS[5]}
ADAPTED_COLOURS = (COLOURS[2], COLOURS[7], COLOURS[9], COLOURS[1], COLOURS[10], "#5b6ee1")
MORE_COLOURS = (
    "#6a3d9a", "#8c510a", "#1f78b4", "#b8d98b", "#f4a6c0", "#808000", "#35c9d6", "#101f6b", "#d4c400",
)  # fmt: skip
OUTCOME_COLOURS = {
    "helped": "#00798c",
    "hurt": "#c0392b",
    "no evidence": "#656d76",
    "explained by BatchNorm statistics": "#b26a00",
}
OUTCOME_MARKS = {"helped": "▲", "hurt": "▼", "no evidence": "○", "explained by BatchNorm statistics": "≈"}
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    DOMAIN_COLOURS["source"]: "--source",
    DOMAIN_COLOURS["target"]: "--target",
    COLOURS[2]: "--teal",
    COLOURS[7]: "--purple",
}
"""Colours that a page draws by a CSS variable of its own, so that they stay visible on a dark ground."""

STYLE = {
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # an arm or a class may be called $x$, which is no formula
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}

MOST_POINTS = 150  # of a curve: more than a figure has pixels for
MOST_FEATURES = 600  # points drawn of a domain
MOST_BARS = 30  # side by side in one row


# ---- what is drawn, as numbers


def points(value: float) -> float:
    """IoU points of a fraction."""
    return 100 * value


def seed_scores(comparison: Comparison, arm: str, metric: str) -> dict[int, float]:
    """Seed -> the metric's last value, of the runs that have one."""
    found = {run.seed: run.metrics.get(metric, np.nan) for run in comparison.runs_of(arm)}
    return {seed: float(value) for seed, value in found.items() if np.isfinite(value)}


def class_scores(comparison: Comparison, arm: str, class_name: str) -> np.ndarray:
    """(n,) IoU of one class on the set that the verdict judges."""
    name = f"class_{comparison.metric}/{labels_in_store(comparison.class_names)[class_name]}"
    return np.array(list(seed_scores(comparison, arm, name).values()))


def mean_of(scores: Mapping[int, float], confidence: float) -> Interval:
    """The mean of an arm's scores and its interval, as a difference from 0."""
    return paired(scores, dict.fromkeys(scores, 0.0), confidence)


def arm_colours(arms: Sequence[Arm]) -> dict[str, str]:
    """Arm -> colour: one a kind, adapted arms one after another."""
    adapted = [arm.name for arm in arms if arm.kind == "adapted"]
    colours = {arm.name: KIND_COLOURS[arm.kind] for arm in arms if arm.kind != "adapted"}
    return colours | {name: ADAPTED_COLOURS[i % len(ADAPTED_COLOURS)] for i, name in enumerate(adapted)}


def distinct_class_colours(count: int) -> np.ndarray:
    """(count, 3) in 0..1: the colours of every other figure, and nine more where those would repeat."""
    more = [to_rgb(colour) for colour in MORE_COLOURS]
    palette = np.concatenate([class_colours(len(COLOURS)), more])
    return palette[np.arange(count) % len(palette)]


def first_of_kind(arms: Sequence[Arm], kind: str) -> Arm | None:
    return next((arm for arm in arms if arm.kind == kind), None)


def has_umap() -> bool:
    """Whether the optional package umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def project(features: FeatureCloud, how: Projection) -> FeatureCloud:
    """Both domains in two dimensions (N, 2), fitted on both together; rows with a value that is not finite are left out.

    `pca`: the two directions of largest variance (fewer features are filled up with 0). `umap`: McInnes et al. 2018, with the
    seed 0; needs umap-learn. `ValueError` if fewer than 3 images (`umap`: 5) are left.
    """
    source = features.source[np.isfinite(features.source).all(1)]
    target = features.target[np.isfinite(features.target).all(1)]
    both = np.concatenate([source, target]).astype(np.float64)  # (N_source + N_target, C)
    least = 5 if how == "umap" else 3
    if len(both) < least:
        raise ValueError(f"{how} needs at least {least} images with finite features, got {len(both)}")
    if how == "umap":
        from umap import UMAP  # pyright: ignore[reportMissingImports]  # optional, and slow to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            neighbours = min(15, len(both) - 1)
            flat = UMAP(n_neighbors=neighbours, random_state=0, n_jobs=1, init="random").fit_transform(both)
    else:
        with np.errstate(invalid="ignore"):  # shares of a variance of 0, which nobody asks for
            flat = PCA(min(2, both.shape[1]), random_state=0).fit_transform(both)
    flat = np.pad(np.asarray(flat, np.float64), ((0, 0), (0, 2 - flat.shape[1])))
    return FeatureCloud(flat[: len(source)], flat[len(source) :])


def mean_curve(curves: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and standard deviation over the curves, each interpolated between its own first and last step; the standard
    deviation is 0 where only one curve is.
    """
    finite = [curve for curve in map(_finite, curves) if curve]
    if not finite:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    steps = np.unique([step for curve in finite for step, _ in curve]).astype(float)
    table = np.array([np.interp(steps, *zip(*curve, strict=True), left=np.nan, right=np.nan) for curve in finite])
    count = np.isfinite(table).sum(0)  # 1 or more: each step is some curve's
    mean = np.nansum(table, 0) / count
    return steps, mean, np.sqrt(np.nansum((table - mean) ** 2, 0) / np.maximum(count - 1, 1))


def smoothed(curve: Points, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` points: means of as many neighbours as that takes, at their middle step."""
    curve = _finite(curve)
    width = -(-len(curve) // most)
    chunks = [curve[start : start + width] for start in range(0, len(curve), width or 1)]
    return [(chunk[len(chunk) // 2][0], float(np.mean([value for _, value in chunk]))) for chunk in chunks]


def _thinned(curve: Points, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    curve = _finite(curve)
    if len(curve) <= most:
        return curve
    return [curve[i] for i in np.unique(np.linspace(0, len(curve) - 1, most).round().astype(int))]


def _finite(curve: Points) -> list[tuple[int, float]]:
    return [(step, float(value)) for step, value in curve if np.isfinite(value)]


def _histories(runs: Sequence[ArmRun], metric: str) -> list[Points]:
    return [run.history[metric] for run in runs if _finite(run.history.get(metric, ()))]


def short(name: str, length: int = 26) -> str:
    """The name, its middle left out where it is longer."""
    return name if len(name) <= length else f"{name[: length - length // 3 - 1]}…{name[-(length // 3) :]}"


# ---- figures of the page


@contextmanager
def drawing(changes: Mapping[str, Any] = {}) -> Iterator[None]:
    """The style of these figures, for making and for saving them; matplotlib's own settings come back after it."""
    style: Any = {**STYLE, **changes}  # matplotlib's type of its keys is a list of 300 words
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # the reader's browser has other fonts
        yield


def svg(draw: Callable[[], Figure], name: str, label: str) -> str:
    """A figure as an `<svg>` to stand in a page: text as text, colours of the theme as CSS variables (`VARIABLES`).

    `name`: a word of its own for each figure of a page (starts every id in it). `label`: what a screen reader says.
    """
    buffer = io.StringIO()
    with drawing({"svg.hashsalt": name}):
        draw().savefig(buffer, format="svg", transparent=True, dpi=160, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    text = re.sub(
        r"\b(fill|stroke): ?(#[0-9a-f]{6})",
        lambda found: f"{found[1]}: {themed(found[2])}",
        text,
    )
    text = re.sub(r"<text style=\"(?![^\"]*fill)", '<text style="fill: #000000; ', text)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{escape(label)}" ', text, count=1)


def themed(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour


def curves_figure(comparison: Comparison, arm: Arm, limits: tuple[float, float, int] | None = None) -> Figure:
    """One arm while it trains: IoU of both domains, lambda, domain accuracy over the step; mean thick, seeds thin.

    `limits`: lowest and highest IoU point and last step of the axes, so that arms side by side compare.
    """
    runs = comparison.runs_of(arm.name)
    has_lambda = bool(_histories(runs, "da/lambda"))
    has_accuracy = bool(_histories(runs, "da/domain_acc") or _histories(runs, "da/domain_acc_val"))
    heights = [3.0] + [0.9] * has_lambda + [1.4] * has_accuracy
    figure = Figure(figsize=(5.0, sum(heights) + 0.7), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for domain, colour in DOMAIN_COLOURS.items():
        curves = [[(step, points(value)) for step, value in curve] for curve in _histories(runs, f"iou/{domain}_val")]
        _draw_seeds(axes[0], curves, colour, domain, marker="o" if domain == "source" else "^")
        at_start = [value for curve in curves for step, value in curve if step == 0]
        if at_start:
            axes[0].axhline(float(np.mean(at_start)), color=colour, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes[0].set_ylabel("IoU points, validation")
    if limits:
        axes[0].set_ylim(limits[0], limits[1])
        axes[0].set_xlim(-0.02 * limits[2], 1.02 * limits[2])
    _legend_above(axes[0])
    if has_lambda:
        curves = [_thinned(curve) for curve in _histories(runs, "da/lambda")]
        _draw_seeds(axes[1], curves, LAMBDA_COLOUR, "lambda", lone=True)
        axes[1].set_ylabel("lambda")
        # the same range for every arm: lambda = 0 shall look like 0
        top = max(value for curve in _histories(comparison.runs, "da/lambda") for _, value in _finite(curve))
        axes[1].set_ylim(-0.05 * (top or 1), 1.1 * (top or 1))
    if has_accuracy:
        axis = axes[-1]
        axis.axhline(0.5, color=MUTED, linewidth=0.8, linestyle="--", zorder=1)
        held_out = _histories(runs, "da/domain_acc_val")
        _draw_seeds(
            axis, [smoothed(curve) for curve in _histories(runs, "da/domain_acc")], TRAIN_COLOUR, "training batches"
        )
        _draw_seeds(axis, held_out, HELD_OUT_COLOUR, "held-out images", marker="s")
        axis.set_ylim(0, 1.03)
        axis.set_yticks([0, 0.5, 1])
        axis.set_ylabel("domain accuracy")
        _legend_above(axis)
    axes[-1].set_xlabel("optimizer step")
    for axis in axes:
        axis.grid(axis="y")
    figure.align_ylabels()
    return figure


def curve_limits(comparison: Comparison, arms: Sequence[Arm]) -> tuple[float, float, int] | None:
    """Lowest and highest validation IoU (points, with some room) and last step of these arms; None without curves."""
    runs = [run for arm in arms for run in comparison.runs_of(arm.name)]
    found = [p for domain in DOMAIN_COLOURS for curve in _histories(runs, f"iou/{domain}_val") for p in _finite(curve)]
    if not found:
        return None
    values = [points(value) for _, value in found]
    room = max(0.06 * (max(values) - min(values)), 1.0)
    last = max(step for run in runs for curve in run.history.values() for step, _ in curve)
    return max(min(values) - room, 0), min(max(values) + room, 100), max(last, 1)


def _draw_seeds(
    axis: Axes, curves: Sequence[Points], colour: str, label: str, marker: str = "", lone: bool = False
) -> None:
    if not curves:
        return
    if len(curves) > 1 and not lone:
        for curve in curves:
            axis.plot(*zip(*_finite(curve), strict=True), color=colour, linewidth=0.7, alpha=0.4)
    steps, mean, _ = mean_curve(curves)
    dense = len(steps) > 25
    axis.plot(
        steps, mean, color=colour, linewidth=1.8, label=label, marker="" if dense else marker, markersize=3.5,
        markeredgecolor=PAPER, markeredgewidth=0.4,
    )  # fmt: skip


def _legend_above(axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 0.98), ncols=len(handles), borderaxespad=0)


def scores_figure(comparison: Comparison, confidence: float) -> Figure:
    """A row an arm: each seed's score that the verdict judges, and their mean with its confidence interval."""
    figure = Figure(figsize=(5.0, 0.9 + 0.42 * len(comparison.arms)), layout="constrained")
    draw_scores(figure.subplots(), comparison, confidence)
    return figure


def draw_scores(axis: Axes, comparison: Comparison, confidence: float, size: float = 1.0) -> None:
    """`scores_figure` on an axis that is there."""
    colours = arm_colours(comparison.arms)
    rows = {arm.name: -row for row, arm in enumerate(comparison.arms)}
    scores = {name: seed_scores(comparison, name, comparison.metric) for name in rows}
    for above, below in zip(list(rows)[:-1], list(rows)[1:], strict=True):
        for seed in scores[above].keys() & scores[below].keys():
            ends = [points(scores[above][seed]), points(scores[below][seed])]
            axis.plot(ends, [rows[above] - 0.12, rows[below] - 0.12], color=GRID, linewidth=0.8 * size, zorder=1)
    for name, row in rows.items():
        values = np.array([points(value) for value in scores[name].values()])
        axis.scatter(
            values,
            np.full(len(values), row - 0.12),
            s=22 * size**2,
            color=colours[name],
            alpha=0.75,
            linewidths=0,
            zorder=3,
        )
        _draw_mean(axis, mean_of(scores[name], confidence), row + 0.14, colours[name], size)
        if not len(values):
            axis.text(0.02, row, "no value", transform=axis.get_yaxis_transform(), va="center", color=MUTED)
    axis.set_yticks(list(rows.values()), [short(name) for name in rows])
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"{comparison.metric}, IoU points")


def _draw_mean(axis: Axes, interval: Interval, row: float, colour: str, size: float = 1.0) -> None:
    if not interval.n:
        return
    if np.isfinite(interval.low):
        ends = [points(interval.low), points(interval.high)]
        axis.plot(ends, [row, row], color=colour, linewidth=2.2 * size, zorder=2)
    axis.plot(
        [points(interval.mean)], [row], marker="D", markersize=5.5 * size, color=colour, markeredgecolor=PAPER,
        markeredgewidth=0.8, zorder=4,
    )  # fmt: skip


def differences(comparison: Comparison) -> list[tuple[str, str, str, Interval]]:
    """Rows (arm, compared with, colour's arm, interval) that the verdicts rest on; control against source only last, once."""
    source, control = (first_of_kind(comparison.arms, kind) for kind in ("source_only", "control"))
    rows: list[tuple[str, str, str, Interval]] = []
    shared: list[tuple[str, str, str, Interval]] = []
    for verdict in comparison.verdicts:
        for other, interval in ((source, verdict.against_source), (control, verdict.against_control)):
            if other and interval.n:
                rows.append((verdict.arm, other.name, verdict.arm, interval))
        if source and control and verdict.control_against_source.n and not shared:
            shared.append((control.name, source.name, control.name, verdict.control_against_source))
    return rows + shared


def differences_figure(comparison: Comparison) -> Figure:
    """Paired differences over seeds: each seed, their mean and its confidence interval, around 0."""
    rows = differences(comparison)
    colours = arm_colours(comparison.arms)
    figure = Figure(figsize=(5.0, 0.9 + 0.42 * max(len(rows), 1)), layout="constrained")
    axis = figure.subplots()
    for row, (arm, other, coloured, interval) in enumerate(rows):
        ours, theirs = (seed_scores(comparison, name, comparison.metric) for name in (arm, other))
        each = [points(ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        colour = colours.get(coloured, MUTED)
        axis.scatter(each, np.full(len(each), -row - 0.12), s=22, color=colour, alpha=0.75, linewidths=0, zorder=3)
        _draw_mean(axis, interval, -row + 0.14, colour)
    axis.axvline(0, color=INK, linewidth=1)
    names = [f"{short(arm, 18)} {MINUS} {short(other, 18)}" for arm, other, _, _ in rows]
    axis.set_yticks(-np.arange(len(rows)), names)
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("difference in IoU points: right of 0 is better")
    return figure


def classes_figure(comparison: Comparison) -> Figure:
    """Bars of each class's IoU, one an arm, with the standard deviation and the points of the seeds."""
    arms, names = comparison.arms, comparison.class_names
    colours = arm_colours(arms)
    per_row = max(min(MOST_BARS // max(len(arms), 1), len(names)), 1)
    rows = -(-len(names) // per_row)
    figure = Figure(figsize=(10.2, 2.1 * rows + 0.7), layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False, sharey=True)[:, 0])
    width = 0.82 / max(len(arms), 1)
    for number, name in enumerate(names):
        axis = axes[number // per_row]
        for index, arm in enumerate(arms):
            values = 100 * class_scores(comparison, arm.name, name)
            place = number % per_row + width * (index - (len(arms) - 1) / 2)
            if not len(values):
                axis.text(place, 1, MISSING, ha="center", va="bottom", color=MUTED)
                continue
            colour = colours[arm.name]
            axis.bar(place, values.mean(), width * 0.9, color=colour, alpha=0.85, label=arm.name)
            if len(values) > 1:
                axis.errorbar(
                    place, values.mean(), np.std(values, ddof=1), color=INK, linewidth=1, capsize=2, capthick=1
                )
            spread = np.linspace(-0.25, 0.25, len(values)) * width if len(values) > 1 else [0.0]
            axis.scatter(place + np.asarray(spread), values, s=9, color=PAPER, edgecolors=INK, linewidths=0.6, zorder=4)
    for row, axis in enumerate(axes):
        shown = names[row * per_row : (row + 1) * per_row]
        most = max(110 // per_row, 8)
        axis.set_xticks(range(len(shown)), [textwrap.fill(short(name, 2 * most), most) for name in shown], fontsize=8)
        axis.set_xlim(-0.5, per_row - 0.5)
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y")
        axis.set_ylim(bottom=0)
        axis.set_ylabel("IoU points")
    handles = [Patch(color=colours[arm.name], alpha=0.85, label=short(arm.name, 40)) for arm in arms]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(arms), 5))
    return figure


def features_figure(comparison: Comparison, how: Projection) -> Figure:
    """Pooled features of both domains, before and after, each network projected by itself."""
    clouds = {name: comparison.features[name] for name in ("before", "after") if name in comparison.features}
    clouds |= {name: cloud for name, cloud in comparison.features.items() if name not in clouds}
    figure = Figure(figsize=(10.2 if len(clouds) > 1 else 5.2, 4.4), layout="constrained")
    axes = figure.subplots(1, max(len(clouds), 1), squeeze=False)[0]
    for axis, (name, cloud) in zip(axes, clouds.items(), strict=False):
        axis.set_title(name)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color(GRID)
        try:
            flat = project(FeatureCloud(_drawn(cloud.source), _drawn(cloud.target)), how)
        except ValueError as error:
            axis.text(0.5, 0.5, textwrap.fill(str(error), 40), ha="center", transform=axis.transAxes, color=MUTED)
            continue
        for domain, marker in (("source", "o"), ("target", "^")):
            places = flat.source if domain == "source" else flat.target
            axis.scatter(
                places[:, 0], places[:, 1], s=20, marker=marker, color=DOMAIN_COLOURS[domain], alpha=0.6,
                linewidths=0.4, edgecolors=PAPER, label=f"{domain} ({len(places)} images)",
            )  # fmt: skip
        axis.set_aspect("equal", adjustable="datalim")
        axis.margins(0.06)
        axis.legend(loc="lower left", bbox_to_anchor=(0, -0.09), ncols=2, borderaxespad=0, handletextpad=0.2)
    return figure


def _drawn(values: np.ndarray) -> np.ndarray:
    """At most MOST_FEATURES rows, the same at each call."""
    if len(values) <= MOST_FEATURES:
        return values
    return values[np.sort(np.random.default_rng(0).choice(len(values), MOST_FEATURES, replace=False))]


# ---- tiles


def painted(ids: np.ndarray, count: int) -> np.ndarray:
    """(H, W, 3) uint8 of class ids (H, W); ids outside the classes (ignored) black."""
    palette = np.concatenate([distinct_class_colours(count), [to_rgb(IGNORED_COLOUR)]])
    return np.round(255 * palette[np.where((ids >= 0) & (ids < count), ids, count)]).astype(np.uint8)


def tile_iou(truth: np.ndarray, predicted: np.ndarray, count: int) -> float:
    """Mean IoU over the classes present in one tile, pixels whose truth is no class left out; NaN without such pixels."""
    known = (truth >= 0) & (truth < count)
    same, either = np.zeros(count), np.zeros(count)
    for index in range(count):
        there, said = truth[known] == index, predicted[known] == index
        same[index], either[index] = (there & said).sum(), (there | said).sum()
    present = either > 0
    return float(np.mean(same[present] / either[present])) if present.any() else float("nan")


def shown_arms(comparison: Comparison, panels: Sequence[Panel]) -> list[str]:
    """Arms with a prediction in any of these panels, in the comparison's order."""
    found = {name for panel in panels for name in panel.predictions}
    known = [arm.name for arm in comparison.arms if arm.name in found]
    return known + sorted(found - set(known))


# ---- the summary


def draw_summary(path: Path, comparison: Comparison) -> None:
    """A PNG of 1600 x 1000 pixels: verdicts, scores of each arm and seed, curves, and up to five tiles."""
    sizes = {"font.size": 11, "axes.labelsize": 11, "axes.titlesize": 12, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
             "legend.fontsize": 10.5}  # fmt: skip
    with drawing(sizes):
        figure = _summary(comparison)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, facecolor=PAPER, format="png")


def _summary(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(16, 10))
    top = 1.15 + sum(_inches(verdict, comparison) for verdict in comparison.verdicts or [None])  # of the header
    _write_header(figure, comparison, top)
    high = 1 - top / 10
    confidence = confidence_of(comparison.verdicts)
    tiles = comparison.panels[:5]
    if tiles:
        left = figure.add_gridspec(2, 1, left=0.13, right=0.43, top=high - 0.035, bottom=0.125, hspace=0.38)
        _draw_tiles(figure, comparison, tiles, (0.465, 0.03, 0.985, high))
    else:
        left = figure.add_gridspec(1, 2, left=0.14, right=0.97, top=high - 0.04, bottom=0.125, wspace=0.2)
    dots, curves = (figure.add_subplot(left[index]) for index in range(2))
    draw_scores(dots, comparison, confidence, size=1.35)
    dots.set_yticks(dots.get_yticks(), [textwrap.fill(short(arm.name, 36), 18) for arm in comparison.arms])
    dots.set_title(f"Each seed, mean and {confidence * 100:.4g} % interval")
    _draw_summary_curves(curves, comparison)
    return figure


def confidence_of(verdicts: Sequence[Verdict]) -> float:
    """The level of the verdicts' intervals; the rule's own where there is no verdict."""
    return verdicts[0].confidence if verdicts else CONFIDENCE


def _reason(verdict: Verdict | None, comparison: Comparison) -> list[str]:
    """Lines of a verdict's reason; none where many arms are judged."""
    if verdict is None or len(comparison.verdicts) >= 3:
        return []
    return textwrap.wrap(verdict.reason, 175, max_lines=4, placeholder=" …")


def _inches(verdict: Verdict | None, comparison: Comparison) -> float:
    """The height of a verdict in the header."""
    lines = len(_reason(verdict, comparison))
    return 0.52 + 0.215 * lines if lines else 0.42


def _write_header(figure: Figure, comparison: Comparison, top: float) -> None:
    inch = 0.1  # of the figure's height
    seeds = len({run.seed for run in comparison.runs})
    place = 1 - 0.5 * inch
    title = short(comparison.title.replace("->", "→"), 90)
    figure.text(0.02, place, title, fontsize=22 * min(1, 60 / max(len(title), 1)), weight="bold", va="center")
    told = f"judged by {comparison.metric}, {seeds} seed{'' if seeds == 1 else 's'}"
    figure.text(0.985, place, told, fontsize=12, color=MUTED, va="center", ha="right")
    place -= 0.55 * inch
    for verdict in comparison.verdicts:
        mark = OUTCOME_MARKS.get(verdict.outcome, "")
        colour = OUTCOME_COLOURS.get(verdict.outcome, INK)
        head = f"{mark} {short(verdict.arm, 40)}: {verdict.outcome}"
        figure.text(0.02, place, head, fontsize=16, weight="bold", color=colour, va="center")
        reason = _reason(verdict, comparison)
        if reason:
            figure.text(0.02, place - 0.26 * inch, "\n".join(reason), fontsize=12, va="top", linespacing=1.3)
        else:
            told = [
                f"{points(interval.mean):+.1f} points against {other}".replace("-", MINUS)
                for other, interval in (
                    ("source only", verdict.against_source),
                    ("the control", verdict.against_control),
                )
                if interval.n
            ]
            figure.text(0.985, place, ",  ".join(told), fontsize=12, va="center", ha="right")
        place -= _inches(verdict, comparison) * inch
    if not comparison.verdicts:
        figure.text(0.02, place, "no adapted arm to judge", fontsize=14, color=MUTED, va="center")
    figure.add_artist(Line2D([0.02, 0.985], [1 - top * inch + 0.004] * 2, color=GRID, linewidth=1))


def _draw_summary_curves(axis: Axes, comparison: Comparison) -> None:
    colours = arm_colours(comparison.arms)
    handles = []
    for arm in comparison.arms:
        runs = comparison.runs_of(arm.name)
        for domain, line in (("target", "-"), ("source", (0, (4, 2)))):
            steps, mean, std = mean_curve(_histories(runs, f"iou/{domain}_val"))
            if len(steps) < 2:
                continue
            drawn = axis.plot(
                steps, 100 * mean, color=colours[arm.name], linewidth=2, linestyle=line, label=short(arm.name)
            )
            if domain == "target":
                handles += drawn
                axis.fill_between(
                    steps, 100 * (mean - std), 100 * (mean + std), color=colours[arm.name], alpha=0.15, lw=0
                )
    axis.set_title("Validation IoU: target solid (± std), source dashed")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("IoU points")
    axis.grid(axis="y")
    if handles:
        place = axis.get_position()
        axis.legend(
            handles=handles, loc="lower center", ncols=3, borderaxespad=0, columnspacing=1.2,
            bbox_to_anchor=((place.x0 + place.x1) / 2, 0.01), bbox_transform=axis.figure.transFigure,
        )  # fmt: skip
    else:
        axis.text(0.5, 0.5, "no curves", transform=axis.transAxes, ha="center", color=MUTED)


def _draw_tiles(
    figure: Figure, comparison: Comparison, panels: Sequence[Panel], box: tuple[float, float, float, float]
) -> None:
    """Rows of tiles inside (left, bottom, right, top) of the figure, the legend of classes under them."""
    count = len(comparison.class_names)
    kinds = {arm.name: arm.kind for arm in comparison.arms}
    names = shown_arms(comparison, panels)
    # the comparison in brief: source only, control and the first adapted arm; others only where one of these is missing
    first = [name for kind in ("source_only", "control", "adapted") for name in names if kinds.get(name) == kind]
    names = list({kinds[name]: name for name in reversed(first)}.values())[::-1] or names[:3]
    with_truth = any(panel.truth is not None for panel in panels)
    columns = ["image", *["truth"] * with_truth, *names]
    left, bottom, right, top = box
    legend_rows = -(-(min(count, 20) + 1) // 5)
    space = 10 * (top - 0.045 - bottom - 0.028 * legend_rows)  # inches, as is `side`
    side = min(16 * (right - left) / len(columns), space / min(len(panels), 3))
    panels = panels[: max(int(space / side + 1e-6), 1)]
    start = (left + right) / 2 - side / 16 * len(columns) / 2
    for row, panel in enumerate(panels):
        for column, name in enumerate(columns):
            below = top - 0.045 - (row + 1) * side / 10
            axis = figure.add_axes((start + column * side / 16, below, 0.96 * side / 16, 0.96 * side / 10))
            axis.set_axis_off()
            pixels = (
                panel.image
                if column == 0
                else panel.truth
                if column == 1 and with_truth
                else panel.predictions.get(name)
            )
            if pixels is not None:
                axis.imshow(pixels if pixels.ndim == 3 else painted(pixels, count), interpolation="nearest")
            if row == 0:
                width = int(side * 11.5)  # letters
                axis.set_title(textwrap.fill(short(name, 2 * width - 4), width), fontsize=10, loc="center", pad=4)
    palette = distinct_class_colours(count)
    handles = [
        Patch(facecolor=palette[i], edgecolor=MUTED, linewidth=0.6, label=short(name, 22))
        for i, name in enumerate(comparison.class_names[:20])
    ]
    if with_truth and any(
        panel.truth is not None and (panel.truth == comparison.ignore_index).any() for panel in panels
    ):
        handles.append(Patch(facecolor=IGNORED_COLOUR, label="ignored"))
    anchor = (start, top - 0.045 - len(panels) * side / 10)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=anchor, ncols=5, borderaxespad=0.3, columnspacing=1.2
    )
