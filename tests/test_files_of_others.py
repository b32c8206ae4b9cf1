"""Files as other programs write them: what they say of themselves is obeyed or reported, and never passed over.

Each fact is the one that the file's author meant; docs/field-cases.md tells where the cases come from.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import read_sets, small_settings, write_raster
from PIL import Image, ImageOps
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.shutil import copy
from rasterio.transform import Affine, from_origin

from dann_experiments import InputError, adapt, load_config
from dann_experiments.checkpoints.weights import load_into
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.headers import checked_header
from dann_experiments.data.labels import LabelMap, label_map, read_mask
from dann_experiments.data.nodata import fits, holds
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.reading import Normalization, Reading, for_file, reading_facts, reading_from_facts
from dann_experiments.data.remarks import Remarks
from dann_experiments.data.samples import Sample, content_digest, find_samples
from dann_experiments.jobs import check_data
from dann_experiments.jobs.build import find_data
from dann_experiments.jobs.predict import predict
from dann_experiments.names import SOURCE_TRAIN
from dann_experiments.prediction.rasters import read_decimated, read_grid

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
RNG = np.random.default_rng(0)
SMALLEST = np.finfo(np.float32).min


def valid_of(path: Path, bands: int = 3, **reading: Any) -> np.ndarray:
    """(h, w) bool of a whole file."""
    pixels = read_pixels(path, bands, Reading(**reading))
    return np.ones(pixels.values.shape[1:], bool) if pixels.valid is None else pixels.valid


def georeferenced(
    path: Path, values: np.ndarray, transform: Affine | None = None, crs: str = "EPSG:32633", **more: Any
):
    return write_raster(path, values, crs=crs, transform=transform or from_origin(5e5, 4e6, 1, 1), **more)


def picture(height: int = 24, width: int = 16) -> np.ndarray:
    """(h, w, 3) uint8."""
    return RNG.integers(0, 255, (height, width, 3), np.uint8)


# --- nodata ---


@pytest.mark.parametrize("value", [-3.40282306074e38, -3.4028234663852886e38, -3.402823e38])
def test_a_nodata_tag_written_as_a_short_text_hides_the_pixels_that_gdal_hides(tmp_path, value):
    values = RNG.random((3, 8, 8)).astype(np.float32)
    values[:, :3] = SMALLEST
    tagged = write_raster(tmp_path / "tagged.tif", values, nodata=value)
    plain = write_raster(tmp_path / "plain.tif", values)
    with rasterio.open(tagged) as file:
        assert np.array_equal(valid_of(tagged), file.dataset_mask() > 0)
    assert np.array_equal(valid_of(plain, nodata=(value,)), valid_of(tagged))
    assert valid_of(plain).all()


def test_nodata_is_compared_in_the_type_of_the_pixels():
    a_tenth = np.array([0.1, 0.1000001, 0.11], np.float32)
    assert holds(a_tenth, 0.1).tolist() == [True, False, False]  # 0.1 of a text is no float32
    assert holds(a_tenth.astype(np.float64), 0.1).tolist() == [False, False, False]
    assert holds(np.array([-9999, -9998.9, np.nan], np.float32), -9999).tolist() == [True, False, False]
    assert holds(np.array([np.nan, 1], np.float32), float("nan")).tolist() == [True, False]
    assert holds(np.array([np.inf, np.finfo(np.float32).max], np.float32), float("inf")).tolist() == [True, False]
    assert holds(np.array([-(2**63), 0], np.int64), -(2.0**63)).tolist() == [True, False]


@pytest.mark.parametrize("value", [0.5, -9999.0, 256.0, float("nan"), float("inf")])
def test_a_nodata_value_that_the_type_cannot_hold_hides_no_pixel_and_is_remarked_on(tmp_path, value):
    values = np.zeros((3, 4, 4), np.uint8)
    path = write_raster(tmp_path / "a.tif", values)
    assert not fits(value, "uint8")
    assert valid_of(path, nodata=(value,)).all()
    tagged = tmp_path / "tagged.tif"
    directory = Image.Exif()
    directory[42113] = f"{value:g}"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tagged, tiffinfo=directory)
    assert valid_of(tagged).all()
    remarks = Remarks()
    checked_header(Sample(tagged, None), Reading(), 3, remarks=remarks)
    (line,) = remarks.lines()
    assert f"tagged.tif declares the nodata value {value:g}, which uint8 pixels cannot hold" in line


@pytest.mark.parametrize("given", ["file", (7.0,)])
def test_an_alpha_band_counts_beside_a_nodata_value(tmp_path, given):
    values = np.full((4, 4, 4), 50, np.uint8)
    values[:3, 0, 0] = 7
    values[3] = 255
    values[3, 2, 2:] = 0
    path = write_raster(tmp_path / "a.tif", values, nodata=7)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    hidden = ~valid_of(path, nodata=given)
    assert [tuple(place) for place in np.argwhere(hidden)] == [(0, 0), (2, 2), (2, 3)]
    assert valid_of(path, nodata=()).all()


def test_a_band_that_is_only_marked_as_alpha_is_data_where_it_is_named(tmp_path):
    values = RNG.integers(0, 255, (4, 6, 6), dtype=np.uint8)
    values[3, 0, 0] = 0
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=4, height=6, width=6, dtype="uint8") as file:
        file.write(values)
        assert file.colorinterp[3] == ColorInterp.alpha  # so rasterio writes four bands where nobody says what they are
    whole = read_pixels(tmp_path / "a.tif", 4, Reading(bands=(4, 1, 2, 3)))
    assert np.array_equal(whole.values, values[[3, 0, 1, 2]])
    assert whole.valid is None
    assert not valid_of(tmp_path / "a.tif")[0, 0]
    with pytest.raises(
        InputError, match=r"has 3 bands and an alpha band, .*is only marked as alpha, .*bands \[1, 2, 3, 4\]"
    ):
        read_pixels(tmp_path / "a.tif", 4, Reading(settings="data.source."))
    tagged = write_raster(tmp_path / "b.tif", values, nodata=7)
    with rasterio.open(tagged, "r+") as file:
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    values[:, 2, 2] = 7
    with rasterio.open(tagged, "r+") as file:
        file.write(values)
    pixels = read_pixels(tagged, 4, Reading(bands=(1, 2, 3, 4)))
    assert pixels.valid is not None
    hidden = ~pixels.valid
    assert [tuple(place) for place in np.argwhere(hidden)] == [(2, 2)]


def test_statistics_kept_beside_a_file_are_not_believed(tmp_path):
    path = write_raster(tmp_path / "a.tif", np.full((3, 8, 8), 9, np.uint16))
    with rasterio.open(path) as file:
        file.statistics(1)
    assert (tmp_path / "a.tif.aux.xml").exists()
    write_raster(path, np.full((3, 8, 8), 900, np.uint16))
    (tmp_path / "a.tif.aux.xml").touch()
    assert (read_pixels(path, 3, Reading()).values == 900).all()


# --- bits ---


def png_of_few_bits(path: Path, values: np.ndarray, bits: int) -> Path:
    """A grey PNG of 1, 2 or 4 bits (Pillow writes none of 2 and 4)."""
    per_byte = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    weights = 2 ** (bits * np.arange(per_byte - 1, -1, -1))
    rows = (padded.reshape(len(values), -1, per_byte) * weights).sum(2).astype(np.uint8)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_images_and_masks_of_few_bits_are_what_was_drawn(tmp_path, bits):
    ids = RNG.integers(0, 2**bits, (6, 10), np.uint8)
    path = png_of_few_bits(tmp_path / "a.png", ids, bits)
    assert np.array_equal(read_mask(path, LabelMap(16)), ids)
    header = read_header(path)
    as_seen = for_file(Normalization((0.0,), (1.0,), (0.0,), (1.0,)), Reading(), header)
    scaled = as_seen.scaled(read_pixels(path, 1, Reading()).values)[0]
    assert np.allclose(scaled, ids / (2**bits - 1))
    assert np.allclose(scaled, np.array(Image.open(path).convert("L")) / 255)  # white is white


# --- orientation ---


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_photograph_is_read_as_it_is_shown(tmp_path, tag, suffix):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = tag
    exact: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"subsampling": 0, "quality": 95}}.get(suffix, {})
    Image.fromarray(picture()).save(path, exif=exif, **exact)
    with Image.open(path) as stored:
        as_pillow_shows = np.array(ImageOps.exif_transpose(stored)).transpose(2, 0, 1)
    header, shown = read_header(path), read_pixels(path, 3, Reading()).values
    assert (header.height, header.width) == shown.shape[1:]
    apart = np.abs(shown.astype(int) - as_pillow_shows)
    assert apart.max() <= (3 if suffix == "jpg" else 0)  # two decoders of JPEG round differently
    window = Window(2, 3, 9, 5)
    assert np.array_equal(read_pixels(path, 3, Reading(), window).values, shown[:, 2:11, 3:8])
    half = read_pixels(path, 3, Reading(pixel_size=2.0, file_pixel_size=1.0)).values
    blocks = shown.reshape(3, shown.shape[1] // 2, 2, shown.shape[2] // 2, 2).mean((2, 4))
    assert np.abs(half - blocks).max() <= 0.5
    grid = read_grid(path)
    assert (grid.height, grid.width) == shown.shape[1:]
    assert np.array_equal(read_decimated(path, [1, 2, 3], 1000), shown)


def test_a_georeferenced_file_lies_as_it_is_stored_whatever_its_orientation_tag(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = picture()
    Image.fromarray(values).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (tmp_path / "a.jgw").write_text("0.1\n0\n0\n-0.1\n500000\n4000000\n")
    assert read_pixels(tmp_path / "a.jpg", 3, Reading()).values.shape == (3, 24, 16)


def test_a_mask_is_turned_by_its_own_tag(tmp_path):
    upright = RNG.integers(0, 2, (12, 8), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "m.png", exif=exif)
    Image.fromarray(picture(12, 8)).save(tmp_path / "i.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", LabelMap(2)), upright)
    checked_header(Sample(tmp_path / "i.png", tmp_path / "m.png"), Reading(), 3)


# --- overviews ---


def with_reduced_copies(folder: Path, values: np.ndarray) -> dict[str, Path]:
    """One raster in the forms that bring reduced copies of themselves, which are no plain averages or samples of it."""
    plain = georeferenced(folder / "plain.tif", values, tiled=True, blockxsize=128, blockysize=128)
    files = {"plain": plain, "cog": folder / "cog.tif", "jp2": folder / "a.jp2", "ovr": folder / "ovr.tif"}
    copy(plain, files["cog"], driver="COG", BLOCKSIZE=128, OVERVIEW_RESAMPLING="CUBIC")
    copy(plain, files["jp2"], driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES")
    copy(plain, files["ovr"], driver="GTiff")
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(files["ovr"], "r+") as file:
        file.build_overviews([2, 4, 8], Resampling.cubic)
    for name in ("cog", "jp2"):
        files[f"vrt of {name}"] = folder / f"{name}.vrt"
        copy(files[name], files[f"vrt of {name}"], driver="VRT")
    return files


@pytest.mark.parametrize("factor", [1.9, 2.0, 3.3, 4.0, 8.0])
def test_masks_are_read_at_reduced_size_with_the_ids_that_are_in_them(tmp_path, factor):
    ids = np.kron(RNG.integers(0, 2, (64, 64)) * 4, np.ones((8, 8), int)).astype(np.uint8)
    for name, path in with_reduced_copies(tmp_path, ids[None]).items():
        for window in (None, Window(5, 3, 40, 30)):
            found = read_mask(path, LabelMap(5), window, factor)
            assert set(np.unique(found)) <= {0, 4}, name
            plain = read_mask(tmp_path / "plain.tif", LabelMap(5), window, factor)
            assert np.array_equal(found, plain), name


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_images_are_averages_of_the_pixels_whatever_copies_the_file_brings(tmp_path, factor, monkeypatch):
    values = RNG.integers(0, 255, (1, 512, 512), np.uint8)
    means = values.reshape(1, 512 // factor, factor, 512 // factor, factor).mean((2, 4))
    monkeypatch.setattr("dann_experiments.data.pixels.BLOCK_BYTES", 20_000)  # several blocks
    for name, path in with_reduced_copies(tmp_path, values).items():
        reading = Reading(pixel_size=float(factor))
        found = read_pixels(path, 1, reading).values
        assert np.abs(found - means).max() <= 0.5, name
        part = read_pixels(path, 1, reading, Window(7, 9, 20, 30)).values
        assert np.array_equal(part, found[:, 7:27, 9:39]), name


@pytest.mark.parametrize("factor", [1.3, 2.7, 5.1])
def test_reduced_copies_change_nothing_at_any_factor(tmp_path, factor):
    values = RNG.integers(0, 255, (2, 200, 300), np.uint8)
    files = with_reduced_copies(tmp_path, values)
    reading = Reading(pixel_size=factor)
    plain = read_pixels(files["plain"], 2, reading).values.astype(int)
    for name, path in files.items():
        assert np.abs(read_pixels(path, 2, reading).values - plain).max() <= 1, name


# --- place and units ---


def pair(folder: Path, image: dict[str, Any], mask: dict[str, Any]) -> Sample:
    georeferenced(folder / "i.tif", np.zeros((3, 20, 20), np.uint8), **image)
    georeferenced(folder / "m.tif", np.zeros((1, 20, 20), np.uint8), **mask)
    return Sample(folder / "i.tif", folder / "m.tif")


HERE = from_origin(5e5, 4e6, 1, 1)


@pytest.mark.parametrize(
    ("mask", "apart"),
    [
        ({"transform": from_origin(7e5, 5e6, 1, 1), "crs": "EPSG:3857"}, True),
        ({"transform": from_origin(5e5 + 0.6, 4e6, 1, 1)}, True),
        ({"transform": from_origin(5e5 + 0.4, 4e6, 1, 1)}, False),
        ({"transform": from_origin(5e5, 4e6, 1.05, 1.05)}, True),
        ({"transform": Affine(1, 0, 5e5, 0, 1, 4e6 - 20)}, True),  # the same place, stored from south to north
        ({"crs": "EPSG:32634"}, True),  # the same numbers in another zone
        ({"crs": "EPSG:25833"}, False),  # ETRS89 instead of WGS 84: the same place within centimeters
        ({"crs": None}, False),
    ],
)
def test_an_image_and_a_mask_that_say_they_lie_elsewhere_are_no_pair(tmp_path, mask, apart):
    sample = pair(tmp_path, {}, mask)
    if not apart:
        checked_header(sample, Reading(), 3)
        return
    with pytest.raises(InputError, match=r"i\.tif and its mask .*m\.tif are in different places"):
        checked_header(sample, Reading(), 3)


def test_a_file_without_georeference_pairs_with_one_that_has_it(tmp_path):
    sample = pair(tmp_path, {}, {})
    write_raster(tmp_path / "m.tif", np.zeros((1, 20, 20), np.uint8))
    checked_header(sample, Reading(), 3)


DEGREES = {"crs": "EPSG:4326", "transform": from_origin(14.1, 36.5, 9e-6, 9e-6)}


def tiles(folder: Path, place: dict[str, Any], masks: bool = True) -> None:
    for number in range(2):
        values = RNG.integers(0, 255, (3, 32, 32), np.uint8)
        georeferenced(folder / "images" / f"{number}.tif", values, **place)
        if masks:
            georeferenced(folder / "masks" / f"{number}.tif", (values[:1] > 128).astype(np.uint8), **place)


def two_domains(folder: Path, source: dict[str, Any], target: dict[str, Any], **more: Any):
    """Settings of a source and a target whose tiles lie at these places."""
    for name, place in (("source", source), ("source_val", source), ("target", target), ("target_val", target)):
        tiles(folder / name, place, masks=name != "target")
    return load_config(None, {**small_settings(folder), "data.target.test": [], **more})


def test_one_pixel_size_for_metres_and_degrees_is_refused(workplace):
    sizes = {"data.source.pixel_size": 1e-3, "data.target.pixel_size": 1e-3}
    near = {**DEGREES, "transform": from_origin(14.1, 36.5, 1e-3, 1e-3)}
    config = two_domains(workplace, {"transform": from_origin(5e5, 4e6, 1e-3, 1e-3)}, near, **sizes)
    with pytest.raises(InputError, match=r"pixel_size 0\.001 means degree .*but metre for image .*data\.source\.train"):
        find_data(config)
    assert any("means degree" in text for text in check_data(config).problems)


def test_each_domain_may_give_its_pixel_size_in_its_own_unit(workplace):
    config = two_domains(workplace, {}, DEGREES, **{"data.source.pixel_size": 2.0, "data.target.pixel_size": 1.8e-5})
    report = check_data(config)
    assert report.problems == []
    assert report.grids == [
        "source: pixels of 1 metre, resampled to 2 metre.", "target: pixels of 9e-06 degree, resampled to 1.8e-05 degree."
    ]  # fmt: skip


def test_files_of_one_domain_in_two_units_share_no_pixel_size(workplace):
    config = two_domains(workplace, {}, {}, **{"data.source.pixel_size": 2.0})
    feet = {"crs": "EPSG:2263", "transform": from_origin(9e5, 2e5, 3, 3)}
    tiles(workplace / "source", feet)  # the first two: one unit, and the others another
    georeferenced(workplace / "source" / "images" / "9.tif", np.zeros((3, 32, 32), np.uint8))
    georeferenced(workplace / "source" / "masks" / "9.tif", np.zeros((1, 32, 32), np.uint8))
    with pytest.raises(
        InputError,
        match=r"9\.tif has pixels of 1 metre, but data\.source\.pixel_size is 2, set for files in US survey foot",
    ):
        find_data(config)


@pytest.mark.parametrize(("size", "what"), [(1.0, "would be made of 1.111e"), (1e-8, "cut into 900")])
def test_a_pixel_size_that_changes_pixels_beyond_reason_is_refused(tmp_path, size, what):
    path = georeferenced(tmp_path / "a.tif", np.zeros((3, 8, 8), np.uint8), **DEGREES)
    with pytest.raises(InputError, match=r"pixels of 9e-06 degree, .*in the unit of the file's CRS, degree") as told:
        Reading(pixel_size=size).grid_size(read_header(path), path)
    assert what in str(told.value)


# --- labels that are none ---


def test_nan_and_a_masks_own_nodata_value_are_not_labelled(tmp_path):
    values = np.array([[[0, 1, 1, -99999, np.nan]]], np.float32)
    path = write_raster(tmp_path / "m.tif", values, nodata=-99999)
    assert read_mask(path, LabelMap(2)).tolist() == [[0, 1, 1, 255, 255]]
    named = label_map(["a", "b"], 255, {0: "b", 1: "a"}, None, [])
    assert read_mask(path, named).tolist() == [[1, 0, 0, 255, 255]]


def test_a_nodata_value_that_is_a_class_id_is_not_labelled_unless_the_map_names_it(tmp_path):
    path = write_raster(tmp_path / "m.tif", np.array([[[0, 1, 2]]], np.uint8), nodata=0)
    assert read_mask(path, LabelMap(3)).tolist() == [[255, 1, 2]]
    named = label_map(["a", "b", "c"], 255, {0: "a", 1: "b", 2: "c"}, None, [])
    assert read_mask(path, named).tolist() == [[0, 1, 2]]
    image = write_raster(tmp_path / "i.tif", np.zeros((3, 1, 3), np.uint8))
    for labels, said in ((LabelMap(3), True), (named, False)):
        remarks = Remarks()
        checked_header(Sample(image, path), Reading(), 3, labels, remarks=remarks)
        assert (
            any("declares the nodata value 0, so these pixels are not labeled" in line for line in remarks.lines())
            == said
        )


def test_a_mask_inside_a_label_raster_hides_its_pixels_at_any_size(tmp_path):
    ids = np.ones((1, 16, 16), np.uint8)
    path = write_raster(tmp_path / "m.tif", ids)
    hidden = np.zeros((16, 16), bool)
    hidden[:8] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(np.where(hidden, 0, 255).astype(np.uint8))
    assert np.array_equal(read_mask(path, LabelMap(2)), np.where(hidden, 255, 1))
    assert np.array_equal(read_mask(path, LabelMap(2), None, 2.0), np.where(hidden[::2, ::2], 255, 1))


def test_a_transparent_background_of_a_palette_png_is_a_class_like_any_other(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8)).convert("P")
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "m.png", transparency=0)
    assert read_mask(tmp_path / "m.png", LabelMap(3)).tolist() == [[0, 1], [1, 2]]


def test_transparent_pixels_of_a_colored_mask_are_not_labelled_where_no_color_is_named_for_them(tmp_path):
    colors = np.zeros((1, 3, 4), np.uint8)
    colors[0, :2] = [[255, 0, 0, 255], [0, 0, 255, 255]]  # the third: nothing
    Image.fromarray(colors).save(tmp_path / "m.png")
    named = label_map(["a", "b"], 255, None, {(255, 0, 0): "a", (0, 0, 255): "b"}, [])
    assert read_mask(tmp_path / "m.png", named).tolist() == [[0, 1, 255]]
    black = label_map(["a", "b"], 255, None, {(255, 0, 0): "a", (0, 0, 255): "b", (0, 0, 0): "a"}, [])
    assert read_mask(tmp_path / "m.png", black).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("way", ["jpg", "jpeg in tiff", "jp2", "lerc"])
def test_ids_that_compression_made_are_told_as_such(tmp_path, way):
    ids = np.kron(RNG.integers(0, 2, (8, 8)), np.ones((4, 4), int)).astype(np.uint8) * 255
    ids[0, 0] = ids[5, 5] = 255 - ids[5, 5]
    plain = write_raster(tmp_path / "plain.tif", ids[None])
    path, driver, more = {
        "jpg": (tmp_path / "m.jpg", "JPEG", {"QUALITY": 60}),
        "jpeg in tiff": (tmp_path / "m.tif", "GTiff", {"COMPRESS": "JPEG", "JPEG_QUALITY": 60}),
        "jp2": (tmp_path / "m.jp2", "JP2OpenJPEG", {"QUALITY": 5}),
        "lerc": (tmp_path / "l.tif", "GTiff", {"COMPRESS": "LERC", "MAX_Z_ERROR": 9}),
    }[way]
    copy(plain, path, driver=driver, **more)
    labels = label_map(["a", "b"], 255, {0: "a", 255: "b"}, None, [])
    assert set(np.unique(read_mask(plain, labels))) == {0, 1}
    with pytest.raises(
        InputError, match=r"holds id \d+, but value_map knows \[0, 255\]\. The file has a lossy compression"
    ):
        read_mask(path, labels)


# --- ranges, pages, scales ---


def test_values_that_fill_little_of_the_range_are_remarked_on_with_the_ways_out(workplace, caplog):
    for name in ("source", "source_val", "target", "target_val"):
        for number in range(2):
            values = RNG.integers(200, 2400, (3, 32, 32), np.uint16)
            georeferenced(workplace / name / "images" / f"{number}.tif", values)
            georeferenced(workplace / name / "masks" / f"{number}.tif", (values[:1] > 999).astype(np.uint8))
    given = {**small_settings(workplace), "data.target.test": []}
    report = check_data(load_config(None, given))
    assert report.problems == []
    narrow = [line for line in report.remarks if "nearly all values are between" in line]
    assert len(narrow) == 2
    assert "data.source.scale type makes 0 to 65535" in narrow[0]
    assert "[0, 10000]) or to percentiles" in narrow[0]
    scaled = {**given, "data.source.scale": "percentiles", "data.target.scale": [0, 1000]}
    (line,) = check_data(load_config(None, scaled)).remarks
    assert line.startswith("data.target.scale makes 0 to 1000 the range of 0 to 1, but 6")
    config = load_config(None, given)
    read_sets(config)
    assert "nearly all values are between" in caplog.text
    assert check_data(load_config(None, {**scaled, "data.target.scale": [0, 2500]})).remarks == []


def test_values_of_a_normalized_domain_may_fill_any_part_of_the_range(workplace):
    dark = {"crs": "EPSG:32633", "transform": HERE}
    for name in ("source", "source_val", "target", "target_val"):
        for number in range(2):
            values = RNG.integers(0, 12, (3, 32, 32), np.uint8)
            write_raster(workplace / name / "images" / f"{number}.tif", values, **dark)
            write_raster(workplace / name / "masks" / f"{number}.tif", (values[:1] > 6).astype(np.uint8), **dark)
    given = {**small_settings(workplace), "data.target.test": [], "data.normalization": "domain"}
    assert check_data(load_config(None, given)).remarks == []


def test_a_file_of_several_pages_or_with_scaled_values_says_so(tmp_path):
    pages = [Image.fromarray(picture()) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    hyperstack = {270: "ImageJ=1.54f\nimages=40\nslices=40\nloop=false\n"}
    Image.fromarray(picture()).save(tmp_path / "stack.tif", tiffinfo=hyperstack)
    scaled = write_raster(tmp_path / "scaled.tif", np.zeros((3, 8, 8), np.uint16))
    with rasterio.open(scaled, "r+") as file:
        file.scales, file.offsets = (2.75e-05,) * 3, (-0.2,) * 3
    remarks = Remarks()
    for path in (tmp_path / "pages.tif", tmp_path / "stack.tif", scaled):
        checked_header(Sample(path, None), Reading(), 3, remarks=remarks)
    one, two = remarks.lines()
    assert "pages.tif holds 3 images (pages), of which only the first is read" in one
    assert "(This applies to 2 files.)" in one
    assert "scaled.tif declares its values as value x 2.75e-05 + -0.2" in two


# --- partly without data ---


def test_check_data_tells_the_share_of_pixels_that_lack_some_bands(workplace):
    for name in ("source", "source_val", "target", "target_val"):
        for number in range(2):
            values = RNG.integers(20, 250, (3, 32, 32)).astype(np.float32)
            values[2, :, :8] = -9999
            georeferenced(workplace / name / "images" / f"{number}.tif", values, nodata=-9999)
            georeferenced(workplace / name / "masks" / f"{number}.tif", (values[:1] > 99).astype(np.uint8))
    given = {**small_settings(workplace), "data.target.test": []}
    given |= {"data.source.scale": [0, 255], "data.target.scale": [0, 255], "data.target.nodata_bands": "all"}
    report = check_data(load_config(None, given))
    assert report.counts["partly without data"].tolist() == [0.25] * 4
    assert report.counts["without data"].tolist() == [0.25, 0.25, 0, 0]
    assert report.bands.loc[("source", 3), "minimum"] >= 20
    assert report.bands.loc[("target", 3), "minimum"] == -9999
    (source,) = (line for line in report.remarks if "in some bands and not in others" in line)
    assert "they count as without data (nodata_bands any)" in source  # of the target the settings decide


# --- images smaller than the crop ---


def test_an_image_smaller_than_the_crop_lies_in_it_with_nodata_around(tmp_path):
    ids = RNG.integers(0, 2, (10, 40), np.uint8)
    Image.fromarray(ids * 100 + 50).save(tmp_path / "i.png")
    Image.fromarray(ids).save(tmp_path / "m.png")
    unchanged = Normalization((0.0,), (1.0,), (0.0,), (1.0,))
    dataset = SegmentationDataset(
        [Sample(tmp_path / "i.png", tmp_path / "m.png")], LabelMap(2), unchanged, None, True, 24, pad_to_crop=True
    )
    tops = set()
    for seed in range(12):
        item = dataset[0, seed]
        valid = item["valid"].bool().numpy()
        assert item["image"].shape == (1, 24, 24)
        rows = np.flatnonzero(valid.any(1))
        assert len(rows) == 10
        assert valid.sum() == 240
        tops.add(int(rows[0]))
        assert (item["image"][0].numpy()[~valid] == 0).all()
        assert (item["mask"].numpy()[~valid] == 255).all()
        assert np.allclose(item["image"][0].numpy()[valid], (item["mask"].numpy()[valid] * 100 + 50) / 255)
        assert set(np.unique(item["mask"].numpy()[valid])) <= {0, 1}
    assert len(tops) > 3


# --- lists, manifests, names ---


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("data/images", "data/masks", "data/my tiles"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a 1", "b", "c"):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / folder / f"{name}.png")
    return tmp_path


def found_in(tree: Path, entry: Any, key: str = "data.source.train") -> list[tuple[str, str | None]]:
    samples = find_samples([entry], tree, key, "required")
    return [(s.image.relative_to(tree).as_posix(), s.mask and s.mask.relative_to(tree).as_posix()) for s in samples]


TWO = [("data/images/b.png", "data/masks/b.png"), ("data/images/c.png", "data/masks/c.png")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_manifests_are_read_as_spreadsheets_save_them(tree, separator, encoding):
    rows = ["Image ;Mask", *(f"data\\images\\{name}.png;data\\masks\\{name}.png" for name in "bc")]
    text = "\r\n".join(row.replace(";", separator) for row in rows) + "\r\n"
    (tree / "a.csv").write_bytes(text.encode(encoding))
    assert found_in(tree, "a.csv") == TWO
    (tree / "a.csv").write_bytes(f"sep={separator}\r\n{text}".encode(encoding))
    assert found_in(tree, "a.csv") == TWO


def test_a_manifest_in_an_old_encoding_is_told_as_such(tree):
    (tree / "a.csv").write_bytes("image;mask\nStraße.png;b.png\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"a\.csv cannot be read: .*save it as UTF-8 text"):
        find_samples(["a.csv"], tree, "data.source.train")


@pytest.mark.parametrize("separator", [" ", "   ", "\t", ";", ", "])
def test_a_list_may_hold_image_and_mask_on_a_line(tree, separator):
    rows = [f"data/images/{name}.png{separator}data/masks/{name}.png" for name in ("b", "c")]
    (tree / "list.txt").write_text("\n".join(rows) + "\n\n")
    assert found_in(tree, "list.txt") == TWO


def test_names_with_blanks_stay_whole_in_lists(tree):
    (tree / "list.txt").write_text("data/images/a 1.png data/my tiles/a 1.png\n/data/images/b.png /data/masks/b.png\n")
    expected = [("data/images/a 1.png", "data/my tiles/a 1.png"), ("data/images/b.png", "data/masks/b.png")]
    assert found_in(tree, "list.txt") == expected
    (tree / "alone.txt").write_text("data/my tiles/a 1.png\n")
    samples = find_samples(["alone.txt"], tree, "data.target.train")
    assert [sample.image.name for sample in samples] == ["a 1.png"]


def test_paths_of_a_list_are_relative_to_it_or_else_to_the_root_of_the_data(tree):
    (tree / "lists").mkdir()
    (tree / "lists" / "train.txt").write_text("data/images/b.png data/masks/b.png\n")
    assert found_in(tree, "lists/train.txt") == TWO[:1]


def test_a_mask_that_is_missing_is_named_though_the_list_has_blanks(tree):
    (tree / "list.txt").write_text("data/images/b.png data/masks/none.png\n")
    with pytest.raises(InputError, match=r"mask .*data/masks/none\.png of image .*b\.png does not exist"):
        found_in(tree, "list.txt")


@pytest.mark.parametrize(
    ("names", "kept"), [(["[bc]"], "bc"), (["?"], "bc"), (["b*", "c"], "bc"), (["*.png"], "a 1bc")]
)
def test_names_may_be_shell_patterns(tree, names, kept):
    entry = {"images": "data/images", "masks": "data/masks", "names": names}
    assert "".join(Path(image).stem for image, _ in found_in(tree, entry)) == kept


def test_names_that_match_nothing_are_said(tree, caplog):
    entry = {"images": "data/images", "masks": "data/masks", "names": ["[0-9]", "tile_*"]}
    with pytest.raises(
        InputError, match=r"no file matches names \[0-9\], tile_\*; names are file names \(such as a 1\.png\)"
    ):
        found_in(tree, entry)
    assert len(found_in(tree, {**entry, "names": ["b", "tile_*"]})) == 1
    assert "no file matches 1 of the names: tile_*" in caplog.text


def test_files_of_kinds_that_are_not_read_are_named(tree):
    (tree / "arrays" / "images").mkdir(parents=True)
    np.save(tree / "arrays" / "images" / "a.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"arrays, which holds no images but \.npy files \(\.png, .*are read\)"):
        find_samples(["arrays"], tree, "data.source.train")
    (tree / "data" / "masks" / "b.png").unlink()
    (tree / "data" / "masks" / "b.geojson").write_text("{}")
    with pytest.raises(InputError, match=r"b\.png has no mask of the same stem in .*masks; b\.geojson is not an image"):
        find_samples(["data"], tree, "data.source.train")


def test_an_image_with_two_masks_in_one_set_is_refused(tree):
    (tree / "a.csv").write_text("image,mask\ndata/images/b.png,data/masks/b.png\ndata/images/b.png,data/masks/c.png\n")
    with pytest.raises(InputError, match=r"image .*b\.png has two masks, .*masks/b\.png and .*masks/c\.png; keep one"):
        found_in(tree, "a.csv")


def test_the_fixture_writes_what_it_says(tmp_path):
    """The reduced copies of these tests hold ids that are not in the mask, so that to read them would show."""
    ids = np.kron(RNG.integers(0, 2, (64, 64)) * 4, np.ones((8, 8), int)).astype(np.uint8)
    for name, path in with_reduced_copies(tmp_path, ids[None]).items():
        with warnings.catch_warnings(), rasterio.open(path) as file:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            reduced = file.read(1, out_shape=(128, 128), resampling=Resampling.nearest)
        assert (set(np.unique(reduced)) <= {0, 4}) == (name == "plain"), name


# --- to the end of the jobs ---

TO_STORED = {
    2: 0,
    3: 3,
    4: 1,
    5: 5,
    6: 2,
    7: 6,
    8: 4,
}  # orientation tag: Pillow's Transpose from shown to stored pixels


def turned_copy(squares: Path, folder: Path) -> Path:
    """The same pictures as a camera held in eight ways would have stored them, with the tag that says how; masks upright."""
    for number, path in enumerate(sorted(squares.rglob("*.png"))):
        target = folder / path.relative_to(squares)
        target.parent.mkdir(parents=True, exist_ok=True)
        image, tag = Image.open(path), number % 8 + 1
        if path.parent.name == "images" and tag in TO_STORED:
            exif = Image.Exif()
            exif[0x0112] = tag
            image.transpose(Image.Transpose(TO_STORED[tag])).save(target, exif=exif)
        else:
            image.save(target)
    return folder


@pytest.mark.slow
def test_pictures_stored_turned_train_and_predict_as_those_stored_upright(workplace, squares, shared_runs):
    turned = turned_copy(squares, workplace / "turned")
    stored_otherwise = [
        path
        for path in turned.rglob("images/*.png")
        if not np.array_equal(np.array(Image.open(path)), np.array(Image.open(squares / path.relative_to(turned))))
    ]
    assert len(stored_otherwise) > 20
    result = adapt(load_config(None, small_settings(turned)))
    assert result.metrics == shared_runs.result("adapt").metrics
    maps = []
    for root in (squares, turned):
        images, output = root / "target_test" / "images", workplace / f"{root.name}_maps"
        predict(PredictConfig(model=f"runs:/{result.run_id}", input=str(images), output=str(output)))
        maps.append({path.name: np.array(Image.open(path)) for path in sorted(output.glob("*.png"))})
    assert len(maps[0]) == 3
    for name, expected in maps[0].items():
        assert np.array_equal(maps[1][name], expected)


def test_a_photograph_held_upright_gets_an_upright_map(pretrained_place, shared_runs):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(40, 64)).save(pretrained_place / "photo.jpg", exif=exif)
    model = shared_runs.result("pretrain").model_uri
    predict(PredictConfig(model=model, input="photo.jpg", output="map.png", probabilities=True))
    assert Image.open("map.png").size == (40, 64)
    with rasterio.open("map_probabilities.tif") as file:
        assert (file.width, file.height) == (40, 64)


@pytest.mark.slow
def test_a_model_knows_the_unit_of_its_pixel_size(workplace):
    config = two_domains(workplace, {}, {}, **{"data.source.pixel_size": 2.0, "data.target.pixel_size": 2.0})
    result = adapt(config)
    degrees = {"transform": from_origin(14, 36, 0.1, 0.1), "crs": "EPSG:4326"}
    georeferenced(workplace / "near.tif", picture(40, 40).transpose(2, 0, 1), **degrees)
    with pytest.raises(
        InputError,
        match=r"near\.tif has pixels of 0\.1 degree, but the model works on pixels of 2, set for files in metre",
    ):
        predict(PredictConfig(model=f"runs:/{result.run_id}", input="near.tif", output="map.tif"))


@pytest.mark.slow
def test_a_training_with_images_of_all_sizes_runs_to_its_end(workplace):
    sizes_of = {"source": (20, 32, 60), "source_val": (32, 40), "target": (16, 50, 33), "target_val": (32,)}
    for name, sizes in sizes_of.items():
        for number, size in enumerate(sizes):
            values = RNG.integers(0, 255, (3, size, size + 8), np.uint8)
            write_raster(workplace / name / "images" / f"{number}.tif", values)
            write_raster(workplace / name / "masks" / f"{number}.tif", (values[:1] > 128).astype(np.uint8))
    given = {**small_settings(workplace), "data.target.test": [], "data.crop_size": 48}
    assert check_data(load_config(None, given)).problems == []
    result = adapt(load_config(None, given))
    assert 0 <= result.metrics["iou/target_val"] <= 1


def test_a_model_of_before_the_choice_reads_partial_nodata_as_it_did():
    older = {"low": [0.0], "high": [1.0], "mean": [0.5], "std": [0.2], "nodata": "file"}
    assert reading_from_facts(older)[0].nodata_bands == "all"
    facts = reading_facts(Reading(), Normalization((0.0,), (1.0,), (0.0,), (1.0,)))
    assert reading_from_facts(facts)[0].nodata_bands is None


def test_data_that_are_read_by_a_newer_rule_have_another_digest_than_before_and_others_have_not(workplace, squares):
    plain = find_data(load_config(None, small_settings(squares)))
    assert plain.digests["source_train"] == content_digest(plain.read().sets[SOURCE_TRAIN].samples)
    for name in ("source", "source_val", "target", "target_val"):
        values = RNG.integers(20, 250, (3, 32, 32)).astype(np.int16)
        georeferenced(workplace / name / "images" / "0.tif", values, nodata=-9999)
        georeferenced(workplace / name / "masks" / "0.tif", (values[:1] > 99).astype(np.uint8))
    given = {**small_settings(workplace), "data.target.test": []}
    given |= {"data.source.scale": [0, 255], "data.target.scale": [0, 255], "data.target.nodata_bands": "all"}
    data = find_data(load_config(None, given))
    same = {
        str(name): data.digests[str(name)] == content_digest(dataset.samples)
        for name, dataset in data.read().sets.items()
    }
    assert same == {"source_train": False, "source_val": False, "target_train": True, "target_val": True}


# --- what a review found ---


@pytest.mark.parametrize(
    ("profile", "reading"),
    [
        ({"nodata": 0}, {}), ({"nodata": 0}, {"nodata": ()}), ({"nodata": 0}, {"nodata": (77.0,)}),
        ({"alpha": True}, {"nodata": ()}), ({"alpha": True}, {"bands": (4, 1, 2)}),
    ],
)  # fmt: skip
def test_values_that_count_as_data_are_in_the_average_whatever_the_file_hides(tmp_path, profile, reading):
    alpha = profile.pop("alpha", False)
    values = RNG.choice(np.array([0, 100], np.uint8), (4 if alpha else 3, 64, 64))
    values[:, ::2] = 50  # no pixel lacks data in all its bands
    path = georeferenced(tmp_path / "a.tif", values, **profile)
    if alpha:
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    found = read_pixels(path, 3, Reading(pixel_size=2.0, **reading))
    bands = [band - 1 for band in reading.get("bands", (1, 2, 3))]
    means = values[bands].reshape(3, 32, 2, 32, 2).mean((2, 4))
    valid = np.ones((32, 32), bool) if found.valid is None else found.valid
    assert valid.any()
    assert np.abs(found.values - means)[:, valid].max() <= 0.5


@pytest.mark.parametrize("size", [8.0, 5.0, 1.3, 0.7])
def test_no_value_that_is_nodata_is_part_of_a_valid_resampled_pixel(tmp_path, size):
    for row in range(12):
        values = np.full((1, 12, 12), 100, np.float32)
        values[:, row] = -9999
        path = georeferenced(tmp_path / "a.tif", values)
        found = read_pixels(path, 1, Reading(pixel_size=size, nodata=(-9999.0,), scale=(0.0, 255.0)))
        valid = np.ones(found.values.shape[1:], bool) if found.valid is None else found.valid
        assert np.allclose(found.values[0][valid], 100), (size, row)


def test_an_alpha_band_counts_wherever_it_stands(tmp_path):
    values = RNG.integers(1, 255, (5, 8, 8), np.uint8)
    values[3] = 255
    values[3, :2] = 0
    path = write_raster(tmp_path / "a.tif", values)
    with rasterio.open(path, "r+") as file:
        colors = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha, ColorInterp.undefined]
        file.colorinterp = colors
    for reading in (Reading(), Reading(bands=(1, 2, 3, 5))):
        pixels = read_pixels(path, 4, reading)
        assert np.array_equal(pixels.values, values[[0, 1, 2, 4]])
        assert pixels.valid is not None
        assert pixels.valid.sum() == 48
    assert read_pixels(path, 5, Reading(bands=(1, 2, 3, 4, 5))).valid is None


def test_bands_of_several_types_are_refused(tmp_path):
    for name, dtype in (("a", np.uint8), ("b", np.uint16)):
        write_raster(tmp_path / f"{name}.tif", np.zeros((1, 4, 4), dtype))
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{number}"><SimpleSource><SourceFilename relativeToVRT="1">{name}.tif'
        "</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for number, (name, kind) in enumerate((("a", "Byte"), ("b", "UInt16")), 1)
    )
    (tmp_path / "v.vrt").write_text(f'<VRTDataset rasterXSize="4" rasterYSize="4">{bands}</VRTDataset>')
    with pytest.raises(InputError, match=r"v\.vrt has bands of several types \(uint8, uint16\)"):
        read_header(tmp_path / "v.vrt")


def test_an_ignored_id_that_is_a_class_of_the_network_is_refused(tmp_path):
    maps = {"model.classes": 3, "data.ignore_index": 0, "data.source.value_map": {1: "a", 2: "b", 3: "c"}}
    with pytest.raises(InputError, match=r"data\.ignore_index is 0, which is the network's id of class 'a'"):
        load_config(None, maps)
    assert load_config(None, {**maps, "data.ignore_index": 255, "data.source.ignore_values": [0]}).class_names == [
        "a",
        "b",
        "c",
    ]


def test_class_names_that_are_mistyped_in_a_label_map_are_told(workplace, squares):
    typo = {
        **small_settings(squares), "data.class_names": ["ground", "square"],
        "data.source.value_map": {0: "ground", 1: "square"}, "data.target.value_map": {0: "ground", 1: "sqare"},
    }  # fmt: skip
    report = check_data(load_config(None, typo))
    assert any(
        "data.target: its label map names ['sqare']" in line and "did you mean 'square'" in line
        for line in report.remarks
    )
    source = {**typo, "data.source.value_map": {0: "ground", 1: "squares"}}
    (problem,) = check_data(load_config(None, source)).problems
    assert "leaves 1 class to learn" in problem
    assert "did you mean 'square' by 'squares'" in problem


def test_a_mask_whose_nodata_value_is_infinite_is_read(tmp_path):
    path = write_raster(tmp_path / "m.tif", np.array([[[0, 1]]], np.float32), nodata=float("-inf"))
    image = write_raster(tmp_path / "i.tif", np.zeros((3, 1, 2), np.uint8))
    checked_header(Sample(image, path), Reading(), 3, LabelMap(2), remarks=Remarks())
    assert read_mask(path, LabelMap(2)).tolist() == [[0, 1]]


def test_files_whose_georeferences_differ_by_half_a_pixel_are_a_pair_at_any_place(tmp_path):
    for size in (0.1, 0.25, 10.0):
        for origin in (123456.7, 500000.0, 654321.1):
            image = {"transform": from_origin(origin, 4e6, size, size)}
            mask = {"transform": from_origin(origin + size / 2, 4e6 - size / 2, size, size)}
            checked_header(pair(tmp_path, image, mask), Reading(), 3)


def test_a_settings_nodata_that_the_type_cannot_hold_is_remarked_on(tmp_path):
    path = write_raster(tmp_path / "a.tif", np.zeros((3, 4, 4), np.uint8))
    remarks = Remarks()
    checked_header(Sample(path, None), Reading(nodata=(-9999.0,), settings="data.target."), 3, remarks=remarks)
    assert "uint8 pixels, which cannot hold data.target.nodata -9999" in remarks.lines()[0]


def test_a_name_that_is_there_is_no_pattern(tree):
    for name in ("tile[1]", "tile1"):
        for folder in ("images", "masks"):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tree / "data" / folder / f"{name}.png")
    entry = {"images": "data/images", "masks": "data/masks", "names": ["tile[1].png"]}
    assert [Path(image).stem for image, _ in found_in(tree, entry)] == ["tile[1]"]


def test_what_spreadsheets_leave_at_the_end_of_rows_and_tables_is_nothing(tree):
    rows = ["image,mask,,", "data/images/b.png, data/masks/b.png,,", ",,,", "  ,,,"]
    (tree / "a.csv").write_text("\n".join(rows) + "\n")
    assert found_in(tree, "a.csv") == TWO[:1]
    (tree / "l.txt").write_text(
        "# train\ndata/images/b.png;data/masks/b.png;\n'data/images/c.png' 'data/masks/c.png'\n"
    )
    assert found_in(tree, "l.txt") == TWO


def test_a_folder_of_images_alone_is_a_set_without_masks(tree):
    assert len(find_samples(["data/images"], tree, "data.target.train", "no")) == 3
    with pytest.raises(InputError, match="has no mask, but this set needs one"):
        find_samples(["data/images"], tree, "data.source.train", "required")


def test_weights_that_diverged_are_refused_by_name():
    network = torch.nn.Linear(2, 2)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights["weight"][0, 0] = float("nan")
    with pytest.raises(InputError, match=r"checkpoint a\.pt holds NaN or infinity in weight"):
        load_into(network, weights, True, "a.pt")
