"""Digests of a job's files: each is hashed once, and not again in later jobs while it does not change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dann_experiments.data.remembered import Facts, State, States, key_of
from dann_experiments.data.samples import file_digest
from dann_experiments.data.virtual import files_behind, is_virtual

KIND = "digest"


class Digests:
    """The digests of files, by path."""

    def __init__(self, facts: Facts, states: States) -> None:
        self._facts, self._states = facts, states
        self._found: dict[Path, bytes] = {}
        self._looked_up: set[Path] = set()

    def of(self, path: Path) -> bytes:
        """Return the digest of a file's bytes; of a virtual raster, also of the files that it shows."""
        if path not in self._found:
            self.recall(files_behind(path))
            if path in self._found:
                return self._found[path]
            state = self._state_of(path)
            self._found[path] = file_digest(path, self.of)
            if state is not None and self._states.certain([state]):
                self._facts.put(key_of(KIND, [state]), self._found[path].hex())
        return self._found[path]

    def recall(self, paths: Iterable[Path]) -> None:
        """Look up the digests of files that have not changed since they were hashed, all in one query."""
        states = {path: self._state_of(path) for path in paths if path not in self._looked_up}
        self._looked_up |= states.keys()
        keys = {path: key_of(KIND, [state]) for path, state in states.items() if state is not None}
        known = self._facts.get(list(keys.values()))
        self._found.update({path: bytes.fromhex(known[key]) for path, key in keys.items() if key in known})

    def update(self, known: Mapping[Path, bytes]) -> None:
        """Take over digests that another process computed."""
        self._found.update(known)

    def _state_of(self, path: Path) -> State | None:
        """Return the state of a file whose digest is that of its bytes alone; None if it is not remembered."""
        if not self._facts.kept or is_virtual(path):
            return None
        try:
            return self._states.of(path)
        except OSError:
            return None
