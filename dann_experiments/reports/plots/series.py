"""Averages and smooths curves. A curve is a sequence of (step, value)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Points = Sequence[tuple[int, float]]
MOST_POINTS = 150  # per curve; a figure has no pixels for more


def finite(curve: Points) -> list[tuple[int, float]]:
    """Return the points whose value is finite."""
    return [(step, float(value)) for step, value in curve if np.isfinite(value)]


def mean_curve(curves: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, mean and standard deviation over the curves, each (S,).

    Each curve is interpolated between its first and last step. The standard deviation is 0 where there is only one curve.
    """
    known = [curve for curve in map(finite, curves) if curve]
    if not known:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    steps = np.unique([step for curve in known for step, _ in curve]).astype(float)
    table = np.array([np.interp(steps, *zip(*curve, strict=True), left=np.nan, right=np.nan) for curve in known])
    count = np.isfinite(table).sum(0)  # at least 1: each step belongs to a curve
    mean = np.nansum(table, 0) / count
    return steps, mean, np.sqrt(np.nansum((table - mean) ** 2, 0) / np.maximum(count - 1, 1))


def smoothed(curve: Points, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Return at most `most` points, each the mean of neighboring points, at their middle step."""
    curve = finite(curve)
    width = -(-len(curve) // most)
    chunks = [curve[start : start + width] for start in range(0, len(curve), width or 1)]
    return [(chunk[len(chunk) // 2][0], float(np.mean([value for _, value in chunk]))) for chunk in chunks]
