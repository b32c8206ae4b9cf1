"""Stores in a sqlite file: where it is, whether it can be used now, and one process at a time to make it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from dann_experiments.config.errors import InputError, StoreAway

LOCKED_SECONDS = 20.0
"""How long a job that starts waits for another process to give the file free; MLflow waits as long in each request."""
MADE_SECONDS = 300.0
"""How long it waits for other processes that open the store, which takes each of them seconds where it is new."""
GROWN = 4
"""So many times the points that were there when sqlite looked last make it look again."""
LOOKED_AT = 1000
"""So many rows of an index it looks at, which takes milliseconds, however many there are."""


def absolute(uri: str) -> str:
    """A sqlite file by its whole path: MLflow keeps stores open by their address, whatever the current folder is."""
    if not uri.startswith("sqlite:///") or uri.startswith("sqlite:////"):
        return uri
    query = uri.partition("?")[1] + uri.partition("?")[2]
    return f"sqlite:///{sqlite_file(uri).resolve()}{query}"


def sqlite_file(uri: str) -> Path:
    """The file of an address sqlite:///FILE?..."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).expanduser()


def check_file(uri: str, given: str, to_write: bool) -> None:
    """Raises InputError if the store cannot be used, StoreAway if another process keeps it locked; `given`: the address and
    what it was given as, for the message. MLflow itself would wait longer, and not name the file."""
    file = sqlite_file(uri).resolve()
    if not file.parent.is_dir():
        raise InputError(f"{given}, but folder {file.parent} does not exist; make it or choose another.")
    if not os.access(file.parent, os.W_OK):  # sqlite writes its journal there
        raise InputError(f"{given}, but folder {file.parent} cannot be written to; choose another.")
    if not file.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=LOCKED_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # as a writer would
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if to_write:  # a read-only file and a full disk are seen here, and nothing is changed
                connection.execute(f"PRAGMA user_version = {version:d}")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreAway(
                f"{given}, but another process has kept {file} locked for {LOCKED_SECONDS:g} s; wait until that has ended or "
                f"end it (`lsof {file}` names it), then start again."
            ) from None
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise InputError(f"{given}, but {file} cannot be written to ({error}); choose another.") from None
        raise InputError(f"{given}, which cannot be used: {file}: {error}.") from None


def look_at_metrics(uri: str) -> None:
    """Let a sqlite store count what its table of points holds, where that has grown much since: not knowing that a run has few
    of them, sqlite looks for a run's history among the points of all runs. A file that another process writes is left for the
    next time."""
    file = sqlite_file(uri)
    if not uri.startswith("sqlite:///") or not file.exists():
        return
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(file, timeout=0)) as connection,
        connection,
    ):
        known = 0
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_stat1'").fetchone():
            found = connection.execute("SELECT max(CAST(stat AS INTEGER)) FROM sqlite_stat1 WHERE tbl = 'metrics'")
            known = found.fetchone()[0] or 0
        (points,) = connection.execute("SELECT max(rowid) FROM metrics").fetchone()  # at once, which count(*) is not
        if (points or 0) > GROWN * known:
            connection.execute(f"PRAGMA analysis_limit = {LOOKED_AT}")
            connection.execute("ANALYZE metrics")


@contextlib.contextmanager
def one_opens(uri: str, given: str) -> Iterator[None]:
    """The block opens the store, in one process at a time: several that make a new file at once would crash in its migration.
    A new file that could not be made to its end (a full disk) is emptied: as it is, it could never be opened."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    from filelock import FileLock, Timeout

    file, lock = sqlite_file(uri), Path(f"{sqlite_file(uri)}.lock")
    try:
        with FileLock(lock, timeout=MADE_SECONDS):
            is_new = not file.exists() or file.stat().st_size == 0
            try:
                yield
            except BaseException:
                if is_new:
                    with contextlib.suppress(OSError):  # emptied, not removed: a connection of this process may be open
                        Path(f"{file}-journal").unlink(missing_ok=True)
                        os.truncate(file, 0)
                raise
    except Timeout:
        raise StoreAway(
            f"{given}, which other processes have been opening for {MADE_SECONDS:g} s (`lsof {lock}` names them)."
        ) from None
