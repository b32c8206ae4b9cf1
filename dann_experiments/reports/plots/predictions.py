"""Draws images of one set next to their ground truth and the predictions of one or more networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
def draw_predictions(
    path: Path,
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    class_names: Sequence[str],
    title: str,
) -> None:
    """Draw one row per image: the image, its ground truth, one column per prediction.

    Arguments:
        images: (H, W, 3) in 0..1.
        truth: (H, W) class ids, or empty; ids that are no class are black, "not labeled" in the legend.
        predictions: title -> (H, W) class ids, one per image.
    """
    count, side = len(class_names), 1.5
    maps = {"truth": truth, **predictions} if len(truth) else predictions
    columns = [("image", images), *((name, [paint(ids, count) for ids in found]) for name, found in maps.items())]
    holes = any(((ids < 0) | (ids >= count)).any() for found in maps.values() for ids in found)
    handles = class_handles(class_names, not_labeled=holes)
    width = side * len(columns) + 0.3
    legend_columns, legend_height = legend_shape(handles, width - 0.3)
    row_height = side * tallest(images)
    figure = new_figure(width, row_height * len(images) + 0.7 + legend_height)
    axis = canvas(figure)
    axis.text(0.17, 0.08, title, fontsize=11, va="top")
    draw_grid(axis, columns, 0.17, 0.58, side, row_height=row_height)
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.01, 0), ncols=legend_columns)
    save(figure, path)
