"""The table of the images of a prediction: which are mapped, which are not, and why."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Sequence
from pathlib import Path

from dann_experiments.data.virtual import shown
from dann_experiments.prediction.mapping import Ended

COLUMNS = ("input", "output", "status", "seconds", "message")
WAITING, MAPPED, EXISTING, FAILED = "waiting", "mapped", "existing", "failed"
"""Values of the column status. existing: the map was there, made with the same settings."""
SHARE = 0.1  # of the time that writing the table may take, while images are mapped


class Manifest:
    """A CSV file with a row per image. It is replaced as images end, so it is complete at any time."""

    def __init__(self, path: Path, work: Sequence[tuple[Path, Path]]) -> None:
        """Write the table to `path`, with every pair of image and map as waiting."""
        self.path = path
        self._rows = [[shown(source), str(output), WAITING, "", ""] for source, output in work]
        self.write()

    def add(self, end: Ended) -> None:
        """Note how an image ended, and write the table unless that would take too much time; `write` does it at the end."""
        status = FAILED if end.outcome is None else MAPPED if end.outcome.written else EXISTING
        self._rows[end.number][2:] = [status, f"{end.seconds:.3f}", " ".join(end.problem.split())]
        if time.perf_counter() >= self._next:
            self.write()

    def write(self) -> None:
        """Write the table."""
        start = time.perf_counter()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        with open(new, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *self._rows])
        os.replace(new, self.path)
        end = time.perf_counter()
        self._next = end + (end - start) / SHARE
