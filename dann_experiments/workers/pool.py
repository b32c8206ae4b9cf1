"""The worker pool: runs a function on tasks (plain data), one at a time per worker, and reports workers that died."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.workers import PoolSettings
from dann_experiments.tracking.store import without_secrets
from dann_experiments.workers.processes import available_cores, default_workers, visible_gpus

log = logging.getLogger(__name__)
ATTEMPTS = 2  # a task whose worker died is run once more
Key = int | str
Outcome = tuple[Any, str | None]
"""Return value of the function, and the reason if it raised an exception instead."""


@dataclass(frozen=True)
class Ended:
    """A task that has ended, in one of three ways."""

    key: Key
    result: Any = None
    """Return value of the function."""
    error: str | None = None
    """Exception that the function raised, in one line without passwords."""
    death: str | None = None
    """Cause of the worker's death, in words that follow its name: "was killed by SIGKILL ..."."""
    deaths: int = 0
    """Number of workers that have died while running this task."""


class Pool(ABC):
    """A pool of up to `count` workers. A worker is started when a task needs it and then reused for later tasks."""

    def __init__(self, function: Callable[[Any], Any], count: int, threads: int) -> None:
        """`function`: run on each task, importable by its name; `threads`: each worker's share of the cores."""
        self.function, self.count, self.threads = function, count, threads
        self.logs: Path | None = None
        """Folder for the output of local workers; None = they print where this process does. Set it before the first task."""
        self._deaths: Counter[Key] = Counter()

    @property
    @abstractmethod
    def running(self) -> list[Key]:
        """Keys of the tasks that have not ended."""

    @abstractmethod
    def submit(self, key: Key, task: Any) -> None:
        """Start a task. The caller makes sure that fewer than `count` are running."""

    def wait(self, seconds: float | None = None) -> list[Ended]:
        """Return the tasks that have ended since the last call; wait for one, at most `seconds`."""
        if not self.running:
            time.sleep(seconds or 0.0)
            return []
        found = self._ended(seconds)
        self._deaths.update(one.key for one in found if one.death is not None)
        return [dataclasses.replace(one, deaths=self._deaths[one.key]) for one in found]

    def run(self, ready: Callable[[], Iterable[tuple[Key, Any]]]) -> Iterator[Ended]:
        """Run tasks until none is left; yield each as it ends.

        `ready` returns the tasks (key, task) that may start now, without those that are running or have ended. It is called
        whenever a worker is free, so a task may appear after another one has ended, and again after its worker died.
        """
        while True:
            if len(self.running) < self.count:
                for key, task in ready():
                    self.submit(key, task)
                    if len(self.running) == self.count:
                        break
            if not self.running:
                return
            yield from self.wait()

    @abstractmethod
    def stop(self) -> list[Key]:
        """End all workers, each of which first closes its MLflow run as KILLED; return the tasks that were running."""

    def close(self) -> None:
        """Stop, and release the resources of the pool."""
        self.stop()

    @abstractmethod
    def _ended(self, seconds: float | None) -> list[Ended]:
        """Return running tasks that have ended; wait for one, at most `seconds`. At least one is running."""


@contextlib.contextmanager
def open_pool(
    function: Callable[[Any], Any],
    settings: PoolSettings,
    accelerator: str,
    at_most: int | None = None,
) -> Iterator[Pool]:
    """Open the pool that `settings` describe and close it at the end of the block.

    `accelerator`: `trainer.accelerator` of the runs; `at_most`: number of tasks, if known. Raises InputError if there is no Ray
    cluster, or none of its machines is large enough.
    """
    from dann_experiments.workers.local import LocalPool
    from dann_experiments.workers.ray_cluster import RayPool

    gpus_per_task = settings.gpus_per_trial
    if settings.launcher == "ray":
        address, cpus = settings.ray_address, settings.cpus_per_trial
        pool: Pool = RayPool(function, address, cpus, gpus_per_task or 0.0, settings.workers, at_most)
    else:
        gpus = visible_gpus(accelerator)
        if gpus_per_task is not None and not gpus:
            log.warning("gpus_per_trial has no effect: there is no GPU that trainer.accelerator may use.")
        count = worker_count(settings, gpus, at_most)
        pool = LocalPool(function, count, max(1, available_cores() // count), gpus)
    try:
        yield pool
    finally:
        pool.close()


def worker_count(settings: PoolSettings, gpus: list[str], at_most: int | None = None) -> int:
    """Return the number of local workers: as set, else as many as fit on the GPUs, else one per core up to a limit."""
    count = settings.workers or default_workers(gpus, settings.gpus_per_trial or 1.0)
    return count if at_most is None else max(1, min(count, at_most))


def refuse_unshared(settings: PoolSettings, key: str, address: str) -> None:
    """Raise InputError if setting `key` (storage, tracking.uri) is a file of this machine but runs are on a Ray cluster."""
    is_storage = key == "storage"
    if settings.launcher == "ray" and (address.startswith("sqlite") or (is_storage and "://" not in address)):
        server = "postgresql://USER@HOST/DATABASE" if is_storage else "http://HOST:5000"
        raise InputError(
            f"launcher is 'ray', but {key} is {without_secrets(address)!r}, which other machines cannot share; give a server's "
            f"address, such as {server}."
        )


def outcome_of(function: Callable[[Any], Any], task: Any) -> Outcome:
    """Run one task, in a worker. An exception is returned as text, because not every exception can be pickled."""
    try:
        return function(task), None
    except Exception as error:
        print(without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
        reason = without_secrets(" ".join(str(error).split()))[:300]
        return None, reason if isinstance(error, InputError) else f"{type(error).__name__}: {reason}"
