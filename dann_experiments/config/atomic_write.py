"""Writes files completely or not at all, and explains errors if the disk is full or read-only or permission is denied."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dann_experiments.config.errors import InputError, NotWritten, TrainingFailed

FULL = "no space is left on its disk"
_REASONS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: "the quota of its disk is used up",
    errno.EROFS: "its disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "it would be larger than `ulimit -f` allows",
    errno.EIO: "its disk reports an error",
    errno.ESTALE: "its disk has gone away",
}
"""Errors that users can correct and that are not bugs; all others are raised unchanged."""
_NO_TEMPORARY_FOLDER = (
    "No usable temporary directory"  # start of Python's message, which lists the folders that it tried
)


def disk_error(error: BaseException) -> OSError | None:
    """Return the disk error that `error` is or was caused by (libraries raise their own errors); None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            about_a_file = error.filename is not None or error.errno not in (errno.EACCES, errno.EPERM)
            if (error.errno in _REASONS and about_a_file) or str(error.strerror).startswith(_NO_TEMPORARY_FOLDER):
                return error
        else:
            number = re.search(r"\(os error (\d+)\)", str(error))  # from safetensors (Rust)
            if number is not None and int(number[1]) in _REASONS:
                return OSError(int(number[1]), os.strerror(int(number[1])))
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context  # pyright: ignore[reportAssignmentType]
    return None


def reason(error: OSError, place: Path, wanted: int | None = None) -> str:
    """Return the reason why `place` cannot be written, in words; `wanted`: number of bytes to write."""
    text = _REASONS.get(error.errno or 0, str(error.strerror))
    facts = []
    if text == FULL:
        with contextlib.suppress(OSError):
            there = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
            facts.append(f"{shutil.disk_usage(there).free / 1e6:.1f} MB free")
    if wanted is not None:
        facts.append(f"{wanted / 1e6:.1f} MB needed")
    return f"{text} ({', '.join(facts)})" if facts else text


@contextlib.contextmanager
def writing(path: Path, *parts: Path, wanted: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Remove incomplete files if the block fails, so that they are not mistaken for complete ones and do not fill the disk.

    The block writes `path`, a file or a folder, directly or first as `parts`. Raises NotWritten if the disk is the cause;
    `wanted` returns the number of bytes to write, for its message.
    """
    try:
        yield
    except BaseException as error:
        for half_written in parts or (path,):
            with contextlib.suppress(OSError):
                shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        answer = disk_error(error)
        if answer is None or isinstance(error, NotWritten):
            raise
        raise NotWritten(f"{path} cannot be written: {reason(answer, path, wanted())}.") from error


def explained_disk_error(error: BaseException) -> InputError | None:
    """Return an InputError for a disk error, with the file if it is known; None for other errors."""
    if isinstance(error, InputError):
        return error
    answer = None if isinstance(error, TrainingFailed) else disk_error(error)
    if answer is None:
        return None
    if answer.errno not in _REASONS:
        return NotWritten(f"{answer.strerror}; set TMPDIR to a folder that can be written to.")
    if answer.filename is None:
        return NotWritten(f"a file cannot be written: {_REASONS[answer.errno]}.")
    name = os.fsdecode(answer.filename) if isinstance(answer.filename, (str, bytes)) else str(answer.filename)
    return NotWritten(f"{name} cannot be opened or written: {reason(answer, Path(name))}.")
