"""Whole predictions on real files: what the maps hold, that an interrupted one goes on, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import rasterio
import segmentation_models_pytorch as smp
import torch
from filelock import FileLock
from PIL import Image
from rasterio.transform import Affine
from torch import nn

from dann_experiments.checkpoints.saved_model import save_model
from dann_experiments.config import InputError, load_config
from dann_experiments.config.description import help_text
from dann_experiments.config.parsing import load_settings
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.reading import Normalization, Reading, reading_facts
from dann_experiments.jobs.predict import PredictResult, predict
from dann_experiments.prediction import scene
from dann_experiments.reports.colors import class_colors

PROJECT = Path(__file__).parents[1]
NAMES = ["ground", "roof", "tree"]
PLACE = Affine(0.5, 0.1, 500_000, 0.1, -0.5, 5_000_000)  # turned a little
BYTES = Normalization((0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.25,) * 3)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a store, made the current one: a new store takes seconds."""
    folder = tmp_path_factory.mktemp("predict")
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MLFLOW_")}
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    os.environ.update(kept)


@pytest.fixture(autouse=True)
def _here(place: Path) -> None:
    """Every test works in `place`."""


def store() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")


def runs() -> list[Any]:
    if not Path("mlflow.db").exists():
        return []
    return list(store().search_runs([experiment.experiment_id for experiment in store().search_experiments()]))


