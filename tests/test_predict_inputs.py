"""What `predict` takes: one image or many, from wherever they lie on the disk, of every kind; and how they are read."""

from __future__ import annotations

import functools
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from mlflow.projects._project_spec import load_project
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from test_predict import BYTES, assert_nearly_equal, make_network, picture, read, run, save, wanted_map, write_tiff

from dann_experiments.__main__ import main
from dann_experiments.config import InputError
from dann_experiments.config.parsing import load_settings
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.reading import Normalization, Reading

PROJECT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
network = functools.cache(make_network)


@pytest.fixture
def model(workplace: Path) -> str:
    return str(save("model", network()))


def scene(path: str, seed: int = 0) -> Path:
    """A small GeoTIFF, or a PNG or JPEG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    values = picture(40, 48, seed=seed)
    if Path(path).suffix == ".tif":
        return write_tiff(path, values)
    Image.fromarray(values.transpose(1, 2, 0)).save(path)
    return Path(path)


def below(folder: str) -> list[str]:
    """The files of a folder and its subfolders, without the styles beside maps."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix != ".qml"
    )


def command(*arguments: str) -> int:
    return main(["predict", "--accelerator", "cpu", "--tile_size", "64", "--progress", "false", *arguments])


def test_every_file_that_was_written_is_named(model, capsys):
    write_tiff("image.tif", picture(60, 60))
    more = ("--confidence", "entropy", "--vector", "gpkg", "--stac", "--stac_datetime", "2024-05-01T00:00:00Z")
    assert command("--model", model, "--input", "image.tif", "--output", "map.tif", *more) == 0
    written = "Written: map.tif, map_confidence.tif, map.stac.json, map.gpkg, map.qml\n"
    assert written in capsys.readouterr().out
    assert command("--model", model, "--input", "image.tif", "--output", "map.tif", "--overwrite") == 0
    assert "Written: map.tif, map.qml\n" in capsys.readouterr().out  # the others are of the run before


# Which bands, which values are no data, how large a pixel is


@pytest.mark.parametrize("given", ["1,2,3", "[1,2,3]", "[1, 2, 3]", [1, 2, 3]])
def test_bands_choose_from_an_image_with_more_bands_than_the_model_takes(model, given):
    write_tiff("three.tif", picture(60, 60, bands=4)[:3])
    write_tiff("four.tif", picture(60, 60, bands=4), photometric="MINISBLACK")
    run(model=model, input="three.tif", output="three_map.tif")
    run(model=model, input="four.tif", output="four_map.tif", bands=given)
    np.testing.assert_array_equal(read("four_map.tif"), read("three_map.tif"))


def test_bands_replace_the_models_own_and_keep_their_order(workplace):
    save("own", network(), Reading(bands=(4, 1, 2)))
    save("plain", network())
    values = picture(60, 60, bands=5)
    write_tiff("five.tif", values)
    write_tiff("turned.tif", values[[4, 2, 0]])
    run(model="own", input="five.tif", output="five_map.tif", bands=[5, 3, 1])
    run(model="plain", input="turned.tif", output="turned_map.tif")
    np.testing.assert_array_equal(read("five_map.tif"), read("turned_map.tif"))


def test_a_single_band_may_be_named_without_a_list():
    assert load_settings(PredictConfig, None, {"model": "m", "input": "a", "output": "b", "bands": "4"}).bands == [4]
    assert load_settings(
        PredictConfig, None, {"model": "m", "input": "a", "output": "b", "nodata": "0,255"}
    ).nodata == [0, 255]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bands": [1, 2]}, r"bands is \[1, 2\].*needs 3"),
        ({"bands": [0, 1, 2]}, r"bands is \[0, 1, 2\].*from 1"),
        ({"bands": []}, r"bands is \[\]"),
        ({"file_pixel_size": 0.5}, "file_pixel_size is 0.5.*no effect"),
        ({"file_pixel_size": -1}, "file_pixel_size is -1"),
    ],
)
def test_settings_of_reading_that_cannot_be_meant_are_refused_before_a_run_is_opened(model, given, message):
    write_tiff("four.tif", picture(60, 60, bands=4), photometric="MINISBLACK")
    with pytest.raises(InputError, match=message):
        run(model=model, input="four.tif", output="map.tif", **given)
    assert not Path("outputs").exists()


