"""Make a pair of dates with inserted changes from the Landsat scene of `landsat_raleigh`: forest that is cleared in between.

    python -m dann_experiments.data.inserted_changes raleigh two_dates

Only the first date is a real image. The second is the same scene, with the light of another season (a gain and an offset per
band, haze that varies slowly, sensor noise) and with clearings: patches of forest replaced by open land from elsewhere in the
scene. The light differs more in the east than in the west, so that a network that learns changes in the west meets another
domain in the east. A stand-in for real pairs of dates, in which every change is known; nothing is shown by it for real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dann_experiments.config.errors import InputError

FOREST, OPEN = 5, (1, 2, 3)
"""Values of the land cover that is cleared, and of what it becomes."""
CLEARED = 0.12  # share of the forest
MOST_DRAWS = 100_000  # of a place for one clearing
SMALLEST, LARGEST = 6, 22  # sides of a clearing in pixels of 28.5 m
SPLIT = 244  # column that divides west and east
PARTS = {
    "west_train": (0, 0, 240, 330), "west_val": (0, 338, 240, 443),
    "east_train": (248, 0, 360, 443), "east_val": (368, 0, 489, 443),
}  # fmt: skip
"""(left, top, right, bottom) in pixels of the scene."""
SEASONS = {
    "west": ((1.02, 1.01, 1.03, 0.97, 1.02), (1.0, 1.0, 2.0, -2.0, 1.0)),
    "east": ((0.84, 0.86, 0.95, 0.74, 1.06), (14.0, 10.0, 8.0, 2.0, 6.0)),
}
"""Gain and offset per band of the second date."""
NOISE, HAZE = 2.0, 5.0  # standard deviations, in values of 0 to 255


def insert_changes(scene: np.ndarray, cover: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the scene at a second date and where it changed.

    Args:
        scene: (5, h, w), float32, 0 to 255; below 0 where there is no data.
        cover: (h, w), land cover of the first date, values as in `landsat_raleigh`.

    Returns:
        The second date, (5, h, w) float32, and the changes, (h, w) uint8: 1 changed, 0 unchanged, 255 no data.
    """
    from scipy.ndimage import gaussian_filter

    draws = np.random.default_rng(seed)
    known = (scene >= 0).all(0)
    after, changed = _cleared(scene, (cover == FOREST) & known, np.isin(cover, OPEN) & known, draws)
    for side, part in (("west", np.s_[:, :, :SPLIT]), ("east", np.s_[:, :, SPLIT:])):
        gain, offset = (np.array(values, np.float32)[:, None, None] for values in SEASONS[side])
        after[part] = after[part] * gain + offset
    haze = gaussian_filter(draws.normal(size=known.shape), 40)
    after += HAZE * (haze / haze.std()) + draws.normal(0, NOISE, after.shape)
    after = np.where(known, after.clip(0, 255), scene).astype(np.float32)
    return after, np.where(known, changed, 255).astype(np.uint8)


def _cleared(
    scene: np.ndarray, forest: np.ndarray, is_open: np.ndarray, draws: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scene with rectangles of open land pasted onto `CLEARED` of the forest, and where, (h, w) bool."""
    after, changed = scene.copy(), np.zeros_like(forest)

    def window_with(share: float, of: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
        for _ in range(MOST_DRAWS):
            top, left = draws.integers(0, [of.shape[0] - height + 1, of.shape[1] - width + 1])
            box = (slice(top, top + height), slice(left, left + width))
            if of[box].mean() >= share:
                return box
        raise InputError(
            f"the scene has no {height} x {width} pixels of which {share:.0%} are forest, or open land, to paste."
        )

    while changed.sum() < CLEARED * forest.sum():
        height, width = draws.integers(SMALLEST, LARGEST + 1, 2)
        place, taken = window_with(0.9, forest, height, width), window_with(0.6, is_open, height, width)
        pasted = forest[place] & is_open[taken]
        after[:, *place] = np.where(pasted, scene[:, *taken], after[:, *place])
        changed[place] |= pasted
    return after, changed


def build(raleigh: str | Path, folder: str | Path, seed: int = 0) -> Path:
    """Write the folders `before`, `after` (5 bands, float32) and `change` (uint8: 1 changed, 0 not, 255 no data), each with one
    file for each of `PARTS`.

    Raises:
        InputError: if `raleigh` lacks the files that `landsat_raleigh` writes.
    """
    import rasterio
    from rasterio.windows import Window

    raleigh, folder = Path(raleigh).expanduser(), Path(folder).expanduser()
    for name in ("scene.tif", "land_cover.tif"):
        if not (raleigh / name).is_file():
            raise InputError(
                f"{raleigh / name} does not exist; make it with python -m dann_experiments.data.landsat_raleigh."
            )
    with rasterio.open(raleigh / "scene.tif") as file:
        scene, profile = file.read(), dict[str, Any](file.profile)
        transforms = {
            name: file.window_transform(Window(left, top, right - left, bottom - top))  # pyright: ignore[reportCallIssue]
            for name, (left, top, right, bottom) in PARTS.items()
        }
    with rasterio.open(raleigh / "land_cover.tif") as file:
        cover = file.read(1)
    after, changed = insert_changes(scene, cover, seed)
    of_masks = {"count": 1, "dtype": "uint8", "nodata": None}
    for kind, values, more in (("before", scene, {}), ("after", after, {}), ("change", changed[None], of_masks)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name, (left, top, right, bottom) in PARTS.items():
            part = values[:, top:bottom, left:right]
            given = profile | more | {"height": bottom - top, "width": right - left, "transform": transforms[name]}
            with rasterio.open(folder / kind / f"{name}.tif", "w", **given) as file:
                file.write(part)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m dann_experiments.data.inserted_changes RALEIGH_FOLDER FOLDER")
    try:
        print(f"Written: {build(sys.argv[1], sys.argv[2])}")
    except InputError as problem:
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(2)
