"""Finds the pixels that hold nodata values, by the file's data type and bands.

Letters: B bands, h x w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

NodataBands = Literal["any", "all"]


def holds(values: np.ndarray, value: float) -> np.ndarray:
    """Return a bool array in the shape of `values`, True where pixels hold the nodata `value`.

    Compare as GDAL's ARE_REAL_EQUAL does, in the pixels' own type: floating-point numbers may differ by a few units in the last
    place, because writers shorten the tag's decimal text. A value that the type cannot hold matches no pixel.
    """
    if values.dtype.kind == "f":
        if math.isnan(value):
            return np.isnan(values)
        if math.isinf(value):
            return values == value
        limits = np.finfo(values.dtype)
        slack = 4 * float(limits.eps) * abs(value)
        low, high = (np.clip(side, float(limits.min), float(limits.max)) for side in (value - slack, value + slack))
        return (values >= values.dtype.type(low)) & (values <= values.dtype.type(high))
    if not fits(value, values.dtype):
        return np.zeros(values.shape, bool)
    return values == values.dtype.type(int(value))


def fits(value: float, dtype: np.dtype | str) -> bool:
    """Return True if a pixel of this type can hold the value."""
    dtype = np.dtype(dtype)
    if dtype.kind not in "iu":
        return True
    return math.isfinite(value) and value == int(value) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def default_nodata_bands(dtype: str) -> NodataBands:
    """Return the default of `nodata_bands` for files of this type.

    In 8-bit images, 0 or 255 in one band is an ordinary color (pure red has a green value of 0), so a pixel lacks data only if
    all bands hold the value. In other types, one band with nodata is enough: the network would take its fill value for a
    measurement. docs/data.md compares other tools.
    """
    return "all" if dtype in ("uint8", "int8") else "any"


def hides(values: np.ndarray, nodata: Sequence[Sequence[float]], way: NodataBands) -> np.ndarray:
    """Return (h, w) bool, True where any or all (`way`) of the bands (B, h, w) hold one of their nodata values."""
    bands = [
        np.logical_or.reduce([holds(band, value) for value in own]) if own else np.zeros(band.shape, bool)
        for band, own in zip(values, nodata, strict=True)
    ]
    return np.logical_or.reduce(bands) if way == "any" else np.logical_and.reduce(bands)


def pixels_behind(start: float, length: float, count: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the range (first, end) of file pixels behind each of `count` working pixels along one side, widened by one pixel.

    `start`, `length`: the file pixels that `count` working pixels cover; `low`, `high`: limits (first, end) of the ranges.
    """
    edges = start + np.arange(count + 1) * (length / count)
    begin, end = np.floor(edges[:-1]).astype(int) - 1, np.ceil(edges[1:]).astype(int) + 1
    return np.clip(begin, low, high), np.clip(end, low, high)


def all_valid_behind(
    valid: np.ndarray, rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return (h, w) bool for the working grid, True where every file pixel behind is valid.

    `valid`: (H, W) for file pixels; `rows` (h each) and `columns` (w each): ranges from `pixels_behind`, relative to `valid`.
    """
    kind = np.int32 if valid.size < 2**31 else np.int64
    missing = np.zeros((valid.shape[0] + 1, valid.shape[1] + 1), kind)
    missing[1:, 1:] = (~valid).cumsum(0, dtype=kind).cumsum(1, dtype=kind)
    (top, bottom), (left, right) = rows, columns
    count = (
        missing[np.ix_(bottom, right)]
        - missing[np.ix_(top, right)]
        - missing[np.ix_(bottom, left)]
        + missing[np.ix_(top, left)]
    )
    return count == 0
