"""Gradient reversal: identity forward, -lambda times the gradient backward (Ganin & Lempitsky 2015, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Reverse(torch.autograd.Function):
    """The reversal. Its backward is differentiable, too; double backward gives lambda squared."""

    @staticmethod
    def forward(features: Tensor, lambda_now: float) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.lambda_now = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * -ctx.lambda_now, None


class GradientReversal(nn.Module):
    """Returns features unchanged and multiplies their gradient by -`lambda_now`.

    Accepts any shape and floating-point type. `lambda_now` of a call overrides that of the constructor.
    """

    def __init__(self, lambda_now: float = 1.0) -> None:
        super().__init__()
        self.lambda_now = float(lambda_now)

    def forward(self, features: Tensor, lambda_now: float | None = None) -> Tensor:
        return _Reverse.apply(features, self.lambda_now if lambda_now is None else float(lambda_now))  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"lambda_now={self.lambda_now}"
