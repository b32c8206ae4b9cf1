"""Settings of the segmentation loss: a sum of weighted terms."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Annotated, Literal

from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import above, at_least, check_options, fraction_below

LossName = Literal["cross_entropy", "dice", "jaccard", "tversky", "focal", "lovasz"]
NAMES: tuple[str, ...] = typing.get_args(LossName)
OPTIONS = {
    "label_smoothing": ("cross_entropy",),
    "gamma": ("focal", "tversky"),
    "alpha": ("tversky",),
    "beta": ("tversky",),
}
"""Options of a term -> the losses that have it."""


@dataclass(frozen=True)
class LossTerm:
    """One term of the segmentation loss (docs/losses.md)."""

    name: LossName = "cross_entropy"
    """Kind of loss."""
    weight: Annotated[float, above(0)] = 1.0
    """Factor of the term."""
    label_smoothing: Annotated[float | None, fraction_below(1)] = None
    """Share of the label that is spread over all classes (cross_entropy); null = 0."""
    gamma: Annotated[float | None, at_least(0)] = None
    """Exponent. focal: of 1 - p, null = 2; tversky: of the loss, at least 1, null = 1."""
    alpha: Annotated[float | None, at_least(0)] = None
    """Weight of false positives (tversky); null = 0.5."""
    beta: Annotated[float | None, at_least(0)] = None
    """Weight of false negatives (tversky); null = 0.5."""

    def check(self, prefix: str) -> None:
        """Raise InputError for an option that this loss does not have."""
        check_options(self, OPTIONS, prefix)
        if self.name == "tversky" and not (self.gamma is None or self.gamma >= 1):
            raise InputError(
                f"{prefix}gamma is {self.gamma}; give 1 or more: below 1 the gradient is infinite at loss 0."
            )
        if self.alpha == 0 and self.beta == 0:
            raise InputError(f"{prefix}alpha and {prefix}beta are both 0, which makes every loss 0; raise one.")
