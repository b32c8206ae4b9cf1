"""The study: everything stored about a sweep, with its trials as slots that workers claim.

All trials of the budget are added at the start, in state WAITING. A worker claims one, draws its values and runs it. So the
number of trials is exact for any number of workers, and after a crash the missing trials are those that are still waiting.
A trial whose worker died ends as failed, with a mark that it has to run again. Only the driver adds the retry, so that it is
added once, whichever process dies in between.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import InputError
from dann_experiments.config.extras import install_command
from dann_experiments.config.paths import user_path
from dann_experiments.tracking.store import remember_secrets, without_secrets
from dann_experiments.workers.pool import ATTEMPTS
from sweeps.journal import damaged_line, journal, last_line_is_damaged
from sweeps.ranking import ranked
from sweeps.sampling import SearchView
from sweeps.space import Label

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
DEFINITION, SETTINGS, HALT = "dann.definition", "dann.settings", "dann.halt"
SOURCE_ONLY, TRACKING, SWEEP_RUNS = "dann.source_only", "dann.tracking", "dann.sweep_runs"
SOURCE_WANTED = "dann.source_wanted"  # true if all trials share one source model and there are images to score it on
AGAIN = "again"  # marks a trial that did not fail because of its settings; holds the number of the next attempt
# raised while a database is away
STORAGE_ERRORS = (
    optuna.exceptions.StorageInternalError,
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
)
Role = Literal["recipe", "control", "search", "confirm"]
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Slot:
    """A trial to be run."""

    role: Role
    overrides: Mapping[str, Any]
    """Settings that are not searched, by dotted name."""
    point: Mapping[str, Label] | None = None
    """Fixed values of searched settings; the others are drawn."""
    reference: bool = False
    """True if nothing is drawn and samplers do not see the trial: the control, or settings outside the space."""
    candidate: int | None = None
    """Number of the trial that this one confirms."""
    attempt: int = 1
    retry_of: int | None = None


def flags_of(study: str, storage: str | None) -> str:
    """Return the flags that name a study on the command line."""
    place = "" if storage is None else f" --storage {shlex.quote(without_secrets(storage))}"
    return f"--study {shlex.quote(study)}{place}"


def is_journal(address: str) -> bool:
    """Return whether a storage is a journal file; otherwise it is the address of a database."""
    return "://" not in address


def sqlite_file(address: str) -> str | None:
    """Return the file of an address sqlite:///FILE; None for any other address."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^:?]+)(\?.*)?", address)
    return None if found is None else found.group(1)


