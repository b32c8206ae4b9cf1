"""Starts workers and notices their end: processes of this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from multiprocessing.connection import wait
from typing import Any

from dann_experiments.config import InputError
from dann_experiments.tracking.processes import (
    STOP_SECONDS,
    how_it_ended,
    join_or_kill,
    prepare_workers,
    worker_context,
)
from dann_experiments.tracking.store import without_secrets
from sweeps.worker import Task, process_main, work

REACH_SECONDS = 10.0
PRELOADED = "sweeps.preloaded"


class Launcher(ABC):
    """Workers of one sweep, each known by its token."""

    @abstractmethod
    def start(self, task: Task) -> None:
        """Start a worker."""

    @property
    @abstractmethod
    def alive(self) -> list[str]:
        """Tokens of the workers that have not ended."""

    @abstractmethod
    def wait(self, seconds: float) -> dict[str, str | None]:
        """Wait for at most `seconds`; the workers that ended since the last call, with what killed them (None = all well)."""

    @abstractmethod
    def stop(self) -> None:
        """End all workers: each closes its run first. Returns when they are gone."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the launcher holds itself; no worker is left then."""


class ProcessLauncher(Launcher):
    """Processes of this machine; with GPUs, each gets the one that fewest others have."""

    def __init__(self, gpus: list[str]) -> None:
        prepare_workers(PRELOADED)
        self._context: Any = worker_context()
        self._gpus = gpus
        self._gpu_of: dict[str, str] = {}
        self._processes: dict[str, Any] = {}

    def start(self, task: Task) -> None:
        if self._gpus:
            taken = list(self._gpu_of.values())
            self._gpu_of[task.token] = min(self._gpus, key=taken.count)
            task = dataclasses.replace(task, gpu=self._gpu_of[task.token])
        process = self._context.Process(target=process_main, args=(task, dict(os.environ)), name=f"sweep {task.token}")
        process.start()
        self._processes[task.token] = process

    @property
    def alive(self) -> list[str]:
        return list(self._processes)

    def wait(self, seconds: float) -> dict[str, str | None]:
        if not self._processes:
            time.sleep(seconds)
        wait([process.sentinel for process in self._processes.values()], seconds)
        ended = {token: process for token, process in self._processes.items() if not process.is_alive()}
        for token in ended:
            del self._processes[token]
            self._gpu_of.pop(token, None)
        return {token: how_it_ended(process.exitcode) if process.exitcode else None for token, process in ended.items()}

    def stop(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        join_or_kill(self._processes.values())
        self._processes.clear()

    def close(self) -> None:
        """Nothing is held."""


def _check_reachable(address: str) -> None:
    """Raises OSError if nobody listens at HOST:PORT; other addresses (auto, ray://...) are Ray's to judge."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


class RayLauncher(Launcher):
    """Tasks of an existing Ray cluster, each with its share of cores and GPUs."""

    def __init__(self, address: str, cpus: float, gpus: float) -> None:
        """Join the cluster. Raises InputError where Ray is not installed, no cluster answers, or none could hold a trial."""
        try:
            import ray
        except ImportError:
            raise InputError(
                "launcher is 'ray', but Ray is not installed; install it on every machine: pip install '.[ray]'."
            ) from None
        self._ray = ray
        self._joined = not ray.is_initialized()
        if self._joined:
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                _check_reachable(address)  # Ray itself would try for minutes
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own, which exits with another code
            except Exception as error:  # a ConnectionError, a ValueError or a RuntimeError, by what is wrong
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"ray_address is {address!r}, where no Ray cluster answers ({reason}); start one with `ray start "
                    "--head` on the first machine and `ray start --address=HOST:6379` on the others."
                ) from None
        there = ray.cluster_resources()
        for name, wanted in (("CPU", cpus), ("GPU", gpus)):
            if (
                wanted
                and max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0) < wanted
            ):
                self.close()
                raise InputError(
                    f"{name.lower()}s_per_trial is {wanted}, but no machine of the cluster has so many (all together "
                    f"{there.get(name, 0):g}); give less."
                )
        self.capacity = int(min([there.get("CPU", 0) / cpus] + ([there.get("GPU", 0) / gpus] if gpus else [])))
        self._hide_gpus = not gpus  # a task that asked for none would see those of all others
        self._work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(work)
        self._tasks: dict[str, Any] = {}

    def start(self, task: Task) -> None:
        self._tasks[task.token] = self._work.remote(dataclasses.replace(task, gpu="") if self._hide_gpus else task)

    @property
    def alive(self) -> list[str]:
        return list(self._tasks)

    def wait(self, seconds: float) -> dict[str, str | None]:
        if not self._tasks:
            time.sleep(seconds)
            return {}
        done, _ = self._ray.wait(list(self._tasks.values()), num_returns=1, timeout=seconds)
        ended: dict[str, str | None] = {}
        for token, reference in list(self._tasks.items()):
            if reference in done:
                del self._tasks[token]
                try:
                    self._ray.get(reference)
                    ended[token] = None
                except Exception as error:  # of Ray (its worker or machine died) or of the worker itself
                    ended[token] = f"{type(error).__name__}: {without_secrets(' '.join(str(error).split()))[:300]}"
        return ended

    def stop(self) -> None:
        for reference in self._tasks.values():
            with contextlib.suppress(Exception):  # it may have ended meanwhile
                self._ray.cancel(reference, force=False)
        if self._tasks:
            _, left = self._ray.wait(list(self._tasks.values()), num_returns=len(self._tasks), timeout=STOP_SECONDS)
            for reference in left:
                with contextlib.suppress(Exception):
                    self._ray.cancel(reference, force=True)
        self._tasks.clear()

    def close(self) -> None:
        """Leave the cluster, if this launcher joined it."""
        if self._joined and self._ray.is_initialized():
            self._ray.shutdown()
