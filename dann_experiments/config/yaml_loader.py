"""How YAML is read: as YAML 1.2 reads numbers, each key once, within bounds. Builds plain values only."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

MOST_VALUES = 100_000  # in a settings file; each use of an alias counts
MOST_LETTERS = 16 * 2**20  # characters in a settings file
# PyYAML raises errors of its parsers if a tag and its text do not match: `!!int ""`, `!!bool x`, `!!timestamp x`
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


class SameKey(ComposerError):
    """A key that stands twice in a mapping, maybe in two spellings; `problem` says which."""


class PlainLoader(yaml.SafeLoader):
    """Loads YAML with two changes: `1e-4` is a number as in YAML 1.2 (PyYAML reads a string), and a key that appears twice in a
    mapping is an error (PyYAML drops the first)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping as written, before merge keys (<<) are expanded."""
        node = super().compose_mapping_node(anchor)
        seen: dict[Any, str] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                value = self.construct_object(key)  # 0x1, 1.0 and true are the key 1 of a Python mapping as well
                if value in seen:
                    as_well = "" if seen[value] == key.value else f" (as {seen[value]!r} before)"
                    raise SameKey(None, None, f"{key.value!r} appears twice{as_well}", key.start_mark)
                seen[value] = key.value
        return node


PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def values_in(value: Any, known: dict[int, float] | None = None) -> float:
    """Return the number of values in a nested value; infinite if it contains itself. `known`: counts by id, for its own calls."""
    known = {} if known is None else known
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")  # until it has been counted
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(values_in(item, known) for item in inner)
    return known[id(value)]
