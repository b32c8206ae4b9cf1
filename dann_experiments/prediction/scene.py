"""One image to map: its header, the grid of its prediction, and its pixels, which are read in large parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.config.errors import InputError
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.reading import (
    Header,
    Normalization,
    Reading,
    check_type,
    chosen_bands,
    for_file,
    plain_reading,
)
from dann_experiments.data.statistics import BandSums, range_remark
from dann_experiments.data.virtual import files_behind, state_of
from dann_experiments.names import Confidence, TestBatchnorm, Tta
from dann_experiments.prediction.partial_map import PARTIAL_SUFFIX
from dann_experiments.prediction.rasters import Grid, read_grid
from dann_experiments.prediction.tiling import Axis, Plan, fitted_tiles, grid_stride, plan_tiles
from dann_experiments.prediction.vector_file import VectorOptions

STRIP_BYTES = 32 * 2**20
"""Size of the parts that are read at a time, on the grid of the prediction."""
SAMPLED = 8  # only every so many rows and columns are used to check the range of the values


class UnreadableImage(InputError):
    """The image is damaged, as reading it showed, so the finished part of its map is useless."""


@dataclass(frozen=True)
class Options:
    """Options for making maps."""

    tile_size: int | None = 512
    """Side of a tile, which the network sees at a time, in pixels; None = fitted to each image."""
    overlap: int = 128
    """Pixels that neighboring tiles share."""
    batch_size: int = 4
    """Tiles per forward pass."""
    probabilities: bool = False
    """Also write the probabilities of all classes."""
    overwrite: bool = False
    """Replace existing maps."""
    tta: Tta = "none"
    """Copies of each tile whose predictions are averaged."""
    test_batchnorm: TestBatchnorm = "running"
    """BatchNorm statistics: the model's, or those of each image."""
    confidence: Confidence | None = None
    """Kind of confidence to write as well; None = none."""
    stac: bool = False
    """Also write a STAC item."""
    stac_datetime: str | None = None
    """When the images were taken; None = as their STAC items or metadata say."""
    vector: str | None = None
    """Also write polygons: gpkg, geojson or a path; None = none."""
    polygons: VectorOptions = field(default_factory=VectorOptions)
    own_bands: bool = False
    """True if the user, not the model, chose the bands to read."""
    most_pixels: int = 2**20
    """Pixels of a fitted tile, at most."""


