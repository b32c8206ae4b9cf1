"""Divides images into windows, in a grid that covers them or at random places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dann_experiments.data.rasters import Window

LARGE = 2048 * 2048  # pixels above which an image is split by default
LARGE_WINDOW = 1024


@dataclass(frozen=True)
class Piece:
    """An item of a set: a window of one of its images."""

    sample: int
    window: Window
    counted_rows: int = 0
    """Rows at the top that overlap the window above and are counted there."""
    counted_columns: int = 0
    """Columns at the left that overlap the window to the left and are counted there."""


def default_size(height: int, width: int, window_size: int | None, crop_size: int | None) -> int | None:
    """Return the side of an image's windows in pixels; None = one window for the whole image."""
    if window_size is not None:
        return window_size
    return max(LARGE_WINDOW, crop_size or 0) if height * width > LARGE else None


def grid(sample: int, area: Window, size: int | None) -> list[Piece]:
    """Return windows of `size` x `size` pixels, or smaller if the area is, that cover `area` side by side.

    The last window of a row or column is shifted back into the area, where it overlaps the one before.
    """
    if size is None:
        return [Piece(sample, area)]
    return [
        Piece(sample, Window(area.top + top, area.left + left, min(size, area.height), min(size, area.width)), up, before)
        for top, up in _starts(area.height, size)
        for left, before in _starts(area.width, size)
    ]  # fmt: skip


def at_random(areas: Sequence[tuple[int, Window, int | None]], count: int | None, seed: int) -> list[Piece]:
    """Return `count` windows at random places in `areas`, each (sample, area, window size); None = as many as the grids have.

    An area is drawn in proportion to the number of windows in its grid. An area without a window size is taken whole.
    """
    rng = np.random.default_rng(seed)
    grids = [len(grid(sample, area, size)) for sample, area, size in areas]
    chosen = rng.choice(len(areas), count or sum(grids), p=np.array(grids) / sum(grids))
    pieces = []
    for index in np.sort(chosen):
        sample, area, size = areas[index]
        height, width = min(size or area.height, area.height), min(size or area.width, area.width)
        top, left = rng.integers(area.height - height + 1), rng.integers(area.width - width + 1)
        pieces.append(Piece(sample, Window(area.top + int(top), area.left + int(left), height, width)))
    return pieces


def _starts(length: int, size: int) -> list[tuple[int, int]]:
    """Return (start, pixels shared with the previous window) of each window along one side."""
    if length <= size:
        return [(0, 0)]
    starts = [(start, 0) for start in range(0, length - size + 1, size)]
    end = starts[-1][0] + size
    return starts if end == length else [*starts, (length - size, end - (length - size))]
