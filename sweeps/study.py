"""The study: what is stored of a sweep, and the trials as slots that workers claim.

All trials of the budget are put into the study at the start, waiting. A worker claims one, draws its values and runs it.
So the number of trials is exact however many workers, machines or drivers there are, and what is missing after a crash is
what still waits. A trial whose worker died is marked as superseded and put in again: it counts once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import InputError
from dann_experiments.tracking.store import without_secrets
from sweeps.settings import SweepConfig
from sweeps.space import Label

if TYPE_CHECKING:
    import psutil

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
ATTEMPTS = 2  # a trial whose worker died is run once more
DEFINITION, SETTINGS, HALT = "dann.definition", "dann.settings", "dann.halt"
Role = Literal["recipe", "control", "search", "confirm"]
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Slot:
    """A trial to be run."""

    role: Role
    overrides: Mapping[str, Any]
    """Settings that are not searched, by dotted name."""
    point: Mapping[str, Label] | None = None
    """Values of searched settings that are given; the others are drawn."""
    reference: bool = False
    """Nothing is drawn, and samplers do not see it: the control, or settings that are not in the space."""
    candidate: int | None = None
    """The trial that it confirms."""
    attempt: int = 1
    retry_of: int | None = None


def storage_address(storage: str | None, study: str) -> str:
    """The storage that settings mean: an address with a scheme, or the path of a journal file."""
    return storage if storage is not None else str(study_folder(study) / "journal.log")


def study_folder(study: str) -> Path:
    """Where a study's files are: its journal (by default), the workers' logs, the report."""
    return Path("studies") / study


def is_journal(address: str) -> bool:
    """Whether it is a file; else it is a database's address."""
    return "://" not in address


def open_storage(address: str) -> BaseStorage:
    """The storage at `address`, made if it is new. Raises InputError if it cannot be used."""
    shown = without_secrets(address)
    if is_journal(address):
        path = Path(address).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab"):
                pass
            return JournalStorage(JournalFileBackend(str(path)))
        except OSError as error:
            raise InputError(f"storage is {shown!r}, which cannot be written ({error}); choose another.") from None
        except Exception as error:  # Optuna raises whatever the broken line makes of its parser
            raise InputError(f"storage is {shown!r}, which is no journal file of Optuna: {error}") from None
    if urlsplit(address).scheme.partition("+")[0] not in ("sqlite", "postgresql", "mysql"):
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
                # a connection that the server closed meanwhile (a restart) is made anew, not an error
                engine_kwargs={"pool_pre_ping": True},
            )
    except Exception as error:  # SQLAlchemy's, the driver's, or an ImportError when the driver is not installed
        reason = without_secrets((str(error).splitlines() or [type(error).__name__])[0])
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
        """A new study without trials."""
        optuna.create_study(storage=storage, study_name=name, direction="maximize" if maximizes else "minimize")
        return cls(storage, name)

    @classmethod
    def find(cls, storage: BaseStorage, name: str) -> Sweep | None:
        """The study, None if there is none of that name."""
        try:
            return cls(storage, name)
        except KeyError:
            return None

    # what is stored of it

    def attribute(self, name: str) -> Any:
        """A stored attribute; None if it is not set."""
        return self.storage.get_study_user_attrs(self.study_id).get(name)

    def set_attribute(self, name: str, value: Any) -> None:
        """Store an attribute (anything that JSON holds)."""
        self.storage.set_study_user_attr(self.study_id, name, value)

    @property
    def maximizes(self) -> bool:
        """Whether more of the objective is better."""
        return self.storage.get_study_directions(self.study_id)[0] == optuna.study.StudyDirection.MAXIMIZE

    # trials

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in one of `states`, by number."""
        return self.storage.get_all_trials(self.study_id, deepcopy=False, states=states or None)

    def counted(self) -> list[FrozenTrial]:
        """The trials of the budget: all but those that were put in again."""
        return [trial for trial in self.trials() if not trial.user_attrs.get("superseded")]

    def add(self, slots: Sequence[Slot]) -> None:
        """Put trials in, waiting."""
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
        """Take the first waiting trial for process `worker`, known to its driver by `token`; None if none waits."""
        with self._one_at_a_time():
            for trial in self.trials(TrialState.WAITING):
                try:
                    if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        # at once: whoever finds this worker dead must know what it was running
                        self.storage.set_trial_user_attr(trial._trial_id, "worker", f"{token} {worker}")
                        return self.storage.get_trial(trial._trial_id)
                except optuna.exceptions.UpdateFinishedTrialError:
                    continue
            return None

    def _one_at_a_time(self) -> contextlib.AbstractContextManager[Any]:
        """Journals and servers change a trial's state atomically; sqlite, which has no row locks, does not."""
        url = str(getattr(getattr(self.storage, "_backend", None), "url", ""))
        if not url.startswith("sqlite:///"):
            return contextlib.nullcontext()
        from filelock import FileLock

        return FileLock(url.removeprefix("sqlite:///") + ".claim.lock")

    def worker_of(self, trial: FrozenTrial) -> tuple[str, str] | None:
        """Token and process of the worker that claimed it; None in the moment before it is stored."""
        found = trial.user_attrs.get("worker")
        return None if found is None else tuple(str(found).split(" ", 1))  # pyright: ignore[reportReturnType]

    def note(self, trial: FrozenTrial, **attributes: Any) -> None:
        """Store attributes with a trial that is running."""
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def give_back(self, trial: FrozenTrial, reason: str, stopped: bool = False) -> bool:
        """End a trial that nobody runs any more, and put it in again: always if it was `stopped`, else (its worker died)
        as long as it has attempts left. False if somebody else has ended it."""
        trial = self.storage.get_trial(trial._trial_id)
        attempt = int(trial.user_attrs.get("attempt", 1))
        again = stopped or attempt < ATTEMPTS
        with self._one_at_a_time():
            try:
                self.note(trial, error=reason, **({"superseded": True} if again else {}))
                if not self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                    return False
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
        if again:
            self.add([_again(trial, attempt if stopped else attempt + 1)])
        return True

    def repair(self) -> None:
        """Put in again what was marked as superseded by a process that died before it could do so."""
        trials = self.trials()
        done = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            if trial.user_attrs.get("superseded") and trial.state == TrialState.FAIL and trial.number not in done:
                stopped = str(trial.user_attrs.get("error", "")).startswith("stopped")
                self.add([_again(trial, int(trial.user_attrs["attempt"]) + (not stopped))])

    def for_sampling(self, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner) -> optuna.Study:
        """The study as samplers and pruners see it: without the references."""
        hidden = cast(BaseStorage, _WithoutReferences(self.storage))
        return optuna.load_study(study_name=self.name, storage=hidden, sampler=sampler, pruner=pruner)

    def best(self) -> FrozenTrial | None:
        """The best complete trial of the search (the control is no candidate)."""
        found = [t for t in self.trials(TrialState.COMPLETE) if t.user_attrs.get("role") != "control"]
        return max(found, key=self.rank, default=None)

    def rank(self, trial: FrozenTrial) -> float:
        """Larger is better, whatever the direction."""
        assert trial.value is not None
        return trial.value if self.maximizes else -trial.value

    def counts(self) -> Counter[str]:
        """How many trials of the budget are complete, pruned, failed, running, waiting."""
        return Counter(trial.state.name.lower() for trial in self.counted())


