"""How sure a prediction is, per pixel. Letters: K classes, h x w pixels, p_k the probability of class k at a pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dann_experiments.names import Confidence

NO_CONFIDENCE = math.nan
"""Value of pixels without data."""
MEANINGS: Mapping[Confidence, str] = {
    "max_probability": "probability of the class, 1 = certain",
    "entropy": "entropy of the probabilities / log K, 0 = certain, 1 = all classes equally likely",
}
"""Description of the band of each kind."""


def confidence_of(probabilities: Tensor, kind: Confidence) -> Tensor:
    """Return the confidence (h, w), 0..1, of class probabilities (K, h, w) that sum to 1.

    max_probability: max_k p_k, which is at least 1 / K; entropy: -sum_k p_k log p_k / log K, where 0 log 0 = 0. The entropy is
    large where the prediction is unsure.
    """
    if kind == "max_probability":
        return probabilities.amax(0).clamp(0, 1)
    return (torch.special.entr(probabilities).sum(0) / math.log(len(probabilities))).clamp(0, 1)
