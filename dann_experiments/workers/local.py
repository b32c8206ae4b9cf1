"""A worker pool of processes on this machine. They are distributed evenly over the GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dann_experiments.workers.pool import Ended, Key, Pool, outcome_of
from dann_experiments.workers.processes import (
    become_worker,
    how_it_ended,
    join_or_kill,
    prepare_workers,
    worker_context,
)


class LocalPool(Pool):
    """A pool of processes that end with this one."""

    def __init__(self, function: Callable[[Any], Any], count: int, threads: int, gpus: Sequence[str] = ()) -> None:
        """`gpus`: names as in CUDA_VISIBLE_DEVICES."""
        super().__init__(function, count, threads)
        prepare_workers(function.__module__)
        self._gpus_left: list[str | None] = [gpus[index % len(gpus)] if gpus else None for index in range(count)]
        """GPU of each worker that may still be started; None = no GPU."""
        self._workers: list[_Worker] = []

    @property
    def running(self) -> list[Key]:
        return [worker.key for worker in self._workers if worker.key is not None]

    def submit(self, key: Key, task: Any) -> None:
        worker = next((worker for worker in self._workers if worker.key is None), None)
        if worker is None:
            worker = _Worker(self.function, self._gpus_left.pop(0), self.logs)
            self._workers.append(worker)
        worker.key = key
        with contextlib.suppress(BrokenPipeError):  # it died while idle: `_ended` reports that
            worker.connection.send(task)

    def _ended(self, seconds: float | None) -> list[Ended]:
        busy = [worker for worker in self._workers if worker.key is not None]
        # also wait for the processes: if one is killed, its data loaders keep the connection open for a while
        wait([*(worker.connection for worker in busy), *(worker.process.sentinel for worker in busy)], seconds)
        found = []
        for worker in busy:
            key = worker.key
            assert key is not None
            try:
                if worker.connection.poll():
                    result, error = worker.connection.recv()
                    worker.key = None
                    found.append(Ended(key, result, error))
                    continue
                if worker.process.is_alive():
                    continue
            except (EOFError, OSError):
                worker.process.join()
            found.append(Ended(key, death=how_it_ended(worker.process.exitcode or 0)))
            worker.connection.close()
            self._workers.remove(worker)
            self._gpus_left.append(worker.gpu)
        return found

    def stop(self) -> list[Key]:
        stopped = self.running
        for worker in self._workers:
            worker.connection.close()  # this ends an idle worker
            if worker.key is not None:
                worker.process.terminate()
        join_or_kill(worker.process for worker in self._workers)
        self._gpus_left += [worker.gpu for worker in self._workers]
        self._workers.clear()
        return stopped


class _Worker:
    """A process that runs one task after another."""

    def __init__(self, function: Callable[[Any], Any], gpu: str | None, logs: Path | None) -> None:
        context: Any = worker_context()
        self.gpu = gpu
        self.key: Key | None = None
        """Key of the running task; None while it is idle."""
        self.connection, theirs = context.Pipe()
        environment = dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        arguments = (theirs, function, logs and str(logs.resolve()), environment, os.getcwd())
        self.process = context.Process(target=_serve, args=arguments, name=f"worker {function.__module__}")
        self.process.start()
        theirs.close()  # now only the worker has this end, so the connection closes when it dies


def _serve(
    connection: Connection, function: Callable[[Any], Any], logs: str | None, environment: dict[str, str], folder: str
) -> None:  # fmt: skip
    """Run tasks, in the worker, until the parent closes the connection."""
    become_worker(logs, environment)
    os.chdir(folder)  # relative paths in settings mean the same as in the parent
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(outcome_of(function, connection.recv()))
