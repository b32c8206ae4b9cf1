"""Metrics on their way to the store, kept in a file beside the run until the store has them: one JSON line each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    timestamp: int
    """Milliseconds since 1970."""
    step: int


class Spool:
    """Points in the order in which they came. What stands in the file outlives the process; sending it twice is harmless, as
    MLflow keeps equal points once. Several threads may append, one takes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._sent = 0
        """Bytes at the file's start that the store has."""
        self._taken = 0
        """Bytes up to the end of what `next` gave."""
        with self._lock:
            self.left = sum(1 for _ in self._points(0))

    def append(self, points: Sequence[Point], durable: bool = False) -> None:
        """Write points at the end; `durable`: a power failure does not undo it. Raises OSError, and writes none of them,
        where there is no room."""
        lines = "".join(
            json.dumps({"key": name, "value": value, "timestamp": timestamp, "step": step}) + "\n"
            for name, value, timestamp, step in points
        ).encode()
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:  # a buffer would write its rest when it is closed
                before = file.tell()
                try:
                    if (
                        before and not self._ends_a_line()
                    ):  # a writer was killed within a line: it is lost, not this one
                        lines = b"\n" + lines
                    while lines:
                        lines = lines[file.write(lines) :]
                    if durable:
                        os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, before)
                    raise
            self.left += len(points)

    def to_disk(self) -> None:
        """Make what stands in the file outlive a power failure. Raises OSError where the disk refuses."""
        with self._lock:
            if self.left:
                with open(self._path, "ab") as file:
                    os.fsync(file.fileno())

    def next(self, most: int) -> list[Point]:
        """The oldest points that the store does not have, at most `most`."""
        with self._lock:
            found = []
            for point, end in self._points(self._sent):
                found.append(point)
                self._taken = end
                if len(found) == most:
                    break
            return found

    def acknowledge(self, count: int) -> None:
        """The store has the `count` points that `next` gave last."""
        with self._lock:
            self._sent = self._taken
            self.left -= count
            if not self.left:
                with contextlib.suppress(OSError):  # it stays on a disk that became read-only; it may be sent twice
                    self._path.unlink(missing_ok=True)
                    self._sent = self._taken = 0

    def waiting(self) -> list[Point]:
        """All points that the store does not have."""
        with self._lock:
            return [point for point, _ in self._points(self._sent)]

    def _points(self, start: int) -> Iterator[tuple[Point, int]]:
        """Points from the byte `start` on, each with the byte where its line ends."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                try:
                    entry = json.loads(line)
                    point = Point(str(entry["key"]), float(entry["value"]), int(entry["timestamp"]), int(entry["step"]))
                except (ValueError, KeyError, TypeError):
                    if line.strip():
                        log.warning("%s holds a line that is no metric (its writer was killed): left out.", self._path)
                    continue
                yield point, start

    def _ends_a_line(self) -> bool:
        with open(self._path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
