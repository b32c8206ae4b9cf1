"""Test-time augmentation and confidence: means counted by hand, maps that turn with their image, runs that are told apart."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import rasterio
import torch
from conftest import SharedRuns, small_settings
from test_predict import make_network, picture, save, write_tiff
from test_tiling import Local, Strided
from torch import nn

from dann_experiments import InputError, RunResult, adapt, evaluate, load_config, pretrain
from dann_experiments.cli import main
from dann_experiments.comparison.compare import compare
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import load_settings, replace
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.rasters import Window
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.jobs.identity import evaluation_name, run_digest
from dann_experiments.jobs.load_model import load_model
from dann_experiments.jobs.predict import PredictResult, predict
from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.models.symmetries import SYMMETRIES, Symmetry, mean_probabilities
from dann_experiments.names import Tta
from dann_experiments.prediction.arrays import map_arrays
from dann_experiments.prediction.confidence import confidence_of
from dann_experiments.prediction.mapping import MapMaker
from dann_experiments.prediction.pyfunc_model import SegmentationModel
from dann_experiments.prediction.scene import Options, Scene
from dann_experiments.prediction.tiling import Piece, Tiler, grid_stride, plan_tiles
from dann_experiments.training.scoring import score_set
from sweeps.driver import run_sweep
from sweeps.settings import SweepConfig

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
CPU = torch.device("cpu")
FOUR = Normalization((0.0,) * 4, (255.0,) * 4, (0.5,) * 4, (0.25,) * 4)
EIGHT = [Symmetry(mirrored, turns) for mirrored in (False, True) for turns in range(4)]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# The symmetries


def test_the_eight_symmetries_of_a_picture_are_all_different_and_are_undone():
    image = torch.arange(6.0).reshape(1, 1, 2, 3)
    copies = [symmetry.of(image) for symmetry in SYMMETRIES["d4"]]
    assert len({str(copy.tolist()) for copy in copies}) == 8
    for symmetry, copy in zip(SYMMETRIES["d4"], copies, strict=True):
        assert torch.equal(symmetry.undone(copy), image)
    assert [copy[0, 0].tolist() for copy in (Symmetry(True, 0).of(image), Symmetry(False, 1).of(image))] == [
        [[2, 1, 0], [5, 4, 3]],
        [[2, 5], [1, 4], [0, 3]],
    ]
    assert [len(SYMMETRIES[tta]) for tta in ("none", "mirror", "d4")] == [1, 2, 8]


class Leftward(nn.Module):
    """Two classes; the logit of the second is the band's value of the pixel to the left, 0 at the border."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left = nn.functional.pad(images, (1, 0))[..., :-1]
        return torch.cat([torch.zeros_like(left), left], 1)


@pytest.mark.parametrize(
    ("tta", "neighbors"), [("none", [1]), ("mirror", [1, 3]), ("d4", [1, 1, 3, 3, 10, 10, 30, 30])]
)
def test_the_mean_of_an_asymmetric_network_is_the_one_counted_by_hand(tta: Tta, neighbors):
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 0], image[0, 0, 1, 2], image[0, 0, 0, 1], image[0, 0, 2, 1] = 1.0, 3.0, 10.0, 30.0
    found = mean_probabilities(Leftward(), image / 10, tta)
    wanted = np.mean([1 / (1 + math.exp(-value / 10)) for value in neighbors])
    assert found[0, 1, 1, 1].item() == pytest.approx(wanted, abs=1e-6)
    assert found.sum(1) == pytest.approx(torch.ones(1, 3, 3))


@pytest.mark.parametrize("classes", [2, 5])
def test_of_a_network_that_sees_single_pixels_it_changes_nothing(classes):
    torch.manual_seed(0)
    network = nn.Conv2d(4, classes, 1)
    image = noise(2, 4, 13, 8)
    with torch.no_grad():
        plain = mean_probabilities(network, image, "none")
        assert torch.equal(plain, network(image).softmax(1))
        torch.testing.assert_close(mean_probabilities(network, image, "d4"), plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(203, 158), (30, 31), (64, 64)])
