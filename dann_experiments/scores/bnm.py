"""Batch nuclear norm (Cui et al. 2020): measures confidence and diversity of predictions by singular values of their matrix."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from dann_experiments.scores.predictions import PredictionMeans, in_range, means_of


def batch_nuclear_norm(logits: Tensor, valid: Tensor | None = None) -> float:
    """Return the nuclear norm of the softmax matrix (n pixels x K) divided by its maximum, sqrt(n K); higher is better.

    Cui et al. use a training batch; here the whole set is one batch. `logits`: (N, K, ...), such as (N, K, H, W); `valid`:
    (N, ...), 0 where a pixel has no data. The range is 1/K (uniform) to 1 (certain, each class equally often). NaN without valid
    pixels, or if logits are not finite. Raises ValueError for fewer than two classes and for other shapes.

    >>> import torch
    >>> round(batch_nuclear_norm(100 * torch.eye(4)[:, :, None]), 3)
    1.0
    >>> round(batch_nuclear_norm(torch.zeros(2, 4, 8, 8)), 3)
    0.25
    """
    return batch_nuclear_norm_from(means_of(logits, valid))


def batch_nuclear_norm_from(means: PredictionMeans) -> float:
    """Return the score from the means over all predictions."""
    if not means.is_defined:
        return math.nan
    norm = float(np.sqrt(np.maximum(np.linalg.eigvalsh(means.gram), 0.0)).sum())  # sum of the singular values
    return in_range(norm / math.sqrt(means.pixels * means.classes))
