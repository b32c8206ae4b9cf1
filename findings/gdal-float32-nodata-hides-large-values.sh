#!/usr/bin/env bash
# GDAL 3.10.3 (in rasterio 1.4.4): in a float32 raster whose nodata value is the smallest float32, the mask hides not that value
# alone but every pixel below about -4e31 (read_masks and masked reads alike). With nodata -1e30 only -1e30 is hidden. It looks as
# if the tolerance of the comparison, made in single precision, overflows to infinity. Expected: equality up to rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import rasterio

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__)
smallest = float(np.finfo(np.float32).min)
values = np.array([[smallest, -1e38, -5e31, -1e31, -1e30, -9999, 0, 3e38]], np.float32)
hidden = {}
for nodata in (smallest, -1e30):
    with rasterio.open(
        "a.tif", "w", driver="GTiff", count=1, height=1, width=8, dtype="float32", nodata=nodata
    ) as file:
        file.write(values[None])
    with rasterio.open("a.tif") as file:
        mask = file.read_masks(1)[0] == 0
        assert np.array_equal(mask, file.read(1, masked=True).mask[0])
    hidden[nodata] = [float(value) for value in values[0][mask]]
    print(f"nodata {nodata:g} hides", [f"{value:g}" for value in hidden[nodata]])
assert len(hidden[smallest]) == 3, "only the nodata value is hidden now"
assert len(hidden[-1e30]) == 1
PYTHON
