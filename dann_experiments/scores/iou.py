"""Intersection over union (Jaccard index), from one confusion matrix for the whole set."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dann_experiments.scores.confusion import as_array, macro_mean, ratio


def class_iou(confusion: Tensor | np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class, hits / (labeled + predicted - hits), (K,) in 0..1.

    `confusion`: (K, K) pixel counts, rows = truth, from `confusion_matrix`. NaN for a class neither labeled nor predicted.

    >>> class_iou(np.array([[6, 2, 0], [3, 1, 0], [0, 0, 0]])).round(3).tolist()
    [0.545, 0.167, nan]
    """
    counts = as_array(confusion)
    hits = np.diag(counts)
    return ratio(hits, counts.sum(0) + counts.sum(1) - hits)


def mean_iou(confusion: Tensor | np.ndarray) -> float:
    """Return the mean of `class_iou` over the classes labeled or predicted, 0..1; NaN if there are none.

    >>> round(mean_iou(np.array([[6, 2, 0], [3, 1, 0], [0, 0, 0]])), 3)
    0.356
    """
    return macro_mean(class_iou(confusion))
