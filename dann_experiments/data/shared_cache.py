"""A cache of decoded sets for the processes of a sweep or comparison: one process reads the files, the others map its copy.

A set is stored as KEY.bin, the concatenated arrays, and KEY.json, their description. The key is a digest of the files (path,
size, modification time), their regions, and how they are read and cut. The sweep or comparison creates and removes the folder.
If a set does not fit into `data.memory_gb` or onto the disk, each process reads the files itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.memory import Arrays
from dann_experiments.data.rasters import Header, Window, header_from
from dann_experiments.data.samples import Sample, files_of
from dann_experiments.data.virtual import files_behind
from dann_experiments.data.windows import Piece

log = logging.getLogger(__name__)
ALIGNED = 64  # arrays begin at multiples of this many bytes
_in_use: SharedCache | None = None


class SharedCache:
    """The decoded sets in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, samples: Sequence[Sample], **facts: Any) -> str:
        """Return the key of a set: a digest of its files' current state and of `facts`, which say how they are read and cut."""
        files = []
        for sample in samples:
            paths = [path for file in files_of([sample]) for path in files_behind(file)]
            found = [os.stat(path) for path in paths]
            files.append(([f"{p}" for p in paths], [(s.st_size, s.st_mtime_ns) for s in found], sample.region))
        text = repr((files, sorted(facts.items())))
        return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()

    @contextlib.contextmanager
    def alone(self, key: str, wait: bool = True) -> Iterator[bool]:
        """Lock a key, so that one process reads the files while the others wait for the result; yield True if it is locked."""
        from filelock import FileLock

        lock = FileLock(self.folder / f"{key}.lock")
        held = False
        with contextlib.suppress(
            OSError, NotImplementedError
        ):  # no locks on this disk: several processes may read, harmlessly; or another has it (a TimeoutError)
            lock.acquire(timeout=-1 if wait else 0)
            held = True
        try:
            yield held
        finally:
            if held:
                lock.release()

    def index(self, key: str) -> Mapping[str, Any] | None:
        """Return the description of a set; None if no process has written it."""
        try:
            return json.loads((self.folder / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None

    def headers(self, index: Mapping[str, Any]) -> list[Header]:
        """Return the headers of the set's images."""
        kinds = [header_from(header) for header in index["headers"]]
        return [kinds[kind] for kind in index["header_of"]]

    def digests(self, index: Mapping[str, Any], samples: Sequence[Sample]) -> dict[Path, bytes]:
        """Return the digests of the set's files."""
        found = zip(files_of(samples), index["digests"], strict=True)
        return {path: bytes.fromhex(digest) for path, digest in found}

    def store(self, key: str, dataset: SegmentationDataset, digest_of: Callable[[Path], bytes]) -> None:
        """Write a filled set, and map its arrays from the file from then on.

        Do nothing if the set is not kept in memory as a whole, or if the disk has too little space.
        """
        kept = dataset.kept()
        if kept is None:
            return
        blob, index = self.folder / f"{key}.bin", self.folder / f"{key}.json"
        parts = [path.with_suffix(f"{path.suffix}.{os.getpid()}") for path in (blob, index)]
        try:
            size = sum(array.nbytes + ALIGNED for arrays in kept.values() for array in arrays if array is not None)
            if shutil.disk_usage(self.folder).free < 2 * size:
                log.info(
                    "%s: no space for %.0f MB of decoded data; each process reads the files itself.", blob, size / 1e6
                )
                return
            with open(parts[0], "wb") as file:
                places = [[write_array(file, array) for array in arrays] for arrays in kept.values()]
            pixels = None if dataset.class_pixels is None else dataset.class_pixels.tolist()
            kinds = {header: kind for kind, header in enumerate(dict.fromkeys(dataset.headers))}
            facts = {
                "headers": [dataclasses.asdict(header) for header in kinds],
                "header_of": [kinds[header] for header in dataset.headers],
                "digests": [digest_of(path).hex() for path in files_of(dataset.samples)],
                "pieces": [[p.sample, *p.window, p.counted_rows, p.counted_columns] for p in kept],
                "places": places,
                "class_pixels": pixels,
            }
            parts[1].write_text(json.dumps(facts))
            for part, path in zip(
                parts, (blob, index), strict=True
            ):  # the index comes last and marks the set as complete
                os.replace(part, path)
        except OSError as error:
            log.info("%s cannot be written (%s); each process reads the files itself.", blob, error)
            for part in parts:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):
            dataset.restore(*self._read(key, facts), counted=True)

    def load(self, key: str, index: Mapping[str, Any], dataset: SegmentationDataset) -> bool:
        """Fill a set from the cache; return False if it does not fit into memory."""
        try:
            return dataset.restore(*self._read(key, index))
        except OSError:
            return False

    def _read(self, key: str, index: Mapping[str, Any]) -> tuple[dict[Piece, Arrays], np.ndarray | None]:
        with open(self.folder / f"{key}.bin", "rb") as file:
            # copy-on-write: processes share the pages, and a write would affect only the process that made it
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        kept = {}
        for (sample, *window, rows, columns), places in zip(index["pieces"], index["places"], strict=True):
            image, mask, valid = (view_of(content, place) for place in places)
            kept[Piece(sample, Window(*window), rows, columns)] = (image, mask, valid)
        pixels = index["class_pixels"]
        return kept, None if pixels is None else np.array(pixels, np.int64)


def in_use() -> SharedCache | None:
    """Return the cache that this process shares with others, None if there is none."""
    return _in_use


def share(folder: Path | None) -> None:
    """Share the sets that this process reads from now on in `folder`; None = do not share."""
    global _in_use
    _in_use = None if folder is None else SharedCache(folder)


def write_array(file: Any, array: np.ndarray | None) -> list[Any] | None:
    """Write an array; return its offset, type and shape."""
    if array is None:
        return None
    file.write(b"\0" * (-file.tell() % ALIGNED))
    begins = file.tell()
    file.write(np.ascontiguousarray(array).data)
    return [begins, array.dtype.str, list(array.shape)]


def view_of(content: mmap.mmap, place: Sequence[Any] | None, start: int = 0) -> Any:
    """Return the array at a place of a file; `content` is the file from byte `start` on."""
    if place is None:
        return None
    begins, dtype, shape = place
    return np.frombuffer(content, dtype, math.prod(shape), begins - start).reshape(shape)
