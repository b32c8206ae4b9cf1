"""Reads polygons from GeoJSON, GeoPackage and Shapefile, with the values that name their classes.

Letters: F features of a file, P polygons (a multipolygon is several), V distinct values.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.config.extras import install_command
from dann_experiments.config.nearest import meant

GEO_SUFFIXES = (".geojson", ".json", ".gpkg", ".shp")
DRIVERS = ("GeoJSON", "GPKG", "ESRI Shapefile")  # of GDAL; others can name further files or addresses
LABEL_SUFFIXES = (*GEO_SUFFIXES, ".txt")  # .txt: polygons of YOLO
SHAPEFILE_PARTS = (".shx", ".dbf", ".prj", ".cpg")  # side files that decide what a .shp says
FEATURES_AT_A_TIME = 10_000  # as objects of shapely, which take ten times the memory of their bytes
SHOWN = 5  # ids in a message
MOST_LAYERS = 8  # files whose polygons stay in memory


class Value(NamedTuple):
    """What a file says about the class of a polygon."""

    text: str | None
    """A text, such as the name of a category; None if the file has only a number."""
    number: int | None = None

    @property
    def shown(self) -> str:
        """The value in messages."""
        return repr(self.text) if self.text is not None else str(self.number)


@dataclass(frozen=True, eq=False)
class Polygons:
    """The polygons of a file, in coordinates of one CRS or in pixels of one image."""

    wkb: np.ndarray
    """(P,) well-known binary, in the order of the file."""
    bounds: np.ndarray
    """(P, 4) least x, least y, largest x, largest y."""
    feature: np.ndarray
    """(P,) position of each polygon's feature among the F features."""
    ids: np.ndarray
    """(F,) ids of the features in the file."""
    value_of: np.ndarray
    """(F,) position of each feature's value in `values`."""
    values: Sequence[Value]
    """V distinct values."""
    empty: Sequence[Any] = ()
    """Ids of features without any area."""
    mended: Sequence[Any] = ()
    """Ids of features that were invalid, such as polygons that cross themselves, and were made valid."""

    def within(self, left: float, low: float, right: float, high: float) -> np.ndarray:
        """Return the positions of the polygons whose bounds touch a box, in the order of the file."""
        found = self.bounds
        return np.flatnonzero(
            (found[:, 0] <= right) & (found[:, 2] >= left) & (found[:, 1] <= high) & (found[:, 3] >= low)
        )


def needed(path: Path) -> Any:
    """Return the module pyogrio. Raises InputError, with the command that installs it, if it or shapely is missing."""
    try:
        import pyogrio
        import shapely  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{path} holds vector labels, which need the packages pyogrio and shapely ({error}); install them with: "
            f"{install_command('vector')}"
        ) from None
    return pyogrio


