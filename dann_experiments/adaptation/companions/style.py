"""Style randomization: the colours of source images are drawn anew, so that the network learns to do without them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dann_experiments.adaptation.companions.appearance import Appearance, Images, moments_of

PROBABILITY = 0.8  # Chen et al. 2020 (SimCLR), appendix A: of the colour jitter
GREY = 0.2  # the same, of grey
CONTRAST = 0.4  # half of that of the same, whose images are photographs of single objects
BRIGHTNESS = 0.4  # standard deviations of the data


class Style(Appearance):
    """Draws for each changed source image, in this order, in the normalized space:

    1. the order of the bands, each of the B! orders equally often;
    2. with 3 bands, an angle of 0 to 360 degrees by which all colours turn about the grey axis (1, 1, 1) (the hue; brightness and
       saturation as distances along and from that axis stay);
    3. in a fifth of the images grey: each band becomes the mean of all bands;
    4. a contrast of 0.6 to 1.4, the factor of the deviation from the image's own mean, and a brightness of -0.4 to 0.4 that is
       added, the same for all bands.

    What is left is the structure of the image. The default probability is that of the colour jitter of SimCLR (Chen et al. 2020).
    """

    name = "style"
    uses_target = False

    def __init__(self, probability: float | None = None, seed: int = 0) -> None:
        super().__init__(PROBABILITY if probability is None else probability, seed)

    def changed(self, source: Images, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """Return the source images in colours drawn at random."""
        images, device = source.pixels, source.pixels.device
        count, bands = images.shape[:2]
        order = self.uniform(count, bands, device=device).argsort(1)
        angle, grey, contrast, brightness = (
            self.uniform(count, device=device)[:, None, None, None] for _ in range(4)
        )  # fmt: skip
        images = torch.take_along_dim(images, order[:, :, None, None], 1)
        if bands == 3:
            images = turned(images, 2 * math.pi * angle)
        images = torch.where(grey < GREY, images.mean(1, keepdim=True), images)
        mean, _ = moments_of(Images(images, source.valid))
        factor = 1 + CONTRAST * (2 * contrast - 1)
        return mean + factor * (images - mean) + BRIGHTNESS * (2 * brightness - 1)


def turned(images: Tensor, angle: Tensor) -> Tensor:
    """Return images (N, 3, h, w) whose colours are turned by `angle` (N, 1, 1, 1), in radians, about the axis (1, 1, 1).

    Rodrigues' formula, v cos + (k x v) sin + k (k v) (1 - cos), with the unit vector k = (1, 1, 1) / sqrt(3).
    """
    across = (images.roll(1, 1) - images.roll(-1, 1)) / math.sqrt(3)  # k x v
    return images * angle.cos() + across * angle.sin() + images.mean(1, keepdim=True) * (1 - angle.cos())
