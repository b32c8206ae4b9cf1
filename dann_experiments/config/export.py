"""All settings of `export`: the model, and the file that runs without this project."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated

from dann_experiments.config import limits
from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import above, between
from dann_experiments.config.prediction import DOMAIN
from dann_experiments.config.run import TrackingConfig

ONNX, PT2 = ".onnx", ".pt2"


@dataclass(frozen=True)
class ExportConfig:
    """A model as one file that runs without this project."""

    model: str = ""
    """The model: a folder, a file, runs:/ID[/path] or models:/NAME@ALIAS. A checkpoint without the settings of its network needs
    them as a file of settings (`--config`)."""
    source_prefix: str | None = None
    """Prefix of the network's parameter names, such as model or ema_model, in a checkpoint that holds several networks; a full
    stop means names without a prefix. null: take the only network, refuse a file with several."""
    output: str = ""
    """Path of the file: .onnx for ONNX, .pt2 for torch.export."""
    domain: Annotated[str, DOMAIN] = "target"
    """Domain of the images that the file is for, source or target: the model knows the bands and the range of each. target.NAME
    names one of several domains (docs/several-domains.md)."""
    tile_size: Annotated[int | None, between(16, 16384)] = None
    """Side of the square images that the file takes, in pixels, a multiple of the network's stride; null = images of any size
    whose sides are multiples of it, which not every network allows. The QGIS plugin Deepness needs a number."""
    resolution: Annotated[float | None, above(0)] = None
    """Side of a pixel on the ground in centimeters, to which Deepness resamples a map; null = the pixel_size that the model was
    trained with, if it is in meters, else none."""
    overwrite: bool = False
    """Replace an output that exists."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def suffix(self) -> str:
        """Suffix of the output in lower case, .onnx or .pt2."""
        return PurePath(self.output).suffix.lower()

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("model is not set; give a folder, a file, runs:/ID or models:/NAME@ALIAS.")
        if not self.output:
            raise InputError(f"output is not set; give a file that ends with {ONNX} or {PT2}.")
        limits.check(self)
        if self.suffix not in (ONNX, PT2):
            raise InputError(f"output is {self.output!r}; its suffix names the format: {ONNX} or {PT2}.")
