"""Draws stand-ins for the packages whose images the recipes of real pairs read."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import shapely
from PIL import Image
from rasterio.io import MemoryFile
from rasterio.transform import from_origin
from rasterio.warp import transform_geom

from dann_experiments.data.landsat_raleigh import PLACE
from dann_experiments.data.nuclei import ASSAY, TIMES

NO_DATA = -99999.0


def landsat_package(path: Path, size: tuple[int, int]) -> None:
    """A wheel with a scene of five bands and its classes 1 to 7 in vertical stripes of 4 pixels or more; column 0 is empty."""
    height, width = size
    classes = np.broadcast_to(1 + np.arange(width) // max(width // 15, 4) % 7, size).astype(np.float32)
    scene = np.repeat(classes[None] * 20, 5, axis=0)
    for values in (classes := classes.copy(), *scene):
        values[:, 0] = NO_DATA
    with zipfile.ZipFile(path, "w") as package:
        for name, bands in (("landsat_multiband", scene), ("strata", classes[None])):
            with MemoryFile() as memory:
                with memory.open(
                    driver="GTiff", height=height, width=width, count=len(bands), dtype="float32", nodata=NO_DATA,
                    crs="EPSG:3358", transform=from_origin(630534, 228114, 28.5, 28.5),
                ) as file:  # fmt: skip
                    file.write(bands)
                package.writestr(f"{PLACE}/{name}.tif", memory.read())
        squares = [shapely.box(x, 220_000, x + 500, 220_500) for x in (634_000, 638_000)]
        with tempfile.TemporaryDirectory() as folder:
            write_polygons(Path(folder) / "landsat96_polygons.shp", squares, ["forest", "water"], "EPSG:3358", "label")
            for part in Path(folder).iterdir():
                package.write(part, f"{PLACE}/{part.name}")


def write_polygons(
    path: Path, shapes: Sequence[Any], values: Sequence[Any], crs: str = "EPSG:32632", field: str = "crop", **more: Any
) -> None:
    """Write polygons with the values of one attribute; GeoJSON in WGS 84."""
    if path.suffix == ".geojson":
        pairs = [transform_geom(crs, "EPSG:4326", shapely.geometry.mapping(shape)) for shape in shapes]
        shapes, crs = [shapely.geometry.shape(pair) for pair in pairs], "EPSG:4326"
    column = np.array(values, None if isinstance(values[0], int) else object)
    driver = {".shp": "ESRI Shapefile", ".gpkg": "GPKG", ".geojson": "GeoJSON"}[path.suffix]
    geometry = np.array([shapely.to_wkb(shape) for shape in shapes], object)
    pyogrio.raw.write(
        path,
        geometry=geometry,
        field_data=[column],
        fields=[field],
        crs=crs,
        driver=driver,
        geometry_type="Polygon",
        **more,
    )


def nuclei_packages(stardist: Path, ndev: Path) -> None:
    """Two wheels with images of bright squares and, as masks, their numbers."""
    with zipfile.ZipFile(stardist, "w") as package:
        numbers = _squares((512, 512), 0)
        package.writestr("stardist/data/images/img2d.tif", _tiff([numbers * 2 + 20]))
        package.writestr("stardist/data/images/mask2d.tif", _tiff([numbers]))
    with zipfile.ZipFile(ndev, "w") as package:
        masks = [_squares((210, 576), time) for time in range(TIMES)]
        images = [mask * 9 + 400 + at for mask in masks for at in (0, 1)]
        package.writestr(ASSAY, _tiff([*images[::2], *images[1::2], *masks, *masks]))


def _squares(size: tuple[int, int], shift: int) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    inside = (rows % 32 < 12) & ((columns + shift) % 32 < 12)
    return np.where(inside, 1 + rows // 32 * 20 + (columns + shift) // 32, 0).astype(np.uint16)


def _tiff(pages: list[np.ndarray]) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()
