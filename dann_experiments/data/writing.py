"""Class maps in files: kept piece by piece while they grow, so that a killed process can go on, and written out at the end.

Letters: K classes, h x w pixels. Maps hold class ids in one band of 8 bits, 255 where there is no data; probabilities K
bands of 8 bits, 254 times the probability.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.orientation import TURNS, orientation_of
from dann_experiments.data.rasters import CACHE_MB, Window, open_raster

if TYPE_CHECKING:
    from filelock import FileLock
    from rasterio.io import DatasetReader, DatasetWriter

NODATA = 255  # of class maps and of probabilities
PROBABILITY_STEPS = 254  # a probability p is stored as round(254 p)
TIFF_SUFFIXES = (".tif", ".tiff")
MAP_SUFFIXES = (*TIFF_SUFFIXES, ".png")
SIGNATURE_TAG = "dann_signature"  # of a map's metadata: what made it
PARTIAL_SUFFIX = ".partial"
FORMAT = 1  # of the partial folder
BLOCK = 512  # side of a GeoTIFF's tiles


@dataclass(frozen=True)
class Grid:
    """Size and georeference of a raster."""

    height: int
    width: int
    crs: Any
    """None = not georeferenced."""
    transform: Any
    gcps: tuple[Any, ...] = ()
    """Ground control points; then `crs` is theirs."""
    pixel_is: str | None = None
    """AREA_OR_POINT of the file."""


@dataclass(frozen=True)
class Legend:
    """What a map says of itself."""

    class_names: Sequence[str]
    colours: np.ndarray
    """(K, 3) in 0..1."""
    tags: Mapping[str, str]
    """More of the file's metadata."""


def read_grid(path: Path) -> Grid:
    """Size and georeference of a file. Raises InputError for what is no image."""
    with open_raster(path) as file:
        points, crs_of_points = file.gcps
        height, width = TURNS[orientation_of(file)].size(file.height, file.width)
        return Grid(
            height, width, crs_of_points if points else file.crs, file.transform, tuple(points),
            file.tags().get("AREA_OR_POINT"),
        )  # fmt: skip


def read_tags(path: Path) -> dict[str, str]:
    """The metadata of a file. Raises InputError for what is no image."""
    with open_raster(path) as file:
        return file.tags()


def read_decimated(path: Path, bands: Sequence[int], side: int) -> np.ndarray:
    """(bands, h, w) of the whole file as it is shown, nearest pixel, at most `side` pixels high and wide."""
    from rasterio.enums import Resampling

    with open_raster(path) as file:
        factor = max(file.height / side, file.width / side, 1.0)
        size = (max(round(file.height / factor), 1), max(round(file.width / factor), 1))
        values = file.read(list(bands), out_shape=(len(bands), *size), resampling=Resampling.nearest)
        return TURNS[orientation_of(file)].shown(values)


