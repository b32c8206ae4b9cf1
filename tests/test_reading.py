"""Rasters as they come: bands, types, ranges, nodata, resolution, windows; and masks by ids, names and colours."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import rasterio
import yaml
from conftest import write_raster
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.transform import from_origin

from dann_experiments.config import InputError
from dann_experiments.data.labels import LabelMap, label_map, read_mask
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.reading import (
    Normalization,
    Reading,
    check_type,
    for_file,
    reading_facts,
    reading_from_facts,
)

RNG = np.random.default_rng(0)


def test_the_bands_are_those_chosen_in_the_order_chosen(tmp_path):
    values = RNG.integers(0, 255, (5, 8, 6), dtype=np.uint8)
    file = write_raster(tmp_path / "a.tif", values)
    assert np.array_equal(read_pixels(file, 3, Reading(bands=(4, 1, 2))).values, values[[3, 0, 1]])
    assert np.array_equal(read_pixels(file, 5, Reading()).values, values)
    with pytest.raises(InputError, match=r"a.tif has 5 bands, but the bands to read are \[6\]; choose from 1 to 5"):
        read_pixels(file, 1, Reading(bands=(6,)))
    with pytest.raises(InputError, match=r"has 5 bands, but the model takes 3"):
        read_pixels(file, 3, Reading())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 12), st.integers(1, 12))
def test_a_window_is_that_part_of_the_whole(tmp_path_factory, top, left, height, width):
    folder = tmp_path_factory.mktemp("window")
    values = np.arange(2 * 32 * 32, dtype=np.uint16).reshape(2, 32, 32)
    file = write_raster(folder / "a.tif", values, tiled=True, blockxsize=16, blockysize=16)
    found = read_pixels(file, 2, Reading(), Window(top, left, height, width)).values
    assert np.array_equal(found, values[:, top : top + height, left : left + width])


def test_sixteen_bit_colours_keep_their_sixteen_bits(tmp_path):
    values = RNG.integers(0, 65535, (3, 8, 8), dtype=np.uint16)
    with rasterio.open(tmp_path / "a.png", "w", driver="PNG", count=3, height=8, width=8, dtype="uint16") as file:
        file.write(values)
    assert np.array_equal(read_pixels(tmp_path / "a.png", 3, Reading()).values, values)


def test_palette_images_are_their_colours_and_an_alpha_band_is_no_band(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "p.png")
    found = read_pixels(tmp_path / "p.png", 3, Reading()).values
    assert found[:, 0, 1].tolist() == [40, 50, 60]
    assert found[:, 1, 1].tolist() == [70, 80, 90]
    rgba = RNG.integers(0, 255, (4, 4, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[0, 0, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png", 3, Reading())
    assert np.array_equal(pixels.values, rgba[..., :3].transpose(2, 0, 1))
    assert pixels.valid is not None
    assert (~pixels.valid).nonzero() == (0, 0)


@pytest.mark.parametrize(
    ("dtype", "way", "third"),
    [
        ("float32", None, False), ("float32", "all", True), ("int16", None, False), ("uint16", None, False),
        ("uint8", None, True), ("uint8", "any", False), ("uint8", "all", True),
    ],
)  # fmt: skip
def test_a_pixel_is_nodata_where_its_bands_hold_the_value(tmp_path, dtype, way, third):
    """By default where all do in 8 bit pictures, in which 0 is a color too, and where any does in all other types."""
    fill = 0 if dtype.startswith("u") else -9999
    values = np.full((2, 1, 4), 5, dtype)
    values[:, 0, 0] = fill
    values[0, 0, 1] = values[1, 0, 2] = fill
    expected = np.array([[False, third, third, True]])
    for file, reading in (
        (write_raster(tmp_path / "own.tif", values, nodata=fill), Reading(nodata_bands=way)),
        (write_raster(tmp_path / "given.tif", values), Reading(nodata=(77.0, float(fill)), nodata_bands=way)),
    ):
        assert np.array_equal(read_pixels(file, 2, reading).valid, expected)


def test_nan_in_any_band_is_nodata_whatever_the_settings(tmp_path):
    values = np.full((2, 2, 3), 5, np.float32)
    values[1, 0, 2] = np.nan
    values[0, 1, 0] = np.inf
    found = read_pixels(write_raster(tmp_path / "given.tif", values), 2, Reading(nodata=(), nodata_bands="all")).valid
    assert found is not None
    assert [tuple(place) for place in np.argwhere(~found)] == [(0, 2), (1, 0)]


@pytest.mark.parametrize("value", [0, 255, -9999])
def test_the_files_own_nodata_value_is_used_unless_another_is_given(tmp_path, value):
    values = np.full((3, 4, 4), 7, np.int16)
    values[:, 1:3, 2] = value
    file = write_raster(tmp_path / "a.tif", values, nodata=value)
    valid = read_pixels(file, 3, Reading()).valid
    assert valid is not None
    assert (~valid).sum() == 2
    assert read_pixels(file, 3, Reading(nodata=())).valid is None
    other = read_pixels(file, 3, Reading(nodata=(7.0,))).valid
    assert other is not None
    assert other.sum() == 2


def test_an_internal_mask_says_where_data_is(tmp_path):
    file = write_raster(tmp_path / "a.tif", np.ones((3, 4, 4), np.uint8))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, "r+") as opened:
        mask = np.full((4, 4), 255, np.uint8)
        mask[2, 3] = 0
        opened.write_mask(mask)
    valid = read_pixels(file, 3, Reading()).valid
    assert valid is not None
    assert [tuple(place) for place in np.argwhere(~valid)] == [(2, 3)]


def test_values_are_scaled_by_the_range_and_clipped_and_nodata_is_the_mean():
    normalisation = Normalization((100.0,), (300.0,), (0.5,), (0.25,))
    values = np.array([[[0, 100, 200, 300, 900]]], np.int16)
    assert normalisation.scaled(values).tolist() == [[[0, 0, 0.5, 1, 1]]]
    assert normalisation(values, np.array([[True, True, True, True, False]])).tolist() == [[[-2, -2, 0, 2, 0]]]


def test_the_range_of_a_type_is_known_for_8_and_16_bit_and_asked_for_otherwise(tmp_path):
    normalisation = Normalization((0.0,), (1.0,), (0.0,), (1.0,))
    for dtype, end in (("uint8", 255.0), ("uint16", 65535.0)):
        header = read_header(write_raster(tmp_path / f"{dtype}.tif", np.zeros((1, 4, 4), dtype)))
        assert for_file(normalisation, Reading(), header).high == (end,)
    file = write_raster(tmp_path / "f.tif", np.zeros((1, 4, 4), np.float32))
    with pytest.raises(
        InputError, match=r"f\.tif holds float32 values, whose range is unknown; set data\.target\.scale"
    ):
        check_type(file, read_header(file), Reading(settings="data.target."))
    check_type(file, read_header(file), Reading(scale=(0.0, 1.0)))


def georeferenced(path, values, size: float, **more):
    return write_raster(path, values, crs="EPSG:32617", transform=from_origin(400000, 3000000, size, size), **more)


def test_two_sensors_meet_at_one_pixel_size(tmp_path):
    fine = np.kron(RNG.integers(0, 255, (3, 6, 8)), np.ones((1, 4, 4))).astype(np.uint8)  # 0.25 m pixels of 1 m things
    coarse = fine[:, ::4, ::4]
    one = georeferenced(tmp_path / "fine.tif", fine, 0.25)
    two = georeferenced(tmp_path / "coarse.tif", coarse, 1.0)
    at_one_metre = Reading(pixel_size=1.0)
    assert at_one_metre.grid_size(read_header(one), one) == (6, 8)
    assert np.array_equal(read_pixels(one, 3, at_one_metre).values, coarse)
    assert np.array_equal(read_pixels(two, 3, at_one_metre).values, coarse)
    window = Window(1, 2, 3, 4)
    assert np.array_equal(read_pixels(one, 3, at_one_metre, window).values, coarse[:, 1:4, 2:6])
    finer = read_pixels(two, 3, Reading(pixel_size=0.25)).values
    assert finer.shape == fine.shape
    assert np.abs(finer[:, 2::4, 2::4].astype(int) - coarse).max() < 80  # interpolated, but in place


def test_files_without_georeference_need_to_be_told_their_pixel_size(tmp_path):
    Image.fromarray(RNG.integers(0, 255, (20, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png has no georeference .* set file_pixel_size"):
        read_pixels(tmp_path / "a.png", 3, Reading(pixel_size=0.2))
    assert read_pixels(tmp_path / "a.png", 3, Reading(pixel_size=0.2, file_pixel_size=0.1)).values.shape == (3, 10, 20)


def test_a_resampled_pixel_is_valid_only_if_all_it_is_made_of_is(tmp_path):
    values = np.full((1, 16, 16), 100, np.uint8)
    values[0, 5, 5] = 0
    file = georeferenced(tmp_path / "a.tif", values, 1.0, nodata=0)
    found = read_pixels(file, 1, Reading(pixel_size=4.0))
    assert found.valid is not None
    assert not found.valid[1, 1]
    assert (found.values[0][found.valid] == 100).all()
    assert found.valid[2:, 2:].all()


def test_the_facts_of_a_reading_survive_json():
    import json

    reading = Reading(bands=(3, 2), scale=(0.0, 4.0), nodata=(0.0, -9999.0), pixel_size=0.5)
    normalisation = Normalization((0.0, 1.0), (4.0, 4.0), (0.5, 0.4), (0.2, 0.3))
    assert reading_from_facts(json.loads(json.dumps(reading_facts(reading, normalisation)))) == (reading, normalisation)
    with pytest.raises(InputError, match="notes"):
        reading_from_facts({"low": [1]})


def test_labels_meet_by_class_name(tmp_path):
    names = ["road", "tree", "water"]
    by_id = label_map(names, 255, {1: "tree", 2: "road", 7: "tree", 9: "swamp"}, None, [0])
    ids = np.array([[1, 2, 7], [9, 0, 255]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    expected = [[1, 0, 1], [255, 255, 255]]
    assert read_mask(tmp_path / "ids.png", by_id).tolist() == expected
    colours = {(255, 0, 0): "road", (0, 255, 0): "tree", (0, 0, 0): "ignored"}
    picture = np.array([[(0, 255, 0), (255, 0, 0), (0, 255, 0)], [(0, 0, 0)] * 3], np.uint8)
    Image.fromarray(picture).save(tmp_path / "colours.png")
    assert read_mask(tmp_path / "colours.png", label_map(names, 255, None, colours, [])).tolist() == expected


def test_a_palette_mask_gives_its_ids_or_its_colours(tmp_path):
    mask = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    mask.putpalette([0, 0, 0, 255, 0, 0])
    mask.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", LabelMap(2)).tolist() == [[0, 1]]
    colours = label_map(["red", "black"], 255, None, {(255, 0, 0): "red", (0, 0, 0): "black"}, [])
    assert read_mask(tmp_path / "m.png", colours).tolist() == [[1, 0]]


def test_an_id_or_a_colour_that_nobody_named_is_refused_with_the_way_out(tmp_path):
    Image.fromarray(np.array([[1, 3]], np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"m\.png holds id 3, but value_map knows \[1\]; add it"):
        read_mask(tmp_path / "m.png", label_map(["a"], 255, {1: "a"}, None, []))
    Image.fromarray(np.array([[(1, 2, 3)]], np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(InputError, match=r"c\.png holds the color \(1, 2, 3\), which color_map does not name"):
        read_mask(tmp_path / "c.png", label_map(["a"], 255, None, {(0, 0, 0): "a"}, []))


def message_of(path, stored):
    stored.save(path)
    labels = dataclasses.replace(LabelMap(2), settings="data.source.", class_names=("road", "roof"))
    with pytest.raises(InputError) as refused:
        read_mask(path, labels)
    return str(refused.value)


def test_a_mask_of_unnamed_values_gives_the_line_of_settings_to_fill_in(tmp_path):
    colours = np.array([[(0, 0, 0), (255, 0, 0), (1, 2, 3)]], np.uint8)
    text = message_of(tmp_path / "rgb.png", Image.fromarray(colours))
    line = re.search(r"data\.source\.color_map: (\{.*\})", text)
    assert yaml.safe_load(line[1]) == {"0,0,0": "CLASS", "1,2,3": "CLASS", "255,0,0": "CLASS"}
    assert "one of the classes ['road', 'roof'], or ignored, for each CLASS" in text
    palette = Image.fromarray(np.array([[0, 1, 9]], np.uint8)).convert("P")
    line = re.search(r"data\.source\.value_map: (\{.*\})", message_of(tmp_path / "palette.png", palette))
    assert yaml.safe_load(line[1]) == {0: "CLASS", 1: "CLASS", 9: "CLASS"}


def test_a_picture_in_the_place_of_a_mask_is_no_list_of_its_colours(tmp_path):
    picture = np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3)
    text = message_of(tmp_path / "picture.png", Image.fromarray(picture))
    assert "More than 32 different ones were found here: is it a picture?" in text
    assert "CLASS" not in text


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32", "int32"])
def test_masks_of_other_types_hold_ids_too(tmp_path, dtype):
    ids = np.array([[[1, 300 if dtype != "float32" else 2]]], dtype)
    file = write_raster(tmp_path / "m.tif", ids)
    other = 300 if dtype != "float32" else 2
    assert read_mask(file, label_map(["a", "b"], 255, {1: "a", other: "b"}, None, [])).tolist() == [[0, 1]]
