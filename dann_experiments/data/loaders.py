"""Data loaders for training, validation and scoring.

The order of items, crops and augmentations depends only on the seed, not on workers or other random draws.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.joined import Items, JoinedDataset
from dann_experiments.names import DOMAINS, TARGET_LABELLED, TARGET_WEAK, Domain, OneDomain, SetName

log = logging.getLogger(__name__)
Share = tuple[int, int]  # (rank, number of ranks) in distributed training


@dataclass(frozen=True)
class ClassSampling:
    """How often an item is drawn for each class, and from which items."""

    chances: np.ndarray
    """(K,) probability of each class."""
    holds: np.ndarray
    """(N, K) bool: which item holds which class."""


def class_sampling(pixels: np.ndarray, holds: np.ndarray, temperature: float | None) -> ClassSampling:
    """Return rare-class sampling (Hoyer et al. 2022, DAFormer, section 3.4): with f_c the share of labeled pixels in class c,

        P(c) = exp((1 - f_c) / T) / sum_k exp((1 - f_k) / T)

    over the classes that occur; an item is drawn from those that hold the drawn class. `pixels`: (K,) counts; `holds`: (N, K)
    bool; `temperature`: T; None = all classes equally often, the limit of a large T.

    >>> pixels, holds = np.array([90, 10, 0]), np.ones((4, 3), bool)
    >>> class_sampling(pixels, holds, 0.5).chances.round(2).tolist()
    [0.17, 0.83, 0.0]
    """
    scores = np.zeros(len(pixels)) if temperature is None else -pixels / pixels.sum() / temperature
    scores = np.where(pixels > 0, scores, -np.inf)
    chances = np.exp(scores - scores.max())
    return ClassSampling(chances / chances.sum(), holds)


class SeededOrder(Sampler[tuple[int, ...]]):
    """A sampler that shuffles the items anew on each pass and yields (index, seed); the seed decides crop and augmentation.

    A pass over the joined sets of several domains has as many items as they have together, taken from the domains in turn.
    With `classes`, a pass has as many draws as there are items: of a class, then of an item that holds it; it yields (index,
    seed, class id).
    The numbers do not depend on the number of workers. A later process can resume in the middle of a pass without loading
    earlier items. In distributed training, each rank takes an equal part (`share`) of one common order.
    """

    def __init__(self, dataset: Items, seed: int, share: Share = (0, 1), classes: ClassSampling | None = None) -> None:
        self._dataset, self._classes = dataset, classes
        self._rank, self._world = share
        self._order = torch.Generator().manual_seed(seed)
        self._seeds = torch.Generator().manual_seed(seed)
        self._epoch = 0
        self._epoch_of_pass: int | None = None
        self._pass_start = self._states()
        self._to_skip: int | None = None  # items of the pass done by another process

    def __len__(self) -> int:
        return len(self._dataset) // self._world

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        count = len(self._dataset)
        # The unused draws (one number per pass, and one order before a further pass in the same epoch) keep the orders of
        # earlier versions, so that docs/results.md stays reproducible.
        skipped, self._to_skip = self._to_skip, None
        if skipped is None and self._epoch_of_pass == self._epoch:
            torch.randperm(count, generator=self._order)
        self._epoch_of_pass = self._epoch
        self._pass_start = self._states()
        torch.empty((), dtype=torch.int64).random_(generator=self._order)
        seeds = torch.randint(2**62, (count,), generator=self._seeds).tolist()
        first, end = self._rank + (skipped or 0) * self._world, len(self) * self._world
        if self._classes is not None:
            drawn = zip(*self._draws(count, self._classes), strict=True)
            of_class = ((item, seed, own) for (item, own), seed in zip(drawn, seeds, strict=True))
            return itertools.islice(of_class, first, end, self._world)
        if isinstance(self._dataset, JoinedDataset):
            order = self._by_turns(self._dataset)
        else:
            order = torch.randperm(count, generator=self._order).tolist()
        return itertools.islice(zip(order, seeds, strict=True), first, end, self._world)

    def _by_turns(self, dataset: JoinedDataset) -> list[int]:
        """Return an order in which the domains take turns on every rank, so that each batch holds equally many items of each.

        A domain with fewer items than its turns starts again, in a new order; of one with more, a pass takes a random part."""
        sizes, starts = list(map(len, dataset.parts)), dataset.starts
        turns = [(position // self._world) % len(sizes) for position in range(len(dataset))]
        own: list[Iterator[int]] = []
        for part, size in enumerate(sizes):
            passes = -(-turns.count(part) // size)
            orders = [torch.randperm(size, generator=self._order) + starts[part] for _ in range(passes)]
            own.append(iter(torch.cat(orders).tolist() if orders else []))
        return [next(own[part]) for part in turns]

    def _draws(self, count: int, classes: ClassSampling) -> tuple[list[int], list[int]]:
        """Draw `count` classes, and an item that holds each; return items and classes."""
        chances = torch.from_numpy(classes.chances)
        drawn = torch.multinomial(chances, count, replacement=True, generator=self._order).tolist()
        places = torch.rand(count, dtype=torch.float64, generator=self._order).tolist()
        holders = {one: np.flatnonzero(classes.holds[:, one]) for one in set(drawn)}
        return [
            int(holders[one][int(place * len(holders[one]))]) for one, place in zip(drawn, places, strict=True)
        ], drawn

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each one."""
        self._epoch = epoch

    def position(self, items: int | None) -> dict[str, Any]:
        """Return the state for `go_on_from` after `items` of the current pass; None = at the end of an epoch."""
        return (self._states() if items is None else dict(self._pass_start)) | {"items": items or 0}

    def go_on_from(self, position: Mapping[str, Any], epoch: int) -> None:
        """Make the next pass, in `epoch`, continue the one at `position`."""
        self._order.set_state(position["order"])
        self._seeds.set_state(position["seeds"])
        self._to_skip, self._epoch = int(position["items"]), epoch

    def _states(self) -> dict[str, Any]:
        return {"order": self._order.get_state(), "seeds": self._seeds.get_state()}


