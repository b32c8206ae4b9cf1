"""Collects problems with files, and remarks on what is unusual but allowed: one per kind, with the first file and a remedy."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import TiffImagePlugin

from dann_experiments.config.errors import InputError
from dann_experiments.data.labels import LabelMap
from dann_experiments.data.nodata import fits
from dann_experiments.data.rasters import Header, changes_values
from dann_experiments.data.reading import Reading
from dann_experiments.data.unnamed import Unnamed

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

NODATA_TAG = 42113  # TIFF tag GDAL_NODATA
PROBLEMS_SHOWN, ALIKE_SHOWN = 20, 3
OF_A_FILE = re.compile(
    r"\S*[/\\]\S+|\{.*?\}"
)  # two problems are of one kind if they differ in paths and lists of values alone
NOT_SQUARE = 0.01  # tolerated relative difference of a pixel's sides


class Remarks:
    """Remarks by kind: the number of files concerned, and the text for the first of them."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, text: str) -> None:
        """Add a remark; only count it if there is one of the same kind already."""
        count, first = self._kinds.get(kind, (0, text))
        self._kinds[kind] = (count + 1, first)

    def take(self, path: Path, found: Iterator[tuple[str, str]]) -> None:
        """Add (kind, text) remarks on a file; each text continues a sentence that begins with the file's path."""
        for kind, text in found:
            self.add(kind, f"{path} {text}")

    def extend(self, found: Iterable[Sequence[str]]) -> None:
        """Add (kind, text) remarks."""
        for kind, text in found:
            self.add(kind, text)

    def lines(self) -> list[str]:
        """Return one line per kind."""
        return [
            text if count == 1 else f"{text} (This applies to {count} files.)" for count, text in self._kinds.values()
        ]


class AllRemarks(Remarks):
    """Remarks on one file, all of them, to be remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Sequence[str]] = []

    def add(self, kind: str, text: str) -> None:
        """Add a remark."""
        self.found.append((kind, text))


class Problems:
    """Collects problems with files, so that all are reported at once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.remarks = Remarks()
        """Remarks on what is unusual but allowed."""
        self.unnamed = Unnamed()
        """Values of masks that are no class, where whole masks are read."""

    def append(self, text: str) -> None:
        """Add a problem unless it is already listed."""
        if text not in self.texts:
            self.texts.append(text)

    def refuse(self) -> None:
        """Raise InputError that lists the problems, if any."""
        if len(self.texts) == 1:
            raise InputError(self.texts[0])
        if self.texts:
            lines = self._shown()
            more = len(self.texts) - sum(count for _, count in lines)
            shown = "".join(f"\n  - {line}" for line, _ in lines)
            raise InputError(
                f"{len(self.texts)} problems with the data:{shown}"
                + (f"\n  and {more} more; `check-data` lists all." if more > 0 else "")
            )

    def _shown(self) -> list[tuple[str, int]]:
        """Return the lines to show, and the number of problems that each stands for: a few of each kind, in the order found."""
        kinds: dict[str, list[str]] = {}
        for text in self.texts:
            kinds.setdefault(OF_A_FILE.sub("", text), []).append(text)
        lines = []
        for texts in kinds.values():
            few = texts if len(texts) <= ALIKE_SHOWN + 1 else texts[:ALIKE_SHOWN]
            lines += [(text, 1) for text in few]
            left = len(texts) - len(few)
            lines += [(f"... and {left} more files like these; `check-data` lists all.", left)] if left else []
        return lines[:PROBLEMS_SHOWN]


