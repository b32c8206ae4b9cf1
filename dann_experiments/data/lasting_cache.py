"""Decoded sets that stay on disk for later jobs, in the user's cache: files are decoded once a machine, then mapped.

For sets whose pixels are many (`LARGE`); smaller ones are decoded faster than it is worth. As in `shared_cache`, a set is KEY.bin
and KEY.json; the key is a digest of the states of the files, as in `remembered`, so a file that changed is decoded again. The
folder holds at most `data.disk_cache_gb`, and a set is written only if at least as much space stays free as it takes. For that,
sets whose files changed go first, then the least recently used. Each window is checked by its checksum when first mapped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.memory import Arrays
from dann_experiments.data.rasters import Window
from dann_experiments.data.remembered import State, States, key_of_samples
from dann_experiments.data.shared_cache import SharedCache, view_of, write_array
from dann_experiments.data.windows import Piece

log = logging.getLogger(__name__)
FOLDER = "decoded"
LARGE = 256 * 10**6  # bytes of decoded pixels; some seconds of decoding


class LastingCache(SharedCache):
    """The decoded sets in the user's cache, at most `most_bytes` of them."""

    def __init__(self, folder: Path, most_bytes: float) -> None:
        super().__init__(folder / FOLDER)
        self.most_bytes = most_bytes
        self._own: set[str] = set()  # keys of sets that this job uses: sets of one job do not make room for each other

    def use(
        self,
        dataset: SegmentationDataset,
        states: States,
        rules: Mapping[str, Any],
        decode: Callable[[Callable[[Piece, Arrays], None]], None] | None,
    ) -> bool:
        """Map a set from the disk; if it is not there, have it decoded and written. Return False, and change nothing, if it
        cannot be kept: it is small, the disk has no room, or its files are in doubt.

        `rules`: all but the files that its pixels depend on. `decode`: reads the set and calls its argument with each window;
        None = do not write.
        """
        size = dataset.decoded_bytes
        if size < LARGE:
            return False
        if size > self.most_bytes:
            text = "A set takes %.1f GB decoded, more than data.disk_cache_gb (%g): what does not fit into memory is read again."
            log.info(text, size / 1e9, self.most_bytes / 1e9)
            return False
        files = states.of_samples(dataset.samples)
        if files is None:
            return False
        key = key_of_samples("decoded", files, dataset.samples, rules).hex()
        if self._map(key, dataset):
            return True
        if decode is None or not states.certain(files):
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.info("%s cannot be written (%s): decoded images are not kept on disk.", self.folder, error)
            return False
        with self.alone(key):  # another process may be writing this set
            return self._map(key, dataset) or (
                self._write(key, dataset, size, files, states, decode) and self._map(key, dataset)
            )

    def _write(
        self, key: str, dataset: SegmentationDataset, size: int, files: Sequence[State], states: States,
        decode: Callable[[Callable[[Piece, Arrays], None]], None],
    ) -> bool:  # fmt: skip
        if not self._make_room(key, size):
            log.info(
                "%s has no room for %.1f GB of decoded images: they are read again each time.", self.folder, size / 1e9
            )
            return False
        blob, index = self.folder / f"{key}.bin", self.folder / f"{key}.json"
        parts = [self.folder / f"{path.name}.part-{secrets.token_hex(4)}" for path in (blob, index)]
        pieces: list[Any] = []
        try:
            with open(parts[0], "wb") as file:

                def keep(piece: Piece, arrays: Arrays) -> None:
                    if shutil.disk_usage(self.folder).free < size:
                        raise OSError(f"another program needs the space of {self.folder}")
                    places = [write_array(file, array) for array in arrays]
                    counts = np.zeros(256, int) if arrays[1] is None else np.bincount(arrays[1].ravel(), minlength=256)
                    pieces.append([
                        [piece.sample, *piece.window, piece.counted_rows, piece.counted_columns], places, _checksum(arrays),
                        [[one, int(counts[one])] for one in np.flatnonzero(counts).tolist()],
                    ])  # fmt: skip

                decode(keep)
                end = file.tell()
            if not states.certain(files):
                raise OSError("a file changed while it was decoded")
            pixels = None if dataset.class_pixels is None else dataset.class_pixels.tolist()
            facts = {"files": files, "pieces": pieces, "class_pixels": pixels, "bytes": end}
            parts[1].write_text(json.dumps(facts))
            for part, path in zip(
                parts, (blob, index), strict=True
            ):  # the index comes last and marks the set as complete
                os.replace(part, path)
            return True
        except OSError as error:
            log.info("%s cannot be written (%s): these images are read again each time.", blob, error)
            return False
        finally:
            _remove(parts)

    def _map(self, key: str, dataset: SegmentationDataset) -> bool:
        index, blob = self.index(key), self.folder / f"{key}.bin"
        if index is None:
            return False
        try:
            if blob.stat().st_size != index["bytes"]:
                raise ValueError("incomplete")
            mapped = MappedWindows(blob, index["pieces"])
            pixels, holds = np.zeros(256, np.int64), np.zeros((len(index["pieces"]), 256), bool)
            for number, (*_, counts) in enumerate(index["pieces"]):
                for one, count in counts:
                    pixels[one] += count
                    holds[number, one] = True
            of_all = None if index["class_pixels"] is None else np.array(index["class_pixels"], np.int64)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            log.info("%s is damaged (%s) and is written again.", blob, error)
            _remove([self.folder / f"{key}.json"])
            return False
        with contextlib.suppress(OSError):
            os.utime(self.folder / f"{key}.json")  # used now
        dataset.map(mapped, of_all, (pixels, holds))
        self._own.add(key)
        return True

    def _make_room(self, key: str, size: int) -> bool:
        """Remove what is stale, and what was used longest ago, until a set of `size` bytes fits; return False if it does not."""
        for part in self.folder.glob("*.part*"):
            its = part.name.split(".")[0]
            with contextlib.nullcontext(True) if its == key else self.alone(its, wait=False) as alone:
                if alone:
                    _remove([part])  # its writer was killed
        sets = sorted(self.folder.glob("*.json"), key=_last_used)
        sets = [path for path in sets if not self._removed_if_stale(path) and path.stem not in self._own]
        while self._taken() + size > self.most_bytes or shutil.disk_usage(self.folder).free < 2 * size:
            if not sets:
                return False
            self._remove_set(sets.pop(0))
        return True

    def _removed_if_stale(self, path: Path) -> bool:
        """Remove a set if one of its files is another by now, or gone from its folder. Return True if it was removed."""
        index = self.index(path.stem)
        try:
            stale = index is None or any(_is_stale(state) for state in index["files"])
        except (KeyError, TypeError, IndexError):
            stale = True
        if stale:
            self._remove_set(path)
        return stale

    def _remove_set(self, index: Path) -> None:
        """Remove a set; processes that have it mapped keep it until they end."""
        log.info("%s is removed, to make room.", index.with_suffix(".bin"))
        _remove([index, index.with_suffix(".bin"), index.with_suffix(".lock")])

    def _taken(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.bin*") if path.exists())


class MappedWindows:
    """The windows of a set in a file. Each is mapped when it is asked for, and let go with its arrays, so that the pages do not
    count as this process's memory for long."""

    def __init__(self, file: Path, pieces: Iterable[Any]) -> None:
        self.file = file
        self._pieces = {
            Piece(sample, Window(*window), rows, columns): (places, checksum)
            for (sample, *window, rows, columns), places, checksum, _ in pieces
        }
        self._checked: set[Piece] = set()
        self._handle = open(file, "rb")  # noqa: SIM115  # stays readable if the file is removed

    @property
    def pieces(self) -> list[Piece]:
        """The windows, in order."""
        return list(self._pieces)

    def get(self, piece: Piece) -> Arrays | None:
        """Return the arrays of a window; None if they are not there, or not what was written."""
        if piece not in self._pieces:
            return None
        places, checksum = self._pieces[piece]
        begin = places[0][0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        *_, (start, dtype, shape) = (place for place in places if place is not None)
        end = start + np.dtype(dtype).itemsize * int(np.prod(shape))
        try:
            # copy-on-write: processes share the pages, and a write would affect only this array
            content = mmap.mmap(self._handle.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin)
        except (OSError, ValueError):
            return None
        image, mask, valid = (view_of(content, place, begin) for place in places)
        if piece not in self._checked:
            if _checksum((image, mask, valid)) != checksum:
                log.warning("%s is damaged; its images are decoded again.", self.file)
                _remove([self.file.with_suffix(".json")])  # the next job writes it again
                self._pieces = {}
                return None
            self._checked.add(piece)
        return image, mask, valid

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self._handle = open(self.file, "rb")  # noqa: SIM115
        except OSError:  # removed meanwhile
            self._pieces = {}


def _checksum(arrays: Arrays) -> int:
    found = 0
    for array in arrays:
        if array is not None:
            found = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data, found)
    return found


def _is_stale(state: Sequence[Any]) -> bool:
    """Return True if a file has another state, or is gone from its folder; a folder that is gone may be a disk that is away."""
    if len(state) == 1:
        return False
    path = Path(state[0])
    try:
        found = os.stat(path)
    except OSError:
        return path.parent.is_dir()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino] != list(state[1:])


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
