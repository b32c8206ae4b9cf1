"""Test-time augmentation: the mean of the predictions for an image and its mirrored and turned copies.

The copies are symmetries of the square: quarter turns, mirrored or not. Each prediction is turned back before the mean is taken,
so the mean for a turned image is the turned mean (of all symmetries in the set). Letters: N images, B bands, K classes, H x W
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from dann_experiments.config.errors import InputError
from dann_experiments.names import Tta

SPATIAL = (-2, -1)


class Symmetry(NamedTuple):
    """A symmetry of the square: mirror left and right or not, then turn."""

    mirrored: bool
    turns: int
    """Quarter turns counterclockwise, 0 to 3. One or three of them exchange height and width."""

    def of(self, images: Tensor) -> Tensor:
        """Return images (N, B, H, W), mirrored and turned: (N, B, H, W) or (N, B, W, H)."""
        flipped = images.flip(-1) if self.mirrored else images
        return torch.rot90(flipped, self.turns, SPATIAL).contiguous() if self.turns else flipped

    def undone(self, maps: Tensor) -> Tensor:
        """Return the maps of `of(images)` in the position of the images."""
        turned = torch.rot90(maps, -self.turns, SPATIAL) if self.turns else maps
        return turned.flip(-1) if self.mirrored else turned


SYMMETRIES: Mapping[str, Sequence[Symmetry]] = {
    "none": [Symmetry(False, 0)],
    "mirror": [Symmetry(False, 0), Symmetry(True, 0)],
    "d4": [Symmetry(mirrored, turns) for mirrored in (False, True) for turns in range(4)],
}
"""The symmetries of each value of the setting `tta`, and thus the number of forward passes."""


def checked_tta(text: str) -> Tta:
    """Return `text` as a value of the setting `tta`. Raises InputError for any other text."""
    for value in get_args(Tta):
        if value == text:
            return value
    raise InputError(f"tta is {text!r}; it is one of {', '.join(get_args(Tta))}.")


def mean_probabilities(forward: Callable[[Tensor], Tensor], images: Tensor, tta: Tta) -> Tensor:
    """Return the class probabilities (N, K, H, W) of images (N, B, H, W), float32: the mean over the symmetries of `tta`.

    `forward`: returns logits of the size of its images, which need not be square or divisible by anything. The symmetries run
    one after the other, so they take time, but little memory.
    """
    symmetries = SYMMETRIES[tta]
    total: Tensor | None = None
    for symmetry in symmetries:
        probabilities = symmetry.undone(forward(symmetry.of(images)).float().softmax(1))
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total if len(symmetries) == 1 else total.div_(len(symmetries))
