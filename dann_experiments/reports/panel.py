"""Draws a small panel of images with their masks and predictions: one picture of a series over training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dann_experiments.reports.colors import INK, PAPER, paint

WIDTH = 768  # pixels, at most
LARGEST_TILE = 192
GAP, HEADING = 4, 16  # pixels


@dataclass(frozen=True)
class Part:
    """Images of one domain, one row each."""

    title: str
    images: Sequence[np.ndarray]
    """(H, W, 3) in 0..1."""
    truth: Sequence[np.ndarray]
    """(H, W) class ids, one per image; empty without masks."""
    predictions: Sequence[np.ndarray]
    """(H, W) class ids, one per image."""


def draw_panel(parts: Sequence[Part], classes: int) -> Image.Image:
    """Return the parts side by side, at most WIDTH pixels wide: for each one column of images, one of masks if there are any, and
    one of predictions. Ids outside of 0 to `classes` - 1 are black.

    The picture has a palette of 256 colors, so that it takes a few tens of kilobytes."""
    columns: list[tuple[str, Sequence[np.ndarray]]] = []
    for part in parts:
        columns.append((f"{part.title} image", part.images))
        if len(part.truth):
            columns.append((f"{part.title} mask", part.truth))
        columns.append((f"{part.title} prediction", part.predictions))
    tile = min(LARGEST_TILE, (WIDTH - GAP) // len(columns) - GAP)
    rows = max(len(tiles) for _, tiles in columns)
    size = (GAP + len(columns) * (tile + GAP), HEADING + rows * (tile + GAP))
    panel = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(10)
    for column, (heading, tiles) in enumerate(columns):
        left = GAP + column * (tile + GAP)
        pen.text((left, 1), heading, fill=INK, font=font)
        for row, pixels in enumerate(tiles):
            image = _photo(pixels, tile) if pixels.ndim == 3 else _map(pixels, tile, classes)
            panel.paste(image, (left, HEADING + row * (tile + GAP)))
    return panel.quantize(256, dither=Image.Dither.NONE)


def _photo(pixels: np.ndarray, side: int) -> Image.Image:
    """Return (H, W, 3) in 0..1 as an image that fits into a square."""
    image = Image.fromarray(np.uint8(255 * np.clip(np.nan_to_num(pixels), 0, 1) + 0.5))
    size = _fitting(image.height, image.width, side)
    shrinks = size[0] < image.width
    return image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)


def _map(ids: np.ndarray, side: int, classes: int) -> Image.Image:
    """Return class ids (H, W) as an image that fits into a square, in the colors of the classes without mixtures of them."""
    width, height = _fitting(ids.shape[0], ids.shape[1], side)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), ids.shape, strict=True)
    )
    return Image.fromarray(paint(ids[np.ix_(rows, columns)], classes))


def _fitting(height: int, width: int, side: int) -> tuple[int, int]:
    """Return width and height, in the same proportion, of the largest image that fits into a square."""
    factor = side / max(height, width)
    return max(round(width * factor), 1), max(round(height * factor), 1)
