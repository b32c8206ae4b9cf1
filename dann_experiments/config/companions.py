"""Settings of one companion: a loss on the target beside that of the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dann_experiments.config.limits import above, at_least, between, check_options, fraction_below

CompanionName = Literal["entropy", "maximum_squares", "weak_labels", "self_training"]
OPTIONS = {"threshold": ("self_training",), "ema_decay": ("self_training",)}
"""Options of a companion -> the companions that have it."""


@dataclass(frozen=True)
class CompanionTerm:
    """One companion of the method (docs/companions.md)."""

    name: CompanionName
    """Kind of loss."""
    weight: Annotated[float | None, at_least(0)] = None
    """Factor of the loss; null = that of its paper (docs/companions.md)."""
    ramp: Annotated[float, between(0, 1)] = 0.0
    """Share of the training in which the weight rises linearly from 0."""
    threshold: Annotated[float | None, between(0, 1)] = None
    """Probability above which a pixel of the teacher's prediction counts as certain (self_training); null = 0.968."""
    ema_decay: Annotated[float | None, above(0), fraction_below(1)] = None
    """Decay of the teacher's average of the weights (self_training); null = 0.99."""

    def check(self, prefix: str) -> None:
        """Raise InputError for an option that this companion does not have."""
        check_options(self, OPTIONS, prefix)
