"""Reads windows of images and masks, so that large rasters never need to fit into memory.

Letters: B bands, h x w pixels of a window of the working grid (see `reading`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.nodata import all_valid_behind, default_nodata_bands, hides, pixels_behind
from dann_experiments.data.rasters import Header, Window, header_of, open_raster
from dann_experiments.data.reading import Reading, chosen_bands

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

BLOCK_BYTES = 64 * 2**20  # full-size pixels held in memory at a time while downsampling


class Pixels(NamedTuple):
    """The pixels of a window."""

    values: np.ndarray
    """(B, h, w) as stored."""
    valid: np.ndarray | None
    """(h, w) bool, True where there is data; None = everywhere."""


def read_pixels(
    path: Path, in_channels: int, reading: Reading, window: Window | None = None, header: Header | None = None
) -> Pixels:
    """Read a window of the working grid (None = all of it); `header` saves reading it again.

    If three bands are needed and `reading` chooses none, a gray band is repeated and palette indices become colors. Raises
    InputError for an unreadable file, missing bands, or a number of bands other than `in_channels`.
    """
    with open_raster(path) as file:
        header = header or header_of(file)
        chosen = chosen_bands(path, header, reading, in_channels)
        height, width = reading.grid_size(header, path)
        window = window or Window(0, 0, height, width)
        factor = reading.factor(header, path)
        values = _read(file, chosen, window, factor, header, smooth=True)
        valid = _valid(file, header, chosen, reading, window, factor, values)
        if header.palette and in_channels == 3 and reading.bands is None:
            values = colors_of(values[0], file.colormap(1))
        elif len(chosen) == 1 and in_channels == 3 and reading.bands is None:
            values = values.repeat(3, axis=0)
    return Pixels(np.ascontiguousarray(values), valid)


class StoredLabels(NamedTuple):
    """The contents of a mask file."""

    values: np.ndarray
    """(bands, h, w) as stored."""
    palette: dict[int, Any] | None
    """Color table: index -> color; None = no palette."""
    hidden: np.ndarray | None
    """(h, w) bool, True where the file marks pixels as unlabeled (nodata value, mask or alpha band, NaN); None = nowhere."""
    transparent: bool
    """True if the file is a PNG, GIF or WebP, whose transparency may be merely decorative."""


def read_labels(path: Path, window: Window | None = None, factor: float = 1.0) -> StoredLabels:
    """Read a window of a mask (None = all of it) by nearest-neighbor sampling.

    `factor`: file pixels per pixel of the working grid, along one side. Raises InputError for a file that is not a mask.
    """
    with open_raster(path) as file:
        header = header_of(file)
        if header.bands > 4:
            raise InputError(f"mask {path} has {header.bands} bands; masks hold one class id per pixel, or a color.")
        whole = Window(0, 0, max(round(header.height / factor), 1), max(round(header.width / factor), 1))
        window = window or whole
        bands = header.data_bands
        values = _read(file, bands, window, factor, header, smooth=False)
        return StoredLabels(
            values, file.colormap(1) if header.palette else None, _hidden(file, header, values, window, factor),
            file.driver in ("PNG", "GIF", "WEBP"),
        )  # fmt: skip


def _hidden(
    file: DatasetReader, header: Header, values: np.ndarray, window: Window, factor: float
) -> np.ndarray | None:
    """Return (h, w) bool, True where the file marks pixels as unlabeled; None = nowhere."""
    hidden = np.zeros(values.shape[1:], bool)
    if values.dtype.kind == "f":
        hidden |= np.isnan(values).all(0)  # an infinite id is an error, not a missing label
    own = [[] if value is None else [value] for value in (header.nodata[band - 1] for band in header.data_bands)]
    if any(own):
        hidden |= hides(values, own, "all")
    if header.masked:
        hidden |= _masked(file, header, window, factor)
    return hidden if hidden.any() else None


def colors_of(indices: np.ndarray, palette: Mapping[int, Sequence[int]]) -> np.ndarray:
    """Return (3, h, w) uint8 colors of palette indices (h, w), 8 or 16 bit; indices not in the palette become black."""
    table = np.zeros((max(256, *palette, int(indices.max(initial=0)) + 1) + 1, 3), np.uint8)
    for index, color in palette.items():
        table[index] = color[:3]
    return table[indices].transpose(2, 0, 1)


def _read(
    file: DatasetReader, bands: Sequence[int], window: Window, factor: float, header: Header, smooth: bool
) -> np.ndarray:
    """Return the values (bands, h, w) of a window of the working grid; `smooth`: resample by averages or bilinearly."""
    from rasterio.enums import Resampling

    bands = list(bands)
    if factor == 1.0:
        return _stored(file, bands, window, header)
    way = Resampling.nearest
    if smooth and not header.palette:
        way = Resampling.average if factor > 1 else Resampling.bilinear
    shape = (window.height, window.width)
    box = header.turn.stored(span_of(window, factor, header), header.height, header.width)
    # Overviews (and wavelets of JPEG 2000) need not be averages of the file's pixels, and those of a mask can contain ids that
    # the mask does not. A VRT may use its sources' overviews even if it reports none.
    own_sizes = factor > 1 and (file.driver == "VRT" or bool(file.overviews(bands[0])))
    # GDAL leaves masked pixels out of averages, but `nodata` and `nodata_bands` may count them as data.
    hiding = way != Resampling.nearest and (header.masked or any(value is not None for value in header.nodata))
    if own_sizes or hiding:
        values = _reduced(file, bands, header, box, header.turn.size(*shape), way)
    else:
        values = file.read(
            bands, window=_box(*box), out_shape=(len(bands), *header.turn.size(*shape)), resampling=way
        )  # fmt: skip
    return header.turn.shown(values)


def span_of(window: Window, factor: float, header: Header) -> tuple[float, float, float, float]:
    """Return (top, left, height, width) of a window in file pixels; the working grid's last row and column end with the file."""
    top, left = window.top * factor, window.left * factor
    return (
        top, left, min(window.height * factor, header.height - top), min(window.width * factor, header.width - left)
    )  # fmt: skip


