"""Sends what runs left beside them because the store was away, or because their process was killed."""

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
    """The folder of one run, and what became of it."""

    run_id: str
    folder: Path
    outcome: str
    """In words."""
    is_left: bool
    """Whether the folder is still there."""


def leftovers(folder: Path) -> list[Path]:
    """The folders of runs in `folder` (`tracking.folder`) that hold something, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _RUN_ID.fullmatch(path.name))


def sync(store: Store, folder: Path) -> Iterator[Leftover]:
    """Send each run's folder in `folder` to the store and remove it; runs that are still written are left alone.

    A run ends as it did: with the status and time that it left, or KILLED where its process was killed. Nothing is sent
    twice: the store keeps equal points once, and files under their names.
    """
    for path in leftovers(folder):
        run = known_run(store, path.name)
        if run is None:
            yield Leftover(path.name, path, "is none of this store's runs (see tracking.uri): left", True)
            continue
        if is_deleted(run):
            way = f"bring it back (mlflow runs restore --run-id {path.name}), or remove the folder"
            yield Leftover(path.name, path, f"was deleted in the store: left; {way}", True)
            continue
        writer = _writer(run)
        if writer is not None:
            yield Leftover(path.name, path, f"is being written by {writer}: left", True)
            continue
        status, end_time = _end_of(path, run)
        sender = Sender(store.client, path.name, path, clock=Clock(run.info.start_time))
        sent = send_folder(sender, path, status, end_time)
        outcome = f"sent, {status}" if sent else "not taken by the store: left"
        yield Leftover(path.name, path, outcome, not sent)


def _writer(run: Any) -> str | None:
    """Who writes an open run: a living process of this machine, or one of another machine, which cannot be asked."""
    process = run.data.tags.get(Tag.PROCESS)
    if process is None or run.info.status != "RUNNING" or not (is_elsewhere(process) or live_process(process)):
        return None
    return f"process {process}"


def _end_of(path: Path, run: Any) -> tuple[str, int | None]:
    """Status and time with which the run ended."""
    try:
        end = json.loads((path / END).read_text())
        if end["status"] in ("FINISHED", "FAILED", "KILLED"):
            return end["status"], int(end["end_time"])
    except (OSError, ValueError, KeyError, TypeError):  # killed before it could say
        pass
    return (run.info.status, run.info.end_time) if run.info.status != "RUNNING" else ("KILLED", None)