def picture(height: int, width: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    """(bands, height, width) uint8 of soft patches with some noise."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(1, bands, height // 12 + 3, width // 12 + 3)))
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].numpy()
    return np.clip(128 + 45 * smooth + rng.normal(size=smooth.shape) * 4, 0, 255).astype(np.uint8)


def write_tiff(path: Path | str, values: np.ndarray, **profile: Any) -> Path:
    """A GeoTIFF of (bands, height, width)."""
    facts = {"crs": "EPSG:32633", "transform": PLACE, **profile}
    bands, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=values.dtype, **facts
    ) as file:
        file.write(values)
    return Path(path)


ARGUMENTS = {"encoder_name": "tu-test_resnet", "in_channels": 3, "encoder_depth": 3, "decoder_channels": [16, 8, 8]}


def make_network(bands: int = 3, classes: int = 3, seed: int = 0) -> nn.Module:
    """A network that gives each class some of a `picture`."""
    torch.manual_seed(seed)
    network = smp.create_model(
        "unet", encoder_weights=None, classes=classes, **(ARGUMENTS | {"in_channels": bands})
    )  # fmt: skip
    image = torch.from_numpy(picture(256, 256, bands)).float()[None].div(255).sub(0.5).div(0.25)
    with torch.no_grad():
        for _ in range(20):  # BatchNorm statistics of such pictures
            network(image)
        network.eval()
        network.segmentation_head[0].bias.data -= network(image).mean((0, 2, 3))
    return network


def save(
    folder: str, network: nn.Module, reading: Reading | None = None, normalisation: Normalization = BYTES, **facts: Any
) -> Path:
    """The saved model, which reads target images as `reading` and `normalisation` say."""
    bands, classes = network.encoder.out_channels[0], network.segmentation_head[0].out_channels
    names = [*NAMES, *(f"class_{index}" for index in range(3, classes))][:classes]
    notes = {
        "class_names": names,
        "ignore_index": 255,
        "reading": {"target": reading_facts(reading or Reading(), normalisation)},
    }
    save_model(folder, network, "unet", ARGUMENTS | {"in_channels": bands, "classes": classes}, notes | facts)
    return Path(folder)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return make_network()


@pytest.fixture(scope="module")
def model(place: Path, network: nn.Module) -> str:
    return str(save("model", network))


def run(**given: Any) -> PredictResult:
    settings = {"tile_size": 256, "overlap": 128, "accelerator": "cpu", "progress": False, **given}
    return predict(load_settings(PredictConfig, None, settings))


def read(path: str | Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def wanted_map(network: nn.Module, path: Path, reading: Reading, normalisation: Normalization) -> np.ndarray:
    """(h, w) class ids of the whole image in one forward, on the working grid; 255 where there is no data.

    Sides longer than a tile (256) are filled up to the network's grid of 8 pixels, as tiles that reach beyond the image are.
    """
    values, valid = read_pixels(path, network.encoder.out_channels[0], reading)
    image = torch.from_numpy(normalisation(values, valid))[None]
    height, width = image.shape[2:]
    fill = [-side % 8 if side > 256 else 0 for side in (width, height)]
    image = nn.functional.pad(image, (0, fill[0], 0, fill[1]), mode="replicate")
    network.eval()
    with torch.no_grad():
        ids = network(image)[0, :, :height, :width].argmax(0).numpy().astype(np.uint8)
    if valid is not None:
        ids[~valid] = 255
    return ids


def assert_nearly_equal(found: np.ndarray, wanted: np.ndarray) -> None:
    """All classes are there, no data is exact, and hardly a pixel differs (the network sees a little beyond the overlap)."""
    assert found.shape == wanted.shape
    assert set(np.unique(wanted)) >= {0, 1, 2}
    np.testing.assert_array_equal(found == 255, wanted == 255)
    assert (found != wanted).mean() < 0.002


def test_a_map_is_a_cloud_optimized_geotiff_on_the_grid_of_its_image_and_the_untiled_map(model, network):
    image = np.maximum(picture(700, 610), 1)
    image[:, 100:150, :300] = 0
    source = write_tiff("scene.tif", image, nodata=0)
    result = run(model=model, input="scene.tif", output="maps/scene.tif", probabilities=True)
    assert result.outputs == (Path("maps/scene.tif"),)
    with rasterio.open("maps/scene.tif") as file, rasterio.open(source) as given:
        assert (file.crs, file.transform, file.shape) == (given.crs, given.transform, given.shape)
        assert (file.count, file.dtypes, file.nodata, file.descriptions) == (1, ("uint8",), 255, ("class",))
        assert file.driver == "GTiff"
        assert file.profile["tiled"]
        assert file.overviews(1)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert json.loads(file.tags()["class_names"]) == NAMES
        assert [file.tags(1)[f"class_{index}"] for index in range(3)] == NAMES
        assert file.tags()["model"] == model
        assert file.tags()["software"].startswith("dann_experiments ")
        colours = (class_colors(3) * 255).round().astype(int).tolist()
        assert [list(file.colormap(1)[index][:3]) for index in range(3)] == colours
        ids = file.read(1)
    wanted = wanted_map(network, source, Reading(), BYTES)
    assert (wanted == 255).sum() == 50 * 300
    assert_nearly_equal(ids, wanted)
    with rasterio.open("maps/scene_probabilities.tif") as file:
        assert (file.count, file.dtypes[0], file.nodata, list(file.descriptions)) == (3, "uint8", 255, NAMES)
        assert file.scales == (1 / 254,) * 3
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        stored = file.read()
    assert (stored[:, ids == 255] == 255).all()
    data = stored[:, ids != 255].astype(int)
    assert abs(data.sum(0) - 254).max() <= 2  # rounded
    assert (data[ids[ids != 255], np.arange(data.shape[1])] >= data.max(0) - 1).all()
    assert sorted(path.name for path in Path("maps").iterdir()) == ["scene.qml", "scene.tif", "scene_probabilities.tif"]


def test_the_run_shows_settings_shares_and_a_preview(model):
    write_tiff("shown.tif", picture(300, 200))
    result = run(model=model, input="shown.tif", output="shown_map.tif")
    found = store().get_run(result.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["dann.job"] == "predict"
    assert found.data.params["cfg.tile_size"] == "256"
    assert found.data.metrics["predict/pixels_per_second"] > 0
    assert result.artifacts is not None
    lines = (Path(result.artifacts) / "tables" / "class_shares.csv").read_text().splitlines()
    ids = read("shown_map.tif")
    assert lines[0] == "class,pixels,share"
    for index, name in enumerate(NAMES):
        pixels = int((ids == index).sum())
        assert lines[1 + index] == f"{name},{pixels},{pixels / ids.size:.6f}"
        assert result.class_pixels[name] == pixels
    assert lines[4] == "(no data),0,"
    assert min(Image.open(Path(result.artifacts) / "figures" / "preview.png").size) > 300
    assert (Path(result.artifacts) / "config.yaml").is_file()


SCRIPT = """
import json, sys, torch
from dann_experiments.config.parsing import load_settings
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.jobs.predict import predict
torch.set_num_threads(1)
predict(load_settings(PredictConfig, None, json.loads(sys.argv[1])))
"""


def start(**given: Any) -> subprocess.Popen:
    """A process of its own that predicts."""
    settings = {"tile_size": 64, "batch_size": 2, "accelerator": "cpu", "progress": False, **given}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)], env=os.environ | {"PYTHONPATH": str(PROJECT)}
    )


def end_midway(process: subprocess.Popen, partial: Path, how: signal.Signals, rows: int = 3) -> int:
    """Signal the process when some rows of tiles are done; how many the state says are."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (partial / "state.json").exists() and json.loads((partial / "state.json").read_text())["rows"] >= rows:
            process.send_signal(how)
            break
        time.sleep(0.002)
    process.wait(60)
    return json.loads((partial / "state.json").read_text())["rows"]


@pytest.fixture(scope="module")
def killed(place: Path, model: str) -> tuple[dict[str, Any], int]:
    """Settings of a prediction that SIGKILL ended in the middle (all but the output), and rows of tiles done. Its partial
    folder is killed.partial, and whole.tif what the same settings give without interruption."""
    write_tiff("long.tif", np.maximum(picture(900, 600), 1), nodata=0)
    settings = {"model": model, "input": "long.tif", "probabilities": True}
    rows = end_midway(start(**settings, output="killed.tif"), Path("killed.tif.partial"), signal.SIGKILL)
    assert 3 <= rows < 19
    assert not Path("killed.tif").exists()
    os.rename("killed.tif.partial", "killed.partial")
    settings |= {"tile_size": 64, "overlap": None, "batch_size": 2}
    run(**settings, output="whole.tif")
    return settings, rows


def test_killed_and_started_again_the_map_is_the_one_of_an_uninterrupted_run(killed, caplog):
    settings, rows = killed
    shutil.copytree("killed.partial", "again.tif.partial")
    with caplog.at_level("INFO"):
        run(**settings, output="again.tif")
    assert f"resuming after {rows} of" in caplog.text
    for name in ("", "_probabilities"):
        np.testing.assert_array_equal(read(f"again{name}.tif"), read(f"whole{name}.tif"))
    assert not Path("again.tif.partial").exists()


def test_finished_rows_are_not_done_again(killed):
    settings, _ = killed
    shutil.copytree("killed.partial", "marked.tif.partial")
    with open("marked.tif.partial/classes.raw", "r+b") as file:
        file.write(bytes([2]) * 50)  # of the very first piece
    with open("marked.tif.partial/classes.raw", "ab") as file:
        file.write(bytes([1]) * 999)  # written after the last checkpoint: must not count
    run(**settings, output="marked.tif")
    found, wanted = read("marked.tif")[0], read("whole.tif")[0]
    assert (found != wanted).sum() in range(1, 51)
    assert (found.ravel()[:10] == 2).all()
    np.testing.assert_array_equal(found[60:], wanted[60:])


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["tile_size", "model", "input", "cut off"])
def test_other_settings_start_anew_and_say_why(killed, changed, caplog, network):
    settings, _ = killed
    output = f"other_{changed}.tif".replace(" ", "_")
    shutil.copytree("killed.partial", f"{output}.partial")
    with open(f"{output}.partial/classes.raw", "r+b") as file:
        file.write(bytes([2]) * 50)
    reason = f"made with another {changed}"
    if changed == "tile_size":
        settings = {**settings, "tile_size": 128}
    elif changed == "model":
        other = make_network(seed=1)
        settings = {**settings, "model": str(save("other_model", other))}
    elif changed == "input":
        shutil.copy("long.tif", "copied.tif")
        settings = {**settings, "input": "copied.tif"}
    else:
        os.truncate(f"{output}.partial/classes.raw", 100)
        reason = "missing or cut off"
    with caplog.at_level("INFO"):
        run(**settings, output=output)
    assert "starting anew" in caplog.text
    assert reason in caplog.text
    if changed in ("input", "cut off"):
        np.testing.assert_array_equal(read(output), read("whole.tif"))


