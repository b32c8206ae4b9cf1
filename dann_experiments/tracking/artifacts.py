"""Looks, before anything is trained, whether files can be put where an experiment keeps those of its runs."""

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

_good: set[tuple[str, str]] = set()  # (store, place): one look in a process is enough


def check_artifacts(uri: str, experiment: Any) -> None:
    """Raises InputError if no file can be written where `experiment` (MLflow's) of the store at `uri` keeps its runs' files,
    StoreAway if that may change.

    MLflow's own way to that place is taken, and what it writes there is removed: a location tells little by itself. It may be
    a path of the machine that made the experiment, a bucket without credentials here, or a folder of somebody else.
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
        except Exception as error:  # stores of many kinds, and libraries that are not installed
            kind = StoreAway if of_the_store(error) else InputError
            raise kind(
                f"experiment {experiment.name!r} keeps the files of its runs in {without_secrets(location)}, where nothing can "
                f"be written from here: {in_one_line(error)}. Give tracking.experiment another name (a new experiment keeps its "
                "files where the store puts them now), or make one with a place of your own: mlflow experiments create "
                "--experiment-name NAME --artifact-location PLACE"
            ) from None
        with contextlib.suppress(Exception):  # it may be allowed to write alone
            repository.delete_artifacts(name)
    _good.add((uri, location))


@contextlib.contextmanager
def _left_as_found(folder: Path | None) -> Iterator[None]:
    """Remove the folders that the block makes on the way to `folder`, if they are empty: a job that is refused later leaves
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
