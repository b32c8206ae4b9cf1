"""Maps the ids or colors in mask files to the class ids of the network, by class name."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.config.label_keys import text_of
from dann_experiments.config.presets import IGNORED
from dann_experiments.data.pixels import StoredLabels, colors_of, read_labels
from dann_experiments.data.rasters import Window, changes_values, open_raster

Color = tuple[int, int, int]
MOST_NAMED = 32  # values that a message lists; more are hardly classes


@dataclass(frozen=True)
class VectorRules:
    """How polygons become class ids (see `vector_masks`)."""

    attribute: str | None = None
    """Attribute of the features that holds their class; None = all are of one class."""
    texts: Mapping[str, int] | None = None
    """Value of the attribute -> class id (or ignore_index); None = the values are class names, or ids as in masks."""
    background: int | None = None
    """Class id of pixels outside every polygon; None = they are ignored."""
    all_touched: bool = False
    """Count every pixel that a polygon touches, not only those whose center is in it."""


class UnnamedValues(InputError):
    """A mask holds ids or colors that are no class."""

    told: str = ""
    """What is wrong with the first of them."""
    setting: str = ""
    """The map that would name them: `value_map` or `color_map`; "" if a name would not help."""
    keys: tuple[str, ...] = ()
    """As YAML: the values in the window that was read that need a name there; at most MOST_NAMED and one."""

    @classmethod
    def of(cls, told: str, labels: LabelMap, setting: str, keys: Sequence[str]) -> UnnamedValues:
        """Return the error, whose message has the line of settings to fill in if there is no such map yet."""
        made = cls(told if labels.has(setting) or not keys else told + to_fill_in(labels, setting, keys))
        # not arguments of the constructor: such an exception could not be pickled
        made.told, made.setting, made.keys = told, setting, tuple(keys[: MOST_NAMED + 1])
        return made


@dataclass(frozen=True)
class LabelMap:
    """The label map of a domain. Class ids range from 0 to `num_classes` - 1; pixels of `ignore_index` are ignored."""

    num_classes: int
    ignore_index: int = 255
    ids: Mapping[int, int] | None = None
    """Mask value -> class id (or ignore_index); None = mask values are class ids."""
    colors: Mapping[Color, int] | None = None
    """(red, green, blue) in the mask -> class id (or ignore_index); used instead of `ids`."""
    ignored: frozenset[int] = frozenset()
    """Further mask values that are ignored."""
    settings: str = field(default="", compare=False, repr=False)
    """Prefix of the settings' names in messages: `data.source.` or `data.target.`."""
    vector: VectorRules = VectorRules()
    """For masks that are polygons."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, by id; empty = not known, and no message names them."""

    def has(self, setting: str) -> bool:
        """Return True if this map was given: `value_map` or `color_map`."""
        return (self.ids if setting == "value_map" else self.colors) is not None

    def network_id(self, value: int) -> int | None:
        """Return the class id for a mask value, None if the value is unknown."""
        if value in self.ignored:
            return self.ignore_index
        if self.ids is not None and value in self.ids:
            return self.ids[value]
        if value == self.ignore_index or (self.ids is None and 0 <= value < self.num_classes):
            return value
        return None

    @functools.cached_property
    def table(self) -> np.ndarray:
        """(256,) class id for each 8-bit mask value; -1 if the value is unknown."""
        found = [self.network_id(value) for value in range(256)]
        return np.array([-1 if value is None else value for value in found], np.int16)


def label_map(
    class_names: Sequence[str],
    ignore_index: int,
    value_map: Mapping[int, str] | None,
    color_map: Mapping[Color, str] | None,
    ignore_values: Sequence[int],
    settings: str = "",
) -> LabelMap:
    """Build a domain's label map from the class names of its ids or colors; ids of names that are not classes are ignored."""
    index = {name: position for position, name in enumerate(class_names)}
    return LabelMap(
        len(class_names),
        ignore_index,
        None if value_map is None else {value: index.get(name, ignore_index) for value, name in value_map.items()},
        None if color_map is None else {rgb: index.get(name, ignore_index) for rgb, name in color_map.items()},
        frozenset(ignore_values),
        settings,
        class_names=tuple(class_names),
    )


