"""Masks from a rule: an index of the bands and a threshold. Works block by block, so that memory does not grow with the raster.

Letters: B bands, h x w pixels. Nothing is resampled: every image keeps its own pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.georeference import FARTHEST, described, pixels_apart, place_of
from dann_experiments.data.indices import index_values
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Header, Window, open_raster, verified_header
from dann_experiments.data.reading import Reading, check_type
from dann_experiments.data.thresholds import ABOVE, AT_EDGE, AT_THRESHOLD, BELOW, NO_VALUE, Histogram, Range, sides
from dann_experiments.data.virtual import files_behind, state_of
from dann_experiments.names import IndexName
from dann_experiments.prediction.partial_map import PARTIAL_SUFFIX, PartialMap
from dann_experiments.prediction.rasters import NODATA, SIGNATURE_TAG, Grid, Legend, read_grid, read_tags, write_map

BLOCK_ROWS, BLOCK_COLUMNS = 512, 2048
"""Largest block that is in memory at a time, without the border around it; fewer rows if there are many bands."""
BLOCK_BYTES = 32 * 2**20
"""Size of the stored values of a block, all bands and dates together."""
PICTURE_SIDE = 1000
"""Longest side of the reduced index and mask that are kept for pictures, in pixels."""
KINDS = 5  # of `thresholds.sides`
Show = Callable[[float, str], None]


@dataclass(frozen=True)
class Rule:
    """Which index is computed of an image, and how its pixels are read."""

    index: IndexName
    bands: tuple[int, ...] | None
    """Numbers of the bands in the order that the index takes, from 1; None = all of the file."""
    nodata: Literal["file"] | tuple[float, ...] = "file"


@dataclass(frozen=True)
class Cut:
    """How values of the index become class ids."""

    above: bool
    """True if values above the threshold are the foreground."""
    background: int
    foreground: int
    """Class ids."""
    margin: float = 0.0
    """Values this near to the threshold are ignored."""
    border: int = 0
    """Pixels on each side of an edge between the classes that are ignored."""

    def ids(self, found: np.ndarray) -> np.ndarray:
        """Return class ids (h, w) uint8, 255 = ignored, of the kinds of pixels that `thresholds.sides` returns."""
        table = np.full(KINDS, NODATA, np.uint8)
        table[ABOVE if self.above else BELOW] = self.foreground
        table[BELOW if self.above else ABOVE] = self.background
        return table[found]


class Shares(NamedTuple):
    """Numbers of pixels of a mask."""

    background: int
    foreground: int
    margin: int
    """Ignored, because too near the threshold."""
    border: int
    """Ignored, because too near the other class."""
    no_data: int
    """Ignored, because the image has no data, or the index no value."""


@dataclass(frozen=True)
class Picture:
    """The index (h, w), NaN = no value, and the class ids (h, w) of an image, reduced to every n-th row and column."""

    index: np.ndarray
    ids: np.ndarray


@dataclass(frozen=True)
class Subject:
    """One image to label, with its header read."""

    image: Path
    before: Path | None
    output: Path
    rule: Rule
    header: Header
    grid: Grid
    readings: tuple[tuple[Path, Reading, int], ...]
    """File, reading and number of bands of the image, and of that of the earlier date if there is one."""
    has_offset: bool = False
    """True if a file declares an offset of its values, which the index, computed of the values as stored, does not know."""

    @classmethod
    def open(cls, image: Path, before: Path | None, output: Path, rule: Rule) -> Subject:
        """Read the headers. Raises InputError for files and bands that do not fit the rule, or two dates that do not fit."""
        files = [image] if before is None else [image, before]
        headers, readings, has_offset = [], [], False
        for path in files:
            with open_raster(path) as file:
                header = verified_header(file, path)
                has_offset |= any(file.offsets)
            reading = _reading_of(path, header, rule)
            headers.append(header)
            readings.append((path, reading, len(reading.bands or ())))
        if before is not None:
            _check_pair(files, headers, [count for _, _, count in readings])
        return cls(image, before, output, rule, headers[0], read_grid(image), tuple(readings), has_offset)

    def values(self, window: Window) -> np.ndarray:
        """Return the index (h, w) of a window, NaN where it has no value or a date has no data."""
        dates = []
        for path, reading, count in self.readings:
            dates.append(read_pixels(path, count, reading, window))
        found = index_values(self.rule.index, dates[0].values, dates[1].values if len(dates) > 1 else None)
        for date in dates:
            if date.valid is not None:
                found[~date.valid] = np.nan
        return found

    def blocks(self) -> list[Window]:
        """Return the windows in which the image is read, row by row."""
        height, width = self.header.height, self.header.width
        columns = min(BLOCK_COLUMNS, width)
        row = columns * sum(count for _, _, count in self.readings) * np.dtype(self.header.dtype).itemsize
        rows = max(min(BLOCK_ROWS, BLOCK_BYTES // row), 1)
        return [
            Window(top, left, min(rows, height - top), min(columns, width - left))
            for top in range(0, height, rows)
            for left in range(0, width, columns)
        ]

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.header.height * self.header.width


@dataclass(frozen=True)
class Measured:
    """The values of the index in all images."""

    ranges: Sequence[Range]
    """Of each image."""
    histogram: Histogram | None
    """Of all images; None if no pixel has a value."""
    otsu: Sequence[float | None]
    """Otsu's threshold of each image alone, as far as it was asked for; None if there is none."""


