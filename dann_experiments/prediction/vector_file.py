"""Writes the regions of a finished class map as polygons: a GeoPackage, or GeoJSON in WGS 84.

The map is read again in blocks of rows, so memory holds one block and the regions that reach the next one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.config.extras import install_command
from dann_experiments.data.rasters import open_raster
from dann_experiments.names import VECTOR_SUFFIXES
from dann_experiments.prediction.partial_map import PARTIAL_SUFFIX, PartialMap
from dann_experiments.prediction.polygons import Regions, Tracer
from dann_experiments.prediction.qgis_style import CLASS_COLUMN, NAME_COLUMN, qgis_style, write_style
from dann_experiments.prediction.rasters import SIGNATURE_TAG, Grid, Legend

if TYPE_CHECKING:
    import pyarrow

BLOCK_PIXELS, BLOCK_ROWS = 2**22, 512
"""Largest block that is traced at a time, over the whole width of the map."""
LAYER, GEOMETRY = "polygons", "geom"
DRIVERS: dict[str, str] = dict(zip(VECTOR_SUFFIXES, ("GPKG", "GeoJSON"), strict=True))


@dataclass(frozen=True)
class VectorOptions:
    """Options for polygons."""

    min_area: float = 0.0
    """Smaller regions are left out; unit as in `unit_area`."""
    simplify: float = 0.0
    """How much outlines are simplified, in pixels; 0 = not at all."""

    def signature(self, of_map: str) -> str:
        """Return a digest of these options and the signature of the map, 32 hex digits."""
        facts = json.dumps([of_map, self.min_area, self.simplify])
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def check_packages() -> None:
    """Raise InputError if a package is missing."""
    missing = [name for name in ("pyogrio", "shapely", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"vector needs {' and '.join(missing)}: {install_command('vector')}")


def is_placed(grid: Grid) -> bool:
    """Return whether polygons have the coordinates of a CRS; otherwise they have pixel coordinates, y down."""
    return not grid.gcps and (grid.crs is not None or not grid.transform.is_identity)


def unit_area(grid: Grid) -> float:
    """Return the area of a pixel, in the squared unit of the CRS; 1 if there is no georeference."""
    return abs(grid.transform.determinant) if is_placed(grid) else 1.0


def read_signature(path: Path) -> str | None:
    """Return the signature of a file of polygons; None if it has none."""
    try:
        if path.suffix.lower() == ".gpkg":
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as file:
                rows = file.execute("SELECT description FROM gpkg_contents WHERE table_name = ?", (LAYER,)).fetchall()
            text = str(rows)
        else:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(10_000)
    except (sqlite3.Error, OSError):
        return None
    found = re.search(f"{SIGNATURE_TAG}=([0-9a-f]+)", text)
    return found[1] if found else None


def write_polygons(
    path: Path, map_path: Path, confidence: Path | None, grid: Grid, legend: Legend, options: VectorOptions
) -> int:
    """Write the regions of a class map to `path`, .gpkg or .geojson; return their number.

    `confidence`: file of the confidence of each pixel of the map, whose means are written. `grid`: georeference of the map, which
    a PNG does not keep. `legend`: its tags hold the signature of the map. `path` appears when it is complete. Raises InputError
    if a file cannot be read or written.
    """
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError

    path.parent.mkdir(parents=True, exist_ok=True)
    with PartialMap(path.with_name(path.name + PARTIAL_SUFFIX), {}) as partial:
        made = partial.folder / path.name
        for old in partial.folder.glob(f"{path.name}*"):  # of a process that was killed
            old.unlink()
        stream = _Stream(map_path, confidence, grid, legend, options)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no CRS
                _write(pyogrio, made, stream, grid, legend, options)
            with open(made, "rb") as file:
                os.fsync(file.fileno())
            os.replace(made, path)
        except (DataLayerError, DataSourceError, OSError, RuntimeError) as error:
            if stream.error is not None:  # pyogrio knows only that reading failed
                raise stream.error from None
            raise InputError(f"{path} cannot be written: {' '.join(str(error).split())}.") from None
    if path.suffix.lower() != ".gpkg":  # GeoJSON holds no style
        write_style(path, legend.class_names, legend.colors)
    return stream.count


def _write(pyogrio: Any, path: Path, stream: _Stream, grid: Grid, legend: Legend, options: VectorOptions) -> None:
    import pyarrow

    driver = DRIVERS[path.suffix.lower()]
    crs = grid.crs.to_wkt() if is_placed(grid) and grid.crs is not None else None
    # a version that GDAL reads since 3.3 (2021); RFC 7946: WGS 84
    options_of_driver = {"VERSION": "1.3"} if driver == "GPKG" else {"RFC7946": "YES"} if crs is not None else {}
    signature = options.signature(legend.tags[SIGNATURE_TAG])
    text = f"Classes as polygons; {SIGNATURE_TAG}={signature}"
    pyogrio.write_arrow(
        pyarrow.RecordBatchReader.from_batches(stream.schema, stream.batches()), path, layer=LAYER, driver=driver,
        geometry_name=GEOMETRY, geometry_type="Polygon", crs=crs, DESCRIPTION=text,
        **options_of_driver,
    )  # fmt: skip
    if driver == "GPKG":
        _add_style(pyogrio, path, qgis_style(legend.class_names, legend.colors))


def _add_style(pyogrio: Any, path: Path, style: str) -> None:
    """Add the table in which QGIS looks for the style of a GeoPackage's layer."""
    import pyarrow

    row = {
        "f_table_catalog": "", "f_table_schema": "", "f_table_name": LAYER, "f_geometry_column": GEOMETRY,
        "styleName": "classes", "styleQML": style, "styleSLD": "", "useAsDefault": True, "description": "Class colors",
        "owner": "", "ui": None, "update_time": None,
    }  # fmt: skip
    types = {"useAsDefault": pyarrow.bool_(), "update_time": pyarrow.timestamp("ms")}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in row])
    table = pyarrow.Table.from_pylist([row], schema)
    pyogrio.write_arrow(table, path, layer="layer_styles", driver="GPKG", geometry_type=None, FID="id")


