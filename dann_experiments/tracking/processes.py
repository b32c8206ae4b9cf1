"""Unique names of processes, to distinguish what a dead process left open from what a living one is writing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil

WATCH_SECONDS = 0.5
_SHELLS = ("bash", "sh", "dash", "zsh")  # `mlflow run` starts its command in one


def _machine() -> str:
    """Return the host name and, if the system has one, the namespace of process ids: containers may share a host name."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return socket.gethostname()


def process_name(process: psutil.Process | None = None) -> str:
    """Return a name that no later process will have: machine, process id and start time. Default: this process."""
    process = process or psutil.Process()
    return f"{_machine()}:{process.pid}:{_started(process.pid)}"


def _started(pid: int) -> str:
    """Return when a process started: on Linux the boot and the kernel's ticks since then, because the time of day may be set
    back. Raises psutil.Error if there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot[:8]}-{ticks}"
    return f"{psutil.Process(pid).create_time():.0f}"


def live_process(name: str) -> psutil.Process | None:
    """Return the process of that name if it is alive on this machine, else None."""
    machine, pid, started = name.rsplit(":", 2)
    if machine == _machine():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if _started(process.pid) == started and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def is_elsewhere(name: str) -> bool:
    """Return whether the process of that name belongs to another machine."""
    return name.rsplit(":", 2)[0] != _machine()


def is_gone(name: str) -> bool:
    """Return whether the process of that name belonged to this machine and has ended."""
    return not is_elsewhere(name) and live_process(name) is None


def end_with_the_launcher() -> None:
    """End this process in an orderly way when the `mlflow run` that started it is gone: MLflow does not forward SIGTERM."""
    parent = _launcher()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _launcher() -> psutil.Process | None:
    """Return the process that started this one, not counting shells between them."""
    with contextlib.suppress(psutil.Error):
        return next((one for one in psutil.Process().parents() if one.name() not in _SHELLS), None)
    return None


def _end_after(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
