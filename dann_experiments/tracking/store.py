"""Opens the MLflow tracking store that settings or environment name, and reports if it does not answer."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import socket
import typing
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, unquote_plus, urlsplit

from dann_experiments.config.errors import InputError, NotWritten, StoreAway
from dann_experiments.config.store_names import LONGEST_EXPERIMENT
from dann_experiments.tracking.deleted import DELETED
from dann_experiments.tracking.environment import EXPERIMENT_ID, RUN_ID, given_run, wanted_experiment
from dann_experiments.tracking.sqlite import absolute, check_file, look_at_metrics, one_opens

log = logging.getLogger(__name__)
DEFAULT_URI = "sqlite:///mlflow.db"
ADDRESSES = "give sqlite:///FILE, http://HOST:PORT or a database's address"
ANSWER_SECONDS = 10.0
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306}
EXPERIMENT_KIND = "mlflow.experimentKind"  # makes the UI show its runs as trainings
TRAINING_PAGES = "workflowType=machine_learning"  # in an address: MLflow shows its pages for trainings, not for GenAI
_NAMED_SO = "user|passw|pwd|token|secret|api_?key|auth|sig|cred"  # in names of secret parameters of an address
SHORTEST_SECRET = 4  # shorter ones would be found in many words; in addresses they are removed in any case
_secrets: set[str] = set()
# Wait for a server that restarts: five tries with pauses of 0, 2, 4, 8 and 16 s. Metrics wait longer, in our sender.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # MLflow prints it with the password in it


@dataclass(frozen=True)
class Store:
    """An open tracking store."""

    uri: str = field(repr=False)  # may contain a password
    client: Any = field(repr=False)
    experiment_id: str
    """Empty if the experiment does not exist and was not to be created."""
    experiment: str
    """Name of the experiment."""
    claimed_run_id: str | None
    """The run that `mlflow run` created for this process, to be used by its main job."""


def open_store(uri: str | None, experiment: str | None, for_runs: bool = True, to_write: bool = True) -> Store:
    """Open the store at `uri`, else at MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, with its experiment: `experiment`, else the
    one that MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID names, else `dann`. A new experiment is created.

    Under `mlflow run` (MLFLOW_RUN_ID names a run that waits for a job) the store, experiment and run are those that it created.
    The variable is then removed, so that further runs of this process and its children are new runs. `for_runs` False, for jobs
    that create no run, keeps the variable, creates no experiment and does not check where its files are kept. `to_write` False
    accepts a read-only sqlite file. Raises InputError if the store cannot be used, or no file can be written to where the
    experiment keeps them; StoreAway if the reason may be temporary.
    """
    run_id = os.environ.pop(RUN_ID, None) if for_runs else os.environ.get(RUN_ID)
    store = _open(uri, experiment, run_id, for_runs, to_write) if run_id else None
    return store or typing.cast(Store, _open(uri, experiment, None, for_runs, to_write))


def _open(uri: str | None, experiment: str | None, run_id: str | None, for_runs: bool, to_write: bool) -> Store | None:
    """Do the work of `open_store`, to use run `run_id` if set; None if that run is not waiting for a job."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    name = "MLFLOW_TRACKING_URI" if from_environment and (run_id or not uri) else "tracking.uri"
    uri = absolute((from_environment if run_id else None) or uri or from_environment or DEFAULT_URI)
    for address in (uri, os.environ.get("MLFLOW_REGISTRY_URI", "")):
        remember_secrets(address)
    given = f"{name} is {without_secrets(uri)!r}"
    _check_answers(uri, given, to_write)
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from dann_experiments.tracking.artifacts import check_artifacts
    from dann_experiments.tracking.notes import note_to_set

    logging.getLogger("alembic").setLevel(logging.WARNING)  # else one line for each of dozens of migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # else a traceback for each error
    _check_variables()
    try:
        with one_opens(uri, given):
            if to_write:
                look_at_metrics(uri)
            client = mlflow.MlflowClient(tracking_uri=uri)
            if run_id:
                run = given_run(client, run_id)
                if run is None:
                    return None
                known = client.get_experiment(run.info.experiment_id)
            else:
                wanted, known, named_by = wanted_experiment(client, experiment)
                if known is None and not for_runs:
                    return Store(uri, client, "", wanted, None)
                known = known or _made_experiment(client, wanted, named_by)
                if known.lifecycle_stage == DELETED and for_runs:
                    raise InputError(
                        f"{named_by} is {known.experiment_id if named_by == EXPERIMENT_ID else wanted!r}, an experiment that was "
                        f"deleted; restore it (mlflow experiments restore --experiment-id {known.experiment_id}) or use another."
                    )
            if for_runs and EXPERIMENT_KIND not in known.tags:
                client.set_experiment_tag(known.experiment_id, EXPERIMENT_KIND, "custom_model_development")
            if for_runs and to_write:
                for key, text in note_to_set(known.tags).items():
                    client.set_experiment_tag(known.experiment_id, key, text)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise InputError(f"{given}, which cannot be used: {in_one_line(error)}") from None
    if for_runs and to_write:
        check_artifacts(uri, known)
    return Store(uri, client, known.experiment_id, known.name, run_id)