@pytest.mark.slow
def test_ctrl_c_closes_the_run_as_killed_and_keeps_what_is_done(killed):
    settings, _ = killed
    process = start(**{**settings, "overlap": 16}, output="stopped.tif", **{"tracking.run_name": "stopped"})
    rows = end_midway(process, Path("stopped.tif.partial"), signal.SIGINT)
    assert rows >= 3
    assert process.returncode != 0
    assert [found.info.status for found in runs() if found.info.run_name == "stopped"] == ["KILLED"]
    assert not Path("stopped.tif").exists()


def test_two_processes_do_not_make_the_same_map(model):
    write_tiff("locked.tif", picture(100, 100))
    Path("locked_map.tif.partial").mkdir()
    with FileLock("locked_map.tif.partial/lock"), pytest.raises(InputError, match="another process"):
        run(model=model, input="locked.tif", output="locked_map.tif")


@pytest.mark.parametrize("kind", ["colour.png", "colour.jpg", "grey.png", "palette.png", "rgba.png"])
def test_pictures_without_georeference(model, network, kind):
    pixels = picture(210, 300).transpose(1, 2, 0)
    image = Image.fromarray(pixels)
    if kind == "grey.png":
        image = image.convert("L")
    elif kind == "palette.png":
        image = image.quantize(200)
    elif kind == "rgba.png":
        image.putalpha(Image.fromarray(np.where(pixels[..., 0] < 90, 0, 255).astype(np.uint8)))
    path = Path(kind)
    image.save(path, **({"quality": 95} if kind == "colour.jpg" else {}))
    wanted = wanted_map(network, path, Reading(), BYTES)
    for suffix in (".tif", ".png"):
        run(model=model, input=str(path), output=f"{kind}_map{suffix}")
        found = read(f"{kind}_map{suffix}")[0]
        np.testing.assert_array_equal(found == 255, wanted == 255)
        assert (found != wanted).mean() < 0.002
    assert (wanted == 255).any() == (kind == "rgba.png")
    with Image.open(f"{kind}_map.png") as written:
        assert written.mode == "P"
        palette = np.array(written.getpalette()[:9]).reshape(3, 3) / 255
        np.testing.assert_allclose(palette, class_colors(3), atol=1 / 255)
        assert json.loads(written.text["class_names"]) == NAMES
    with rasterio.open(f"{kind}_map.tif") as file:
        assert file.crs is None
        assert file.transform.is_identity
    assert not list(Path().glob("*.aux.xml"))


