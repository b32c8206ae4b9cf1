"""Pixels without data count nowhere: not in the loss, the scores, the domain classifier, the prediction."""

from __future__ import annotations

import contextlib
import json

import mlflow
import numpy as np
import pytest
import torch
from conftest import model_folder, read_sets, small_settings, write_raster
from rasterio.transform import from_origin

from dann_experiments import InputError, adapt, load_config
from dann_experiments.adaptation.dann import DANNMethod
from dann_experiments.adaptation.domain_classifier import DomainClassifier, masked_mean
from dann_experiments.adaptation.method import Progress, StepOutputs
from dann_experiments.data.loaders import eval_loader, train_loader
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.reading import Reading
from dann_experiments.jobs.build import make_loaders, make_network
from dann_experiments.models.taps import resolve_taps
from dann_experiments.names import SOURCE_VAL, SetName
from dann_experiments.training.loop import together
from dann_experiments.training.losses import segmentation_loss
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.scoring import score_set

PROGRESS = Progress(0, 1, 5, 10)


def scene(path, mask_path, seed: int, size: int = 64, nodata: int | None = 0, hole: bool = True):
    """A georeferenced 4-band raster of bright squares, with a third of it without data."""
    rng = np.random.default_rng(seed)
    values = rng.integers(20, 60, (4, size, size)).astype(np.uint16) * 40
    mask = np.zeros((1, size, size), np.uint8)
    for _ in range(size * size // 250):
        top, left = rng.integers(0, size - 8, 2)
        values[:, top : top + 8, left : left + 8] += 5000
        mask[0, top : top + 8, left : left + 8] = 1
    if hole:
        values[:, :, : size // 3] = nodata or 0
    profile = {"crs": "EPSG:32617", "transform": from_origin(4e5, 3e6, 0.5, 0.5), "nodata": nodata}
    write_raster(path, values, **profile)
    if mask_path is not None:
        write_raster(mask_path, mask, crs=profile["crs"], transform=profile["transform"])


@pytest.fixture(scope="module")
def rasters(tmp_path_factory):
    """Two domains of one large raster each, of unequal size, and small ones to score."""
    root = tmp_path_factory.mktemp("rasters")
    scene(root / "source" / "images" / "s.tif", root / "source" / "masks" / "s.tif", 1, 160)
    scene(root / "source_val" / "images" / "v.tif", root / "source_val" / "masks" / "v.tif", 2, 80)
    scene(root / "target" / "images" / "t.tif", None, 3, 96)
    scene(root / "target_val" / "images" / "w.tif", root / "target_val" / "masks" / "w.tif", 4, 80)
    scene(root / "target_test" / "images" / "x.tif", root / "target_test" / "masks" / "x.tif", 5, 64)
    return root


def raster_settings(root, **more):
    return small_settings(root, **{
        "model__in_channels": 4, "data__normalization": "domain", "data__window_size": 32, "data__crop_size": 16,
        "data__source__scale": [0, 10000], "data__target__scale": "percentiles", "data__source__augmentation": "strong",
        "data__target__augmentation": "light", "trainer__max_epochs": 1, **more,
    })  # fmt: skip


def test_a_method_sees_no_pixel_of_the_target_that_holds_no_data():
    torch.manual_seed(0)
    method = DANNMethod("decoder", 4, hidden_size=8)
    source, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    valid = torch.ones(2, 8, 8)
    valid[:, :, :3] = 0

    def loss(features: torch.Tensor) -> float:
        labels = torch.zeros(2, 8, 8, dtype=torch.long)
        outputs = StepOutputs(
            torch.randn(2, 2, 8, 8), labels, torch.ones(2, 8, 8), {"decoder": source}, {"decoder": features}, valid
        )
        value = method.loss(outputs, PROGRESS).value
        assert value is not None
        return float(value)

    changed = target.clone()
    changed[:, :, :, :3] = 1e3
    assert loss(changed) == loss(target)
    changed[:, :, :, 3:] += 1
    assert loss(changed) != loss(target)


@pytest.mark.parametrize("kind", ["pooled", "pixel"])
def test_the_classifier_judges_valid_positions_alone(kind):
    torch.manual_seed(0)
    classifier = DomainClassifier(4, 8, kind)
    features = torch.randn(3, 4, 8, 8)
    valid = torch.ones(3, 8, 8)
    valid[0, 4:] = 0
    valid[2] = 0  # an image without any data has no vote
    loss, accuracy = classifier.domain_loss(features, 1, valid)
    if kind == "pooled":
        assert torch.allclose(masked_mean(features, valid)[0, :, 0, 0], features[0, :, :4].mean((1, 2)), atol=1e-6)
        kept = classifier(torch.stack([features[0, :, :4].mean((1, 2)), features[1].mean((1, 2))]))
    else:
        kept = torch.cat([classifier(features)[0, :, :4].flatten(1).T, classifier(features)[1].flatten(1).T])
    expected = torch.nn.functional.cross_entropy(kept, torch.ones(len(kept), dtype=torch.long))
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    assert float(accuracy) == pytest.approx(float((kept.argmax(1) == 1).float().mean()), abs=1e-6)


def loaded(root, **more):
    config = load_config(None, raster_settings(root, **more))
    return config, read_sets(config)


def test_the_values_under_nodata_change_neither_loss_nor_scores(tmp_path, rasters):
    """The same scene with other values in its hole, told by value or by the file: equal losses, scores and features."""
    found = []
    for number, nodata in enumerate((0, 9)):
        root = tmp_path / str(number)
        for part in ("source", "source_val", "target", "target_val", "target_test"):
            masks = None if part == "target" else root / part / "masks" / "a.tif"
            scene(root / part / "images" / "a.tif", masks, 1, nodata=nodata)
        config, data = loaded(root, data__source__augmentation="none", data__target__augmentation="none",
                                       data__target__scale=[0, 10000])  # fmt: skip
        torch.manual_seed(0)
        network = make_network(config)
        taps = resolve_taps(network, ["encoder"], 4, 32)
        torch.manual_seed(1)
        method = DANNMethod("encoder", taps[0].channels, hidden_size=8)
        module = AdaptationModule(network, method, taps, None, None, 255, "joint")  # pyright: ignore[reportArgumentType]
        batch = {
            domain: next(iter(train_loader(data.sets[SetName(domain, "train")], 2, domain, 0)))
            for domain in ("source", "target")
        }
        network.eval()
        outputs = module.step_outputs(batch)
        assert outputs.target_valid is not None
        value = method.loss(outputs, PROGRESS).value
        assert value is not None
        network.train()
        scores = score_set(network, eval_loader(data.sets[SOURCE_VAL], 4), 2, 255)
        loss = segmentation_loss(outputs.source_logits, outputs.source_labels, 255)
        found.append((float(loss), float(value), scores.loss, scores.confusion.tolist()))
    assert found[0] == found[1]
    hidden = 64 * (64 // 3)
    assert np.sum(found[0][3]) == 64 * 64 - hidden


@pytest.fixture(scope="module")
def run(rasters, tmp_path_factory):
    """Settings of two unequal domains of rasters, and a run with them."""
    folder = tmp_path_factory.mktemp("run")
    settings = raster_settings(
        rasters, data__source__batch_size=5, data__target__batch_size=2, tracking__uri=f"sqlite:///{folder}/mlflow.db"
    )
    with contextlib.chdir(folder):
        return settings, adapt(load_config(None, settings))


def test_two_unequal_domains_of_rasters_train_with_all_of_it(run, workplace):
    settings, result = run
    assert 0 <= result.metrics["iou/target_test"] <= 1
    assert adapt(load_config(None, settings)).metrics == result.metrics


def test_the_normalisation_is_kept_with_the_model_a_domain_each(run):
    facts = json.loads((model_folder(run[1].artifacts) / "dann.json").read_text())["reading"]
    assert facts["source"]["low"] == [0.0] * 4
    assert facts["source"]["high"] == [10000.0] * 4
    assert facts["target"]["scale"] == "percentiles"
    assert facts["target"]["low"] != [0.0] * 4
    assert facts["source"]["mean"] != facts["target"]["mean"]
    assert all(0 < value < 1 for domain in facts.values() for value in domain["mean"])


def test_an_epoch_is_the_longer_loader_once_and_the_shorter_cycles(rasters, workplace):
    config, data = loaded(rasters, data__source__batch_size=2, data__target__batch_size=3)
    loader = together(make_loaders(config, data).training())
    steps = {name: len(data.sets[SetName(name, "train")]) // size for name, size in (("source", 2), ("target", 3))}
    batches = [batch for batch, _, _ in loader]
    assert len(batches) == max(steps.values())
    assert steps["source"] > steps["target"]
    assert {tuple(batch["source"]["image"].shape) for batch in batches} == {(2, 4, 16, 16)}
    assert {tuple(batch["target"]["image"].shape) for batch in batches} == {(3, 4, 16, 16)}
    seen = [tuple(batch["target"]["index"].tolist()) for batch in batches]
    assert len(set(seen)) > steps["target"]  # another order each time round


def test_a_set_smaller_than_one_batch_trains_in_smaller_batches(run, workplace, caplog):
    result = adapt(load_config(None, run[0] | {"data.target.batch_size": 500}))
    assert "fewer than its batch size 500" in caplog.text
    run = mlflow.MlflowClient(tracking_uri=result.tracking_uri).get_run(result.run_id)
    assert "da/domain_loss" in run.data.metrics


def test_images_of_two_types_are_not_measured_together(tmp_path):
    for number, dtype in enumerate((np.uint8, np.uint16)):
        values = np.random.default_rng(number).integers(1, 200, (3, 32, 32)).astype(dtype)
        write_raster(tmp_path / "a" / "images" / f"{number}.tif", values)
    write_raster(tmp_path / "a" / "masks" / "0.tif", np.eye(32, dtype=np.uint8)[None])
    write_raster(tmp_path / "a" / "masks" / "1.tif", np.eye(32, dtype=np.uint8)[None])
    given = {"data.source.val": [], "data.target.val": [], "data.target.test": [], "monitor.metric": None}
    given |= {"data.source.train": ["a"], "data.target.train": ["a"]}
    config = load_config(None, small_settings(tmp_path) | given | {"data.normalization": "domain"})
    with pytest.raises(InputError, match=r"data\.source has images of uint16 and uint8"):
        read_sets(config)


@pytest.mark.parametrize("pixel_size", [0.2, 1.0, 1.15, 3.7])
def test_what_holds_data_does_not_depend_on_how_many_rows_of_a_file_are_read_at_a_time(
    tmp_path, monkeypatch, pixel_size
):
    values = np.random.default_rng(0).integers(1, 9, (2, 120, 90)).astype(np.uint16)
    values[:, np.random.default_rng(1).random((120, 90)) < 0.01] = 0
    write_raster(tmp_path / "a.tif", values, crs="EPSG:32617", transform=from_origin(4e5, 3e6, 0.5, 0.5), nodata=0)
    reading = Reading(pixel_size=pixel_size)
    height, width = reading.grid_size(read_header(tmp_path / "a.tif"), tmp_path / "a.tif")
    window = Window(1, 2, height - 3, width - 2)
    _, whole = read_pixels(tmp_path / "a.tif", 2, reading, window)
    monkeypatch.setattr("dann_experiments.data.pixels.BLOCK_BYTES", 3000)
    _, in_blocks = read_pixels(tmp_path / "a.tif", 2, reading, window)
    assert whole is not None
    assert in_blocks is not None
    assert not whole.all()
    np.testing.assert_array_equal(in_blocks, whole)