def some(ids: Iterable[Any]) -> str:
    """Return the first ids for a message."""
    listed = list(ids)
    shown = ", ".join(str(one) for one in listed[:SHOWN])
    return shown + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def state_of(path: Path) -> tuple[int, int]:
    """Return size and modification time, by which a changed file is read again. Raises InputError if there is no file."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return found.st_size, found.st_mtime_ns


def is_vector(path: Path) -> bool:
    """Return True if a mask is a file of polygons, by its suffix."""
    return path.suffix.lower() in LABEL_SUFFIXES


def shapefile_parts(path: Path) -> list[Path]:
    """Return the side files of a Shapefile that decide what it says; none for other files."""
    if path.suffix.lower() != ".shp":
        return []
    parts = (path.with_suffix(suffix) for suffix in (*SHAPEFILE_PARTS, *map(str.upper, SHAPEFILE_PARTS)))
    return [part for part in parts if part.is_file()]


def read_polygons(path: Path, layer: str | None, attribute: str | None, crs: Any, settings: str) -> Polygons:
    """Return the polygons of a file with the values of an attribute, in coordinates of `crs`.

    Args:
        path: a file with one of `GEO_SUFFIXES`.
        layer: name of its layer; None = the only one.
        attribute: name of the attribute; None = no values are read, and each feature has the value None.
        crs: CRS of the image (of rasterio); None if it has none, which fits only files that have none either.
        settings: prefix of the settings' names in messages, such as `data.source.`.

    Raises:
        InputError: if the file cannot be read, has another number of layers, no such attribute, no CRS, or lines or points.
    """
    states = tuple(state_of(part) for part in (path, *shapefile_parts(path)))
    text = None if crs is None else crs.to_wkt()
    return _read(path, states, layer, attribute, text, settings)


@functools.lru_cache(maxsize=MOST_LAYERS)
def _read(
    path: Path, states: object, layer: str | None, attribute: str | None, crs: str | None, settings: str
) -> Polygons:
    pyogrio = needed(path)
    try:
        name = _layer(pyogrio, path, layer)
        facts = pyogrio.read_info(path, layer=name)
        if facts["driver"] not in DRIVERS:
            raise InputError(f"{path} cannot be read as vector labels: {facts['driver']} files are not read.")
        fields = [str(field) for field in facts["fields"]]
        if attribute is not None and attribute not in fields:
            raise InputError(
                f"{_named(path, name, layer)} has no attribute {attribute!r} ({settings}label_attribute); it has "
                f"{', '.join(map(repr, fields)) or 'none'}" + (meant(attribute, fields, least=0.5) or ".")
            )
        columns = [] if attribute is None else [attribute]
        found, ids, geometry, values = pyogrio.raw.read(
            path, layer=name, columns=columns, force_2d=True, return_fids=True
        )
    except InputError:
        raise
    except Exception as error:  # of pyogrio, of GDAL's decoders, of memory
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as vector labels: {reason}") from None
    move = _move(path, found["crs"], crs)
    distinct, value_of = _distinct(values[0] if values else np.full(len(ids), None, object))
    return Polygons(ids=ids, values=distinct, value_of=value_of, **split_up(path, ids, geometry, move))


def _named(path: Path, name: str, layer: str | None) -> str:
    return str(path) if layer is None else f"{path}, layer {name},"


def _layer(pyogrio: Any, path: Path, layer: str | None) -> str:
    """Return the name of the layer to read. Raises InputError if it must be named, or does not exist."""
    # tables without geometries are no layers of labels, such as the styles that QGIS saves in a GeoPackage
    names = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
    if layer is not None and layer not in names:
        raise InputError(f"{path} has no layer {layer!r}; it has {', '.join(map(repr, names)) or 'none'}.")
    if not names:
        raise InputError(f"{path} has no layer with geometries; labels are polygons.")
    if layer is None and len(names) > 1:
        raise InputError(
            f"{path} has {len(names)} layers ({', '.join(names)}); name one in the entry: {{images: ..., masks: {path.name}, "
            f"layer: {names[0]}}}. A file of areas has one only."
        )
    return layer or names[0]


def _move(path: Path, own: str | None, crs: str | None) -> Any:
    """Return a function that transforms coordinates (N, 2) to the image's CRS; None if they are in it already."""
    if own is None and crs is None:
        return None
    if own is None:
        side = f" (for a Shapefile in {path.with_suffix('.prj').name})" if path.suffix.lower() == ".shp" else ""
        raise InputError(
            f"{path} has no CRS{side}, but its images have one; write the CRS into the file, for example with QGIS: "
            "Define Layer Projection."
        )
    from rasterio.crs import CRS
    from rasterio.warp import transform

    if crs is None:
        raise InputError(
            f"{path} has the CRS {own}, but an image that it labels has none; write the CRS into the image, for example with "
            "gdal_edit.py -a_srs."
        )
    source, target = CRS.from_user_input(own), CRS.from_wkt(crs)
    if source == target:
        return None

    def move(points: np.ndarray) -> np.ndarray:
        return np.column_stack(transform(source, target, points[:, 0], points[:, 1]))

    return move


