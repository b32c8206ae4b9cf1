"""Limits of settings, written at the field: `lr: Annotated[float, above(0)] = 1e-3`.

`check` walks through all settings of a program; its errors name the dotted key. `--help` and docs/settings.md show the same
limits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dann_experiments.config.errors import InputError


@dataclass(frozen=True)
class Limit:
    """A condition on a value in addition to its type."""

    text: str
    """Text in the help: "above 0"."""
    allows: Callable[[Any], bool]
    """Returns whether a value (never None) is within the limit."""
    way_out: str
    """End of the error message: "give a number above 0"."""


class Field(NamedTuple):
    """A field of a settings class."""

    name: str
    """Name of the field; dotted in a tree of classes."""
    type: Any
    """Type without limits."""
    limits: tuple[Limit, ...]


def above(bound: float, infinite: bool = False) -> Limit:
    """Limit numbers to those above `bound`."""
    return _numbers(f"above {bound}", f"above {bound}", lambda n: bound < n and (infinite or n < math.inf))


def at_least(bound: float) -> Limit:
    """Limit numbers to `bound` and more."""
    return _numbers(f"at least {bound}", f"of at least {bound}", lambda n: bound <= n < math.inf)


def between(least: float, most: float) -> Limit:
    """Limit numbers to a range, both ends included."""
    return _numbers(f"{least} to {most}", f"from {least} to {most}", lambda n: least <= n <= most)


def fraction_below(bound: float) -> Limit:
    """Limit numbers to those from 0 to below `bound`."""
    return _numbers(f"0 to below {bound}", f"from 0 to below {bound}", lambda n: 0 <= n < bound)


def not_empty(way_out: str) -> Limit:
    """Refuse an empty text or list, and a list of empty texts."""

    def allows(value: Any) -> bool:
        return bool(value.strip() if isinstance(value, str) else value and all(item != "" for item in value))

    return Limit("not empty", allows, way_out)


def matching(pattern: str, text: str) -> Limit:
    """Limit texts to those that fully match a regular expression; `text` describes them."""
    return Limit(text, lambda value: re.fullmatch(pattern, value) is not None, f"give {text}")


FILE_NAME = matching(r"[\w][\w .+-]{0,99}", "up to 100 letters, digits, blanks and . + - _ (it names files)")
"""Limit of names of studies and registered models."""


def _numbers(text: str, phrase: str, holds: Callable[[float], bool]) -> Limit:
    """Limit a number and each number in a list; other values are allowed. `holds` must be false for NaN."""

    def allows(value: Any) -> bool:
        parts = value if isinstance(value, (list, tuple)) else [value]
        return all(holds(part) for part in parts if isinstance(part, (int, float)) and not isinstance(part, bool))

    return Limit(text, allows, f"give a number {phrase}")


def check(settings: Any, prefix: str = "") -> None:
    """Raise InputError, with the dotted key, for the first setting in a tree of dataclasses outside of its limits.

    A group may have a method `check(prefix)` that compares its settings with one another; its messages put `prefix`, such as
    `data.target.`, before the names.
    """
    for name, _, limits in fields_of(type(settings)):
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}.")
        for number, item in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(item):
                check(item, f"{prefix}{name}[{number}].")
        for limit in limits:
            if value is not None and not limit.allows(value):
                several = isinstance(value, (list, tuple))
                way_out = limit.way_out.replace("a number", "numbers") if several else limit.way_out
                raise InputError(f"{prefix}{name} is {list(value) if several else value!r}; {way_out}.")
    if hasattr(settings, "check"):
        settings.check(prefix)


def check_options(term: Any, options: Mapping[str, Sequence[str]], prefix: str) -> None:
    """Raise InputError for an option that is set in `term`, an item of a list of settings, though its kind, `term.name`, has no
    such option. `options`: option -> the names of the kinds that have it."""
    for option, names in options.items():
        value = getattr(term, option)
        if value is not None and term.name not in names:
            raise InputError(
                f"{prefix}{option} is {value}, but {term.name} has no {option}; remove it (an option of {' and '.join(names)})."
            )


@functools.cache
def fields_of(cls: type) -> tuple[Field, ...]:
    """Return the fields of a settings class."""
    hints, plain = typing.get_type_hints(cls, include_extras=True), typing.get_type_hints(cls)
    return tuple(
        Field(
            field.name,
            plain[field.name],
            tuple(item for item in getattr(hints[field.name], "__metadata__", ()) if isinstance(item, Limit)),
        )
        for field in dataclasses.fields(cls)
    )


def settings_of(cls: type, prefix: str = "") -> Iterator[Field]:
    """Yield every setting of a tree of settings classes, with its dotted name."""
    for field in fields_of(cls):
        if dataclasses.is_dataclass(field.type):
            yield from settings_of(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            yield field._replace(name=f"{prefix}{field.name}")
