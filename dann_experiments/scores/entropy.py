"""Mean entropy of the predictions: measures uncertainty (Grandvalet & Bengio 2004; for validation, Morerio et al. 2018)."""

from __future__ import annotations

import math

from torch import Tensor

from dann_experiments.scores.predictions import PredictionMeans, in_range, means_of


def mean_entropy(logits: Tensor, valid: Tensor | None = None) -> float:
    """Return the mean of H(p) / log K over all pixels, 0 (certain) to 1 (uniform); lower is better.

    H(p) = -sum_k p_k log p_k for the softmax p at a pixel. `logits`: (N, K, ...), such as (N, K, H, W) or (N, K, 1); `valid`:
    (N, ...), 0 where a pixel has no data. NaN without valid pixels, or if logits are not finite. A network that is certain
    of one class everywhere scores 0. Raises ValueError for fewer than two classes and for other shapes.

    >>> import torch
    >>> round(mean_entropy(torch.zeros(2, 5, 8, 8)), 3)
    1.0
    >>> round(mean_entropy(torch.tensor([[[4.0], [0.0]]])), 3)
    0.13
    """
    return mean_entropy_from(means_of(logits, valid))


def mean_entropy_from(means: PredictionMeans) -> float:
    """Return the score from the means over all predictions."""
    return in_range(means.entropy / means.greatest_entropy) if means.is_defined else math.nan
