"""The image sets of a job, by name, and those of several domains as one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.joined import Items, JoinedDataset
from dann_experiments.data.samples import content_digest
from dann_experiments.names import DOMAINS, SOURCE_AND_TARGET, SPLITS, Domain, OneDomain, SetName, Split

MOST_STANDING_IN = 200  # cap on training images used for validation if no domain has a validation set


@dataclass(frozen=True, eq=False)
class ImageSets:
    """Image sets by name, ready to use; sets without entries in the settings are absent."""

    sets: Mapping[SetName, SegmentationDataset]
    digest_of: Callable[[Path], bytes]
    """Returns the digest of a file's bytes."""
    domains: tuple[OneDomain, ...] = SOURCE_AND_TARGET
    """Every domain of the settings; the index is the label that a domain classifier learns."""
    _made: dict[tuple[SetName, ...], Items] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Digest of each set, by its name as a string."""
        return digests_of(self.sets, self.digest_of)

    @property
    def scaling(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation by which the images of each domain are normalized, (D, B) both; None if one has none."""
        found = [self.any_of(one) for one in self.domains]
        own = [dataset.normalization for dataset in found if dataset is not None]
        if len(own) < len(found):
            return None
        return torch.tensor([one.mean for one in own]), torch.tensor([one.std for one in own])

    def parts(self, name: SetName) -> dict[SetName, SegmentationDataset]:
        """Return the sets of all domains that belong to `name`."""
        return {one: dataset for one, dataset in self.sets.items() if name in (one, one.whole)}

    def get(self, name: SetName) -> Items | None:
        """Return the set, None if it is absent. With several domains, the sets of all that belong to it are joined."""
        return self._joined(self.parts(name))

    def labelled(self, name: SetName) -> Items | None:
        """Return the set if it exists and has masks, else None; with several domains, of those that have masks."""
        return self._joined({one: dataset for one, dataset in self.parts(name).items() if dataset.has_masks})

    def training(self) -> dict[Domain, Items]:
        """Return the training set of the source and of the target, if it has one."""
        return {role: dataset for role in DOMAINS if (dataset := self.get(SetName(role, "train"))) is not None}

    def any_of(self, domain: OneDomain) -> SegmentationDataset | None:
        """Return the first existing of the domain's training, validation and test set."""
        return self._first(domain, SPLITS)

    def shown(self, domain: OneDomain) -> SegmentationDataset | None:
        """Return the domain's validation set, or else its training set, for pictures of its images."""
        return self._first(domain, ("val", "train"))

    def _first(self, domain: OneDomain, splits: Sequence[Split]) -> SegmentationDataset | None:
        names = (SetName(domain.role, split, domain.name) for split in splits)
        return next((self.sets[name] for name in names if name in self.sets), None)

    def held_out(self, domain: OneDomain) -> SegmentationDataset | None:
        """Return the domain's validation set, with or without masks, or else training images without augmentation.

        The number of training images is that of the largest validation set of any domain, or `MOST_STANDING_IN` without one.
        """
        own, trained_on = (self.sets.get(SetName(domain.role, split, domain.name)) for split in ("val", "train"))
        if own is not None or trained_on is None:
            return own
        others = [len(dataset) for name, dataset in self.sets.items() if name.split == "val"]
        return trained_on.as_evaluated(max(others, default=MOST_STANDING_IN))

    def joined(self, datasets: Mapping[OneDomain, SegmentationDataset]) -> Items | None:
        """Return the sets as one, in which items tell their domain; a set as it is if there is one source and one target."""
        if not datasets:
            return None
        if len(self.domains) == len(DOMAINS):
            return next(iter(datasets.values()))
        return JoinedDataset(list(datasets.values()), [self.domains.index(one) for one in datasets])

    def _joined(self, parts: Mapping[SetName, SegmentationDataset]) -> Items | None:
        key = tuple(parts)
        if key not in self._made:  # once, as a joined set keeps the number of its class pixels
            made = self.joined({name.one: dataset for name, dataset in parts.items()})
            if made is None:
                return None
            self._made[key] = made
        return self._made[key]


def digests_of(sets: Mapping[SetName, SegmentationDataset], digest_of: Callable[[Path], bytes]) -> dict[str, str]:
    """Return a digest of each set over its files' bytes and over the rules that change how they are read since version 0.1.

    Results of earlier versions are thus not mistaken for current ones. With several domains, the sets of all of them together
    have a digest, too: source_train beside source_train.NAME.
    """
    digests = {}
    for name, dataset in sets.items():
        digest, rules = content_digest(dataset.samples, digest_of), dataset.later_rules
        if rules:
            digest = hashlib.blake2b(f"{digest} {rules}".encode(), digest_size=16).hexdigest()
        digests[str(name)] = digest
    for whole in {name.whole for name in sets if name.member is not None}:
        own = {name.member: digests[str(name)] for name in sets if name.whole == whole}
        digests[str(whole)] = hashlib.blake2b(repr(own).encode(), digest_size=16).hexdigest()
    return digests
