"""Images in several files: one per band, several dates; which pixels they share, what marks pixels not to use, and presets."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import yaml
from conftest import small_settings, write_raster
from documented import block
from drawn_packages import write_polygons
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.shutil import copy
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform

from dann_experiments import InputError, load_config
from dann_experiments.__main__ import main
from dann_experiments.config.data import DomainDataConfig
from dann_experiments.config.presets import filled
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.reading import Reading
from dann_experiments.data.samples import Sample, content_digest, file_digest, find_samples
from dann_experiments.data.shared_cache import SharedCache
from dann_experiments.data.stacks import Quality, stack, stem_of
from dann_experiments.data.virtual import cache_folder, files_behind
from dann_experiments.jobs.check_data import check_data
from dann_experiments.prediction.find_images import find_work

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
UTM33, UTM32 = "EPSG:32633", "EPSG:32632"
EAST, NORTH = 500_000, 5_400_000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def band(path: str, values: Any, size: float = 10, left: float = EAST, top: float = NORTH, **profile: Any) -> Path:
    """A GeoTIFF of one band with pixels of `size` meters, or of several if values have three dimensions."""
    values = np.asarray(values) if isinstance(values, np.ndarray) else np.array(values, np.uint16)
    values = values[None] if values.ndim == 2 else values
    place = {"crs": UTM33, "transform": from_origin(left, top, size, size)}
    return write_raster(Path(path), values, **{**place, **profile})


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def used(path: Path, bands: int) -> np.ndarray:
    """(h, w) bool: pixels that training uses."""
    valid = read_pixels(path, bands, Reading(scale=(0.0, 1.0))).valid
    header = read_header(path)
    return np.ones((header.height, header.width), bool) if valid is None else valid


def found(images: Any, **entry: Any) -> list[Sample]:
    return find_samples([{"images": images, **entry}], Path.cwd(), "data.source.train")


TEN = np.arange(36, dtype=np.uint16).reshape(6, 6) * 10 + 100


# Which pixels a stack has


def test_bands_of_10_20_and_60_meters_lie_on_the_pixels_of_the_first():
    files = [band("a.tif", TEN), band("b.tif", [[100, 200, 300]] * 3, 20), band("c.tif", [[700]], 60)]
    path = stack(files)
    # bilinear: centers of 10 m pixels are a quarter of a 20 m pixel beside its center; at the edge the value is kept
    twenty = np.tile([100, 125, 175, 225, 275, 300], (6, 1))
    assert np.array_equal(read(path), [TEN, twenty, np.full((6, 6), 700)])
    header = read_header(path)
    assert (header.pixel_size, header.bands, header.dtype, header.masked) == (10, 3, "uint16", False)


def test_the_first_file_decides_also_when_it_is_the_coarsest():
    path = stack([band("c.tif", [[700]], 60), band("a.tif", TEN)])
    assert read(path).tolist() == [[[700]], [[TEN.mean()]]]


def test_a_window_of_a_resampled_stack_is_the_same_part_of_the_whole():
    rng = np.random.default_rng(0)
    files = [
        band("a.tif", rng.integers(0, 5000, (600, 600)).astype(np.uint16)),
        band("b.tif", rng.integers(0, 5000, (310, 310)).astype(np.uint16), 20, EAST - 37, NORTH + 53),
    ]
    path, reading = stack(files), Reading(scale=(0.0, 1.0))
    whole = read_pixels(path, 2, reading).values
    for top, left, height, width in ((0, 0, 7, 9), (250, 123, 111, 300), (599, 599, 1, 1), (511, 127, 3, 2)):
        part = read_pixels(path, 2, reading, Window(top, left, height, width)).values
        assert np.array_equal(part, whole[:, top : top + height, left : left + width])


def test_several_dates_of_several_bands_follow_each_other():
    three = np.stack([TEN, TEN + 1, TEN + 2])
    path = stack([band("2018/t.tif", three), band("2019/t.tif", three + 100)])
    assert np.array_equal(read(path), [*three, *(three + 100)])
    assert path.stem == "t"


def test_where_a_file_has_no_pixels_there_is_no_data():
    path = stack([band("a.tif", TEN), band("b.tif", [[100, 200, 300]] * 3, 20, left=EAST + 40)])
    assert used(path, 2).tolist() == [[False] * 4 + [True] * 2] * 6


def test_nodata_values_of_each_file_stay_its_own_and_are_not_mixed_into_others():
    files = [
        band("a.tif", np.where(TEN == 100, 7, TEN).astype(np.uint16), nodata=7),
        band("b.tif", [[9, 200, 300]] * 3, 20, nodata=9),
    ]
    path = stack(files)
    assert read_header(path).nodata == (7, 9)
    # of the pixels of b beside nodata, the centers that lie in valid pixels have their value
    assert read(path)[1, 0].tolist() == [9, 9, 200, 225, 275, 300]
    assert used(path, 2)[:, 0].tolist() == [False] * 6
    assert used(path, 2)[0, 2:].all()


def test_nodata_of_an_entry_is_that_of_files_which_declare_none():
    path = stack([band("a.tif", TEN), band("b.tif", [[0, 200, 300]] * 3, 20)], nodata=0)
    assert read_header(path).nodata == (0, 0)
    assert read(path)[1, 0].tolist() == [0, 0, 200, 225, 275, 300]
    with pytest.raises(InputError, match="nodata -1 is none"):
        stack([band("a.tif", TEN), band("b.tif", TEN)], nodata=-1)


def test_an_inner_mask_and_an_alpha_band_hide_pixels_of_the_whole_stack(tmp_path):
    masked = band("m.tif", TEN)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(masked, "r+") as file:
        file.write_mask(TEN != 100)
    colors = np.stack([TEN, TEN, TEN, np.where(TEN == 110, 0, 255)]).astype(np.uint16)
    alpha = band("rgba.tif", colors)
    with rasterio.open(alpha, "r+") as file:
        file.colorinterp = [*file.colorinterp[:3], ColorInterp.alpha]
    path = stack([masked, alpha])
    assert read_header(path).bands == 4
    assert used(path, 4)[0].tolist() == [False, False, True, True, True, True]
    assert used(path, 4)[1:].all()


def test_files_without_georeference_are_stacked_if_their_size_is_one():
    plain = {"crs": None, "transform": Affine.identity()}
    path = stack([band("a.tif", TEN, **plain), band("b.tif", TEN + 1, **plain)])
    assert np.array_equal(read(path), [TEN, TEN + 1])
    with pytest.raises(
        InputError, match=r"a\.tif is 6 x 6 pixels and .*c\.tif 3 x 3, but .*a\.tif has no georeference"
    ):
        stack([Path("a.tif"), band("c.tif", TEN[:3, :3], **plain)])


def test_files_that_cannot_be_one_image_are_refused_by_name():
    first = band("a.tif", TEN)
    with pytest.raises(InputError, match=r"a\.tif holds uint16 values and .*b\.tif uint8, which have no common range"):
        stack([first, band("b.tif", TEN.astype(np.uint8))])
    with pytest.raises(InputError, match=r"c\.tif and .*a\.tif do not overlap"):
        stack([first, band("c.tif", TEN, left=EAST + 1000)])
    with pytest.raises(InputError, match=r"d\.tif and .*a\.tif have different CRS .*EPSG:32632.*warp: true"):
        stack([first, band("d.tif", TEN, crs=UTM32)])


def test_another_crs_is_warped_on_demand():
    place = transform(UTM33, UTM32, [EAST - 300], [NORTH + 300])
    wide = np.full((70, 70), 500, np.uint16)
    path = stack([band("a.tif", TEN), band("d.tif", wide, left=place[0][0], top=place[1][0], crs=UTM32)], warp=True)
    assert read(path)[1].tolist() == np.full((6, 6), 500).tolist()
    assert used(path, 2).all()
    with rasterio.open(path) as file:
        assert file.crs == CRS.from_string(UTM33)


# Pixels not to use


@pytest.mark.parametrize(
    ("values", "rule", "bad"),
    [
        ([[1, 4, 3], [4, 9, 4], [4, 4, 4]], Quality(values=(1, 3, 9)), {1, 3, 9}),
        ([[1, 21824, 4], [2, 21888, 8], [30048, 16, 22280]], Quality(bits=(0, 1, 2, 3, 4)), {1, 4, 2, 8, 16, 22280}),
    ],
)
def test_a_quality_band_hides_its_pixels_by_value_or_bit_at_its_own_resolution(values, rule, bad):
    kind = np.uint8 if rule.values else np.uint16
    mark = band("q.tif", np.array(values, kind), 20)
    path = stack([band("a.tif", TEN)], quality=(mark, rule))
    wanted = np.array([[value not in bad for value in row] for row in values]).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(used(path, 1), wanted)
    assert np.array_equal(read(path)[0], TEN), "values are kept"


def test_a_broken_file_in_a_stack_is_an_error_not_a_gray_area():
    rng = np.random.default_rng(0)
    many = rng.integers(0, 5000, (300, 300)).astype(np.uint16)
    for size in (10, 20):
        bad = band(f"bad{size}.tif", many, size, compress="deflate")
        path = stack([band("a.tif", many), bad])
        content = bad.read_bytes()
        bad.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"cannot be read as an image"):
            read_pixels(path, 2, Reading(scale=(0.0, 1.0)))


# Which files make an image


def test_patterns_are_paired_by_their_wildcards_and_with_masks():
    for name, kind in itertools.product("xy", ("B2", "B3", "mask")):
        band(f"{name}/{name}_{kind}.tif", (TEN // 100).astype(np.uint8))
    samples = found(["*/*_B2.tif", "*/*_B3.tif"], masks="*/*_mask.tif")
    assert [one.image.name for one in samples] == ["x.vrt", "y.vrt"]
    assert [one.mask and one.mask.name for one in samples] == ["x_mask.tif", "y_mask.tif"]
    assert [one.image.stem for one in found(["*/*_B2.tif", "*/*_B3.tif"], names=["y_B2"])] == ["y"]
    assert found(["*/*_B2.tif", "*/*_B3.tif"], region=[0, 0, 3, 3])[0].region == (0, 0, 3, 3)


def test_folders_are_paired_by_stem_and_lists_of_lists_by_position():
    files = [[str(band(f"{folder}/{name}.tif", TEN)) for folder in ("red", "nir")] for name in ("x", "y")]
    by_folder, by_list = found(["red", "nir"]), found(files)
    assert [one.image for one in by_folder] == [one.image for one in by_list]
    assert [path.parent.name for path in files_behind(by_list[1].image)[1:]] == ["red", "nir"]


def test_a_list_of_files_is_still_a_list_of_images():
    files = [str(band(f"{name}.tif", TEN)) for name in ("x", "y")]
    assert [str(one.image) for one in found(files)] == [str(Path(file).absolute()) for file in files]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["*_B2.tif", "*_B3.tif"], r"y_B2\.tif has no partner in \*_B3\.tif"),
        (["*_B3.tif", "*_B2.tif"], r"y_B2\.tif \(\*_B2\.tif\) has no partner in \*_B3\.tif"),
        (["*_B2.tif", "?_?3.tif"], r"\*_B2\.tif and \?_\?3\.tif cannot be paired"),
        (["*_B2.tif", "*_B9.tif"], "matches no image"),
        ([["x_B2.tif", "x_B3.tif"], ["y_B2.tif"]], "names as many files as the others"),
        ([["x_B2.tif", "none.tif"]], r"none\.tif cannot be read as an image"),
    ],
)
def test_files_without_partner_are_named(images, message):
    for name in ("x_B2", "x_B3", "y_B2"):
        band(f"{name}.tif", TEN)
    with pytest.raises(InputError, match=message):
        found(images)


def test_columns_of_a_manifest_are_bands_in_the_order_of_the_header():
    band("red.tif", TEN), band("nir.tif", TEN + 1), band("mask.tif", (TEN // 100).astype(np.uint8))
    Path("m.csv").write_text("image_nir;image_red;mask\nnir.tif;red.tif;mask.tif\n")
    (sample,) = find_samples(["m.csv"], Path.cwd(), "data.source.train")
    assert np.array_equal(read(sample.image), [TEN + 1, TEN])
    assert sample.mask == Path.cwd() / "mask.tif"
    Path("m.csv").write_text("image_nir,image_red\nnir.tif,\n")
    with pytest.raises(InputError, match=r"m\.csv, line 2: the image_red is empty"):
        find_samples(["m.csv"], Path.cwd(), "data.source.train")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"quality": {"images": "q.tif"}}, "whose quality is"),
        ({"quality": {"images": "q.tif", "bits": [16]}}, "0 to 15"),
        ({"quality": {"images": "q.tif", "bits": [1], "values": [1]}}, "whose quality is"),
        ({"nodata": "file"}, "whose nodata is 'file'; give one number"),
        ({"warp": 1}, "whose warp is 1"),
        ({"images": "a.tif", "warp": True}, "whose warp has no effect"),
        ({"images": [["a.tif"], "b.tif"]}, "whose images is"),
        ({"bands": ["a.tif"]}, "not bands"),
    ],
)
def test_wrong_parts_of_an_entry_are_refused_before_files_are_looked_up(part, message):
    with pytest.raises(InputError, match=message):
        DomainDataConfig(train=[{"images": ["*_a.tif", "*_b.tif"], **part}]).check("data.source.")


def test_a_stack_is_named_by_what_its_files_share():
    names = {
        "LC08_L2SP_185033_20200101_20200823_02_T1_SR": ("SR_B2", "SR_B3"),
        "T33UUP_20230601T100031": ("B02_10m", "B11_20m"),
    }
    for wanted, ends in names.items():
        start = wanted.removesuffix("_SR")
        assert stem_of([Path(f"{start}_{end}.tif") for end in ends]) == wanted
    assert stem_of([Path("2018/a.tif"), Path("2019/a.tif")]) == "a"
    assert stem_of([Path("red.tif"), Path("nir.tif")]) == "red"


# The files behind it


def test_a_digest_covers_the_files_behind_a_virtual_raster_wherever_they_are():
    digests = []
    for folder in ("here", "there"):
        files = [band(f"{folder}/a.tif", TEN), band(f"{folder}/b.tif", TEN[::2, ::2], 20)]
        digests.append(content_digest([Sample(stack(files), None)]))
    assert digests[0] == digests[1]
    path = stack(files)
    band("there/b.tif", TEN[::2, ::2] + 1, 20)  # same size, same header
    assert stack(files) == path
    assert content_digest([Sample(path, None)]) != digests[1]


def test_a_users_own_virtual_raster_is_known_by_its_sources_too(tmp_path):
    band("a.tif", TEN)
    copy("a.tif", "own.vrt", driver="VRT")
    before, state = file_digest(Path("own.vrt")), SharedCache(tmp_path).key([Sample(Path("own.vrt"), None)])
    band("a.tif", TEN + 1)
    assert file_digest(Path("own.vrt")) != before
    assert SharedCache(tmp_path).key([Sample(Path("own.vrt"), None)]) != state


def test_virtual_rasters_that_refer_to_each_other_or_hold_entities_have_a_digest():
    text = '<VRTDataset rasterXSize="2" rasterYSize="2"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>{}</SimpleSource>'
    for one, other in (("a.vrt", "b.vrt"), ("b.vrt", "a.vrt"), ("c.vrt", "c.vrt")):
        name = f'<SourceFilename relativeToVRT="1">{other}</SourceFilename>'
        Path(one).write_text(f"{text.format(name)}</VRTRasterBand></VRTDataset>")
    Path("d.vrt").write_text('<!DOCTYPE a [<!ENTITY b "c">]><VRTDataset/>')
    assert len({file_digest(Path(f"{name}.vrt")) for name in "abcd"}) == 4


def test_equal_stacks_are_written_once_and_a_cache_that_cannot_be_written_is_named(monkeypatch):
    files = [band("a.tif", TEN), band("b.tif", TEN)]
    assert stack(files) == stack(files)
    assert len(list(cache_folder().iterdir())) == 1
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        stack(files)


# Presets


def landsat(root: Path, name: str, qa: int = 21824) -> None:
    """A scene of Collection 2 Level-2 with the files that matter and some that do not."""
    folder = root / name
    for number in range(1, 8):
        band(str(folder / f"{name}_SR_B{number}.TIF"), np.full((6, 6), 8000 + number, np.uint16), 30, nodata=0)
    band(str(folder / f"{name}_ST_B10.TIF"), np.full((6, 6), 1, np.uint16), 30, nodata=0)
    marks = np.full((6, 6), 21824, np.uint16)  # clear
    marks[0, 0] = qa
    band(str(folder / f"{name}_QA_PIXEL.TIF"), marks, 30, nodata=1)
    band(str(folder / f"{name}_QA_RADSAT.TIF"), marks * 0, 30)


TENS, TWENTIES, SIXTIES = ("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12"), ("B01", "B09")
S2_ORDER = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def sentinel(root: Path, baseline: str, tile: str = "T33UUP", scl: int = 9, side: int = 60, seed: int = 0) -> None:
    """A SAFE folder of Level-2A with all its resolutions, as unpacked; `side`: pixels of 10 m."""
    rng = np.random.default_rng(seed)
    product = f"S2A_MSIL2A_20230601T100031_{baseline}_R122_{tile}_20230601T160003.SAFE"
    data = root / product / "GRANULE" / f"L2A_{tile}_A041467_20230601T100559" / "IMG_DATA"
    jp2 = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}
    for size, names in ((10, TENS), (20, (*TENS[:3], *TWENTIES, "SCL")), (60, (*TENS[:3], *TWENTIES, *SIXTIES, "SCL"))):
        for number, name in enumerate(names):
            count = 10 * side // size
            values = (1000 * (number + 1) + rng.integers(0, 900, (count, count))).astype(np.uint16)
            if name == "SCL":
                values = np.full((count, count), 4, np.uint8)
                values[0, 0] = scl
            band(str(data / f"R{size}m" / f"{tile}_20230601T100031_{name}_{size}m.jp2"), values, size, **jp2)
    band(str(data.parents[2] / "other" / "x.jp2"), TEN, **jp2)


def scenes(preset: str) -> list[Sample]:
    return find_samples(filled(DomainDataConfig(preset=preset)).train, Path.cwd(), "data.target.train", "no")


def test_landsat_scenes_are_found_by_their_true_names_with_clouds_left_out():
    landsat(Path("all"), "LC08_L2SP_185033_20200101_20200823_02_T1", qa=22280)  # cloud, high confidence
    landsat(Path(), "LC09_L2SP_185034_20220101_20220823_02_T1", qa=1)  # fill
    landsat(Path(), "LE07_L2SP_185034_20020101_20200823_02_T1")  # other bands
    samples = scenes("landsat_c2")
    assert [one.image.stem for one in samples] == [
        "LC09_L2SP_185034_20220101_20220823_02_T1_SR",
        "LC08_L2SP_185033_20200101_20200823_02_T1_SR",
    ]
    for one in samples:
        assert read(one.image)[:, 0, 1].tolist() == list(range(8001, 8008))
        assert np.argwhere(~used(one.image, 7)).tolist() == [[0, 0]]


def test_sentinel_2_folders_are_found_by_their_true_names_and_baseline():
    sentinel(Path(), "N0509")
    sentinel(Path(), "N0214", tile="T32TQM")
    (new,), (old,) = scenes("sentinel2_l2a"), scenes("sentinel2_l2a_before_0400")
    assert (new.image.stem, old.image.stem) == ("T33UUP_20230601T100031", "T32TQM_20230601T100031")
    with rasterio.open(new.image) as file:
        assert [name.split("_")[2] for name in file.descriptions] == list(S2_ORDER)
        assert file.res == (10, 10)
    assert np.argwhere(~used(new.image, 10)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert [path.suffix for path in files_behind(new.image)].count(".jp2") == 11


@pytest.mark.parametrize(
    ("preset", "dn", "reflectance"),
    [
        ("landsat_c2", 18_182, 0.0000275 * 18_182 - 0.2),
        ("sentinel2_l2a", 4000, 0.3),
        ("sentinel2_l2a_before_0400", 4000, 0.4),
    ],
)
def test_the_scale_of_a_preset_gives_reflectance(preset, dn, reflectance):
    low, high = filled(DomainDataConfig(preset=preset)).scale
    assert (dn - low) / (high - low) == pytest.approx(reflectance, abs=1e-7)


# Jobs


def test_predict_maps_are_named_and_placed_by_the_files_and_never_replace_them():
    landsat(Path("in/a"), "LC08_L2SP_185033_20200101_20200823_02_T1")
    landsat(Path("in/b"), "LC08_L2SP_185033_20200202_20200823_02_T1")
    work = find_work([{"preset": "landsat_c2", "root": "in"}], "out/", [], False)
    assert [str(output.relative_to(Path.cwd())) if output.is_absolute() else str(output) for _, output in work] == [
        f"out/{folder}/LC08_L2SP_185033_{date}_20200823_02_T1/LC08_L2SP_185033_{date}_20200823_02_T1_SR.tif"
        for folder, date in (("a", "20200101"), ("b", "20200202"))
    ]
    band("x_B2.tif", TEN), band("x_B3.tif", TEN)
    text = "{images: ['*_B2.tif', '*_B3.tif']}"
    ((image, output),) = find_work([text], "map.tif", [], False)
    assert (image.stem, output) == ("x", Path("map.tif"))
    with pytest.raises(InputError, match="which is the input"):
        find_work([text], "x_B3.tif", [], True)
    with pytest.raises(InputError, match="masks has no effect here"):
        find_work([{"images": ["*_B2.tif", "*_B3.tif"], "masks": "m"}], "map.tif", [], False)
    with pytest.raises(InputError, match="beside preset it takes scene and root"):
        find_work([{"preset": "landsat_c2", "folder": "in"}], "out/", [], False)
    with pytest.raises(InputError, match="matches no image"):
        find_work([{"preset": "landsat_c2", "root": "none"}], "out/", [], False)


@pytest.mark.slow
def test_the_documented_training_and_maps_of_satellite_scenes(workplace, capsys):
    sentinel(Path("b"), "N0509", side=120, seed=1)
    rng = np.random.default_rng(2)
    for place in ("a", "a/val"):
        for name in ("x", "y"):
            values = rng.integers(0, 3000, (4, 64, 64)).astype(np.uint16)
            for number, folder in enumerate(("B02", "B03", "B04", "B08")):
                band(f"{place}/{folder}/{name}.tif", values[number])
            band(f"{place}/fields/{name}.tif", (values[3] > 1500).astype(np.uint8))
    text = block("docs/bands-in-files.md", "# satellite.yaml")
    Path("satellite.yaml").write_text(text.replace("/data/country_a", "a").replace("/data/country_b", "b"))
    left_out = ("data.", "model.classes", "monitor.")
    small = {key: value for key, value in small_settings(Path()).items() if not key.startswith(left_out)}
    options = [
        word
        for key, value in small.items()
        for word in (f"--{key}", yaml.safe_dump(value, default_flow_style=True).split("\n")[0])
    ]
    shorter = ["--data.window_size", "64", "--data.source.batch_size", "2", "--data.target.batch_size", "2"]
    report = check_data(load_config("satellite.yaml", {"model.encoder_weights": None, "data.window_size": 64}))
    assert [text for text in report.remarks if "made of several files" in text] == [
        "data.source.train: 2 of 2 images are made of several files; the first of B02/x.tif, B03/x.tif, B04/x.tif, B08/x.tif.",
        "data.source.val: 2 of 2 images are made of several files; the first of B02/x.tif, B03/x.tif, B04/x.tif, B08/x.tif.",
        "data.target.train: 1 of 1 images are made of several files; the first of "
        + ", ".join(f"T33UUP_20230601T100031_{name}_{10 if name in TENS else 20}m.jp2" for name in (*S2_ORDER, "SCL")) + ".",
    ]  # fmt: skip
    assert main(["adapt", "--config", "satellite.yaml", *options, *shorter]) == 0
    run = re.findall(r"\b[0-9a-f]{32}\b", capsys.readouterr().out)[0]
    scene = "{preset: sentinel2_l2a, root: b}"
    assert (
        main(["predict", "--model", f"runs:/{run}", "--input", scene, "--output", "maps/", "--accelerator", "cpu"]) == 0
    )
    (path,) = Path("maps").rglob("*.tif")
    assert path.stem == "T33UUP_20230601T100031"
    with rasterio.open(path) as file:
        assert (file.res, file.shape, file.crs) == ((10, 10), (120, 120), CRS.from_string(UTM33))
        nodata = file.read(1) == file.nodata
    assert np.argwhere(nodata).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]], "the cloud of SCL, of 20 m"


@pytest.mark.slow
def test_scenes_of_three_resolutions_and_polygons_go_in_and_polygons_come_out(workplace, capsys):
    """The documented example: fields as GeoJSON in another CRS, a cloud, maps as GeoPackage with a STAC item."""
    sentinel(Path("country_a"), "N0509", side=120, scl=9)
    sentinel(Path("country_b"), "N0509", side=120, scl=9, seed=1)
    boxes = [shapely.box(EAST + left, NORTH - 900, EAST + left + 300, NORTH - 300) for left in (100, 500, 900)]
    write_polygons(Path("country_a/fields.geojson"), boxes, ["maize", "winter wheat", "unknown"], UTM33)
    Path("crops.yaml").write_text(block("docs/bands-in-files.md", "# crops.yaml"))
    left_out = ("data.", "model.classes", "model.in_channels", "monitor.")
    small = {key: value for key, value in small_settings(Path()).items() if not key.startswith(left_out)}
    small |= {"trainer.max_epochs": 1, "pretraining.max_epochs": 1, "data.window_size": 64, "data.crop_size": 32}
    small |= {"data.source.batch_size": 2, "data.target.batch_size": 2, "monitor.metric": None}
    options = [
        word
        for key, value in small.items()
        for word in (f"--{key}", yaml.safe_dump(value, default_flow_style=True).split("\n")[0])
    ]
    assert main(["check-data", "--config", "crops.yaml", *options]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "country_a/fields.geojson: 3 features (1 maize, 1 wheat, 1 ignored)" in told
    assert main(["adapt", "--config", "crops.yaml", *options]) == 0
    run = re.findall(r"\b[0-9a-f]{32}\b", capsys.readouterr().out)[0]
    command = next(
        line
        for line in (Path(__file__).parents[1] / "docs" / "bands-in-files.md").read_text().splitlines()
        if "--vector gpkg" in line
    )
    words = shlex.split(command.replace("RUN_ID", run))[1:]
    assert main([*words, "--accelerator", "cpu", "--tile_size", "64"]) == 0
    (path,) = Path("maps").rglob("*.gpkg")
    with rasterio.open(path.with_suffix(".tif")) as file:
        classes, counts = np.unique(file.read(1), return_counts=True)
        assert file.shape == (120, 120)
    meta, _, shapes, (ids, names, areas, _) = pyogrio.raw.read(path)
    assert (meta["crs"], set(names)) == (UTM33, {["other", "maize", "wheat"][one] for one in ids})
    assert areas.sum() == pytest.approx(100 * counts[classes != 255].sum())  # square meters, none twice
    assert shapely.area(shapely.from_wkb(shapes)).sum() == pytest.approx(areas.sum())
    item = json.loads(path.with_suffix(".stac.json").read_text())
    assert set(item["assets"]) == {"map", "polygons"}
    assert len([link for link in item["links"] if link["rel"] == "derived_from"]) == 4