def test_sixteen_bit_images_are_read_in_their_own_range_by_type(model, network):
    values = picture(150, 200).astype(np.uint16) * 257
    values[:, :20, :30] = 7
    path = write_tiff("sixteen.tif", values, nodata=7)
    run(model=model, input=str(path), output="sixteen_map.tif")
    by_type = dataclasses.replace(BYTES, high=(65535.0,) * 3)
    wanted = wanted_map(network, path, Reading(), by_type)
    assert (wanted == 255).sum() == 600
    assert_nearly_equal(read("sixteen_map.tif")[0], wanted)


def test_floating_point_bands_in_another_order_with_nodata_and_nan():
    network = make_network()
    reading = Reading(bands=(4, 1, 2), scale=(0.0, 1.0), nodata=(-9999.0,))
    normalisation = Normalization((0.0,) * 3, (1.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    save("float_model", network, reading, normalisation)
    values = (picture(170, 230, bands=4) / 255).astype(np.float32)
    values[:, :30] = -9999
    values[3, 60:70, 60:80] = np.nan
    values[2, 100:120] = np.nan  # of the band that is not read
    path = write_tiff("float.tif", values)
    run(model="float_model", input=str(path), output="float_map.tif", probabilities=True)
    wanted = wanted_map(network, path, reading, normalisation)
    assert (wanted == 255).sum() == 30 * 230 + 200
    assert_nearly_equal(read("float_map.tif")[0], wanted)


def test_a_map_of_resampled_reading_lies_on_the_grid_of_the_image():
    network = make_network()
    reading = Reading(pixel_size=1.2)
    save("coarse_model", network, reading)
    place = Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)
    image = np.maximum(picture(701, 902), 1)
    image[:, :100, :100] = 0
    path = write_tiff("fine.tif", image, transform=place, nodata=0)
    run(model="coarse_model", input=str(path), output="fine_map.tif")
    with rasterio.open("fine_map.tif") as file:
        assert (file.shape, file.transform) == ((701, 902), place)
        found = file.read(1)
    working = wanted_map(network, path, reading, BYTES)
    assert working.shape == (292, 376)
    rows, columns = (
        np.minimum(((np.arange(count) + 0.5) / 2.4).astype(int), limit - 1)
        for count, limit in zip((701, 902), working.shape, strict=True)
    )
    wanted = working[rows[:, None], columns]
    assert_nearly_equal(found, wanted)


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (37, 21), (256, 257)])
def test_rasters_of_any_size(model, network, size):
    path = write_tiff(f"size_{size[0]}.tif", picture(*size))
    run(model=model, input=str(path), output=f"size_{size[0]}_map.tif")
    found, wanted = read(f"size_{size[0]}_map.tif")[0], wanted_map(network, path, Reading(), BYTES)
    assert found.shape == size
    assert (found != wanted).mean() < 0.002


