"""An unfinished class map: its pieces are stored in a folder next to the map, so that a killed process can be resumed.

Letters: K classes, h x w pixels.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.rasters import Window

if TYPE_CHECKING:
    from filelock import FileLock

PARTIAL_SUFFIX = ".partial"
FORMAT = 1  # of the partial folder


class Layer(NamedTuple):
    """One kind of values of a map, which has a file of its own."""

    name: str
    bands: int
    dtype: str

    @property
    def file(self) -> str:
        """Name of the file of its pieces."""
        return f"{self.name}.raw"


CLASSES, CONFIDENCE = Layer("classes", 1, "uint8"), Layer("confidence", 1, "float32")


def probabilities_layer(classes: int) -> Layer:
    """Return the layer of the probabilities of that many classes."""
    return Layer("probabilities", classes, "uint8")


class PartialMap:
    """The finished pieces of a map, in a folder next to it.

    `with` locks the folder against a second process, and removes it at the end if no piece is finished. The pieces are stored
    in the order in which they were added. The state records the valid length of the files, so everything that a killed process
    wrote after its last `checkpoint` is cut off.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], layers: Sequence[Layer] = ()) -> None:
        """`facts`: everything that the map depends on; the content of a folder with other facts is deleted. `layers`: those that
        are stored in addition to the class ids."""
        self.folder = folder
        self.facts = json.loads(json.dumps(dict(facts), default=str))
        self.layers = (CLASSES, *layers)
        self.names = [layer.file for layer in self.layers]
        self._files: list[Any] = []
        self._lock: FileLock | None = None

    def __enter__(self) -> PartialMap:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.folder} is in use: another process is making this map.") from None
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error}); choose another output.") from None
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self._files = []
        if self._lock is not None:
            self._lock.release()
        if not self.is_kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_kept(self) -> bool:
        """True if there are finished pieces, which stay after the end of `with`."""
        return (self.folder / "state.json").exists()

    def start(self) -> tuple[int, np.ndarray | None, str | None]:
        """Return the number of finished rows of tiles, the array carried to the next row (None = none), and the reason if former
        content of the folder was deleted (None = it was not)."""
        state, reason = self._read_state()
        with self._explained():
            for name in self.names:
                path = self.folder / name
                length = state["bytes"][name] if state else 0
                file = open(path, "r+b" if state else "w+b")  # noqa: SIM115  (closed with the folder)
                self._files.append(file)
                file.truncate(length)
                file.seek(length)
            if not state:
                for old in (*self.folder.glob("carry_*.npy"), self.folder / "state.json"):
                    old.unlink(missing_ok=True)
                return 0, None, reason
            return state["rows"], np.load(self.folder / state["carry"], allow_pickle=False), None

    def add(self, *arrays: np.ndarray) -> None:
        """Append a piece: an array (h, w) or (bands, h, w) of each layer, class ids first."""
        with self._explained():
            for file, layer, values in zip(self._files, self.layers, arrays, strict=True):
                assert values.dtype == layer.dtype
                file.write(np.ascontiguousarray(values).data)

    def checkpoint(self, rows: int, carry: np.ndarray) -> None:
        """Record that everything added so far is valid, and that `rows` rows of tiles are done."""
        with self._explained():
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
            name = f"carry_{rows}.npy"  # a new name: the state switches to it in one step
            with open(self.folder / name, "wb") as file:
                np.save(file, carry)
                file.flush()
                os.fsync(file.fileno())
            lengths = {name: file.tell() for name, file in zip(self.names, self._files, strict=True)}
            state = {"format": FORMAT, "facts": self.facts, "rows": rows, "bytes": lengths, "carry": name}
            _write_atomically(self.folder / "state.json", json.dumps(state, indent=1))
            for old in self.folder.glob("carry_*.npy"):
                if old.name != name:
                    old.unlink()

    def read(self, windows: Iterable[Window], layer: Layer = CLASSES) -> Iterator[tuple[Window, np.ndarray]]:
        """Yield the pieces of a layer in order, (bands, h, w)."""
        for file in self._files:
            file.flush()
        kind = np.dtype(layer.dtype)
        with open(self.folder / layer.file, "rb") as file:
            for window in windows:
                shape = (layer.bands, window.height, window.width)
                content = file.read(math.prod(shape) * kind.itemsize)
                yield window, np.frombuffer(content, kind).reshape(shape)

    def remove(self) -> None:
        """Delete the pieces. The folder is removed at the end of `with`."""
        for file in self._files:
            file.close()
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def _read_state(self) -> tuple[dict[str, Any] | None, str | None]:
        path = self.folder / "state.json"
        if not path.exists():
            return None, None
        try:
            state = json.loads(path.read_text())
            if state["format"] != FORMAT:
                return None, "another version of this program made it"
            before = state["facts"]
            keys = [*self.facts, *(key for key in before if key not in self.facts)]
            other = [key for key in keys if self.facts.get(key, ...) != before.get(key, ...)]
            if other:
                return None, f"made with another {', '.join(other)}"
            short = [name for name in self.names if (self.folder / name).stat().st_size < state["bytes"][name]]
            carry = state["carry"]
            if short or Path(carry).name != carry or not (self.folder / carry).is_file():
                return None, "files are missing or cut off"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return None, f"its state cannot be read ({error})"
        return state, None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn disk errors into InputError: the user can correct them, and no finished piece is lost."""
        try:
            yield
        except OSError as error:
            kept = "the finished part is kept there: " if self.is_kept else ""
            raise InputError(
                f"{self.folder} cannot be written ({error}); {kept}correct this and start again."
            ) from None


def wait_for(folder: Path, seconds: float) -> None:
    """Wait at most that long while another process makes the map of this folder."""
    from filelock import FileLock, Timeout

    if folder.exists():
        with contextlib.suppress(OSError, Timeout), FileLock(folder / "lock", timeout=seconds):
            pass


def _write_atomically(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
