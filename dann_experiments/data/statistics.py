"""Measures mean, standard deviation and percentiles per band over a domain's training windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.rasters import Header
from dann_experiments.data.reading import Normalization, largest_value

SAMPLED = 4096  # pixels drawn per window for the percentiles
PERCENTILES = (2, 98)
NARROW = {"uint8": 0.1, "uint16": 0.25}  # share of the type's range; values that span less suggest another range
NARROW_OF_A_GIVEN_RANGE = 0.02
CLIPPED = 0.1  # share of values beyond the range; more suggests another range


@dataclass(frozen=True)
class BandStatistics:
    """Statistics per band of the stored values, over the pixels that hold data."""

    minimum: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    """2nd percentile."""
    high: np.ndarray
    """98th percentile."""
    pixels: int
    """Number of pixels that hold data."""
    nodata: int
    """Number of pixels without data."""
    drawn: np.ndarray
    """(B, n) randomly drawn values, for histograms."""


class BandSums:
    """Accumulates statistics over windows; percentiles use randomly drawn pixels (fixed seed)."""

    def __init__(self, bands: int) -> None:
        self._rng = np.random.default_rng(0)
        self._sum, self._squares = np.zeros(bands), np.zeros(bands)
        self._minimum, self._maximum = np.full(bands, np.inf), np.full(bands, -np.inf)
        self._drawn: list[np.ndarray] = []
        self._pixels = self._nodata = 0

    def add(self, values: np.ndarray, valid: np.ndarray | None) -> None:
        """Add a window: values (B, h, w), valid (h, w; None = all valid)."""
        pixels = (values.reshape(len(values), -1) if valid is None else values[:, valid]).astype(np.float64)
        self._nodata += values[0].size - pixels.shape[1]
        if not pixels.shape[1]:
            return
        self._pixels += pixels.shape[1]
        self._sum += pixels.sum(1)
        self._squares += (pixels**2).sum(1)
        self._minimum = np.minimum(self._minimum, pixels.min(1))
        self._maximum = np.maximum(self._maximum, pixels.max(1))
        self._drawn.append(pixels[:, self._rng.integers(pixels.shape[1], size=min(SAMPLED, pixels.shape[1]))])

    def result(self) -> BandStatistics:
        """Return the statistics of all windows added; NaN if none held data."""
        count = max(self._pixels, 1)
        unknown = np.full_like(self._sum, np.nan)
        mean = self._sum / count if self._pixels else unknown
        std = np.sqrt(np.maximum(self._squares / count - mean**2, 0))
        drawn = np.concatenate(self._drawn, axis=1) if self._drawn else np.full((len(mean), 1), np.nan)
        low, high = np.percentile(drawn, PERCENTILES, axis=1)
        minimum, maximum = (self._minimum, self._maximum) if self._pixels else (unknown, unknown)
        return BandStatistics(minimum, maximum, mean, std, low, high, self._pixels, self._nodata, drawn)


def measure(dataset: SegmentationDataset) -> Iterator[BandSums]:
    """Add all items; yield the sums after each."""
    sums = BandSums(dataset.in_channels)
    for index in range(len(dataset)):
        values, _, valid = dataset.read(index)
        sums.add(values, valid)
        yield sums


def normalization_from(
    found: BandStatistics, given: Normalization, scale: object, largest: float, own: bool
) -> Normalization:
    """Return `given` with the range that `scale` asks for and, with `own`, the data's mean and standard deviation.

    `largest`: end of the range for `scale: type`. Mean and deviation are those of the scaled but unclipped values; a band of
    constant values gets a deviation of 1.
    """
    low, high = np.array(given.low), np.array(given.high)
    if scale == "percentiles":
        low, high = found.low, np.where(found.high > found.low, found.high, found.low + 1)
    elif scale == "type":
        low, high = np.zeros_like(low), np.full_like(high, largest)
    made = dataclasses.replace(given, low=_tuple(low), high=_tuple(high))
    if not own:
        return made
    std = found.std / (high - low)
    return dataclasses.replace(
        made, mean=_tuple((found.mean - low) / (high - low)), std=_tuple(np.where(std > 1e-6, std, 1.0))
    )


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def range_remark(found: BandStatistics, scale: object, headers: Sequence[Header], key: str) -> str | None:
    """Return a remark if the range that `scale` maps to 0..1 does not suit the values, else None.

    `headers`: those of the files; `key`: prefix of the domain's settings, such as data.source. Percentiles always suit. Files of
    several types, each with its own range, are not judged.
    """
    header = headers[0]
    several = scale == "type" and len({largest_value(other) for other in headers}) > 1
    if scale == "percentiles" or not found.pixels or several:
        return None
    if isinstance(scale, tuple):
        low, high, narrow = *scale, NARROW_OF_A_GIVEN_RANGE
        what = f"{key}.scale makes {low:g} to {high:g} the range of 0 to 1"
    else:
        low, high, narrow = 0.0, largest_value(header), NARROW[header.dtype]
        what = f"{key}.scale type makes 0 to {high:g}, the range of {header.dtype}, the range of 0 to 1"
    ways = f"set {key}.scale to [LOW, HIGH] (for surface reflectance often [0, 10000]) or to percentiles."
    beyond = float(np.mean((found.drawn < low) | (found.drawn > high)))
    if beyond > CLIPPED:
        return f"{what}, but {beyond:.0%} of the values are outside and will be clipped: {ways}"
    smallest, largest = float(found.low.min()), float(found.high.max())
    if largest - smallest < narrow * (high - low):
        return (
            f"{what}, but nearly all values are between {smallest:g} and {largest:g}, {(largest - smallest) / (high - low):.1%} "
            f"of it: the network sees almost no contrast. Unless that is intended, {ways}"
        )
    return None