def _reading_of(path: Path, header: Header, rule: Rule) -> Reading:
    """Return how a file is read. Raises InputError if it lacks bands or holds values of which no index can be computed."""
    bands = rule.bands or tuple(header.data_bands)
    if max(bands) > header.count:
        raise InputError(
            f"image {path} has {header.count} band{'s' * (header.count > 1)}, but the rule {rule.index} is to read band "
            f"{max(bands)}; give numbers from 1 to {header.count}."
        )
    if header.palette and rule.index != "band":
        raise InputError(f"image {path} holds numbers of palette colors, not bands; convert it to RGB.")
    reading = Reading(bands=bands, scale=(0.0, 1.0), nodata=rule.nodata)
    check_type(path, header, reading)
    return reading


def _check_pair(files: Sequence[Path], headers: Sequence[Header], bands: Sequence[int]) -> None:
    """Raise InputError if two dates differ in size, bands or place."""
    after, before = files
    sizes = [f"{header.height} x {header.width} pixels" for header in headers]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"image {after} is {sizes[0]}, its earlier date {before} {sizes[1]}; cut or warp one to the other."
        )
    if bands[0] != bands[1]:
        raise InputError(
            f"image {after} has {bands[0]} bands, its earlier date {before} {bands[1]}; choose those to compare with --bands."
        )
    places = []
    for path in files:
        with open_raster(path) as file:
            places.append(place_of(file))
    if places[0] is None or places[1] is None:
        return
    apart = pixels_apart(places[0], places[1])
    if apart is not None and not apart <= FARTHEST:
        raise InputError(
            f"image {after} and its earlier date {before} are in different places, {apart:.4g} pixels apart "
            f"({described(places[0])}; {described(places[1])}); warp one to the grid of the other."
        )


def measure(subjects: Sequence[Subject], each: bool, show: Show) -> Measured:
    """Read all images twice: the range of their values, then their histogram; with `each`, also Otsu's threshold of each image.

    `show` gets the number of images done, up to 2 * len(subjects), and the name of the current one. Raises one InputError for
    all images that cannot be read, and those whose values are all equal if `each`.
    """
    ranges, problems = [], []
    for number, subject in enumerate(subjects):
        found = Range()
        try:
            for share, values in _values_of(subject):
                show(number + share, subject.image.name)
                found.add(values)
        except InputError as error:
            problems.append(str(error))
        ranges.append(found)
    _refuse(problems, len(subjects))
    whole = Range()
    for found in ranges:
        whole = whole.join(found)
    if not whole.count:
        return Measured(ranges, None, [None] * len(subjects))
    histogram, otsu = Histogram(whole), []
    for number, (subject, found) in enumerate(zip(subjects, ranges, strict=True), len(subjects)):
        own = Histogram(found) if each and found.count else None
        for share, values in _values_of(subject):
            show(number + share, subject.image.name)
            histogram.add(values)
            if own is not None:
                own.add(values)
        try:
            otsu.append(None if own is None else own.otsu())
        except InputError as error:
            otsu.append(None)
            problems.append(f"{subject.image}: {error}")
    _refuse(problems, len(subjects))
    return Measured(ranges, histogram, otsu)


