"""Entropy minimization and maximum squares: both make the network's target predictions more certain."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dann_experiments.adaptation.companions.companion import Companion
from dann_experiments.adaptation.method import Need, Progress, StepOutputs

ENTROPY_WEIGHT = 1e-3  # Vu et al. 2019, section 4.1
SQUARES_WEIGHT = 0.1  # Chen et al. 2019, section 4
ALPHA = 0.2  # Chen et al. 2019: exponent of the class sizes


class EntropyMinimization(Companion):
    """The mean normalized entropy of the target predictions (Vu et al. 2019, ADVENT, eqs. 2 and 3):

        L = - 1 / (N H W log K) sum over pixels and classes of p log p, from 0 to 1.

    The paper takes the sum over pixels in its equation and the mean in its experiments, to which the weight belongs.
    """

    name = "entropy"
    needs: frozenset[Need] = frozenset({"target_logits"})

    def __init__(self, weight: float | None = None, ramp: float = 0.0) -> None:
        super().__init__(ENTROPY_WEIGHT if weight is None else weight, ramp)

    def loss(self, outputs: StepOutputs, progress: Progress) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return the mean normalized entropy of the target's pixels with data."""
        logs = outputs.target_logits.float().log_softmax(1)
        entropy = -(logs.exp() * logs).sum(1) / math.log(logs.shape[1])
        valid = outputs.target_valid
        if valid is None:
            return entropy.mean(), {}
        return (entropy * valid).sum() / valid.sum().clamp_min(1), {}


class MaximumSquares(Companion):
    """The maximum squares loss with image-wise class weights (Chen et al. 2019, eqs. 4 and 9):

        L = - sum over images, pixels and classes of p^2 / (2 I N_c^alpha N^(1 - alpha)), alpha = 0.2,

    with I images, N pixels with data in the image and N_c of them predicted as class c. Its gradient grows linearly with p, where
    that of the entropy is largest for pixels that are certain already; the weights keep small classes from being given up.
    With alpha = 0 it is minus half the mean of the sum of p^2.
    """

    name = "maximum_squares"
    needs: frozenset[Need] = frozenset({"target_logits"})

    def __init__(self, weight: float | None = None, ramp: float = 0.0, alpha: float = ALPHA) -> None:
        super().__init__(SQUARES_WEIGHT if weight is None else weight, ramp)
        self.alpha = alpha

    def loss(self, outputs: StepOutputs, progress: Progress) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return the loss, from -0.5 K^alpha to 0."""
        logits = outputs.target_logits.float()
        chances = logits.softmax(1).flatten(2)  # (T, K, P)
        valid = torch.ones_like(chances[:, 0]) if outputs.target_valid is None else outputs.target_valid.flatten(1)
        with torch.no_grad():
            predicted = torch.zeros_like(chances).scatter_(1, chances.argmax(1, keepdim=True), 1)
            of_class = (predicted * valid[:, None]).sum(2).clamp_min(1)  # (T, K)
            whole = valid.sum(1, keepdim=True).clamp_min(1)
            weights = 1 / (of_class**self.alpha * whole ** (1 - self.alpha))
        squares = ((chances**2) * valid[:, None]).sum(2)
        return -(squares * weights).sum() / (2 * len(logits)), {}