class _Stream:
    """The polygons of a map as Arrow batches, which are made while they are written."""

    def __init__(
        self, map_path: Path, confidence: Path | None, grid: Grid, legend: Legend, options: VectorOptions
    ) -> None:
        import pyarrow

        self.map_path, self.confidence, self.grid, self.legend, self.options = (
            map_path, confidence, grid, legend, options,
        )  # fmt: skip
        self.count = 0
        self.error: BaseException | None = None
        """The exception that ended it."""
        self.schema = pyarrow.schema(
            [
                (CLASS_COLUMN, pyarrow.int32()),
                (NAME_COLUMN, pyarrow.string()),
                ("area", pyarrow.float64()),
                ("confidence", pyarrow.float64()),
                (GEOMETRY, pyarrow.binary()),
            ]
        )

    def batches(self) -> Iterator[pyarrow.RecordBatch]:
        """Yield a batch per block of the map."""
        try:
            for regions in self._traced():
                self.count += len(regions.classes)
                yield self._batch(regions)
        except BaseException as error:
            self.error = error
            raise

    def _traced(self) -> Iterator[Regions]:
        from rasterio.windows import Window

        with ExitStack() as stack:
            ids = stack.enter_context(open_raster(self.map_path))
            sure = None if self.confidence is None else stack.enter_context(open_raster(self.confidence))
            rows = max(1, min(BLOCK_ROWS, BLOCK_PIXELS // ids.width))
            least = (
                self.options.min_area / unit_area(self.grid) * (1 - 1e-9)
            )  # rounding must not lose the one just as large
            tracer = Tracer(ids.height, least, self.options.simplify)
            for top in range(0, ids.height, rows):
                window = Window(0, top, ids.width, min(rows, ids.height - top))  # pyright: ignore[reportCallIssue]
                yield tracer.add(ids.read(1, window=window), None if sure is None else sure.read(1, window=window))

    def _batch(self, regions: Regions) -> pyarrow.RecordBatch:
        import pyarrow
        import shapely

        names = np.array(self.legend.class_names, object)
        shapes = shapely.transform(regions.shapes, self._placed) if is_placed(self.grid) else regions.shapes
        columns = [
            pyarrow.array(regions.classes.astype(np.int32)),
            pyarrow.array(names[regions.classes], pyarrow.string()),
            pyarrow.array(regions.pixels * unit_area(self.grid)),
            pyarrow.array(regions.confidence, mask=np.isnan(regions.confidence)),
            pyarrow.array(shapely.to_wkb(shapes), pyarrow.binary()),
        ]
        return pyarrow.record_batch(columns, schema=self.schema)

    def _placed(self, points: np.ndarray) -> np.ndarray:
        """Return the coordinates (n, 2) in the CRS of pixel coordinates."""
        place = self.grid.transform
        x, y = points.T  # summed in GDAL's order, for the same last bits
        return np.stack([place.c + x * place.a + y * place.b, place.f + x * place.d + y * place.e], axis=1)
