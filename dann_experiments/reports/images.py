"""Pictures: converts images of any sensor for display, and encodes them for a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

TILE_SIZE = 224
"""Longest side of a tile in pixels: a page of 12 tiles and 6 arms stays under 3 MB."""
SMALL = 96
"""Tiles up to this size are shown pixel by pixel; larger ones are smoothed by the browser."""


def display_image(image: np.ndarray, stretch: bool = False) -> np.ndarray:
    """Return (H, W, 3) in 0..1 for an image (B, H, W) in 0..1: the first three bands; only the first if there are fewer.

    `stretch`: map the 2nd to 98th percentile to 0..1, for sensors that use a small part of their range.
    """
    bands = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    pixels = bands.transpose(1, 2, 0).astype(np.float32)
    if not stretch:
        return pixels
    low, high = np.percentile(pixels, (2, 98))
    return np.clip((pixels - low) / max(float(high - low), 1e-6), 0, 1)


def data_uri(pixels: np.ndarray, photo: bool = False) -> str:
    """Return pixels (H, W, 3) or (H, W, 4) uint8 as a `data:` URL, scaled down to at most TILE_SIZE per side.

    The format is PNG, which is lossless; a `photo` larger than SMALL becomes a JPEG.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    factor = TILE_SIZE / max(image.size)
    if factor < 1:
        size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
        image = image.resize(size, Image.Resampling.LANCZOS if photo else Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    if photo and max(image.size) > SMALL:
        image.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    else:  # few colors: a palette makes a third of the bytes
        (image if image.mode == "RGBA" else image.quantize(256)).save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def faded(truth: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """Return (H, W, 4) uint8: white over correct and unlabeled pixels, transparent over errors."""
    known = (truth >= 0) & (truth < count)
    veil = np.full((*predicted.shape, 4), 255, np.uint8)
    veil[..., 3] = np.where((predicted == truth) | ~known, 215, 0)
    return veil


def tile_iou(truth: np.ndarray, predicted: np.ndarray, count: int) -> float:
    """Return the mean IoU over the classes in one tile (H, W), without unlabeled pixels; NaN if all are unlabeled.

    >>> tile_iou(np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 1]]), 2)
    0.5
    """
    known = (truth >= 0) & (truth < count)
    ious = []
    for index in range(count):
        actual, guess = truth[known] == index, predicted[known] == index
        if (either := (actual | guess).sum()) > 0:
            ious.append((actual & guess).sum() / either)
    return float(np.mean(ious)) if ious else float("nan")
