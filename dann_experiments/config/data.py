"""Settings of the images and masks of both domains."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from dann_experiments.config import limits
from dann_experiments.config.entries import check_entry
from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import above, at_least, between, not_empty
from dann_experiments.config.presets import IGNORED, filled
from dann_experiments.config.run import MOST_PROCESSES
from dann_experiments.names import DOMAINS, TARGET_LABELLED, Domain, OneDomain, SetName

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_IMAGES = 100_000  # upper limit of batch sizes; guards against allocating huge index lists
BANDS = (not_empty("name bands counted from 1"), replace(at_least(1), way_out="name bands counted from 1"))
Entry = str | dict[str, Any]
ENTRIES = ("train", "val", "test", "train_labelled", "weak_labels")
OF_ALL_DOMAINS = (
    "domains", "batch_size", "sampling", "sampling_temperature", "labelled_count", "labelled_batch_size",
)  # fmt: skip
"""Settings of the source or target that its named domains cannot have of their own."""


def values_of_nodata(nodata: str | float | list[float]) -> Literal["file"] | tuple[float, ...]:
    """Return a setting `nodata` as a tuple of values, or "file".

    >>> values_of_nodata(0), values_of_nodata([0, 255]), values_of_nodata("file")
    ((0.0,), (0, 255), 'file')
    """
    if isinstance(nodata, str):
        return "file"
    return tuple(nodata) if isinstance(nodata, list) else (float(nodata),)


@dataclass(frozen=True)
class DomainDataConfig:
    """The images of one domain, and how their files are read. A preset fills in settings that are not set here."""

    name: str | None = None
    """Name of this domain in the run; null = from its preset or its first training entry."""
    preset: str | None = None
    """A known data set: loveda, potsdam, vaihingen, openearthmap, inria, landcoverai, cityscapes, gta5; or the scenes of a
    satellite: landsat_c2, sentinel2_l2a, sentinel2_l2a_before_0400."""
    scene: str | None = None
    """Part of the preset's data set (LoveDA: Urban or Rural; Inria: a city; OpenEarthMap: a region); null = its default."""
    root: str | None = None
    """Folder that the entries of this domain are relative to; null = data.root."""
    domains: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Several domains: name -> the settings of this group in which it differs (train, val, test, preset, bands, value_map, ...).
    The domain classifier then has one class per domain, and scores are also logged for each domain
    (docs/several-domains.md). {} = one domain."""
    train: list[Entry] = field(default_factory=list)
    """Training images. Target images need no masks; masks listed for them are not read. An entry is a CSV manifest (columns
    image, mask, split; paths relative to it), a folder with images/ and masks/ with equal file stems, a glob pattern, a list
    file (.txt, one path per line), an image file, or a mapping {images: ..., masks: ...} of folders, patterns, list files or
    files; patterns are paired by the parts that their wildcards match. The mapping also takes names (a list, or a file of names,
    to keep), region ([left, top, right, bottom] in pixels of the file) and, for masks that are polygons (docs/vector-labels.md),
    layer and area. A list of patterns or folders in images stacks them: their files are the bands of one image; quality, nodata
    and warp say how (docs/bands-in-files.md). A file of STAC items (.json) or a mapping {items: FILE, assets: [ASSET, ...],
    mask: ASSET} stands for the images that are assets of its items (docs/data.md)."""
    val: list[Entry] = field(default_factory=list)
    """Validation images; those with masks are scored after each epoch."""
    test: list[Entry] = field(default_factory=list)
    """Held-out images, scored once after training."""
    train_labelled: list[Entry] = field(default_factory=list)
    """Only for the target: a few training images with masks, whose labels join the segmentation loss of `adapt`, in DANN and in
    the control alike (docs/few-labels.md). They may be in train as well."""
    labelled_count: Annotated[int | None, at_least(0)] = None
    """Number of images of train_labelled to use, the first ones (of each domain, if there are several); null = all."""
    labelled_batch_size: Annotated[int, between(1, MOST_IMAGES)] = 4
    """Images of train_labelled per training step."""
    weak_labels: list[Entry] = field(default_factory=list)
    """Only for the target: images of train with masks that are not truth, such as those of the command weak-labels. Only the
    companion weak_labels uses them (docs/weak-labels.md). Images of train that are not here are left out of its loss. Masks for
    the images of val and test may be here, too: an arm of `compare` scores them, which tells what the rule alone is worth."""
    bands: Annotated[list[int] | None, *BANDS] = None
    """Bands to read, in this order, counted from 1; null = all."""
    scale: Literal["type", "percentiles"] | list[float] = "type"
    """Range of values that is mapped to 0..1. type: the range of 8 or 16 bit; percentiles: the 2nd to 98th percentile of the
    training windows, per band; [LOW, HIGH]: this range (for float, signed and 12 bit images)."""
    nodata: Literal["file"] | float | list[float] = "file"
    """Pixel value or values without data, which count nowhere; file: the nodata value of the file. The mask and alpha band of a
    file count as well, and so does NaN in any band; []: no values."""
    nodata_bands: Literal["any", "all"] | None = None
    """Bands that must hold a nodata value for a pixel to have no data: any of them, or all. null: all for 8 bit images, where 0
    and 255 are also colors; any for other types, where fill values would be mistaken for measurements."""
    ignore_values: list[int] = field(default_factory=list)
    """Mask values that count nowhere, in addition to data.ignore_index."""
    value_map: Annotated[dict[int, str] | None, not_empty("name the values, or null to take them as class ids")] = None
    """Mask value -> class name; null = the values are class ids. A name that is not in data.class_names counts nowhere."""
    color_map: dict[str, str] | None = None
    """"RED,GREEN,BLUE" -> class name, for masks in colors."""
    label_attribute: Annotated[str | None, not_empty("name an attribute, or null")] = None
    """Attribute that holds the class of polygons, where masks are GeoJSON, GeoPackage or Shapefile (docs/vector-labels.md); null
    = all are of one class, the only one besides label_background. COCO and YOLO files name their classes themselves."""
    label_map: Annotated[dict[str, str] | None, not_empty("name the values, or null to take them as class names")] = (
        None
    )
    """Value of label_attribute, or category of COCO and YOLO -> class name; null = texts are class names, numbers are those of
    masks (value_map, else class ids). A name that is not in data.class_names counts nowhere; "": features without a value."""
    label_background: str | None = None
    """Class of the pixels outside every polygon; null = they count nowhere."""
    label_all_touched: bool = False
    """Draw polygons onto every pixel that they touch; false: onto those whose center is in them."""
    pixel_size: Annotated[float | None, above(0)] = None
    """Resample images to pixels of this size, in the unit of the files' CRS (meter, degree), so that two sensors agree; null =
    keep the files' pixels."""
    file_pixel_size: Annotated[float | None, above(0)] = None
    """Pixel size of files that are not georeferenced."""
    augmentation: Literal["none", "light", "color", "strong"] = "none"
    """Augmentation of training images. light: flips and quarter turns; color: also color; strong: also color, scale and blur."""
    batch_size: Annotated[int, between(1, MOST_IMAGES)] = 8
    """Images per training step."""
    sampling: Literal["shuffled", "balanced", "rare_classes"] = "shuffled"
    """How source items are drawn. shuffled: each once per epoch; balanced: first a class, all equally often, then an item that
    holds it; rare_classes: the same, rare classes more often (Hoyer et al. 2022). A crop then holds a pixel of the drawn class
    (docs/losses.md)."""
    sampling_temperature: Annotated[float, above(0)] = 0.01
    """Temperature of rare_classes: the smaller, the more often the rarest. 0.01 is the value of the paper."""

    @property
    def class_names(self) -> list[str] | None:
        """The distinct class names in the label maps, in the order of ids; None without a map.

        The background of polygons comes first, unless a map for masks names it."""
        named = self.value_map if self.value_map is not None else self.color_map
        if named is None and self.label_map is None:
            return None
        ordered = [name for _, name in sorted((self.value_map or {}).items())] or list((self.color_map or {}).values())
        if self.label_background is not None and self.label_background not in ordered:
            ordered = [self.label_background, *ordered]
        ordered += list((self.label_map or {}).values())
        return [name for name in dict.fromkeys(ordered) if name != IGNORED]

    @property
    def colors(self) -> dict[tuple[int, int, int], str] | None:
        """`color_map` with keys (red, green, blue); None without a map."""
        return None if self.color_map is None else {_color(key, ""): name for key, name in self.color_map.items()}

    @property
    def nodata_values(self) -> Literal["file"] | tuple[float, ...]:
        """`nodata` as a tuple of values, or "file"."""
        return values_of_nodata(self.nodata)

    def check(self, prefix: str) -> None:
        """Raise InputError for settings that contradict each other or have wrong parts."""
        filled(self, prefix)  # raises for an unknown preset or a wrong scene
        if self.value_map is not None and self.color_map is not None:
            raise InputError(f"{prefix}value_map and {prefix}color_map are both set; keep one.")
        seen: dict[tuple[int, int, int], str] = {}
        for key in self.color_map or ():
            color = _color(key, prefix)
            if color in seen:
                raise InputError(
                    f"{prefix}color_map has the keys {seen[color]!r} and {key!r}, which are one color; keep one."
                )
            seen[color] = key
        if isinstance(self.scale, list) and (
            len(self.scale) != 2 or not -float("inf") < self.scale[0] < self.scale[1] < float("inf")
        ):
            raise InputError(
                f"{prefix}scale is {self.scale}; give [LOW, HIGH] with LOW below HIGH, or type, or percentiles."
            )
        if self.file_pixel_size is not None and self.pixel_size is None:
            raise InputError(
                f"{prefix}file_pixel_size has no effect without pixel_size, the size to resample to; remove it."
            )
        for split in ENTRIES:
            _check_entries(f"{prefix}{split}", getattr(self, split))
        if self.domains:
            self._check_domains(prefix)

    def _check_domains(self, prefix: str) -> None:
        for split in ENTRIES:
            if getattr(self, split):
                raise InputError(
                    f"{prefix}{split} and {prefix}domains are both set; list the images of each domain in "
                    f"{prefix}domains.NAME.{split}."
                )
        if self.batch_size < len(self.domains):
            raise InputError(
                f"{prefix}batch_size is {self.batch_size}, fewer than the {len(self.domains)} domains in {prefix}domains, of "
                "which each batch holds images; give at least as many."
            )
        for name, given in self.domains.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}", str(name)):
                raise InputError(
                    f"{prefix}domains has the name {name!r}; give up to 50 letters, digits, _ and - (it is part of metric names)."
                )
            own = sorted(set(given or {}) & set(OF_ALL_DOMAINS))
            if own:
                raise InputError(
                    f"{prefix}domains.{name}.{own[0]} cannot be set for one domain; set {prefix}{own[0]} for all."
                )
            limits.check(self.named(name), f"{prefix}domains.{name}.")

    def named(self, name: str) -> DomainDataConfig:
        """Return the settings of one of `domains`: its own, and those of this group for the rest."""
        own = self.domains[name] or {}
        inherited: dict[str, Any] = {"domains": {}, "name": None}
        if {"value_map", "color_map"} & set(own):  # labels of another kind replace those of the group
            inherited |= {"value_map": None, "color_map": None}
        return replace(self, **{**inherited, **own})