def test_the_mean_turns_with_its_image_also_of_a_network_that_needs_padding(size):
    network = Strided(2, 3)  # sides divisible by 4
    image = noise(1, 2, *size)

    def forward(images: torch.Tensor) -> torch.Tensor:
        assert max(images.shape[2:]) == max(size)
        return logits_of_any_size(network, images)

    with torch.no_grad():
        wanted = mean_probabilities(forward, image, "d4")
        single = mean_probabilities(forward, image, "none")
        for symmetry in EIGHT[1:]:
            found = symmetry.undone(mean_probabilities(forward, symmetry.of(image), "d4"))
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
            alone = symmetry.undone(mean_probabilities(forward, symmetry.of(image), "none"))
            assert (alone - single).abs().max() > 0.01  # without it, the map depends on how the image lies


# Tiles


def pieces(network: nn.Module, image: torch.Tensor, tile: int, overlap: int, valid: np.ndarray | None = None,
           **options: Any) -> list[Piece]:  # fmt: skip
    def read(window: Window) -> tuple[torch.Tensor, np.ndarray | None]:
        box = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        return image[:, *box], None if valid is None else valid[box]

    plan = plan_tiles(*image.shape[1:], tile, overlap, grid_stride(network))
    tiler = Tiler(network, plan, 3, 4, CPU, True, rounded=False, **options)
    return [piece for row in range(len(plan.rows.starts)) for piece in tiler.row(row, read)]


def whole(found: list[Piece], values: str) -> np.ndarray:
    """The pieces put together: ids (h, w), probabilities (K, h, w) or confidence (h, w)."""
    height = max(piece.window.top + piece.window.height for piece in found)
    width = max(piece.window.left + piece.window.width for piece in found)
    first = getattr(found[0], values)
    result = np.zeros((*first.shape[:-2], height, width), first.dtype)
    for piece in found:
        top, left, high, wide = piece.window
        result[..., top : top + high, left : left + wide] = getattr(piece, values)
    return result


def test_tiled_maps_are_the_untiled_mean_and_turn_with_their_image():
    network = Local(3, 3)  # sees 3 pixels far, a quarter of the overlap is 4
    image = noise(3, 130, 75)
    found = whole(pieces(network, image, 64, 16, tta="d4"), "probabilities")
    with torch.no_grad():
        wanted = mean_probabilities(network, image[None], "d4")[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for symmetry in EIGHT[1:]:
        turned = torch.from_numpy(whole(pieces(network, symmetry.of(image), 64, 16, tta="d4"), "probabilities"))
        np.testing.assert_allclose(symmetry.undone(turned).numpy(), found, atol=1e-5)


@pytest.mark.parametrize(("tta", "copies"), [("none", 1), ("mirror", 2), ("d4", 8)])
def test_each_tile_is_forwarded_once_per_copy(tta, copies):
    seen = []

    class Counting(Local):
        def forward(self, images):
            seen.append(tuple(images.shape))
            return super().forward(images)

    pieces(Counting(3, 3), noise(3, 40, 100), 64, 16, tta=tta)  # one row of two tiles, 40 x 64
    assert len(seen) == copies
    assert seen.count((2, 3, 64, 40)) == copies // 2 * (tta == "d4")


def test_a_network_of_other_classes_is_refused_whichever_copy_it_gets():
    with pytest.raises(InputError, match="logits of shape"):
        pieces(Local(3, 4), noise(3, 40, 30), 64, 16, tta="d4")


# Confidence


def test_confidence_is_the_largest_probability_or_the_entropy_by_its_largest_value():
    of_pixels = torch.tensor([[[0.25, 0.5, 1.0]], [[0.25, 0.5, 0.0]], [[0.25, 0.0, 0.0]], [[0.25, 0.0, 0.0]]])
    assert confidence_of(of_pixels, "max_probability")[0].tolist() == [0.25, 0.5, 1.0]
    assert confidence_of(of_pixels, "entropy")[0].tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert confidence_of(torch.tensor([[[0.9]], [[0.1]]]), "entropy").item() == pytest.approx(
        -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1)), abs=1e-6
    )


