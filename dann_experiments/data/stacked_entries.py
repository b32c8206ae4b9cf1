"""Entries whose images are made of several files (`stacks`): pairs the files, and makes one virtual raster per image."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import is_remote
from dann_experiments.data import remote
from dann_experiments.data.lists import is_file, under
from dann_experiments.data.stacks import Quality, stack

Located = dict[tuple[str, ...], Path]  # pairing key -> file
OWN_KEYS = ("quality", "nodata", "warp")


def is_stacked(entry: Mapping[str, Any], root: Path) -> bool:
    """Return True if images of the entry are made of several files.

    `images` is then a list of patterns, folders and list files, one per band, or of lists of files, one per image. A mere list of
    files is a list of images. An image with a quality band is a stack, too.
    """
    images = entry["images"]
    several = isinstance(images, list) and any(
        isinstance(part, list) or _names_many(str(part), root) for part in images
    )
    return several or any(entry.get(name) for name in ("quality", "warp")) or entry.get("nodata") is not None


def stacked(
    entry: Mapping[str, Any],
    root: Path,
    key: str,
    report: Callable[[str], None],
    locate: Callable[[Any], Located],
    named: Callable[[Located], Located],
) -> Located:
    """Return a virtual raster for each image of an entry, by its pairing key; report files that lack a partner or do not fit.

    `locate`: finds the files that a part of the entry names; `named`: keeps those that `names` lists, by the first file of each.
    """
    parts = _parts(entry, root, key, locate)
    quality = None if entry.get("quality") is None else locate(entry["quality"]["images"])
    rule = Quality.of(entry.get("quality") or {})
    shown = [*_shown_parts(entry, len(parts)), *([] if quality is None else [entry["quality"]["images"]])]
    every = [*parts, *([] if quality is None else [quality])]
    for part, name in zip(every, shown, strict=True):
        if part and parts[0] and len(next(iter(part))) != len(next(iter(parts[0]))):
            raise InputError(
                f"{key}: {shown[0]} and {name} cannot be paired; give both as folders of equal stems, as patterns with as many "
                "wildcards, or as lists of equal length."
            )
    first = named(parts[0])
    if len(first) == len(parts[0]):  # without `names`, each file must belong to an image
        for part, name in zip(every[1:], shown[1:], strict=True):
            for lonely in (file for own, file in part.items() if own not in first):
                report(f"{key}: {lonely} ({name}) has no partner in {shown[0]}, with which it is to make an image.")
    found: Located = {}
    for own, file in first.items():
        lacking = [name for part, name in zip(every, shown, strict=True) if own not in part]
        if lacking:
            report(
                f"{key}: {file} has no partner in {lacking[0]}; files are paired by the text that wildcards match, by stem, or "
                "by position in a list."
            )
            continue
        try:
            marks = None if quality is None else (quality[own], rule)
            found[own] = stack([part[own] for part in parts], entry.get("nodata"), bool(entry.get("warp")), marks)
        except InputError as error:
            report(f"{key}: {error}")
    return found


def _parts(entry: Mapping[str, Any], root: Path, key: str, locate: Callable[[Any], Located]) -> list[Located]:
    """Return the files of each band, or group of bands."""
    images = entry["images"]
    if not isinstance(images, list):
        return [locate(images)]
    if not any(isinstance(part, list) for part in images):
        if any(_names_many(str(part), root) for part in images):
            return [locate(part) for part in images]
        return [locate(images)]  # a list of images, with a quality band
    if not all(isinstance(part, list) and len(part) == len(images[0]) for part in images):
        raise InputError(
            f"{key}: images is {images}; in a list of lists, each is one image and names as many files as the others."
        )
    return [locate([image[number] for image in images]) for number in range(len(images[0]))]


def _shown_parts(entry: Mapping[str, Any], count: int) -> list[Any]:
    images = entry["images"]
    if isinstance(images, list) and len(images) == count and not isinstance(images[0], list):
        return images
    return [f"file {number} of each image" for number in range(1, count + 1)] if count > 1 else [images]


def _names_many(text: str, root: Path) -> bool:
    """Return whether a part names a group of files: a folder, a list file or a pattern."""
    if is_remote(text):
        return remote.names_many(text)
    path = under(root, text)
    if is_file(path):
        return path.suffix.lower() == ".txt"
    return os.path.isdir(path) or glob.has_magic(text)