@dataclass(frozen=True)
class EmbeddedDataConfig:
    """Digits on photographs, made from installed packages: a real data set for first trials."""

    name: Literal["digits", "digits_classes"] | None = None
    """digits: stroke or background; digits_classes: which digit; null = no embedded data, your own files."""
    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    """Seed that distributes digits and photograph areas among the sets."""
    folder: str | None = None
    """Folder where the data set is built once; null = the user's cache folder."""


@dataclass(frozen=True)
class DataConfig:
    """Images and masks of both domains."""

    embedded: EmbeddedDataConfig = field(default_factory=EmbeddedDataConfig)
    root: str | None = None
    """Folder that all entries are relative to; null = the embedded data if it is used, else the current folder."""
    source: DomainDataConfig = field(default_factory=DomainDataConfig)
    target: DomainDataConfig = field(default_factory=DomainDataConfig)
    oracle: list[Entry] | dict[str, list[Entry]] = field(default_factory=list)
    """Labeled training images of the target, used only by the oracle of `compare`; a mapping {NAME: images} for several target
    domains. [] = no oracle."""
    class_names: list[str] | None = None
    """Class names, index = class id. Both domains refer to them: value_map or color_map of a domain maps its labels to these
    names. null = the names in the source's map in the order of its ids, else class_0, class_1, ..."""
    ignore_index: Annotated[int, between(0, 255)] = 255
    """Mask value that counts neither in losses nor in metrics. Masks are 8 bit."""
    normalization: Literal["fixed", "domain"] = "fixed"
    """fixed: by data.mean and data.std; domain: each domain by its own mean and standard deviation per band, computed once
    over its training windows and saved with the model."""
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    """Mean per band of images scaled to 0..1, for normalization fixed. The default is ImageNet's."""
    std: Annotated[list[float], above(0)] = field(default_factory=lambda: list(IMAGENET_STD))
    """Standard deviation per band of images scaled to 0..1. The default is ImageNet's."""
    window_size: Annotated[int | None, at_least(8)] = None
    """Cut images into square windows of this many pixels; each is one item of an epoch, and only windows are read. null = whole
    images, but windows of 1024 pixels from images above 2048 x 2048 pixels."""
    windows: Literal["grid", "random"] = "grid"
    """Position of the training windows: side by side, or drawn once at random (by the seed)."""
    window_count: Annotated[int | None, between(1, 10**7)] = None
    """Number of random windows per domain; null = as many as the grid has."""
    crop_size: Annotated[int | None, at_least(8)] = None
    """Train on a random square crop of this many pixels from each item, a new one in each epoch; null = whole items."""
    pad_to_crop: bool = True
    """Pad training images smaller than crop_size, at a random position, with pixels that count as nodata; false: refuse such
    images."""
    eval_batch_size: Annotated[int | None, between(1, MOST_IMAGES)] = None
    """Images per validation step; null = the training batch size."""
    num_workers: Annotated[int | None, between(0, MOST_PROCESSES)] = None
    """Processes that load the images of each set; 0 = the training process itself. null: on a CPU 0, because training needs the
    cores; with a GPU up to 4, depending on the cores. Changes no result."""
    memory_gb: Annotated[float, between(0, 10**9)] = 4.0
    """Gigabytes of decoded images to keep in memory, all sets together, so that they are decoded once; 0 = keep none."""
    disk_cache_gb: Annotated[float, between(0, 10**9)] = 10.0
    """Gigabytes of decoded images to keep in the user's cache folder, of all runs together, so that sets above 0.25 GB are
    decoded once per machine and take no memory. At least as much space as a set takes stays free; 0 = keep none. Changes no
    result."""

    @functools.cached_property
    def written(self) -> Mapping[OneDomain, DomainDataConfig]:
        """The settings of every domain as set, sources first; the order is that of the labels of a domain classifier."""
        found: dict[OneDomain, DomainDataConfig] = {}
        for role in DOMAINS:
            group: DomainDataConfig = getattr(self, role)
            named = {OneDomain(role, name): group.named(name) for name in group.domains}
            found |= named or {OneDomain(role): group}
        return found

    @functools.cached_property
    def domains(self) -> Mapping[OneDomain, DomainDataConfig]:
        """`written`, with unset settings taken from the domains' presets."""
        return {one: filled(settings) for one, settings in self.written.items()}

    def of_role(self, role: Domain) -> Mapping[OneDomain, DomainDataConfig]:
        """Return those of `domains` that are the source, or the target."""
        return {one: settings for one, settings in self.domains.items() if one.role == role}

    def entries(self, name: SetName) -> list[Entry]:
        """Return what the settings list for a set, of all its domains or of one."""
        return [
            entry for one, settings in self.domains.items()
            if one == name.one or (one.role == name.domain and name.member is None)
            for entry in getattr(settings, name.split)
        ]  # fmt: skip

    def check(self, prefix: str) -> None:
        """Raise InputError for settings that contradict each other."""
        self._check_oracle(prefix)
        for one, settings in self.of_role("source").items():
            for key in ("train_labelled", "weak_labels"):
                if getattr(settings, key):
                    raise InputError(
                        f"{one.key}.{key} is for the target; list labeled source images in {one.key}.train."
                    )
        if self.target.labelled_count is not None and not self.entries(TARGET_LABELLED):
            raise InputError(
                f"{prefix}target.labelled_count has no effect, because {prefix}target.train_labelled lists no images."
            )
        if self.target.sampling != "shuffled":
            raise InputError(
                f"{prefix}target.sampling is {self.target.sampling}, which needs labels of training images; set "
                f"{prefix}source.sampling, or leave it out."
            )
        if self.window_count is not None and self.windows == "grid":
            raise InputError(
                f"{prefix}window_count has no effect with {prefix}windows grid; remove it, or set windows to random."
            )
        if self.crop_size is not None and self.window_size is not None and self.crop_size > self.window_size:
            raise InputError(
                f"{prefix}crop_size is {self.crop_size}, larger than {prefix}window_size {self.window_size}; crops are cut "
                "from windows."
            )
        if len(self.mean) != len(self.std):
            raise InputError(
                f"{prefix}mean has {len(self.mean)} values, {prefix}std {len(self.std)}; give one per band to both."
            )
        if not all(abs(value) < float("inf") for value in self.mean):  # NaN fails too
            raise InputError(f"{prefix}mean is {self.mean}; give finite numbers.")

    def _check_oracle(self, prefix: str) -> None:
        names = list(self.target.domains)
        if not isinstance(self.oracle, dict):
            if self.oracle and names:
                raise InputError(
                    f"{prefix}oracle is a list, but the target has the domains {names}; give a mapping {{NAME: images}}."
                )
            _check_entries(f"{prefix}oracle", self.oracle)
            return
        for name, entries in self.oracle.items():
            if name not in names:
                raise InputError(
                    f"{prefix}oracle names the domain {name!r}; "
                    + (
                        f"those of the target are {names}."
                        if names
                        else "the target has only one: give a list of images."
                    )
                )
            _check_entries(f"{prefix}oracle.{name}", entries)


def _color(text: str, prefix: str) -> tuple[int, int, int]:
    """Parse a key of a color map into (red, green, blue)."""
    try:
        red, green, blue = (int(part) for part in str(text).split(","))
    except ValueError:
        raise InputError(f'{prefix}color_map has the key {text!r}; give colors as "RED,GREEN,BLUE".') from None
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise InputError(f"{prefix}color_map has the key {text!r}; red, green and blue go from 0 to 255.")
    return red, green, blue


def _check_entries(key: str, entries: list[Entry]) -> None:
    """Raise InputError for an entry that is a mapping with wrong parts."""
    for entry in entries:
        if not isinstance(entry, str):
            check_entry(key, entry)