def _stored(file: DatasetReader, bands: list[int], window: Window, header: Header) -> np.ndarray:
    """Return the file's own pixels (bands, h, w) of a shown window, in shown orientation."""
    if window == (0, 0, header.height, header.width):  # reading without a window is faster in rasterio
        return header.turn.shown(file.read(bands))
    return header.turn.shown(file.read(bands, window=_box(*header.turn.stored(window, header.height, header.width))))


def _masked(file: DatasetReader, header: Header, window: Window, factor: float) -> np.ndarray:
    """Return (h, w) bool for the working grid (nearest pixel), True where the alpha band is 0 or an internal mask hides pixels.

    The alpha band is read directly, since GDAL ignores it in files that also have a nodata value.
    """
    if factor != 1.0:
        box = span_of(window, factor, header)
        rows, columns = (
            np.minimum((box[side] + (np.arange(count) + 0.5) * box[side + 2] / count).astype(int), size - 1)
            for side, count, size in ((0, window.height, header.height), (1, window.width, header.width))
        )
        top, left = int(rows[0]), int(columns[0])
        around = Window(top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1)
        return _masked(file, header, around, 1.0)[np.ix_(rows - top, columns - left)]
    if header.alpha:
        return _stored(file, [header.alpha], window, header)[0] == 0
    box = header.turn.stored(window, header.height, header.width)
    return header.turn.shown(file.read_masks(1, window=_box(*box))) == 0


