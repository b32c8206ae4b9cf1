"""Which pixels of a file hold data: nodata values, masks inside the file, alpha bands, NaN.

Letters: B bands, h x w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

NodataBands = Literal["any", "all"]


def holds(values: np.ndarray, value: float) -> np.ndarray:
    """Return where pixels hold the nodata `value`; bool, the shape of `values`.

    Compared as GDAL's ARE_REAL_EQUAL does: in the pixels' own type, floating point numbers up to a few units of the last
    place, since a tag is a decimal text that writers cut short. A value that the type cannot hold marks no pixel.
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
    """Return whether a pixel of this type can hold the value."""
    dtype = np.dtype(dtype)
    if dtype.kind not in "iu":
        return True
    return math.isfinite(value) and value == int(value) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def default_nodata_bands(dtype: str) -> NodataBands:
    """Return what `nodata_bands` unset means for files of this type.

    In 8 bit pictures 0 or 255 in one band is a color like any other (the green of pure red is 0), so only a pixel with the
    value in all bands lacks data. In all other types a nodata value is no measurement, and a pixel one of whose bands lacks
    data cannot be shown to a network: the fill value would be taken for a number. docs/data.md compares other tools.
    """
    return "all" if dtype in ("uint8", "int8") else "any"


def hides(values: np.ndarray, nodata: Sequence[Sequence[float]], way: NodataBands) -> np.ndarray:
    """Return (h, w) bool, True where the bands (B, h, w) hold their nodata values (some for each band, or none)."""
    bands = [
        np.logical_or.reduce([holds(band, value) for value in own]) if own else np.zeros(band.shape, bool)
        for band, own in zip(values, nodata, strict=True)
    ]
    return np.logical_or.reduce(bands) if way == "any" else np.logical_and.reduce(bands)


def pixels_behind(start: float, length: float, count: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and end file pixel behind each of `count` working pixels along one side, with one neighbor on each side.

    `start`, `length`: the file pixels that become the `count`; `low`, `high`: first and end file pixel that may be looked at.
    """
    edges = start + np.arange(count + 1) * (length / count)
    begin, end = np.floor(edges[:-1]).astype(int) - 1, np.ceil(edges[1:]).astype(int) + 1
    return np.clip(begin, low, high), np.clip(end, low, high)


def all_valid_behind(
    valid: np.ndarray, rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return (h, w) bool of the working grid: True where every file pixel behind it is valid.

    `valid`: (H, W) of file pixels; `rows` (h each) and `columns` (w each): first and end within it, as `pixels_behind`.
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