def _made_experiment(client: Any, name: str, named_by: str) -> Any:
    """Create an experiment, with its files in the store's default location."""
    from mlflow.exceptions import MlflowException

    if len(name) > LONGEST_EXPERIMENT:
        raise InputError(
            f"{named_by} has {len(name)} characters, but a store allows at most {LONGEST_EXPERIMENT}; shorten it."
        )
    try:
        return client.get_experiment(client.create_experiment(name))
    except MlflowException:
        known = client.get_experiment_by_name(name)  # another process may have created it meanwhile
        if known is None:
            raise
        return known


def without_secrets(text: str) -> str:
    """Return `text` (an address, a message, a traceback) without `user:password@` and the values of `password=...` in addresses
    and, unless the whole text is an address, without the secrets that `remember_secrets` has collected."""
    whole = re.fullmatch(r"[\w+.-]+://\S*", text) is not None
    for secret in () if whole else sorted(_secrets, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    text = re.sub(r"(?<=://)\S*@", "", text)  # up to the last @: a password may contain any character
    value = r"[^&]*" if whole else r"[^&\s'\"<>]*"
    return re.sub(rf"(?<=[?&])([^=&\s]*(?:{_NAMED_SO})[^=&\s]*=){value}", r"\1***", text, flags=re.IGNORECASE)


def in_one_line(error: BaseException) -> str:
    """Return the first line of an error's message, without passwords and without SQLAlchemy's advice for programmers."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("(raised as a result of")]
    return without_secrets((lines or [type(error).__name__])[0])[:300]


def remember_secrets(address: str) -> None:
    """Collect the passwords in an address for `without_secrets`, in every form in which a message may contain them: libraries
    decode them, and the end of a password with blanks or quotes cannot be recognized in a text."""
    user_info = address.partition("://")[2]
    found = [user_info.rpartition("@")[0].partition(":")[2], user_info.partition("@")[0].partition(":")[2]]
    if "@" not in user_info:
        found = []
    for name, value in (part.split("=", 1) for part in re.split("[?&]", address)[1:] if "=" in part):
        if re.search(_NAMED_SO, name, re.IGNORECASE) and "user" not in name.lower():
            found.append(value)
    found += [os.environ.get(name, "") for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")]
    for secret in found:
        forms = {secret, unquote(secret), unquote_plus(secret), quote(unquote(secret), safe="")}
        _secrets.update(form for form in forms if len(form) >= SHORTEST_SECRET)


def check_run_id(run_id: str) -> None:
    """Raise InputError for an id that is not a plain name: folders are named after it, and a server could send `../..`."""
    if not re.fullmatch(r"\w[\w-]*", run_id):
        raise InputError(
            f"the tracking store has a run called {run_id!r}, which cannot be the name of a folder; use another store."
        )


def known_run(store: Store, run_id: str) -> Any | None:
    """Return a run with its metrics, params and tags; None if the store has no run with that id."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run_id)
    except MlflowException:
        return None


def whole_run_id(store: Store, given: str) -> str:
    """Return the id of the run whose id begins with `given`, as tables show only the first letters; `given` itself if there is no
    such run. Raises InputError if there are several."""
    if not re.fullmatch("[0-9a-f]{4,31}", given) or known_run(store, given) is not None:
        return given
    from mlflow.entities import ViewType

    experiments = store.client.search_experiments(view_type=ViewType.ALL)
    found = store.client.search_runs(
        [one.experiment_id for one in experiments], f"attributes.run_id LIKE '{given}%'", ViewType.ALL, 3
    )
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found)
        raise InputError(f"several runs have an id that begins with {given} ({ids}, ...); give more of it.")
    return found[0].info.run_id if found else given


