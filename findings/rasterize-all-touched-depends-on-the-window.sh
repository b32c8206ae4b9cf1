#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): drawn with all_touched, a polygon in a window is not always the same part of the polygon drawn in the
# whole image, though the window begins at a whole pixel and every number is exact in binary. About one in twenty triangles with corners
# on quarters of a pixel has pixels, inside the window, that only one of the two drawings has. Without all_touched none has.
# Expected: a pixel is touched or not, wherever the array begins.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import rasterio
from rasterio.features import rasterize

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__)
TOP, SIDE = 5, 16


def drawn(corners, top, height, all_touched):
    """Rows `top` to `top + height` of an image of SIDE columns."""
    ring = [[x, y - top] for x, y in [*corners, corners[0]]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    return rasterize([(polygon, 1)], (height, SIDE), all_touched=all_touched, dtype="uint8")


def differences(corners, all_touched):
    whole = drawn(corners, 0, SIDE, all_touched)
    part = drawn(corners, TOP, SIDE - TOP, all_touched)
    return np.argwhere(whole[TOP:] != part)


corners = np.random.default_rng(0).integers(0, 4 * SIDE + 1, (3000, 3, 2)) / 4
counts = {touched: sum(len(differences(one, touched)) > 0 for one in corners) for touched in (False, True)}
print("triangles that differ: without all_touched", counts[False], "of 3000, with it", counts[True])
one = [(4.5, 8.25), (0.75, 12.0), (12.0, 10.5)]
print("one of them:", one, "differs at row, column of the window", differences(one, True).tolist())
assert counts[False] == 0
assert counts[True] > 50, "windows agree now"
assert len(differences(one, True)) == 1
PYTHON
