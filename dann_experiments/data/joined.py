"""Joins the sets of several domains to one, in which each item tells its domain."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.rasters import Header
from dann_experiments.data.samples import Sample
from dann_experiments.data.windows import Piece


class JoinedDataset(Dataset):
    """The items of several sets one after the other, each read by the rules of its own set.

    An item is that of its set, with its "index" in the joined set, and "domain", the label (int64) of its domain. So that items
    can be batched, they have "valid" if any of the sets may lack data, and "mask" only if all sets have masks. `labels`: one per
    set.
    """

    def __init__(self, parts: Sequence[SegmentationDataset], labels: Sequence[int]) -> None:
        lacking = any(part.may_lack_data for part in parts)
        self.parts = [copy.copy(part) for part in parts]
        for part in self.parts:
            part.may_lack_data = lacking
        self.labels = list(labels)
        self._all_have_masks = self.has_masks

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def starts(self) -> list[int]:
        """Index of the first item of each set."""
        return np.cumsum([0, *map(len, self.parts)]).tolist()[:-1]

    @property
    def pieces(self) -> list[Piece]:
        """The windows of all items; their `sample` counts within their own set."""
        return [piece for part in self.parts for piece in part.pieces]

    @property
    def samples(self) -> list[Sample]:
        """The files of all sets."""
        return [sample for part in self.parts for sample in part.samples]

    @property
    def headers(self) -> list[Header]:
        """The headers of all images."""
        return [header for part in self.parts for header in part.headers]

    @property
    def has_masks(self) -> bool:
        """True if the items of all sets have masks."""
        return all(part.has_masks for part in self.parts)

    @property
    def class_pixels(self) -> np.ndarray | None:
        """(256,) number of mask pixels per class id; None if not all masks were read."""
        found = [part.class_pixels for part in self.parts]
        return None if any(one is None for one in found) else np.sum(found, 0)  # pyright: ignore

    def count_classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of mask pixels per class id (256,), and which item holds which id (N, 256), bool."""
        found = [part.count_classes() for part in self.parts]
        return np.sum([pixels for pixels, _ in found], 0), np.concatenate([holds for _, holds in found])

    def name_of(self, index: int) -> str:
        """Return the image file of an item; see `SegmentationDataset.name_of`."""
        part, own = self._place(index)
        return self.parts[part].name_of(own)

    def picture(self, item: dict[str, Tensor]) -> np.ndarray:
        """Return an item's image (B, h, w) in 0..1, with the normalization undone."""
        return self.parts[self._place(int(item["index"]))[0]].picture(item)

    def as_evaluated(self, most: int | None = None) -> JoinedDataset:
        """Return a copy for evaluation; `most`: keep at most this many items of each set, evenly spaced."""
        return JoinedDataset([part.as_evaluated(most) for part in self.parts], self.labels)

    def __getitem__(self, index: int | tuple[int, int] | tuple[int, int, int]) -> dict[str, Tensor]:
        number = index[0] if isinstance(index, tuple) else index
        part, own = self._place(number)
        item = self.parts[part][(own, *index[1:]) if isinstance(index, tuple) else own]  # pyright: ignore
        if not self._all_have_masks:
            item.pop("mask", None)
        return {**item, "index": torch.tensor(number), "domain": torch.tensor(self.labels[part])}

    def _place(self, index: int) -> tuple[int, int]:
        """Return the set of an item, and its index there."""
        starts = self.starts
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return part, index - starts[part]


Items = SegmentationDataset | JoinedDataset
"""The set of one domain, or of several."""