class PartialMap:
    """What is done of a map, in a folder beside it. `with` holds the folder against a second process, and at the end removes
    it where nothing is done.

    The pieces lie one after the other as they were added. The state names how much of the files counts, so whatever a
    killed process wrote after its last `checkpoint` is cut off.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], with_probabilities: bool) -> None:
        """`facts` is all that the map depends on: a folder with others is not gone on with."""
        self.folder = folder
        self.facts = json.loads(json.dumps(dict(facts), default=str))
        self.names = ["classes.raw", *(["probabilities.raw"] if with_probabilities else [])]
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
        if not (self.folder / "state.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> tuple[int, np.ndarray | None, str | None]:
        """Rows of tiles that are done, what is carried to the next (None = nothing), and why the folder's former content
        was dropped (None = it was not, or there was none)."""
        state, reason = self._read_state()
        with self._told():
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

    def add(self, ids: np.ndarray, probabilities: np.ndarray | None) -> None:
        """Append a piece: (h, w) and, where they are kept, (K, h, w), both uint8."""
        with self._told():
            for file, values in zip(self._files, (ids, probabilities), strict=False):
                assert values is not None
                file.write(np.ascontiguousarray(values).data)

    def checkpoint(self, rows: int, carry: np.ndarray) -> None:
        """Everything added so far counts from now on, and `rows` rows of tiles are done."""
        with self._told():
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
            name = f"carry_{rows}.npy"  # a name of its own: the state changes over to it in one step
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

    def read(self, windows: Iterable[Window], bands: int | None = None) -> Iterator[tuple[Window, np.ndarray]]:
        """The pieces again, in their order: class ids (1, h, w), or probabilities (bands, h, w)."""
        for file in self._files:
            file.flush()
        count = bands or 1
        with open(self.folder / self.names[0 if bands is None else 1], "rb") as file:
            for window in windows:
                content = file.read(count * window.height * window.width)
                yield window, np.frombuffer(content, np.uint8).reshape(count, window.height, window.width)

    def remove(self) -> None:
        """What is done is of no use, or the map is written: delete it; the folder goes at the end of `with`."""
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
            other = [key for key, value in self.facts.items() if state["facts"].get(key) != value]
            if other or set(state["facts"]) != set(self.facts):
                return None, f"made with another {', '.join(other)}"
            short = [name for name in self.names if (self.folder / name).stat().st_size < state["bytes"][name]]
            carry = state["carry"]
            if short or Path(carry).name != carry or not (self.folder / carry).is_file():
                return None, "files are missing or cut off"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return None, f"its state cannot be read ({error})"
        return state, None

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk is the user's to mend, and what is done is not lost."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error}); what is done stays there: mend it and start again."
            ) from None


def write_map(
    path: Path, partial: PartialMap, windows: Sequence[Window], size: tuple[int, int], grid: Grid, factor: float,
    legend: Legend,
) -> np.ndarray:  # fmt: skip
    """Write the finished class map to `path`: a Cloud Optimized GeoTIFF, or a PNG with a palette, by its suffix.

    `windows` are those of the partial map's pieces, `size` its (height, width). It is brought to `grid`, the nearest
    pixel, where a pixel of it is `factor` pixels of that. Returns pixels a class (K + 1,), those without data last.
    """
    source = partial.folder / "map.tif"
    names = legend.class_names
    with _told_about(path), _gdal():
        with _new_tiff(source, size, grid, factor, 1) as file:
            _describe(file, legend)
            file.set_band_description(1, "class")
            table = {index: (*_bytes(colour), 255) for index, colour in enumerate(legend.colours)}
            file.write_colormap(1, {**table, NODATA: (0, 0, 0, 0)})
            file.update_tags(1, **{f"class_{index}": name for index, name in enumerate(names)})
            counts = _fill(file, partial.read(windows), partial.folder, size, factor)
        _publish(source, path)
    return np.append(counts[: len(names)], counts[NODATA])


def write_probabilities(
    path: Path, partial: PartialMap, windows: Sequence[Window], size: tuple[int, int], grid: Grid, factor: float,
    legend: Legend,
) -> None:  # fmt: skip
    """Write the probabilities of all classes to `path`, a Cloud Optimized GeoTIFF with a band a class; see write_map."""
    source = partial.folder / "probabilities.tif"
    count = len(legend.class_names)
    with _told_about(path), _gdal():
        with _new_tiff(source, size, grid, factor, count) as file:
            _describe(file, legend)
            file.descriptions = tuple(legend.class_names)
            file.scales = (1 / PROBABILITY_STEPS,) * count
            _fill(file, partial.read(windows, count), partial.folder, size, factor)
        _publish(source, path)


def _new_tiff(path: Path, size: tuple[int, int], grid: Grid, factor: float, bands: int) -> DatasetWriter:
    """Not compressed: the pieces do not meet its tiles, so these are written several times."""
    import rasterio

    height, width = size if factor == 1.0 else (grid.height, grid.width)
    file = rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=bands, dtype="uint8", nodata=NODATA, tiled=True,
        blockxsize=BLOCK, blockysize=BLOCK, interleave="band", photometric="MINISBLACK", BIGTIFF="IF_SAFER",
    )  # fmt: skip
    if grid.gcps:
        file.gcps = (list(grid.gcps), grid.crs)
    else:
        if grid.crs is not None:
            file.crs = grid.crs
        if grid.crs is not None or not grid.transform.is_identity:
            file.transform = grid.transform
    if grid.pixel_is is not None:
        file.update_tags(AREA_OR_POINT=grid.pixel_is)
    return file


def _describe(file: DatasetWriter, legend: Legend) -> None:
    file.update_tags(class_names=json.dumps(list(legend.class_names), ensure_ascii=False), **legend.tags)


def _fill(
    file: DatasetWriter, pieces: Iterable[tuple[Window, np.ndarray]], folder: Path, size: tuple[int, int], factor: float
) -> np.ndarray:
    """Write the pieces; returns how often each value occurs, (256,)."""
    import rasterio

    if factor == 1.0:
        return _write(file, pieces)
    working = folder / "working.tif"  # of the grid that was predicted on
    with rasterio.open(
        working, "w", driver="GTiff", height=size[0], width=size[1], count=file.count, dtype="uint8", tiled=True,
        blockxsize=BLOCK, blockysize=BLOCK, interleave="band", BIGTIFF="IF_SAFER",
    ) as between:  # fmt: skip
        _write(between, pieces)
    with rasterio.open(working) as between:
        counts = _write(file, _resampled(between, file, factor))
    working.unlink()
    return counts


def _write(file: DatasetWriter, pieces: Iterable[tuple[Window, np.ndarray]]) -> np.ndarray:
    from rasterio.windows import Window as FileWindow

    counts = np.zeros(256, np.int64)
    for window, values in pieces:
        file.write(values, window=FileWindow(window.left, window.top, window.width, window.height))  # pyright: ignore[reportCallIssue]
        counts += np.bincount(values[0].ravel(), minlength=256)
    return counts


def _resampled(source: DatasetReader, target: DatasetWriter, factor: float) -> Iterator[tuple[Window, np.ndarray]]:
    """Block by block of the target: the source's pixel that holds the centre of each pixel."""
    from rasterio.windows import Window as FileWindow

    def behind(start: int, count: int, limit: int) -> np.ndarray:
        return np.minimum(((start + np.arange(count) + 0.5) / factor).astype(int), limit - 1)

    for top in range(0, target.height, BLOCK):
        height = min(BLOCK, target.height - top)
        rows = behind(top, height, source.height)
        for left in range(0, target.width, BLOCK):
            width = min(BLOCK, target.width - left)
            columns = behind(left, width, source.width)
            box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
            values = source.read(window=FileWindow(*map(int, box)))
            yield Window(top, left, height, width), values[:, (rows - rows[0])[:, None], columns - columns[0]]


