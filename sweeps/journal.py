"""Optuna's journal file where a writer was stopped within a line: killed, or by a full disk.

Optuna appends to what stands there. The next record would share a line with the unfinished one, and the file could never be
read again. So whoever takes the file's lock to write ends its last line first.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import BinaryIO

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

log = logging.getLogger(__name__)
BLOCK = 2**16  # bytes read at a time from the file's end


class MendingLock(JournalFileSymlinkLock):
    """Optuna's own lock of a journal file; taking it ends an unfinished last line."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def acquire(self) -> bool:
        """Take the lock, then mend the file."""
        taken = super().acquire()
        try:
            end_last_line(self.path)
        except BaseException:
            self.release()
            raise
        return taken


def journal(path: Path) -> JournalFileBackend:
    """The journal at `path`, whose writers mend it."""
    return JournalFileBackend(str(path), MendingLock(str(path)))


def end_last_line(path: str) -> None:
    """Cut an unfinished last line off; a record that lacks the end of its line alone is kept and gets it. To be called with
    the file's lock taken."""
    with open(path, "r+b") as file:
        start, line = _last_line(file)
        if not line or line.endswith(b"\n"):
            return
        if _is_record(line):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            log.warning("journal %s: the last record lacked the end of its line (a full disk?); it has one now.", path)
        else:
            file.truncate(start)
            log.warning(
                "journal %s: its last line was unfinished (a killed writer, or a full disk); the %d bytes were cut off.",
                path, len(line),
            )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())


def damaged_line(path: Path) -> int | None:
    """The number of the first line, from 1, that ends and is no record; None if there is none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and not _is_record(line):
                return number
    return None


def last_line_is_damaged(path: Path) -> bool:
    """Whether the last line ends and is no record. Optuna passes over it, until there is a line behind it."""
    with open(path, "rb") as file:
        _, line = _last_line(file)
    return line.endswith(b"\n") and not _is_record(line)


def _last_line(file: BinaryIO) -> tuple[int, bytes]:
    """Where the last line starts, and its bytes; its end, if it has one, belongs to it."""
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
    """Whether it is a whole record of Optuna."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("op_code"), int) and "worker_id" in found
