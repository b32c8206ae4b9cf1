"""Random augmentation of training images with torchvision's transforms; image, mask and validity change together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

Strength = Literal["none", "light", "color", "strong"]


class _QuarterTurn(v2.Transform):
    """Turns square images by 0, 90, 180 or 270 degrees, others by 0 or 180."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        turns = int(torch.randint(4, ()))
        return {"turns": turns if height == width else turns // 2 * 2}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _like(inpt, torch.rot90(inpt, params["turns"], (-2, -1)).contiguous())


class _BandJitter(v2.Transform):
    """Changes gain and offset of each band at random, for images that are not RGB."""

    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        bands = flat_inputs[0].shape[0]
        return {"gain": 0.7 + 0.6 * torch.rand(bands, 1, 1), "offset": 0.2 * torch.rand(bands, 1, 1) - 0.1}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _like(inpt, (inpt * params["gain"] + params["offset"]).clamp(0, 1))


def augmented(
    image: Tensor, mask: Tensor | None, valid: Tensor | None, strength: Strength
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return image (B, h, w) in 0..1, mask (h, w) and validity (h, w), augmented together with torch's random state.

    light: flips and quarter turns. color: also gain, offset and, of 3 bands, hue and saturation. strong: also random crops of 0.5
    to 1 of the area, resized to full size, and blur.
    """
    if strength == "none":
        return image, mask, valid
    size = (image.shape[1], image.shape[2])
    changes: list[Any] = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), _QuarterTurn()]
    if strength == "strong":
        changes.append(v2.RandomResizedCrop(size, scale=(0.5, 1.0), ratio=(0.9, 1.1), antialias=True))
    if strength in ("color", "strong"):
        color = v2.ColorJitter(0.3, 0.3, 0.3, 0.05) if image.shape[0] == 3 else _BandJitter()
        changes.append(v2.RandomApply([color], 0.8))
    if strength == "strong":
        changes.append(v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], 0.3))
    given: dict[str, Tensor] = {"image": tv_tensors.Image(image)}
    if mask is not None:
        given["mask"] = tv_tensors.Mask(mask)
    if valid is not None:
        given["valid"] = tv_tensors.Mask(valid)
    changed = v2.Compose(changes)(given)
    return (
        changed["image"].as_subclass(Tensor),
        None if mask is None else changed["mask"].as_subclass(Tensor),
        None if valid is None else changed["valid"].as_subclass(Tensor),
    )


def _like(given: Any, changed: Tensor) -> Any:
    """Return `changed` wrapped in the tensor type (image or mask) of `given`."""
    return tv_tensors.wrap(changed, like=given)  # pyright: ignore[reportCallIssue]
