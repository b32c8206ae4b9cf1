"""Facts on files from earlier runs: digests, headers, statistics. They are kept in a small sqlite file in the user's cache.

A fact is kept under a digest of the state of every file it was read from: path, size, time of modification, time of change (which
no program can set back), inode. A file that changed thus has no facts, and nothing needs to be removed. Facts read from a file in
doubt are not kept: one that changed while it was read, or so shortly before that another change might leave the same times (git's
"racy" entries). Without a folder that can be written to, nothing is remembered; a damaged file is removed and begun again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dann_experiments.data.samples import Sample, files_of
from dann_experiments.data.virtual import all_local, files_behind, is_ours, is_virtual, user_cache

log = logging.getLogger(__name__)
FILE = "files.sqlite"
MOST_FACTS = 1_000_000  # some 200 MB
DOUBT_NS = 2 * 10**9
"""A file is in doubt if it changed less than this before it was looked at: FAT, the coarsest, counts in 2 s."""
WAIT_SECONDS = 2.0  # for other processes that write
AT_ONCE = 500  # keys per query, rows per transaction
State = tuple[Any, ...]


def place() -> Path | None:
    """Return the folder of what is kept; None = keep nothing, as on Windows, where files have no time of change."""
    return None if sys.platform == "win32" else user_cache()


class States:
    """The states of files as a job first finds them."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[State, bool]] = {}
        self._beside: dict[Path, dict[str, list[str]]] = {}

    def of(self, path: Path) -> State:
        """Return the state of one file."""
        name = str(path.absolute())
        if name not in self._found:
            now, found = time.time_ns(), os.stat(path)
            settled = max(found.st_mtime_ns, found.st_ctime_ns) + DOUBT_NS < now
            self._found[name] = _state(name, found), settled
        return self._found[name][0]

    def of_samples(self, samples: Sequence[Sample]) -> list[State] | None:
        """Return the states of all files that decide how samples are read: images and labels, the sources of virtual rasters, and
        files beside them, such as a.tfw and a.tif.aux.xml. None if some cannot be known, as for a remote image."""
        states = []
        for file in files_of(samples):
            if not all_local(file):
                return None
            try:
                for path in files_behind(file) if is_virtual(file) else [file]:
                    states += [(str(path),)] if is_ours(path) else [self.of(path)]
                    states += [self.of(path.parent / name) for name in self._names_beside(path)]
            except OSError:
                return None
        return states

    def certain(self, states: Sequence[State]) -> bool:
        """Return True if these files are still as first found, and had not changed shortly before."""
        for state in states:
            known, settled = self._found.get(state[0], (state, True))  # ours are named by their content
            try:
                if not settled or (len(known) > 1 and _state(state[0], os.stat(state[0])) != known):
                    return False
            except OSError:
                return False
        return True

    def _names_beside(self, path: Path) -> list[str]:
        """Return the names of other files that begin with a file's stem and a dot."""
        folder = path.parent
        if folder not in self._beside:
            names: dict[str, list[str]] = {}
            with contextlib.suppress(OSError):
                for name in os.listdir(folder):
                    dot = name.find(".", 1)
                    while dot > 0:
                        names.setdefault(name[:dot], []).append(name)
                        dot = name.find(".", dot + 1)
            self._beside[folder] = names
        found = [name for name in self._beside[folder].get(path.stem, ()) if name != path.name]
        return sorted(name for name in found if (folder / name).is_file())