def test_tiles_are_cut_out_of_parts_whatever_the_parts_are(model, monkeypatch):
    """The same map, whether the whole image is read at once, some rows of tiles, or some tiles of one row."""
    write_tiff("parts.tif", picture(420, 500))
    maps = []
    for number, size in enumerate((2**25, 3 * 500 * 260, 3 * 128 * 200, 1)):
        monkeypatch.setattr("dann_experiments.prediction.scene.STRIP_BYTES", size)
        run(model=model, input="parts.tif", output=f"parts_{number}.tif", tile_size=128, overlap=64)
        maps.append(read(f"parts_{number}.tif"))
    for other in maps[1:]:
        np.testing.assert_array_equal(other, maps[0])


def test_pixels_are_read_once_but_for_the_rows_that_two_parts_share(model, monkeypatch):
    write_tiff("parts.tif", picture(420, 500))
    monkeypatch.setattr(scene, "STRIP_BYTES", 3 * 500 * 260)  # three rows of tiles
    sizes, unchanged = [], scene.read_pixels

    def counted(*given: Any) -> Any:
        sizes.append((given[-1].height, given[-1].width))
        return unchanged(*given)

    monkeypatch.setattr(scene, "read_pixels", counted)
    run(model=model, input="parts.tif", output="map.tif", tile_size=128, overlap=64)
    assert [width for _, width in sizes] == [500, 500]
    assert 420 + 64 <= sum(height for height, _ in sizes) < 420 + 128  # less than a tile


def test_a_folder_gives_a_map_an_image_and_names_the_bad_one_at_the_end(model):
    folder = Path("images")
    folder.mkdir()
    write_tiff(folder / "a.tif", picture(90, 80))
    Image.fromarray(picture(70, 60).transpose(1, 2, 0)).save(folder / "b.jpg")
    write_tiff(folder / "c.tif", picture(50, 50, bands=2))
    (folder / "d.png").write_bytes((folder / "b.jpg").read_bytes()[:300])
    Image.fromarray(picture(40, 30).transpose(1, 2, 0)).save(folder / "e.PNG")
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"(?s)2 of 5 images.*c\.tif has 2 bands.*d\.png"):
        run(model=model, input="images", output="image_maps", **{"tracking.run_name": "folder"})
    assert [found.info.status for found in runs() if found.info.run_name == "folder"] == ["FAILED"]
    assert sorted(path.name for path in Path("image_maps").iterdir()) == ["a.qml", "a.tif", "b.png", "e.png"]
    written = {path.name: path.stat().st_mtime_ns for path in Path("image_maps").iterdir()}
    (folder / "c.tif").unlink()
    (folder / "d.png").unlink()
    result = run(model=model, input="images", output="image_maps")
    assert {path.name: path.stat().st_mtime_ns for path in Path("image_maps").iterdir()} == written
    assert len(result.outputs) == 3
    assert result.metrics["predict/maps"] == 0
    write_tiff(folder / "a.tif", picture(90, 80, seed=5))
    with pytest.raises(InputError, match=r"a\.tif exists, but was made with other settings"):
        run(model=model, input="images", output="image_maps")
    result = run(model=model, input="images", output="image_maps", overwrite=True)
    assert result.metrics["predict/maps"] == 3


def wrong(make: Callable[[], dict[str, Any]], message: str, name: str) -> Any:
    return pytest.param(make, message, id=name)


def broken() -> dict[str, Any]:
    Path("broken.tif").write_bytes(b"II*\0" + bytes(50))
    return {"input": "broken.tif"}


def existing() -> dict[str, Any]:
    Path("kept.tif").write_text("precious")
    return {"output": "kept.tif"}


