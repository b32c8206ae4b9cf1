"""Tracks one job as one MLflow run: tags, params, data sets, metrics, artifacts, and a correct status."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import shutil
import signal
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning.loggers import Logger

from dann_experiments.config.errors import InputError, StoreAway
from dann_experiments.config.store_names import (
    LONGEST_DATA_SET,
    LONGEST_PARAM,
    LONGEST_RUN_NAME,
    LONGEST_SOURCE,
    LONGEST_TAG,
    is_key,
    shortened,
)
from dann_experiments.names import Tag
from dann_experiments.tracking.clock import Clock
from dann_experiments.tracking.deleted import restored
from dann_experiments.tracking.failures import explained_in_run, way_on
from dann_experiments.tracking.generated_names import is_generated
from dann_experiments.tracking.logged_model import FACTS, MODEL
from dann_experiments.tracking.notes import link, run_page
from dann_experiments.tracking.processes import end_with_the_launcher, process_name
from dann_experiments.tracking.sender import SPOOL, TAGS, Sender, giving_way
from dann_experiments.tracking.spool import Point
from dann_experiments.tracking.store import Store, check_run_id, without_secrets
from dann_experiments.tracking.system_metrics import SYSTEM, sampled
from dann_experiments.tracking.values import logged_points

log = logging.getLogger(__name__)
PARAMS_A_REQUEST = 100  # MLflow's limit
PART = ".part"  # suffix of a file that is being written
END = "end.json"  # how a run ended, for `sync` if the store was away
RUN_NAME = "mlflow.runName"
PARAM_PREFIX = "cfg."  # `mlflow run` logs its own raw strings under the plain names, and params cannot be changed


class RunKilled(BaseException):
    """Raised when SIGINT or SIGTERM arrives. Not an Exception, so that no handler on the way up treats it as an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class NotStored(StoreAway):
    """Raised when a run ended well, but the tracking store did not accept all of its data."""


class EndedEarly(Exception):
    """Raised in a tracked run to end it early but regularly, as FINISHED and not FAILED (a pruned trial)."""


