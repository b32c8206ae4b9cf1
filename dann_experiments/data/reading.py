"""Describes how the files of a domain are read: bands, range, nodata, pixel size, normalization.

Letters: B bands, h x w pixels of a window. Every window is in pixels of the *working grid*: the file's own pixels or, with
`pixel_size`, the grid that they are resampled to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.nodata import NodataBands
from dann_experiments.data.rasters import Header, open_raster

LARGEST_CHANGE = 100.0  # largest factor of resampling, up or down; more suggests a wrong unit
TYPE_RANGES = {"uint8": 255.0, "uint16": 65535.0}


@dataclass(frozen=True)
class Reading:
    """Settings for reading the images of a domain."""

    bands: tuple[int, ...] | None = None
    """Numbers of the bands to read, in order, from 1; None = all."""
    scale: Literal["type", "percentiles"] | tuple[float, float] = "type"
    """Range mapped to 0..1: the type's range, the 2nd to 98th percentile per band over the training windows, or (low, high)."""
    nodata: Literal["file"] | tuple[float, ...] = "file"
    """Values that mean "no data": those the file declares (value, mask or alpha), or these. NaN always does."""
    pixel_size: float | None = None
    """Side length of a pixel of the working grid; None = that of the file's pixels."""
    file_pixel_size: float | None = None
    """Side length of the files' pixels in the same unit; None = from their georeference."""
    nodata_bands: NodataBands | None = None
    """A pixel lacks data if any, or if all, of its bands hold a nodata value; None = depends on the type."""
    unit: str | None = None
    """Unit of `pixel_size`, from the files it was set for; None = unknown so far, or not needed."""
    settings: str = field(default="", compare=False, repr=False)
    """Prefix of the settings' names in messages, such as `data.target.`; empty when a finished model is used."""

    @property
    def is_finished(self) -> bool:
        """True if a finished model is used, whose network and scale are fixed."""
        return not self.settings

    def factor(self, header: Header, path: Path) -> float:
        """Return the number of file pixels per pixel of the working grid, along one side.

        Raises InputError if the pixel size or its unit does not fit the settings.
        """
        if self.pixel_size is None:
            return 1.0
        own = self.file_pixel_size or header.pixel_size
        if own is None:
            raise InputError(
                f"image {path} has no georeference with a pixel size, but {self._working_size()}; set "
                f"{self.settings}file_pixel_size, the side length of its pixels."
            )
        unit = None if self.file_pixel_size else header.unit
        shown = f"{own:g} {unit}" if unit else f"{own:g}"
        if self.unit is not None and unit is not None and self.unit != unit:
            raise InputError(
                f"image {path} has pixels of {shown}, but {self._working_size()}, set for files in {self.unit}; reproject the "
                "files to one CRS (for example with gdalwarp)."
            )
        if not own / LARGEST_CHANGE <= self.pixel_size <= own * LARGEST_CHANGE:
            ratio = max(own / self.pixel_size, self.pixel_size / own)
            made = "each would be cut into" if self.pixel_size < own else "one would be made of"
            wrong = "file_pixel_size" if self.is_finished or self.file_pixel_size else "pixel_size"
            raise InputError(
                f"image {path} has pixels of {shown}, but {self._working_size()}: {made} {ratio:.4g} along a side, more than "
                f"{LARGEST_CHANGE:g}. Give {self.settings}{wrong} in the unit of the file's CRS{f', {unit}' if unit else ''}."
            )
        return self.pixel_size / own

    def _working_size(self) -> str:
        if self.is_finished:
            return f"the model works on pixels of {self.pixel_size:g}"
        return f"{self.settings}pixel_size is {self.pixel_size:g}"

    def grid_size(self, header: Header, path: Path) -> tuple[int, int]:
        """Return (height, width) of the image in pixels of the working grid."""
        factor = self.factor(header, path)
        return max(round(header.height / factor), 1), max(round(header.width / factor), 1)

    def may_lack_data(self, header: Header) -> bool:
        """Return True if pixels may lack data, so that validity has to be read."""
        if header.dtype.startswith("float"):
            return True
        if self.nodata == ():
            return False
        return header.masked or self.nodata != "file" or any(value is not None for value in header.nodata)

    def nodata_of(self, header: Header, bands: Sequence[int]) -> list[list[float]]:
        """Return the nodata values of each of `bands` (from 1), without NaN, which always means nodata."""
        if self.nodata != "file":
            return [[value for value in self.nodata if value == value]] * len(bands)
        own = [header.nodata[band - 1] for band in bands]
        return [[] if value is None or value != value else [value] for value in own]


