"""Raster files: reads size and georeference, writes finished class maps and probabilities.

Letters: K classes, h x w pixels. Maps have one 8 bit band of class ids, 255 where there is no data. Probabilities have K
8 bit bands with 254 times the probability. Confidence has one band of 32 bit floating-point numbers, NaN where there is no data.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.orientation import TURNS, orientation_of
from dann_experiments.data.rasters import CACHE_MB, Window, open_raster
from dann_experiments.names import Confidence
from dann_experiments.prediction.confidence import MEANINGS, NO_CONFIDENCE
from dann_experiments.prediction.partial_map import CLASSES, CONFIDENCE, Layer, PartialMap, probabilities_layer

if TYPE_CHECKING:
    from rasterio.io import DatasetReader, DatasetWriter

NODATA = 255  # of class maps and of probabilities
PROBABILITY_STEPS = 254  # a probability p is stored as round(254 p)
TIFF_SUFFIXES = (".tif", ".tiff")
MAP_SUFFIXES = (*TIFF_SUFFIXES, ".png")
SIGNATURE_TAG = "dann_signature"  # name of the metadata that identifies how a map was made
BLOCK = 512  # side of the tiles of a GeoTIFF


@dataclass(frozen=True)
class Grid:
    """Size and georeference of a raster."""

    height: int
    width: int
    crs: Any
    """None = not georeferenced."""
    transform: Any
    gcps: tuple[Any, ...] = ()
    """Ground control points; if there are any, `crs` is theirs."""
    pixel_is: str | None = None
    """AREA_OR_POINT of the file."""


@dataclass(frozen=True)
class Legend:
    """Classes and metadata to write into a map."""

    class_names: Sequence[str]
    colors: np.ndarray
    """(K, 3) in 0..1."""
    tags: Mapping[str, str]
    """Additional metadata of the file."""


def read_grid(path: Path) -> Grid:
    """Read size and georeference of a file. Raises InputError if it is no image."""
    with open_raster(path) as file:
        points, crs_of_points = file.gcps
        height, width = TURNS[orientation_of(file)].size(file.height, file.width)
        return Grid(
            height, width, crs_of_points if points else file.crs, file.transform, tuple(points),
            file.tags().get("AREA_OR_POINT"),
        )  # fmt: skip


def read_tags(path: Path) -> dict[str, str]:
    """Read the metadata of a file. Raises InputError if it is no image."""
    with open_raster(path) as file:
        return file.tags()


def read_decimated(path: Path, bands: Sequence[int], side: int) -> np.ndarray:
    """Read the whole file (bands, h, w) in display orientation, reduced by nearest pixel to at most `side` x `side`."""
    from rasterio.enums import Resampling

    with open_raster(path) as file:
        factor = max(file.height / side, file.width / side, 1.0)
        size = (max(round(file.height / factor), 1), max(round(file.width / factor), 1))
        values = file.read(list(bands), out_shape=(len(bands), *size), resampling=Resampling.nearest)
        return TURNS[orientation_of(file)].shown(values)


def write_map(
    path: Path, partial: PartialMap, windows: Sequence[Window], size: tuple[int, int], grid: Grid, factor: float,
    legend: Legend,
) -> np.ndarray:  # fmt: skip
    """Write the finished class map to `path`: a Cloud Optimized GeoTIFF, or a PNG with a palette, by its suffix.

    `windows`: the windows of the pieces of the partial map; `size`: its (height, width); `factor`: number of pixels of `grid` per
    pixel of the partial map, which is resampled by nearest pixel. Returns pixels per class (K + 1,), those without data last.
    """
    source = partial.folder / "map.tif"
    names = legend.class_names
    with _errors_explained(path, partial), _gdal():
        with _new_tiff(source, size, grid, factor, CLASSES) as file:
            _describe(file, legend)
            file.set_band_description(1, "class")
            table = {index: (*_bytes(color), 255) for index, color in enumerate(legend.colors)}
            file.write_colormap(1, {**table, NODATA: (0, 0, 0, 0)})
            file.update_tags(1, **{f"class_{index}": name for index, name in enumerate(names)})
            counts = _fill(file, partial.read(windows), partial.folder, size, factor)
            assert counts is not None
        _publish(source, path)
    return np.append(counts[: len(names)], counts[NODATA])


def write_probabilities(
    path: Path, partial: PartialMap, windows: Sequence[Window], size: tuple[int, int], grid: Grid, factor: float,
    legend: Legend,
) -> None:  # fmt: skip
    """Write the probabilities of all classes to `path`, a Cloud Optimized GeoTIFF with a band per class; see `write_map`."""
    source = partial.folder / "probabilities.tif"
    layer = probabilities_layer(len(legend.class_names))
    with _errors_explained(path, partial), _gdal():
        with _new_tiff(source, size, grid, factor, layer) as file:
            _describe(file, legend)
            file.descriptions = tuple(legend.class_names)
            file.scales = (1 / PROBABILITY_STEPS,) * layer.bands
            _fill(file, partial.read(windows, layer), partial.folder, size, factor)
        _publish(source, path)


def write_confidence(
    path: Path, partial: PartialMap, windows: Sequence[Window], size: tuple[int, int], grid: Grid, factor: float,
    legend: Legend, kind: Confidence,
) -> None:  # fmt: skip
    """Write the confidence of the prediction to `path`, a Cloud Optimized GeoTIFF of one band, float32; see `write_map`."""
    source = partial.folder / "confidence.tif"
    with _errors_explained(path, partial), _gdal():
        with _new_tiff(source, size, grid, factor, CONFIDENCE, NO_CONFIDENCE) as file:
            _describe(file, legend)
            file.set_band_description(1, kind)
            file.update_tags(1, meaning=MEANINGS[kind])
            _fill(file, partial.read(windows, CONFIDENCE), partial.folder, size, factor)
        _publish(source, path)


def write_window(image: Path, region: tuple[int, int, int, int], path: Path) -> None:
    """Write a part of an image as a GeoTIFF of its own: all bands as stored, with georeference, nodata and colors.

    `region`: left, top, right and bottom, in pixels of the image as displayed. Raises InputError if a file cannot be read or
    written.
    """
    import rasterio
    from rasterio.enums import ColorInterp, MaskFlags
    from rasterio.errors import RasterioError
    from rasterio.windows import Window as FileWindow

    left, top, right, bottom = region
    colors = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    try:
        with _gdal(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"), open_raster(image) as file:
            turned = orientation_of(file) != 1
            window = FileWindow(left, top, right - left, bottom - top)  # pyright: ignore[reportCallIssue]
            if turned:  # photographs: small, and without georeference
                values = TURNS[orientation_of(file)].shown(file.read())[:, top:bottom, left:right]
            else:
                values = file.read(window=window)
            with rasterio.open(
                path, "w", driver="GTiff", height=values.shape[1], width=values.shape[2], count=file.count,
                dtype=values.dtype, nodata=file.nodata, compress="deflate",
                photometric="RGB" if file.colorinterp[:3] == colors else "MINISBLACK",  # else Pillow cannot open it
            ) as made:  # fmt: skip
                if not turned and (file.crs is not None or not file.transform.is_identity):
                    made.crs, made.transform = file.crs, file.window_transform(window)
                made.colorinterp, made.descriptions = file.colorinterp, file.descriptions
                made.scales, made.offsets = file.scales, file.offsets
                if file.colorinterp[0].name == "palette":
                    made.write_colormap(1, file.colormap(1))
                made.write(values)
                if (
                    not turned
                    and MaskFlags.per_dataset in file.mask_flag_enums[0]
                    and ColorInterp.alpha not in file.colorinterp
                ):
                    made.write_mask(file.dataset_mask(window=window))
    except (OSError, RasterioError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path} cannot be written from {image}: {reason}.") from None


def _new_tiff(
    path: Path, size: tuple[int, int], grid: Grid, factor: float, layer: Layer, nodata: float = NODATA
) -> DatasetWriter:
    """Create a GeoTIFF. It is uncompressed, because pieces do not match its tiles, so tiles are written several times."""
    import rasterio

    height, width = size if factor == 1.0 else (grid.height, grid.width)
    file = rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=layer.bands, dtype=layer.dtype, nodata=nodata,
        tiled=True, blockxsize=BLOCK, blockysize=BLOCK, interleave="band", photometric="MINISBLACK", BIGTIFF="IF_SAFER",
    )  # fmt: skip
    if grid.gcps:
        file.gcps = (list(grid.gcps), grid.crs)
    else:
        if grid.crs is not None:
            file.crs = grid.crs
        if grid.crs is not None or not grid.transform.is_identity:
            file.transform = grid.transform
    if grid.pixel_is is not None:
        file.update_tags(AREA_OR_POINT=grid.pixel_is)
    return file


def _describe(file: DatasetWriter, legend: Legend) -> None:
    file.update_tags(class_names=json.dumps(list(legend.class_names), ensure_ascii=False), **legend.tags)


def _fill(
    file: DatasetWriter, pieces: Iterable[tuple[Window, np.ndarray]], folder: Path, size: tuple[int, int], factor: float
) -> np.ndarray | None:
    """Write the pieces and return the count of each value, (256,); None if they are not 8 bit."""
    import rasterio

    if factor == 1.0:
        return _write(file, pieces)
    working = folder / "working.tif"  # on the grid of the prediction
    with rasterio.open(
        working, "w", driver="GTiff", height=size[0], width=size[1], count=file.count, dtype=file.dtypes[0], tiled=True,
        blockxsize=BLOCK, blockysize=BLOCK, interleave="band", BIGTIFF="IF_SAFER",
    ) as between:  # fmt: skip
        _write(between, pieces)
    with rasterio.open(working) as between:
        counts = _write(file, _resampled(between, file, factor))
    working.unlink()
    return counts


def _write(file: DatasetWriter, pieces: Iterable[tuple[Window, np.ndarray]]) -> np.ndarray | None:
    from rasterio.windows import Window as FileWindow

    counts = np.zeros(256, np.int64) if file.dtypes[0] == "uint8" else None
    for window, values in pieces:
        file.write(values, window=FileWindow(window.left, window.top, window.width, window.height))  # pyright: ignore[reportCallIssue]
        if counts is not None:
            counts += np.bincount(values[0].ravel(), minlength=256)
    return counts


def _resampled(source: DatasetReader, target: DatasetWriter, factor: float) -> Iterator[tuple[Window, np.ndarray]]:
    """Yield the target block by block: each of its pixels gets the source pixel at its center."""
    from rasterio.windows import Window as FileWindow

    def behind(start: int, count: int, limit: int) -> np.ndarray:
        return np.minimum(((start + np.arange(count) + 0.5) / factor).astype(int), limit - 1)

    for top in range(0, target.height, BLOCK):
        height = min(BLOCK, target.height - top)
        rows = behind(top, height, source.height)
        for left in range(0, target.width, BLOCK):
            width = min(BLOCK, target.width - left)
            columns = behind(left, width, source.width)
            box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
            values = source.read(window=FileWindow(*map(int, box)))
            yield Window(top, left, height, width), values[:, (rows - rows[0])[:, None], columns - columns[0]]


def _publish(source: Path, path: Path) -> None:
    """Convert the plain GeoTIFF to the format of `path`, next to the source first, so that `path` is never incomplete."""
    from rasterio.shutil import copy

    made = source.with_suffix(".made" + path.suffix)
    if path.suffix.lower() in TIFF_SUFFIXES:
        copy(
            source, made, driver="COG", COMPRESS="DEFLATE", BLOCKSIZE=BLOCK, OVERVIEW_RESAMPLING="NEAREST",
            NUM_THREADS="ALL_CPUS", BIGTIFF="IF_SAFER",
        )  # fmt: skip
    else:
        copy(source, made, driver="PNG", WRITE_METADATA_AS_TEXT="YES")
    source.unlink()
    with open(made, "rb") as file:
        os.fsync(file.fileno())
    os.replace(made, path)


@contextlib.contextmanager
def _gdal() -> Iterator[None]:
    """Give GDAL a small cache and turn off its sidecar files."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_PAM_ENABLED="NO"):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@contextlib.contextmanager
def _errors_explained(path: Path, partial: PartialMap) -> Iterator[None]:
    from rasterio.errors import RasterioError

    try:
        yield
    except (OSError, RasterioError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        kept = "The predictions so far are kept next to it: correct" if partial.is_kept else "Correct"
        raise InputError(f"{path} cannot be written: {reason}. {kept} this and start again.") from None


def _bytes(color: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(part)) for part in color)
    return red, green, blue