class _EqualSizes(Sampler[list[int]]):
    """A batch sampler of every item of a share once, in order; a batch holds consecutive items of one size."""

    def __init__(self, dataset: Items, batch_size: int, share: Share = (0, 1)) -> None:
        rank, world = share
        self.first_item, end = (len(dataset) * number // world for number in (rank, rank + 1))
        self._batches: list[list[int]] = []
        size = None
        for index in range(self.first_item, end):
            piece = dataset.pieces[index]
            if piece.window[2:] != size or len(self._batches[-1]) == batch_size:
                self._batches.append([])
            size = piece.window[2:]
            self._batches[-1].append(index)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def train_loader(
    dataset: Items,
    batch_size: int,
    name: str,
    seed: int,
    share: Share = (0, 1),
    num_workers: int = 0,
    pin_memory: bool = False,
    classes: ClassSampling | None = None,
) -> DataLoader:
    """Return a loader of shuffled full batches; log a warning and use one smaller batch if the set has fewer items.

    Order, crops and augmentations depend only on `seed`, not on workers or other random draws. With `share` (rank, number of
    ranks), `batch_size` is per rank, and the set must have at least one item per rank. `name` is that of the set, for messages.
    """
    order = SeededOrder(dataset, seed, share, classes)
    if len(order) < batch_size:
        log.warning(
            "%s has %d images%s, fewer than its batch size %d: training takes batches of %d.",
            name, len(order), "" if share[1] == 1 else " for each process", batch_size, len(order),
        )  # fmt: skip
        batch_size = len(order)
    return DataLoader(
        dataset, batch_size, sampler=order, drop_last=True, num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),  # or the loader would draw from the global random state
        persistent_workers=num_workers > 0, pin_memory=pin_memory,
    )  # fmt: skip


def eval_loader(
    dataset: Items,
    batch_size: int,
    share: Share = (0, 1),
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of every item of a share (rank, number of ranks) once, in order; images of a batch have one size."""
    sampler = _EqualSizes(dataset, batch_size, share)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin_memory)


@dataclass(frozen=True)
class Loaders:
    """Builds the loaders of a job from its sets and batch settings."""

    sets: ImageSets
    batch_sizes: Mapping[Domain, int]
    """Training batch size per domain."""
    eval_batch_size: int | None
    """Batch size of validation and scoring; None = as in training."""
    seed: int
    num_workers: int = 0
    """Worker processes per loader."""
    pin_memory: bool = False
    """Load batches into page-locked memory, from which copies to a GPU are asynchronous."""
    share: Share = (0, 1)
    labelled_batch_size: int = 1
    """Batch size of the target's labeled training images."""
    classes: Callable[[Items], ClassSampling] | None = None
    """Makes the sampling by classes of the source's training items; None = each item once per pass."""

    def training(self) -> dict[str, DataLoader]:
        """Return one loader for the source and one for the target, if they have training images, and `labelled` of the target's
        labeled ones, if there are any; each has its own order. Where the target has weak labels, its batches have them as
        "mask"; images and order are the same without."""
        found = {}
        for offset, domain in enumerate(DOMAINS):
            name = SetName(domain, "train")
            dataset = self.sets.get(name)
            if dataset is not None:
                if domain == "target":
                    dataset = self.sets.get(TARGET_WEAK) or dataset
                found[domain] = train_loader(
                    dataset, self.batch_sizes[domain], name.key, self.seed + offset * 2**32, self.share,
                    self.num_workers, self.pin_memory,
                    None if self.classes is None or domain != "source" else self.classes(dataset),
                )  # fmt: skip
        labelled = self.sets.get(TARGET_LABELLED)
        if labelled is not None:
            found["labelled"] = train_loader(
                labelled, self.labelled_batch_size, TARGET_LABELLED.key, self.seed + len(DOMAINS) * 2**32, self.share,
                self.num_workers, self.pin_memory,
            )  # fmt: skip
        return found

    def validation(self) -> dict[OneDomain, DataLoader]:
        """Return the loaders of the source, which needs masks, and of the target, if any, one per domain; {} without a labeled
        source set."""
        found = {}
        for one in self.sets.domains:
            dataset = self.sets.held_out(one)
            if one.role == "source":
                dataset = self.sets.sets.get(SetName("source", "val", one.name))
                dataset = dataset if dataset is not None and dataset.has_masks else None
            if dataset is not None:
                found[one] = self.scoring(dataset, one.role)
        return found if any(one.role == "source" for one in found) else {}

    def scoring(self, dataset: Items, domain: Domain) -> DataLoader:
        """Return a loader of a whole set of `domain` in validation batches."""
        return eval_loader(
            dataset, self.eval_batch_size_of(domain), self.share, self.num_workers, self.pin_memory
        )  # fmt: skip

    def eval_batch_size_of(self, domain: Domain) -> int:
        """Return the batch size of validation for `domain`."""
        return self.eval_batch_size or self.batch_sizes[domain]