def _again(trial: FrozenTrial, attempt: int) -> Slot:
    known = trial.user_attrs
    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return Slot(
        known["role"], known["overrides"], point, known["reference"], known.get("candidate"), attempt, trial.number
    )


class _WithoutReferences:
    """A storage whose lists of trials leave the references out: points with the same values as a trial of the search but
    another method (or with none of the searched values) would only mislead a sampler."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Sequence[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=cast(Any, states))
        return [trial for trial in found if not trial.user_attrs.get("reference")]


def process_name() -> str:
    """This process, in a way that no later one has: host, id, and when it started."""
    import psutil

    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def live_process(name: str) -> psutil.Process | None:
    """The process of that name if it lives on this machine."""
    import psutil

    host, pid, started = name.rsplit(":", 2)
    if host == socket.gethostname():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def is_elsewhere(name: str) -> bool:
    """Whether the process of that name is another machine's."""
    return name.rsplit(":", 2)[0] != socket.gethostname()


@contextlib.contextmanager
def heartbeats(storage: BaseStorage, trial: FrozenTrial) -> Iterator[None]:
    """Tell a database all the while that the trial is being run."""
    from optuna.storages._heartbeat import get_heartbeat_thread

    with get_heartbeat_thread(trial._trial_id, storage):
        yield


def stale_trials(sweep: Sweep) -> list[FrozenTrial]:
    """Running trials whose heartbeat has stopped (databases alone have heartbeats)."""
    storage = sweep.storage
    if not isinstance(storage, optuna.storages._CachedStorage):
        return []
    return [storage.get_trial(trial_id) for trial_id in storage._get_stale_trial_ids(sweep.study_id)]


def build_sampler(
    sweep: SweepConfig, conditional: bool, trial_number: int, n_trials: int
) -> optuna.samplers.BaseSampler:
    """The sampler for one trial, seeded by the trial's number: the same whichever worker runs it, and after a resume."""
    seed = (sweep.sampler_seed * 1_000_003 + trial_number) % 2**32
    startup = max(4, min(10, n_trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls `group` and QMC experimental
        if sweep.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        if sweep.sampler == "qmc":  # one scrambled sequence for all, which the study counts along
            return optuna.samplers.QMCSampler(
                scramble=True, seed=sweep.sampler_seed, warn_independent_sampling=False,
                independent_sampler=optuna.samplers.RandomSampler(seed=seed),
            )  # fmt: skip
        if sweep.sampler in ("random", "grid"):  # the points of a grid are given with the slots
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, group=conditional)


def build_pruner(name: str, max_epochs: int) -> optuna.pruners.BasePruner:
    """The pruner; its steps are epochs, 1 to `max_epochs`."""
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_min_trials=3)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max_epochs, reduction_factor=3)
    return optuna.pruners.NopPruner()
