"""Checks before training whether files can be written to where an experiment keeps the artifacts of its runs."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError, StoreAway
from dann_experiments.tracking.failures import of_the_store
from dann_experiments.tracking.store import in_one_line, local_folder, without_secrets

_good: set[tuple[str, str]] = set()  # (store, location): one check per process is enough


def check_artifacts(uri: str, experiment: Any) -> None:
    """Raise InputError if no file can be written to where `experiment` (MLflow's, in the store at `uri`) keeps its runs' files;
    StoreAway if the reason may be temporary.

    Writes a file by MLflow's own means and removes it, because the location alone does not show whether it is writable. It may
    be a path on the machine that created the experiment, a bucket without credentials here, or another user's folder.
    """
    location = experiment.artifact_location
    if (uri, location) in _good:
        return
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    name = f"dann-writes-here-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder, _left_as_found(local_folder(location)):
        (Path(folder) / name).write_text("Written to see whether files can be; may be removed.\n", encoding="utf-8")
        try:
            repository = get_artifact_repository(location, uri)
            repository.log_artifact(str(Path(folder) / name))
        except Exception as error:  # many kinds of stores, and libraries that may not be installed
            kind = StoreAway if of_the_store(error) else InputError
            raise kind(
                f"experiment {experiment.name!r} keeps the files of its runs in {without_secrets(location)}, where nothing can "
                f"be written from here: {in_one_line(error)}. Set tracking.experiment to another name (a new experiment keeps "
                "its files in the store's default location), or create an experiment with your own location: mlflow experiments "
                "create --experiment-name NAME --artifact-location PLACE"
            ) from None
        with contextlib.suppress(Exception):  # only writing may be allowed
            repository.delete_artifacts(name)
    _good.add((uri, location))


@contextlib.contextmanager
def _left_as_found(folder: Path | None) -> Iterator[None]:
    """Remove `folder` and its parents if the block creates them and they are empty, so that a job that is refused later leaves
    nothing behind."""
    made = []
    while folder is not None and not folder.exists() and folder != folder.parent:
        made.append(folder)
        folder = folder.parent
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for one in made:
                one.rmdir()