@dataclass
class TrackedRun:
    """A run that is open for writing. The files in `folder` are uploaded as the run's artifacts when it closes."""

    store: Store
    run_id: str
    folder: Path
    sender: Sender
    resumed: bool = False
    """True for a resumed run."""
    _again: bool = False

    def log_metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Queue metrics (name -> one number, or a tensor with one) of one step; returns at once. Raises ValueError for names and
        values that MLflow does not accept."""
        self.sender.put(values, step, self._again)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Log metrics in the block in addition to those that have been logged for the same step before."""
        self._again = True
        try:
            yield
        finally:
            self._again = False

    def persist(self) -> None:
        """Make all that was logged so far survive the process. Called before a checkpoint is written, so that a run resumed from
        it has no gap in its history. Raises NotWritten if the disk is full."""
        self.sender.persist()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings under the prefix `cfg.`."""
        from mlflow.entities import Param

        entries = [Param(PARAM_PREFIX + key, shortened(value, LONGEST_PARAM)) for key, value in params.items()]
        for start in range(0, len(entries), PARAMS_A_REQUEST):
            some = entries[start : start + PARAMS_A_REQUEST]
            self._asked(lambda some=some: self.store.client.log_batch(self.run_id, params=some))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Queue tags; returns at once. Raises InputError for names that MLflow does not accept."""
        self.sender.put_tags(_texts(tags))

    def log_input(self, name: str, digest: str, context: str, source: str, profile: str) -> None:
        """Log a data set that the run read: MLflow shows name, digest and context (such as `source train`)."""
        self.log_inputs([(name, digest, context, source, profile)])

    def log_inputs(self, data_sets: Sequence[tuple[str, str, str, str, str]]) -> None:
        """Log data sets in one request, each with the arguments of `log_input`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        entries = [
            DatasetInput(
                Dataset(
                    name=shortened(name, LONGEST_DATA_SET), digest=digest[:36], source_type="local",
                    source=json.dumps({"uri": shortened(source, LONGEST_SOURCE)}), profile=profile,
                ),
                [InputTag("mlflow.data.context", context)],
            )
            for name, digest, context, source, profile in data_sets
        ]  # fmt: skip
        for attempts_left in (2, 1, 0):
            try:
                self._asked(lambda: self.store.client.log_inputs(self.run_id, entries))
                return
            except MlflowException:
                # if two runs log the same new data set at once, MLflow refuses the second, but accepts it on a further attempt
                if not attempts_left:
                    raise

    def _asked(self, request: Callable[[], object]) -> None:
        """Make a request that writes to the run; if the run was deleted, restore it and repeat the request."""
        from mlflow.exceptions import MlflowException

        try:
            request()
        except MlflowException as refusal:
            if not restored(self.store.client, self.run_id, refusal):
                raise
            request()


class RunLogger(Logger):
    """Lightning's view of a TrackedRun. The run is closed by its context, not by the trainer."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__()
        self.run = run

    @property
    def name(self) -> str:
        return "mlflow"

    @property
    def version(self) -> str:
        return self.run.run_id

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.run.log_metrics(metrics, step=0 if step is None else step)

    def set_tag(self, key: str, value: str) -> None:
        """Queue one tag of the run, so that training does not wait for a store that is away."""
        self.run.set_tags({key: value})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run has its params already."""


@contextlib.contextmanager
def tracked_run(
    store: Store,
    run_name: str | None,
    default_name: str,
    tags: Mapping[str, Any],
    folder: Path,
    use_claimed: bool,
    resume: str | None = None,
    system_metrics: bool | None = False,
) -> Iterator[TrackedRun]:
    """Open a run (with `use_claimed` that of `mlflow run`, if there is one), and close it with a correct status.

    A new run is called `run_name` or `default_name`. So is a claimed one, but without `run_name` it keeps a name that the user
    gave to `mlflow run`. `folder`: the parent of the run's folder. `resume`: the id of an unfinished run to resume instead;
    unsent data in its folder are sent, and metrics of steps that the store has already are not sent again. `system_metrics`:
    whether to log the use of the machine; None = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING decides. Raises InputError if `folder` is
    not writable.

    The run ends as FINISHED at the end of the block and on EndedEarly, as KILLED on SIGINT and SIGTERM (KeyboardInterrupt or
    SystemExit(143) is then raised), and on any other exception as FAILED, with `traceback.txt` as artifact. Metrics and artifacts
    are sent in every case; what a store that is away does not accept stays in the run's folder for `sync`. Raises NotStored at
    the end of a successful block if the store did not accept everything.
    """
    from mlflow.entities import RunTag

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not show a read-only disk, or root's rights
            pass
    except OSError as error:
        raise InputError(
            f"tracking.folder is {str(folder)!r}, which is not writable ({error}); choose another."
        ) from None
    claimed = store.claimed_run_id if use_claimed else None
    if claimed is not None:
        end_with_the_launcher()
    # includes the closing of the run: a second Ctrl-C must not interrupt that
    with _signals_raise() as signals, giving_way():
        if resume is None and (run_name is not None or claimed is None or _name_is_generated(store, claimed)):
            tags = {**tags, RUN_NAME: run_name or default_name}
        tags = {**_provenance(), **({} if claimed else {"mlflow.source.type": "LOCAL"}), **tags}
        already, new = None, None
        if resume is not None:
            check_run_id(resume)
            run_id, already = resume, _reopen(store, resume, claimed, folder / resume)
        elif claimed is None:  # created with its tags, so that a search for killed runs finds it at once
            new = store.client.create_run(store.experiment_id, tags=_texts(tags)).info
            run_id = new.run_id
        else:
            run_id = claimed
        check_run_id(run_id)
        run_folder = folder / run_id
        clock = Clock((new or store.client.get_run(run_id).info).start_time)
        sender = Sender(store.client, run_id, run_folder, already, clock)
        run = TrackedRun(store, run_id, run_folder, sender, resume is not None)
        try:
            run_folder.mkdir(exist_ok=True)
            if resume is not None or claimed is not None:
                entries = [RunTag(key, text) for key, text in _texts(tags).items()]
                store.client.log_batch(run_id, tags=entries)  # not queued, so that a search for killed runs finds it
            with sampled(sender.put, sender.last_step(SYSTEM) + 1, system_metrics):
                yield run
            if not _close(run, "FINISHED"):
                why = f" ({sender.refusal})" if sender.refusal else ""
                raise NotStored(
                    f"the run ended well, but the tracking store did not accept all of its data{why}; the rest is kept in "
                    f"{run_folder}. When the store works again: dann sync --tracking.folder {folder}"
                )
        except NotStored:  # already closed
            raise
        except BaseException as error:
            arrived = signals.hold()
            if arrived is not None:  # for any `error`: C code that a signal interrupts may raise its own instead
                job = tags.get(Tag.JOB)
                on = way_on(run_id, job) if job else f"its id is {run_id}"
                log.warning("%s: the run is being closed as KILLED. To go on, %s", arrived.name, on)
                # the status may read FAILED: `mlflow run` (3.17) ends the run once more if a command's exit code is not 0
                run.set_tags({Tag.KILLED_BY: arrived.name})
                _close(run, "KILLED")
                raise RunKilled(arrived) from None
            if isinstance(error, (KeyboardInterrupt, EndedEarly)):
                _close(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FINISHED")
                raise
            with contextlib.suppress(OSError):
                (run_folder / "traceback.txt").write_text(without_secrets(traceback.format_exc()))
            _close(run, "FAILED")
            told = explained_in_run(error, run_id, tags.get(Tag.JOB))
            if told is not None:
                raise told from error
            raise


def _name_is_generated(store: Store, run_id: str) -> bool:
    return is_generated(store.client.get_run(run_id).info.run_name or "")


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    """Return tags as the store accepts them. Raises InputError for names that it does not accept."""
    for key in tags:
        if not is_key(key):
            raise InputError(f"tag {key!r}: MLflow allows letters, digits, blanks, and _ - . / : only; rename it.")
    return {key: shortened(value, LONGEST_RUN_NAME if key == RUN_NAME else LONGEST_TAG) for key, value in tags.items()}


def _close(run: TrackedRun, status: str) -> bool:
    """Send metrics and files and end the run, unless the sender gives up before. Return whether the store has everything."""
    ending = {"status": status, "end_time": run.sender.clock.now()}
    with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
        (run.folder / END).write_text(json.dumps(ending))
    return send_folder(run.sender, run.folder, **ending)


def send_folder(sender: Sender, folder: Path, status: str, end_time: int | None) -> bool:
    """Send a run's folder and end the run. Return whether the store accepted everything; the folder is then removed."""
    has_model = (folder / FACTS).is_file()  # written when the model is whole
    for path in sorted(folder.rglob("*")):
        of_the_model = has_model and path.is_relative_to(folder / MODEL)
        kept_back = path.name in (SPOOL, TAGS, END, FACTS) or path.suffix == PART  # what is only half written
        if path.is_file() and not of_the_model and not kept_back:
            sender.put_file(path)
    if has_model:
        sender.put_model()
    sent = sender.close(status, end_time)
    if sent:
        shutil.rmtree(folder, ignore_errors=True)
    return sent