def test_an_image_of_four_bands_is_refused_with_the_settings_that_predict_has(model, capsys):
    write_tiff("four.tif", picture(60, 60, bands=4), photometric="MINISBLACK")
    assert command("--model", model, "--input", "four.tif", "--output", "map.tif") == 2
    said = capsys.readouterr().err
    assert "four.tif has 4 bands" in said
    assert "takes 3" in said
    assert "--bands 1,2,3" in said
    assert "data." not in said
    assert "in_channels" not in said
    assert command("--model", model, "--input", "four.tif", "--output", "map.tif", "--bands", "1,2,3") == 0


def test_nodata_says_which_values_hold_no_data(model):
    image = np.maximum(picture(60, 60), 1)
    image[:, :20] = 0
    write_tiff("untold.tif", image)
    run(model=model, input="untold.tif", output="untold_map.tif", nodata=0)
    assert (read("untold_map.tif")[0] == 255).sum() == 20 * 60
    write_tiff("told.tif", image, nodata=0)
    run(model=model, input="told.tif", output="told_map.tif", nodata=[])
    assert (read("told_map.tif")[0] != 255).all()


def test_file_pixel_size_says_how_large_the_pixels_of_an_image_without_georeference_are(workplace):
    save("coarse", network(), Reading(pixel_size=1.0))
    values = picture(80, 80)
    write_tiff("placed.tif", values, transform=Affine(0.5, 0, 0, 0, -0.5, 0))
    Image.fromarray(values.transpose(1, 2, 0)).save("bare.png")
    with pytest.raises(InputError, match=r"bare\.png.*file_pixel_size") as error:
        run(model="coarse", input="bare.png", output="bare_map.png")
    assert "data." not in str(error.value)
    run(model="coarse", input="placed.tif", output="placed_map.tif")
    run(model="coarse", input="bare.png", output="bare_map.png", file_pixel_size=0.5)
    np.testing.assert_array_equal(read("bare_map.png"), read("placed_map.tif"))


def test_a_map_of_before_these_settings_is_known_as_finished(model):
    """The signature does not depend on what the new settings are called."""
    from dann_experiments.jobs.load_model import load_model
    from dann_experiments.prediction.scene import Options, Scene

    scene("a.tif")
    found = load_model(model, "target", None, None)  # pyright: ignore[reportArgumentType]
    older = replace(
        found, reading=replace(found.reading, nodata_bands="all")
    )  # as models were read before there was a choice
    facts = Scene.open(Path("a.tif"), Path("b.tif"), older, Options()).facts
    assert set(facts["reading"]) == {"bands", "scale", "nodata", "pixel_size", "file_pixel_size"}


# Which images


def test_several_images_are_mapped_into_a_folder(model):
    for name in ("a.tif", "b.jpg", "c.png"):
        scene(name)
    assert command("--model", model, "--input", "a.tif", "b.jpg", "--output", "maps") == 0
    assert below("maps") == ["a.tif", "b.png"]
    result = run(model=model, input=["a.tif", "c.png"], output="more")
    assert [path.as_posix() for path in result.outputs] == ["more/a.tif", "more/c.png"]


def test_input_may_be_given_several_times(model):
    scene("a.tif")
    scene("b.tif")
    assert command("--model", model, "--input", "a.tif", "--input=b.tif", "--output", "maps") == 0
    assert below("maps") == ["a.tif", "b.tif"]


def test_a_pattern_names_images_and_one_match_may_have_a_map_of_any_name(model):
    for name in ("scenes/a.tif", "scenes/b.tif", "scenes/c.png", "scenes/deep/d.tif"):
        scene(name)
    Path("scenes/notes.txt").write_text("no image")
    assert command("--model", model, "--input", "scenes/*.tif", "--output", "maps") == 0
    assert below("maps") == ["a.tif", "b.tif"]
    run(model=model, input="scenes/**/*.tif", output="all")
    assert below("all") == ["a.tif", "b.tif", "deep/d.tif"]
    run(model=model, input="scenes/*.png", output="one.png")
    assert Path("one.png").is_file()
    run(model=model, input=["scenes/a.tif"], output="folder/")
    assert below("folder") == ["a.tif"]


