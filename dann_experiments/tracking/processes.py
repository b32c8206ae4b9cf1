"""Names of processes, so that what a dead one left open can be told from what a living one is writing."""

from __future__ import annotations

import contextlib
import os
import socket

import psutil


def _machine() -> str:
    """Host name and, where there are such, the namespace of process ids: containers may share the name of their host."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return socket.gethostname()


def process_name() -> str:
    """This process, in a way that no later one has: machine, id, and when it started."""
    return f"{_machine()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def live_process(name: str) -> psutil.Process | None:
    """The process of that name if it lives on this machine."""
    machine, pid, started = name.rsplit(":", 2)
    if machine == _machine():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def is_elsewhere(name: str) -> bool:
    """Whether the process of that name is another machine's."""
    return name.rsplit(":", 2)[0] != _machine()