@pytest.mark.parametrize("kind", ["max_probability", "entropy"])
def test_confidence_is_that_of_the_blended_probabilities_and_nan_without_data(kind):
    image, valid = noise(3, 130, 75), np.ones((130, 75), bool)
    valid[20:60, :50] = False
    found = pieces(Local(3, 3), image, 64, 16, valid, tta="mirror", confidence=kind)
    sure, shares = whole(found, "confidence"), whole(found, "probabilities")
    assert sure.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(sure), ~valid)
    wanted = confidence_of(torch.from_numpy(shares), kind).numpy()
    np.testing.assert_allclose(sure[valid], wanted[valid], atol=1e-6)
    assert sure[valid].max() - sure[valid].min() > 0.3


# predict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(str(tmp_path_factory.mktemp("tta") / "model"), make_network()))


@pytest.fixture
def four_bands(tmp_path: Path) -> str:
    return str(save(str(tmp_path / "four"), make_network(bands=4), normalisation=FOUR))


def mapped(model: str, image: Path | str, output: str, **given: Any) -> PredictResult:
    settings = {"model": model, "input": str(image), "output": output, "accelerator": "cpu", "progress": False}
    return predict(load_settings(PredictConfig, None, settings | given))


def read(path: str) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def test_the_map_of_a_turned_image_is_the_turned_map(four_bands, workplace):
    image = picture(121, 203, bands=4)
    for name, values in (("straight", image), ("turned", np.rot90(image, 1, (1, 2)))):
        write_tiff(f"{name}.tif", np.maximum(values, 1), photometric="MINISBLACK")
        for tta in ("none", "d4"):
            mapped(four_bands, f"{name}.tif", f"{name}_{tta}.tif", tta=tta, confidence="entropy")
    straight, turned = (read(f"{name}_d4_confidence.tif") for name in ("straight", "turned"))
    np.testing.assert_allclose(np.rot90(straight, 1, (1, 2)), turned, atol=1e-4)
    different = np.rot90(read("straight_d4.tif"), 1, (1, 2)) != read("turned_d4.tif")
    assert different.mean() < 0.0005  # at most where two classes are equally likely
    assert (np.rot90(read("straight_none.tif"), 1, (1, 2)) != read("turned_none.tif")).mean() > 0.01


def test_confidence_lies_beside_the_map_on_its_grid_and_says_what_it_is(model, workplace):
    image = np.maximum(picture(300, 210), 1)
    image[:, 40:80, :100] = 0
    write_tiff("scene.tif", image, nodata=0)
    for kind in ("max_probability", "entropy"):
        mapped(model, "scene.tif", f"{kind}.tif", tile_size=128, probabilities=True, confidence=kind)
        with rasterio.open(f"{kind}_confidence.tif") as file, rasterio.open(f"{kind}.tif") as map_file:
            assert (file.crs, file.transform, file.shape) == (map_file.crs, map_file.transform, map_file.shape)
            assert (file.count, file.dtypes[0], file.descriptions) == (1, "float32", (kind,))
            assert math.isnan(file.nodata)
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert "certain" in file.tags(1)["meaning"]
            sure, ids = file.read(1), map_file.read(1)
        np.testing.assert_array_equal(np.isnan(sure), ids == 255)
        assert np.isnan(sure).sum() == 40 * 100
        shares = torch.from_numpy(read(f"{kind}_probabilities.tif") / 254)
        wanted = confidence_of(shares / shares.sum(0), kind).numpy()
        np.testing.assert_allclose(sure[ids != 255], wanted[ids != 255], atol=0.02)  # probabilities are rounded
    assert (read("entropy.tif") == read("max_probability.tif")).all()
    assert sorted(path.name for path in Path().glob("*.partial")) == []


def test_confidence_of_a_model_of_coarser_pixels_lies_on_the_grid_of_the_image(tmp_path, workplace):
    coarse = str(save(str(tmp_path / "coarse"), make_network(), Reading(pixel_size=1.0)))
    place = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)
    write_tiff("fine.tif", np.maximum(picture(141, 200), 1), transform=place)
    mapped(coarse, "fine.tif", "map.tif", confidence="max_probability")
    sure = read("map_confidence.tif")
    assert sure.shape == (1, 141, 200)
    np.testing.assert_array_equal(sure[:, 0:140:2], sure[:, 1:140:2])  # two pixels of the file are one of the network's
    assert sure.min() >= 1 / 3


