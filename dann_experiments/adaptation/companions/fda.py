"""Fourier domain adaptation (Yang & Soatto 2020, FDA): the lowest frequencies of a target image in a source image."""

from __future__ import annotations

import torch
from torch import Tensor

from dann_experiments.adaptation.companions.appearance import Images, TargetAppearance, moments_of

PROBABILITY = 1.0  # the paper changes every source image
BAND = 1


class FourierAdaptation(TargetAppearance):
    """The amplitudes of the lowest frequencies of each source image become those of a target image of the batch, the phases stay
    (eq. 3, with M a square of frequencies from -`band` to `band` in both directions):

        x <- F^-1([M * |F(x_t)| + (1 - M) * |F(x_s)|, phase of F(x_s)]).

    `band` counts waves per image (pixels of the spectrum). The paper gives it as a share of the shorter side, beta: 0.01 to 0.09
    of 512 pixels and more are 5 to 46 waves. On a crop of 80 pixels the paper's 0.01 is band 0, which exchanges the mean alone,
    and above 0.05 (band 4) artefacts appear.

    At frequency 0 the value itself is taken, which is the mean: normalized images have negative means, which the paper's (0 to
    255) have not, and so the result does not depend on the normalization. Pixels without data count as the mean of the others.
    Target images of another size are taken as if resized to that of the source.
    """

    name = "fda"

    def __init__(self, probability: float | None = None, band: int | None = None, seed: int = 0) -> None:
        super().__init__(PROBABILITY if probability is None else probability, seed)
        self.band = BAND if band is None else band

    def like(self, source: Images, target: Images, batch: dict[str, dict[str, Tensor]], drawn: Tensor) -> Tensor:
        """Return the source images with the target images' low frequencies."""
        size = (source.pixels.shape[2], source.pixels.shape[3])
        band = min(self.band, *((side - 1) // 2 for side in (*size, *target.pixels.shape[2:])))
        own, other = (torch.fft.rfft2(_filled(images), norm="forward") for images in (source, target))
        rows = torch.arange(-band, band + 1, device=own.device)[:, None]  # negative ones count from the end
        columns = torch.arange(band + 1, device=own.device)[None]  # the spectrum of a real image is symmetric
        wanted = other[..., rows, columns]
        own[..., rows, columns] = torch.polar(wanted.abs(), own[..., rows, columns].angle())
        own[..., 0, 0] = other[..., 0, 0]
        return torch.fft.irfft2(own, size, norm="forward")


def _filled(images: Images) -> Tensor:
    """Return the images with the mean of the other pixels where they have no data."""
    mean, _ = moments_of(images)
    return torch.where(images.valid > 0, images.pixels, mean)