def empty_folder() -> dict[str, Any]:
    Path("empty").mkdir(exist_ok=True)
    return {"input": "empty", "output": "new_folder"}


def twins() -> dict[str, Any]:
    Path("twins").mkdir(exist_ok=True)
    for suffix in (".png", ".jpg"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(f"twins/one{suffix}")
    return {"input": "twins", "output": "new_folder"}


def clash() -> dict[str, Any]:
    Path("clash").mkdir(exist_ok=True)
    for name in ("one", "one_probabilities"):
        write_tiff(f"clash/{name}.tif", picture(8, 8))
    return {"input": "clash", "output": "new_folder", "probabilities": True}


def foreign() -> dict[str, Any]:
    shutil.copytree("model", "foreign", dirs_exist_ok=True)
    facts = json.loads(Path("foreign/dann.json").read_text())
    Path("foreign/dann.json").write_text(json.dumps(facts | {"arch": "os.system"}))
    return {"model": "foreign"}


def other_weights() -> dict[str, Any]:
    shutil.copytree("model", "other_weights", dirs_exist_ok=True)
    arguments = json.loads(Path("model/config.json").read_text())
    Path("other_weights/config.json").write_text(json.dumps(arguments | {"encoder_name": "resnet34"}))
    return {"model": "other_weights"}


def checkpoint() -> dict[str, Any]:
    torch.save(make_network().state_dict(), "weights.pt")
    return {"model": "weights.pt"}


def bands() -> dict[str, Any]:
    return {"input": str(write_tiff("five.tif", picture(40, 40, bands=5)))}


def floats() -> dict[str, Any]:
    return {"input": str(write_tiff("no_range.tif", picture(40, 40).astype(np.float32)))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        wrong(lambda: {"model": ""}, "model is not set", "no model"),
        wrong(lambda: {"input": ""}, "input is not set", "no input"),
        wrong(lambda: {"input": "absent.tif"}, r"absent\.tif, which does not exist", "absent input"),
        wrong(lambda: {"model": "absent"}, "model is absent, which does not exist", "absent model"),
        wrong(lambda: {"model": "runs:/0123/model"}, "model is 'runs:/0123/model'", "absent run"),
        wrong(lambda: {"model": "models:/nobody@champion"}, "model is 'models:/nobody@champion'", "absent alias"),
        wrong(lambda: {"output": "map.jpg"}, "JPEG would change", "jpeg map"),
        wrong(lambda: {"output": "good.tif"}, "which is the input", "onto the input"),
        wrong(existing, r"kept\.tif exists; .*overwrite", "existing output"),
        wrong(lambda: {"output": "kept.tif/map.tif"}, "cannot be written to", "output below a file"),
        wrong(broken, r"broken\.tif cannot be read", "broken input"),
        wrong(bands, r"five\.tif has 5 bands", "bands"),
        wrong(floats, r"no_range\.tif holds float32", "range not known"),
        wrong(empty_folder, "empty holds no images", "empty folder"),
        wrong(twins, "same stem", "equal stems"),
        wrong(clash, "both a map and the probabilities", "map and probabilities"),
        wrong(foreign, "foreign: arch in its dann.json is .os.system.", "foreign architecture"),
        wrong(other_weights, "whose weights do not fit", "weights of another network"),
        wrong(checkpoint, r"weights\.pt.*--config", "checkpoint without settings"),
        wrong(lambda: {"domain": "source"}, "domain is 'source'", "domain without reading"),
        wrong(lambda: {"tile_size": 4}, "tile_size is 4", "tiny tile"),
        wrong(lambda: {"tile_size": 128, "overlap": 65}, "overlap is 65; give 0 to 64", "large overlap"),
        wrong(lambda: {"batch_size": 0}, "batch_size is 0", "no batch"),
        *(
            []
            if torch.cuda.is_available()
            else [wrong(lambda: {"accelerator": "gpu"}, "accelerator is 'gpu'", "no gpu")]
        ),
    ],
)
def test_what_can_be_mended_is_told_before_a_run_is_opened(model, make, message):
    write_tiff("good.tif", picture(40, 40))
    given = {"model": model, "input": "good.tif", "output": "nowhere/map.tif", **make()}
    before, there = len(runs()), {path.name for path in Path().iterdir()}
    with pytest.raises(InputError, match=message):
        run(**given)
    assert len(runs()) == before
    assert {path.name for path in Path().iterdir()} - there <= {"mlflow.db", "mlflow.db.lock"}
    assert not Path("kept.tif").exists() or Path("kept.tif").read_text() == "precious"


