"""Weak labels: indices by hand, thresholds as scikit-image finds them, and masks of real files through the command."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import rasterio
from conftest import small_settings, write_raster
from mlflow.projects._project_spec import load_project
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from skimage.filters import threshold_otsu

from dann_experiments.__main__ import main
from dann_experiments.cli import PROGRAM
from dann_experiments.config import InputError, load_config
from dann_experiments.config.description import help_text
from dann_experiments.config.parsing import known_keys, load_settings
from dann_experiments.config.weak_labels import WeakLabelsConfig
from dann_experiments.data.indices import change_vector, excess_green, index_values, normalized_difference
from dann_experiments.data.labels import label_map, read_mask
from dann_experiments.data.thresholds import ABOVE, AT_EDGE, AT_THRESHOLD, BELOW, NO_VALUE, Histogram, Range, sides
from dann_experiments.jobs.check_data import check_data
from dann_experiments.jobs.weak_labels import WeakLabelsResult, weak_labels
from dann_experiments.prediction import rule_masks

PROJECT = Path(__file__).parents[1]
PLACE: dict[str, Any] = {"crs": "EPSG:32633", "transform": Affine(0.5, 0.1, 500_000, 0.1, -0.5, 5_000_000)}
GREEN: dict[str, Any] = {"rule": "excess_green", "red": 1, "green": 2, "blue": 3}

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def run(**given: Any) -> WeakLabelsResult:
    return weak_labels(load_settings(WeakLabelsConfig, None, {"progress": False, **given}))


def runs() -> list[Any]:
    store = mlflow.MlflowClient(f"sqlite:///{Path('mlflow.db').resolve()}")  # clients are kept by address
    return list(store.search_runs([one.experiment_id for one in store.search_experiments()]))


def read(path: str | Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def noise(height: int, width: int, bands: int = 3, kind: Any = np.uint8, seed: int = 0) -> np.ndarray:
    """(bands, height, width) of values above 0, in patches, so that there are edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1, 200, (bands, height // 7 + 1, width // 7 + 1)).repeat(7, 1).repeat(7, 2)
    return (coarse[:, :height, :width] + rng.integers(0, 50, (bands, height, width))).astype(kind)


# formulas


def test_excess_green_is_that_of_chromatic_coordinates():
    red, green, blue = np.array([[50, 100, 0, 0, 200], [100, 0, 0, 255, 200], [50, 100, 0, 0, 200]], np.uint8)
    # r, g, b = 1/4, 1/2, 1/4; 1/2, 0, 1/2; no color; 0, 1, 0; gray: 600 does not fit into 8 bit
    np.testing.assert_allclose(excess_green(red, green, blue), [0.5, -1.0, np.nan, 2.0, 0.0])


def test_ndvi_and_ndwi_are_differences_over_sums_without_a_value_where_the_sum_is_not_above_0():
    nir, red = np.array([[3000, 60000, 0, 0]], np.uint16), np.array([[1000, 60000, 0, 500]], np.uint16)
    np.testing.assert_allclose(normalized_difference(nir, red), [[0.5, 0.0, np.nan, -1.0]])
    green = np.array([[1000, 20000, 0, 7]], np.uint16)
    np.testing.assert_allclose(index_values("ndvi", np.stack([nir, red])), [[0.5, 0.0, np.nan, -1.0]])
    np.testing.assert_allclose(index_values("ndwi", np.stack([green, nir])), [[-0.5, -0.5, np.nan, 1.0]])
    signed = np.array([[-0.02, 0.01]])
    assert np.isnan(normalized_difference(signed, np.array([[0.01, -0.01]]))).all()


def test_the_change_vector_is_as_long_as_pythagoras_says_in_both_directions():
    before = np.array([[[10, 255, 0]], [[20, 0, 7]], [[5, 0, 7]]], np.uint8)
    after = np.array([[[7, 0, 0]], [[24, 0, 7]], [[5, 0, 7]]], np.uint8)
    np.testing.assert_array_equal(change_vector(before, after), [[5, 255, 0]])
    np.testing.assert_array_equal(index_values("change_vector", after, before), [[5, 255, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_otsu_of_parts_is_that_of_scikit_image_for_the_whole(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(-1, 0.4, 7000), rng.normal(2 + seed, 0.7, 3000)])
    parts, found = np.array_split(values, 7), Range()
    for part in parts:
        found.add(part)
    histogram = Histogram(found)
    for part in parts:
        histogram.add(part)
    assert histogram.counts.sum() == found.count == len(values)
    assert histogram.otsu() == threshold_otsu(values)
    assert not histogram.is_coarse


def test_otsu_refuses_equal_values_and_knows_when_its_bins_are_coarse():
    found = Range()
    found.add(np.full(9, 0.25))
    histogram = Histogram(found)
    histogram.add(np.full(9, 0.25))
    with pytest.raises(InputError, match="all values of the index are equal"):
        histogram.otsu()
    values = np.concatenate([np.random.default_rng(0).normal(size=9999), 2000.0 + np.arange(30) * 90])
    found = Range()
    found.add(values)
    histogram = Histogram(found)
    histogram.add(values)
    assert histogram.is_coarse


def test_sides_margin_border_and_missing_values_by_hand():
    values = np.array([[0.0, 0.4, 0.5, 0.6, 1.0, 1.0, np.nan]])
    a, b, t, e, n = ABOVE, BELOW, AT_THRESHOLD, AT_EDGE, NO_VALUE
    assert sides(values, 0.5).tolist() == [[b, b, b, a, a, a, n]]
    assert sides(values, 0.5, margin=0.11).tolist() == [[b, t, t, t, a, a, n]]
    assert sides(values, 0.5, border=1).tolist() == [[b, b, e, e, a, a, n]]
    assert sides(values, 0.5, border=2).tolist() == [[b, e, e, e, e, a, n]]
    assert sides(values, 0.5, margin=0.01, border=2).tolist() == [[b, e, t, e, e, a, n]]
    # a missing value is no side: nothing beside it is an edge
    assert sides(np.array([[0.0, np.nan, np.nan, 1.0]]), 0.5, border=2).tolist() == [[b, n, n, a]]
    # the border is a square: corners count
    assert (sides(np.eye(3)[::-1] * np.array([0, 0, 1]), 0.5, border=1) == e).sum() == 4


# masks


def test_a_mask_of_16_bit_with_nodata_lies_on_its_image_and_names_its_classes(workplace):
    image = np.full((3, 40, 50), 1000, np.uint16)
    image[1, :, :20] = 3000  # g = 0.6: excess green is 0.8
    image[1, :, 20:30] = 1200  # g = 0.375: 0.125
    image[:, 5:8, :] = 0
    image[0, 30, :] = 7  # 7 in one band of 16 bit: no measurement
    write_raster(workplace / "scene.tif", image, nodata=7, **PLACE)
    result = run(**GREEN, input="scene.tif", output="out/mask.tif", threshold=0.1, class_names=["soil", "roof", "crop"],
                 foreground="crop")  # fmt: skip
    wanted = np.zeros((40, 50), np.uint8)
    wanted[:, :30] = 2
    wanted[5:8] = wanted[30] = 255
    np.testing.assert_array_equal(read("out/mask.tif"), wanted)
    with rasterio.open("out/mask.tif") as file, rasterio.open("scene.tif") as given:
        assert (file.crs, file.transform, file.shape) == (given.crs, given.transform, given.shape)
        assert (file.count, file.dtypes, file.nodata) == (1, ("uint8",), 255)
        assert json.loads(file.tags()["class_names"]) == ["soil", "roof", "crop"]
        assert file.tags(1)["class_2"] == "crop"
        assert {key: file.tags()[key] for key in ("rule", "bands", "threshold", "side")} == {
            "rule": "excess_green", "bands": "1,2,3", "threshold": "0.1", "side": "above",
        }  # fmt: skip
        assert file.tags()["dann_run_id"] == result.run_id
    assert result.class_pixels == {"soil": 36 * 20, "crop": 36 * 30}
    assert result.ignored_pixels == {"margin": 0, "border": 0, "no data": 4 * 50}
    assert sorted(os.listdir("out")) == ["mask.tif"]


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ({"rule": "ndvi", "nir": 4, "red": 3}, lambda image: (image[3] - image[2]) / (image[3] + image[2])),
        ({"rule": "ndwi", "green": 2, "nir": 4}, lambda image: (image[1] - image[3]) / (image[1] + image[3])),
        ({"rule": "band", "bands": [2]}, lambda image: image[1]),
        ({"rule": "excess_green", "red": 3, "green": 2, "blue": 1},
         lambda image: (2 * image[1] - image[0] - image[2]) / image[:3].sum(0)),
    ],
    ids=lambda given: given.get("rule") if isinstance(given, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("side", ["above", "below"])
def test_each_rule_reads_the_bands_that_it_is_given_and_otsu_is_that_of_the_whole_image(workplace, rule, values, side):
    image = noise(61, 83, 4, np.uint16)
    write_raster(workplace / "scene.tif", image)
    result = run(**rule, input="scene.tif", output="mask.tif", side=side)
    index = values(image.astype(np.float64))
    assert result.thresholds == (threshold_otsu(index),)
    above = index > result.thresholds[0]
    np.testing.assert_array_equal(read("mask.tif"), above if side == "above" else ~above)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (513, 40), (700, 610)])
def test_a_raster_over_blocks_has_the_mask_of_one_that_is_read_at_once(workplace, monkeypatch, size):
    image = noise(*size, kind=np.uint16)
    image[:, size[0] // 3 : size[0] // 2, : size[1] // 2] = 0
    write_raster(workplace / "scene.tif", image, nodata=0, tiled=True, blockxsize=64, blockysize=64, **PLACE)
    settings = {**GREEN, "input": "scene.tif", "margin": 0.02, "border": 3, "threshold": 0.01}
    threshold = {} if size == (1, 1) else {"threshold": "otsu"}
    small = ((512, 2048), (100, 70), (1, 64)) if size != (700, 610) else ((512, 2048), (100, 70))
    found = []
    for number, (rows, columns) in enumerate(small):
        monkeypatch.setattr(rule_masks, "BLOCK_ROWS", rows)
        monkeypatch.setattr(rule_masks, "BLOCK_COLUMNS", columns)
        result = run(**{**settings, **threshold, "output": f"mask{number}.tif"})
        found.append((result.thresholds, result.ignored_pixels, read(f"mask{number}.tif").tolist()))
    assert all(one == found[0] for one in found)
    values = index_values("excess_green", image)
    values[(image == 0).any(0)] = np.nan
    wanted = sides(values, found[0][0][0], 0.02, 3)
    ids = np.array(found[0][2])
    np.testing.assert_array_equal(ids == 1, wanted == ABOVE)
    np.testing.assert_array_equal(ids == 0, wanted == BELOW)
    assert set(np.unique(ids)) <= {0, 1, 255}


def test_many_bands_are_read_in_smaller_blocks(workplace):
    write_raster(workplace / "after.tif", np.zeros((60, 600, 2100), np.uint16))
    subject = rule_masks.Subject.open(
        Path("after.tif"), Path("after.tif"), Path("m.tif"), rule_masks.Rule("change_vector", None)
    )
    blocks = subject.blocks()
    assert max(block.height * block.width for block in blocks) * 60 * 2 * 2 <= rule_masks.BLOCK_BYTES
    assert sum(block.height * block.width for block in blocks) == subject.pixels


def test_memory_of_the_picture_is_that_of_a_thousand_pixels_whatever_the_blocks_are(workplace, monkeypatch):
    image = noise(1200, 2300)
    write_raster(workplace / "scene.tif", image)
    monkeypatch.setattr(rule_masks, "BLOCK_ROWS", 101)
    monkeypatch.setattr(rule_masks, "BLOCK_COLUMNS", 333)
    subject = rule_masks.Subject.open(
        Path("scene.tif"), None, workplace / "m.tif", rule_masks.Rule("excess_green", (1, 2, 3))
    )
    cut = rule_masks.Cut(True, 0, 1)
    legend = rule_masks.Legend(["a", "b"], np.zeros((2, 3)), {})
    _, picture = rule_masks.write_mask(subject, 0.1, cut, legend, lambda share: None, picture=True)
    assert picture is not None
    whole = index_values("excess_green", image)
    np.testing.assert_array_equal(picture.index, whole[::3, ::3].astype(np.float32))
    np.testing.assert_array_equal(picture.ids, (whole > 0.1)[::3, ::3])


def test_nodata_alpha_and_nan_have_no_label(workplace):
    floats = noise(20, 30, kind=np.float32)
    floats[1, 3, :] = np.nan
    write_raster(workplace / "nan.tif", floats)
    run(**GREEN, input="nan.tif", output="nan_mask.tif")
    np.testing.assert_array_equal(np.flatnonzero((read("nan_mask.tif") == 255).all(1)), [3])
    rgba = np.concatenate([noise(20, 30), np.full((1, 20, 30), 255, np.uint8)])
    rgba[3, :, 4:6] = 0
    path = write_raster(workplace / "rgba.tif", rgba)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    run(**GREEN, input="rgba.tif", output="rgba_mask.tif")
    np.testing.assert_array_equal(np.flatnonzero((read("rgba_mask.tif") == 255).all(0)), [4, 5])
    image = noise(20, 30)
    image[:, 0] = 9
    write_raster(workplace / "nine.tif", image)
    run(**GREEN, input="nine.tif", output="nine_mask.tif", nodata=9)
    assert (read("nine_mask.tif")[0] == 255).all()
    assert (read("nine_mask.tif")[1:] != 255).all()


def test_a_turned_photograph_has_a_mask_as_it_is_shown(workplace):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[..., 1] = 200
    pixels[:, :16, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise
    Image.fromarray(pixels).save("photo.jpg", quality=100, subsampling=0, exif=exif)
    run(**GREEN, input="photo.jpg", output="photo.png", threshold=1.0)
    with rasterio.open("photo.png") as file:
        assert file.shape == (32, 16)
    found = read("photo.png")
    assert (found[:15] == 0).all()
    assert (found[17:] == 1).all()


def scenes(workplace: Path, names: str = "ab", folder: str = "images") -> None:
    for seed, name in enumerate(names):
        image = noise(30, 40, seed=seed)
        image[1] = np.clip(image[1].astype(int) + 40 * seed, 0, 255)
        path = workplace / folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)


def test_otsu_reads_all_images_together_or_each_alone(workplace):
    scenes(workplace)
    indices = [
        index_values("excess_green", np.asarray(Image.open(f"images/{name}.png")).transpose(2, 0, 1)) for name in "ab"
    ]
    together = run(**GREEN, input="images", output="together")
    assert together.thresholds == (threshold_otsu(np.stack(indices)),) * 2
    alone = run(**GREEN, input="images", output="alone", otsu_over="image")
    assert alone.thresholds == tuple(threshold_otsu(index) for index in indices)
    assert alone.thresholds[0] != alone.thresholds[1]
    for name, index, threshold in zip("ab", indices, alone.thresholds, strict=True):
        np.testing.assert_array_equal(read(f"alone/{name}.png"), index > threshold)


def test_two_dates_are_paired_by_their_stems_and_lack_data_where_one_does(workplace):
    rng = np.random.default_rng(0)
    for name in "xy":
        before = rng.integers(100, 900, (2, 20, 30)).astype(np.uint16)
        after = before.copy()
        after[0, :10] += 30
        after[1, :10] += 40
        before[:, 0, 0] = after[:, 19, 29] = 0
        for date, values in (("2019", before), ("2021", after)):
            write_raster(workplace / date / f"{name}.tif", values, nodata=0, **PLACE)
    write_raster(workplace / "2019" / "unused.tif", before)
    wanted = np.zeros((20, 30), np.uint8)
    wanted[:10] = 1
    wanted[0, 0] = wanted[19, 29] = 255
    run(rule="change_vector", input="2021", before="2019", output="masks", threshold=49.9)
    for name in "xy":
        np.testing.assert_array_equal(read(f"masks/{name}.tif"), wanted)
    run(rule="change_vector", input="2021/x.tif", before="2019/y.tif", output="one.tif", threshold=49.9, bands=[1])
    assert read("one.tif").shape == (20, 30)
    result = run(rule="change_vector", input="2021", before="2019", output="all", class_names=["same", "changed"])
    np.testing.assert_array_equal(read("all/x.tif"), wanted)
    assert 0 < result.thresholds[0] < 50


def test_the_masks_are_ordinary_ones_that_train(workplace, squares):
    images = squares / "target_val" / "images"
    run(rule="band", bands=[1], input=str(images), output="weak", border=1)
    labels = label_map(["a", "b"], 255, None, None, ())
    for path in sorted(Path("weak").iterdir()):
        np.testing.assert_array_equal(read_mask(path, labels), read(path))
    settings = small_settings(squares, data__target__train_labelled=[{"images": str(images), "masks": str(workplace / "weak")}],
                              data__target__val=[str(squares / "target_test")], data__target__test=[])  # fmt: skip
    assert check_data(load_config(None, settings)).problems == []


# interrupted, finished, existing

KILL = """
import os, signal, sys, types
from dann_experiments.config.parsing import load_settings
from dann_experiments.config.weak_labels import WeakLabelsConfig
from dann_experiments.jobs.weak_labels import weak_labels
from dann_experiments.prediction import partial_map, rasters, rule_masks
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
rule_masks.BLOCK_ROWS = 10
if sys.argv[1] == "between blocks":
    add, count = partial_map.PartialMap.add, [0]
    def third(self, *arrays):
        count[0] += 1
        add(self, *arrays) if count[0] < 3 else killed()
    partial_map.PartialMap.add = third
else:
    rasters.os = types.SimpleNamespace(replace=killed, fsync=os.fsync)
weak_labels(load_settings(WeakLabelsConfig, None, {"rule": "excess_green", "red": 1, "green": 2, "blue": 3, "input": "scene.tif",
            "output": "mask.tif", "progress": False}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["between blocks", "before the mask gets its name"])
def test_a_kill_leaves_no_half_mask_and_the_same_command_makes_the_whole_one(workplace, when):
    write_raster(workplace / "scene.tif", noise(60, 40), **PLACE)
    done = subprocess.run(
        [sys.executable, "-c", KILL, when], env=os.environ | {"PYTHONPATH": str(PROJECT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not Path("mask.tif").exists()
    assert Path("mask.tif.partial").is_dir()
    run(**GREEN, input="scene.tif", output="mask.tif")
    run(**GREEN, input="scene.tif", output="whole.tif")
    np.testing.assert_array_equal(read("mask.tif"), read("whole.tif"))
    assert not Path("mask.tif.partial").exists()


@pytest.mark.slow
def test_a_mask_that_the_disk_has_no_room_for_is_told_and_leaves_nothing(workplace):
    part = noise(500, 500)
    write_raster(workplace / "scene.tif", np.tile(part, (1, 5, 5)), compress="deflate")
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20)); "
        "from dann_experiments.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["--rule", "band", "--bands", "1", "--input", "scene.tif", "--output", "mask.tif"]
    done = subprocess.run([sys.executable, "-c", limited, "weak-labels", *words], env=os.environ | {"PYTHONPATH": str(PROJECT)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "mask.tif" in done.stderr
    assert "cannot be written" in done.stderr
    assert "kept" not in done.stderr
    assert [path.name for path in workplace.glob("mask*")] == []


def test_nothing_is_replaced_without_overwrite_and_finished_masks_are_not_made_again(workplace):
    scenes(workplace)
    run(**GREEN, input="images", output="masks")
    before = {path: path.stat().st_mtime_ns for path in Path("masks").iterdir()}
    again = run(**GREEN, input="images", output="masks")
    assert {path: path.stat().st_mtime_ns for path in Path("masks").iterdir()} == before
    assert sum(again.class_pixels.values()) == 0
    assert again.outputs == (Path("masks/a.png"), Path("masks/b.png"))
    with pytest.raises(
        InputError, match=r"2 of 2 images have no mask.*\n.*not made with these settings; remove it, or set overwrite"
    ):
        run(**GREEN, input="images", output="masks", margin=0.1)
    Path("masks/b.png").unlink()
    Image.new("L", (40, 30), 7).save("masks/b.png")  # drawn by hand
    with pytest.raises(InputError, match=r"1 of 2 images have no mask"):
        run(**GREEN, input="images", output="masks")
    assert (read("masks/b.png") == 7).all()
    with pytest.raises(InputError, match=r"output masks/b\.png exists"):
        run(**GREEN, input="images/b.png", output="masks/b.png")
    run(**GREEN, input="images", output="masks", overwrite=True)
    assert set(np.unique(read("masks/b.png"))) == {0, 1}


def test_masks_are_no_images_of_the_next_call(workplace):
    scenes(workplace)
    run(**GREEN, input="images", output="images/weak")
    assert len(run(**GREEN, input="images", output="images/other").outputs) == 2


# what is refused


def rest(name: str) -> dict[str, Any]:
    return {**GREEN, "input": name, "output": "mask.tif"}


def four_bands_of_two(workplace: Path) -> dict[str, Any]:
    write_raster(workplace / "two.tif", noise(9, 9, 2))
    return {"rule": "ndvi", "red": 1, "nir": 4, "input": "two.tif", "output": "mask.tif"}


def palette(workplace: Path) -> dict[str, Any]:
    Image.fromarray(noise(9, 9).transpose(1, 2, 0)).quantize(9).save("palette.png")
    return {**rest("palette.png"), "red": 1, "green": 1, "blue": 1}


def no_image(workplace: Path) -> dict[str, Any]:
    Path("text.png").write_text("no image")
    return rest("text.png")


def complex_values(workplace: Path) -> dict[str, Any]:
    write_raster(workplace / "complex.tif", noise(9, 9).astype(np.complex64))
    return rest("complex.tif")


def no_data(workplace: Path) -> dict[str, Any]:
    write_raster(workplace / "zero.tif", np.zeros((3, 9, 9), np.uint8))
    return rest("zero.tif")


def one_color(workplace: Path) -> dict[str, Any]:
    write_raster(workplace / "one.tif", np.full((3, 9, 9), 9, np.uint8))
    return rest("one.tif")


def dates(first: np.ndarray, second: np.ndarray, *places: Any, **more: Any) -> Any:
    def make(workplace: Path) -> dict[str, Any]:
        for name, values, place in zip(("new", "old"), (first, second), places or ({}, {}), strict=True):
            write_raster(workplace / f"{name}.tif", values, **place)
        return {"rule": "change_vector", "input": "new.tif", "before": "old.tif", "output": "mask.tif", **more}

    return make


MOVED = PLACE | {"transform": PLACE["transform"] @ Affine.translation(3, 0)}


@pytest.mark.parametrize(
    ("make", "message", "opens_a_run"),
    [
        (four_bands_of_two, "two.tif has 2 bands, but the rule ndvi is to read band 4; give numbers from 1 to 2", False),
        (palette, "holds numbers of palette colors", False),
        (no_image, "text.png cannot be read as an image", False),
        (complex_values, "complex64 values", False),
        (lambda _: rest("none.tif"), "input is none.tif, which does not exist", False),
        (no_data, "no pixel of zero.tif has data and a value of the index", True),
        (one_color, "all values of the index are equal", True),
        (dates(noise(9, 9), noise(9, 8)), "9 x 9 pixels, its earlier date old.tif 9 x 8 pixels", False),
        (dates(noise(9, 9), noise(9, 9, 2)), "has 3 bands, its earlier date old.tif 2; choose those to compare", False),
        (dates(noise(9, 9), noise(9, 9), PLACE, MOVED), "in different places, 3 pixels apart", False),
        (dates(noise(9, 9), noise(9, 9), before="older.tif"), "before is older.tif, which does not exist", False),
        (dates(noise(9, 9), noise(9, 9), rule=None), "rule is not set; give excess_green, ndvi", False),
    ],
)  # fmt: skip
def test_errors_name_the_file_the_value_and_the_way_out_and_end_with_code_2(
    workplace, capsys, make, message, opens_a_run
):
    given = {key: value for key, value in make(workplace).items() if value is not None}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(["weak-labels", *words]) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert not Path("mask.tif").exists()
    assert [found.info.status for found in runs()] == ["FAILED"] * opens_a_run


def test_stems_that_do_not_pair_are_refused(workplace):
    for name in ("new/a", "new/b", "old/a", "old/deep/a"):
        write_raster(workplace / f"{name}.tif", noise(9, 9))
    with pytest.raises(InputError, match=r"before: .*old/a.tif and .*old/deep/a.tif have the same stem"):
        run(rule="change_vector", input="new", before="old", output="masks")
    Path("old/deep/a.tif").unlink()
    with pytest.raises(InputError, match=r"before has no image with the stem 'b', the partner of new/b.tif"):
        run(rule="change_vector", input="new", before="old", output="masks")


def test_of_many_images_all_bad_ones_are_named_before_a_mask_is_written(workplace):
    scenes(workplace, "abc")
    for name in ("a", "c"):
        content = Path(f"images/{name}.png").read_bytes()
        Path(f"images/{name}.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"2 of 3 images cannot be used:\n.*images/a.png.*\n.*images/c.png"):
        run(**GREEN, input="images", output="masks")
    assert not Path("masks").exists()


WRONG = [
    ({"nir": 4}, "nir is set, but the rule excess_green does not use it"),
    ({"green": None}, "needs the red and green and blue bands, but green is not set"),
    ({"bands": [1]}, "bands is set, but the rule excess_green does not use it"),
    ({"before": "x"}, "before is set, but the rule excess_green does not use it"),
    ({"rule": "band"}, "red is set, but the rule band does not use it"),
    ({"rule": "band", "red": None, "green": None, "blue": None}, "bands is None, but the rule band needs one"),
    ({"rule": "band", "red": None, "green": None, "blue": None, "bands": [1, 2]}, "the rule band needs one"),
    ({"rule": "change_vector", "red": None, "green": None, "blue": None}, "before is not set"),
    ({"red": 0}, "red is 0; give a number of at least 1"),
    ({"threshold": "half"}, "threshold is 'half'"),
    ({"threshold": float("inf")}, "threshold is inf"),
    ({"threshold": 0.1, "otsu_over": "image"}, "otsu_over is image, but threshold is 0.1"),
    ({"margin": -0.1}, "margin is -0.1; give a number of at least 0"),
    ({"border": 300}, "border is 300; give a number from 0 to 256"),
    ({"class_names": ["tree"]}, "class_names is ['tree']; give 2 to 255 different names"),
    ({"class_names": ["a", "a"]}, "different names"),
    ({"class_names": ["a", "b", "c"]}, "foreground is not set; name one of a, b, c"),
    ({"foreground": "tree"}, "foreground is 'tree', which is not in class_names"),
    ({"foreground": "background", "background": "background"}, "foreground and background are both 'background'"),
    ({"input": ""}, "input is not set"),
    ({"output": ""}, "output is not set"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_settings_that_cannot_be_meant_are_refused(changed, message):
    with pytest.raises(InputError) as raised:
        load_settings(WeakLabelsConfig, None, {**GREEN, "input": "a.tif", "output": "b.tif", **changed})
    assert message in str(raised.value)


def test_the_class_that_is_not_named_is_the_other_one():
    def ids(**given: Any) -> tuple[int, int]:
        return load_settings(WeakLabelsConfig, None, {**GREEN, "input": "a", "output": "b", **given}).ids

    assert ids() == (0, 1)
    assert ids(foreground="background") == (1, 0)
    assert ids(background="foreground") == (1, 0)
    assert ids(class_names=["a", "b", "c"], foreground="a") == (1, 0)
    assert ids(class_names=["a", "b", "c"], foreground="b", background="c") == (2, 1)


# the run, the terminal, the ways in


def test_the_run_has_settings_shares_thresholds_and_two_figures_and_the_terminal_says_what_a_rule_is(workplace, capsys):
    scenes(workplace, "abcd")
    words = ["--rule", "excess_green", "--red", "1", "--green", "2", "--blue", "3", "--class_names", "[ground, tree]"]
    given = [
        "--input",
        "images/a.png",
        "images/b.png",
        "images/*.png",
        "--output",
        "masks",
        "--margin",
        "0.05",
        "--border",
        "1",
    ]
    assert main(["weak-labels", *words, *given, "--progress", "false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "A rule is not the truth" in said
    assert "even where there is one class only" in said
    named = f'--data.target.weak_labels "[{{images: {workplace}/images, masks: {workplace}/masks}}]"'
    assert f'{named} --domain_adaptation.companions "[weak_labels]"' in said
    assert "data.class_names to [ground, tree]" in said
    found = runs()[0]
    assert found.info.status == "FINISHED"
    assert found.info.run_id in said
    assert (found.data.tags["dann.job"], found.info.run_name) == ("weak-labels", "weak-labels")
    params = {key: found.data.params[f"cfg.{key}"] for key in ("rule", "red", "threshold", "margin", "border")}
    assert params == {"rule": "excess_green", "red": "1", "threshold": "otsu", "margin": "0.05", "border": "1"}
    masks = np.stack([read(f"masks/{name}.png") for name in "abcd"])
    metrics = found.data.metrics
    assert metrics["weak_labels/masks"] == 4
    assert metrics["weak_labels/pixels"] == masks.size
    assert metrics["weak_labels/background_share"] == pytest.approx((masks == 0).mean())
    assert metrics["weak_labels/foreground_share"] == pytest.approx((masks == 1).mean())
    ignored = [metrics[f"weak_labels/{name}_share"] for name in ("margin", "border", "no_data")]
    assert sum(ignored) == pytest.approx((masks == 255).mean())
    assert ignored[0] > 0
    assert ignored[1] > 0
    folder = Path(str(found.info.artifact_uri).removeprefix("file://"))
    lines = (folder / "tables" / "class_shares.csv").read_text().splitlines()
    assert lines[0] == "image,mask,threshold,pixels of ground,pixels of tree,ignored: margin,ignored: border,no data"
    assert lines[1].split(",")[3:5] == [str((masks[0] == 0).sum()), str((masks[0] == 1).sum())]
    assert float(lines[1].split(",")[2]) == metrics["weak_labels/threshold"]
    assert len(lines) == 5
    for name in ("masks", "histogram"):
        assert min(Image.open(folder / "figures" / f"{name}.png").size) > 300
    assert "excess_green" in (folder / "config.yaml").read_text()


def test_a_mask_without_data_or_with_one_class_is_warned_of(workplace, caplog):
    write_raster(workplace / "zero.tif", np.zeros((3, 9, 9), np.uint8))
    write_raster(workplace / "noise.tif", noise(9, 9))
    run(**GREEN, input="zero.tif", output="zero_mask.tif", threshold=0.1)
    assert "zero.tif has no pixel with data" in caplog.text
    assert (read("zero_mask.tif") == 255).all()
    run(**GREEN, input="noise.tif", output="noise_mask.tif", threshold=5)
    assert "noise.tif has a mask with one class at most" in caplog.text


def test_declared_offsets_are_warned_of(workplace, caplog):
    path = write_raster(workplace / "scene.tif", noise(9, 9))
    with rasterio.open(path, "r+") as file:
        file.offsets = (-1000.0,) * 3
    run(**GREEN, input="scene.tif", output="mask.tif")
    assert "scene.tif declares offsets" in caplog.text


def test_the_entry_point_uses_every_parameter_and_its_command_parses():
    entry = load_project(str(PROJECT)).get_entry_point("weak-labels")
    assert set(entry.parameters) <= set(known_keys(WeakLabelsConfig))
    given = {"rule": "ndvi", "input": "my scene.tif", "output": "mask.tif", "red": "1", "nir": "4", "border": "2"}
    request = PROGRAM.parse(shlex.split(entry.compute_command(given, None))[3:])
    assert (request.command, request.options) == ("weak-labels", {"input": ["my scene.tif"]})
    assert request.settings | {"input": "my scene.tif"} == given


def test_the_help_explains_every_setting_and_where_the_formulas_come_from(capsys):
    assert main(["weak-labels", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for setting in dataclasses.fields(WeakLabelsConfig):
        assert f"--{setting.name}" in said
    for text in ("Woebbecke et al. 1995", "McFeeters 1996", "Otsu 1979", "A rule is not the truth"):
        assert text in said
    assert help_text(WeakLabelsConfig)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_raster(workplace):
    script = """
import sys
from pathlib import Path
from dann_experiments.config.parsing import load_settings
from dann_experiments.config.weak_labels import WeakLabelsConfig
from dann_experiments.jobs.weak_labels import weak_labels
weak_labels(load_settings(WeakLabelsConfig, None, {"rule": "excess_green", "red": 1, "green": 2, "blue": 3, "border": 4,
            "input": sys.argv[1], "output": "m_" + sys.argv[1], "progress": False}))
print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    peaks = []
    for size in (2500, 7500):
        part = noise(2500, 2500)
        with rasterio.open(f"{size}.tif", "w", driver="GTiff", height=size, width=size, count=3, dtype="uint8", tiled=True,
                           blockxsize=256, blockysize=256) as file:  # fmt: skip
            for top in range(0, size, 2500):
                for left in range(0, size, 2500):
                    file.write(part, window=rasterio.windows.Window(left, top, 2500, 2500))
        done = subprocess.run([sys.executable, "-c", script, f"{size}.tif"], env=os.environ | {"PYTHONPATH": str(PROJECT)},
                              capture_output=True, text=True, check=True)  # fmt: skip
        peaks.append(int(done.stdout.split("peak")[1]))
    assert peaks[1] < 1.15 * peaks[0], peaks
