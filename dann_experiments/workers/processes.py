"""Worker processes: starts them, ends them with their driver, and decides how many this machine can run."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

MOST_DEFAULT_WORKERS = 4
STOP_SECONDS = 90.0  # closing a run may wait a minute for its store
PRELOADED = "dann_experiments.workers.preloaded"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(accelerator: str) -> list[str]:
    """Return the GPUs that `trainer.accelerator` may use, with names as in CUDA_VISIBLE_DEVICES."""
    import torch

    if accelerator not in ("auto", "gpu") or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def default_workers(gpus: list[str], gpus_per_task: float = 1.0) -> int:
    """Return as many workers as fit on the GPUs; without GPUs one per core, but not more than usually fit into memory."""
    return len(gpus) * int(1 / gpus_per_task + 1e-6) or min(available_cores(), MOST_DEFAULT_WORKERS)


def how_it_ended(code: int) -> str:
    """Return an exit code in words that follow the name of a process: "was killed by SIGKILL ...", "ended with code 3"."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (", as the kernel does where memory runs out" if name == "SIGKILL" else "")
    return f"ended with code {code}"


def join_or_kill(processes: Iterable[BaseProcess]) -> None:
    """Wait up to STOP_SECONDS, all together, for processes that were asked to stop; kill those that are still running."""
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def prepare_workers(module: str) -> None:
    """Start the fork server if it is not running: a process that imports the libraries and `module` once for all workers.

    It imports in parallel with this process, so the command line starts it before its own imports. It does nothing else, uses
    no GPU and ends with this process. On macOS and Windows, where forking is not reliable, each worker imports for itself.
    """
    if sys.platform == "linux":
        from multiprocessing import forkserver

        multiprocessing.set_forkserver_preload([PRELOADED, module])
        with _ignored_by_children():
            forkserver.ensure_running()


@contextlib.contextmanager
def _ignored_by_children() -> Iterator[None]:
    """Let processes that start meanwhile ignore Ctrl-C, which reaches the whole group: this process ends them itself. One that is
    still importing would print a traceback."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def worker_context() -> BaseContext:
    """Return the multiprocessing context that starts workers."""
    return multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def become_worker(log_folder: str | None, environment: Mapping[str, str]) -> None:
    """Make this new process a worker of its parent.

    Its output goes to `worker-PID.log` in `log_folder` (None = where the parent prints), and it gets the `environment` of the
    parent without its MLflow run. SIGTERM ends it cleanly, SIGINT is left to the parent, and it ends when the parent does.
    """
    gc.freeze()  # the modules that the fork server imported: no garbage, and their memory stays shared
    os.environ.clear()  # a forked process has the environment at the time of `prepare_workers`
    os.environ.update(environment)
    os.environ.pop("MLFLOW_RUN_ID", None)
    if log_folder is not None:
        Path(log_folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(log_folder) / f"worker-{os.getpid()}.log", "a", buffering=1)  # noqa: SIM115  (open until the end)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers itself
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _end_with_the_parent() -> None:
    """End this worker when its parent ends, because a parent that is killed cannot stop its workers."""
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        with contextlib.suppress(Exception):
            print("The driver is gone: stopping.", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
