"""Processes: their names, so that what a dead one left open can be told from what a living one is writing; what makes one a
worker of another; and how many this machine can run."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

MOST_DEFAULT_WORKERS = 4
WATCH_SECONDS = 0.5
_SHELLS = ("bash", "sh", "dash", "zsh")  # `mlflow run` starts its command by one
STOP_SECONDS = 90.0  # a run that is being closed may wait a minute for its store


def _machine() -> str:
    """Host name and, where there are such, the namespace of process ids: containers may share the name of their host."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return socket.gethostname()


def process_name(process: psutil.Process | None = None) -> str:
    """A process of this machine (default: this one), in a way that no later one has: machine, id, and when it started."""
    process = process or psutil.Process()
    return f"{_machine()}:{process.pid}:{_started(process.pid)}"


def _started(pid: int) -> str:
    """When a process started, as no later one of its number did. On Linux by the boot and the kernel's ticks since then: the
    time of day would be another one after the machine's clock was put back. Raises psutil.Error if there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot[:8]}-{ticks}"
    return f"{psutil.Process(pid).create_time():.0f}"


def live_process(name: str) -> psutil.Process | None:
    """The process of that name if it lives on this machine."""
    machine, pid, started = name.rsplit(":", 2)
    if machine == _machine():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if _started(process.pid) == started and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def is_elsewhere(name: str) -> bool:
    """Whether the process of that name is another machine's."""
    return name.rsplit(":", 2)[0] != _machine()


def is_gone(name: str) -> bool:
    """Whether the process of that name was of this machine and lives no more."""
    return not is_elsewhere(name) and live_process(name) is None


def how_it_ended(code: int) -> str:
    """A process's exit code in words that follow its name: "was killed by SIGKILL ...", "ended with code 3"."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (", as the kernel does where memory runs out" if name == "SIGKILL" else "")
    return f"ended with code {code}"


def join_or_kill(processes: Iterable[BaseProcess]) -> None:
    """Wait for processes that were told to stop: all together STOP_SECONDS; then kill those that are left."""
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def prepare_workers(preloaded: str) -> None:
    """Start the process that workers are forked from, if there is none yet. It imports module `preloaded`, once for all workers,
    while this process goes on; it does nothing else, touches no GPU, and ends with this process. Where processes are not forked
    well (macOS, Windows) nothing is done: each worker imports for itself."""
    if sys.platform == "linux":
        from multiprocessing import forkserver

        multiprocessing.set_forkserver_preload([preloaded])
        forkserver.ensure_running()


def fork_workers_from_here(preloaded: str) -> None:
    """As `prepare_workers`, for a process that has imported most of `preloaded` and done nothing else yet: the process that
    workers are forked from is forked from this one, so that nothing is imported twice. In a process that has begun to work
    it could take over half a computation, a GPU or a database's connection."""
    # Python's own fork server is a new interpreter; these attributes of it are those of 3.11 to 3.13
    if sys.platform != "linux" or sys.version_info >= (3, 14) or threading.active_count() > 1:
        return prepare_workers(preloaded)
    from multiprocessing import forkserver, resource_tracker, util

    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        return None
    multiprocessing.set_forkserver_preload([preloaded])  # of the one that is started should this one die
    resource_tracker.ensure_running()
    with socket.socket(socket.AF_UNIX) as listener:
        # of a folder that is this user's alone and goes with this process: who asks gets code run
        listener.bind(address := f"{util.get_temp_dir()}/workers")
        listener.listen()
        alive, ours = os.pipe()  # whoever may ask for workers holds `ours`: when all are gone, the server ends
        pid = os.fork()
        if pid == 0:
            try:
                os.close(ours)
                importlib.import_module(preloaded)
                forkserver.main(listener.detach(), alive, [])
            finally:
                os._exit(0)  # nothing of what the parent would do at its end
        os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, ours, pid
    return None


def preload(modules: Iterable[str]) -> None:
    """Import them in the process that workers are forked from. What fails is left to the worker, which tells it in its log."""
    with contextlib.suppress(OSError):  # the current folder may be gone while torch looks for it: stand in none
        here = os.getcwd()
        sys.path[:] = [entry or here for entry in sys.path]
        os.chdir("/")
    with warnings.catch_warnings():  # the parent shows its own
        warnings.simplefilter("ignore")
        for name in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def worker_context() -> BaseContext:
    """How workers are started."""
    return multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def become_worker(log_file: str | None, environment: Mapping[str, str]) -> None:
    """Make this process, started by another, its worker: with a log file instead of the terminal, the parent's environment of
    now without its MLflow run, and an end that comes with the parent's. SIGTERM ends it in good order; SIGINT is left to the
    parent."""
    os.environ.clear()  # a forked one has that of the time when `prepare_workers` was called
    os.environ.update(environment)
    os.environ.pop("MLFLOW_RUN_ID", None)
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        file = open(log_file, "a", buffering=1)  # noqa: SIM115  (open as long as the process)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import rich

        rich.reconfigure()  # a forked one has the console of the parent's terminal, with its colours
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers itself
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def end_with_the_launcher() -> None:
    """Make this process, started by `mlflow run`, end in good order when `mlflow run` is gone: it passes no SIGTERM on."""
    parent = launcher()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def launcher() -> psutil.Process | None:
    """The process that started this one, behind the shell that may stand between."""
    with contextlib.suppress(psutil.Error):
        return next((one for one in psutil.Process().parents() if one.name() not in _SHELLS), None)
    return None


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(accelerator: str) -> list[str]:
    """The GPUs that `trainer.accelerator` may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if accelerator not in ("auto", "gpu") or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def default_workers(gpus: list[str]) -> int:
    """One a GPU, else one a core, but not more than memory usually holds."""
    return len(gpus) or min(available_cores(), MOST_DEFAULT_WORKERS)


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _end_after(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _end_with_the_parent() -> None:
    """A parent that was killed cannot stop its workers: they see its end themselves."""
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        with contextlib.suppress(Exception):
            print("The driver is gone: stopping.", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