def experiment_ids(store: Store) -> list[str]:
    """Return the ids of all experiments of the store."""
    return [experiment.experiment_id for experiment in store.client.search_experiments()]


def found_runs(store: Store, experiments: Sequence[str], wanted: str, page: int = 1000) -> Iterator[Any]:
    """Yield the runs that match MLflow's filter `wanted`, newest first, fetched in pages of `page` runs as needed: each run comes
    with all its params, tags and last values, and a thousand of them take seconds."""
    token = None
    while True:
        order = ["attributes.start_time DESC"]
        runs = store.client.search_runs(experiments, wanted, max_results=page, order_by=order, page_token=token)
        yield from runs
        token = runs.token
        if not token:
            return


def quoted(text: str) -> str | None:
    """Return a text quoted for MLflow's filters; None for what they do not support: backslashes, or quotes of both kinds."""
    quote = '"' if "'" in text else "'"
    return None if quote in text or "\\" in text else f"{quote}{text}{quote}"


def newest_finished(
    store: Store,
    tags: Mapping[str, str],
    experiments: Sequence[str] | None = None,
    params: Mapping[str, object] | None = None,
) -> str | None:
    """Return the id of the newest finished run with these tags and params, in any experiment of the store; None if there is none.
    `experiments`: the ids of all experiments, to save requests."""
    wanted = " and ".join(
        [
            *(f"tags.`{key}` = '{value}'" for key, value in tags.items()),
            *(f"params.`{key}` = '{value}'" for key, value in (params or {}).items()),
            "attributes.status = 'FINISHED'",
        ]
    )
    places = experiment_ids(store) if experiments is None else experiments
    run = next(found_runs(store, places, wanted, page=1), None)
    return None if run is None else run.info.run_id


def local_artifact_folder(store: Store, run_id: str) -> Path | None:
    """Return the folder of the run's artifacts on this machine; None if the store keeps them elsewhere."""
    return local_folder(store.client.get_run(run_id).info.artifact_uri)


def local_folder(uri: str) -> Path | None:
    """Return the folder on this machine of the artifacts of a run with that `artifact_uri`; None if they are elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        from mlflow.utils.file_utils import local_file_uri_to_path

        return Path(local_file_uri_to_path(uri))
    return Path(uri) if parts.scheme == "" else None


def check_room(store: Store, location: str, path: str, what: str, folder: Path) -> None:
    """Raise NotWritten if the files below `path` in the artifact store at `location` are larger than the free space on the disk
    of `folder`, to which they are to be copied: MLflow does not report why a copy failed. `what` they are, for the message."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    def size(inside: str) -> int:
        items = repository.list_artifacts(inside or None)
        return sum(size(item.path) if item.is_dir else item.file_size or 0 for item in items if item.path != inside)

    with contextlib.suppress(MlflowException, OSError):  # the copy itself will fail with this error
        repository = get_artifact_repository(location, store.uri)
        wanted, free = size(path), shutil.disk_usage(folder).free
        if wanted > free:
            raise NotWritten(
                f"{what} has no room in {folder}: {wanted / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free. Free some space "
                "(TMPDIR sets the folder of temporary files)."
            )


