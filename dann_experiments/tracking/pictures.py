"""Logs pictures by step, which MLflow's run page shows with a slider.

The files have the names that MLflow's own `log_image` gives them. They are written into the run's folder and sent by the run's
sender: training does not wait for the store, and what it does not take `sync` sends later.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import uuid
from pathlib import Path
from typing import Any

from PIL import Image

from dann_experiments.config.atomic_write import writing
from dann_experiments.config.errors import NotWritten
from dann_experiments.tracking.run import TrackedRun

log = logging.getLogger(__name__)
FOLDER = "images"
LOGGED_IMAGES = "mlflow.loggedImages"
"""Tag of runs that have such pictures: without it MLflow's page does not look for them."""
_NAME = re.compile(r"(?P<key>[^+%]+)[+%]step[+%](?P<step>\d+)[+%]timestamp[+%]\d+[+%].+")


class Pictures:
    """One series of pictures of a run, called `key`: letters, digits, and _ - . / or blanks.

    A resumed run does not log a step again of which the run has a picture already."""

    def __init__(self, run: TrackedRun, key: str) -> None:
        self._run = run
        self._key = key
        self._steps = self._known_steps() if run.resumed else set()
        self._refused = self._has_tag = False

    def has(self, step: int) -> bool:
        """Return whether the run has a picture of this step."""
        return step in self._steps

    def log(self, picture: Image.Image, step: int) -> None:
        """Write the picture, and a copy that MLflow shows while it is small, and queue both for sending. If the disk refuses,
        one warning is logged and the picture is left out."""
        name = f"{self._key.replace('/', '~')}+step+{step}+timestamp+{self._run.sender.clock.now()}+{uuid.uuid4()}"
        folder = self._run.folder / FOLDER
        files = {
            folder / f"{name}.png": _encoded(picture, "PNG", compress_level=6),
            folder / f"{name}+compressed.webp": _encoded(picture.convert("RGB"), "WEBP", quality=70, method=2),
        }
        try:
            for path, content in files.items():
                _write(path, content)
        except (NotWritten, OSError) as problem:
            for path in files:
                with contextlib.suppress(OSError):
                    path.unlink()
            if not self._refused:
                log.warning("%s The run goes on without this picture; the next is tried.", problem)
            self._refused = True
            return
        self._refused = False
        if not self._has_tag:
            self._run.set_tags({LOGGED_IMAGES: "True"})
            self._has_tag = True
        self._steps.add(step)
        for path in files:
            self._run.sender.put_file(path)

    def _known_steps(self) -> set[int]:
        """Return the steps whose pictures are in the run's folder or among its artifacts."""
        names = [path.name for path in (self._run.folder / FOLDER).glob("*") if path.suffix != ".part"]
        try:
            names += [Path(item.path).name for item in self._run.store.client.list_artifacts(self._run.run_id, FOLDER)]
        except (
            Exception
        ) as error:  # the store is away, or keeps files where they cannot be listed: a step may be shown twice
            log.debug("The pictures of run %s cannot be listed: %s", self._run.run_id, error)
        found = [match for name in names if (match := _NAME.fullmatch(name))]
        return {int(match["step"]) for match in found if match["key"] == self._key.replace("/", "~")}


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all. Raises NotWritten if the disk is the cause."""
    part = path.with_name(f"{path.name}.part")
    with writing(path, part):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
