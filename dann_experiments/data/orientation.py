"""Rotates and flips images as their EXIF orientation tag says; cameras store sensor rows and how the camera was held.

A *stored* window refers to the file's rows and columns, a *shown* window to the image as viewers display it. All other code
works with shown windows.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

TAG = 0x0112  # Orientation, EXIF 2.32 table 4; its values 1 to 8
METADATA_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # PNG chunks that can hold EXIF (native or as text) or XMP
FORMATS = {
    "JPEG": ["JPEG", "MPO"],
    "PNG": ["PNG"],
    "WEBP": ["WEBP"],
    "GTiff": ["TIFF"],
}  # GDAL driver -> Pillow formats


class Turn(NamedTuple):
    """The transform from stored to shown pixels: transpose first, then flip."""

    transposed: bool
    rows_flipped: bool
    columns_flipped: bool

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Convert (height, width) from stored to shown, or back."""
        return (width, height) if self.transposed else (height, width)

    def stored(
        self, box: tuple[float, float, float, float], height: int, width: int
    ) -> tuple[float, float, float, float]:
        """Convert a shown box to the stored (top, left, height, width); `height` and `width` are the shown size of the file."""
        top, left, rows, columns = box
        if self.rows_flipped:
            top = height - top - rows
        if self.columns_flipped:
            left = width - left - columns
        return (left, top, columns, rows) if self.transposed else (top, left, rows, columns)

    def shown(self, values: np.ndarray) -> np.ndarray:
        """Return stored values (..., h, w) in shown orientation."""
        if self.transposed:
            values = values.swapaxes(-1, -2)
        return values[..., :: -1 if self.rows_flipped else 1, :: -1 if self.columns_flipped else 1]


UPRIGHT = Turn(False, False, False)
TURNS = {
    1: UPRIGHT,
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}


def orientation_of(file: DatasetReader) -> int:
    """Return the orientation tag of an open file, 1 to 8; 1 if it has none.

    Georeferenced files count as upright: the georeference refers to stored rows, and GIS programs ignore the tag.
    """
    formats = FORMATS.get(file.driver)
    if formats is None or file.crs is not None or not file.transform.is_identity:
        return 1
    try:
        status = os.stat(file.name)
    except OSError:  # not a file of its own, such as one inside an archive
        return 1
    return _tag(file.name, status.st_size, status.st_mtime_ns, tuple(formats))


@functools.lru_cache(maxsize=2**16)  # called for every window; size and time reveal a changed file
def _tag(name: str, size: int, time: int, formats: tuple[str, ...]) -> int:
    try:
        if formats == ("PNG",) and not _has_metadata(name):
            return 1
        with Image.open(Path(name), formats=list(formats)) as image:
            found = image.getexif().get(TAG, 1)
    except Exception:  # Pillow raises many types for damaged metadata; the pixels can still be read
        return 1
    return found if found in TURNS else 1


def _has_metadata(name: str) -> bool:
    """Return True if a PNG has a chunk that can hold metadata.

    Such chunks may follow the pixels, which Pillow would decode to find them; skipping chunks takes a tenth of the time or less.
    """
    with open(name, "rb") as file:
        file.seek(8)  # the signature
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind in METADATA_CHUNKS:
                return True
            file.seek(length + 4, os.SEEK_CUR)  # the chunk and its checksum
    return False