def remove_artifacts(store: Store, run_id: str, folder: str, keep: Collection[str]) -> None:
    """Remove the files in a run's artifact folder, except those named in `keep`. Errors of the store are only logged."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        repository = get_artifact_repository(store.client.get_run(run_id).info.artifact_uri, store.uri)
        for item in repository.list_artifacts(folder):
            if item.path.rpartition("/")[2] not in keep:
                repository.delete_artifacts(item.path)
    except Exception as error:  # many kinds of stores; old files do no harm
        log.info("Old files in %s of run %s could not be removed (%s).", folder, run_id, without_secrets(str(error)))


def _check_answers(uri: str, given: str, to_write: bool) -> None:
    """Raise InputError, which begins with `given`, if the store cannot be used; StoreAway if the reason may be temporary."""
    scheme = urlsplit(uri).scheme
    shown = without_secrets(uri)
    if scheme in ("http", "https"):
        try:
            urllib.request.urlopen(shown.rstrip("/") + "/health", timeout=ANSWER_SECONDS)  # noqa: S310
        except urllib.error.HTTPError:
            pass  # the server answers: a proxy may require a login that MLflow's own client has
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StoreAway(
                f"{given}, but no server answers there ({reason}); start one with `make ui`, or set tracking.uri to "
                "sqlite:///mlflow.db."
            ) from None
    elif scheme == "sqlite":
        if shown != uri:
            raise InputError(f"{given}; a sqlite file has no password: leave it out.")
        check_file(uri, given, to_write)
    elif scheme.partition("+")[0] in DATABASE_PORTS:
        _check_listens(uri, given, DATABASE_PORTS[scheme.partition("+")[0]])
    elif scheme in ("", "file"):
        _refuse_folder(uri, given)
    elif scheme.partition("+")[0] != "mssql":  # not checked: its apparent host may be the name of an ODBC source
        raise InputError(f"{given}; {ADDRESSES}.")


def _refuse_folder(uri: str, given: str) -> None:
    """Raise InputError for a store of files, which MLflow no longer writes, with instructions to move the runs in it."""
    folder = (local_folder(uri) or Path(uri)).expanduser().resolve()
    told = f"{given}; {ADDRESSES}: MLflow no longer keeps runs in a folder."
    if any(folder.glob("*/meta.yaml")) or any(folder.glob("mlruns/*/meta.yaml")):
        names = ("mlflow.db", *(f"mlflow_{number}.db" for number in range(2, 100)))
        new = next(name for name in names if not Path(name).exists())  # the command would overwrite it
        told = (
            f"{given}, a folder of runs; MLflow keeps them in a database now. Move them there: mlflow migrate-filestore --source "
            f"{shlex.quote(str(folder))} --target sqlite:///{new} (their files stay in that folder), then give sqlite:///{new}."
        )
    raise InputError(told)


def _check_listens(uri: str, given: str, usual_port: int) -> None:
    """Raise StoreAway if nothing listens at the address's host: MLflow would try for two minutes."""
    try:
        host, port = urlsplit(uri).hostname, urlsplit(uri).port or usual_port
    except ValueError:  # several hosts: leave the check to the driver
        return
    if not host:  # a local socket, or named elsewhere in the address
        return
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise StoreAway(
            f"{given}, but no database answers at {host}, port {port} ({error.strerror or error}); start it, or set tracking.uri "
            "to sqlite:///mlflow.db."
        ) from None


def _check_variables() -> None:
    """Raise InputError for an environment variable of MLflow whose value MLflow could not read later."""
    from mlflow import environment_variables

    for variable in vars(environment_variables).values():
        name = getattr(variable, "name", None)
        if isinstance(name, str) and name in os.environ and hasattr(variable, "get"):
            try:
                variable.get()
            except ValueError as error:
                reason = str(error).partition(f"{name}: ")[2] or error
                raise InputError(f"{name} is {os.environ[name]!r}, which MLflow cannot read: {reason}.") from None
