"""Settings that ship with the package, found by name from any folder: recipes here, search spaces in `sweeps/`."""

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
"""Dotted name -> value of what this process takes from the default recipe."""


def settings_file(text: str | Path, key: str = "config file", folder: Path = RECIPES) -> Path:
    """Return the settings file that a user means by a path or by the name of one in `folder`.

    A file of the user's comes first. Otherwise `digits`, `digits.yaml` and `recipes/digits.yaml` all mean the recipe that
    ships with the package.

    Raises:
        InputError: if it is neither, naming what ships.
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
    except (OSError, ValueError):  # a NUL in it, or below a file: whoever opens it reports that
        pass
    return path


def load_or_default(file: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """Return `load_config(file, overrides)`, of the default recipe where `file` is None.

    `report_default` then tells the user so, and `with_origin` adds to an error which of its settings the recipe made.
    """
    from dann_experiments.config.parsing import given_settings, load_config  # which look up names here

    forget_default()
    if file is None:
        for key, value in given_settings(DEFAULT, {}).items():
            if not any(key == other or key.startswith(f"{other}.") for other in overrides):
                _taken[key] = value
    return load_config(DEFAULT if file is None else file, overrides)


def forget_default() -> None:
    """Begin a command that has not loaded any settings yet."""
    _taken.clear()


def report_default(report: Callable[[str], None]) -> None:
    """Call `report` with a line about the default recipe if it is in use."""
    if _taken:
        report(f"No --config, so the recipe {DEFAULT!r} is used.")


def with_origin(message: str) -> str:
    """Return the message of an error with those settings it is about that the user never wrote, but the default recipe."""
    about = message.partition("did you mean")[0]  # what is suggested is not what is wrong
    group = re.match(r"([\w.]+): ", about)  # of settings that do not fit together
    named = [
        f"{key} is {value!r}"
        for key, value in _taken.items()
        if re.search(rf"(?<![\w.]){re.escape(key)}(?!\.?\w)", about) or (group and key.startswith(f"{group[1]}."))
    ]
    if not named:
        return message
    end = "" if message.endswith(".") else "."
    return f"{message}{end} Without --config, these come from the recipe {DEFAULT!r}: {', '.join(named)}."
