"""Extract aerial tiles with tree crowns of three NEON sites, Yellowstone, Florida and California, from the package `deepforest`.

    pip download deepforest==2.1.0 --no-deps
    python -m dann_experiments.data.neon_trees deepforest-2.1.0-py3-none-any.whl neon_trees

The wheel (MIT license; imagery: National Ecological Observatory Network) is opened as a zip file, never imported. A mask is 1
inside the ellipse inscribed in each annotated box, else 0; crown outlines are therefore approximate.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.packages import member, opened

TILES = {
    "2019_YELL_2_528000_4978000_image_crop2": "source_yellowstone/{}/yell_a.png",
    "2019_YELL_2_541000_4977000_image_crop": "source_yellowstone/{}/yell_b.png",
    "OSBS_029": "target_florida/{}/osbs_029.png",
    "SOAP_061": "target_soaproot/{}/soap_061.png",
}


def build_neon_trees(wheel: str | Path, folder: str | Path) -> Path:
    """Write images and masks of the four tiles below `folder` and return it. Raises InputError if the wheel lacks them."""
    from PIL import Image

    folder = Path(folder).expanduser()
    with opened(wheel, "deepforest==2.1.0") as package:
        for tile, place in TILES.items():
            boxes = _boxes(member(package, f"deepforest/data/{tile}.xml").decode())
            image = folder / place.format("images")
            mask = folder / place.format("masks")
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(member(package, f"deepforest/data/{tile}.png"))
            with Image.open(image, formats=["PNG"]) as file:
                size = (file.height, file.width)
            Image.fromarray(crowns(boxes, size)).save(mask)
    return folder


def crowns(boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> np.ndarray:
    """Return a mask (H, W) uint8: 1 inside the ellipse inscribed in each box (left, top, right, bottom in pixels), else 0."""
    mask = np.zeros(size, np.uint8)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for left, top, right, bottom in boxes:
        part = (slice(max(top, 0), bottom + 1), slice(max(left, 0), right + 1))
        y = (rows[part] - (top + bottom) / 2) / max((bottom - top) / 2, 0.5)
        x = (columns[part] - (left + right) / 2) / max((right - left) / 2, 0.5)
        mask[part] |= (x**2 + y**2 <= 1).astype(np.uint8)
    return mask


def _boxes(annotation: str) -> list[tuple[int, int, int, int]]:
    sides = [
        [int(float(value)) for value in re.findall(rf"<{side}>([\d.]+)</{side}>", annotation)]
        for side in ("xmin", "ymin", "xmax", "ymax")
    ]
    return list(zip(*sides, strict=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m dann_experiments.data.neon_trees DEEPFOREST_WHEEL FOLDER")
    try:
        print(f"Written: {build_neon_trees(sys.argv[1], sys.argv[2])}")
    except InputError as problem:
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(2)
