"""Maps beside the images that they were made from."""

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
)


@drawing()
def draw_preview(
    path: Path,
    images: Sequence[tuple[str, np.ndarray]],
    maps: Sequence[tuple[str, np.ndarray]],
    class_names: Sequence[str],
) -> None:
    """Draw one row per map: the image beside it, and a legend of the classes that occur.

    Arguments:
        images: (file name, (H, W, 3) in 0..1) each.
        maps: (file name, (H, W) class ids) each; an id that is no class means "no data" and is black.
    """
    side, count = 6.0, len(class_names)
    shown = sorted({index for _, ids in maps for index in np.unique(ids).tolist() if 0 <= index < count})
    handles = class_handles(class_names, shown[:24])
    columns, legend = legend_shape(handles, 2 * side)
    figure = new_figure(2 * side + 0.2, (side + 0.2) * len(maps) + 0.15 + legend)
    axis = canvas(figure)
    for row, ((image_name, image), (map_name, ids)) in enumerate(zip(images, maps, strict=True)):
        draw_grid(axis, [(image_name, [image]), (map_name, [paint(ids, count)])], 0.1, 0.3 + row * (side + 0.2), side)
    if handles:
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0), ncols=columns)
    save(figure, path)
