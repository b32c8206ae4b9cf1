"""Reads one image or mask file into an array, or says which file is wrong and why."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dann_experiments.config.errors import InputError

Image.MAX_IMAGE_PIXELS = None  # aerial mosaics are larger than Pillow's guard against decompression bombs


def read_image(path: Path, bands: int) -> np.ndarray:
    """(bands, H, W) uint8 or uint16. Raises InputError for an unreadable file or another number of bands."""
    array = _open(path, "RGB" if bands == 3 else "L" if bands == 1 else None)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape[2] == 1 and bands == 3:
        array = array.repeat(3, axis=2)  # a grey picture among colour ones
    if array.shape[2] != bands:
        raise InputError(
            f"image {path} has {array.shape[2]} bands, but model.in_channels is {bands}; set model.in_channels to "
            f"{array.shape[2]}, with as many values in data.mean and data.std, or give images of {bands} bands."
        )
    if array.dtype not in (np.uint8, np.uint16):
        raise InputError(f"image {path} holds {array.dtype} values; 8 and 16 bit unsigned images are read.")
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def read_mask(path: Path, num_classes: int, ignore_index: int) -> np.ndarray:
    """(H, W) uint8 of class ids. Raises InputError naming file and id for an id that is no class and not ignored."""
    array = _open(path, None)
    if array.ndim != 2:
        raise InputError(f"mask {path} has {array.shape[2]} bands; masks hold one class id a pixel.")
    if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):  # NaN is unequal to itself
        raise InputError(f"mask {path} holds values that are no whole numbers; masks hold one class id a pixel.")
    ids = np.unique(array)
    wrong = [int(value) for value in ids if not (0 <= value < num_classes or value == ignore_index)]
    if wrong:
        raise InputError(
            f"mask {path} holds id {wrong[0]}, but classes go from 0 to {num_classes - 1} (model.classes) and "
            f"{ignore_index} is ignored (data.ignore_index)."
        )
    return array.astype(np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header alone."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None


def _open(path: Path, palette_to: str | None) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if palette_to is not None and image.mode in ("P", "1", "LA", "CMYK", "YCbCr"):
                    return np.asarray(image.convert(palette_to))
                array = np.asarray(image)
                array = array.astype(array.dtype.newbyteorder("="), copy=False)
                return (
                    array.astype(np.uint16) if image.mode == "I" and array.min() >= 0 and array.max() < 65536 else array
                )
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
