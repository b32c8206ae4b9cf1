"""Checks the keys of value maps and label maps as they were given: two spellings of one key would silently become one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.names import DOMAINS

MOST_DIGITS = 40  # far more than a mask's value has; Python refuses to read thousands


def check_label_keys(settings: Mapping[str, Any]) -> None:
    """Raise InputError for a key of a `value_map` that is no whole number, or of either map that stands twice (1 and "1").


    `settings`: nested settings as read, before they get their types. Other mistakes are left to the types."""
    data = settings.get("data")
    for domain in DOMAINS:
        group = data.get(domain) if isinstance(data, Mapping) else None
        named = group.get("domains") if isinstance(group, Mapping) else None
        groups = {f"data.{domain}": group}
        groups |= (
            {f"data.{domain}.domains.{name}": one for name, one in named.items()} if isinstance(named, Mapping) else {}
        )
        for key, one in groups.items():
            labels = one.get("value_map") if isinstance(one, Mapping) else None
            if isinstance(labels, Mapping):
                _check(f"{key}.value_map", labels)
            texts = one.get("label_map") if isinstance(one, Mapping) else None
            if isinstance(texts, Mapping):
                _check_texts(f"{key}.label_map", texts)


def _check(name: str, labels: Mapping[Any, Any]) -> None:
    seen: dict[int, Any] = {}
    for key in labels:
        text = str(key).strip()
        if isinstance(key, bool) or not re.fullmatch(r"[-+]?[0-9]+", text):
            whole = f", {int(key)}" if isinstance(key, float) and key.is_integer() else ""
            raise InputError(f"{name} has the key {key!r}; give the value in the mask as a whole number{whole}.")
        if len(text) > MOST_DIGITS:
            raise InputError(f"{name} has a key of {len(text)} digits; give a value that a mask can hold.")
        value = int(text)
        if value in seen:
            raise InputError(f"{name} has the keys {seen[value]!r} and {key!r}, which are one value; keep one.")
        seen[value] = key


def text_of(key: Any) -> str:
    """Return a key of a `label_map` as text; YAML reads 311 as a number and true as a truth value."""
    return str(key).lower() if isinstance(key, bool) else str(key)


def _check_texts(name: str, labels: Mapping[Any, Any]) -> None:
    seen: dict[str, Any] = {}
    for key in labels:
        if key is None or isinstance(key, (list, tuple)):
            raise InputError(f'{name} has the key {key!r}; give a text in quotes ("" for features without a value).')
        if text_of(key) in seen:
            raise InputError(f"{name} has the keys {seen[text_of(key)]!r} and {key!r}, which are one value; keep one.")
        seen[text_of(key)] = key
