#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): a raster without georeference, opened with OVERVIEW_LEVEL=NONE, has a transform of arbitrary tiny
# numbers, though the warning that comes with it (NotGeoreferencedWarning) says that the identity is returned, as it is without
# the option. A georeferenced raster is unchanged. Expected: an option about overviews leaves the transform alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__)
shape = {"driver": "GTiff", "count": 1, "height": 4, "width": 6, "dtype": "uint8"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name, place in (("plain.tif", {}), ("placed.tif", {"crs": "EPSG:32633", "transform": from_origin(5, 6, 2, 2)})):
        with rasterio.open(name, "w", **shape, **place) as file:
            file.write(np.zeros((1, 4, 6), np.uint8))
seen = {}
for name in ("plain.tif", "placed.tif"):
    for options in ({}, {"OVERVIEW_LEVEL": "NONE"}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with rasterio.open(name, **options) as file:
                warned = any(issubclass(one.category, NotGeoreferencedWarning) for one in caught)
                seen[name, bool(options)] = (file.transform.is_identity, warned)
                print(f"{name} {options}: identity {file.transform.is_identity}, warned {warned}, pixel width {file.transform.a:g}")
assert seen["plain.tif", False] == (True, True)
assert seen["plain.tif", True] == (False, True), "the option leaves the transform alone now"
assert seen["placed.tif", False] == seen["placed.tif", True] == (False, False)
PYTHON