def _publish(source: Path, path: Path) -> None:
    """Copy the plain GeoTIFF into the format of `path`, beside the source first: `path` is whole or not there."""
    from rasterio.shutil import copy

    made = source.with_suffix(".made" + path.suffix)
    if path.suffix.lower() in TIFF_SUFFIXES:
        copy(
            source, made, driver="COG", COMPRESS="DEFLATE", BLOCKSIZE=BLOCK, OVERVIEW_RESAMPLING="NEAREST",
            NUM_THREADS="ALL_CPUS", BIGTIFF="IF_SAFER",
        )  # fmt: skip
    else:
        copy(source, made, driver="PNG", WRITE_METADATA_AS_TEXT="YES")
    source.unlink()
    with open(made, "rb") as file:
        os.fsync(file.fileno())
    os.replace(made, path)


@contextlib.contextmanager
def _gdal() -> Iterator[None]:
    """GDAL with a small cache and without sidecar files."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_PAM_ENABLED="NO"):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@contextlib.contextmanager
def _told_about(path: Path) -> Iterator[None]:
    from rasterio.errors import RasterioError

    try:
        yield
    except (OSError, RasterioError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"{path} cannot be written: {reason}. What is predicted is kept beside it: mend it and start again."
        ) from None


def _write_atomically(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _bytes(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(part)) for part in colour)
    return red, green, blue
