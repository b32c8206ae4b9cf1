"""Companions that change the source images of a batch before the forward pass, and what they share.

Letters: S source and T target images, N of either, B bands, h x w pixels.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dann_experiments.adaptation.companions.companion import Part


class Images(NamedTuple):
    """Images of one domain, and where they have data."""

    pixels: Tensor
    """(N, B, h, w), normalized, 0 where there is no data."""
    valid: Tensor
    """(N, 1, h, w), 1 where the image has data, else 0."""


class Appearance(Part, ABC):
    """Changes source images at random and has no loss; labels stay. Masked means that pixels without data enter no statistics and
    stay 0.

    `probability`: share of the source images that are changed. The random draws have a generator of their own, `seed`, whose
    state is in the checkpoint; their number depends on the number of images alone, so that all processes of a training agree.
    """

    def __init__(self, probability: float, seed: int = 0) -> None:
        super().__init__()
        self.probability = probability
        # torch's generator takes 32 bits; without the name two companions of a run would choose the same images
        self.draws = torch.Generator().manual_seed((seed + zlib.crc32(self.name.encode())) % 2**32)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the random draws."""
        return {"draws": self.draws.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.draws.set_state(state["draws"].cpu())

    def prepare(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the batch with changed source images."""
        given = batch["source"]["image"]
        with torch.no_grad(), torch.autocast(given.device.type, enabled=False):
            source = _images(batch["source"])
            chosen = self.uniform(len(given), device=given.device) < self.probability
            changed = self.changed(source, batch) * source.valid
            images = torch.where(chosen[:, None, None, None], changed.to(given.dtype), given)
        return {**batch, "source": {**batch["source"], "image": images}}

    @abstractmethod
    def changed(self, source: Images, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """Return all source images (S, B, h, w), changed; what stands at pixels without data has no effect."""

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        """Return numbers drawn from 0..1."""
        return torch.rand(shape, generator=self.draws).to(device)


class TargetAppearance(Appearance):
    """Gives each source image something of a target image of the batch, drawn at random."""

    def changed(self, source: Images, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """Return the source images, each changed by a target image; one whose target image has no data at all stays."""
        targets = _images(batch["target"])
        drawn = torch.randint(len(targets.pixels), (len(source.pixels),), generator=self.draws)
        drawn = drawn.to(source.pixels.device)
        target = Images(targets.pixels[drawn], targets.valid[drawn])
        some = target.valid.flatten(1).any(1)[:, None, None, None]
        return torch.where(some, self.like(source, target, batch, drawn), source.pixels)

    @abstractmethod
    def like(
        self, source: Images, target: Images, batch: dict[str, dict[str, Tensor]], drawn: Tensor
    ) -> Tensor:  # fmt: skip
        """Return the source images (S, B, h, w), each changed by the image of `target` (S, B, h, w) of the same place, which is
        that of number `drawn` (S,) in the batch."""


def moments_of(images: Images) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each image and band over its pixels with data, both (N, B, 1, 1)."""
    count = images.valid.sum((2, 3), keepdim=True).clamp_min(1)
    mean = (images.pixels * images.valid).sum((2, 3), keepdim=True) / count
    variance = ((images.pixels - mean) ** 2 * images.valid).sum((2, 3), keepdim=True) / count
    return mean, variance.sqrt()


def _images(part: dict[str, Tensor]) -> Images:
    pixels = part["image"].float()
    valid = part.get("valid")
    return Images(pixels, torch.ones_like(pixels[:, :1]) if valid is None else (valid[:, None] > 0).float())