def open_storage(address: str) -> BaseStorage:
    """Open the storage at `address`, or create it. Raises InputError if it cannot be used."""
    remember_secrets(address)
    shown = without_secrets(address)
    if is_journal(address):
        path = user_path(address)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab"):
                pass
            if last_line_is_damaged(path):
                raise ValueError("its last line is damaged")
            return JournalStorage(journal(path))
        except OSError as error:
            raise InputError(f"storage is {shown!r}, which cannot be written ({error}); choose another.") from None
        except Exception as error:  # a broken line may raise any error in Optuna's parser
            number = damaged_line(path)
            if number is None or number == 1:
                raise InputError(f"storage is {shown!r}, which is not an Optuna journal file: {error}") from None
            raise InputError(
                f"storage is {shown!r}, whose line {number} is damaged: no record of Optuna. Restore the file from a copy; or "
                "make a copy and remove that line, which loses what it recorded; or start a new study."
            ) from None
    known = urlsplit(address).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql")
    if not known or (address.startswith("sqlite") and not sqlite_file(address)):
        raise InputError(
            f"storage is {shown!r}; give a journal file's path, sqlite:///FILE, postgresql://... or mysql://..."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls heartbeats experimental
            backend = RDBStorage(
                address,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                # reconnect if the server has closed the connection, for example by a restart
                engine_kwargs={"pool_pre_ping": True},
            )
    except Exception as error:  # SQLAlchemy's, the driver's, or an ImportError when the driver is not installed
        reason = without_secrets((str(error).splitlines() or [type(error).__name__])[0])
        if isinstance(error, ImportError):
            reason = f"its driver is not installed ({reason}); for PostgreSQL: {install_command('postgresql')}"
        raise InputError(f"storage is {shown!r}, which cannot be used: {reason}") from None
    return optuna.storages.get_storage(backend)


class Sweep:
    """A study in its storage."""

    def __init__(self, storage: BaseStorage, name: str) -> None:
        """Open the study; raises KeyError if there is none of that name."""
        self.storage = storage
        self.name = name
        self.study_id = storage.get_study_id_from_name(name)

    @classmethod
    def create(cls, storage: BaseStorage, name: str, maximizes: bool) -> Sweep:
        """Create a study without trials."""
        optuna.create_study(storage=storage, study_name=name, direction="maximize" if maximizes else "minimize")
        return cls(storage, name)

    @classmethod
    def find(cls, storage: BaseStorage, name: str) -> Sweep | None:
        """Return the study; None if there is none of that name."""
        try:
            return cls(storage, name)
        except KeyError:
            return None

    # attributes

    def attribute(self, name: str) -> Any:
        """Return a stored attribute; None if it is not set."""
        return self.storage.get_study_user_attrs(self.study_id).get(name)

    def set_attribute(self, name: str, value: Any) -> None:
        """Store an attribute: any value that JSON can represent."""
        self.storage.set_study_user_attr(self.study_id, name, value)

    @property
    def maximizes(self) -> bool:
        """True if a larger objective is better."""
        return self.storage.get_study_directions(self.study_id)[0] == optuna.study.StudyDirection.MAXIMIZE

    # trials

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return all trials, or those in one of `states`, in the order of their numbers."""
        return self.storage.get_all_trials(self.study_id, deepcopy=False, states=states or None)

    def counted(self) -> list[FrozenTrial]:
        """Return the trials of the budget: all except those that were retried."""
        trials = self.trials()
        followed = {trial.user_attrs.get("retry_of") for trial in trials}
        return [trial for trial in trials if trial.number not in followed]

    def add(self, slots: Sequence[Slot]) -> None:
        """Add waiting trials."""
        study = optuna.load_study(study_name=self.name, storage=self.storage)
        for slot in slots:
            attributes: dict[str, Any] = {
                "role": slot.role, "overrides": dict(slot.overrides), "reference": slot.reference, "attempt": slot.attempt,
            }  # fmt: skip
            if slot.candidate is not None:
                attributes["candidate"] = slot.candidate
            if slot.retry_of is not None:
                attributes["retry_of"] = slot.retry_of
            study.enqueue_trial({} if slot.point is None else dict(slot.point), user_attrs=attributes)

    def claim(self, worker: str, token: str) -> FrozenTrial | None:
        """Take the first waiting trial for process `worker`, which runs the task `token`. Return None if none is waiting."""
        with self._one_at_a_time():
            for trial in self.trials(TrialState.WAITING):
                try:
                    if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        # at once, so that its trial can be found if this worker dies
                        self.storage.set_trial_user_attr(trial._trial_id, "worker", f"{token} {worker}")
                        return self.storage.get_trial(trial._trial_id)
                except optuna.exceptions.UpdateFinishedTrialError:
                    continue
            return None

    def _one_at_a_time(self) -> contextlib.AbstractContextManager[Any]:
        """Return a lock for SQLite, which has no row locks; journals and servers change the state of a trial atomically."""
        file = sqlite_file(str(getattr(getattr(self.storage, "_backend", None), "url", "")))
        if file is None:
            return contextlib.nullcontext()
        from filelock import FileLock

        return FileLock(file + ".claim.lock")

    def worker_of(self, trial: FrozenTrial) -> tuple[str, str] | None:
        """Return task token and process of the worker that claimed a trial; None until they are stored."""
        found = trial.user_attrs.get("worker")
        return None if found is None else tuple(str(found).split(" ", 1))  # pyright: ignore[reportReturnType]

    def note(self, trial: FrozenTrial, **attributes: Any) -> None:
        """Store attributes with a running trial."""
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def give_back(self, trial: FrozenTrial, reason: str, stopped: bool = False) -> bool:
        """End a trial that no process runs any more, and mark it for a retry. Return False if another process has ended it.

        A trial that was `stopped` is always retried; one whose worker died, only while it has attempts left.
        """
        trial = self.storage.get_trial(trial._trial_id)
        attempt = int(trial.user_attrs.get("attempt", 1))
        marks: dict[str, Any] = {"error": reason}
        if stopped or attempt < ATTEMPTS:
            marks[AGAIN] = attempt if stopped else attempt + 1
        with self._one_at_a_time():
            try:
                self.note(trial, **marks)
                return self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            except optuna.exceptions.UpdateFinishedTrialError:
                return False

    def put_in_again(self) -> int:
        """Add retries of the trials that were given back and return their number. Only the driver calls this."""
        waiting = [trial for trial in self.counted() if superseded(trial)]
        self.add([_again(trial) for trial in waiting])
        return len(waiting)

    def for_sampling(self, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner) -> optuna.Study:
        """Return the study as samplers and pruners see it: without the references."""
        hidden = cast(BaseStorage, SearchView(self.storage))
        return optuna.load_study(study_name=self.name, storage=hidden, sampler=sampler, pruner=pruner)

    def best(self) -> FrozenTrial | None:
        """Return the best complete trial without the control; None if there is none."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[FrozenTrial]:
        """Return the complete trials without the control, best first (`sweeps.ranking`)."""
        found = [t for t in self.trials(TrialState.COMPLETE) if t.user_attrs.get("role") != "control"]
        return ranked(found, self.maximizes)

    def beats(self, trial: FrozenTrial, other: FrozenTrial) -> bool:
        """Return whether the value of a complete trial is better than that of another one; a tie is not better."""
        assert trial.value is not None
        assert other.value is not None
        return trial.value > other.value if self.maximizes else trial.value < other.value

    def counts(self) -> Counter[str]:
        """Return the numbers of trials of the budget that are complete, pruned, failed, running and waiting."""
        return Counter("waiting" if superseded(trial) else trial.state.name.lower() for trial in self.counted())


def superseded(trial: FrozenTrial) -> bool:
    """Return whether another trial replaces this one, which did not fail because of its settings."""
    return trial.state == TrialState.FAIL and AGAIN in trial.user_attrs


def _again(trial: FrozenTrial) -> Slot:
    known = trial.user_attrs
    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return Slot(
        known["role"], known["overrides"], point, known["reference"], known.get("candidate"), known[AGAIN], trial.number
    )


@contextlib.contextmanager
def heartbeats(storage: BaseStorage, trial: FrozenTrial) -> Iterator[None]:
    """Record heartbeats of a running trial in a database. (Optuna's own thread stops at the first one that fails, for example
    while a server restarts.)"""
    if not isinstance(storage, optuna.storages._CachedStorage):
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(Exception):
                storage.record_heartbeat(trial._trial_id)
            if over.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def stale_trials(sweep: Sweep) -> list[FrozenTrial]:
    """Return running trials whose heartbeat has stopped; only databases have heartbeats."""
    storage = sweep.storage
    if not isinstance(storage, optuna.storages._CachedStorage):
        return []
    return [storage.get_trial(trial_id) for trial_id in storage._get_stale_trial_ids(sweep.study_id)]
