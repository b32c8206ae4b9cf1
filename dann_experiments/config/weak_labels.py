"""All settings of `weak-labels`: the images, the rule, its threshold, and what the masks hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from dann_experiments.config import limits
from dann_experiments.config.data import BANDS, Entry, values_of_nodata
from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import at_least, between, not_empty
from dann_experiments.config.run import TrackingConfig
from dann_experiments.names import IndexName

NEEDED_BANDS: Mapping[str, tuple[str, ...]] = {
    "excess_green": ("red", "green", "blue"),
    "ndvi": ("nir", "red"),
    "ndwi": ("green", "nir"),
}
"""Settings of the bands that a rule needs, in the order in which `data.indices.index_values` takes them."""
COLORS = ("red", "green", "blue", "nir")
MOST_CLASSES = 255  # 255 itself means "ignored"
BAND = at_least(1)


@dataclass(frozen=True)
class WeakLabelsConfig:
    """Masks from a rule: an index of the bands and a threshold, for one image or many. A rule is not the truth: look at the
    pictures of the run before you train on the masks."""

    input: str | list[Entry] = ""
    """An image file, a folder (with its subfolders), a pattern such as 'scenes/*.tif', or a list of these. A single text may also
    be a list, separated by commas or blanks, if there is no file of that name."""
    output: str = ""
    """Path of the mask: a .tif or .png file. For several images or an input folder: a folder, in which the masks are arranged and
    named like the images in their common folder."""
    before: str | list[Entry] | None = None
    """Images of the earlier date, for change_vector: given like input, paired with it by equal stems (file names without suffix);
    one image on each side is a pair whatever the names."""
    rule: IndexName | None = None
    """Index whose values the threshold divides. excess_green: 2g - r - b (Woebbecke et al. 1995), high on green plants; ndvi:
    (nir - red) / (nir + red) (Rouse et al. 1974), high on plants; ndwi: (green - nir) / (green + nir) (McFeeters 1996), high on
    open water; band: the values of one band; change_vector: length of the difference between the bands of two dates. It must be
    given."""
    red: Annotated[int | None, BAND] = None
    """Number of the red band, counted from 1; excess_green and ndvi need it."""
    green: Annotated[int | None, BAND] = None
    """Number of the green band, counted from 1; excess_green and ndwi need it."""
    blue: Annotated[int | None, BAND] = None
    """Number of the blue band, counted from 1; excess_green needs it."""
    nir: Annotated[int | None, BAND] = None
    """Number of the near infrared band, counted from 1; ndvi and ndwi need it."""
    bands: Annotated[list[int] | None, *BANDS] = None
    """Bands, counted from 1: the one of the rule band, or those whose change counts in change_vector (null = all)."""
    nodata: Literal["file"] | float | list[float] = "file"
    """Pixel value or values without data, which become 255; file: the nodata value of the file. The mask and alpha band of a file
    count as well, and so does NaN in any band; []: no values."""
    threshold: Literal["otsu"] | float = "otsu"
    """Value of the index that divides the classes: a number, or otsu (Otsu 1979), which finds the number that separates the
    values into the two most compact groups. It always finds one, also where there is only one class."""
    otsu_over: Literal["all", "image"] = "all"
    """Values that Otsu's method reads. all: those of all images together, for one threshold; image: those of each image alone,
    for a threshold of its own (an image with one class only is then cut in two)."""
    side: Literal["above", "below"] = "above"
    """Side of the threshold that is the foreground. above: values larger than the threshold; below: all other values."""
    margin: Annotated[float, at_least(0)] = 0.0
    """Values within this distance of the threshold, in units of the index, become 255 (ignored): there the rule is least sure."""
    border: Annotated[int, between(0, 256)] = 0
    """Pixels on each side of an edge between the classes that become 255 (ignored); 0 = none."""
    class_names: Annotated[list[str], not_empty("name the classes")] = field(
        default_factory=lambda: ["background", "foreground"]
    )
    """Names of the classes in the order of their ids from 0, as in data.class_names: the masks hold the ids of two of them."""
    foreground: str | None = None
    """Class on the side of the threshold that side names; null = the second of two class names, or the one that is not the
    background."""
    background: str | None = None
    """Class on the other side; null = the first class name that is not the foreground."""
    overwrite: bool = False
    """Replace an output that exists."""
    progress: bool = True
    """Show progress: a bar on a terminal, else a line every 10 %."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def inputs(self) -> list[Entry]:
        """`input` as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    @property
    def befores(self) -> list[Entry]:
        """`before` as a list; empty = none."""
        return [self.before] if isinstance(self.before, str) else list(self.before or ())

    @property
    def nodata_values(self) -> Literal["file"] | tuple[float, ...]:
        """`nodata` as a tuple of values, or "file"."""
        return values_of_nodata(self.nodata)

    @property
    def read_bands(self) -> tuple[int, ...] | None:
        """Numbers of the bands to read, in the order that the index takes; None = all of the file."""
        if named := NEEDED_BANDS.get(str(self.rule)):
            return tuple(getattr(self, color) for color in named)
        return None if self.bands is None else tuple(self.bands)

    @property
    def ids(self) -> tuple[int, int]:
        """Class ids of the background and the foreground."""
        names = self.class_names
        foreground = self.foreground or next(name for name in reversed(names) if name != self.background)
        background = self.background or next(name for name in names if name != foreground)
        return names.index(background), names.index(foreground)

    def __post_init__(self) -> None:
        for key, way_out in (
            ("input", "give an image file, a folder of images or a pattern"),
            ("output", "give a .tif or .png file, or a folder for several images"),
            ("rule", "give excess_green, ndvi, ndwi, band or change_vector"),
        ):
            value = getattr(self, key)
            if not value or (isinstance(value, list) and not all(value)):
                raise InputError(f"{key} is not set; {way_out}.")
        limits.check(self)
        self._check_bands()
        self._check_classes()
        if not isinstance(self.threshold, str) and not math.isfinite(self.threshold):
            raise InputError(f"threshold is {self.threshold}; give a finite number, or otsu.")
        if self.threshold != "otsu" and self.otsu_over != "all":
            raise InputError(
                f"otsu_over is {self.otsu_over}, but threshold is {self.threshold:g}, so it has no effect; leave one out."
            )

    def _check_bands(self) -> None:
        rule = str(self.rule)
        needed = NEEDED_BANDS.get(rule, ())
        missing = [color for color in needed if getattr(self, color) is None]
        if missing:
            example = " ".join(f"--{color} {number}" for number, color in enumerate(COLORS, 1) if color in needed)
            raise InputError(
                f"rule is {rule}, which needs the {' and '.join(needed)} bands, but {' and '.join(missing)} is not set; give "
                f"the numbers of the bands in the file, from 1 (where they are red, green, blue, near infrared: {example})."
            )
        idle = [color for color in COLORS if getattr(self, color) is not None and color not in needed]
        idle += ["bands"] if self.bands is not None and needed else []
        if idle:
            raise InputError(f"{idle[0]} is set, but the rule {rule} does not use it; leave it out.")
        if rule == "band" and (self.bands is None or len(self.bands) != 1):
            raise InputError(
                f"bands is {self.bands}, but the rule band needs one; give its number, from 1 (--bands 1)."
            )
        if rule == "change_vector" and not (self.befores and all(self.befores)):
            raise InputError(
                "before is not set, but the rule change_vector compares two dates; give the earlier images."
            )
        if rule != "change_vector" and self.before is not None:
            raise InputError(f"before is set, but the rule {rule} does not use it; leave it out.")

    def _check_classes(self) -> None:
        names = self.class_names
        if not 2 <= len(set(names)) == len(names) <= MOST_CLASSES:
            raise InputError(f"class_names is {names}; give 2 to {MOST_CLASSES} different names.")
        if len(names) > 2 and self.foreground is None:
            raise InputError(f"foreground is not set; name one of {', '.join(names)}.")
        for key in ("foreground", "background"):
            if (name := getattr(self, key)) is not None and name not in names:
                raise InputError(f"{key} is {name!r}, which is not in class_names; name one of {', '.join(names)}.")
        if self.ids[0] == self.ids[1]:
            raise InputError(
                f"foreground and background are both {names[self.ids[0]]!r}; name two of {', '.join(names)}."
            )
