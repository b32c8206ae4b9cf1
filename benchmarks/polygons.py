"""What the polygons of a map cost (`predict --vector`), and that their memory does not grow with the map.

    python benchmarks/polygons.py [--write]

Drawn maps of four classes with ragged borders, small islands and a tenth without data; no network. Each is traced in a process
of its own, in a temporary folder. About 10 minutes on two idle cores. --write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from pages import circumstances, put
from rasterio.windows import Window

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from dann_experiments.prediction.rasters import NODATA, SIGNATURE_TAG, Legend, read_grid  # noqa: E402
from dann_experiments.prediction.vector_file import VectorOptions, write_polygons  # noqa: E402
from dann_experiments.reports.colors import class_colors  # noqa: E402

CLASSES, STRIP = 4, 512
SCALES = ((256, 1.0), (32, 0.5), (6, 0.2), (1, 0.03))
"""Pixels from bump to bump of the landscape, and their height."""
SIZES = (4000, 12_000)
WAYS: list[tuple[str, str, dict[str, float]]] = [
    ("gpkg", "", {}),
    ("gpkg", "`simplify: 1`, `min_area: 4`", {"simplify": 1.0, "min_area": 4.0}),
    ("geojson", "", {}),
]
CHILD = "import sys; sys.path[:0] = {paths}; from polygons import measured; measured({size}, {suffix!r}, {more})"


def draw_map(size: int) -> None:
    """Write map.tif and its confidence, strip by strip: the class of each pixel is the highest of as many landscapes."""
    rng = np.random.default_rng(0)
    coarse = [rng.normal(size=(CLASSES + 1, size // scale + 2, size // scale + 2)).astype("f4") for scale, _ in SCALES]
    form = {
        "driver": "GTiff", "height": size, "width": size, "count": 1, "tiled": True, "blockxsize": 512, "blockysize": 512,
        "compress": "deflate", "crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 5e5, 0, -1, 5e6),
    }  # fmt: skip
    with (
        rasterio.open("map.tif", "w", dtype="uint8", nodata=NODATA, **form) as ids,
        rasterio.open("sure.tif", "w", dtype="float32", **form) as sure,
    ):
        for top in range(0, size, STRIP):
            rows = np.arange(top, min(top + STRIP, size))
            heights = np.zeros((CLASSES + 1, len(rows), size), "f4")
            for grid, (scale, weight) in zip(coarse, SCALES, strict=True):
                heights += weight * _between(grid, rows / scale, np.arange(size) / scale)
            values = heights[:CLASSES].argmax(0).astype(np.uint8)
            values[heights[CLASSES] > 1.3] = NODATA
            window = Window(0, top, size, len(rows))  # pyright: ignore[reportCallIssue]
            ids.write(values, 1, window=window)
            sure.write(1 / (1 + np.exp(-heights[:CLASSES].max(0))), 1, window=window)


def _between(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return values (K, h, w) between those of a grid (K, H, W), at positions in it, by linear interpolation."""
    for axis, places in ((1, rows), (2, columns)):
        first = places.astype(int)
        share = (places - first).astype("f4").reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
        grid = np.take(grid, first, axis) * (1 - share) + np.take(grid, first + 1, axis) * share
    return grid


def measured(size: int, suffix: str, more: dict[str, float]) -> None:
    """In a process of its own: write the polygons, and print their number, seconds, and peak memory of the process (MB)."""
    legend = Legend([f"class_{index}" for index in range(CLASSES)], class_colors(CLASSES), {SIGNATURE_TAG: "0"})
    before, start = _peak(), time.perf_counter()
    path = Path(f"polygons.{suffix}")
    count = write_polygons(
        path, Path("map.tif"), Path("sure.tif"), read_grid(Path("map.tif")), legend, VectorOptions(**more)
    )
    seconds = time.perf_counter() - start
    print(json.dumps([count, seconds, _peak(), before, path.stat().st_size / 2**20]))


def _peak() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024


def table() -> str:
    """A line per map and way."""
    lines = []
    for size in SIZES:
        draw_map(size)
        for suffix, shown, more in WAYS:
            code = CHILD.format(paths=[str(PROJECT), str(PROJECT / "benchmarks")], size=size, suffix=suffix, more=more)
            done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
            count, seconds, peak, before, megabytes = json.loads(done.stdout.splitlines()[-1])
            Path(f"polygons.{suffix}").unlink()
            lines.append(
                f"| {size:,} x {size:,} | `vector: {suffix}` {shown} | {count:,} | {megabytes:.0f} | {seconds:.0f} | "
                f"{peak:.0f} ({peak - before:+.0f}) |"
            )
            print(lines[-1], flush=True)
    head = "| map | settings | polygons | file, MB | s | peak memory, MB (of which polygons) |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = table()
    text += f"\n\n{circumstances('shapely', 'pyogrio', 'rasterio', 'scikit-image')}"
    print(text)
    if arguments.write:
        put("performance.md", "polygons", text)


if __name__ == "__main__":
    main()