def test_folders_are_searched_below_and_mirrored(model):
    for name in ("scenes/a.tif", "scenes/north/a.tif", "scenes/north/east/b.PNG"):
        scene(name) if not name.endswith("PNG") else scene("scenes/north/east/c.png")
    run(model=model, input="scenes", output="maps")
    assert below("maps") == ["a.tif", "north/a.tif", "north/east/c.png"]


def test_equal_names_from_different_folders_do_not_overwrite_each_other(model):
    scene("north/a.tif", seed=1)
    scene("south/a.tif", seed=2)
    for number, given in enumerate(
        (["north/a.tif", "south/a.tif"], ["north", "south"], "*/a.tif", ["north/", "south/a.tif"])
    ):
        run(model=model, input=given, output=f"maps_{number}")
        assert below(f"maps_{number}") == ["north/a.tif", "south/a.tif"]
    assert (read("maps_0/north/a.tif") != read("maps_0/south/a.tif")).any()


def test_an_image_that_is_named_twice_is_mapped_once(model):
    scene("scenes/a.tif")
    result = run(
        model=model, input=["scenes/a.tif", "scenes", "scenes/*.tif", "./scenes/../scenes/a.tif"], output="maps"
    )
    assert len(result.outputs) == 1


def test_what_is_no_image_of_the_users_is_passed_over(model):
    scene("scenes/a.tif")
    for name in (".b.tif", ".hidden/c.tif", "old.tif.partial/map.tif"):
        scene(f"scenes/{name}")
    for name in ("a.tif.aux.xml", "a.tif.ovr", "a.tif.msk", "Thumbs.db"):
        (Path("scenes") / name).write_bytes(b"beside")
    for _ in range(2):
        assert len(run(model=model, input="scenes", output="scenes/maps").outputs) == 1
        assert len(run(model=model, input="scenes/**/*.tif", output="scenes/maps").outputs) == 1
    assert len(run(model=model, input="scenes", output="elsewhere", probabilities=True).outputs) == 1
    assert len(run(model=model, input=".", output="third").outputs) == 1
    assert below("scenes/maps") == ["a.tif"]


def test_images_below_the_output_folder_are_images(model):
    scene("maps/raw/a.tif")
    run(model=model, input="maps/raw", output="maps")
    assert below("maps") == ["a.tif", "raw/a.tif"]
    scene("maps/raw/b.tif")
    run(model=model, input="maps/raw/b*.tif", output="maps")
    assert below("maps") == ["a.tif", "b.tif", "raw/a.tif", "raw/b.tif"]


def test_a_folder_linked_into_itself_ends(model):
    scene("scenes/a.tif")
    Path("scenes/again").symlink_to(Path("scenes").resolve(), target_is_directory=True)
    Path("other").mkdir()
    scene("far/b.tif")
    Path("scenes/far").symlink_to(Path("far").resolve(), target_is_directory=True)
    run(model=model, input="scenes", output="maps")
    assert below("maps") == ["a.tif", "far/b.tif"]


@pytest.mark.parametrize(
    "text", ["a.tif,b.tif", "a.tif, b.tif", "a.tif b.tif", "[a.tif, b.tif]", "a.tif,[b].tif", "a*.tif,b.tif"]
)
def test_one_text_may_list_images_as_mlflow_run_gives_it(model, text):
    scene("a.tif")
    scene("b.tif")
    entry: Any = load_project(str(PROJECT)).get_entry_point("predict")
    given = {"model": model, "input": text, "output": "maps", "bands": "1,2,3", "accelerator": "cpu", "tile_size": "64"}
    assert main(shlex.split(entry.compute_command(given, None))[3:]) == 0
    assert below("maps") == ["a.tif", "b.tif"]


