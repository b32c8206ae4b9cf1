"""Fetches models by address: a file, a folder, runs:/ID[/path], models:/m-ID, models:/NAME@ALIAS or models:/NAME/VERSION."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dann_experiments.checkpoints.mlmodel import check_mlmodel
from dann_experiments.config.errors import InputError, NotWritten
from dann_experiments.config.paths import local_path
from dann_experiments.data.samples import file_digest
from dann_experiments.names import Key, Tag
from dann_experiments.tracking.logged_model import MODEL, logged_model
from dann_experiments.tracking.store import Store, check_room, in_one_line, local_folder, whole_run_id


@contextlib.contextmanager
def fetched(path: str, store: Store, key: str = Key.SOURCE_MODEL) -> Iterator[tuple[Path, str | None]]:
    """Provide the result of `fetch` in the block, then remove the copy. Raises InputError if the model does not exist."""
    with tempfile.TemporaryDirectory() as folder:
        local, run_id = fetch(path, Path(folder), store, key)
        if not os.path.exists(local):  # never raises, even for impossible names
            raise InputError(
                f"{key} is {path}, which does not exist; give a file, a folder, runs:/ID or models:/NAME@ALIAS."
            )
        if not (local.is_file() or local.is_dir()):  # reading a pipe may block, /dev/zero never ends
            raise InputError(f"{key} is {path}, which is neither a file nor a folder; give one.")
        if local.is_dir():
            check_mlmodel(local, path)
        yield local, run_id


def fetch(path: str, folder: Path, store: Store, key: str = Key.SOURCE_MODEL) -> tuple[Path, str | None]:
    """Return the path of a model, copied to `folder` if it comes from the store, and the id of the run that made it, if known.

    `key`: the setting that messages name. Raises InputError if the store does not have it, NotWritten if `folder` has no room.
    """
    if not path.startswith(("runs:/", "models:/")):
        return local_path(path, key), None
    import mlflow
    from mlflow.exceptions import MlflowException

    given, place, model = path, "", None
    try:
        if path.startswith("runs:/"):
            run_id, _, inside = with_whole_run_id(path, store).removeprefix("runs:/").partition("/")
            path = f"runs:/{run_id}/{inside or MODEL}"
            run = store.client.get_run(run_id)
            if inside.rstrip("/") in ("", MODEL):
                model = logged_model(store.client, run.info.experiment_id, run_id)
            what = f"{inside or MODEL} of run {run_id}"
            if model is None:
                place = run.info.artifact_uri
                check_room(store, place, inside or MODEL, what, folder)
            else:
                path = place = model.artifact_location
                check_room(store, place, "", what, folder)
        else:
            path, run_id = registered(path, store)
            place = path
        local = mlflow.artifacts.download_artifacts(artifact_uri=path, dst_path=str(folder), tracking_uri=store.uri)
        return Path(local), run_id
    except NotWritten:
        raise
    except (MlflowException, OSError, ValueError) as error:
        files = local_folder(place)
        if place and files is not None and not files.exists():
            # a run's folder is made with its first file
            or_none = "" if given.startswith("models:/") or model is not None else "the run kept no file, or "
            raise InputError(
                f"{key} is {given!r}, whose files the tracking store has in {files}, which does not exist: {or_none}the store "
                "was made in another folder or on another machine. Put the files back there, or give the model's own folder."
            ) from None
        raise InputError(f"{key} is {given!r}, which the tracking store does not have: {in_one_line(error)}") from None


def registered(path: str, store: Store) -> tuple[str, str | None]:
    """Return the address of a registered or logged model's files, and the id of its run, if known.

    Asks the store's own client: MLflow would look up a `models:/` address in the registry of the process, which may differ from
    that of the store in the settings.
    """
    name, at, alias = path.removeprefix("models:/").partition("@")
    if re.fullmatch(r"m-[0-9a-f]{32}", name) and not at:
        model = store.client.get_logged_model(name)
        return model.artifact_location, model.source_run_id
    name, _, version = name.partition("/")
    if at:
        found = store.client.get_model_version_by_alias(name, alias)
    elif version == "latest":
        versions = store.client.search_model_versions(f"name = '{name}'") if "'" not in name else []
        if not versions:
            raise ValueError(f"there is no registered model {name!r}")
        found = max(versions, key=lambda one: int(one.version))
    elif not version.isdecimal():
        raise ValueError(
            "an address of a registered model is models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS, that of a "
            "logged one models:/m-ID"
        )
    else:
        found = store.client.get_model_version(name, version)
    return store.client.get_model_version_download_uri(found.name, found.version), found.run_id or None


def with_whole_run_id(path: str, store: Store) -> str:
    """Return the address of a model, with the whole id if it is `runs:/` and the first letters of a run's id."""
    if not path.startswith("runs:/"):
        return path
    given, slash, inside = path.removeprefix("runs:/").partition("/")
    return f"runs:/{whole_run_id(store, given)}{slash}{inside}"


def digest_of_model(store: Store, path: str, local: Path, run_id: str | None) -> str:
    """Return a text that identifies the model at `path`, which was fetched to `local`.

    For a run's model it is the run's tag `dann.digest` (runs with equal digests make equal models), for anything else in a run
    its address, and otherwise a digest of the files' bytes.
    """
    inside = path.partition("/")[2].partition("/")[2] if path.startswith("runs:/") else ""
    if run_id is not None and inside in ("", "model"):
        known = store.client.get_run(run_id).data.tags.get(Tag.DIGEST)
        if known is not None:
            return known
    if path.startswith("runs:/"):
        return with_whole_run_id(path, store)
    digest = hashlib.blake2b(digest_size=16)  # of the bytes: a file may be rewritten, an alias moved
    for file in sorted(file for file in local.rglob("*") if file.is_file()) if local.is_dir() else [local]:
        digest.update(file.relative_to(local).as_posix().encode() + file_digest(file))
    return digest.hexdigest()