def test_an_image_that_breaks_off_in_the_middle_leaves_nothing_behind(model):
    path = write_tiff("torn.tif", picture(600, 300), compress="deflate", tiled=True, blockxsize=64, blockysize=64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"torn\.tif cannot be read"):
        run(model=model, input="torn.tif", output="torn_map.tif")
    assert not [found for found in Path().iterdir() if found.name.startswith("torn_map")]


def test_a_checkpoint_takes_the_network_and_the_reading_of_a_config(network, model):
    torch.save(network.state_dict(), "alone.pt")
    write_tiff("checked.tif", picture(200, 150))
    overrides = {f"model.{key}": value for key, value in ARGUMENTS.items()} | {
        "model.arch": "unet", "model.encoder_weights": None, "model.classes": 3, "data.class_names": NAMES,
        "data.mean": [0.5] * 3, "data.std": [0.25] * 3,
    }  # fmt: skip
    settings = {"tile_size": 256, "overlap": 128, "input": "checked.tif", "accelerator": "cpu"}
    run(**settings, model=model, output="checked_1.tif")
    predict(PredictConfig(**settings, model="alone.pt", output="checked_2.tif"), load_config(None, overrides))
    np.testing.assert_array_equal(read("checked_1.tif"), read("checked_2.tif"))


def test_a_model_of_before_readings_were_kept_is_read_by_type(network, model):
    save("old", network)
    facts = json.loads(Path("old/dann.json").read_text())
    del facts["reading"]
    facts |= {"mean": [0.5] * 3, "std": [0.25] * 3, "image_scale": "0..1"}
    Path("old/dann.json").write_text(json.dumps(facts))
    write_tiff("aged.tif", picture(100, 100))
    run(model=model, input="aged.tif", output="aged_1.tif")
    run(model="old", input="aged.tif", output="aged_2.tif")
    np.testing.assert_array_equal(read("aged_1.tif"), read("aged_2.tif"))


def test_models_of_runs_and_of_the_registry(model):
    write_tiff("registered.tif", picture(100, 100))
    run(model=model, input="registered.tif", output="registered_1.tif")
    client = store()
    made = client.create_run("0").info
    client.log_artifacts(made.run_id, model, "model")
    client.set_terminated(made.run_id)
    client.create_registered_model("land")
    version = client.create_model_version("land", f"{made.artifact_uri}/model", made.run_id).version
    client.set_registered_model_alias("land", "champion", version)
    for number, name in ((2, f"runs:/{made.run_id}"), (3, "models:/land@champion"), (4, f"models:/land/{version}")):
        result = run(model=name, input="registered.tif", output=f"registered_{number}.tif")
        assert result.source_run_id == made.run_id
        assert store().get_run(result.run_id).data.tags["dann.source_run_id"] == made.run_id
        np.testing.assert_array_equal(read(f"registered_{number}.tif"), read("registered_1.tif"))


def test_every_setting_has_a_help_text():
    text = help_text(PredictConfig)
    for setting in dataclasses.fields(PredictConfig):
        assert f"--{setting.name}" in text


MEASURED = (
    SCRIPT
    + """
from pathlib import Path
print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # getrusage counts the parent, too
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_raster(model):
    peaks = {}
    for size in (1500, 4500):
        with rasterio.open(
            f"size_{size}.tif", "w", driver="GTiff", height=size, width=size, count=3, dtype="uint8", tiled=True,
            blockxsize=256, blockysize=256,
        ) as file:  # fmt: skip
            part = picture(500, 500)
            for top in range(0, size, 500):
                for left in range(0, size, 500):
                    file.write(part, window=rasterio.windows.Window(left, top, 500, 500))
        settings = {
            "model": model, "input": f"size_{size}.tif", "output": f"size_{size}_map.tif", "probabilities": True,
            "accelerator": "cpu", "progress": False,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, json.dumps(settings)], env=os.environ | {"PYTHONPATH": str(PROJECT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks[size] = int(done.stdout.split("peak")[1])
    assert peaks[4500] < 1.1 * peaks[1500]
