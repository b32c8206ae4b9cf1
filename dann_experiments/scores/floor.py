"""What a network must exceed to have learned anything: the mean IoU of the best constant prediction, and class shares."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dann_experiments.scores.confusion import as_array, ratio


def constant_iou(confusion: Tensor | np.ndarray) -> float:
    """Return the mean IoU of the best map that is one class everywhere, 0..1; NaN if no pixel is labeled.

    That class has an IoU of its share of the labeled pixels, s, and the other labeled classes have 0. So the best is the most
    frequent class, with a mean of s / K for K labeled classes. `confusion`: (K, K) pixel counts, rows = truth; what was predicted
    does not matter.

    >>> round(constant_iou(np.array([[50, 13], [30, 7]])), 3)
    0.315
    """
    pixels = as_array(confusion).sum(1)
    labeled = int((pixels > 0).sum())
    return float(pixels.max() / pixels.sum() / labeled) if labeled else float("nan")


def true_shares(confusion: Tensor | np.ndarray) -> np.ndarray:
    """Return the share of each class among the labeled pixels, (K,), sum 1; NaN if no pixel is labeled.

    >>> true_shares(np.array([[50, 10], [30, 10]])).tolist()
    [0.6, 0.4]
    """
    counts = as_array(confusion)
    return ratio(counts.sum(1), counts.sum())


def predicted_shares(confusion: Tensor | np.ndarray) -> np.ndarray:
    """Return the share of the labeled pixels that is predicted as each class, (K,), sum 1; NaN if no pixel is labeled.

    >>> predicted_shares(np.array([[50, 10], [30, 10]])).tolist()
    [0.8, 0.2]
    """
    counts = as_array(confusion)
    return ratio(counts.sum(0), counts.sum())


SEEDS_DIFFER_BY = 0.03
"""Scores of runs that differ in their seed alone often differ by as much, 3 points."""


def near_floor(score: float, floor: float) -> bool:
    """Return whether the score of a single run is below its floor or so little above it that the seed may have made the
    difference.

    >>> near_floor(0.326, 0.315), near_floor(0.25, 0.315), near_floor(0.47, 0.315)
    (True, True, False)
    """
    return score - floor < SEEDS_DIFFER_BY
