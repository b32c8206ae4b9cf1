"""Information maximization: the mutual information of pixel and predicted class.

Krause et al. 2010; Shi & Sha 2012; for validation, Musgrave et al. 2022.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from dann_experiments.scores.predictions import PredictionMeans, in_range, means_of


def information_maximization(logits: Tensor, valid: Tensor | None = None) -> float:
    """Return (H(mean p) - mean H(p)) / log K, 0 to 1; higher is better: certain at each pixel, and diverse over the set.

    `logits`: (N, K, ...), such as (N, K, H, W); `valid`: (N, ...), 0 where a pixel has no data. NaN without valid pixels, or if
    logits are not finite. Unlike entropy it does not reward one class everywhere. Raises ValueError for fewer than two classes
    and for other shapes.

    >>> import torch
    >>> sure_and_varied = 100 * torch.eye(3)[:, :, None]
    >>> round(information_maximization(sure_and_varied), 3)
    1.0
    >>> round(information_maximization(sure_and_varied[:1]), 3)
    0.0
    """
    return information_maximization_from(means_of(logits, valid))


def information_maximization_from(means: PredictionMeans) -> float:
    """Return the score from the means over all predictions."""
    if not means.is_defined:
        return math.nan
    mean = means.gram.sum(0) / means.pixels  # mean p: row sums of the outer products are p, because each p sums to 1
    of_mean = -float(np.sum(mean * np.log(np.maximum(mean, np.finfo(float).tiny))))
    return in_range((of_mean - means.entropy) / means.greatest_entropy)
