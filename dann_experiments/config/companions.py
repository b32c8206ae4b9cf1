"""Settings of one companion: a loss on the target beside that of the method, or a change of the source images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import above, at_least, between, check_options, fraction_below

CompanionName = Literal[
    "entropy", "maximum_squares", "weak_labels", "self_training", "style", "moments", "histogram", "fda"
]
APPEARANCES = ("style", "moments", "histogram", "fda")
"""Companions that change the source images and have no loss."""
OPTIONS = {
    "threshold": ("self_training",), "ema_decay": ("self_training",), "probability": APPEARANCES, "band": ("fda",),
    "space": ("moments",),
}  # fmt: skip
"""Options of a companion -> the companions that have it."""


@dataclass(frozen=True)
class CompanionTerm:
    """One companion of the method (docs/companions.md)."""

    name: CompanionName
    """Kind of loss, or of change."""
    weight: Annotated[float | None, at_least(0)] = None
    """Factor of the loss; null = that of its paper (docs/companions.md)."""
    ramp: Annotated[float, between(0, 1)] = 0.0
    """Share of the training in which the weight rises linearly from 0."""
    threshold: Annotated[float | None, between(0, 1)] = None
    """Probability above which a pixel of the teacher's prediction counts as certain (self_training); null = 0.968."""
    ema_decay: Annotated[float | None, above(0), fraction_below(1)] = None
    """Decay of the teacher's average of the weights (self_training); null = 0.99."""
    probability: Annotated[float | None, between(0, 1)] = None
    """Share of the source images that are changed (style, moments, histogram, fda); null = 0.8 for style, 1 for fda, else 0.5."""
    band: Annotated[int | None, between(0, 10**4)] = None
    """Highest frequency that is exchanged, in waves per image (fda); 0 exchanges the mean alone; null = 1."""
    space: Literal["bands", "lab"] | None = None
    """Where moments are matched (moments): bands, as they are; lab: CIE Lab, for images in red, green and blue; null = bands."""

    def check(self, prefix: str) -> None:
        """Raise InputError for an option that this companion does not have."""
        check_options(self, OPTIONS, prefix)
        for option, value in (("weight", self.weight), ("ramp", self.ramp or None)):
            if value is not None and self.name in APPEARANCES:
                raise InputError(
                    f"{prefix}{option} is {value}, but {self.name} changes the source images and has no loss to weigh; remove it "
                    "(probability says how many images are changed)."
                )
