"""Draws the curves of one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dann_experiments.names import DOMAINS, Metric, SetName
from dann_experiments.reports.colors import DOMAIN_COLORS, MUTED, PURPLE, TEAL, YELLOW
from dann_experiments.reports.plots.series import Points, smoothed
from dann_experiments.reports.plots.style import drawing, legend_above, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@drawing()
def draw_curves(path: Path, history: Mapping[str, Points], title: str, domains: int = len(DOMAINS)) -> None:
    """Draw IoU of both domains, domain accuracy and lambda over the optimizer step; `history`: metric -> [(step, value)];
    `domains`: number of classes of the domain classifier."""
    figure = new_figure(8, 6.5, (0.7, 0.2, 0.75, 0.5), hspace=0.18)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    for domain in DOMAINS:
        color = DOMAIN_COLORS[domain]
        _plot(above, history, Metric.iou(SetName(domain, "val")), color, marker="o")
    above.set_ylabel("mean IoU")
    _plot(middle, history, Metric.DOMAIN_ACCURACY, TEAL, smooth=True)
    _plot(middle, history, Metric.DOMAIN_ACCURACY_VAL, PURPLE, marker="o")
    middle.axhline(1 / domains, color=MUTED, linewidth=0.8, linestyle="--")
    middle.text(0, 1 / domains - 0.06, f"{1 / domains:.2g}: domains confused", fontsize=7, color=MUTED)
    middle.set_ylim(0, 1.02)
    middle.set_ylabel("domain accuracy")
    _plot(below, history, Metric.LAMBDA, YELLOW)
    below.set_ylabel("lambda")
    below.set_xlabel("optimizer step")
    for axis in (above, middle, below):
        axis.grid(alpha=0.6)
        legend_above(axis)
    figure.text(0.7 / 8, 1 - 0.3 / 6.5, title, fontsize=11)
    save(figure, path)


def _plot(
    axis: Axes, history: Mapping[str, Points], name: str, color: str, marker: str = "", smooth: bool = False
) -> None:
    points = history.get(name, ())
    if not points:
        return
    label = name
    if smooth and len(points) >= 100:
        axis.plot(*zip(*points, strict=True), color=color, alpha=0.2, linewidth=0.6)
        label = f"{name} (mean of {-(-len(points) // 50)} steps)"
        points = smoothed(points, 50)
    marker = "o" if len(points) == 1 else marker  # one point is no line
    axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3, label=label)
