"""Keeps metrics in a file in the run's folder until the store has them: one JSON line per value."""

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
    """A queue of points in a file, which outlives the process. Sending a point twice is harmless, as MLflow keeps equal points
    once. Several threads may append, but only one may call `next` and `acknowledge`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._sent = 0
        """Number of bytes from the start of the file that the store has."""
        self._taken = 0
        """Number of bytes up to the end of what `next` returned."""
        with self._lock:
            self.left = sum(1 for _ in self._points(0))

    def append(self, points: Sequence[Point], durable: bool = False) -> None:
        """Append points; `durable`: so that they survive a power failure. If the disk is full, raises OSError and writes none."""
        lines = "".join(
            json.dumps({"key": name, "value": value, "timestamp": timestamp, "step": step}) + "\n"
            for name, value, timestamp, step in points
        ).encode()
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:  # a buffer would write its rest after a failure, too
                before = file.tell()
                try:
                    if before and not self._ends_a_line():  # a writer was killed: lose its last line, but not this one
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
        """Make the file's content survive a power failure. Raises OSError if the disk refuses."""
        with self._lock:
            if self.left:
                with open(self._path, "ab") as file:
                    os.fsync(file.fileno())

    def next(self, most: int) -> list[Point]:
        """Return the oldest points that the store does not have, at most `most`."""
        with self._lock:
            found = []
            for point, end in self._points(self._sent):
                found.append(point)
                self._taken = end
                if len(found) == most:
                    break
            return found

    def acknowledge(self, count: int) -> None:
        """Record that the store has the `count` points that `next` returned last."""
        with self._lock:
            self._sent = self._taken
            self.left -= count
            if not self.left:
                with contextlib.suppress(OSError):  # on a disk that became read-only it stays and may be sent twice
                    self._path.unlink(missing_ok=True)
                    self._sent = self._taken = 0

    def waiting(self) -> list[Point]:
        """Return all points that the store does not have."""
        with self._lock:
            return [point for point, _ in self._points(self._sent)]

    def _points(self, start: int) -> Iterator[tuple[Point, int]]:
        """Yield the points from byte `start` on, each with the byte where its line ends."""
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
                        log.warning("%s: skipped a line that is not a metric (its writer was killed).", self._path)
                    continue
                yield point, start

    def _ends_a_line(self) -> bool:
        with open(self._path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
