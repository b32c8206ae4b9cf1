"""Draws a whole comparison in one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dann_experiments.reports.colors import GRID, MUTED
from dann_experiments.reports.plots.arm_curves import Histories, draw_all_curves
from dann_experiments.reports.plots.rows import Row, draw_rows
from dann_experiments.reports.plots.style import canvas, class_handles, draw_grid, drawing, save
from dann_experiments.reports.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = {"font.size": 11, "axes.labelsize": 11, "axes.titlesize": 12, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
         "legend.fontsize": 10.5}  # fmt: skip
WIDTH, HEIGHT = 16.0, 10.0  # inches
FEW_ARMS = 8  # each further one makes the picture higher
ROW = 0.36  # inches per further arm


@dataclass(frozen=True)
class Headline:
    """One verdict."""

    text: str
    color: str
    reason: str
    differences: str
    """Shown instead of the reason if many arms are judged."""


@drawing(SIZES)
def draw_summary(
    path: Path,
    title: str,
    subtitle: str,
    verdicts: Sequence[Headline],
    rows: Sequence[Row],
    rows_title: str,
    rows_label: str,
    curves: Mapping[str, tuple[str, Histories]],
    tiles: Sequence[tuple[str, Sequence[np.ndarray | None]]],
    class_names: Sequence[str],
    not_labeled: bool,
) -> None:
    """Draw a PNG, 1600 pixels wide: verdicts, scores per arm and seed, curves, and up to five rows of tiles. Up to eight arms fit
    into 1000 pixels of height.

    Arguments:
        curves: arm -> color and histories.
        tiles: columns of pictures (H, W, 3) with their titles; may be empty.
        not_labeled: True if some pixels of the tiles have no label.
    """
    more = max(len(rows) - FEW_ARMS, 0)
    height = HEIGHT + 2 * ROW * more
    figure = Figure(figsize=(WIDTH, height))
    axis = canvas(figure)
    top = _write_header(axis, title, subtitle, verdicts)
    high = 1 - top / height
    lines = -(-sum(1 for _, found in curves.values() if found) // 3)  # of the legend of the curves
    bottom = (0.5 + 0.25 * max(lines, 3)) / height
    if tiles:
        left = figure.add_gridspec(
            2, 1, left=0.13, right=0.43, top=high - 0.35 / height, bottom=bottom, hspace=0.38 * HEIGHT / height,
            height_ratios=(1 + 0.15 * more, 1),
        )  # fmt: skip
        _draw_tiles(axis, tiles, class_names, not_labeled, top, height)
    else:
        left = figure.add_gridspec(1, 2, left=0.14, right=0.97, top=high - 0.4 / height, bottom=bottom, wspace=0.2)
    dots = figure.add_subplot(left[0])
    draw_rows(dots, rows, rows_label, size=1.35)
    dots.set_yticks(dots.get_yticks(), [textwrap.fill(short(row.name, 36), 18) for row in rows])
    dots.set_title(rows_title)
    draw_all_curves(figure.add_subplot(left[1]), curves)
    save(figure, path, dpi=100)


def _write_header(axis: Axes, title: str, subtitle: str, verdicts: Sequence[Headline]) -> float:
    """Write title and verdicts; return their height in inches."""
    left, right, y = 0.32, WIDTH - 0.24, 0.5
    title = short(title, 90)
    axis.text(left, y, title, fontsize=22 * min(1, 60 / max(len(title), 1)), weight="bold", va="center")
    axis.text(right, y, subtitle, fontsize=12, color=MUTED, va="center", ha="right")
    y += 0.55
    for verdict in verdicts:
        axis.text(left, y, verdict.text, fontsize=16, weight="bold", color=verdict.color, va="center")
        lines = textwrap.wrap(verdict.reason, 175, max_lines=4, placeholder=" …") if len(verdicts) < 3 else []
        if lines:
            axis.text(left, y + 0.26, "\n".join(lines), fontsize=12, va="top", linespacing=1.3)
        else:
            axis.text(right, y, verdict.differences, fontsize=12, va="center", ha="right")
        y += 0.52 + 0.215 * len(lines) if lines else 0.42
    if not verdicts:
        axis.text(left, y, "no adapted arm to judge", fontsize=14, color=MUTED, va="center")
        y += 0.42
    axis.add_artist(Line2D([left, right], [y + 0.06] * 2, color=GRID, linewidth=1))
    return y + 0.1


def _draw_tiles(
    axis: Axes,
    columns: Sequence[tuple[str, Sequence[np.ndarray | None]]],
    class_names: Sequence[str],
    not_labeled: bool,
    top: float,
    height: float,
) -> None:
    """Draw as many rows of tiles as fit into the right part of the picture, with the legend of the classes below."""
    handles = class_handles(class_names, range(min(len(class_names), 20)), not_labeled)
    left, right, top = 7.44, WIDTH - 0.24, top + 0.45
    space = height - 0.3 - 0.28 * -(-len(handles) // 5) - top
    rows = len(columns[0][1])
    side = min((right - left) / len(columns), space / min(rows, 3))
    rows = min(rows, max(int(space / side + 1e-6), 1))
    start, width = (left + right - side * len(columns)) / 2, int(side * 11.5)
    shown = [(textwrap.fill(short(name, 2 * width - 4), width), pictures[:rows]) for name, pictures in columns]
    draw_grid(axis, shown, start, top, side, size=10)
    axis.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(start, top + rows * side), bbox_transform=axis.transData, ncols=5,
        borderaxespad=0.3, columnspacing=1.2,
    )  # fmt: skip
