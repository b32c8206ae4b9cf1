"""Samples as tensors: windows of images with their masks, and the loaders that training and validation draw from."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dann_experiments.config.errors import InputError
from dann_experiments.data.augmentation import Strength, augmented
from dann_experiments.data.labels import LabelMap, read_mask
from dann_experiments.data.looking import Arrays, Memory, checked_header
from dann_experiments.data.nodata import default_nodata_bands
from dann_experiments.data.reading import (
    TYPE_RANGES,
    Header,
    Normalisation,
    Reading,
    Window,
    for_file,
    largest_value,
    read_pixels,
)
from dann_experiments.data.samples import Sample
from dann_experiments.data.windows import Piece, at_random, default_size, grid

log = logging.getLogger(__name__)
MOST_PADDED = 8  # times a side of an image that a crop may be: beyond, hardly any of it would hold data


class SegmentationDataset(Dataset):
    """Items {"image": (B, h, w) float32, "index": i}, with "mask" (h, w) int64 class ids where there are masks, and "valid"
    (h, w) float32, 0 at nodata, where an image of the set may lack data.

    An item is a window of an image (`window_size`, see `windows.py`), or an image. Pixels without data are 0 in the image (the
    mean) and `ignore_index` in the mask. A training set (`training`) draws a crop and an augmentation for each item from
    torch's random state, or from the seed that comes with the index as (index, seed); its windows may lie at random places.
    An item smaller than the crop is put at a random place of it, with pixels without data around it (`pad_to_crop`).
    Raises InputError for a file that is no image, and for one whose bands or type do not fit.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: LabelMap,
        normalisation: Normalisation,
        reading: Reading | None = None,
        training: bool = False,
        crop_size: int | None = None,
        window_size: int | None = None,
        random_windows: bool = False,
        window_count: int | None = None,
        augmentation: Strength = "none",
        seed: int = 0,
        memory: Memory | None = None,
        headers: Sequence[Header] | None = None,
        read: Mapping[int, Arrays] | None = None,
        pad_to_crop: bool = False,
    ) -> None:
        self.samples = list(samples)
        self.labels = labels
        self.normalisation = normalisation
        self.reading = reading or Reading()
        self.training = training
        self.crop_size = crop_size if training else None
        self.augmentation: Strength = augmentation if training else "none"
        self.memory = memory or Memory(0)
        self.headers = list(headers or ())
        if headers is None:
            self.headers = [checked_header(sample, self.reading, self.in_channels) for sample in self.samples]
        if self.reading.unit is None and self.reading.file_pixel_size is None and self.reading.pixel_size is not None:
            known = (header.unit for header in self.headers)
            self.reading = dataclasses.replace(self.reading, unit=next(filter(None, known), None))
        self.pad_to_crop = pad_to_crop
        self.pieces = self._cut(window_size, random_windows and training, window_count, seed)
        self.may_lack_data = any(self.reading.may_lack_data(header) for header in self.headers) or (
            pad_to_crop and any(self._is_smaller_than_crop(piece.window) for piece in self.pieces)
        )
        self._kept: dict[Piece, Arrays] = {}
        for number, arrays in (read or {}).items():  # whole images that are read, and counted, already
            self._kept[Piece(number, Window(0, 0, *arrays[0].shape[1:]))] = arrays
        self._filled = False
        self.class_pixels: np.ndarray | None = None
        """(256,) pixels of each id in the masks, from `fill`; None until then, or where not all masks were read."""

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def in_channels(self) -> int:
        """Bands of an item."""
        return len(self.normalisation.mean)

    @property
    def has_masks(self) -> bool:
        """Whether the items bring masks."""
        return bool(self.samples) and self.samples[0].mask is not None

    @property
    def later_rules(self) -> list[str]:
        """Names of the rules, newer than version 0.1, by which images of this set are read otherwise than they were then."""
        rules = set()
        for header in self.headers:
            if header.orientation != 1:
                rules.add("orientation")
            if self.reading.scale == "type" and largest_value(header) != TYPE_RANGES[header.dtype]:
                rules.add("bits")
            several = sum(bool(own) for own in self.reading.nodata_of(header, header.data_bands)) > 1
            if several and self.reading.nodata_bands is None and default_nodata_bands(header.dtype) == "any":
                rules.add("nodata of any band")
            if header.masked and self.reading.nodata != () and (several or self.reading.nodata != "file"):
                rules.add("alpha beside nodata")
        return sorted(rules)

    def name_of(self, index: int) -> str:
        """The image file of an item, with the window's place where the image has several."""
        piece = self.pieces[index]
        path, header = str(self.samples[piece.sample].image), self.headers[piece.sample]
        top, left, height, width = piece.window
        whole = (height, width) == self.reading.grid_size(header, self.samples[piece.sample].image)
        return path if whole else f"{path} [rows {top}:{top + height}, columns {left}:{left + width}]"

    def read(self, index: int) -> Arrays:
        """Image (B, h, w) as stored in the file, mask (h, w) and validity (h, w; None = all valid) of an item."""
        piece = self.pieces[index]
        if piece in self._kept:
            return self._kept[piece]
        sample = self.samples[piece.sample]
        image, valid = read_pixels(
            sample.image, self.in_channels, self.reading, piece.window, self.headers[piece.sample]
        )
        mask = None
        if sample.mask is not None:
            factor = self.reading.factor(self.headers[piece.sample], sample.image)
            mask = read_mask(sample.mask, self.labels, piece.window, factor)
            if piece.counted_rows or piece.counted_columns:
                mask[: piece.counted_rows] = self.labels.ignore_index
                mask[:, : piece.counted_columns] = self.labels.ignore_index
            if valid is not None:
                mask[~valid] = self.labels.ignore_index
        arrays = (image, mask, valid)
        if self.memory.take(arrays):
            self._kept[piece] = arrays
        return arrays

    def fill(self) -> Iterator[int]:
        """Read what can be kept in memory and what must be known before training: the masks, and which windows hold no data
        (a training set drops them). Yields the number of items done after each, none if all was done before; raises InputError
        for a bad file."""
        if self._filled:
            return
        pixels = np.zeros(256, np.int64)
        complete, kept = True, []
        for index, piece in enumerate(self.pieces):
            lacking = self.reading.may_lack_data(self.headers[piece.sample])
            if not self.memory.full or (self.training and lacking):
                _, mask, valid = self.read(index)
                if mask is not None:
                    pixels += np.bincount(mask.ravel(), minlength=256)
                if not self.training or valid is None or valid.any():
                    kept.append(piece)
                else:
                    self._kept.pop(piece, None)
            else:
                complete = False
                kept.append(piece)
            yield index + 1
        if not kept and self.pieces:
            raise InputError(
                f"image {self.samples[0].image} and the others of its set hold no data: every pixel is nodata, by its value or "
                f"by the file's mask or alpha band ({self.reading.settings}nodata is {self.reading.nodata})."
            )
        self.pieces = kept
        self.class_pixels = pixels if complete and self.has_masks else None
        self._filled = True

    def kept(self) -> dict[Piece, Arrays] | None:
        """What `fill` keeps in memory, if that is all of the set."""
        whole = self._filled and all(piece in self._kept for piece in self.pieces)
        return {piece: self._kept[piece] for piece in self.pieces} if whole else None

    def keep(self, kept: Mapping[Piece, Arrays], class_pixels: np.ndarray | None, counted: bool = False) -> bool:
        """Be as after a `fill` that found this; False, and as before, where it does not fit into memory. `counted`: it takes the
        place of what is kept already."""
        size = sum(array.nbytes for arrays in kept.values() for array in arrays if array is not None)
        if not counted:
            if self.memory.full or size > self.memory.bytes_left:
                return False
            self.memory.bytes_left -= size
        self._kept, self.pieces, self.class_pixels, self._filled = dict(kept), list(kept), class_pixels, True
        return True

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        if isinstance(index, tuple):
            index, seed = index
            # of the CPU alone: torch.manual_seed would also note a traceback for each kind of device that is not in use yet
            state = torch.default_generator.get_state()
            torch.default_generator.manual_seed(seed)
            try:
                return self._item(index, self.augmentation)
            finally:
                torch.default_generator.set_state(state)
        return self._item(index, "none")

    def as_evaluated(self, most: int | None = None) -> SegmentationDataset:
        """The same items, or `most` of them from all over the set, whole, in order and as they are: no crop, no augmentation,
        no random draw. What is kept in memory is shared; the normalisation is the one of now."""
        same = copy.copy(self)
        same.training, same.crop_size, same.augmentation = False, None, "none"
        if most is not None and most < len(self):
            same.pieces = [self.pieces[int(index)] for index in np.linspace(0, len(self) - 1, most)]
        return same

    def picture(self, item: dict[str, Tensor]) -> np.ndarray:
        """An item's image (B, h, w) in 0..1: normalisation undone."""
        mean, std = (np.array(side)[:, None, None] for side in (self.normalisation.mean, self.normalisation.std))
        return np.clip(item["image"].numpy() * std + mean, 0, 1)

    def normalisation_of(self, sample: int) -> Normalisation:
        """With the range of the sample's own type where that counts."""
        return for_file(self.normalisation, self.reading, self.headers[sample])

    def _item(self, index: int, augmentation: Strength) -> dict[str, Tensor]:
        arrays = self.read(index)
        if self.crop_size is not None:
            arrays = self._crop(arrays, index)
        values, mask, valid = arrays
        normalisation = self.normalisation_of(self.pieces[index].sample)
        labels = None if mask is None else torch.from_numpy(mask.astype(np.int64))
        known = None if valid is None else torch.from_numpy(valid)
        if augmentation == "none":
            image = torch.from_numpy(normalisation(values, valid))
        else:
            scaled = normalisation.scaled(values)
            if valid is not None:  # NaN would spread in a blur
                scaled[:, ~valid] = np.array(normalisation.mean, np.float32)[:, None]
            changed, labels, known = augmented(torch.from_numpy(scaled), labels, known, augmentation)
            image = self._normalised(changed, known)
        item = {"image": image, "index": torch.tensor(index)}
        if labels is not None:
            item["mask"] = labels
        if self.may_lack_data:
            item["valid"] = torch.ones(image.shape[1:]) if known is None else known.float()
        return item

    def _normalised(self, image: Tensor, valid: Tensor | None) -> Tensor:
        mean = torch.tensor(self.normalisation.mean)[:, None, None]
        std = torch.tensor(self.normalisation.std)[:, None, None]
        image = (image - mean) / std
        return image if valid is None else image * valid

    def _crop(self, arrays: Arrays, index: int) -> Arrays:
        size = self.crop_size
        assert size is not None
        height, width = arrays[0].shape[1:]
        if height < size or width < size:
            if not self.pads(height, width):
                raise InputError(
                    f"image {self.samples[self.pieces[index].sample].image} is {height} x {width} pixels, smaller than "
                    f"data.crop_size {size}."
                )
            arrays = self._padded(arrays, max(height, size), max(width, size))
            height, width = arrays[0].shape[1:]
        top = int(torch.randint(height - size + 1, ()))
        left = int(torch.randint(width - size + 1, ()))
        window = (slice(top, top + size), slice(left, left + size))
        image, mask, valid = arrays
        return image[:, *window], None if mask is None else mask[window], None if valid is None else valid[window]

    def pads(self, height: int, width: int) -> bool:
        """Return whether an item of this size is filled up to the crop where it is smaller."""
        return self.pad_to_crop and self.crop_size is not None and self.crop_size <= MOST_PADDED * min(height, width)

    def _padded(self, arrays: Arrays, height: int, width: int) -> Arrays:
        """An item at a random place of a larger one that holds no data around it."""
        image, mask, valid = arrays
        rows, columns = image.shape[1:]
        top = int(torch.randint(height - rows + 1, ()))
        left = int(torch.randint(width - columns + 1, ()))
        sides = ((top, height - rows - top), (left, width - columns - left))
        return (
            np.pad(image, ((0, 0), *sides)),
            None if mask is None else np.pad(mask, sides, constant_values=self.labels.ignore_index),
            np.pad(np.ones((rows, columns), bool) if valid is None else valid, sides),
        )

    def _is_smaller_than_crop(self, window: Window) -> bool:
        return self.crop_size is not None and min(window.height, window.width) < self.crop_size

    def _cut(self, window_size: int | None, at_random_places: bool, count: int | None, seed: int) -> list[Piece]:
        areas = []
        for number, (sample, header) in enumerate(zip(self.samples, self.headers, strict=True)):
            area = self._area(sample, header)
            areas.append((number, area, default_size(area.height, area.width, window_size, self.crop_size)))
        if at_random_places:
            return at_random(areas, count, seed)
        return [piece for area in areas for piece in grid(*area)]

    def _area(self, sample: Sample, header: Header) -> Window:
        """The part of an image that belongs to the set, on the working grid."""
        height, width = self.reading.grid_size(header, sample.image)
        if sample.region is None:
            return Window(0, 0, height, width)
        left, top, right, bottom = sample.region
        if right > header.width or bottom > header.height:
            raise InputError(
                f"image {sample.image} is {header.width} pixels wide and {header.height} high; its region "
                f"{list(sample.region)} (left, top, right, bottom) goes beyond."
            )
        factor = self.reading.factor(header, sample.image)
        first_row, first_column = round(top / factor), round(left / factor)
        rows = max(min(round(bottom / factor), height) - first_row, 1)
        return Window(first_row, first_column, rows, max(min(round(right / factor), width) - first_column, 1))


