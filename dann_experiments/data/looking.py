"""Looks at an image and its mask before training: headers, and of small files, by the same opening, pixels and digests."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.georeference import FARTHEST, Place, described, pixels_apart, place_of
from dann_experiments.data.labels import LabelMap, read_mask
from dann_experiments.data.reading import (
    Header,
    Reading,
    check_type,
    chosen_bands,
    header_of,
    open_raster,
    read_pixels,
)
from dann_experiments.data.remarks import Remarks, image_remarks, mask_remarks
from dann_experiments.data.samples import Sample

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

SMALL = 128 * 128  # pixels up to which a file takes longer to open than to read
LONGEST_SMALL = 1 << 20  # bytes of such a file; one with more holds something else as well
Arrays = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]  # image (B, h, w) as stored, mask (h, w), valid (h, w)


class Memory:
    """How much decoded data may still be kept, shared by the sets of a job."""

    def __init__(self, gigabytes: float) -> None:
        self.bytes_left = gigabytes * 1e9
        self.full = gigabytes <= 0
        """Whether something had to be left out: reading ahead has no use any more."""

    def take(self, arrays: Arrays) -> bool:
        """Whether these arrays may be kept; if so they are counted."""
        size = sum(array.nbytes for array in arrays if array is not None)
        if size > self.bytes_left:
            self.full = True
            return False
        self.bytes_left -= size
        return True


class Ahead:
    """What is read of small files by the same opening that looks at their headers: pixels, as far as memory goes, and digests.

    Memory goes to the images in their order, as `SegmentationDataset.fill` gives it: from the first image on that is not read
    here, because it is large, one of several windows, or damaged, none is read ahead."""

    def __init__(self, memory: Memory) -> None:
        self.goes_on = not memory.full
        self.digests: dict[Path, bytes] = {}
        """Of file bytes, as `samples.file_digest` gives them."""
        self._memory = memory

    def stop(self) -> None:
        """Read no pixels ahead any more."""
        self.goes_on = False

    def take_over(self, digests: Mapping[Path, bytes], read: Iterable[Arrays], all_read: bool) -> None:
        """Be as after another process of equal memory read this; `all_read`: and then would have read on."""
        self.digests.update(digests)
        for arrays in read:
            self._memory.take(arrays)
        if not all_read:
            self.stop()

    def content(self, path: Path, file: DatasetReader) -> bytes | None:
        """The bytes of a small file, whose digest is kept; None for others."""
        if file.height * file.width > SMALL:
            return None
        with open(path, "rb") as stored:
            content = stored.read(LONGEST_SMALL)
        if len(content) == LONGEST_SMALL:
            return None
        self.digests[path] = hashlib.blake2b(content).digest()
        return content

    def take(self, arrays: Arrays) -> bool:
        """Whether they may be kept; if so they are counted."""
        fits = sum(array.nbytes for array in arrays if array is not None) <= self._memory.bytes_left
        return fits and self._memory.take(arrays)


def checked_header(sample: Sample, reading: Reading, in_channels: int) -> Header:
    """The image's header; raises InputError for bands or a type that do not fit, a mask of another size, or no image."""
    return looked_at(sample, reading, in_channels)[0]


def looked_at(
    sample: Sample, reading: Reading, in_channels: int, labels: LabelMap | None = None, ahead: Ahead | None = None,
    remarks: Remarks | None = None,
) -> tuple[Header, Arrays | None]:  # fmt: skip
    """`checked_header`; with `labels` and `ahead` also what `SegmentationDataset.read` gives of the whole image, if it is small.
    Pixels that cannot be read, and labels that no class is, are left to that: it tells of them. What is odd about the files
    and yet allowed goes to `remarks`."""
    pixels = values = None
    with open_raster(sample.image) as file:
        content = None if ahead is None else ahead.content(sample.image, file)
        header = header_of(file, sample.image, content)
        chosen_bands(sample.image, header, reading, in_channels)
        check_type(sample.image, header, reading)
        place = place_of(file)
        if remarks is not None:
            remarks.take(sample.image, image_remarks(file, sample.image, header, reading, in_channels))
        if content is not None and ahead is not None and ahead.goes_on:
            with contextlib.suppress(Exception):
                pixels = read_pixels(sample.image, in_channels, reading, None, header, file)
    if sample.mask is not None:
        with open_raster(sample.mask) as file:
            content = None if ahead is None else ahead.content(sample.mask, file)
            of_mask = header_of(file, sample.mask, content)
            if (of_mask.height, of_mask.width) != (header.height, header.width):
                raise InputError(
                    f"image {sample.image} is {header.height} x {header.width} pixels, its mask {sample.mask} "
                    f"{of_mask.height} x {of_mask.width}; they must be of one size."
                )
            _check_same_place(sample, place, place_of(file))
            if remarks is not None and labels is not None:
                remarks.take(sample.mask, mask_remarks(file, of_mask, labels))
            if pixels is not None and labels is not None:
                with contextlib.suppress(Exception):
                    factor = reading.factor(header, sample.image)
                    values = read_mask(sample.mask, labels, None, factor, of_mask, file)
                    if pixels.valid is not None:
                        values[~pixels.valid] = labels.ignore_index
    if ahead is None:
        return header, None
    if pixels is not None and (sample.mask is None or values is not None):
        arrays = (pixels.values, values, pixels.valid)
        if ahead.take(arrays):
            return header, arrays
    ahead.stop()
    return header, None


def _check_same_place(sample: Sample, image: Place | None, mask: Place | None) -> None:
    """Raises InputError where both files say where they lie, and disagree."""
    if image is None or mask is None:
        return
    apart = pixels_apart(image, mask)
    if apart is not None and not apart <= FARTHEST:
        raise InputError(
            f"image {sample.image} and its mask {sample.mask} lie in different places, {apart:.4g} pixels apart (image: "
            f"{described(image)}; mask: {described(mask)}); pair files of one place, or mend the georeference that is wrong."
        )