def vector_rules(
    class_names: Sequence[str],
    ignore_index: int,
    attribute: str | None,
    names: Mapping[str, str] | None,
    background: str | None,
    all_touched: bool,
    settings: str = "",
) -> VectorRules:
    """Build a domain's rules for polygons. `names`: value of the attribute -> class name; other names are ignored.

    Raises InputError if `background` is no class.
    """
    index = {name: position for position, name in enumerate(class_names)}
    if background is not None and background not in index:
        raise InputError(
            f"{settings}label_background is {background!r}, which is not among the classes {list(class_names)}; give one of "
            "them, or null to ignore pixels outside every polygon."
        )
    return VectorRules(
        attribute,
        None if names is None else {text_of(key): index.get(name, ignore_index) for key, name in names.items()},
        None if background is None else index[background], all_touched,
    )  # fmt: skip


def read_mask(path: Path, labels: LabelMap, window: Window | None = None, factor: float = 1.0) -> np.ndarray:
    """Read a window of a mask (None = all of it) as (h, w) uint8 class ids. `factor`: see `read_labels`.

    Pixels that the file marks as unlabeled (NaN, nodata value, mask or alpha band) are ignored unless `value_map` names their
    value; in PNG, GIF and WebP, transparency hides only unknown values. Raises InputError that names the file and the first
    unknown id or color.
    """
    stored = read_labels(path, window, factor)
    try:
        return _network_ids(path, stored, labels)
    except InputError as error:
        with open_raster(path) as opened:  # checked only here, as valid masks do not need it
            lossy = changes_values(opened)
        if not lossy:
            raise
        told = (
            f"{str(error).partition(';')[0].rstrip('.')}. The file has a lossy compression (such as JPEG), which creates such "
            "values at every border; save the mask again from the original labels without loss, for example as PNG."
        )
        raise UnnamedValues.of(told, labels, "", ()) from None


def _network_ids(path: Path, stored: StoredLabels, labels: LabelMap) -> np.ndarray:
    values, hidden = stored.values, stored.hidden
    if labels.colors is not None:
        return _from_colors(path, _colors(path, values, stored.palette, labels), labels, hidden)
    if len(values) == 3 and np.array_equal(values[0], values[1]) and np.array_equal(values[0], values[2]):
        values = values[:1]  # ids written as gray colors
    if len(values) != 1:
        told = (
            f"mask {path} has {len(values)} bands; masks hold one class id per pixel, or colors that {labels.settings}color_map "
            "names."
        )
        if len(values) == 3 and values.dtype == np.uint8:
            raise UnnamedValues.of(told, labels, "color_map", _color_keys(_codes(values)))
        raise InputError(told)
    array = values[0]
    if hidden is not None:
        named = np.isin(array, list(labels.ids or ()))
        if stored.transparent and labels.ids is None:
            named |= np.isin(array, np.arange(labels.num_classes))
        hidden = hidden & ~named
        array = np.where(hidden, labels.ignore_index, array) if array.dtype.kind == "f" else array
    whole = array.dtype.kind in "ui" or (array.dtype.kind == "f" and np.isfinite(array).all() and not (array % 1).any())
    if not whole:
        raise InputError(f"mask {path} holds values that are not whole numbers; masks hold one class id per pixel.")
    if array.dtype == np.uint8 and hidden is None:
        mapped = labels.table[array]
        if mapped.min(initial=0) >= 0:
            return mapped.astype(np.uint8)
    ids, places = np.unique(array, return_inverse=True)
    known = [labels.network_id(int(value)) for value in ids]
    result = np.array([-1 if found is None else found for found in known], np.int16)[places].reshape(array.shape)
    if hidden is not None:
        result[hidden] = labels.ignore_index
    if result.min(initial=0) < 0:
        wrong = int(array[result < 0].min())
        # a map names every id that counts; pixels that are ignored need no name
        unnamed = result < 0 if labels.has("value_map") else result != labels.ignore_index
        keys = [str(int(value)) for value in np.unique(array[unnamed])]
        raise UnnamedValues.of(
            f"mask {path} holds id {wrong}, {_what_is_known(labels, wrong)}", labels, "value_map", keys
        )
    return result.astype(np.uint8)


