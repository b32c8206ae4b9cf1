"""Schedules of lambda over training progress p = step / total_steps, clamped to 0..1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class LambdaScheduler(ABC):
    """Base class of schedules; lambda is clamped to 0..1."""

    def get_lambda(self, step: float, total_steps: float) -> float:
        """Return lambda (0..1) after `step` of `total_steps`, in epochs or batches. Raises ValueError unless total_steps > 0."""
        if not total_steps > 0:
            raise ValueError(f"total_steps is {total_steps}; it must be above 0")
        return min(max(self.at(min(max(step / total_steps, 0.0), 1.0)), 0.0), 1.0)

    @abstractmethod
    def at(self, progress: float) -> float:
        """Return lambda at `progress` p, 0..1."""


class DANNScheduler(LambdaScheduler):
    """lambda(p) = 2 / (1 + exp(-gamma p)) - 1, with gamma = 10 in the paper (Ganin & Lempitsky 2015, section 4)."""

    def __init__(self, gamma: float = 10.0) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma is {gamma}; it must be a positive number")
        self.gamma = float(gamma)

    def at(self, progress: float) -> float:
        return 2.0 / (1.0 + math.exp(-self.gamma * progress)) - 1.0


class LinearScheduler(LambdaScheduler):
    """lambda(p) = p."""

    def at(self, progress: float) -> float:
        return progress


class ConstantScheduler(LambdaScheduler):
    """lambda(p) = value, in 0..1."""

    def __init__(self, value: float = 1.0) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"value is {value}; it must be in 0..1 (lambda_da scales it)")
        self.value = float(value)

    def at(self, progress: float) -> float:
        return self.value
