"""Writes checkpoint files atomically, each with a digest in a second file to detect damage.

During training, the folder of a run holds `step_N.ckpt`, to resume after N optimizer steps, and `best_N.ckpt`, the best weights
so far, from step N. When training ends, normally or not, they become `last.ckpt` and `best.ckpt`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from dann_experiments.config.atomic_write import writing
from dann_experiments.config.errors import NotWritten

log = logging.getLogger(__name__)
LAST, BEST = "last.ckpt", "best.ckpt"
STEP, BEST_STEP = "step_", "best_"
OWN = "dann_experiments"
"""Key of this package's part of a checkpoint: epoch, positions of the loaders, best step and value."""
_DIGEST = ".blake2b"
_PART = ".part"  # suffix of a file that is being written
_CHUNK = 2**20


def numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Return step -> file for files whose names begin with `prefix` (STEP or BEST_STEP), sorted by step."""
    found = {}
    for path in folder.glob(f"{prefix}*.ckpt"):
        with contextlib.suppress(ValueError):
            found[int(path.stem.removeprefix(prefix))] = path
    return dict(sorted(found.items()))


def step_of(path: Path) -> int:
    """Return N, the number of optimizer steps, of a `step_N.ckpt`."""
    return int(path.stem.removeprefix(STEP))


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: even after a power failure, `path` is the complete new file or the previous one.

    Raises NotWritten, and leaves no partial files, if the disk is full or not writable.
    """
    part, part_of_digest = (one.with_name(one.name + _PART) for one in (path, _beside(path)))
    with writing(path, part, part_of_digest, wanted=lambda: _size(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            hashing = _Hashing(file)
            torch.save(dict(content), hashing)  # pyright: ignore[reportArgumentType]  (write and flush are all it needs)
            _to_disk(file)
        with open(part_of_digest, "w", encoding="ascii") as file:
            file.write(hashing.digest.hexdigest())
            _to_disk(file)
        os.replace(part_of_digest, _beside(path))  # first: a checkpoint never lacks its digest
        os.replace(part, path)
    _sync_folder(path.parent)


def _size(content: Mapping[str, Any]) -> int:
    """Return the size in bytes of the file for a checkpoint."""
    with open(os.devnull, "wb") as nowhere:
        counting = _Hashing(nowhere)
        torch.save(dict(content), counting)  # pyright: ignore[reportArgumentType]
        return counting.size


def is_plain(value: Any) -> bool:
    """Return True if `read` can load the value, which must consist of tensors and plain values."""
    if isinstance(value, dict):
        return all(is_plain(inner) for pair in value.items() for inner in pair)
    if isinstance(value, (list, tuple)):
        return all(is_plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint from `write`, with tensors on the CPU. Raises ValueError if the file is damaged."""
    problem = damage(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    return torch.load(path, map_location="cpu", weights_only=True)


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, None if it is undamaged."""
    if path.stat().st_size == 0:
        return "it is empty"
    try:
        wanted = _beside(path).read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        wanted = None
    if wanted is None:  # `last.ckpt` and `best.ckpt` have only the archive's own checksums
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError, OSError):
            return "it is truncated or not a checkpoint"
        return None if bad is None else "its bytes are not those that were written"
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return None if digest.hexdigest() == wanted else "its bytes are not those that were written"


def newest_intact(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint to resume from, None if there is none; log damaged ones."""
    for path in reversed(numbered(folder, STEP).values()):
        problem = damage(path)
        if problem is None:
            return path
        log.warning("Checkpoint %s is damaged (%s); the one before it is used.", path, problem)
    return None


def forget_after(folder: Path, step: int) -> None:
    """Remove later checkpoints and partial files, which a run that resumes from `step` will write again."""
    for prefix in (STEP, BEST_STEP):
        for found, path in numbered(folder, prefix).items():
            if found > step:
                remove(path)
    for part in folder.glob(f"*{_PART}"):
        part.unlink(missing_ok=True)


def best_of(folder: Path, step: int) -> Path | None:
    """Return the file of the best weights, from `step`; None if it is missing or damaged."""
    path = folder / f"{BEST_STEP}{step}.ckpt"
    return path if path.exists() and damage(path) is None else None


def finish(folder: Path, best_step: int | None) -> None:
    """At the end of training, keep the newest checkpoint as `last.ckpt` and the best as `best.ckpt`; remove the others."""
    steps, bests = numbered(folder, STEP), numbered(folder, BEST_STEP)
    if steps:  # first, so that `reopen` still finds the best weights after a kill here
        os.replace(steps[max(steps)], folder / LAST)
    if best_step in bests:
        os.replace(bests[best_step], folder / BEST)
    for path in [*numbered(folder, STEP).values(), *numbered(folder, BEST_STEP).values()]:
        remove(path)
    for path in [*folder.glob(f"*{_DIGEST}"), *folder.glob(f"*{_PART}")]:
        path.unlink()


def reopen(folder: Path) -> None:
    """Undo `finish` for a run that resumes."""
    last = folder / LAST
    if not last.exists():
        return
    problem = damage(last)
    if problem is not None:
        log.warning("Checkpoint %s is damaged (%s).", last, problem)
        return
    content = read(last)
    best = content[OWN]["best_step"]
    if best is not None and (folder / BEST).exists():
        os.replace(folder / BEST, folder / f"{BEST_STEP}{best}.ckpt")
    os.replace(last, folder / f"{STEP}{content['global_step']}.ckpt")


def ready_to_resume(folder: Path) -> Path | None:
    """Prepare the checkpoints in `folder` for a run that resumes, and return the newest undamaged one.

    Remove later files, which the run will write again. Without such a checkpoint, return None and remove all numbered ones.
    """
    reopen(folder)
    found = newest_intact(folder)
    forget_after(folder, -1 if found is None else step_of(found))
    return found


def remove(path: Path) -> None:
    """Remove a checkpoint and its digest."""
    path.unlink(missing_ok=True)
    _beside(path).unlink(missing_ok=True)


class WholeFiles(CheckpointIO):
    """Lightning's checkpoint plugin, based on `write` and `read`.

    In distributed training, all processes make these calls together, so an error of one must not be raised here. It is kept in
    `problem` instead; while that is set, nothing is written.
    """

    problem: NotWritten | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if self.problem is None:
            try:
                write(checkpoint, Path(path))
            except NotWritten as error:
                self.problem = error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


class _Hashing:
    """A file object for torch.save that counts and hashes the bytes written."""

    def __init__(self, file: Any) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self.size = 0
        self._file = file

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + _DIGEST)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entries to the disk."""
    with contextlib.suppress(OSError):  # not all systems can open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
