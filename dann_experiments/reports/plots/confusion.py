"""Draws a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from dann_experiments.reports.plots.style import drawing, new_figure, save, text_width


@drawing({"axes.spines.top": True, "axes.spines.right": True})
def draw_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix (K, K) of pixel counts, rows = truth.

    Each cell shows its share of the true class, which also sets its color, above its count. The row of a class without ground
    truth is gray and shows only counts.
    """
    totals = confusion.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(totals == 0, confusion.shape), confusion / np.maximum(totals, 1))
    known = shares.filled(0)
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name in class_names]
    count, room = len(names), text_width(names, 8)
    size = max(0.66 * count, 1.7)
    left, right, top, bottom = room + 0.45, 0.95, 0.35, 0.7 * room + 0.5
    figure = new_figure(left + size + right, top + size + bottom, (left, right, top, bottom))
    axis = figure.subplots()
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#e4e4e4")
    image = axis.pcolormesh(shares, cmap=colors, vmin=0, vmax=1, edgecolors="#d5d5d5", linewidth=0.6)
    axis.invert_yaxis()
    for (row, column), pixels in np.ndenumerate(confusion):
        text, share = short_count(int(pixels)), known[row, column]
        color = (
            "white" if share > 0.5 else "black" if pixels else "#a0a0a0"
        )  # 0 is faint, so that other counts are easy to see
        text = f"{share:.2f}\n{text}" if share else text
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color)
    places = np.arange(count) + 0.5
    axis.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("truth", fontsize=9)
    axis.set_title(title, fontsize=10)
    width, height = figure.get_size_inches()
    bar = (width - right + 0.15) / width, (bottom + 0.1 * size) / height, 0.1 / width, 0.8 * size / height
    figure.colorbar(image, cax=figure.add_axes(bar)).set_label("share of the true class", fontsize=9)
    save(figure, path)


def short_count(pixels: int) -> str:
    """Return a count with at most four digits: 9999, 12.3k, 4.56M."""
    if pixels < 10_000:
        return str(pixels)
    thousands = min(int(math.log10(pixels * 1.0005) // 3), 4)  # 999,600 rounded to three digits is 1M
    return f"{pixels / 1000**thousands:.3g}{' kMGT'[thousands]}"
