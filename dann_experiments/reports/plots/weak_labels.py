"""Draws what a rule makes of images: the index with its threshold, the mask beside it, and the histogram of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.patches import Patch

from dann_experiments.reports.colors import GRAY, IGNORED_COLOR, MUTED, RED, YELLOW, paint
from dann_experiments.reports.plots.style import (
    canvas,
    class_handles,
    draw_grid,
    drawing,
    legend_above,
    legend_shape,
    new_figure,
    save,
    tallest,
)

IGNORED = "ignored or no data"
MOST_LINES = 200  # thresholds drawn


@dataclass(frozen=True)
class Labeled:
    """One image with its index and its mask, for a picture."""

    name: str
    image: np.ndarray
    """(H, W, 3) in 0..1."""
    index: np.ndarray
    """(h, w), NaN = no value."""
    ids: np.ndarray
    """(h, w) class ids; an id that is no class means "ignored"."""
    threshold: float


@drawing()
def draw_masks(path: Path, shown: Sequence[Labeled], label: str, class_names: Sequence[str]) -> None:
    """Draw one row per image: the image, the index (white at the threshold, green above, brown below, black without a value), and
    the mask, with a legend of the classes that occur. `label`: what the index is."""
    side, count = 4.2, len(class_names)
    found = sorted({index for one in shown for index in np.unique(one.ids).tolist() if index < count})
    handles = [*class_handles(class_names, found[:24]), Patch(facecolor=IGNORED_COLOR, label=IGNORED)]
    columns, legend = legend_shape(handles, 3 * side)
    heights = [side * tallest([one.image]) + 0.25 for one in shown]
    figure, top = new_figure(3 * side + 0.2, sum(heights) + 0.2 + legend), 0.3
    axis = canvas(figure)
    for one, height in zip(shown, heights, strict=True):
        titles = (one.name, f"{label}; white = {one.threshold:.4g}, the threshold", "mask")
        pictures = (one.image, around_threshold(one.index, one.threshold), paint(one.ids, count))
        draw_grid(axis, [(title, [part]) for title, part in zip(titles, pictures, strict=True)], 0.1, top, side)
        top += height
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0), ncols=columns)
    save(figure, path)


def around_threshold(values: np.ndarray, threshold: float) -> np.ndarray:
    """Return (h, w, 3) in 0..1: white at the threshold, darker green above and darker brown below, up to the 2nd and the 98th
    percentile of the values (h, w); NaN is black."""
    known = values[~np.isnan(values)]
    low, high = np.percentile(known, (2, 98)) if known.size else (threshold, threshold)
    down, up = max(threshold - float(low), 1e-12), max(float(high) - threshold, 1e-12)
    distance = values.astype(np.float64) - threshold
    place = 0.5 + 0.5 * np.clip(np.where(distance < 0, distance / down, distance / up), -1, 1)
    colors = np.array(matplotlib.colormaps["BrBG"](np.nan_to_num(place))[..., :3])
    colors[np.isnan(values)] = 0.0
    return colors


@drawing()
def draw_index_histogram(
    path: Path, edges: np.ndarray, counts: np.ndarray, thresholds: Sequence[float], margin: float, label: str,
    sides: tuple[str, str], title: str,
) -> None:  # fmt: skip
    """Draw the histogram of the index over all images, with the threshold of each (equal ones once) and the ignored margin.

    `edges`: (n + 1,), `counts`: (n,); `label`: what the index is; `sides`: names of the classes below and above the threshold.
    """
    figure = new_figure(7, 3.8, (0.7, 0.2, 0.8, 0.5))
    axis = figure.subplots()
    axis.stairs(100 * counts / max(int(counts.sum()), 1), edges, fill=True, color=GRAY)
    lines = sorted(set(thresholds))[:MOST_LINES]
    for number, threshold in enumerate(lines):
        if margin:
            axis.axvspan(
                threshold - margin, threshold + margin, color=YELLOW, alpha=0.35, linewidth=0,
                label="ignored margin" if not number else None,
            )  # fmt: skip
        several = f"{len(lines)} thresholds, {lines[0]:.4g} to {lines[-1]:.4g}"
        name = several if len(lines) > 1 else f"threshold {threshold:.4g}: {sides[0]} up to it, {sides[1]} above"
        axis.axvline(
            threshold, color=RED, linewidth=1.4 if len(lines) == 1 else 0.6, label=name if not number else None
        )
    axis.set_xlabel(label)
    axis.set_ylabel("% of the pixels with a value", color=MUTED)
    axis.grid(alpha=0.6)
    legend_above(axis)
    figure.text(0.7 / 7, 1 - 0.3 / 3.8, title, fontsize=11)
    save(figure, path)