class Facts:
    """Facts by key, kept in one sqlite file that processes share."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / FILE
        self._new: dict[bytes, bytes] = {}

    @property
    def kept(self) -> bool:
        """True if facts are remembered at all."""
        return self._file is not None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return what is known under these keys."""
        found: dict[bytes, Any] = {}
        if self._file is None or not self._file.exists():
            return found

        def ask(connection: sqlite3.Connection) -> None:
            today, old = _today(), []
            for first in range(0, len(keys), AT_ONCE):
                some = keys[first : first + AT_ONCE]
                marks = ",".join("?" * len(some))
                for key, value, used in connection.execute(
                    f"SELECT key, value, used FROM facts WHERE key IN ({marks})",  # noqa: S608
                    some,
                ):
                    text = _checked(key, value)
                    if text is not None:
                        found[key] = json.loads(text)
                    if used != today:
                        old.append((today, key))
            connection.executemany("UPDATE facts SET used = ? WHERE key = ?", old)

        self._with_connection(ask)
        return found

    def known_or(
        self, kind: str, samples: Sequence[Sample], rules: Mapping[str, Any], make: Callable[[], Any], states: States
    ) -> Any:
        """Return a fact on samples, or make it now and keep it; `rules`: how they are read."""
        files = states.of_samples(samples) if self.kept else None
        if files is None:
            return make()
        key = key_of_samples(kind, files, samples, rules)
        known = self.get([key])
        if key in known:
            return known[key]
        found = make()
        if states.certain(files):
            self.put(key, found)
            self.flush()
        return found

    def put(self, key: bytes, value: Any) -> None:
        """Keep a fact; it is written with others, by `flush` at the latest."""
        text = json.dumps(value).encode()
        self._new[key] = _check(key, text) + text
        if len(self._new) >= AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what `put` collected."""
        if self._file is None or not self._new:
            return
        rows = [(key, value, _today()) for key, value in self._new.items()]
        self._new = {}

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS facts (key BLOB PRIMARY KEY, value BLOB, used INTEGER) WITHOUT ROWID"
            )
            connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", rows)
            (count,) = connection.execute("SELECT count(*) FROM facts").fetchone()
            if count > MOST_FACTS:  # the least recently used quarter goes
                connection.execute(
                    "DELETE FROM facts WHERE key IN (SELECT key FROM facts ORDER BY used LIMIT ?)",
                    (count - MOST_FACTS * 3 // 4,),
                )

        self._with_connection(write)

    def _with_connection(self, act: Callable[[sqlite3.Connection], None]) -> None:
        assert self._file is not None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self._file, timeout=WAIT_SECONDS)) as connection, connection:
                act(connection)
        except sqlite3.OperationalError as error:  # locked, read-only, no space: another time
            log.debug("%s: %s", self._file, error)
        except (sqlite3.Error, ValueError) as error:
            log.info("%s is damaged (%s) and is begun again.", self._file, error)
            for name in (FILE, f"{FILE}-journal"):
                with contextlib.suppress(OSError):
                    (self._file.parent / name).unlink(missing_ok=True)
        except OSError as error:
            log.debug("%s: %s", self._file, error)


def key_of(kind: str, states: Sequence[State], *facts: Any) -> bytes:
    """Return the key of a fact of this kind on the bytes of these files; `facts`: what else it depends on."""
    text = repr((kind, states, facts))
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def key_of_samples(kind: str, states: Sequence[State], samples: Sequence[Sample], rules: Mapping[str, Any]) -> bytes:
    """Return the key of a fact of this kind on samples, read by `rules` and this version of the program."""
    parts = [(str(one.image), str(one.mask), one.region, one.layer, str(one.area)) for one in samples]
    return key_of(kind, states, parts, sorted(rules.items()), code())


@functools.cache
def code() -> str:
    """Return a digest of the program that reads files: another version may read them in another way."""
    import rasterio

    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        with contextlib.suppress(OSError):
            digest.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("rasterio", "numpy", "pillow")]
    digest.update(repr((versions, rasterio.__gdal_version__)).encode())
    return digest.hexdigest()


def _state(name: str, found: os.stat_result) -> State:
    return name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _today() -> int:
    return int(time.time() // 86400)


def _check(key: bytes, text: bytes) -> bytes:
    return hashlib.blake2b(key + text, digest_size=8).digest()


def _checked(key: bytes, value: Any) -> bytes | None:
    """Return the text of a row; None if it is not what was written."""
    if not isinstance(value, bytes) or _check(key, value[8:]) != value[:8]:
        return None
    return value[8:]
