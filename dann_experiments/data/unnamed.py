"""Collects the ids or colors that no setting names, over all masks of a domain: one problem, and one line of settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dann_experiments.data.labels import MOST_NAMED, LabelMap, UnnamedValues, read_mask, to_fill_in
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.windows import default_size, grid


@dataclass
class _Masks:
    """Masks of one domain with values that the same setting would name."""

    told: str
    labels: LabelMap
    setting: str
    keys: set[str] = field(default_factory=set)
    paths: list[Path] = field(default_factory=list)

    def text(self, classes: Collection[str]) -> str:
        """Return the problem. `classes`: ids in the domain's other masks, which a map must name as well."""
        keys = (
            self.keys.union(classes) if self.setting == "value_map" and not self.labels.has("value_map") else self.keys
        )
        keys = sorted(keys, key=lambda key: [int(number) for number in re.findall(r"-?\d+", key)])
        others = [str(Path(*path.parts[-3:])) for path in self.paths[1:]]  # with the folders of set and masks
        more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        of_others = f" So do {len(others)} other masks: {', '.join(others[:MOST_NAMED])}{more}."
        told = self.told + of_others * bool(others)
        if not self.setting:  # names would not help
            return told
        if not self.labels.has(self.setting):
            return told + to_fill_in(self.labels, self.setting, keys, "in all of them" if others else "here")
        unnamed = ", ".join(keys[:MOST_NAMED]) + " and more" * (len(keys) > MOST_NAMED)
        return f"{told} Without a class: {unnamed}." if others or len(keys) > 1 else told


class Unnamed:
    """Values of masks that are no class, by domain."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], _Masks] = {}
        self._classes: dict[str, set[str]] = {}

    def check(self, path: Path, labels: LabelMap) -> None:
        """Read a whole mask and keep its values that are no class. Raises InputError for any other problem with it."""
        mine: _Masks | None = None
        classes: set[str] = set()  # ids of the windows without such values
        header = read_header(path)
        size = default_size(header.height, header.width, None, None)
        for piece in grid(0, Window(0, 0, header.height, header.width), size):
            try:
                classes |= {str(index) for index in np.unique(read_mask(path, labels, piece.window))}
            except UnnamedValues as error:
                known = _Masks(error.told, labels, error.setting)
                mine = self._found.setdefault((labels.settings, error.setting), known)
                mine.keys.update(error.keys)
                if path not in mine.paths:
                    mine.paths.append(path)
                if len(mine.keys) > MOST_NAMED:
                    break
        if mine is not None and mine.setting == "value_map" and not labels.has("value_map"):
            mine.keys |= classes - {str(labels.ignore_index)}

    def add_classes(self, labels: LabelMap, found: Iterable[int]) -> None:
        """Note the ids of masks that can be used: a map must name them as well."""
        self._classes.setdefault(labels.settings, set()).update(
            str(index) for index in found if index < labels.num_classes
        )

    def texts(self) -> list[str]:
        """Return one problem per domain and setting."""
        return [masks.text(self._classes.get(settings, ())) for (settings, _), masks in self._found.items()]
