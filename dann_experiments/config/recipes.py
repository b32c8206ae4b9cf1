"""Finds settings that ship with the package by name, from any folder: recipes here, search spaces in `sweeps/`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import local_path

if TYPE_CHECKING:
    from dann_experiments.config.schema import Config

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT = "digits"
_taken: dict[str, Any] = {}
"""Dotted name -> value of the settings that this process takes from the default recipe."""


def settings_file(text: str | Path, key: str = "config file", folder: Path = RECIPES) -> Path:
    """Return the settings file at a path, or the file in `folder` with that name.

    An existing file of the user comes first. Otherwise `digits`, `digits.yaml` and `recipes/digits.yaml` all mean the recipe
    that ships with the package.

    Raises:
        InputError: if there is no such file; lists the names in `folder`.
    """
    path = local_path(text, key)
    if os.path.isfile(path):
        return path
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if str(path.parent) in (".", folder.name) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    try:
        os.stat(path)
    except FileNotFoundError:
        raise InputError(
            f"{key} {path} does not exist; give the path of a file, or one of these names: {', '.join(shipped)}."
        ) from None
    except (OSError, ValueError):  # a NUL in the path, or a file as a folder: opening it reports that
        pass
    return path


def load_or_default(file: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """Return `load_config(file, overrides)`, with the default recipe if `file` is None.

    `report_default` then reports this, and `with_origin` adds to an error which of its settings come from the recipe.
    """
    from dann_experiments.config.parsing import (
        given_settings,
        load_config,
    )  # imported here: that module imports this one

    forget_default()
    if file is None:
        for key, value in given_settings(DEFAULT, {}).items():
            if not any(key == other or key.startswith(f"{other}.") for other in overrides):
                _taken[key] = value
    return load_config(DEFAULT if file is None else file, overrides)


def forget_default() -> None:
    """Reset the record of the default recipe, at the start of a command."""
    _taken.clear()


def report_default(report: Callable[[str], None]) -> None:
    """Call `report` with a line about the default recipe if it is in use."""
    if _taken:
        report(f"No --config, so the recipe {DEFAULT!r} is used.")


def with_origin(message: str) -> str:
    """Add to an error message those of its settings that come from the default recipe, not from the user."""
    about = message.partition("did you mean")[0]  # without the suggestion, whose settings are not wrong
    group = re.match(r"([\w.]+): ", about)  # prefix of messages about several settings of a group
    named = [
        f"{key} is {value!r}"
        for key, value in _taken.items()
        if re.search(rf"(?<![\w.]){re.escape(key)}(?!\.?\w)", about) or (group and key.startswith(f"{group[1]}."))
    ]
    if not named:
        return message
    end = "" if message.endswith(".") else "."
    return f"{message}{end} Without --config, these come from the recipe {DEFAULT!r}: {', '.join(named)}."
