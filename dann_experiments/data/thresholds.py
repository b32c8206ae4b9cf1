"""Otsu's threshold of values that come in parts, and the classes on its two sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dann_experiments.config.errors import InputError

BINS = 256
"""Bins of the histogram, between the smallest and the largest value: scikit-image's own number."""
FEW_BINS = 16
ABOVE, BELOW, AT_THRESHOLD, AT_EDGE, NO_VALUE = range(5)
"""Kinds of pixels of `sides`: above the threshold; not above it; too near the threshold; too near the other side; without a
value."""


@dataclass
class Range:
    """The smallest and the largest of values that come in parts, and their number."""

    low: float = np.inf
    high: float = -np.inf
    count: int = 0

    def add(self, values: np.ndarray) -> None:
        """Include finite values."""
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            self.count += values.size

    def join(self, other: Range) -> Range:
        """Return the range of both."""
        return Range(min(self.low, other.low), max(self.high, other.high), self.count + other.count)


class Histogram:
    """Counts of values that come in parts, in equal bins over a known range (the last one includes its upper end)."""

    def __init__(self, found: Range) -> None:
        """`found`: the range of all values, one or more; equal values get a bin of their own width 1."""
        middle = found.low == found.high
        self.edges = np.histogram_bin_edges([], BINS, (found.low - 0.5 * middle, found.high + 0.5 * middle))
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count finite values within the range."""
        self.counts += np.histogram(values, BINS, (self.edges[0], self.edges[-1]))[0]

    @property
    def is_coarse(self) -> bool:
        """True if a few bins hold nearly all values, because single values lie far away: a threshold between bins is rough."""
        fullest = np.sort(self.counts)[-FEW_BINS:]
        return bool(
            (fullest > 0).any() and fullest.sum() > 0.99 * self.counts.sum() and (self.counts > 0).sum() > FEW_BINS
        )

    def otsu(self) -> float:
        """Return the threshold that makes the variance between the values up to it and those above largest (Otsu 1979, A
        threshold selection method from gray-level histograms), by `skimage.filters.threshold_otsu`: the center of a bin.

        Raises InputError if all values are equal.
        """
        from skimage.filters import threshold_otsu

        if np.count_nonzero(self.counts) < 2:
            raise InputError("all values of the index are equal, so Otsu's method finds no threshold; give a number.")
        centers = (self.edges[:-1] + self.edges[1:]) / 2
        return float(threshold_otsu(hist=(self.counts, centers)))


def sides(values: np.ndarray, threshold: float, margin: float = 0.0, border: int = 0) -> np.ndarray:
    """Return (h, w) uint8: on which side of the threshold each value (h, w) lies, ABOVE or BELOW (which includes the threshold).

    `margin`: values within so much of the threshold become AT_THRESHOLD; 0 = none. `border`: pixels whose square of
    2 * `border` + 1 pixels along a side holds a pixel of the other side become AT_EDGE, those at the threshold included on both;
    0 = none. NaN becomes NO_VALUE and is on no side.
    """
    from scipy.ndimage import maximum_filter

    known = ~np.isnan(values)
    above = np.greater(values, threshold, where=known, out=np.zeros(values.shape, bool))
    result = np.where(above, ABOVE, BELOW).astype(np.uint8)
    if border:
        near = [
            np.asarray(maximum_filter(side, size=2 * border + 1, mode="constant", cval=0), bool)
            for side in (above, known & ~above)
        ]  # fmt: skip
        result[near[0] & near[1]] = AT_EDGE
    if margin > 0:
        with np.errstate(invalid="ignore"):
            result[np.abs(values - threshold) <= margin] = AT_THRESHOLD
    result[~known] = NO_VALUE
    return result
