"""Inputs whose files are the bands of one image: {images: [PATTERN, PATTERN]}, or the scenes of a preset: {preset: NAME}."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from dann_experiments.config.data import DomainDataConfig
from dann_experiments.config.entries import check_entry
from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import local_path
from dann_experiments.config.presets import filled
from dann_experiments.data.samples import find_samples

Input = str | dict[str, Any]
PRESET_KEYS = ("preset", "scene", "root")
WITHOUT_MEANING = ("masks", "region")  # parts of entries that only training takes


def as_mapping(given: Input) -> Input:
    """Return the mapping that a text such as "{images: [a.tif, b.tif]}" is (on a command line), or the input as it is."""
    if not isinstance(given, str) or not given.strip().startswith("{") or os.path.exists(given):
        return given
    try:
        found = yaml.safe_load(given)
    except yaml.YAMLError:
        return given
    return found if isinstance(found, dict) else given


def stacked_inputs(entry: dict[str, Any], key: str) -> list[Path]:
    """Return the images that a mapping names: {images: [...], names, quality, nodata, warp}, or {preset, scene, root}.

    `key`: the setting, for messages. Raises InputError for wrong parts, for files that do not fit, or if there is no image.
    """
    root, entries = Path.cwd(), [entry]
    if "preset" in entry:
        wrong = sorted(set(entry) - set(PRESET_KEYS), key=str)
        texts = [entry[name] for name in PRESET_KEYS if name in entry]
        if wrong or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{key} has the entry {entry}; beside preset it takes scene and root, all of them texts.")
        root = local_path(entry.get("root", "."), f"{key}: root")
        entries = filled(DomainDataConfig(preset=entry["preset"], scene=entry.get("scene")), f"{key}: ").train
        entries = [
            {name: part for name, part in one.items() if name not in WITHOUT_MEANING} if isinstance(one, dict) else one
            for one in entries
        ]
    else:
        check_entry(key, entry)
        named = [name for name in WITHOUT_MEANING if name in entry]
        if named:
            raise InputError(f"{key} has the entry {entry}, whose {named[0]} has no effect here; remove it.")
    images = list(dict.fromkeys(sample.image for sample in find_samples(entries, root.absolute(), key, "no")))
    if not images:
        raise InputError(f"{key} has the entry {entry}, which names no image.")
    return images
