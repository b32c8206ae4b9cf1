"""Draws class maps next to the images that they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


@drawing()
def draw_preview(
    path: Path,
    images: Sequence[tuple[str, np.ndarray]],
    maps: Sequence[tuple[str, np.ndarray]],
    class_names: Sequence[str],
) -> None:
    """Draw one row per map, with its image on the left, and a legend of the classes that occur.

    Arguments:
        images: (file name, image (H, W, 3) in 0..1), one per map.
        maps: (file name, class ids (H, W)); an id that is no class means "no data" and is black.
    """
    side, count = 6.0, len(class_names)
    shown = sorted({index for _, ids in maps for index in np.unique(ids).tolist() if 0 <= index < count})
    handles = class_handles(class_names, shown[:24])
    columns, legend = legend_shape(handles, 2 * side)
    heights = [side * tallest([image]) + 0.2 for _, image in images]
    figure, top = new_figure(2 * side + 0.2, sum(heights) + 0.15 + legend), 0.3
    axis = canvas(figure)
    for (image_name, image), (map_name, ids), height in zip(images, maps, heights, strict=True):
        draw_grid(axis, [(image_name, [image]), (map_name, [paint(ids, count)])], 0.1, top, side)
        top += height
    if handles:
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0), ncols=columns)
    save(figure, path)
