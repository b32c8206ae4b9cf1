"""`test_batchnorm`: maps with the BatchNorm statistics of their own image, the same in all tiles, and the arm test-time BN."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import segmentation_models_pytorch as smp
import torch
from conftest import SharedRuns, small_settings
from test_predict import make_network, picture, save, write_tiff
from torch import Tensor, nn

from dann_experiments import InputError, adapt, evaluate, load_config, pretrain
from dann_experiments.checkpoints.saved_model import save_model
from dann_experiments.cli import main
from dann_experiments.comparison.arms import arms_of, cells_of
from dann_experiments.comparison.collect import arms_of_runs
from dann_experiments.comparison.compare import compare
from dann_experiments.config.comparison import DEFAULT_ARMS, NAMED_ARMS, CompareConfig
from dann_experiments.config.parsing import load_settings, replace
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.rasters import Window
from dann_experiments.data.reading import Normalization, Reading, reading_facts
from dann_experiments.jobs.identity import evaluation_name, run_digest
from dann_experiments.jobs.load_model import load_model
from dann_experiments.jobs.predict import PredictResult, predict
from dann_experiments.models.batchnorm import batch_statistics
from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.prediction import own_statistics
from dann_experiments.prediction.mapping import MapMaker
from dann_experiments.prediction.own_statistics import statistics_of_image
from dann_experiments.prediction.scene import Options, Scene
from dann_experiments.prediction.tiling import Plan, Read, Tiler, grid_stride, plan_tiles
from dann_experiments.tracking.store import open_store
from sweeps.driver import run_sweep
from sweeps.settings import SweepConfig

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
CPU = torch.device("cpu")


def grid_of(height: int, width: int) -> Plan:
    """Tiles of 16 x 16 pixels side by side."""
    return plan_tiles(height, width, 16, 0, 1)


def reader(image: Tensor, valid: np.ndarray | None = None, log: list[Window] | None = None) -> Read:
    def read(window: Window) -> tuple[Tensor, np.ndarray | None]:
        if log is not None:
            log.append(window)
        box = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        return image[:, *box], None if valid is None else valid[box]

    return read


class Small(nn.Module):
    """A BatchNorm of the image, then one of what a 1 x 1 convolution makes of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.second = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self(torch.randn(4, 2, 8, 8) * 3 + 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.conv(self.first(images)))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


# The statistics


