"""The folder in which the processes of one sweep or comparison share their decoded data: made, and gone at the end."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from dann_experiments.data import shared_cache
from dann_experiments.tracking.processes import is_gone, process_name

log = logging.getLogger(__name__)
PLACE, OWNER = ".decoded", "process.txt"


@contextlib.contextmanager
def shared_data(tracking_folder: Path) -> Iterator[Path | None]:
    """A folder of this process below `tracking_folder`, for workers to be told; this process shares in the block, too. None, and
    nothing is shared, where it cannot be made. What processes of this machine that are gone left there is removed."""
    place = tracking_folder.resolve() / PLACE
    new = not place.parent.exists()
    _remove_left(place)
    folder = place / process_name().replace("/", "_")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWNER).write_text(process_name())
    except OSError as error:
        log.info("%s cannot be written (%s): each process reads its data for itself.", folder, error)
        yield None
        return
    shared_cache.share(folder)
    try:
        yield folder
    finally:
        shared_cache.share(None)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others have theirs there
            place.rmdir()
            if new:  # a sweep that is refused leaves nothing behind
                place.parent.rmdir()


def _remove_left(place: Path) -> None:
    for owner in place.glob(f"*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if is_gone(owner.read_text()):
                shutil.rmtree(owner.parent, ignore_errors=True)
