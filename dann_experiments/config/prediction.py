"""Every setting of `predict`: which model, which images, where the maps go. The strings are their help texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dann_experiments.config.errors import InputError
from dann_experiments.config.schema import MOST_IMAGES, TrackingConfig


@dataclass(frozen=True)
class PredictConfig:
    """A class map of a raster of any size, or of each of many images."""

    model: str = ""
    """The model: a folder, a file, runs:/ID[/path] or models:/NAME@ALIAS. A checkpoint without its network's settings
    beside it needs them as a config (`--config`)."""
    source_prefix: str | None = None
    """The part before the network's own names, such as model or ema_model, where a checkpoint holds several networks; a full
    stop for names without such a part. null takes the only network there is and refuses a file with several."""
    input: str | list[str] = ""
    """An image file, a folder (its subfolders included), a pattern such as 'scenes/*.tif', or a list of these. One text may be
    a list too, with commas or blanks between, if there is no file of that name."""
    output: str = ""
    """Where the map goes: a .tif or .png file; of several images, or of a folder, a folder, in which the maps lie as the images
    do below the folder that they have in common."""
    domain: Literal["target", "source"] = "target"
    """Whose images these are: the model knows how the bands, range and nodata of either are read."""
    bands: list[int] | None = None
    """Bands to read, in this order, counted from 1 (1,2,3), for images whose bands are others than in training; null = as the
    model was trained."""
    nodata: Literal["file"] | float | list[float] | None = None
    """Pixels that hold this value (or one of these) get no class; file = the file's own nodata value. The file's mask and alpha
    band count as well; [] = none of these; null = as the model was trained."""
    file_pixel_size: float | None = None
    """Size of the images' pixels where they are not georeferenced, for a model that was trained on pixels of one size; null = as
    the model was trained."""
    tile_size: int = 512
    """Pixels along a side of what the network sees at a time; rounded up to what the network can take."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share, at most half a tile; null = a quarter of a tile. 0 = no blending."""
    batch_size: int = 4
    """Tiles a forward."""
    probabilities: bool = False
    """Also write OUTPUT_probabilities.tif: a band a class, value / 254 = probability."""
    overwrite: bool = False
    """Replace an output that exists."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    progress: bool = True
    """Show how far it is: a bar on a terminal, else a line every 10 %."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def inputs(self) -> list[str]:
        """`input` as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    @property
    def nodata_values(self) -> Literal["file"] | tuple[float, ...] | None:
        """`nodata` as values, or file; None = the model's own."""
        if self.nodata is None:
            return None
        if self.nodata == "file":
            return "file"
        return tuple(self.nodata) if isinstance(self.nodata, list) else (float(self.nodata),)

    @property
    def shared(self) -> int:
        """`overlap`, or what its null means."""
        return self.tile_size // 4 if self.overlap is None else self.overlap

    def __post_init__(self) -> None:
        for key, what in (
            ("model", "give a folder, a file, runs:/ID or models:/NAME@ALIAS"),
            ("input", "give an image file, a folder of images or a pattern"),
            ("output", "give a .tif or .png file, or a folder for several images"),
        ):
            value = getattr(self, key)
            if not value or (isinstance(value, list) and not all(value)):
                raise InputError(f"{key} is not given; {what}.")
        if self.bands is not None and (not self.bands or min(self.bands) < 1):
            raise InputError(f"bands is {self.bands}; name bands counted from 1.")
        if self.file_pixel_size is not None and not 0 < self.file_pixel_size < float("inf"):
            raise InputError(f"file_pixel_size is {self.file_pixel_size}; give a number above 0.")
        if not 16 <= self.tile_size <= 16384:
            raise InputError(f"tile_size is {self.tile_size}; give 16 to 16384 pixels.")
        if not 0 <= self.shared <= self.tile_size // 2:
            raise InputError(
                f"overlap is {self.overlap}; give 0 to {self.tile_size // 2}, half of tile_size ({self.tile_size})."
            )
        if not 1 <= self.batch_size <= MOST_IMAGES:
            raise InputError(f"batch_size is {self.batch_size}; give a number from 1 to {MOST_IMAGES}.")
