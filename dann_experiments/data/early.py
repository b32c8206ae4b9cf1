"""Looks at the files of a job while the process that runs it still imports torch and Lightning.

A child of that process finds the sets and reads small files, as `load_data` would, and hands over what it found. It says nothing
of its own: whatever it does not give, because something is wrong with a file or with the child, the job reads and tells itself.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from dann_experiments.config import Config
from dann_experiments.data.samples import SETS

MOST_GB = 0.25  # of pixels: while they are handed over there are several copies of them


class OfSet(NamedTuple):
    """What the child found of a set with which nothing is wrong."""

    files: list[str]
    """Images and masks in their order: as texts, which are handed over faster than paths."""
    digests: list[bytes | None]
    headers: list[Any]
    read: dict[int, Any]
    """As `sets.Looked` has them."""


class Early(NamedTuple):
    """What the child found."""

    sets: Mapping[str, OfSet]
    all_read: bool
    """Whether every image was read ahead."""


_begun: tuple[str, Connection, Any] | None = None


def begin(config: Config, names: tuple[str, ...] = SETS) -> None:
    """Start the child, for a job that will load the sets `names`. Nothing is done where there is no second core for
    it, where processes are not forked well, and where all is imported already."""
    global _begun
    if sys.platform != "linux" or "torch" in sys.modules or threading.active_count() > 1 or _begun is not None:
        return
    if len(os.sched_getaffinity(0)) < 2 or config.data.memory_gb <= 0:
        return
    with contextlib.suppress(OSError):  # no process or no pipe is left
        context = multiprocessing.get_context("fork")
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=_look, args=(mine, its, config, names), name="files", daemon=True)
        process.start()
        its.close()
        _begun = _facts(config, names), mine, process


def taken(config: Config, names: tuple[str, ...] = SETS) -> Early | None:
    """What the child of this process found for these settings, once it is done; None if there is none. It is given once."""
    global _begun
    if _begun is None:
        return None
    (facts, mine, process), _begun = _begun, None
    found = None
    if facts == _facts(config, names):
        with contextlib.suppress(EOFError, OSError):
            found = mine.recv()
    mine.close()
    process.terminate()
    process.join()
    return found


def _forget() -> None:
    """In a process that was forked from this one: what the child found is not for it."""
    global _begun
    if _begun is not None:
        _begun[1].close()
        _begun = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _facts(config: Config, names: tuple[str, ...]) -> str:
    """All settings on which the child's findings depend."""
    return repr((names, config.data, config.model.in_channels, config.class_names))


def _look(its_parents: Connection, sender: Connection, config: Config, names: tuple[str, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    its_parents.close()  # so that it ends with its parent, at the latest when it has something to say
    logging.disable()
    warnings.simplefilter("ignore")
    with contextlib.suppress(Exception), sender:
        found = _found(config, names)
        if found is not None:
            sender.send(found)


def _found(config: Config, names: tuple[str, ...]) -> Early | None:
    from dann_experiments.data.looking import Ahead, Memory
    from dann_experiments.data.reading import many_files
    from dann_experiments.data.samples import files_of
    from dann_experiments.data.sets import Problems, find_set, is_there

    if not is_there(config):  # the parent builds them, and says so
        return None
    problems, ahead, sets = Problems(), Ahead(Memory(min(config.data.memory_gb, MOST_GB))), {}
    found = {name: find_set(config, name, problems.append) for name in names}
    with many_files():
        for name, samples in found.items():
            if problems.texts:
                return None
            if samples is not None:
                _, headers, read = problems.good(config, name, samples, ahead)
                files = files_of(samples)
                digests = [ahead.digests.get(path) for path in files]
                sets[name] = OfSet([str(path) for path in files], digests, headers, read)
    return None if problems.texts or problems.remarks.lines() else Early(sets, ahead.goes_on)