def _distinct(values: np.ndarray) -> tuple[list[Value], np.ndarray]:
    """Return the distinct values, and the position of each feature's value among them (F,)."""
    positions: dict[Value, int] = {}
    value_of = np.array([positions.setdefault(_value(value), len(positions)) for value in values.tolist()], np.int64)
    return list(positions), value_of


def _value(value: Any) -> Value:
    """Return an attribute's value: whole numbers as numbers, nothing as an empty text, all else as text."""
    if value is None or value != value:
        return Value("")
    if isinstance(value, bool):
        return Value(str(value).lower())
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return Value(None, int(value))
    return Value(str(value))


def split_up(path: Path, ids: np.ndarray, geometry: np.ndarray, move: Any = None) -> dict[str, Any]:
    """Return the attributes of `Polygons` that are made from the geometries of the features, (F,) well-known binary or None.

    `move`: transforms coordinates (N, 2). Raises InputError for lines and points."""
    import shapely
    from shapely import GeometryType

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    empty: list[Any] = []
    mended: list[Any] = []
    others: dict[str, int] = {}
    for start in range(0, len(geometry), FEATURES_AT_A_TIME):
        block = slice(start, start + FEATURES_AT_A_TIME)
        try:
            shapes = shapely.from_wkb(geometry[block])
        except shapely.errors.GEOSException as error:
            raise InputError(
                f"{path} has a geometry that cannot be read ({error}); curves, for example, must be converted to polygons."
            ) from None
        geometry[block] = None  # read; its memory serves the polygons made of it
        kinds = shapely.get_type_id(shapes)
        void = (kinds < 0) | shapely.is_empty(shapes)
        wrong = ~void & ~np.isin(kinds, (GeometryType.POLYGON, GeometryType.MULTIPOLYGON))
        for kind in kinds[wrong]:
            word = GeometryType(int(kind)).name.lower()
            others[word] = others.get(word, 0) + 1
        if move is not None:
            shapes[~void] = shapely.transform(shapes[~void], move)
        bad = ~void & ~wrong & ~shapely.is_valid(shapes)
        shapes[bad] = shapely.make_valid(shapes[bad], method="structure", keep_collapsed=False)
        single, owner = shapely.get_parts(shapes[~void & ~wrong], return_index=True)
        owner = np.flatnonzero(~void & ~wrong)[owner]
        nested, inner = shapely.get_parts(single, return_index=True)  # what was mended may be a collection of these
        owner = owner[inner]
        filled = (shapely.get_type_id(nested) == GeometryType.POLYGON) & (shapely.area(nested) > 0)
        nested, owner = nested[filled], owner[filled]
        bounds = shapely.bounds(nested).reshape(-1, 4)
        if not np.isfinite(bounds).all():
            first = ids[block][owner[~np.isfinite(bounds).all(1)][0]]
            raise InputError(f"{path}: feature {first} has coordinates that cannot be transformed to the image's CRS.")
        flat = np.setdiff1d(np.flatnonzero(~wrong), owner)
        empty += ids[block][flat].tolist()
        mended += ids[block][np.intersect1d(np.flatnonzero(bad), owner)].tolist()
        parts.append((shapely.to_wkb(nested), bounds, owner + start))
    if others:
        counted = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in sorted(others.items()))
        raise InputError(
            f"{path} holds {counted} among its {len(ids)} features; labels are polygons. Buffer them (QGIS: Buffer) or take them "
            "out of the file."
        )
    lists = list(zip(*parts, strict=True)) or [[np.empty(0, object)], [np.empty((0, 4))], [np.empty(0, np.int64)]]
    wkb, bounds, feature = (np.concatenate(one) for one in lists)
    return {"wkb": wkb, "bounds": bounds, "feature": feature, "empty": tuple(empty), "mended": tuple(mended)}
