"""Stores in a sqlite file: finds the file, checks whether it can be used, and lets one process at a time create it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from dann_experiments.config.errors import InputError, StoreAway

LOCKED_SECONDS = 20.0
"""How long a job that starts waits for another process to unlock the file; MLflow waits as long in each request."""
MADE_SECONDS = 300.0
"""How long a job waits for other processes that open the store; each of them takes seconds if the store is new."""
GROWN = 4
"""Growth factor of the number of points since the last ANALYZE at which sqlite analyzes the table again."""
LOOKED_AT = 1000
"""Number of rows per index that ANALYZE reads, which takes milliseconds for a table of any size."""


def absolute(uri: str) -> str:
    """Return the address of a sqlite file with its absolute path: MLflow keeps stores open by address, in any current folder."""
    if not uri.startswith("sqlite:///") or uri.startswith("sqlite:////"):
        return uri
    query = uri.partition("?")[1] + uri.partition("?")[2]
    return f"sqlite:///{sqlite_file(uri).resolve()}{query}"


def sqlite_file(uri: str) -> Path:
    """Return the file of an address sqlite:///FILE?..."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).expanduser()


def check_file(uri: str, given: str, to_write: bool) -> None:
    """Raise InputError if the store cannot be used, StoreAway if another process keeps it locked. MLflow itself would wait
    longer, and not name the file. `given`: the start of the message, with the address and the setting it comes from."""
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
            if to_write:  # detects a read-only file and a full disk, without changing anything
                connection.execute(f"PRAGMA user_version = {version:d}")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreAway(
                f"{given}, but another process has kept {file} locked for {LOCKED_SECONDS:g} s; wait until it has ended or "
                f"end it (`lsof {file}` shows it), then start again."
            ) from None
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise InputError(f"{given}, but {file} cannot be written to ({error}); choose another.") from None
        raise InputError(f"{given}, which cannot be used: {file}: {error}.") from None


def look_at_metrics(uri: str) -> None:
    """Let sqlite analyze the table of points of a store if it has grown much since the last time.

    Without these statistics sqlite does not know that one run has few of the points, and searches the points of all runs for a
    run's history. Does nothing while another process is writing the file."""
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
        (points,) = connection.execute("SELECT max(rowid) FROM metrics").fetchone()  # immediate, unlike count(*)
        if (points or 0) > GROWN * known:
            connection.execute(f"PRAGMA analysis_limit = {LOOKED_AT}")
            connection.execute("ANALYZE metrics")


@contextlib.contextmanager
def one_opens(uri: str, given: str) -> Iterator[None]:
    """Let only one process at a time run the block, which opens the store: several that create a new file at once would crash in
    its migration. A new file whose creation fails (a full disk) is emptied, because it could never be opened otherwise."""
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
                    with contextlib.suppress(OSError):  # emptied instead of removed: a connection may still be open
                        Path(f"{file}-journal").unlink(missing_ok=True)
                        os.truncate(file, 0)
                raise
    except Timeout:
        raise StoreAway(
            f"{given}, which other processes have been opening for {MADE_SECONDS:g} s (`lsof {lock}` shows them)."
        ) from None
