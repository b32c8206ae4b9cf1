"""Names that several rooms share: domains, splits, and the sets of images that they make.

Set names are spelled and taken apart here alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

Domain = Literal["source", "target"]
Split = Literal["train", "val", "test"]
DOMAINS: tuple[Domain, ...] = ("source", "target")
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SetName:
    """The name of one set of images.

    >>> str(SetName("target", "val"))
    'target_val'
    >>> SetName("target", "val").key
    'data.target.val'
    >>> SetName.parse("target_val") == TARGET_VAL
    True
    """

    domain: Domain
    split: Split

    def __str__(self) -> str:
        """Return the name in metrics, tables, tags and files: source_train."""
        return f"{self.domain}_{self.split}"

    @property
    def key(self) -> str:
        """Return the setting that names the images: data.source.train."""
        return f"data.{self.domain}.{self.split}"

    @property
    def words(self) -> str:
        """Return the name in titles: source train."""
        return f"{self.domain} {self.split}"

    @classmethod
    def parse(cls, text: str) -> SetName:
        """Return the set whose name as text is `text`, such as source_train. Raises ValueError for any other text."""
        domain, _, split = text.partition("_")
        if domain not in DOMAINS or split not in SPLITS:
            raise ValueError(f"{text!r} is no set of images; they are {', '.join(map(str, ALL_SETS))}.")
        return cls(cast(Domain, domain), cast(Split, split))


ALL_SETS = tuple(SetName(domain, split) for domain in DOMAINS for split in SPLITS)
SOURCE_TRAIN, SOURCE_VAL, SOURCE_TEST, TARGET_TRAIN, TARGET_VAL, TARGET_TEST = ALL_SETS
PRETRAINING_SETS = tuple(name for name in ALL_SETS if name != TARGET_TRAIN)
"""The sets that the source model's training uses."""
SCORED_SETS = tuple(name for name in ALL_SETS if name.split != "train")
"""The sets that `evaluate` scores."""
