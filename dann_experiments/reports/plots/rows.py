"""Draws dots for seeds, the mean and its interval, one row per arm or per difference between arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from dann_experiments.reports.colors import GRID, INK, MUTED, PAPER
from dann_experiments.reports.plots.style import drawing, new_figure, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """One row of a dot plot, in IoU points. An unknown mean or end of the interval is NaN."""

    name: str
    color: str
    values: Mapping[int, float]
    """Seed -> finite value."""
    mean: float
    low: float
    high: float


@drawing()
def rows_figure(rows: Sequence[Row], label: str, differences: bool = False) -> Figure:
    """Draw one row per arm, or per difference between two arms; `label`: text of the horizontal axis."""
    left = text_width([row.name for row in rows]) + 0.15
    figure = new_figure(5.0, 0.6 + 0.42 * max(len(rows), 1), (left, 0.15, 0.05, 0.42))
    draw_rows(figure.subplots(), rows, label, differences)
    return figure


def draw_rows(axis: Axes, rows: Sequence[Row], label: str, differences: bool = False, size: float = 1.0) -> None:
    """Draw rows on an axis: dots for seeds, a diamond and a bar for the mean and its interval.

    The axis extends beyond the values by at most their range (or 1 point): an arrow marks an interval that continues. Lines
    connect the same seed in neighboring rows; `differences` have a line at 0 instead.
    """
    low, high = _visible(rows, differences)
    for above, (one, other) in enumerate(pairwise(rows)):
        for seed in one.values.keys() & other.values.keys() if not differences else ():
            ends = [one.values[seed], other.values[seed]]
            axis.plot(ends, [-above - 0.12, -above - 1.12], color=GRID, linewidth=0.8 * size, zorder=1)
    for number, row in enumerate(rows):
        values = list(row.values.values())
        axis.scatter(
            values, [-number - 0.12] * len(values), s=22 * size**2, color=row.color, alpha=0.75, linewidths=0, zorder=3
        )  # fmt: skip
        if not values:
            axis.text(0.02, -number, "no value", transform=axis.get_yaxis_transform(), va="center", color=MUTED)
            continue
        place = 0.14 - number
        if np.isfinite(row.low):
            ends = [max(row.low, low), min(row.high, high)]
            axis.plot(ends, [place] * 2, color=row.color, linewidth=2.2 * size, zorder=2)
            for end, cut, arrow in ((low, row.low < low, "<"), (high, row.high > high, ">")):
                if cut:
                    axis.plot([end], [place], marker=arrow, markersize=6 * size, color=row.color)
        axis.plot(
            [row.mean], [place], marker="D", markersize=5.5 * size, color=row.color, markeredgecolor=PAPER,
            markeredgewidth=0.8, zorder=4,
        )  # fmt: skip
    if differences:
        axis.axvline(0, color=INK, linewidth=1)
    if low < high:
        room = 0.04 * (high - low)
        axis.set_xlim(low - room, high + room)
    axis.set_yticks(-np.arange(len(rows)), [row.name for row in rows])
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(label)


def _visible(rows: Sequence[Row], differences: bool) -> tuple[float, float]:
    """Return the ends of the axis: all values, and the parts of the intervals near them (for scores, within 0 to 100)."""
    values = [value for row in rows for value in row.values.values()] + [0.0] * differences
    if not values:
        return 0.0, 0.0
    ends = [end for row in rows for end in (row.low, row.high) if np.isfinite(end)]
    least, most = min(values), max(values)
    room = max(most - least, 1.0)
    first, last = (-np.inf, np.inf) if differences else (0.0, 100.0)
    low = min(least, max(min(ends, default=least), least - room, first))
    high = max(most, min(max(ends, default=most), most + room, last))
    return (low, high) if low < high else (low - 0.5, high + 0.5)