def test_existing_confidence_is_not_overwritten_and_belongs_to_no_input(model, workplace):
    write_tiff("scene.tif", picture(60, 50))
    Path("map_confidence.tif").touch()
    with pytest.raises(InputError, match=r"map_confidence\.tif exists"):
        mapped(model, "scene.tif", "map.tif", confidence="entropy")
    mapped(model, "scene.tif", "map.tif", confidence="entropy", overwrite=True)
    result = mapped(model, ".", "maps/")
    assert [path.name for path in result.outputs] == ["scene.tif"]


def test_a_map_that_was_begun_with_it_resumes_and_with_another_setting_starts_anew(model, workplace, caplog):
    write_tiff("long.tif", picture(500, 300), nodata=0)
    same: dict[str, Any] = {"tile_size": 64, "overlap": 16, "batch_size": 2}

    def stop(done: float, name: str) -> None:
        if done > 0.4:
            raise KeyboardInterrupt

    given = load_model(model, "target", None, None)  # pyright: ignore[reportArgumentType]
    maker = MapMaker(given, Options(**same, tta="mirror", confidence="entropy"), CPU, np.zeros((3, 3)), {})
    with pytest.raises(KeyboardInterrupt):
        list(maker.map_all([(Path("long.tif"), Path("map.tif"))], stop))
    for name in ("plain", "other"):
        shutil.copytree("map.tif.partial", f"{name}.tif.partial")
    with caplog.at_level("INFO"):
        mapped(model, "long.tif", "map.tif", **same, tta="mirror", confidence="entropy")
        assert "resuming after" in caplog.text
        assert "starting anew" not in caplog.text
        mapped(model, "long.tif", "plain.tif", **same)
        assert "made with another tta, confidence." in caplog.text
        mapped(model, "long.tif", "other.tif", **same, tta="d4", confidence="entropy")
        assert "made with another tta." in caplog.text
    mapped(model, "long.tif", "whole.tif", **same, tta="mirror", confidence="entropy")
    mapped(model, "long.tif", "fresh.tif", **same)
    for found, wanted in (("map", "whole"), ("map_confidence", "whole_confidence"), ("plain", "fresh")):
        np.testing.assert_array_equal(read(f"{found}.tif"), read(f"{wanted}.tif"))
    assert (read("whole.tif") != read("fresh.tif")).mean() > 0.01


def test_a_finished_map_of_another_setting_is_not_taken_for_it(model, workplace):
    Path("in").mkdir()
    write_tiff("in/scene.tif", picture(60, 50))
    mapped(model, "in", "maps")
    with pytest.raises(InputError, match="made with other settings"):
        mapped(model, "in", "maps", tta="d4")


def test_maps_without_it_have_the_signature_of_earlier_versions(model, workplace):
    write_tiff("scene.tif", picture(60, 50))
    facts = Scene.open(Path("scene.tif"), Path("map.tif"), load_model(model, "target", None, None), Options()).facts  # pyright: ignore[reportArgumentType]
    assert not {"tta", "confidence"} & set(facts)


