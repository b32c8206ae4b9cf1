"""Checks the entries of image lists that are mappings: {images: ..., masks: ..., ...}."""

from __future__ import annotations

from typing import Any

from dann_experiments.config.errors import InputError

KEYS = ("images", "masks", "names", "region", "layer", "area", "quality", "nodata", "warp")
QUALITY_KEYS = ("images", "bits", "values")


def _check_items(key: str, entry: dict[str, Any]) -> None:
    """Raise InputError for a mapping of STAC items with wrong parts."""
    assets = entry.get("assets")
    named = assets is None or (isinstance(assets, list) and assets and all(isinstance(one, str) for one in assets))
    texts = all(isinstance(entry.get(part, ""), str) for part in ("items", "mask"))
    if not named or not texts or set(entry) - {"items", "assets", "mask"}:
        raise InputError(
            f"{key} has the entry {entry}; a mapping of STAC items takes items (their file), assets (a list of those "
            "with the image's bands) and mask (an asset), and nothing else."
        )


def check_entry(key: str, entry: dict[str, Any]) -> None:
    """Raise InputError for a mapping with wrong parts; `key`: the setting, for messages."""
    if "items" in entry:
        _check_items(key, entry)
        return
    unknown = sorted(set(entry) - set(KEYS), key=str)
    if unknown or "images" not in entry:
        raise InputError(
            f"{key} has the entry {entry}; a mapping takes images (needed), {', '.join(KEYS[1:-1])} and {KEYS[-1]}"
            + (f", not {unknown[0]}." if unknown else ".")
        )
    for part in ("images", "masks", "names"):
        value = entry.get(part)
        texts: list[Any] = value if isinstance(value, list) else [value]
        if part == "images" and texts and all(isinstance(text, list) and text for text in texts):
            texts = [text for one in texts for text in one]
        if value is not None and not (texts and all(isinstance(text, (str, int)) for text in texts)):
            raise InputError(
                f"{key} has the entry {entry}, whose {part} is {value!r}; give a path, a pattern or a list."
            )
    for part in ("layer", "area"):
        if part in entry and (not isinstance(entry[part], str) or not entry[part] or entry.get("masks") is None):
            names = (
                "the layer of their file"
                if part == "layer"
                else "a file of polygons outside of which nothing is labeled"
            )
            raise InputError(
                f"{key} has the entry {entry}, whose {part} is {entry[part]!r}; give a text, beside masks, that names {names}."
            )
    region = entry.get("region")
    if region is not None:
        whole = isinstance(region, list) and len(region) == 4 and all(type(side) is int for side in region)
        if not whole or not (0 <= region[0] < region[2] and 0 <= region[1] < region[3]):
            raise InputError(
                f"{key} has the entry {entry}, whose region is {region!r}; give [left, top, right, bottom] in pixels."
            )
    _check_stack(key, entry)


def _check_stack(key: str, entry: dict[str, Any]) -> None:
    quality, nodata, warp = entry.get("quality"), entry.get("nodata"), entry.get("warp")
    if quality is not None:
        rules = [] if not isinstance(quality, dict) else [name for name in ("bits", "values") if quality.get(name)]
        known = isinstance(quality, dict) and "images" in quality and set(quality) <= set(QUALITY_KEYS)
        numbers = quality[rules[0]] if known and len(rules) == 1 else None
        most = 15 if rules == ["bits"] else 65535
        if not isinstance(numbers, list) or not all(type(one) is int and 0 <= one <= most for one in numbers):
            raise InputError(
                f"{key} has the entry {entry}, whose quality is {quality!r}; give {{images: PATTERN, bits: [...]}} (0 to 15) or "
                "{images: PATTERN, values: [...]} (0 to 65535): the pixels not to use."
            )
        images = quality["images"]
        texts = images if isinstance(images, list) else [images]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{key} has the entry {entry}, whose quality has the images {images!r}; give a pattern.")
    if nodata is not None and (isinstance(nodata, bool) or not isinstance(nodata, (int, float))):
        raise InputError(f"{key} has the entry {entry}, whose nodata is {nodata!r}; give one number.")
    if warp is not None and not isinstance(warp, bool):
        raise InputError(f"{key} has the entry {entry}, whose warp is {warp!r}; give true or false.")
    if warp and not isinstance(entry["images"], list) and quality is None:
        raise InputError(
            f"{key} has the entry {entry}, whose warp has no effect, as images are not stacked; remove it."
        )
