"""How plausible the classes predicted for a set without labels are: shares against a reference or stated ranges, and diversity.

Letters: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

MOST_ODDS = 3.0
"""Factor between the odds of a predicted share and of its reference, from which the share is implausible (docs/guards.md)."""
LEAST_CHANGE = 0.1
"""Difference of shares below which a class is not judged: rare classes differ by large factors between any two places."""
LEAST_SHARE = 1e-3
"""Shares are limited to this and to 1 minus this before their odds are compared."""
LEAST_DIVERSITY = 0.5
"""Fraction of the reference's diversity below which a map has collapsed."""


def share_odds(shares: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return by which factor the odds s / (1 - s) of each share and of its reference differ, (K,), at least 1.

    `shares`, `reference`: (K,) in 0..1. Two classes always have the same factor. It is 1 for a class whose shares differ by less
    than `LEAST_CHANGE`.

    >>> share_odds(np.array([0.4, 0.6]), np.array([0.8, 0.2])).round(3).tolist()
    [6.0, 6.0]
    >>> share_odds(np.array([0.9, 0.08, 0.02]), np.array([0.9, 0.1, 0.0])).tolist()
    [1.0, 1.0, 1.0]
    """
    logs = [_log_odds(shares), _log_odds(reference)]
    factors = np.exp(np.abs(logs[0] - logs[1]))
    return np.where(np.abs(shares - reference) < LEAST_CHANGE, 1.0, factors)


def outside(shares: np.ndarray, class_names: Sequence[str], expected: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Return how far each share is above its expected range, (K,) in -1..1: negative below it, 0 within it and for a class
    without one.

    >>> outside(np.array([0.7, 0.3]), ["ground", "tree"], {"tree": [0.05, 0.25], "ground": [0.8, 0.9]}).round(3).tolist()
    [-0.1, 0.05]
    """
    ranges = [expected.get(name, (0.0, 1.0)) for name in class_names]
    low, high = np.array(ranges, dtype=float).T
    return np.maximum(shares - high, 0.0) - np.maximum(low - shares, 0.0)


def diversity(shares: np.ndarray) -> float:
    """Return the entropy of class shares (K,) divided by its maximum, log K: 1 for equal shares, 0 for one class.

    >>> diversity(np.array([0.5, 0.5])), diversity(np.array([1.0, 0.0]))
    (1.0, 0.0)
    """
    entropy = float(np.sum(-shares * np.log(np.maximum(shares, np.finfo(float).tiny))))
    return abs(entropy) / float(np.log(len(shares)))


def _log_odds(shares: np.ndarray) -> np.ndarray:
    limited = np.clip(shares, LEAST_SHARE, 1 - LEAST_SHARE)
    return np.log(limited / (1 - limited))