@pytest.mark.parametrize("name", ["a, b.tif", "a b.tif", "a[1].tif", "2026.tif", "[a].tif", "no"])
def test_a_name_with_a_comma_a_blank_or_a_bracket_that_exists_is_that_file(model, name):
    scene("a.tif")
    scene("b.tif")
    if name == "no":
        scene("no/c.tif")
    else:
        scene(name)
    for number, given in enumerate((name, [name])):
        result = run(model=model, input=given, output=f"map_{number}" if name == "no" else f"map_{number}.tif")
        assert len(result.outputs) == 1


def test_a_list_that_can_be_read_in_two_ways_is_refused(model):
    for name in ("a b", "c", "a", "b,c"):
        scene(f"{name}/x.tif")
    with pytest.raises(InputError, match=r"input is 'a b,c'.*two ways"):
        run(model=model, input="a b,c", output="maps")


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("absent/*.tif", "maps", r"absent/\*\.tif.*matches no image"),
        ("*.txt", "maps", r"\*\.txt.*matches no image"),
        (["a.tif", "absent.tif", "none/*.png"], "maps", r"absent\.tif.*none/\*\.png"),
        ("a.tif,absent.tif", "maps", r"a\.tif,absent\.tif.*does not exist"),
        (["a.tif", "b.tif"], "map.tif", r"2 images.*map\.tif.*folder"),
        ("*.tif", "map.tif", r"2 images.*map\.tif.*folder"),
        (["a.tif", "b.tif"], ".", r"a\.tif.*itself"),
        ("*.tif", ".", r"a\.tif.*itself"),
        ([], "maps", "input is not set"),
        ([""], "maps", "input is not set"),
        ("empty", "maps", "empty.*holds no images"),
        (["a.tif", "empty"], "maps", "empty.*holds no images"),
        ("twins", "maps", r"one\.(png|jpg) and .*one\.(png|jpg)"),
        ("a.tif", "map.jpg", "JPEG would change"),
        (["a.tif", "b.tif"], "a.tif/maps", "cannot be written"),
    ],
)
def test_inputs_that_name_no_image_or_no_place_are_told_before_a_run_is_opened(model, given, output, message):
    scene("a.tif")
    scene("b.tif")
    scene("twins/one.png")
    scene("twins/one.jpg")
    Path("empty").mkdir()
    Path("notes.txt").write_text("no image")
    before = below(".")
    with pytest.raises(InputError, match=f"(?s){message}"):
        run(model=model, input=given, output=output)
    assert below(".") == before


def test_a_place_that_a_file_takes_is_told(model):
    scene("north/a.tif")
    scene("south/a.tif")
    Path("maps").mkdir()
    Path("maps/north").write_text("in the way")
    with pytest.raises(InputError, match="maps/north"):
        run(model=model, input=["north", "south"], output="maps")


def test_input_without_a_value_is_told(workplace, capsys):
    assert command("--model", "m", "--output", "maps", "--input") == 2
    assert "--input has no value" in capsys.readouterr().err


def test_many_inputs_are_kept_with_the_run(model):
    scene("a.tif")
    scene("b.tif")
    result = run(model=model, input=["a.tif", "b.tif"], output="maps")
    assert result.artifacts is not None
    assert yaml.safe_load((Path(result.artifacts) / "config.yaml").read_text())["input"] == ["a.tif", "b.tif"]


# Images of every kind


def with_colours(path: str, values: np.ndarray, *colours: ColorInterp, **more: Any) -> str:
    bands, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=values.dtype, **more
    ) as file:
        file.write(values)
        if colours:
            file.colorinterp = colours
    return path


def test_an_alpha_band_is_no_band(model):
    values = np.concatenate([picture(60, 60), np.full((1, 60, 60), 255, np.uint8)])
    values[3, :10] = 0
    red, green, blue, alpha = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
    with_colours("alpha.tif", values, red, green, blue, alpha)
    run(model=model, input="alpha.tif", output="map.tif")
    assert (read("map.tif")[0] == 255).sum() == 600


