"""Sends what runs left in their folders because the store was away, or because their process was killed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dann_experiments.names import Tag
from dann_experiments.tracking.clock import Clock
from dann_experiments.tracking.deleted import is_deleted
from dann_experiments.tracking.processes import is_elsewhere, live_process
from dann_experiments.tracking.run import END, send_folder
from dann_experiments.tracking.sender import Sender
from dann_experiments.tracking.store import Store, known_run

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Leftover:
    """The folder of one run, and what `sync` did with it."""

    run_id: str
    folder: Path
    outcome: str
    """What was done, in words."""
    is_left: bool
    """True if the folder still exists."""


def leftovers(folder: Path) -> list[Path]:
    """Return the folders of runs in `folder` (`tracking.folder`), sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _RUN_ID.fullmatch(path.name))


def sync(store: Store, folder: Path) -> Iterator[Leftover]:
    """Send each run's folder in `folder` to the store and remove it; skip runs that are still being written.

    A run gets the status and end time that it recorded, or KILLED if its process was killed. Sending something again does no
    harm: the store keeps equal points once, and files by their names.
    """
    for path in leftovers(folder):
        run = known_run(store, path.name)
        if run is None:
            yield Leftover(path.name, path, "is not a run of this store (see tracking.uri): left", True)
            continue
        if is_deleted(run):
            way = f"restore it (mlflow runs restore --run-id {path.name}), or remove the folder"
            yield Leftover(path.name, path, f"was deleted in the store: left; {way}", True)
            continue
        writer = _writer(run)
        if writer is not None:
            yield Leftover(path.name, path, f"is being written by {writer}: left", True)
            continue
        status, end_time = _end_of(path, run)
        sender = Sender(store.client, path.name, path, clock=Clock(run.info.start_time))
        sent = send_folder(sender, path, status, end_time)
        outcome = f"sent, {status}" if sent else "not accepted by the store: left"
        yield Leftover(path.name, path, outcome, not sent)


def _writer(run: Any) -> str | None:
    """Return which process writes an open run: a living one of this machine, or any of another machine, else None."""
    process = run.data.tags.get(Tag.PROCESS)
    if process is None or run.info.status != "RUNNING" or not (is_elsewhere(process) or live_process(process)):
        return None
    return f"process {process}"


def _end_of(path: Path, run: Any) -> tuple[str, int | None]:
    """Return the status and the time with which the run ended."""
    try:
        end = json.loads((path / END).read_text())
        if end["status"] in ("FINISHED", "FAILED", "KILLED"):
            return end["status"], int(end["end_time"])
    except (OSError, ValueError, KeyError, TypeError):  # killed before it recorded its end
        pass
    return (run.info.status, run.info.end_time) if run.info.status != "RUNNING" else ("KILLED", None)
