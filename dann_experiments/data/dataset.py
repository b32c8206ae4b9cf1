"""Samples as tensors, and the loaders that training and validation draw from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dann_experiments.config.errors import InputError
from dann_experiments.data.reading import image_size, read_image, read_mask
from dann_experiments.data.samples import Sample

log = logging.getLogger(__name__)


class SegmentationDataset(Dataset):
    """Items {"image": (B, H, W) float32, "index": i} and, where there are masks, "mask": (H, W) int64 class ids.

    Images are scaled to 0..1 by their type's range, then (x - mean) / std. With `crop_size`, an item is a random crop
    drawn from torch's random state; a smaller image is refused. `keep_in_memory`: each file is decoded once.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        ignore_index: int = 255,
        crop_size: int | None = None,
        keep_in_memory: bool = True,
    ) -> None:
        self.samples = list(samples)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.crop_size = crop_size
        self.mean = torch.tensor(list(mean), dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(list(std), dtype=torch.float32)[:, None, None]
        self._kept: dict[int, tuple[np.ndarray, np.ndarray | None]] | None = {} if keep_in_memory else None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_masks(self) -> bool:
        """Whether the items bring masks."""
        return bool(self.samples) and self.samples[0].mask is not None

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The image (B, H, W) as stored in the file, and its mask (H, W)."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        sample = self.samples[index]
        image = read_image(sample.image, len(self.mean))
        mask = None
        if sample.mask is not None:
            mask = read_mask(sample.mask, self.num_classes, self.ignore_index)
            if mask.shape != image.shape[1:]:
                raise InputError(
                    f"image {sample.image} is {image.shape[1]} x {image.shape[2]} pixels, its mask {sample.mask} "
                    f"{mask.shape[0]} x {mask.shape[1]}; they must be of one size."
                )
        if self._kept is not None:
            self._kept[index] = (image, mask)
        return image, mask

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, mask = self.read(index)
        if self.crop_size is not None:
            image, mask = self._crop(image, mask, index)
        scale = 255.0 if image.dtype == np.uint8 else 65535.0
        pixels = torch.from_numpy(image.astype(np.float32)).div_(scale).sub_(self.mean).div_(self.std)
        item = {"image": pixels, "index": torch.tensor(index)}
        if mask is not None:
            item["mask"] = torch.from_numpy(mask.astype(np.int64))
        return item

    def as_stored(self, item: dict[str, Tensor]) -> np.ndarray:
        """An item's image as its file holds it (B, H, W), cropped where the item is: scaling and normalisation undone."""
        dtype = self.read(int(item["index"]))[0].dtype
        pixels = (item["image"] * self.std + self.mean) * float(np.iinfo(dtype).max)
        return pixels.round().numpy().astype(dtype)

    def _crop(self, image: np.ndarray, mask: np.ndarray | None, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        size = self.crop_size
        assert size is not None
        height, width = image.shape[1:]
        if height < size or width < size:
            raise InputError(
                f"image {self.samples[index].image} is {height} x {width} pixels, smaller than data.crop_size {size}."
            )
        top = int(torch.randint(height - size + 1, ()))
        left = int(torch.randint(width - size + 1, ()))
        window = (slice(top, top + size), slice(left, left + size))
        return image[:, *window], None if mask is None else mask[window]


def check_files(dataset: SegmentationDataset, name: str, stride: int = 1, for_training: bool = True) -> None:
    """Read every image (its header alone if images are not kept in memory) and mask before anything trains.

    Raises InputError for the first bad one. Training images must be larger than the crop or, without crops, all of one
    size; crop or images must be divisible by `stride`.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for index, sample in enumerate(dataset.samples):
        if dataset._kept is not None:
            image, _ = dataset.read(index)  # decoded once, here
            size = (image.shape[1], image.shape[2])
        else:
            size = image_size(sample.image)
            if sample.mask is not None:
                dataset.read(index)
        sizes.setdefault(size, sample.image)
        if for_training and dataset.crop_size is not None and min(size) < dataset.crop_size:
            raise InputError(
                f"{name}: image {sample.image} is {size[0]} x {size[1]} pixels, smaller than data.crop_size "
                f"{dataset.crop_size}; give a smaller one."
            )
    if not for_training:
        return
    if dataset.crop_size is not None:
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


def train_loader(
    dataset: SegmentationDataset, batch_size: int, name: str, seed: int, num_workers: int = 0
) -> DataLoader:
    """Shuffled full batches; a set smaller than one batch is one smaller batch, and says so.

    The order depends on `seed` alone, whatever else draws random numbers.
    """
    if len(dataset) < batch_size:
        log.warning(
            "%s has %d images, fewer than its batch size %d: training takes batches of %d.",
            name, len(dataset), batch_size, len(dataset),
        )  # fmt: skip
        batch_size = len(dataset)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, generator=generator,
        persistent_workers=num_workers > 0,
    )  # fmt: skip


def eval_loader(dataset: SegmentationDataset, batch_size: int) -> DataLoader:
    """Every image once, in order; one at a time where their sizes differ."""
    one_size = len({image_size(sample.image) for sample in dataset.samples}) == 1
    return DataLoader(dataset, batch_size if one_size else 1, shuffle=False)
