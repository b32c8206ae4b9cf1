"""The NEON recipe on its real tiles: trains, adapts, maps Florida and a georeferenced mosaic of Yellowstone."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from dann_experiments import InputError, PredictConfig, adapt, check_data, load_config, predict
from dann_experiments.config.run import TrackingConfig
from dann_experiments.data.neon_trees import TILES, build_neon_trees, crowns

PROJECT = Path(__file__).parents[1]
TREES = PROJECT.parent / "shared" / "data" / "neon_trees"
RECIPE = PROJECT / "recipes" / "neon_trees.yaml"
needs_tiles = pytest.mark.skipif(not TREES.is_dir(), reason="the NEON tiles are not here (see the recipe's header)")


def test_a_crown_is_the_ellipse_inscribed_in_its_box():
    mask = crowns([(2, 1, 12, 7), (13, 8, 13, 8)], (10, 14))
    assert mask[4, 2:13].all()
    assert mask[1:8, 7].all()
    assert mask[1, 2] == mask[7, 12] == mask[0].sum() == 0
    assert mask[8, 13] == 1


@needs_tiles
def test_the_tiles_come_out_of_the_package_as_they_are(tmp_path):
    """A stand-in for the package, with one real image and its boxes made up, unpacks to the layout of the recipe."""
    box = "<object><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
    image = (TREES / "target_florida" / "images" / "osbs_029.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as package:
        for tile in TILES:
            package.writestr(f"deepforest/data/{tile}.xml", f"<annotation>{box}</annotation>")
            package.writestr(f"deepforest/data/{tile}.png", image)
    folder = build_neon_trees(tmp_path / "package.whl", tmp_path / "trees")
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert written == sorted(place.format(kind) for place in TILES.values() for kind in ("images", "masks"))
    assert np.array_equal(
        np.asarray(Image.open(folder / "target_florida/masks/osbs_029.png")), crowns([(1, 2, 9, 8)], (400, 400))
    )
    (tmp_path / "no.whl").write_text("x")
    with pytest.raises(InputError, match=r"no\.whl does not give the images .* pip download deepforest"):
        build_neon_trees(tmp_path / "no.whl", tmp_path / "nothing")


@pytest.mark.slow
@needs_tiles
def test_the_recipe_trains_adapts_and_maps_real_tiles(workplace):
    short = {"trainer.max_epochs": 1, "pretraining.max_epochs": 1, "trainer.limit_train_batches": 3, "threads": 1}
    config = load_config(RECIPE, {**short, "data.root": str(TREES), "trainer.enable_progress_bar": False})
    assert check_data(config).problems == []
    result = adapt(config)
    assert {"iou/source_val", "iou/target_val"} <= set(result.metrics)
    mosaic = workplace / "mosaic.tif"
    tile = np.asarray(Image.open(TREES / "source_yellowstone" / "images" / "yell_b.png")).transpose(2, 0, 1)
    # a whole number of the network's strides: elsewhere its pooling would meet the copies differently
    tile = tile[:, : tile.shape[1] // 16 * 16, : tile.shape[2] // 16 * 16]
    values = np.tile(tile, (1, 2, 2))
    transform = from_origin(541000, 4977000, 0.1, 0.1)
    with rasterio.open(
        mosaic, "w", driver="GTiff", count=3, height=values.shape[1], width=values.shape[2], dtype="uint8", tiled=True,
        crs="EPSG:32612", transform=transform,
    ) as file:  # fmt: skip
        file.write(values)
    tracking = TrackingConfig(uri=result.tracking_uri)
    florida = TREES / "target_florida" / "images" / "osbs_029.png"
    for source, output in ((florida, "florida.png"), (mosaic, "map.tif")):
        predict(
            PredictConfig(model=result.model_uri, input=str(source), output=output, progress=False, tracking=tracking)
        )
    assert np.asarray(Image.open("florida.png")).shape == (400, 400)
    with rasterio.open("map.tif") as found:
        assert found.crs.to_epsg() == 32612
        assert found.transform == transform
        assert found.shape == values.shape[1:]
        ids = found.read(1)
    assert set(np.unique(ids)) <= {0, 1}
    away = 300  # from the seams of the mosaic, whose surroundings differ
    corner = np.s_[away : tile.shape[1] - away, away : tile.shape[2] - away]
    other = np.s_[tile.shape[1] + away : -away, tile.shape[2] + away : -away]
    assert (ids[corner] == ids[other]).mean() > 0.98  # the same pixels, other tiles