def check_sizes(dataset: SegmentationDataset, name: str, stride: int = 1) -> None:
    """Refuse training items that cannot be put into batches of a network of this stride.

    Items must be larger than the crop or, without crops, all of one size; crop or items must be divisible by `stride`.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for piece in dataset.pieces:
        sizes.setdefault((piece.window.height, piece.window.width), dataset.samples[piece.sample].image)
    if dataset.crop_size is not None:
        for size, path in sizes.items():
            if min(size) < dataset.crop_size and not dataset.pads(*size):
                or_else = f" ({MOST_PADDED} times its side at most)" if dataset.pad_to_crop else ""
                raise InputError(
                    f"{name}: image {path} is {size[0]} x {size[1]} pixels, smaller than data.crop_size "
                    f"{dataset.crop_size}; give a smaller one{or_else or ', or set data.pad_to_crop to true'}."
                )
        if dataset.crop_size % stride:
            raise InputError(f"data.crop_size is {dataset.crop_size}; this network needs a multiple of {stride}.")
        return
    if len(sizes) > 1:
        (one, first), (two, second) = list(sizes.items())[:2]
        raise InputError(
            f"{name}: images differ in size ({first}: {one[0]} x {one[1]}, {second}: {two[0]} x {two[1]}); "
            "set data.crop_size to train on crops."
        )
    for (height, width), path in sizes.items():
        if height % stride or width % stride:
            raise InputError(
                f"{name}: image {path} is {height} x {width} pixels; this network needs sides divisible by {stride}: "
                "set data.crop_size to a multiple of it."
            )


def unit_problems(sets: Mapping[str, SegmentationDataset]) -> list[str]:
    """What is wrong with pixel sizes of several sets (by name, such as source_train): one number that means two units."""
    first: dict[tuple[str, float], tuple[str, str, Path]] = {}
    problems = []
    for name, dataset in sets.items():
        size, unit = dataset.reading.pixel_size, dataset.reading.unit
        if size is None or unit is None:
            continue
        path = next(s.image for s, h in zip(dataset.samples, dataset.headers, strict=True) if h.unit == unit)
        domain = name.split("_")[0]
        for other in (domain, "source" if domain == "target" else "target"):
            key = (other, size)
            if key in first and first[key][1] != unit:
                problems.append(
                    f"data.{name.replace('_', '.')}: pixel_size {size:g} means {unit} for image {path}, but "
                    f"{first[key][1]} for image {first[key][2]} of data.{first[key][0].replace('_', '.')}; reproject the files "
                    "to one CRS, or give each domain's pixel_size in the unit of its files."
                )
                break
        first.setdefault((domain, size), (name, unit, path))
    return problems


class SeededOrder(Sampler[tuple[int, int]]):
    """A random order of the items, another each pass, each index with a seed for its crop and augmentation: the same numbers
    whatever the workers. A later process can go on in the middle of a pass, without touching the items before. Of several ranks
    that train together, `share` (rank, how many) takes its part of one common order, as many items as each other."""

    def __init__(self, dataset: SegmentationDataset, seed: int, share: tuple[int, int] = (0, 1)) -> None:
        self._dataset = dataset
        self._rank, self._world = share
        self._order = torch.Generator().manual_seed(seed)
        self._seeds = torch.Generator().manual_seed(seed)
        self._epoch = 0
        self._epoch_of_pass: int | None = None
        self._pass_start = self._states()
        self._to_skip: int | None = None  # of a pass that another process began

    def __len__(self) -> int:
        return len(self._dataset) // self._world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count = len(self._dataset)
        # The numbers that are drawn and not used keep the order of the results in docs/results.md: one each pass, and an
        # order where a pass follows another in one epoch.
        skipped, self._to_skip = self._to_skip, None
        if skipped is None and self._epoch_of_pass == self._epoch:
            torch.randperm(count, generator=self._order)
        self._epoch_of_pass = self._epoch
        self._pass_start = self._states()
        torch.empty((), dtype=torch.int64).random_(generator=self._order)
        seeds = torch.randint(2**62, (count,), generator=self._seeds).tolist()
        order = torch.randperm(count, generator=self._order).tolist()
        first, end = self._rank + (skipped or 0) * self._world, len(self) * self._world
        return itertools.islice(zip(order, seeds, strict=True), first, end, self._world)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self._epoch = epoch

    def position(self, items: int | None) -> dict[str, Any]:
        """What `go_on_from` needs after `items` of the newest pass; None: after an epoch, when a new pass comes next."""
        return (self._states() if items is None else dict(self._pass_start)) | {"items": items or 0}

    def go_on_from(self, position: Mapping[str, Any], epoch: int) -> None:
        """Make the next pass, in `epoch`, the rest of the one at `position`."""
        self._order.set_state(position["order"])
        self._seeds.set_state(position["seeds"])
        self._to_skip, self._epoch = int(position["items"]), epoch

    def _states(self) -> dict[str, Any]:
        return {"order": self._order.get_state(), "seeds": self._seeds.get_state()}


class _EqualSizes(Sampler[list[int]]):
    """Every item of a share (rank, how many) once, in order, in batches of neighbours of one size."""

    def __init__(self, dataset: SegmentationDataset, batch_size: int, share: tuple[int, int] = (0, 1)) -> None:
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
    dataset: SegmentationDataset,
    batch_size: int,
    name: str,
    seed: int,
    share: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Shuffled full batches; a set smaller than one batch is one smaller batch, and says so.

    Order, crops and augmentations depend on `seed` alone, whatever else draws random numbers, and on no number of workers.
    With `share` (rank, how many ranks), batches of this size are each rank's own; the set must hold an item for each.
    """
    order = SeededOrder(dataset, seed, share)
    if len(order) < batch_size:
        log.warning(
            "%s has %d images%s, fewer than its batch size %d: training takes batches of %d.",
            name, len(order), "" if share[1] == 1 else " for each process", batch_size, len(order),
        )  # fmt: skip
        batch_size = len(order)
    return DataLoader(
        dataset, batch_size, sampler=order, drop_last=True, num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),  # or the loader would draw from everybody's random state
        persistent_workers=num_workers > 0, pin_memory=pin_memory,
    )  # fmt: skip


def eval_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Every item, or those of a share (rank, how many ranks), once, in order; neighbours of one size together."""
    sampler = _EqualSizes(dataset, batch_size, share)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin_memory)
