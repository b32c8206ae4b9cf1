"""Makes, and removes at the end, the folder in which the processes of one sweep or comparison share their decoded data."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dann_experiments.data import shared_cache
from dann_experiments.tracking.processes import is_gone, process_name

log = logging.getLogger(__name__)
PLACE, OWNER = ".decoded", "process.txt"


@contextlib.contextmanager
def shared_data(tracking_folder: Path) -> Iterator[Path | None]:
    """Provide a folder of this process below `tracking_folder`, which its workers share; the process itself uses it in the block,
    too. Provide None, and share nothing, if it cannot be made. Remove folders that ended processes of this machine left."""
    place = tracking_folder.resolve() / PLACE
    folder = place / process_name().replace("/", "_")
    try:
        new = [place, *(one for one in place.parents if not one.exists())]
        _remove_left(place)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWNER).write_text(process_name())
    except OSError as error:
        log.info("%s cannot be written (%s): each process reads its own data.", folder, error)
        yield None
        return
    shared_cache.share(folder)
    try:
        yield folder
    finally:
        shared_cache.share(None)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other processes may have folders there
            for one in new:  # a sweep that is refused leaves nothing behind
                one.rmdir()


def shared_by(
    launcher: Literal["processes", "ray"], tracking_folder: Path
) -> contextlib.AbstractContextManager[Path | None]:
    """Open the folder that driver and workers share, as `shared_data` does; it is None on a Ray cluster, whose workers may be on
    other machines."""
    return contextlib.nullcontext() if launcher == "ray" else shared_data(tracking_folder)


def _remove_left(place: Path) -> None:
    for owner in place.glob(f"*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if is_gone(owner.read_text()):
                shutil.rmtree(owner.parent, ignore_errors=True)
