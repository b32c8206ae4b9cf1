"""The data set of one domain and split: windows of images with their masks, as tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dann_experiments.config.errors import InputError
from dann_experiments.data.augmentation import Strength, augmented
from dann_experiments.data.headers import checked_header
from dann_experiments.data.labels import LabelMap
from dann_experiments.data.memory import Arrays, Memory
from dann_experiments.data.nodata import default_nodata_bands
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Header, Window
from dann_experiments.data.reading import TYPE_RANGES, Normalization, Reading, for_file, largest_value
from dann_experiments.data.samples import Sample
from dann_experiments.data.vector_masks import mask_of
from dann_experiments.data.windows import Piece, at_random, default_size, grid

if TYPE_CHECKING:
    from dann_experiments.data.lasting_cache import MappedWindows

MOST_PADDED = 8  # largest crop size as a multiple of the image's shorter side; larger crops would be mostly padding


class SegmentationDataset(Dataset):
    """A data set of windows of images (`window_size`, see `windows`), or of whole images.

    An item is {"image": (B, h, w) float32, "index": i}. It has "mask" (h, w), int64 class ids, if the set has masks, and "valid"
    (h, w), float32 with 0 at nodata, if any image of the set may lack data. Pixels without data are 0 (the mean) in the image
    and `ignore_index` in the mask.

    With `training`, items are cropped to `crop_size` at random, and those asked for as (index, seed) are augmented; `seed`
    decides both. An item asked for as (index, seed, class id) is cropped so that it holds a pixel of that class.
    `random_windows` draws the places of windows, too. With `pad_to_crop`, an item smaller than the crop is put at a random
    place in it, surrounded by nodata. `headers` saves reading them again; `memory` limits what is kept decoded.
    Raises InputError for a file that is not an image, or whose bands or type do not fit.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: LabelMap,
        normalization: Normalization,
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
        pad_to_crop: bool = False,
    ) -> None:
        self.samples = list(samples)
        self.labels = labels
        self.normalization = normalization
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
        self._mapped: MappedWindows | None = None
        self._filled = False
        self._counted: tuple[np.ndarray, np.ndarray] | None = None  # the result of `count_classes`
        self.class_pixels: np.ndarray | None = None
        """(256,) number of mask pixels per class id, set by `fill`; None before that, or if not all masks were read."""

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def in_channels(self) -> int:
        """Number of bands per image."""
        return len(self.normalization.mean)

    @property
    def has_masks(self) -> bool:
        """True if the items have masks; where only some images have one, those of the others are ignored throughout."""
        return any(sample.mask is not None for sample in self.samples)

    @property
    def later_rules(self) -> list[str]:
        """Return the names of the reading rules introduced after version 0.1 that change how this set is read."""
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
        """Return the image file of an item, followed by the window's rows and columns unless it covers the whole image."""
        piece = self.pieces[index]
        path, header = str(self.samples[piece.sample].image), self.headers[piece.sample]
        top, left, height, width = piece.window
        whole = (height, width) == self.reading.grid_size(header, self.samples[piece.sample].image)
        return path if whole else f"{path} [rows {top}:{top + height}, columns {left}:{left + width}]"

    def read(self, index: int) -> Arrays:
        """Return an item's image (B, h, w) as stored in the file, mask (h, w) and validity (h, w; None = all valid)."""
        piece = self.pieces[index]
        if piece in self._kept:
            return self._kept[piece]
        if self._mapped is not None and (mapped := self._mapped.get(piece)) is not None:
            return mapped
        arrays = self.decode(index)
        if self.memory.take(arrays):
            self._kept[piece] = arrays
        return arrays

    def decode(self, index: int) -> Arrays:
        """Return what `read` returns, from the files themselves."""
        piece = self.pieces[index]
        sample = self.samples[piece.sample]
        image, valid = read_pixels(
            sample.image, self.in_channels, self.reading, piece.window, self.headers[piece.sample]
        )
        mask = None
        if sample.mask is None and self.has_masks:
            mask = np.full(image.shape[1:], self.labels.ignore_index, np.uint8)
        elif sample.mask is not None:
            mask = mask_of(sample, self.labels, self.reading, self.headers[piece.sample], piece.window)
            if piece.counted_rows or piece.counted_columns:
                mask[: piece.counted_rows] = self.labels.ignore_index
                mask[:, : piece.counted_columns] = self.labels.ignore_index
            if valid is not None:
                mask[~valid] = self.labels.ignore_index
        return image, mask, valid

    @property
    def decoded_bytes(self) -> int:
        """Bytes that all items take once decoded, with their masks and validity."""
        total = 0
        for piece in self.pieces:
            header = self.headers[piece.sample]
            each = (
                self.in_channels * np.dtype(header.dtype).itemsize + self.has_masks + self.reading.may_lack_data(header)
            )
            total += piece.window.height * piece.window.width * each
        return total

    @property
    def is_filled(self) -> bool:
        """True after `fill`, or once its result came from elsewhere."""
        return self._filled

    def fill(self, keep: Callable[[Piece, Arrays], None] | None = None) -> Iterator[int]:
        """Read the set, keep what fits into memory, count class pixels, and drop training windows without any data.

        Yield the number of items done after each item; yield nothing on a second call. Raises InputError for a bad file. `keep`:
        called with each item in place of keeping it in memory; the set counts as filled by `map` only.
        """
        if self._filled:
            return
        pixels = np.zeros(256, np.int64)
        complete, kept = True, []
        for index, piece in enumerate(self.pieces):
            lacking = self.reading.may_lack_data(self.headers[piece.sample])
            if keep is not None or not self.memory.full or (self.training and lacking):
                arrays = self.read(index) if keep is None else self.decode(index)
                _, mask, valid = arrays
                if mask is not None:
                    pixels += np.bincount(mask.ravel(), minlength=256)
                if not self.training or valid is None or valid.any():
                    kept.append(piece)
                    if keep is not None:
                        keep(piece, arrays)
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
        self.class_pixels = pixels if complete and self.has_masks else None
        if keep is None:
            self.pieces, self._filled = kept, True

    def count_classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of mask pixels per class id (256,), and which item holds which id (N, 256), bool.

        Counted once; items that are not kept in memory are read for it.
        """
        if self._counted is None:
            pixels, holds = np.zeros(256, np.int64), np.zeros((len(self), 256), bool)
            for index in range(len(self)):
                _, mask, _ = self.read(index)
                if mask is not None:
                    of_item = np.bincount(mask.ravel(), minlength=256)
                    pixels += of_item
                    holds[index] = of_item > 0
            self._counted = pixels, holds
        pixels, holds = self._counted
        return pixels.copy(), holds

    def with_normalization(self, normalization: Normalization) -> SegmentationDataset:
        """Return a copy with another normalization, which shares the images kept in memory."""
        same = copy.copy(self)
        same.normalization = normalization
        return same

    def kept(self) -> dict[Piece, Arrays] | None:
        """Return the arrays that `fill` keeps in memory; None unless the whole set is kept."""
        whole = self._filled and all(piece in self._kept for piece in self.pieces)
        return {piece: self._kept[piece] for piece in self.pieces} if whole else None

    def restore(self, kept: Mapping[Piece, Arrays], class_pixels: np.ndarray | None, counted: bool = False) -> bool:
        """Take over the result of `fill` from another process. Return False, and change nothing, if it does not fit into memory.

        `counted`: the arrays replace those kept already, so they take no further memory.
        """
        size = sum(array.nbytes for arrays in kept.values() for array in arrays if array is not None)
        if not counted:
            if self.memory.full or size > self.memory.bytes_left:
                return False
            self.memory.bytes_left -= size
        self._kept, self.pieces, self.class_pixels, self._filled = dict(kept), list(kept), class_pixels, True
        return True

    def map(
        self, mapped: MappedWindows, class_pixels: np.ndarray | None, counted: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Read all items from a file of decoded windows from now on; the other arguments are the counts of `fill` and of
        `count_classes`."""
        self._mapped, self.pieces, self.class_pixels, self._counted = mapped, mapped.pieces, class_pixels, counted
        self._kept, self._filled = {}, True

    def __getitem__(self, index: int | tuple[int, int] | tuple[int, int, int]) -> dict[str, Tensor]:
        if isinstance(index, tuple):
            index, seed, *drawn = index
            # Seed only the CPU: torch.manual_seed also formats a traceback for every device type not yet initialized.
            state = torch.default_generator.get_state()
            torch.default_generator.manual_seed(seed)
            try:
                return self._item(index, self.augmentation, drawn[0] if drawn else None)
            finally:
                torch.default_generator.set_state(state)
        return self._item(index, "none")

    def as_evaluated(self, most: int | None = None) -> SegmentationDataset:
        """Return a copy for evaluation, without crops or augmentation, that shares the images kept in memory.

        `most`: keep at most this many items, evenly spaced over the set.
        """
        same = copy.copy(self)
        same.training, same.crop_size, same.augmentation = False, None, "none"
        if most is not None and most < len(self):
            same.pieces = [self.pieces[int(index)] for index in np.linspace(0, len(self) - 1, most)]
        return same

    def picture(self, item: dict[str, Tensor]) -> np.ndarray:
        """Return an item's image (B, h, w) in 0..1, with the normalization undone."""
        mean, std = (np.array(side)[:, None, None] for side in (self.normalization.mean, self.normalization.std))
        return np.clip(item["image"].numpy() * std + mean, 0, 1)

    def normalization_of(self, sample: int) -> Normalization:
        """Return the normalization of a sample, with the range of its own data type if `scale` is `type`."""
        return for_file(self.normalization, self.reading, self.headers[sample])

    def _item(self, index: int, augmentation: Strength, held: int | None = None) -> dict[str, Tensor]:
        arrays = self.read(index)
        if self.crop_size is not None:
            arrays = self._crop(arrays, index, held)
        values, mask, valid = arrays
        normalization = self.normalization_of(self.pieces[index].sample)
        labels = None if mask is None else torch.from_numpy(mask.astype(np.int64))
        known = None if valid is None else torch.from_numpy(valid)
        if augmentation == "none":
            image = torch.from_numpy(normalization(values, valid))
        else:
            scaled = normalization.scaled(values)
            if valid is not None:  # a blur would spread NaN
                scaled[:, ~valid] = np.array(normalization.mean, np.float32)[:, None]
            changed, labels, known = augmented(torch.from_numpy(scaled), labels, known, augmentation)
            image = self._normalized(changed, known)
        item = {"image": image, "index": torch.tensor(index)}
        if labels is not None:
            item["mask"] = labels
        if self.may_lack_data:
            item["valid"] = torch.ones(image.shape[1:]) if known is None else known.float()
        return item

    def _normalized(self, image: Tensor, valid: Tensor | None) -> Tensor:
        mean = torch.tensor(self.normalization.mean)[:, None, None]
        std = torch.tensor(self.normalization.std)[:, None, None]
        image = (image - mean) / std
        return image if valid is None else image * valid

    def _crop(self, arrays: Arrays, index: int, held: int | None) -> Arrays:
        """Cut a crop at a random place; with `held`, one that holds a random pixel of this class."""
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
        rows, columns = (0, height - size), (0, width - size)  # first and last start
        if held is not None and arrays[1] is not None:
            pixels = np.flatnonzero(arrays[1] == held)
            if len(pixels):
                row, column = divmod(int(pixels[int(torch.randint(len(pixels), ()))]), width)
                rows = (max(row - size + 1, 0), min(row, height - size))
                columns = (max(column - size + 1, 0), min(column, width - size))
        top = rows[0] + int(torch.randint(rows[1] - rows[0] + 1, ()))
        left = columns[0] + int(torch.randint(columns[1] - columns[0] + 1, ()))
        window = (slice(top, top + size), slice(left, left + size))
        image, mask, valid = arrays
        return image[:, *window], None if mask is None else mask[window], None if valid is None else valid[window]

    def pads(self, height: int, width: int) -> bool:
        """Return True if an item of this size may be padded to the crop size."""
        return self.pad_to_crop and self.crop_size is not None and self.crop_size <= MOST_PADDED * min(height, width)

    def _padded(self, arrays: Arrays, height: int, width: int) -> Arrays:
        """Pad an item with nodata to `height` x `width`, at a random place."""
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
        """Return the part of an image that belongs to the set, in pixels of the working grid."""
        height, width = self.reading.grid_size(header, sample.image)
        if sample.region is None:
            return Window(0, 0, height, width)
        left, top, right, bottom = sample.region
        if right > header.width or bottom > header.height:
            raise InputError(
                f"image {sample.image} is {header.width} pixels wide and {header.height} high; its region "
                f"{list(sample.region)} (left, top, right, bottom) extends beyond it."
            )
        factor = self.reading.factor(header, sample.image)
        first_row, first_column = round(top / factor), round(left / factor)
        rows = max(min(round(bottom / factor), height) - first_row, 1)
        return Window(first_row, first_column, rows, max(min(round(right / factor), width) - first_column, 1))