@pytest.mark.parametrize("bands", [None, (1, 2, 3)])
def test_one_grey_band_and_a_palette_are_colours_for_a_model_of_three_bands(workplace, bands):
    """Whether the model was trained on all three bands or on the first three by name."""
    save("model", network(), Reading(bands=bands))
    grey = picture(60, 60, bands=1)
    write_tiff("grey.tif", grey)
    write_tiff("colour.tif", grey.repeat(3, axis=0))
    image = Image.fromarray(picture(60, 60).transpose(1, 2, 0)).quantize(64)
    image.save("palette.png")
    write_tiff("rgb.tif", np.array(image.convert("RGB")).transpose(2, 0, 1))
    for one, other in (("grey.tif", "colour.tif"), ("palette.png", "rgb.tif")):
        run(model="model", input=one, output=f"{one}_map.tif")
        run(model="model", input=other, output=f"{other}_map.tif")
        np.testing.assert_array_equal(read(f"{one}_map.tif"), read(f"{other}_map.tif"))


def test_inks_are_no_colours(model):
    """Of a CMYK image the first three bands would be a negative."""
    ink = np.array(Image.fromarray(picture(60, 60).transpose(1, 2, 0)).convert("CMYK"))
    Image.fromarray(ink, "CMYK").save("ink.tif")
    write_tiff("colour.tif", picture(60, 60))
    for name in ("ink.tif", "colour.tif"):  # GDAL gives 8 bit inks as colours
        run(model=model, input=name, output=f"{name}_map.tif")
    np.testing.assert_array_equal(read("ink.tif_map.tif"), read("colour.tif_map.tif"))
    write_tiff("deep.tif", ink.transpose(2, 0, 1).astype(np.uint16) * 257, photometric="CMYK")
    with pytest.raises(InputError, match=r"deep\.tif is in CMYK.*RGB") as error:
        run(model=model, input="deep.tif", output="map.tif")
    assert "1,2,3" not in str(error.value)


def test_a_floating_point_image_for_a_model_of_bytes_says_that_it_must_be_converted(model):
    write_tiff("float.tif", picture(60, 60).astype(np.float32))
    with pytest.raises(InputError, match=r"float\.tif holds float32 values.*8 or 16 bit.*convert") as error:
        run(model=model, input="float.tif", output="map.tif")
    assert "set" not in str(error.value)


def test_an_image_that_uses_little_of_its_16_bits_is_told(model, caplog):
    write_tiff("full.tif", picture(60, 60).astype(np.uint16) * 257)
    write_tiff("dark.tif", picture(60, 60).astype(np.uint16) * 12)
    with caplog.at_level(logging.WARNING):
        run(model=model, input="full.tif", output="full_map.tif")
        assert "full.tif" not in caplog.text
        run(model=model, input="dark.tif", output="dark_map.tif")
    assert "dark.tif" in caplog.text
    assert "nearly black" in caplog.text


def test_an_image_without_data_gives_a_map_without_data_and_says_so(workplace, caplog):
    ranged = Normalization((0.0,) * 3, (1.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    save("floats", network(), Reading(scale=(0.0, 1.0)), ranged)
    write_tiff("nothing.tif", np.full((3, 40, 40), np.nan, np.float32))
    with caplog.at_level(logging.WARNING):
        run(model="floats", input="nothing.tif", output="map.tif")
    assert (read("map.tif") == 255).all()
    assert "nothing.tif holds no data" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (10, 3000), (3000, 10), (1, 700)])
def test_images_of_odd_sizes_have_the_right_map(model, size):
    path = write_tiff("odd.tif", picture(*size))
    run(model=model, input="odd.tif", output="map.tif")
    found, wanted = read("map.tif")[0], wanted_map(network(), path, Reading(), BYTES)
    assert found.shape == size
    assert (found != wanted).mean() < 0.002


def test_a_model_trained_on_other_values_reads_an_image_as_it_learned(workplace):
    """Signed values have a range of their own."""
    ranged = Normalization((-1000.0,) * 3, (1000.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    save("signed", network(), Reading(scale=(-1000.0, 1000.0)), ranged)
    path = write_tiff("signed.tif", ((picture(300, 300).astype(np.int16) - 128) * 8).astype(np.int16))
    run(model="signed", input="signed.tif", output="map.tif")
    assert_nearly_equal(read("map.tif")[0], wanted_map(network(), path, Reading(scale=(-1000.0, 1000.0)), ranged))
