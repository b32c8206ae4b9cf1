"""Makes the tiles of benchmarks/large_set.py: deflate GeoTIFFs of smooth random colors with some noise."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

SIDE = 1024
VALIDATED = 2
"""Tiles of each domain that are set aside for validation, besides the others."""
FIELD = 16  # pixels from one random color to the next


def make_tiles(folder: Path, count: int) -> None:
    """Write `count` tiles, half of them of each domain, and those for validation; keep what is there."""
    wanted = [
        (folder / name, number, domain == "source" or name.endswith("val"), 20 if domain == "source" else 80)
        for domain in ("source", "target")
        for name, tiles in ((domain, count // 2), (f"{domain}_val", VALIDATED))
        for number in range(tiles)
    ]
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(_write, wanted, chunksize=8))


def _write(tile: tuple[Path, int, bool, int]) -> None:
    folder, number, with_mask, darkest = tile
    image, mask = (folder / kind / f"{number:05d}.tif" for kind in ("images", "masks"))
    if image.exists():
        return
    rng = np.random.default_rng([number, darkest, len(folder.name)])
    coarse = torch.from_numpy(rng.random((1, 3, SIDE // FIELD, SIDE // FIELD), np.float32))
    field = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0].numpy()
    values = (field * 150 + darkest + rng.integers(0, 8, field.shape)).astype(np.uint8)
    profile = {
        "driver": "GTiff", "height": SIDE, "width": SIDE, "dtype": "uint8", "compress": "deflate", "crs": "EPSG:32617",
        "transform": from_origin(4e5, 3e6, 0.1, 0.1),
    }  # fmt: skip
    for path, content in ((mask, (field[:1] > 0.5).astype(np.uint8)), (image, values)):
        if path == image or with_mask:
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(path, "w", count=len(content), **profile) as file:
                file.write(content)
