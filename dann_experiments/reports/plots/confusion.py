"""A confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from dann_experiments.reports.plots.style import drawing, new_figure, save, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@drawing({"axes.spines.top": True, "axes.spines.right": True})
def draw_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix (K, K) of pixel counts, rows = truth.

    Each field has its share of the true class, which colors it, above its count. A class without truth has a gray row with
    counts alone.
    """
    totals = confusion.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(totals == 0, confusion.shape), confusion / np.maximum(totals, 1))
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name in class_names]
    count, room = len(names), text_width(names, 8)
    size = max(0.66 * count, 1.7)
    left, right, top, bottom = room + 0.45, 0.95, 0.35, 0.7 * room + 0.5
    figure = new_figure(left + size + right, top + size + bottom, (left, right, top, bottom))
    axis = figure.subplots()
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#e4e4e4")
    image = axis.imshow(shares, cmap=colors, vmin=0, vmax=1)
    for row, column in np.ndindex(confusion.shape):
        _write_field(axis, row, column, shares[row, column], int(confusion[row, column]))
    axis.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(range(count), names, fontsize=8)
    axis.set_xticks(np.arange(1, count) - 0.5, minor=True)
    axis.set_yticks(np.arange(1, count) - 0.5, minor=True)
    axis.grid(which="minor", color="#d5d5d5", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("truth", fontsize=9)
    axis.set_title(title, fontsize=10)
    width, height = figure.get_size_inches()
    bar = figure.add_axes(
        ((width - right + 0.15) / width, (bottom + 0.1 * size) / height, 0.1 / width, 0.8 * size / height)
    )
    figure.colorbar(image, cax=bar).set_label("share of the true class", fontsize=9)
    save(figure, path)


def _write_field(axis: Axes, row: int, column: int, share: Any, pixels: int) -> None:
    if not pixels:  # most of a large matrix: what is left stands out
        axis.text(column, row, "0", ha="center", va="center", color="#a0a0a0", fontsize=7)
        return
    color = "white" if share is not np.ma.masked and share > 0.5 else "black"
    if share is not np.ma.masked:
        axis.text(column, row - 0.16, f"{share:.2f}", ha="center", va="center", color=color, fontsize=9)
    axis.text(column, row + 0.22, short_count(pixels), ha="center", va="center", color=color, fontsize=7)


def short_count(pixels: int) -> str:
    """Return a count with four digits at most: 9999, 12.3k, 4.56M."""
    if pixels < 10_000:
        return str(pixels)
    thousands = min(int(math.log10(pixels * 1.0005) // 3), 4)  # 999,600 is 1M when three digits are left of it
    return f"{pixels / 1000**thousands:.3g}{' kMGT'[thousands]}"
