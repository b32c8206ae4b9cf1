"""Colour transfer by moments (Reinhard et al. 2001): mean and standard deviation of a target image in a source image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dann_experiments.adaptation.companions.appearance import Images, TargetAppearance, moments_of
from dann_experiments.adaptation.companions.lab import lab_to_rgb, rgb_to_lab
from dann_experiments.adaptation.method import Need

PROBABILITY = (
    0.5  # so that the network goes on seeing the source as it is, on which it is validated; the paper has one picture
)
SMALLEST = 1e-6  # standard deviation of an image of one value, whose deviations are 0

Space = Literal["bands", "lab"]


class MomentMatching(TargetAppearance):
    """Mean and standard deviation of each band of a source image become those of a target image of the batch (eqs. 10, 11):

        x <- (x - mean_s) * std_t / std_s + mean_t.

    `space`: the paper computes this in a space whose axes are not correlated, which bands are. `lab` does it in CIE Lab, for raw
    images in red, green and blue; colours beyond 0..1 are clipped there. `bands`, the default, works for any bands, and gives
    the same for raw as for normalized images, so it is done in the latter.
    """

    name = "moments"

    def __init__(self, probability: float | None = None, space: Space | None = None, seed: int = 0) -> None:
        super().__init__(PROBABILITY if probability is None else probability, seed)
        self.space: Space = space or "bands"
        if self.space == "lab":
            self.needs: frozenset[Need] = frozenset({"raw_images"})

    def like(self, source: Images, target: Images, batch: dict[str, dict[str, Tensor]], drawn: Tensor) -> Tensor:
        """Return the source images with the moments of the target images."""
        if self.space == "bands":
            return transferred(source, target)
        ours, theirs = batch["source"], batch["target"]
        mean, std = theirs["mean"][drawn], theirs["std"][drawn]
        in_lab = (
            Images(rgb_to_lab(source.pixels * ours["std"] + ours["mean"]), source.valid),
            Images(rgb_to_lab(target.pixels * std + mean), target.valid),
        )
        # normalized as target images are, so that with a normalization per domain it looks like one to the network
        return (lab_to_rgb(transferred(*in_lab)) - mean) / std


def transferred(source: Images, target: Images) -> Tensor:
    """Return the source images (S, B, h, w) with mean and standard deviation of the target images, band by band."""
    (own_mean, own_std), (mean, std) = moments_of(source), moments_of(target)
    return torch.addcmul(mean, source.pixels - own_mean, std / own_std.clamp_min(SMALLEST))
