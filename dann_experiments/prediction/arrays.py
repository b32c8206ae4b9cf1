"""Maps arrays of raw pixel values, without files: what a served model does.

Letters: N images, B bands, K classes, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.config.errors import InputError
from dann_experiments.data.nodata import default_nodata_bands, hides
from dann_experiments.data.rasters import Window
from dann_experiments.names import Tta
from dann_experiments.prediction.tiling import Piece, Tiler, grid_stride, plan_tiles

TILE_SIZE, OVERLAP, BATCH_SIZE = 512, 128, 4


def map_arrays(
    model: Model, images: np.ndarray, tile_size: int = TILE_SIZE, nodata: Sequence[float] = (), probabilities: bool = False,
    tta: Tta = "none",
) -> np.ndarray:  # fmt: skip
    """Return the class map of each image, or the probabilities of its classes.

    `images`: (N, B, h, w), the values as an image file stores them, in the model's order of bands and of any size; larger
    ones are cut into overlapping tiles of `tile_size` pixels and blended without seams. If the model works on pixels of a fixed
    size on the ground (`pixel_size`), the images must have it. A pixel lacks data if a band is NaN or infinite, or holds a
    nodata value: one of `nodata` or of the model's own (`data.DOMAIN.nodata_values`); whether one band suffices depends on the
    type of the values, as for files. `tta`: map the mean of the predictions for mirrored and turned copies (`models.symmetries`).

    Returns class ids (N, h, w) uint8, 255 where there is no data; or with `probabilities` (N, K, h, w) float32, which are 0 for
    all classes where there is no data. Raises InputError for arrays of another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != model.in_channels or 0 in images.shape[2:]:
        raise InputError(
            f"the images have shape {tuple(images.shape)}; the model takes (N, {model.in_channels}, height, width), bands first."
        )
    if images.dtype.kind not in "uif":
        raise InputError(f"the images hold {images.dtype} values; give whole or floating-point numbers.")
    if tile_size < 1:
        raise InputError(f"tile_size is {tile_size}; give a number of pixels, at least 1.")
    maps = [_mapped(model, image, tile_size, nodata, probabilities, tta) for image in images]
    if maps:
        return np.stack(maps)
    height, width = images.shape[2:]
    if probabilities:
        return np.zeros((0, len(model.class_names), height, width), np.float32)
    return np.zeros((0, height, width), np.uint8)


def _mapped(
    model: Model, image: np.ndarray, tile_size: int, nodata: Sequence[float], probabilities: bool, tta: Tta
) -> np.ndarray:
    """Return the map (h, w) or the probabilities (K, h, w) of one image (B, h, w)."""
    height, width = image.shape[1:]
    valid = _with_data(model, image, nodata)
    shared = min(OVERLAP, tile_size // 2)
    plan = plan_tiles(height, width, tile_size, shared, grid_stride(model.network))
    device = next(model.network.parameters()).device
    count = len(model.class_names)
    tiler = Tiler(model.network, plan, count, BATCH_SIZE, device, probabilities, rounded=False, tta=tta)

    def read(window: Window) -> tuple[torch.Tensor, np.ndarray | None]:
        box = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        inside = None if valid is None else valid[box]
        return torch.from_numpy(model.normalisation(image[:, *box], inside)), inside

    ids = np.zeros((height, width), np.uint8)
    result = np.zeros((len(model.class_names), height, width), np.float32) if probabilities else ids
    for row in range(len(plan.rows.starts)):
        for piece in tiler.row(row, read):
            _put(piece, ids, result if probabilities else None)
    if probabilities and valid is not None:
        result[:, ~valid] = 0.0
    return result


def _put(piece: Piece, ids: np.ndarray, probabilities: np.ndarray | None) -> None:
    window = piece.window
    box = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
    ids[box] = piece.ids
    if probabilities is not None:
        probabilities[:, *box] = piece.probabilities


def _with_data(model: Model, image: np.ndarray, nodata: Sequence[float]) -> np.ndarray | None:
    """Return (h, w) bool, False where the image (B, h, w) lacks data; None = it has data everywhere."""
    valid = np.ones(image.shape[1:], bool)
    if image.dtype.kind == "f":
        valid &= np.isfinite(image).all(0)
    own = () if model.reading.nodata == "file" else model.reading.nodata
    values = [value for value in (*own, *nodata) if value == value]
    if values:
        way = model.reading.nodata_bands or default_nodata_bands(str(image.dtype))
        valid &= ~hides(image, [values] * len(image), way)
    return None if valid.all() else valid