def _reopen(store: Store, run_id: str, claimed: str | None, folder: Path) -> Iterator[Point]:
    """Set a run to running again, and return the points that the store has of it."""
    if claimed is not None and claimed != run_id:
        page = run_page(store.client.get_run(run_id).info.experiment_id, run_id)
        note = f"This run is empty: its job resumed {link(f'run {run_id}', page)}."
        for key, text in {Tag.RESUMED_RUN_ID: run_id, Tag.NOTE: note}.items():
            store.client.set_tag(claimed, key, text)
        store.client.set_terminated(claimed, "FINISHED")
    (folder / END).unlink(missing_ok=True)
    store.client.set_tag(run_id, Tag.PROCESS, process_name())  # first, so that no search for stale runs closes it
    store.client.update_run(run_id, status="RUNNING")
    run = store.client.get_run(run_id)
    for tag in {Tag.CLOSED_BY, Tag.KILLED_BY} & run.data.tags.keys():  # how it ended before
        store.client.delete_tag(run_id, tag)
    return (point for name in run.data.metrics for point in logged_points(store.client, run_id, name))


class _Signals:
    """Handles SIGINT and SIGTERM: the first one raises RunKilled, unless the run is being closed; further ones do nothing."""

    def __init__(self) -> None:
        self._arrived: signal.Signals | None = None
        self._held = False

    def arrive(self, signum: int, frame: FrameType | None) -> None:
        is_first, self._arrived = self._arrived is None, self._arrived or signal.Signals(signum)
        if is_first and not self._held:
            raise RunKilled(signum)

    def hold(self) -> signal.Signals | None:
        """Let no signal raise from now on; return the one that arrived before, if any."""
        self._held = True
        return self._arrived


@contextlib.contextmanager
def _signals_raise() -> Iterator[_Signals]:
    """Let SIGINT and SIGTERM raise RunKilled in the block, and KeyboardInterrupt or SystemExit(143) after it. Does nothing except
    in the main thread, the only one that can handle signals."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, signals.arrive)
    try:
        yield signals
    except RunKilled as killed:
        if killed.signum == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + killed.signum) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _provenance() -> dict[str, str]:
    """Return tags for the user, the process, the commit, and whether the working tree differs from the commit."""
    tags: dict[str, str] = {Tag.PROCESS: process_name()}
    with contextlib.suppress(Exception):  # do not fail if the user has no database entry (containers)
        tags["mlflow.user"] = getpass.getuser()
    project = Path(__file__).resolve().parents[2]
    if (project / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(project)]
            commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20)
            status = subprocess.run(
                [*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=20
            )
            tags["mlflow.source.git.commit"] = commit.stdout.strip()
            tags["git.dirty"] = str(bool(status.stdout.strip())).lower()
    return tags