PREDICT = ["predict", "--model", "m", "--input", "a.tif", "--output", "b.tif"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*PREDICT, "--tta", "d8"], "tta is 'd8', but must be one of none, mirror, d4"),
        ([*PREDICT, "--confidence", "no"], "must be one of max_probability, entropy | null"),
        (["evaluate", "--tta", "flips"], "tta is 'flips', but must be one of none, mirror, d4"),
    ],
)
def test_unknown_values_are_refused_on_the_command_line(words, message, workplace, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_arrays_and_served_models_take_it(model, workplace):
    image = picture(90, 61)[None]
    served = SegmentationModel(Path(model))
    found = load_model(model, "target", None, None)  # pyright: ignore[reportArgumentType]
    shares = {tta: map_arrays(found, image, probabilities=True, tta=tta) for tta in ("none", "mirror", "d4")}
    mirrored = map_arrays(found, image[..., ::-1].copy(), probabilities=True)[..., ::-1]
    np.testing.assert_allclose(shares["mirror"], (shares["none"] + mirrored) / 2, atol=1e-6)
    for tta, wanted in shares.items():
        np.testing.assert_array_equal(served.predict(image, {"tta": tta, "output": "probabilities"}), wanted)
    assert np.abs(shares["d4"] - shares["none"]).max() > 0.01
    with pytest.raises(InputError, match="tta is 'flips'; it is one of none, mirror, d4"):
        served.predict(image, {"tta": "flips"})


# evaluate


def test_scores_are_those_of_the_mean_probabilities():
    image = noise(2, 1, 5, 7)
    network = nn.Sequential(Leftward(), nn.Conv2d(2, 2, 1))  # has a parameter, whose device counts
    labels = (noise(2, 5, 7) > 0).long()
    loader: Any = [{"image": image, "mask": labels}]
    with torch.no_grad():
        shares = mean_probabilities(network, image, "d4")
    found = score_set(network, loader, 2, 255, "d4")
    assert found.loss == pytest.approx(nn.functional.nll_loss(shares.log(), labels).item(), abs=1e-6)
    assert found.accuracy == pytest.approx((shares.argmax(1) == labels).float().mean().item())
    assert found.loss != pytest.approx(score_set(network, loader, 2, 255).loss, abs=1e-4)


def scored(squares: Path, shared_runs: SharedRuns, **more: object) -> RunResult:
    path = shared_runs.result("pretrain").model_uri
    chosen = {"domain_adaptation__pretrained_checkpoint__path": path}
    return evaluate(load_config(None, small_settings(squares, **chosen, **more)))


def test_evaluate_scores_the_mean_and_its_run_says_so(squares, shared_runs, pretrained_place):
    plain, mean = (scored(squares, shared_runs, tta=tta) for tta in ("none", "d4"))
    client = mlflow.MlflowClient(tracking_uri=mean.tracking_uri)
    runs = {name: client.get_run(result.run_id) for name, result in (("plain", plain), ("mean", mean))}
    assert "dann.tta" not in runs["plain"].data.tags
    assert runs["mean"].data.tags["dann.tta"] == runs["mean"].data.params["cfg.tta"] == "d4"
    assert " with d4 TTA " in str(runs["mean"].info.run_name)
    assert " TTA" not in str(runs["plain"].info.run_name)
    # counted again: predict maps the same images with the same mean
    from conftest import model_folder

    files = sorted((squares / "target_val" / "images").iterdir())
    folder = model_folder(str(shared_runs.result("pretrain").artifacts))
    predict(
        load_settings(
            PredictConfig,
            None,
            {"model": str(folder), "input": [str(path) for path in files], "output": "maps/", "tta": "d4"},
        )
    )
    hits = [read(f"maps/{path.stem}.png") == read(str(squares / "target_val" / "masks" / path.name)) for path in files]
    assert mean.metrics["accuracy/target_val"] == pytest.approx(np.mean(hits))
    assert mean.metrics != plain.metrics


def test_names_and_digests_tell_runs_with_it_from_runs_without():
    config = load_config("digits")
    mean = replace(config, {"tta": "d4"})
    assert evaluation_name(mean, {"dann.method": "dann"}) == "evaluation of DANN with d4 TTA mnist-m seed 0"
    both = replace(mean, {"domain_adaptation.batchnorm": "target_stats"})
    assert " with AdaBN and d4 TTA " in evaluation_name(both, {})
    digests = [run_digest("evaluate", replace(config, {"tta": tta}), {}) for tta in ("none", "mirror", "d4")]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("job", [adapt, pretrain, compare, lambda config: run_sweep(SweepConfig(study="s"), config)])
def test_jobs_that_score_single_predictions_refuse_it(job, squares, workplace):
    config = load_config(None, small_settings(squares, tta="d4"))
    with pytest.raises(InputError, match=r"tta is 'd4', but .* score single predictions"):
        job(config)


def test_a_comparison_takes_no_evaluation_with_it(squares, shared_runs, pretrained_place):
    result = scored(squares, shared_runs, tta="mirror")
    with pytest.raises(InputError, match=r"mean of several predictions \(tta mirror\)"):
        compare(load_config(None, small_settings(squares)), CompareConfig(runs=[result.run_id]))