def test_in_the_block_every_layer_has_the_statistics_counted_by_hand_and_afterwards_its_own_to_the_bit():
    network, image = Small().train(), noise(2, 32, 32) * 5 + 2
    network.second.eval()
    before, modes = state_of(network), [module.training for module in network.modules()]
    # in one batch, every layer sees exactly the values of the whole image
    with statistics_of_image(network, plan_tiles(32, 32, 16, 0, 1), reader(image), 2, 4, "scene.tif"):
        values = image.flatten(1)
        torch.testing.assert_close(network.first.running_mean, values.mean(1))
        torch.testing.assert_close(network.first.running_var, values.var(1))
        scaled = (image - values.mean(1)[:, None, None]) / (values.var(1, correction=0) + 1e-5).sqrt()[:, None, None]
        with torch.no_grad():
            inner = network.conv(scaled[None])[0].flatten(1)
        torch.testing.assert_close(network.second.running_mean, inner.mean(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network.second.running_var, inner.var(1), atol=1e-5, rtol=1e-4)
        assert [module.training for module in network.modules()] == modes
    assert same(before, state_of(network))
    assert [module.training for module in network.modules()] == modes
    with pytest.raises(KeyError), statistics_of_image(network, plan_tiles(32, 32, 16, 0, 1), reader(image), 2, 4, ""):
        raise KeyError
    assert same(before, state_of(network))


def test_tiles_that_are_mostly_empty_count_only_if_there_are_no_others():
    image, valid = noise(2, 16, 64), np.ones((16, 64), bool)
    valid[:, 16:], valid[:, 16:23] = False, True  # the second tile has 7 of 16 columns, the others none
    image[:, ~torch.from_numpy(valid)] = 0
    plan, network = plan_tiles(16, 64, 16, 0, 1), Small()
    with statistics_of_image(network, plan, reader(image, valid), 2, 4, "scene.tif"):
        torch.testing.assert_close(network.first.running_mean, image[:, :, :16].flatten(1).mean(1))
    valid[:, :16], image[:, :, :16] = False, 0
    with statistics_of_image(network, plan, reader(image, valid), 2, 4, "scene.tif"):
        torch.testing.assert_close(network.first.running_mean, image[:, :, 16:32].flatten(1).mean(1))
    before = state_of(network)
    with statistics_of_image(network, plan, reader(image, np.zeros_like(valid)), 2, 4, "scene.tif"):
        assert same(before, state_of(network))


@pytest.mark.parametrize("shape", [(16 * 30, 16 * 40), (16 * 40, 16 * 40), (16, 16 * 1500), (16 * 1500, 16)])
def test_a_large_image_has_a_bounded_number_of_tiles_from_all_over_it(shape, monkeypatch):
    monkeypatch.setattr(own_statistics, "MOST_BYTES", 64 * 4 * 2 * 16 * 16)  # 64 tiles
    log: list[Window] = []
    plan, image = grid_of(*shape), torch.zeros(2, *shape) + torch.linspace(-1, 1, shape[1])
    with statistics_of_image(Small(), plan, reader(image, log=log), 2, 4, "scene.tif"):
        pass
    assert len(set(log)) == len(log) == 64
    for side, places in ((shape[0], [one.top for one in log]), (shape[1], [one.left for one in log])):
        counts, _ = np.histogram(np.array(places) / side, bins=4, range=(0, 1))
        assert side == 16 or (counts.min() >= 10 and counts.max() <= 22), counts  # 16 are expected in each quarter


def test_the_only_tiles_with_data_are_found_wherever_they_are(monkeypatch):
    monkeypatch.setattr(own_statistics, "MOST_BYTES", 4 * 4 * 2 * 16 * 16)  # four tiles of a hundred
    image, valid = noise(2, 160, 160), np.zeros((160, 160), bool)
    valid[144:, 16:32] = True
    network = Small()
    with statistics_of_image(network, plan_tiles(160, 160, 16, 0, 1), reader(image, valid), 2, 4, "scene.tif"):
        torch.testing.assert_close(network.first.running_mean, image[:, 144:, 16:32].flatten(1).mean(1))


# Maps


def shares(network: nn.Module, read: Read, plan: Plan) -> np.ndarray:
    """Probabilities (K, H, W) of the tiled map."""
    tiler = Tiler(network, plan, 3, 4, CPU, with_probabilities=True, rounded=False)
    found = np.zeros((3, plan.rows.length, plan.columns.length), np.float32)
    for row in range(len(plan.rows.starts)):
        for piece in tiler.row(row, read):
            top, left, height, width = piece.window
            found[:, top : top + height, left : left + width] = piece.probabilities
    return found


def test_a_map_with_the_statistics_of_its_image_has_no_seams():
    """It is the map of the whole image at once; statistics of each batch of tiles by itself show at their borders."""
    network = make_network().eval()
    image = torch.from_numpy(picture(512, 512)).float() / 255 * torch.linspace(0.2, 1, 512)  # darker to the left
    image = (image - 0.5) / 0.25
    plan = plan_tiles(512, 512, 128, 64, grid_stride(network))
    read = reader(image)

    def jump(found: np.ndarray, wanted: np.ndarray) -> float:
        return float(np.abs(found - wanted).mean())

    with statistics_of_image(network, plan, read, 3, 4, "scene.tif"):
        with torch.no_grad():
            wanted = logits_of_any_size(network, image[None]).softmax(1)[0].numpy()
        own = jump(shares(network, read, plan), wanted)

    class OfTheBatch(nn.Module):
        encoder = network.encoder

        def forward(self, images: Tensor) -> Tensor:
            with batch_statistics(network):
                return logits_of_any_size(network, images)

    assert own < 0.005
    assert jump(shares(OfTheBatch(), read, plan), wanted) > 10 * own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(str(tmp_path_factory.mktemp("own") / "model"), make_network()))


def mapped(model: str, image: str | list[str], output: str, **given: Any) -> PredictResult:
    settings = {
        "model": model,
        "input": image,
        "output": output,
        "accelerator": "cpu",
        "progress": False,
        "tile_size": 128,
    }
    return predict(load_settings(PredictConfig, None, settings | {"test_batchnorm": "images"} | given))