def _what_is_known(labels: LabelMap, wrong: int) -> str:
    if labels.ids is not None:
        one_bit = " (a file of one bit a pixel holds 0 and 1, not 0 and 255)" * (wrong == 1 and 255 in labels.ids)
        return (
            f"but {labels.settings}value_map knows {sorted(labels.ids)}; add it there{one_bit}, or to "
            f"{labels.settings}ignore_values."
        )
    return (
        f"but classes go from 0 to {labels.num_classes - 1} (model.classes) and {labels.ignore_index} is ignored "
        f"(data.ignore_index); name other ids in {labels.settings}value_map, or list them in {labels.settings}ignore_values."
    )


def to_fill_in(labels: LabelMap, setting: str, keys: Sequence[str], where: str = "here") -> str:
    """Return a sentence with the line of settings that names these values of masks, for the user to fill in, or a question if
    they are so many that the files are hardly masks. `keys`: the values, as YAML; `where` they were found."""
    if len(keys) > MOST_NAMED:
        return f" More than {MOST_NAMED} different ones were found {where}: is it a picture?"
    entries = ", ".join(f"{key}: CLASS" for key in keys)
    names = f" {list(labels.class_names)}" if labels.class_names else ""
    return (
        f" For those found {where}: {labels.settings}{setting}: {{{entries}}}, with one of the classes{names}, or {IGNORED}, for "
        "each CLASS."
    )


def _color_keys(codes: np.ndarray) -> list[str]:
    few = np.unique(codes)[: MOST_NAMED + 1].tolist()  # a picture in the place of a mask has millions
    return [f'"{code >> 16},{code >> 8 & 255},{code & 255}"' for code in few]


def _codes(values: np.ndarray) -> np.ndarray:
    """Return (h, w) int32 color codes of (3, h, w) 8 bit colors: red * 65536 + green * 256 + blue."""
    red, green, blue = values.astype(np.int32)
    return (red << 16) | (green << 8) | blue


def _colors(
    path: Path, values: np.ndarray, palette: Mapping[int, Sequence[int]] | None, labels: LabelMap
) -> np.ndarray:
    """Return (h, w) int32 color codes (see `_codes`)."""
    if palette is not None:
        return _codes(colors_of(values[0], palette))
    if len(values) != 3 or values.dtype != np.uint8:
        raise InputError(
            f"mask {path} has {len(values)} bands of {values.dtype}; with {labels.settings}color_map, masks are 8 bit RGB or "
            "have a palette."
        )
    return _codes(values)


def _from_colors(path: Path, codes: np.ndarray, labels: LabelMap, hidden: np.ndarray | None) -> np.ndarray:
    assert labels.colors is not None
    result = np.full(codes.shape, -1, np.int16)
    for (red, green, blue), index in labels.colors.items():
        result[codes == (red << 16 | green << 8 | blue)] = index
    if hidden is not None:
        result[hidden & (result < 0)] = labels.ignore_index
    unknown = result < 0
    if unknown.any():
        code = int(codes[unknown][0])
        color = (code >> 16, code >> 8 & 255, code & 255)
        told = f"mask {path} holds the color {color}, which {labels.settings}color_map does not name; add it."
        raise UnnamedValues.of(told, labels, "color_map", _color_keys(codes[unknown]))
    return result.astype(np.uint8)
