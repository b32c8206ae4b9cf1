"""Describes all settings for `--help` and docs/settings.md. The strings under the fields are the help texts."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from dann_experiments.config.limits import fields_of

NONE = type(None)


@dataclass(frozen=True)
class Setting:
    """A setting as shown in the help."""

    key: str
    """Dotted name."""
    type: str
    range: str
    """Limits in words; empty if there are none."""
    default: str
    """Default as written in YAML."""
    text: str
    """Help text."""


@dataclass(frozen=True)
class Group:
    """Settings that belong together."""

    prefix: str
    """Prefix of their names, such as `optimizer.`."""
    text: str
    settings: tuple[Setting, ...]


@functools.cache
def describe(cls: type, prefix: str = "") -> tuple[Group, ...]:
    """Return the settings of a class in groups: first its own, then those of nested classes."""
    own, inner = [], []
    texts = _texts(cls)
    defaults = {field.name: field for field in dataclasses.fields(cls)}
    for name, kind, limits in fields_of(cls):
        if dataclasses.is_dataclass(kind):
            inner += describe(typing.cast(type, kind), f"{prefix}{name}.")
            continue
        field = defaults[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = ", ".join(limit.text for limit in limits)
        own.append(Setting(f"{prefix}{name}", type_name(kind), shown, in_yaml(default), texts.get(name, "")))
    return (Group(prefix, inspect.cleandoc(cls.__doc__ or ""), tuple(own)), *inner)


def help_text(cls: type) -> str:
    """Return all settings with type, range, default and help, wrapped to the terminal width (at most 120 characters)."""
    return "\n".join(_help_lines(cls, min(shutil.get_terminal_size().columns, 120)))


def _help_lines(cls: type, width: int) -> Iterator[str]:
    for group in describe(cls):
        if group.settings:
            yield from textwrap.wrap(group.text, width)
        for setting in group.settings:
            yield f"  --{setting.key} VALUE"
            facts = "; ".join(filter(None, (setting.type, setting.range, f"default {setting.default}")))
            yield from textwrap.wrap(
                f"{setting.text} ({facts})", width, initial_indent=" " * 8, subsequent_indent=" " * 8
            )
        yield ""


def type_name(kind: Any) -> str:
    """Return a readable name of a type: `int`, `list[int] | null`, `one of a, b`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        parts = sorted(typing.get_args(kind), key=lambda part: part is NONE)
        return " | ".join(map(type_name, parts))
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0]):
        return f"list of {{{', '.join(field.name for field in dataclasses.fields(typing.get_args(kind)[0]))}}}"
    if kind is NONE:
        return "null"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def in_yaml(value: Any) -> str:
    """Return a value in YAML, on one line."""
    plain = plain_values(value)
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


def plain_values(value: Any) -> Any:
    """Return settings, or one value, as nested mappings, lists, texts and numbers. Of settings in a list, such as the terms of
    `loss`, those that are null are left out."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain_values(item) for item in value]
        return [
            {key: one for key, one in item.items() if one is not None} if dataclasses.is_dataclass(given) else item
            for given, item in zip(value, items, strict=True)
        ]
    return value


def _texts(cls: type) -> dict[str, str]:
    """Return field -> the string under it, on one line, including inherited fields."""
    inherited = {
        name: text for base in cls.__bases__ if dataclasses.is_dataclass(base) for name, text in _texts(base).items()
    }
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    return inherited | {
        field.target.id: " ".join(after.value.value.split())
        for field, after in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }  # fmt: skip
