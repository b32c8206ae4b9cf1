"""Reads lists of terms, such as `loss: [cross_entropy, {name: dice, weight: 0.5}]`, in which a name stands for a term with its
defaults."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from dann_experiments.config.companions import CompanionTerm
from dann_experiments.config.errors import InputError
from dann_experiments.config.loss import LossTerm
from dann_experiments.config.nearest import meant

TERMS: Mapping[str, type] = {"loss": LossTerm, "domain_adaptation.companions": CompanionTerm}
"""Settings that are lists of terms -> the class of a term."""


def with_whole_terms(settings: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings as read, with each term of the settings in TERMS as a mapping.

    Raises InputError for a value that is neither a name nor a list of terms, and for an unknown name or key in a term.

    >>> with_whole_terms({"loss": ["cross_entropy", "dice"]})
    {'loss': [{'name': 'cross_entropy'}, {'name': 'dice'}]}
    """
    for key, kind in TERMS.items():
        settings = _with_whole(settings, key.split("."), key, kind)
    return settings


def _with_whole(settings: dict[str, Any], path: list[str], key: str, kind: type) -> dict[str, Any]:
    given = settings.get(path[0])
    if given is None:
        return settings
    if len(path) > 1:
        return (
            settings | {path[0]: _with_whole(dict(given), path[1:], key, kind)}
            if isinstance(given, Mapping)
            else settings
        )
    terms = given if isinstance(given, list) else [given]
    return settings | {path[0]: [_whole(term, f"{key}[{number}]", kind) for number, term in enumerate(terms)]}


def _whole(term: Any, key: str, kind: type) -> Any:
    if isinstance(term, kind):
        return {name: value for name, value in dataclasses.asdict(typing.cast(Any, term)).items() if value is not None}
    names: tuple[str, ...] = typing.get_args(typing.get_type_hints(kind)["name"])
    keys = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
    mapping: Any = {"name": term} if isinstance(term, str) else term
    if not isinstance(mapping, Mapping):
        raise InputError(f"{key} is {term!r}; give a name, or a mapping such as {{name: {names[-1]}, weight: 1}}.")
    for name in mapping:
        if name not in keys:
            raise InputError(f"{key} has the key {name!r}; a term takes {', '.join(keys)}{meant(name, keys)}")
    name = mapping.get("name", getattr(kind, "name", None))
    if name not in names:
        raise InputError(f"{key}.name is {name!r}; it is one of {', '.join(names)}{meant(name, names) or '.'}")
    return dict(mapping)
