"""Known data sets: `dann_experiments/presets/*.yaml` list the locations of images and masks, and the meaning of labels."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dann_experiments.config.errors import InputError

FOLDER = Path(__file__).resolve().parents[1] / "presets"
KEYS = ("train", "val", "test", "value_map", "color_map", "ignore_values", "bands", "scale", "nodata")  # of a domain
IGNORED = "ignored"  # class name, in a map, of labels that are ignored everywhere
Domain = TypeVar("Domain")


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@functools.cache
def preset(name: str, prefix: str = "") -> dict[str, Any]:
    """Read a preset. Raises InputError for an unknown name; its message puts `prefix` (`data.target.`) before the setting."""
    if name not in preset_names():
        raise InputError(f"{prefix}preset is {name!r}; give one of {', '.join(preset_names())}.")
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def filled(domain: Domain, prefix: str = "") -> Domain:
    """Return the settings of a domain, with unset ones (null or an empty list) taken from its preset.

    Raises InputError for an unknown preset or a wrong scene; messages put `prefix` (`data.target.`) before names of settings.
    """
    settings: Any = domain
    if settings.preset is None:
        if settings.scene is not None:
            raise InputError(f"{prefix}scene is {settings.scene!r}, which has no effect without a preset; remove it.")
        return domain
    known = preset(settings.preset, prefix)
    scene = settings.scene
    if scene is not None and "scene" not in known:
        raise InputError(f"{prefix}scene is {scene!r}, but preset {settings.preset} has no scenes; remove it.")
    scenes = known.get("scene", {})
    scene = scene if scene is not None else scenes.get("default", "*")
    scene = scenes.get("values", {}).get(scene, scene)
    unset = {field.name: field.default for field in dataclasses.fields(settings)}
    changes: dict[str, Any] = {}
    for key in KEYS:
        value = getattr(settings, key)
        if key in known and (value == [] or value == unset[key]):
            changes[key] = [_in_scene(entry, scene) for entry in known[key]] if key in KEYS[:3] else known[key]
    if settings.value_map is not None or settings.color_map is not None:  # the user's labels, of either kind
        changes.pop("value_map", None)
        changes.pop("color_map", None)
    return dataclasses.replace(settings, preset=None, scene=None, **changes)


def _in_scene(entry: Any, scene: str) -> Any:
    if isinstance(entry, dict):
        return {key: _in_scene(value, scene) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_in_scene(value, scene) for value in entry]
    return entry.replace("{scene}", scene) if isinstance(entry, str) else entry