def read_map(path: str) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.mark.parametrize(("offset", "most"), [(64, 0.01), (1, 0.25)], ids=["less contrast", "darker, too"])
def test_an_image_of_half_the_contrast_has_the_map_of_the_other(model, workplace, offset, most):
    """Exactly so around the mean of training, which is 0 to the network, as the padding of its convolutions is. Padding that is
    brighter than the image changes values near the borders of tiles, and thus the statistics a little."""
    half = picture(300, 210) // 2
    write_tiff("whole.tif", 2 * half)
    write_tiff("half.tif", half + offset)
    for name in ("whole", "half"):
        mapped(model, f"{name}.tif", f"{name}_own.tif")
        mapped(model, f"{name}.tif", f"{name}_running.tif", test_batchnorm="running")
    lost = (read_map("half_running.tif") != read_map("whole_running.tif")).mean()
    kept = (read_map("half_own.tif") != read_map("whole_own.tif")).mean()
    assert len(np.unique(read_map("whole_own.tif"))) == 3
    assert (lost > 2 * most, kept < most) == (True, True), (lost, kept)


def test_of_several_images_each_has_its_own_statistics(model, workplace):
    Path("in").mkdir()
    write_tiff("in/a.tif", picture(200, 150))
    write_tiff("in/b.tif", (picture(150, 200, seed=3) // 3).astype(np.uint8))
    mapped(model, "in", "maps")
    for name in ("b", "a"):
        mapped(model, f"in/{name}.tif", f"{name}.tif")
        np.testing.assert_array_equal(read_map(f"{name}.tif"), read_map(f"maps/{name}.tif"))


def test_an_image_of_one_tile_and_one_without_data_have_maps(model, workplace):
    write_tiff("one.tif", picture(40, 30))
    assert mapped(model, "one.tif", "map.tif").metrics["predict/maps"] == 1
    write_tiff("empty.tif", np.zeros((3, 40, 30), np.uint8), nodata=0)
    mapped(model, "empty.tif", "empty_map.tif")
    assert (read_map("empty_map.tif") == 255).all()


def test_a_map_that_was_begun_resumes_to_the_same_and_with_other_statistics_starts_anew(model, workplace, caplog):
    write_tiff("long.tif", picture(500, 300))
    size: dict[str, Any] = {"tile_size": 64, "overlap": 16, "batch_size": 2}

    def stop(done: float, name: str) -> None:
        if done > 0.4:
            raise KeyboardInterrupt

    given = load_model(model, "target", None, None)  # pyright: ignore[reportArgumentType]
    before = state_of(given.network)
    maker = MapMaker(given, Options(**size, test_batchnorm="images"), CPU, np.zeros((3, 3)), {})
    with pytest.raises(KeyboardInterrupt):
        list(maker.map_all([(Path("long.tif"), Path("map.tif"))], stop))
    assert same(before, state_of(given.network))
    shutil.copytree("map.tif.partial", "other.tif.partial")
    with caplog.at_level("INFO"):
        mapped(model, "long.tif", "map.tif", **size)
        assert "resuming after" in caplog.text
        assert "starting anew" not in caplog.text
        mapped(model, "long.tif", "other.tif", **size, test_batchnorm="running")
        assert "made with another test_batchnorm." in caplog.text
    mapped(model, "long.tif", "whole.tif", **size)
    np.testing.assert_array_equal(read_map("map.tif"), read_map("whole.tif"))
    assert (read_map("other.tif") != read_map("whole.tif")).any()


def test_a_finished_map_with_it_is_not_taken_for_one_without(model, workplace):
    Path("in").mkdir()
    write_tiff("in/scene.tif", picture(60, 50))
    mapped(model, "in", "maps")
    with pytest.raises(InputError, match="made with other settings"):
        mapped(model, "in", "maps", test_batchnorm="running")


def test_maps_without_it_have_the_signature_of_earlier_versions(model, workplace):
    write_tiff("scene.tif", picture(60, 50))
    found = load_model(model, "target", None, None)  # pyright: ignore[reportArgumentType]
    assert "test_batchnorm" not in Scene.open(Path("scene.tif"), Path("map.tif"), found, Options()).facts


def saved(folder: Path, arch: str, **more: Any) -> str:
    arguments = {"encoder_name": "resnet18", "in_channels": 3, "classes": 2, **more}
    network = smp.create_model(arch, encoder_weights=None, **arguments)
    reading = {"target": reading_facts(Reading(), Normalization((0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.25,) * 3))}
    notes = {"class_names": ["ground", "tree"], "ignore_index": 255, "reading": reading}
    save_model(folder, network, arch, arguments, notes)
    return str(folder)


def test_a_single_tile_that_is_too_small_for_the_network_is_refused_by_name_and_leaves_nothing(tmp_path, workplace):
    """The pooling branch of DeepLabV3 has a BatchNorm on a map of one position."""
    deeplab = saved(tmp_path / "deeplab", "deeplabv3")
    write_tiff("small.tif", picture(64, 64))
    with pytest.raises(InputError, match=r"statistics of small\.tif need batches of two .* smaller tile_size"):
        mapped(deeplab, "small.tif", "map.tif")
    assert not list(Path().glob("map*"))
    mapped(deeplab, "small.tif", "map.tif", tile_size=32, overlap=0)


def test_a_network_without_batchnorm_is_refused_before_a_run(tmp_path, workplace):
    plain = saved(tmp_path / "plain", "unet", encoder_name="mit_b0", decoder_use_norm=False)
    write_tiff("scene.tif", picture(64, 64))
    with pytest.raises(InputError, match="test_batchnorm is 'images', but this network has no BatchNorm"):
        mapped(plain, "scene.tif", "map.tif")
    assert not Path("mlflow.db").exists() or not open_store(None, "predict").client.search_runs(["0"])


@pytest.mark.parametrize("words", [["predict", "--model", "m", "--input", "a", "--output", "b.tif"], ["evaluate"]])
def test_unknown_values_are_refused_on_the_command_line(words, workplace, capsys):
    assert main([*words, "--test_batchnorm", "image"]) == 2
    assert "test_batchnorm is 'image', but must be one of running, images" in capsys.readouterr().err


# Runs and arms


def test_names_and_digests_tell_runs_with_it_from_runs_without():
    config = load_config("digits")
    own = replace(config, {"test_batchnorm": "images"})
    assert evaluation_name(own, {"dann.method": "dann"}) == "evaluation of DANN with test-time BN mnist-m seed 0"
    assert len({run_digest("evaluate", one, {}) for one in (config, own)}) == 2


@pytest.mark.parametrize("job", [adapt, pretrain, compare, lambda config: run_sweep(SweepConfig(study="s"), config)])
def test_jobs_that_score_the_model_as_it_is_refuse_it(job, squares, workplace):
    with pytest.raises(InputError, match=r"test_batchnorm is 'images', but .* own statistics; leave it out"):
        job(load_config(None, small_settings(squares, test_batchnorm="images")))


def test_an_arm_of_its_kind_scores_the_source_model_with_it_and_a_note_says_what_it_read(squares):
    config = load_config(None, small_settings(squares, domain_adaptation__batchnorm="target_stats"))
    given = {name: dict(arm) for name, arm in NAMED_ARMS["ladder"].items()}
    arms, notes = arms_of(CompareConfig(arms=given), config)
    cells = {cell.arm.kind: cell for cell in cells_of(arms, [3], config, None)}
    cell = cells["test_statistics"]
    assert (cell.arm.name, cell.job, cell.needs_source) == ("test-time BN", "evaluate", True)
    assert (cell.config.test_batchnorm, cell.config.domain_adaptation.batchnorm) == ("images", "separate")
    assert cell.digest != cells["statistics"].digest
    assert cells["adapted"].config.test_batchnorm == "running"
    assert any(note.startswith("test-time BN: ") and "scored images themselves" in note for note in notes)
    assert "test-time BN" not in DEFAULT_ARMS
    for key in ("test_batchnorm", "domain_adaptation.batchnorm"):
        wrong: dict[str, Any] = {"own": {"kind": "test_statistics", key: "running"}, "DANN": {}}
        with pytest.raises(InputError, match=f"arms.own sets {key} .* makes an arm of kind test_statistics"):
            arms_of(CompareConfig(arms=wrong), config)


def test_other_arms_refuse_it(squares, workplace):
    config = load_config(None, small_settings(squares))
    with pytest.raises(InputError, match="own statistics; leave it out"):
        compare(config, CompareConfig(arms={"DANN": {"test_batchnorm": "images"}}))


def test_a_run_of_evaluate_with_it_is_an_arm_of_its_own_among_existing_runs(
    squares, shared_runs: SharedRuns, workplace
):
    shutil.copy(shared_runs.folder / "mlflow.db", workplace / "mlflow.db")
    settings = small_settings(
        squares, domain_adaptation__pretrained_checkpoint__path=shared_runs.result("pretrain").model_uri
    )
    result = evaluate(load_config(None, settings | {"test_batchnorm": "images"}))
    config = load_config(None, settings)
    store = open_store(config.tracking.uri, config.tracking.experiment)
    arms, runs, _ = arms_of_runs(store, [shared_runs.result("adapt").run_id, result.run_id])
    assert [(arm.name, arm.kind) for arm in arms] == [
        ("source only", "source_only"), ("test-time BN", "test_statistics"), ("DANN", "adapted"),
    ]  # fmt: skip
    assert {run.arm: run.run_id for run in runs}["test-time BN"] == result.run_id
