"""Repairs Optuna's journal file if a writer stopped in the middle of a line: it was killed, or the disk was full.

Optuna appends to the file, so the next record would be on the same line as the unfinished one, and the file could not be read
any more. So every writer repairs the last line first, after it has taken the lock of the file.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import BinaryIO

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

log = logging.getLogger(__name__)
BLOCK = 2**16  # bytes read at a time, from the end of the file


class MendingLock(JournalFileSymlinkLock):
    """Optuna's lock of a journal file; taking it also repairs an unfinished last line."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def acquire(self) -> bool:
        """Take the lock, then repair the file."""
        taken = super().acquire()
        try:
            end_last_line(self.path)
        except BaseException:
            self.release()
            raise
        return taken


def journal(path: Path) -> JournalFileBackend:
    """Return the journal at `path`; its writers repair it."""
    return JournalFileBackend(str(path), MendingLock(str(path)))


def end_last_line(path: str) -> None:
    """Cut off an unfinished last line; a complete record without a line end gets one. The caller holds the lock of the file."""
    with open(path, "r+b") as file:
        start, line = _last_line(file)
        if not line or line.endswith(b"\n"):
            return
        if _is_record(line):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            log.warning("journal %s: the last record lacked the end of its line (a full disk?); it was added.", path)
        else:
            file.truncate(start)
            log.warning(
                "journal %s: its last line was unfinished (a killed writer, or a full disk); the %d bytes were cut off.",
                path, len(line),
            )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())


def damaged_line(path: Path) -> int | None:
    """Return the number, from 1, of the first complete line that is no record; None if there is none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and not _is_record(line):
                return number
    return None


def last_line_is_damaged(path: Path) -> bool:
    """Return whether the last line is complete but no record. Optuna ignores such a line until another one follows."""
    with open(path, "rb") as file:
        _, line = _last_line(file)
    return line.endswith(b"\n") and not _is_record(line)


def _last_line(file: BinaryIO) -> tuple[int, bytes]:
    """Return the offset of the last line and its bytes, including its line end, if any."""
    start = file.seek(0, os.SEEK_END)
    line = b""
    while start > 0:
        size = min(BLOCK, start)
        start -= size
        file.seek(start)
        line = file.read(size) + line
        before = line.rfind(b"\n", 0, -1)
        if before >= 0:
            return start + before + 1, line[before + 1 :]
    return 0, line


def _is_record(line: bytes) -> bool:
    """Return whether a line is a complete record of Optuna."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("op_code"), int) and "worker_id" in found
