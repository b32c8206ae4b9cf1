"""Where the windows of an image lie: side by side over all of it, or at random places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dann_experiments.data.rasters import Window

LARGE = 2048 * 2048  # pixels above which an image is never one window
LARGE_WINDOW = 1024


@dataclass(frozen=True)
class Piece:
    """One item of a set: a window of one of its images."""

    sample: int
    window: Window
    counted_rows: int = 0
    """Rows at its top that belong to the window above as well and were counted there."""
    counted_columns: int = 0
    """The same at its left."""


def default_size(height: int, width: int, window_size: int | None, crop_size: int | None) -> int | None:
    """Side of the windows of an image; None = it is one window."""
    if window_size is not None:
        return window_size
    return max(LARGE_WINDOW, crop_size or 0) if height * width > LARGE else None


def grid(sample: int, area: Window, size: int | None) -> list[Piece]:
    """Windows of `size` x `size` that cover `area`, side by side; the last of a row or column is moved back into the area,
    where it overlaps the one before. Smaller where the area is."""
    if size is None:
        return [Piece(sample, area)]
    return [
        Piece(sample, Window(area.top + top, area.left + left, min(size, area.height), min(size, area.width)), up, before)
        for top, up in _starts(area.height, size)
        for left, before in _starts(area.width, size)
    ]  # fmt: skip


def at_random(areas: Sequence[tuple[int, Window, int | None]], count: int | None, seed: int) -> list[Piece]:
    """`count` windows at random places of `areas` (sample, area, window size), an area as often as its grid is large.

    None = as many as the grids have. An area that is one window is taken whole.
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
    """(start, pixels shared with the window before) of windows along one side."""
    if length <= size:
        return [(0, 0)]
    starts = [(start, 0) for start in range(0, length - size + 1, size)]
    end = starts[-1][0] + size
    return starts if end == length else [*starts, (length - size, end - (length - size))]
