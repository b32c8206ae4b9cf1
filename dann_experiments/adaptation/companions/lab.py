"""CIE Lab from red, green and blue (sRGB, IEC 61966-2-1, with white D65), and back, on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees
LINEAR_BELOW = 6 / 29  # of f, the cube root of the CIE


def rgb_to_lab(images: Tensor) -> Tensor:
    """Return L (0..100), a and b, (N, 3, h, w), of images in 0..1, which are clipped to that."""
    images = images.clamp(0, 1)
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    x, y, z = (_f(value) for value in _mixed(linear, torch.tensor(TO_XYZ) / torch.tensor(WHITE)[:, None]).unbind(1))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lab_to_rgb(images: Tensor) -> Tensor:
    """Return the images (N, 3, h, w) of `rgb_to_lab`, clipped to 0..1."""
    light, a, b = images.unbind(1)
    y = (light + 16) / 116
    parts = torch.stack([y + a / 500, y, y - b / 200], 1)
    cubes = torch.where(parts > LINEAR_BELOW, parts**3, 3 * LINEAR_BELOW**2 * (parts - 4 / 29))
    linear = _mixed(cubes, torch.linalg.inv(torch.tensor(TO_XYZ)) * torch.tensor(WHITE)).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear).clamp(0, 1)


def _f(values: Tensor) -> Tensor:
    return torch.where(
        values > LINEAR_BELOW**3, values.clamp_min(1e-9) ** (1 / 3), values / (3 * LINEAR_BELOW**2) + 4 / 29
    )


def _mixed(images: Tensor, matrix: Tensor) -> Tensor:
    """Return images (N, 3, h, w) whose bands are sums of the given ones with the rows of `matrix` as weights."""
    return torch.einsum("ij,njhw->nihw", matrix.to(images), images)
