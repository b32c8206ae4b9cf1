"""A worker pool on an existing Ray cluster. Every task reserves its share of cores and GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.extras import install_command
from dann_experiments.tracking.store import without_secrets
from dann_experiments.workers.pool import Ended, Key, Outcome, Pool, outcome_of
from dann_experiments.workers.processes import STOP_SECONDS

REACH_SECONDS = 10.0


class RayPool(Pool):
    """A pool of tasks on the cluster at `address`, with `cpus` and `gpus` per task."""

    def __init__(
        self, function: Callable[[Any], Any], address: str, cpus: float, gpus: float, workers: int | None = None,
        at_most: int | None = None,
    ) -> None:  # fmt: skip
        """`workers`: tasks at a time, None = as many as fit on the cluster; `at_most`: number of tasks, if known.

        Raises InputError if Ray is not installed, no cluster answers, or none of its machines is large enough for a task.
        """
        try:
            import ray
        except ImportError:
            raise InputError(
                f"launcher is 'ray', but Ray is not installed; install it on every machine: {install_command('ray')}"
            ) from None
        self._ray = ray
        self._joined = not ray.is_initialized()
        self._tasks: dict[Key, Any] = {}
        if self._joined:
            self._join(address)
        there = ray.cluster_resources()
        for name, wanted in (("CPU", cpus), ("GPU", gpus)):
            most = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
            if wanted and most < wanted:
                self.close()
                raise InputError(
                    f"{name.lower()}s_per_trial is {wanted}, but no machine of the cluster has so many (all together "
                    f"{there.get(name, 0):g}); give a smaller number."
                )
        capacity = int(min([there.get("CPU", 0) / cpus] + ([there.get("GPU", 0) / gpus] if gpus else [])))
        count = workers or max(1, capacity)
        super().__init__(function, count if at_most is None else max(1, min(count, at_most)), max(1, int(cpus)))
        self._hide_gpus = not gpus  # otherwise a task without GPUs would see those of all others
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_run)

    def _join(self, address: str) -> None:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            _check_reachable(address)  # Ray itself would retry for minutes
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, on_sigterm)  # replace the handler of Ray, which exits with another code
        except Exception as error:  # a ConnectionError, a ValueError or a RuntimeError, depending on the cause
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"ray_address is {address!r}, where no Ray cluster answers ({reason}); start one with `ray start "
                "--head` on the first machine and `ray start --address=HOST:6379` on the others."
            ) from None

    @property
    def running(self) -> list[Key]:
        return list(self._tasks)

    def submit(self, key: Key, task: Any) -> None:
        self._tasks[key] = self._remote.remote(self.function, task, os.getcwd(), self._hide_gpus)

    def _ended(self, seconds: float | None) -> list[Ended]:
        done, _ = self._ray.wait(list(self._tasks.values()), num_returns=1, timeout=seconds)
        found = []
        for key, reference in list(self._tasks.items()):
            if reference in done:
                del self._tasks[key]
                try:
                    found.append(Ended(key, *self._ray.get(reference)))
                except Exception as error:  # an error of Ray: the worker or its machine died
                    reason = without_secrets(" ".join(str(error).split()))[:300]
                    found.append(Ended(key, death=f"died ({type(error).__name__}: {reason})"))
        return found

    def stop(self) -> list[Key]:
        stopped, references = self.running, list(self._tasks.values())
        self._tasks.clear()
        for reference in references:
            with contextlib.suppress(Exception):  # it may have ended meanwhile
                self._ray.cancel(reference, force=False)
        if references:
            _, left = self._ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS)
            for reference in left:
                with contextlib.suppress(Exception):
                    self._ray.cancel(reference, force=True)
        return stopped

    def close(self) -> None:
        """Stop, and disconnect from the cluster if this pool connected to it."""
        self.stop()
        if self._joined and self._ray.is_initialized():
            self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT. Other addresses (auto, ray://...) are checked by Ray."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


def _run(function: Callable[[Any], Any], task: Any, folder: str, hide_gpus: bool) -> Outcome:
    """Run one task, in a process of the cluster; `folder`: current folder of the driver."""
    if hide_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(folder)
    return outcome_of(function, task)