@dataclass(frozen=True)
class Normalization:
    """Maps stored values to network inputs: x = (value - low) / (high - low), clipped to 0..1, then (x - mean) / std.

    Each attribute has one number per band.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Return stored values (B, h, w) scaled to 0..1 as float32; NaN stays NaN."""
        low, high = (np.array(side, np.float32)[:, None, None] for side in (self.low, self.high))
        result = values.astype(np.float32)
        result -= low
        result /= high - low
        return np.clip(result, 0.0, 1.0, out=result)

    def __call__(self, values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """Return stored values (B, h, w) as normalized float32; pixels that are not `valid` (h, w) become 0, the mean."""
        result = self.scaled(values)
        result -= np.array(self.mean, np.float32)[:, None, None]
        result /= np.array(self.std, np.float32)[:, None, None]
        if valid is not None:
            result[:, ~valid] = 0.0
        return result


def for_file(normalization: Normalization, reading: Reading, header: Header) -> Normalization:
    """Return the normalization of one file; if `scale` is `type`, with the range of the file's type."""
    if reading.scale != "type":
        return normalization
    bands = len(normalization.mean)
    return dataclasses.replace(normalization, low=(0.0,) * bands, high=(largest_value(header),) * bands)


def largest_value(header: Header) -> float:
    """Return the end of the range for `scale: type`: 1, 3 or 15 for 1, 2 or 4 bit images, else that of the type."""
    few = header.bits is not None and header.bits < 8 and not header.palette
    return float(2**header.bits - 1) if few and header.bits is not None else TYPE_RANGES[header.dtype]


def reading_facts(reading: Reading, normalization: Normalization) -> dict[str, Any]:
    """Return both as plain values, to be saved with a model."""
    return plain_reading(reading) | dataclasses.asdict(normalization)


def plain_reading(reading: Reading) -> dict[str, Any]:
    """Return the reading as plain values, without the prefix for messages."""
    return {name: value for name, value in dataclasses.asdict(reading).items() if name != "settings"}


def reading_from_facts(facts: Mapping[str, Any]) -> tuple[Reading, Normalization]:
    """Rebuild both from the values of `reading_facts`. Raises InputError for anything else."""

    def made(cls: Any) -> Any:
        names = {item.name for item in dataclasses.fields(cls)} - {"settings"}
        return cls(**{
            name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name in names
        })  # fmt: skip

    try:
        facts = {"nodata_bands": "all", **facts}  # the only behavior when older models were saved
        return made(Reading), made(Normalization)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the model's notes on how its images are read cannot be used: {error}") from None


def chosen_bands(path: Path, header: Header, reading: Reading, in_channels: int) -> list[int]:
    """Return the numbers (from 1) of the bands to read. Raises InputError if any is missing or their count does not fit."""
    chosen = list(reading.bands or header.data_bands)
    has = f"image {path} has {header.bands} band{'s' * (header.bands != 1)}"
    if header.alpha:
        has += " and an alpha band"
    key = "--bands" if reading.is_finished else f"{reading.settings}bands"
    total = header.count
    if max(chosen) > total:
        its = "the bands to read are" if reading.is_finished else f"{key} is"
        raise InputError(f"{has}, but {its} {chosen}; choose from 1 to {total} with {key}.")
    if reading.bands is None and header.bands == 1 and in_channels == 3:
        return chosen
    if len(chosen) != in_channels:
        read = "" if reading.bands is None else f", of which {chosen} are read"
        takes = f"the {'model' if reading.is_finished else 'network'} takes {in_channels}"
        if reading.bands is None and in_channels == 3 and _is_cmyk(path):
            raise InputError(
                f"image {path} is in CMYK, the color space of print, but {takes} bands; convert it to RGB."
            )
        way_out = f"choose {in_channels} of them with {key}"
        if in_channels <= 8:
            example = range(1, in_channels + 1)
            way_out += f" {','.join(map(str, example))}" if reading.is_finished else f", for example {list(example)}"
        if header.alpha and total == in_channels:
            every = range(1, total + 1)
            given = ",".join(map(str, every)) if reading.is_finished else str(list(every))
            way_out = (
                f"if band {header.alpha} holds data and is only marked as alpha, as many writers mark a fourth 8 bit "
                f"band, name all with {key} {given}; else {way_out}"
            )
        elif header.bands < in_channels:
            way_out = "give images with all bands" + " that it was trained on" * reading.is_finished
        if not reading.is_finished:
            way_out += f", or train a network of {len(chosen)} (model.in_channels {len(chosen)})"
        raise InputError(f"{has}{read}, but {takes}; {way_out}.")
    return chosen


def _is_cmyk(path: Path) -> bool:
    """Return True if the file's bands are CMYK inks; GDAL converts 8-bit CMYK to RGB by itself."""
    from rasterio.enums import ColorInterp

    with open_raster(path) as file:
        return ColorInterp.cyan in file.colorinterp


def check_type(path: Path, header: Header, reading: Reading) -> None:
    """Raise InputError for data types whose range is unknown, and for types that cannot be read as images."""
    if not header.dtype.startswith(("uint", "int", "float")):  # such as GDAL's complex types
        raise InputError(
            f"image {path} holds {header.dtype} values; only integers and floating-point numbers are read."
        )
    if reading.scale == "type" and header.dtype not in TYPE_RANGES:
        if reading.is_finished:
            raise InputError(
                f"image {path} holds {header.dtype} values, but the model was trained on images of 8 or 16 bit, read by the "
                "range of that type; convert the image to that type."
            )
        raise InputError(
            f"image {path} holds {header.dtype} values, whose range is unknown; set {reading.settings}scale to "
            "[LOW, HIGH] or percentiles."
        )
