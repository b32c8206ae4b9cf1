"""All settings of `suggest-labels`: the comparison whose models are asked, and the number of tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from dann_experiments.config import limits
from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import between
from dann_experiments.config.run import TrackingConfig

MOST_TILES = 1000


@dataclass(frozen=True)
class SuggestLabelsConfig:
    """Which arm to trust without target labels, and the target tiles whose labels would tell most."""

    comparison: str = ""
    """Id of a finished run of `compare`, whose models are asked; it prints its id at the end. It must be given."""
    count: Annotated[int, between(1, MOST_TILES)] = 10
    """Number of tiles to suggest, 1 to 1000."""
    output: str = ""
    """Folder for the images of the tiles, to label them; it must be new or empty. Empty: only list them."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.comparison:
            raise InputError("comparison is not set; give the id of a run of compare.")
        limits.check(self)
        self.tracking.check("tracking.")