def _reduced(
    file: DatasetReader, bands: list[int], header: Header, box: tuple[float, float, float, float],
    shape: tuple[int, int], way: Any,
) -> np.ndarray:  # fmt: skip
    """Return a stored box (top, left, height, width) resampled to (bands, *shape) from full-size pixels, some rows at a time."""
    from rasterio.io import MemoryFile

    top, left, height, width = box
    step = height / shape[0]
    margin = 0 if step >= 1 else 2  # more pixels around, for interpolation
    first_column = max(int(left) - margin, 0)
    last_column = min(int(np.ceil(left + width - 1e-9)) + margin, file.width)
    line = len(bands) * np.dtype(header.dtype).itemsize * (last_column - first_column) * step
    rows_at_a_time = max(int(BLOCK_BYTES / line), 1)
    parts = []
    for row in range(0, shape[0], rows_at_a_time):
        rows = min(rows_at_a_time, shape[0] - row)
        begin, end = top + row * step, top + (row + rows) * step
        first, last = max(int(begin) - margin, 0), min(int(np.ceil(end - 1e-9)) + margin, file.height)
        pixels = file.read(bands, window=_box(first, first_column, last - first, last_column - first_column))
        profile = {
            "driver": "GTiff", "count": len(bands), "height": pixels.shape[1], "width": pixels.shape[2],
            "dtype": pixels.dtype, "photometric": "MINISBLACK", "BIGTIFF": "IF_SAFER",
        }  # fmt: skip
        with MemoryFile() as memory:
            with memory.open(**profile) as copy:
                copy.write(pixels)
            with memory.open() as copy:
                inside = (begin - first, left - first_column, min(end, last) - begin, min(width, last_column - left))
                parts.append(copy.read(window=_box(*inside), out_shape=(len(bands), rows, shape[1]), resampling=way))
    return np.concatenate(parts, axis=1)


def _box(top: float, left: float, height: float, width: float) -> Any:
    from rasterio.windows import Window as FileWindow

    return FileWindow(left, top, width, height)  # pyright: ignore[reportCallIssue]


def _valid(
    file: DatasetReader, header: Header, bands: Sequence[int], reading: Reading, window: Window, factor: float,
    values: np.ndarray,
) -> np.ndarray | None:  # fmt: skip
    """Return (h, w) bool, False where a pixel lacks data; None = all hold data.

    A pixel lacks data if a band is NaN or infinite, if any or all bands hold nodata values (`nodata_bands`), or if the file's
    mask or alpha band hides it.
    """
    if not reading.may_lack_data(header):
        return None
    if factor == 1.0:
        valid = _holds_data(file, header, bands, reading, window, values)
        return None if valid.all() else valid
    # A resampled pixel is valid only if all file pixels behind it are. Read some rows at a time, as there may be many file
    # pixels per working pixel.
    top, left = max(int(window.top * factor) - 1, 0), max(int(window.left * factor) - 1, 0)
    bottom = min(int(np.ceil((window.top + window.height) * factor)) + 1, header.height)
    right = min(int(np.ceil((window.left + window.width) * factor)) + 1, header.width)
    box = span_of(window, factor, header)
    begins, ends = pixels_behind(box[0], box[2], window.height, top, bottom)
    columns = pixels_behind(box[1], box[3], window.width, left, right)
    columns = columns[0] - left, columns[1] - left
    rows_at_a_time = max(int(BLOCK_BYTES / (values.itemsize * len(bands) * (right - left) * factor)), 1)
    parts = []
    for row in range(0, window.height, rows_at_a_time):
        begin, end = begins[row : row + rows_at_a_time], ends[row : row + rows_at_a_time]
        around = Window(int(begin[0]), left, int(end[-1] - begin[0]), right - left)
        own = _holds_data(file, header, bands, reading, around, _stored(file, list(bands), around, header))
        parts.append(all_valid_behind(own, (begin - around.top, end - around.top), columns))
    valid = np.concatenate(parts)
    return None if valid.all() else valid


def _holds_data(
    file: DatasetReader, header: Header, bands: Sequence[int], reading: Reading, window: Window, own: np.ndarray
) -> np.ndarray:
    """Return (h, w) bool, True where a window `own` (bands, h, w) of the file's own pixels holds data."""
    valid = np.ones(own.shape[1:], bool)
    if own.dtype.kind == "f":
        valid &= np.isfinite(own).all(0)
    alpha_is_data = header.alpha in bands
    if header.masked and not alpha_is_data and reading.nodata != ():
        valid &= ~_masked(file, header, window, 1.0)
    nodata = reading.nodata_of(header, bands)
    if any(nodata):
        valid &= ~hides(own, nodata, reading.nodata_bands or default_nodata_bands(header.dtype))
    return valid
