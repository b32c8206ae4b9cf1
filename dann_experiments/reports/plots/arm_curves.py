"""Draws the curves of one arm over its seeds, and the mean curves of all arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from dann_experiments.names import DOMAINS, Domain, Metric, SetName
from dann_experiments.reports.colors import DOMAIN_COLORS, MUTED, ORANGE, PAPER, PURPLE, TEAL
from dann_experiments.reports.plots.series import Points, finite, mean_curve, smoothed
from dann_experiments.reports.plots.style import drawing, legend_above, new_figure
from dann_experiments.reports.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Histories = Mapping[str, Sequence[Points]]
"""Metric -> one curve per seed."""


@drawing()
def arm_curves_figure(
    histories: Histories, limits: tuple[float, float, int], highest_lambda: float, domains: int = 2
) -> Figure:
    """Draw the training curves of one arm: IoU of both domains, lambda, domain accuracy; mean thick, seeds thin.

    Arguments:
        histories: curves of the metrics `iou/source_val`, `iou/target_val`, `da/lambda`, `da/domain_acc`, `da/domain_acc_val`.
        limits: lowest and highest IoU point and last step of the axes, the same for all arms (`curve_limits`).
        highest_lambda: highest lambda of all arms, so that lambda = 0 is drawn at 0.
        domains: number of classes of the domain classifier, whose chance level is drawn.
    """
    has_lambda = bool(histories.get(Metric.LAMBDA))
    has_accuracy = bool(histories.get(Metric.DOMAIN_ACCURACY) or histories.get(Metric.DOMAIN_ACCURACY_VAL))
    heights = [3.0] + [0.9] * has_lambda + [1.4] * has_accuracy
    figure = new_figure(5.0, sum(heights) + 0.7, (0.52, 0.2, 0.25, 0.42), hspace=0.17)  # right: half of a number below
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for domain in DOMAINS:
        color = DOMAIN_COLORS[domain]
        curves = _in_points(histories, domain)
        _draw_seeds(axes[0], curves, color, domain, marker="o" if domain == "source" else "^")
        at_start = [value for curve in curves for step, value in curve if step == 0]
        if at_start:
            axes[0].axhline(float(np.mean(at_start)), color=color, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    low, high, last = limits
    axes[0].set(ylabel="IoU points, validation", ylim=(low, high), xlim=(-0.02 * last, 1.02 * last))
    legend_above(axes[0])
    if has_lambda:
        mean = [smoothed(curve) for curve in histories[Metric.LAMBDA]]
        _draw_seeds(axes[1], mean, ORANGE, "lambda", with_seeds=False)
        axes[1].set(ylabel="lambda", ylim=(-0.05 * (highest_lambda or 1), 1.1 * (highest_lambda or 1)))
    if has_accuracy:
        axis = axes[-1]
        axis.axhline(1 / domains, color=MUTED, linewidth=0.8, linestyle="--", zorder=1)
        training = [smoothed(curve) for curve in histories.get(Metric.DOMAIN_ACCURACY, ())]
        _draw_seeds(axis, training, TEAL, "training batches")
        _draw_seeds(axis, histories.get(Metric.DOMAIN_ACCURACY_VAL, ()), PURPLE, "held-out images", marker="s")
        axis.set(ylabel="domain accuracy", ylim=(0, 1.03), yticks=[0, round(1 / domains, 2), 1])
        legend_above(axis)
    axes[-1].set_xlabel("optimizer step")
    for axis in axes:
        axis.grid(axis="y")
        axis.yaxis.set_label_coords(-0.37 / 4.28, 0.5)
    return figure


def curve_limits(arms: Sequence[Histories]) -> tuple[float, float, int]:
    """Return lowest and highest validation IoU (points, with some room) and the last step of all curves."""
    found = [value for arm in arms for domain in DOMAINS for curve in _in_points(arm, domain) for _, value in curve]
    last = max((curve[-1][0] for arm in arms for curves in arm.values() for curve in curves if curve), default=1)
    if not found:
        return 0, 100, max(last, 1)
    room = max(0.06 * (max(found) - min(found)), 1.0)
    return max(min(found) - room, 0), min(max(found) + room, 100), max(last, 1)


def draw_all_curves(axis: Axes, arms: Mapping[str, tuple[str, Histories]]) -> None:
    """Draw the mean validation IoU of every arm, target solid and source dashed; `arms`: name -> color and histories."""
    handles = []
    for name, (color, histories) in arms.items():
        lines: dict[Domain, Any] = {"target": "-", "source": (0, (4, 2))}
        for domain, line in lines.items():
            steps, mean, std = mean_curve(_in_points(histories, domain))
            if len(steps) < 2:
                continue
            drawn = axis.plot(steps, mean, color=color, linewidth=2, linestyle=line, label=short(name))
            if domain == "target":
                handles += drawn
                axis.fill_between(steps, mean - std, mean + std, color=color, alpha=0.15, lw=0)
    axis.set(title="Validation IoU: target solid (± std), source dashed", xlabel="optimizer step", ylabel="IoU points")
    axis.grid(axis="y")
    if handles:
        place = axis.get_position()
        axis.legend(
            handles=handles, loc="lower center", ncols=3, borderaxespad=0, columnspacing=1.2,
            bbox_to_anchor=((place.x0 + place.x1) / 2, 0.01), bbox_transform=axis.figure.transFigure,
        )  # fmt: skip
    else:
        axis.text(0.5, 0.5, "no curves", transform=axis.transAxes, ha="center", color=MUTED)


def _in_points(histories: Histories, domain: Domain) -> list[list[tuple[int, float]]]:
    return [
        [(step, 100 * value) for step, value in finite(curve)]
        for curve in histories.get(Metric.iou(SetName(domain, "val")), ())
    ]


def _draw_seeds(
    axis: Axes, curves: Sequence[Points], color: str, label: str, marker: str = "", with_seeds: bool = True
) -> None:
    if not curves:
        return
    for curve in curves if len(curves) > 1 and with_seeds else ():
        axis.plot(*zip(*finite(curve), strict=True), color=color, linewidth=0.7, alpha=0.4)
    steps, mean, _ = mean_curve(curves)
    marker = "" if len(steps) > 25 else marker
    if len(steps) == 1:  # one point is no line
        marker = "o"
    axis.plot(
        steps, mean, color=color, linewidth=1.8, label=label, marker=marker, markersize=3.5,
        markeredgecolor=PAPER, markeredgewidth=0.4,
    )  # fmt: skip