def image_remarks(
    file: DatasetReader, path: Path, header: Header, reading: Reading, in_channels: int
) -> Iterator[tuple[str, str]]:
    """Yield remarks (kind, text) on an open image."""
    images = 0
    if file.driver == "GTiff":
        # ImageJ stores large stacks behind one page and gives the number of images in its description
        described = re.search(r"^images=(\d+)", file.tags().get("TIFFTAG_IMAGEDESCRIPTION", ""), re.MULTILINE)
        images = max(len(file.subdatasets), int(described[1]) if described else 0)
    if images > 1:
        yield (
            "pages",
            (f"holds {images} images (pages), of which only the first is read; save the others as separate files."),
        )
    if reading.nodata == "file":
        tag = _unusable_nodata(path, file, header)
        if tag is not None:
            yield (
                f"nodata {tag}",
                (
                    f"declares the nodata value {tag}, which {header.dtype} pixels cannot hold, so no pixel counts as nodata. "
                    "If another value means nodata, set nodata to it; else set nodata to []."
                ),
            )
    lost = [value for value in reading.nodata if not fits(value, header.dtype)] if reading.nodata != "file" else []
    if lost and len(lost) == len(reading.nodata):
        yield (
            "nodata of the settings",
            (
                f"has {header.dtype} pixels, which cannot hold {reading.settings}nodata "
                f"{', '.join(f'{value:g}' for value in lost)}, so no pixel counts as nodata."
            ),
        )
    if header.palette and reading.bands is None and in_channels == 1:
        yield "palette", "is an image with a palette; a network with one band gets its indices, not the colors."
    size, own = reading.file_pixel_size, header.pixel_size
    if size is not None and own is not None and abs(size - own) > NOT_SQUARE * own:
        yield (
            "file_pixel_size",
            (
                f"has pixels of {own:g} {header.unit or ''}".rstrip()
                + f" by its georeference, but {reading.settings}file_pixel_size {size:g} is used; remove it to use its own."
            ),
        )
    if reading.scale == "type" and (any(scale != 1 for scale in file.scales) or any(file.offsets)):
        yield (
            "scale",
            (
                f"declares its values as value x {file.scales[0]:g} + {file.offsets[0]:g} (first band); values are read as "
                "stored, so give scale in stored values."
            ),
        )
    if reading.pixel_size is not None:
        a, b, _, d, e, *_ = file.transform
        width, height = (a * a + d * d) ** 0.5, (b * b + e * e) ** 0.5
        if abs(width - height) > NOT_SQUARE * max(width, height):
            yield (
                "not square",
                (
                    f"has pixels that are not square ({width:.6g} x {height:.6g} {header.unit or ''}".rstrip()
                    + "); pixel_size scales both sides by the same factor. Reproject the file if shapes matter."
                ),
            )


def mask_remarks(file: DatasetReader, header: Header, labels: LabelMap) -> Iterator[tuple[str, str]]:
    """Yield remarks (kind, text) on an open mask."""
    if changes_values(file):
        yield (
            "lossy mask",
            (
                "has a lossy compression (such as JPEG), which changes labels at borders; save masks again from the original "
                "labels without loss, for example as PNG."
            ),
        )
    value = header.nodata[0]
    a_class = value is not None and math.isfinite(value) and value == int(value) and labels.ids is None
    if a_class and labels.colors is None and file.driver not in ("PNG", "GIF", "WEBP"):
        found = labels.network_id(int(value))  # pyright: ignore[reportArgumentType]
        if found is not None and found != labels.ignore_index:
            yield (
                f"mask nodata {value}",
                (
                    f"declares the nodata value {value:g}, so these pixels are not labeled, though {value:g} is a class id. "
                    "If they belong to that class, name the ids in value_map."
                ),
            )


def _unusable_nodata(path: Path, file: DatasetReader, header: Header) -> str | None:
    """Return the text of a file's nodata tag if no pixel can hold its value, else None."""
    if header.dtype.startswith(("float", "complex")):
        return None
    known = header.nodata[0]
    if known is not None:
        return None if fits(known, header.dtype) else f"{known:g}"
    if file.driver != "GTiff":
        return None
    with (
        contextlib.suppress(Exception),
        open(path, "rb") as stored,
    ):  # GDAL does not pass on a value that the type cannot hold
        start = stored.read(16)
        head = start if 43 in (start[2], start[3]) else start[:8]
        directory = TiffImagePlugin.ImageFileDirectory_v2(head)
        stored.seek(directory.next)
        directory.load(stored)
        text = directory.get(NODATA_TAG)
        if text is not None and not fits(float(str(text).strip("\0 ")), header.dtype):
            return str(text).strip("\0 ")
    return None
