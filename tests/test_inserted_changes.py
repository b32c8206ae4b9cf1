"""The pair of dates with inserted changes: what changed is known, and the rest is one scene in another light."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio

from dann_experiments.config import InputError
from dann_experiments.data.inserted_changes import CLEARED, FOREST, PARTS, SEASONS, SPLIT, build, insert_changes


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    """A drawn scene of the size of the real one: forest with fields, a border without data."""
    draws = np.random.default_rng(0)
    cover = np.full((443, 489), FOREST, np.uint8)
    for top in range(0, 443, 60):
        cover[top : top + 25] = 3
    values = np.where(cover == FOREST, 60, 140)[None] + draws.normal(0, 5, (5, 443, 489))
    values[:, :, :5] = -99999
    return values.astype(np.float32), cover


def test_the_changes_are_forest_and_their_pixels_are_open_land(scene):
    values, cover = scene
    after, changed = insert_changes(values, cover, seed=1)
    known = values[0] >= 0
    assert (changed[~known] == 255).all()
    assert set(cover[changed == 1]) == {FOREST}
    share = (changed == 1).sum() / ((cover == FOREST) & known).sum()
    assert CLEARED <= share < CLEARED + 0.03
    for side, part in (("west", np.s_[:, 5:SPLIT]), ("east", np.s_[:, SPLIT:])):
        gain, offset = (np.array(one)[:, None] for one in SEASONS[side])
        for is_changed, was in ((1, 140), (0, 60)):
            chosen = (changed[part] == is_changed) & (cover[part] == FOREST)
            light = after[:, *part][:, chosen].mean(1)
            assert light == pytest.approx((was * gain + offset)[:, 0], abs=6)


def test_equal_seeds_give_equal_dates_and_other_seeds_do_not(scene):
    one, again, other = (insert_changes(*scene, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one[0], again[0])
    assert np.array_equal(one[1], again[1])
    assert not np.array_equal(one[1], other[1])


def test_a_scene_without_room_for_clearings_is_refused():
    with pytest.raises(InputError, match="of which 90% are forest"):
        insert_changes(np.ones((5, 443, 489), np.float32), _one_tree())


def _one_tree() -> np.ndarray:
    cover = np.ones((443, 489), np.uint8)
    cover[0, 0] = FOREST
    return cover


def test_the_files_are_parts_of_one_scene_in_their_places(scene, tmp_path):
    with pytest.raises(InputError, match=r"scene\.tif does not exist; make it with"):
        build(tmp_path, tmp_path / "out")
    values, cover = scene
    transform = rasterio.Affine(28.5, 0, 630534, 0, -28.5, 228114)
    profile = {"driver": "GTiff", "height": 443, "width": 489, "crs": "EPSG:32119", "transform": transform}
    with rasterio.open(tmp_path / "scene.tif", "w", count=5, dtype="float32", nodata=-99999, **profile) as file:
        file.write(values)
    with rasterio.open(tmp_path / "land_cover.tif", "w", count=1, dtype="uint8", **profile) as file:
        file.write(cover, 1)
    build(tmp_path, tmp_path / "out")
    boxes = np.zeros(cover.shape, int)
    for name, (left, top, right, bottom) in PARTS.items():
        with rasterio.open(tmp_path / "out" / "before" / f"{name}.tif") as file:
            assert np.array_equal(file.read(), values[:, top:bottom, left:right])
            assert file.xy(0, 0) == (transform * (left + 0.5, top + 0.5))
        with rasterio.open(tmp_path / "out" / "change" / f"{name}.tif") as file:
            assert set(np.unique(file.read())) <= {0, 1, 255}
        boxes[top:bottom, left:right] += 1
    assert boxes.max() == 1  # what is trained on is not scored
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.tif")) == sorted(
        [f"{name}.tif" for name in PARTS] * 3
    )
    assert Path(tmp_path / "out" / "after" / "east_val.tif").stat().st_size