def _values_of(subject: Subject) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the values of the index, block by block, without pixels that have none, after the share of the image done, 0..1."""
    blocks = subject.blocks()
    for number, block in enumerate(blocks):
        values = subject.values(block)
        yield number / len(blocks), values[~np.isnan(values)]


def _refuse(problems: Sequence[str], count: int) -> None:
    if problems:
        shown = "\n".join(problems[:20])
        raise InputError(
            shown if count == 1 else f"{len(problems)} of {count} images cannot be used; no mask was written:\n{shown}"
        )


def signature(subject: Subject, threshold: float, cut: Cut, names: Sequence[str]) -> str:
    """Return a digest of everything that a mask depends on, 32 hex digits."""
    files = [file for path, _, _ in subject.readings for file in files_behind(path)]
    facts: dict[str, Any] = {
        "files": [[str(path.resolve()), *state_of(path)] for path in files],
        "rule": dataclasses.asdict(subject.rule), "threshold": threshold, "cut": dataclasses.asdict(cut),
        "class_names": list(names),
    }  # fmt: skip
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_finished(subject: Subject, signed: str, overwrite: bool) -> bool:
    """Return whether the mask exists and was made with the same settings. Raises InputError if it was made with others."""
    if overwrite or not subject.output.exists():
        return False
    if read_tags(subject.output).get(SIGNATURE_TAG) != signed:
        raise InputError(
            f"{subject.output} exists, but was not made with these settings; remove it, or set overwrite to true."
        )
    return True


def write_mask(
    subject: Subject, threshold: float, cut: Cut, legend: Legend, show: Callable[[float], None], picture: bool = False
) -> tuple[Shares, Picture | None]:
    """Write the mask of an image; return its numbers of pixels and, if asked for, a picture.

    The mask appears under its name when it is complete. `show` gets the share of the image done, 0..1.
    """
    counts = np.zeros(KINDS, np.int64)
    blocks, step = subject.blocks(), max(-(-max(subject.header.height, subject.header.width) // PICTURE_SIDE), 1)
    size = (subject.header.height, subject.header.width)
    small = tuple(-(-side // step) for side in size)
    kept = Picture(np.full(small, np.nan, np.float32), np.full(small, NODATA, np.uint8)) if picture else None
    with PartialMap(subject.output.with_name(subject.output.name + PARTIAL_SUFFIX), {}) as partial:
        partial.start()
        for number, block in enumerate(blocks):
            show(number / len(blocks))
            around, inside = _widened(block, cut.border, size)
            values = subject.values(around)
            found = sides(values, threshold, cut.margin, cut.border)[inside]
            counts += np.bincount(found.ravel(), minlength=KINDS)
            ids = cut.ids(found)
            partial.add(ids)
            if kept is not None:
                _keep(kept.index, values[inside], block, step)
                _keep(kept.ids, ids, block, step)
        write_map(subject.output, partial, blocks, size, subject.grid, 1.0, legend)
        partial.remove()
    front, back = (ABOVE, BELOW) if cut.above else (BELOW, ABOVE)
    return Shares(*(int(counts[kind]) for kind in (back, front, AT_THRESHOLD, AT_EDGE, NO_VALUE))), kept


def _widened(block: Window, border: int, size: tuple[int, int]) -> tuple[Window, tuple[slice, slice]]:
    """Return the block with `border` pixels more on each side, as far as the image goes, and the place of the block in it."""
    top, left = max(block.top - border, 0), max(block.left - border, 0)
    bottom = min(block.top + block.height + border, size[0])
    right = min(block.left + block.width + border, size[1])
    above, before = block.top - top, block.left - left
    inside = (slice(above, above + block.height), slice(before, before + block.width))
    return Window(top, left, bottom - top, right - left), inside


def _keep(small: np.ndarray, values: np.ndarray, block: Window, step: int) -> None:
    """Copy every `step`-th row and column of the image from a block (h, w) to the reduced image."""
    some = values[-block.top % step :: step, -block.left % step :: step]
    top, left = -(-block.top // step), -(-block.left // step)
    small[top : top + some.shape[0], left : left + some.shape[1]] = some


def legend_tags(rule: Rule, threshold: float, cut: Cut) -> Mapping[str, str]:
    """Return what a mask says of the rule that made it, in its metadata."""
    return {
        "rule": rule.index, "bands": ",".join(map(str, rule.bands)) if rule.bands else "all", "threshold": repr(threshold),
        "side": "above" if cut.above else "below", "margin": f"{cut.margin:g}", "border": str(cut.border),
    }  # fmt: skip