@dataclass(frozen=True)
class Scene:
    """One image to map, with its header read."""

    input: Path
    output: Path
    header: Header
    reading: Reading
    bands: list[int]
    grid: Grid
    factor: float
    """File pixels per pixel of the working grid."""
    size: tuple[int, int]
    """(height, width) of the working grid."""
    plan: Plan
    normalisation: Normalization
    facts: Mapping[str, Any]
    """Everything that its map depends on."""

    @classmethod
    def open(cls, source: Path, output: Path, model: Model, options: Options) -> Scene:
        """Read the header of `source`. Raises InputError for an image that does not fit the model."""
        header = read_header(source)
        reading = model.reading
        # gray, or a palette, which is read as colors
        if header.bands == 1 and not options.own_bands and reading.bands == (1, 2, 3):
            reading = dataclasses.replace(reading, bands=None)
        bands = chosen_bands(source, header, reading, model.in_channels)
        check_type(source, header, reading)
        height, width = reading.grid_size(header, source)
        stride = grid_stride(model.network)
        if options.tile_size is None:
            plan = fitted_tiles(height, width, options.most_pixels, options.overlap, stride)
            tile_size = [plan.rows.tile, plan.columns.tile]
        else:
            plan, tile_size = plan_tiles(height, width, options.tile_size, options.overlap, stride), options.tile_size
        size, changed = state_of(source)
        # without the device: an interrupted map may be finished on another one
        facts = {
            "model": model.digest, "input": str(source.resolve()), "input size": size,
            "input time": changed, "reading": _as_signed(reading),
            "normalisation": dataclasses.asdict(model.normalisation), "tile_size": tile_size,
            "overlap": options.overlap, "batch_size": options.batch_size, "probabilities": options.probabilities,
        }  # fmt: skip
        behind = [[str(path), *state_of(path)] for path in files_behind(source)[1:]]
        facts |= {"behind": behind} if behind else {}
        # left out at their defaults, so that maps of older versions still count as finished
        facts |= {"tta": options.tta} if options.tta != "none" else {}
        facts |= {"test_batchnorm": options.test_batchnorm} if options.test_batchnorm != "running" else {}
        facts |= {"confidence": options.confidence} if options.confidence is not None else {}
        return cls(
            source, output, header, reading, bands, read_grid(source), reading.factor(header, source), (height, width), plan,
            for_file(model.normalisation, reading, header), json.loads(json.dumps(facts)),
        )  # fmt: skip

    @property
    def signature(self) -> str:
        """Digest of the facts, 32 hex digits."""
        return hashlib.blake2b(json.dumps(self.facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def partial_folder(self) -> Path:
        """Folder of the finished pieces until the map is complete."""
        return partial_folder(self.output)


def partial_folder(output: Path) -> Path:
    """Return the folder of the finished pieces of a map."""
    return output.with_name(output.name + PARTIAL_SUFFIX)


def _as_signed(reading: Reading) -> dict[str, Any]:
    """Return a reading for the signature of a map.

    Newer fields are left out if they have the meaning of older versions, so that older maps still count as finished.
    """
    as_before = {"nodata_bands": "all", "unit": None}
    return {name: value for name, value in plain_reading(reading).items() if as_before.get(name, ...) != value}


class Strips:
    """Cuts tiles out of larger parts of the image, which are read once: several rows of tiles, or a part of one row.

    The parts are the same in every process, so a resumed map gets the same values even if reading resamples.
    """

    def __init__(self, scene: Scene, in_channels: int) -> None:
        self.scene = scene
        self.in_channels = in_channels
        rows, columns = scene.plan.rows, scene.plan.columns
        pixel = in_channels * np.dtype(scene.header.dtype).itemsize
        self._rows_per_part = self._fitting(rows, columns.length * pixel)
        self._columns_per_part = (
            len(columns.starts) if self._rows_per_part else self._fitting(columns, rows.tile * pixel)
        )
        self._part: tuple[Window, np.ndarray, np.ndarray | None] | None = None
        self._sums = BandSums(in_channels)

    def __call__(self, window: Window) -> tuple[Tensor, np.ndarray | None]:
        """Return the normalized image (B, h, w) of a tile, and where it holds data."""
        part, values, valid = self._holding(window)
        top, left = window.top - part.top, window.left - part.left
        box = (slice(top, top + window.height), slice(left, left + window.width))
        inside = None if valid is None else valid[box]
        return torch.from_numpy(self.scene.normalisation(values[:, *box], inside)), inside

    def is_dark(self) -> bool:
        """Return whether a 16 bit image uses only a small part of its range and is darker than the training images."""
        if not self._judges_range:
            return False
        found, normalisation = self._sums.result(), self.scene.normalisation
        trained = np.mean(normalisation.mean) * normalisation.high[0]
        return range_remark(found, "type", [self.scene.header], "") is not None and found.high.max() < trained

    @property
    def _judges_range(self) -> bool:
        return self.scene.header.dtype == "uint16" and self.scene.reading.scale == "type"

    @staticmethod
    def _fitting(axis: Axis, line: int) -> int:
        """Return the number of tiles along the axis that fit into a part; `line`: bytes per row (or column) of pixels."""
        return max((STRIP_BYTES // line - axis.tile) // axis.step + 1, 0)

    def _holding(self, window: Window) -> tuple[Window, np.ndarray, np.ndarray | None]:
        plan = self.scene.plan
        rows = self._span(plan.rows, window.top, max(self._rows_per_part, 1))
        columns = self._span(plan.columns, window.left, max(self._columns_per_part, 1))
        part = Window(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])
        if self._part is None or self._part[0] != part:
            self._part = None  # free the old part before reading the new one
            try:
                values, valid = read_pixels(self.scene.input, self.in_channels, self.scene.reading, part)
            except InputError as error:
                raise UnreadableImage(str(error)) from None
            if self._judges_range:
                some = np.s_[::SAMPLED, ::SAMPLED]
                self._sums.add(values[:, *some], None if valid is None else valid[some])
            self._part = (part, values, valid)
        return self._part

    @staticmethod
    def _span(axis: Axis, start: int, count: int) -> tuple[int, int]:
        first = axis.starts.index(start) // count * count
        return axis.starts[first], axis.inside(min(first + count - 1, axis.last))[1]
