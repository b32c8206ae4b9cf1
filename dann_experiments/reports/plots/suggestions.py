"""Draws the tiles on which the arms of a comparison disagree most, with the map of each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from dann_experiments.reports.colors import paint
from dann_experiments.reports.plots.style import (
    canvas,
    class_handles,
    draw_grid,
    drawing,
    legend_shape,
    new_figure,
    save,
    tallest,
)
from dann_experiments.reports.tables import short


@dataclass(frozen=True)
class Disputed:
    """One tile."""

    name: str
    image: np.ndarray
    """(h, w, 3) in 0..1."""
    disagreement: np.ndarray
    """(h, w) in 0..1, NaN = no data."""
    mean: float
    predictions: Mapping[str, np.ndarray]
    """Arm -> (h, w) class ids; an id that is no class means no data."""


@drawing()
def draw_disputed(path: Path, tiles: Sequence[Disputed], class_names: Sequence[str]) -> None:
    """Draw one row per tile: the image, the disagreement (white = all agree, dark = all classes tie), the maps."""
    side, line = 1.5, 0.26
    width = side * (2 + len(tiles[0].predictions)) + 0.3
    handles = class_handles(class_names, not_labeled=any(np.isnan(one.disagreement).any() for one in tiles))
    columns, legend = legend_shape(handles, width - 0.3)
    heights = [side * tallest([one.image]) + line for one in tiles]
    figure = new_figure(width, sum(heights) + 0.35 + legend)
    axis, top = canvas(figure), 0.35
    for number, (one, height) in enumerate(zip(tiles, heights, strict=True)):
        titles = (
            ["image", "disagreement", *(short(arm, 20) for arm in one.predictions)]
            if not number
            else [""] * width_of(one)
        )
        maps = [paint(ids, len(class_names)) for ids in one.predictions.values()]
        pictures = [one.image, shaded(one.disagreement), *maps]
        draw_grid(
            axis, [(title, [part]) for title, part in zip(titles, pictures, strict=True)], 0.17, top, side, size=8
        )
        axis.text(
            0.17,
            top + height - line + 0.02,
            f"{number + 1}: {one.name}, disagreement {one.mean:.2f}",
            fontsize=7,
            va="top",
        )
        top += height
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.01, 0), ncols=columns)
    save(figure, path)


def width_of(tile: Disputed) -> int:
    """Return the number of pictures in the row of a tile."""
    return 2 + len(tile.predictions)


def shaded(disagreement: np.ndarray) -> np.ndarray:
    """Return (h, w, 3) in 0..1: white where all agree (0), dark red at 1; black without data."""
    colors = np.array(matplotlib.colormaps["Reds"](np.nan_to_num(disagreement))[..., :3])
    colors[np.isnan(disagreement)] = 0.0
    return colors
