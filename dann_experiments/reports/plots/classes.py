"""Draws the IoU per class and arm as bars."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dann_experiments.reports.colors import INK, MUTED, PAPER
from dann_experiments.reports.plots.style import drawing, legend_shape, new_figure
from dann_experiments.reports.tables import MISSING, short

MOST_BARS = 30  # bars in one row


@drawing()
def classes_figure(
    class_names: Sequence[str], colors: Mapping[str, str], scores: Mapping[str, Mapping[str, np.ndarray]]
) -> Figure:
    """Draw one bar per class and arm: the mean over seeds, its standard deviation, one circle per seed.

    Arguments:
        colors: arm -> color.
        scores: arm -> class -> (n,) IoU points, one per seed; a class without values gets a dash.
    """
    arms, count = list(colors), max(len(colors), 1)
    per_row = max(min(MOST_BARS // count, len(class_names)), 1)
    rows = -(-len(class_names) // per_row)
    handles = [Patch(color=color, alpha=0.85, label=short(arm, 40)) for arm, color in colors.items()]
    columns, legend = legend_shape(handles, 10)
    figure = new_figure(10.2, 2.1 * rows + 0.2 + legend, (0.52, 0.05, legend + 0.05, 0.3), hspace=0.3)
    axes = list(figure.subplots(rows, 1, squeeze=False, sharey=True)[:, 0])
    width = 0.82 / count
    for number, name in enumerate(class_names):
        axis = axes[number // per_row]
        for index, arm in enumerate(arms):
            values = scores[arm][name]
            place = number % per_row + width * (index - (count - 1) / 2)
            if not len(values):
                axis.text(place, 1, MISSING, ha="center", va="bottom", color=MUTED)
                continue
            axis.bar(place, values.mean(), width * 0.9, color=colors[arm], alpha=0.85)
            spread = np.zeros(1)
            if len(values) > 1:
                spread = np.linspace(-0.25, 0.25, len(values)) * width
                axis.errorbar(place, values.mean(), values.std(ddof=1), color=INK, linewidth=1, capsize=2, capthick=1)
            axis.scatter(place + spread, values, s=9, color=PAPER, edgecolors=INK, linewidths=0.6, zorder=4)
    for row, axis in enumerate(axes):
        shown = class_names[row * per_row : (row + 1) * per_row]
        most = max(110 // per_row, 8)
        axis.set_xticks(range(len(shown)), [textwrap.fill(short(name, 2 * most), most) for name in shown], fontsize=8)
        axis.set(xlim=(-0.5, per_row - 0.5), ylabel="IoU points")
        axis.set_ylim(bottom=0)
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y")
    if handles:
        figure.legend(handles=handles, loc="upper left", ncols=columns, borderaxespad=0.2)
    return figure
