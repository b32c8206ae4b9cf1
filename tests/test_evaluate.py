"""`evaluate`: any model on any labelled set; its tables are counted again here, from the saved model's own files alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import model_folder, small_settings, squares_in, write_domain, write_raster
from PIL import Image
from sklearn.metrics import confusion_matrix

from dann_experiments import InputError, RunResult, adapt, evaluate, load_config, pretrain
from dann_experiments.checkpoints.saved_model import read_model_notes, save_model
from dann_experiments.data.reading import Normalization, Reading, reading_facts
from dann_experiments.reports.plots.confusion import draw_confusion, short_count
from dann_experiments.tracking.fetch_model import fetched
from dann_experiments.tracking.store import open_store

CHECKPOINT = "domain_adaptation.pretrained_checkpoint.path"
OTHER_NETWORK = {"model.arch": "fpn", "model.encoder_name": "resnet34", "model.encoder_depth": 5, "model.in_channels": 3,
                 "model.decoder_channels": None, "model.classes": 2}  # fmt: skip


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory) -> Iterator[RunResult]:
    """A source model that has learnt something, with a normalisation of each domain's own."""
    settings = small_settings(squares, data__normalization="domain", pretraining__max_epochs=6)
    with contextlib.chdir(tmp_path_factory.mktemp("trained")):
        yield pretrain(load_config(None, settings))


def scored(squares: Path, trained: RunResult, model: str | Path | None = None, **more: object) -> RunResult:
    """`evaluate` of `model` (default: the trained one's run) in the trained one's store; `more` as for small_settings."""
    return evaluate(load_config(None, evaluation(squares, trained, model, **more)))


def evaluation(squares: Path, trained: RunResult, model: str | Path | None = None, **more: object) -> dict[str, object]:
    """Settings as a user would give them for another's model: nothing of how it was trained."""
    settings = small_settings(squares, tracking__uri=trained.tracking_uri)
    kept = {key: value for key, value in settings.items() if not key.startswith(("model.", "pretraining.", "domain_"))}
    del kept["data.class_names"], kept["data.source.train"], kept["data.target.train"]
    chosen = {CHECKPOINT: str(model or trained.model_uri)}
    return kept | chosen | {key.replace("__", "."): value for key, value in more.items()}


def folder_of(trained: RunResult) -> Path:
    return model_folder(trained.artifacts)


def edited(trained: RunResult, where: Path, **changes: object) -> Path:
    """A copy of the trained model with other notes in dann.json (None = left out)."""
    shutil.copytree(folder_of(trained), where)
    notes = json.loads((where / "dann.json").read_text()) | changes
    (where / "dann.json").write_text(json.dumps({key: value for key, value in notes.items() if value is not None}))
    return where


def counted(model: Path, domain: Path, low: float, high: float, mean: list[float], std: list[float]) -> np.ndarray:
    """Confusion matrix of an SMP folder on images of 8 bit, one after the other."""
    network = smp.from_pretrained(str(model)).eval()
    truth, predicted = [], []
    for path in sorted((domain / "images").iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float()
        scaled = ((pixels - low) / (high - low)).clamp(0, 1)
        image = (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        with torch.no_grad():
            predicted.append(network(image[None]).argmax(1)[0].numpy())
        truth.append(np.array(Image.open(domain / "masks" / path.name)))
    return confusion_matrix(np.ravel(truth), np.ravel(predicted), labels=[0, 1])


def target_facts(trained: RunResult) -> dict:
    return json.loads((folder_of(trained) / "dann.json").read_text())["reading"]["target"]


def table_of(result: RunResult, name: str) -> pd.DataFrame:
    return pd.read_csv(Path(str(result.artifacts)) / "tables" / f"{name}.csv")


def tags_of(result: RunResult) -> dict[str, str]:
    return client(result).get_run(result.run_id).data.tags


def client(result: RunResult) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=result.tracking_uri)


def matrix(result: RunResult, name: str) -> list[list[int]]:
    return table_of(result, f"confusion_{name}").iloc[:, 1:].to_numpy().tolist()


def test_tables_and_metrics_are_those_counted_from_the_model_s_own_files(trained, squares, workplace):
    result = scored(squares, trained)
    facts = target_facts(trained)
    mean, std = facts["mean"], facts["std"]
    counts = counted(folder_of(trained), squares / "target_val", 0, 255, mean, std)
    assert counts.min() > 0  # a model that is right and wrong, or nothing is shown
    table = table_of(result, "confusion_target_val")
    assert list(table.columns) == ["truth", "ground", "square"]
    assert table["truth"].tolist() == ["ground", "square"]
    assert matrix(result, "target_val") == counts.tolist()
    shares = table_of(result, "confusion_target_val_normalised")
    assert shares.iloc[:, 1:].to_numpy() == pytest.approx(counts / counts.sum(1, keepdims=True), abs=1e-6)
    hits, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    expected = {
        "iou": hits / (truth + predicted - hits),
        "precision": hits / predicted,
        "recall": hits / truth,
        "f1": 2 * hits / (truth + predicted),
    }
    scores = table_of(result, "scores").query("set == 'target_val'").set_index("class")
    assert list(scores.index) == ["ground", "square", "mean", "floor"]
    logged = client(result).get_run(result.run_id).data.metrics
    for kind, values in expected.items():
        by_class = "class_iou" if kind == "iou" else kind
        assert scores[kind].tolist()[:3] == pytest.approx([*values, values.mean()], abs=1e-6)
        assert logged[f"{kind}/target_val"] == pytest.approx(values.mean())
        assert [logged[f"{by_class}/target_val/{name}"] for name in ("ground", "square")] == pytest.approx(values)
    assert scores.loc["floor", "iou"] == pytest.approx(truth.max() / truth.sum() / 2, abs=1e-6)
    assert logged["floor/target_val"] == pytest.approx(truth.max() / truth.sum() / 2)
    assert logged["accuracy/target_val"] == pytest.approx(hits.sum() / counts.sum())
    assert scores["truth_pixels"].tolist()[:2] == truth.tolist()
    assert scores["predicted_pixels"].tolist()[:2] == predicted.tolist()
    assert result.metrics == logged
    assert set(table_of(result, "scores")["set"]) == {"source_val", "target_val", "target_test"}


def ious(result):
    return {name: value for name, value in result.metrics.items() if "iou/" in name}


def test_a_run_s_model_scores_what_its_run_logged_and_is_linked_to_it(trained, squares, workplace):
    result = scored(squares, trained)
    assert {name: result.metrics[name] for name in ious(trained)} == ious(trained)
    assert result.source_run_id == trained.run_id
    tags = tags_of(result)
    assert tags["dann.job"] == "evaluate"
    assert tags["dann.source_run_id"] == trained.run_id
    assert tags["dann.model"] == trained.model_uri
    assert tags["dann.network_from"] == "model"
    assert tags["dann.normalisation_from"] == "source: model, target: model"
    files = {str(path.relative_to(result.artifacts)) for path in Path(result.artifacts).rglob("*") if path.is_file()}
    sets = ("source_val", "target_val", "target_test")
    assert files == {"config.yaml", "tables/scores.csv"} | {f"figures/confusion_{name}.png" for name in sets} | {
        f"tables/confusion_{name}{form}.csv" for name in sets for form in ("", "_normalised")
    }


def test_the_run_s_config_yaml_gives_the_same_numbers(trained, squares, workplace):
    result = scored(squares, trained)
    assert evaluate(load_config(Path(str(result.artifacts)) / "config.yaml")).metrics == result.metrics


def test_a_registered_model_is_evaluated_and_linked_to_the_run_that_made_it(trained, squares, workplace):
    store = client(trained)
    store.create_registered_model("squares")
    source = str(folder_of(trained))
    version = store.create_model_version("squares", source, run_id=trained.run_id)
    store.set_registered_model_alias("squares", "champion", version.version)
    for name in ("models:/squares@champion", f"models:/squares/{version.version}"):
        result = scored(squares, trained, name, **OTHER_NETWORK)
        assert {key: result.metrics[key] for key in ious(trained)} == ious(trained)
        assert tags_of(result)["dann.source_run_id"] == trained.run_id
        assert tags_of(result)["dann.model"] == name


@pytest.mark.parametrize("form", ["folder", "weights file", "runs:/"])
def test_a_saved_model_is_used_with_its_own_network_whatever_model_says(trained, squares, workplace, form):
    model = {"folder": folder_of(trained), "weights file": folder_of(trained) / "model.safetensors",
             "runs:/": f"runs:/{trained.run_id}"}[form]  # fmt: skip
    result = scored(squares, trained, model, **OTHER_NETWORK)
    assert {name: result.metrics[name] for name in ious(trained)} == ious(trained)
    params = client(result).get_run(result.run_id).data.params
    assert params["cfg.model.arch"] == "unet"
    assert params["cfg.model.decoder_channels"] == "[16, 8, 8]"
    assert params["cfg.data.class_names"] == "['ground', 'square']"
    assert params["cfg.data.normalization"] == "domain"


def test_a_checkpoint_takes_network_and_normalisation_of_the_settings(trained, squares, workplace):
    checkpoint = Path(str(trained.artifacts)) / "checkpoints" / "last.ckpt"
    own = {key: value for key, value in small_settings(squares).items() if key.startswith("model.")}
    train = {"data__source__train": ["source"], "data__target__train": ["target"], "data__normalization": "domain"}
    result = scored(squares, trained, checkpoint, **own, **train)
    for name in ("iou/source_val", "iou/target_val", "iou/target_test"):
        assert result.metrics[name] == trained.metrics[name]
    tags = tags_of(result)
    assert tags["dann.network_from"] == "settings"
    assert tags["dann.normalisation_from"] == "source: settings, target: settings"
    assert "dann.source_run_id" not in tags
    assert "class_iou/target_val/class_1" in result.metrics
    with pytest.raises(InputError, match="does not fit the network of `model`"):
        scored(squares, trained, checkpoint, **OTHER_NETWORK)


def test_the_model_s_normalisation_is_not_measured_again(trained, squares, workplace):
    """The evaluated images alone would give others."""
    write_domain(workplace / "bright", 3, seed=8, inverted=True)
    for path in (workplace / "bright" / "images").iterdir():
        Image.fromarray(np.array(Image.open(path)) // 2 + 60).save(path)
    more = {"data__source__val": [], "data__target__val": [], "data__target__test": [str(workplace / "bright")]}
    result = scored(squares, trained, **more, data__normalization="domain")
    facts = target_facts(trained)
    expected = counted(folder_of(trained), workplace / "bright", 0, 255, facts["mean"], facts["std"])
    assert matrix(result, "target_test") == expected.tolist()
    assert set(table_of(result, "scores")["set"]) == {"target_test"}


@pytest.mark.parametrize("scale", ["type", [0, 1000]])
def test_low_and_high_of_the_model_win_over_the_scale_of_the_settings(trained, squares, workplace, caplog, scale):
    facts = target_facts(trained) | {"scale": "percentiles", "low": [40.0] * 3, "high": [200.0, 210.0, 220.0]}
    notes = json.loads((folder_of(trained) / "dann.json").read_text())["reading"]
    model = edited(trained, workplace / "model", reading=notes | {"target": facts})
    result = scored(squares, trained, model, data__target__scale=scale)
    low, high = torch.tensor(facts["low"])[:, None, None], torch.tensor(facts["high"])[:, None, None]
    expected = counted(model, squares / "target_val", low, high, facts["mean"], facts["std"])
    assert matrix(result, "target_val") == expected.tolist()
    warned = "data.target.scale is [0.0, 1000.0], but the model was trained with percentiles" in caplog.text
    assert warned == (scale != "type")


def test_bands_and_nodata_of_the_model_are_used_where_the_settings_leave_them_unset(trained, squares, workplace):
    facts = target_facts(trained) | {"bands": [3, 1, 2], "nodata": [9.0]}
    notes = json.loads((folder_of(trained) / "dann.json").read_text())["reading"]
    model = edited(trained, workplace / "model", reading=notes | {"target": facts})
    for path in sorted((squares / "target_val" / "images").iterdir()):
        bands = np.array(Image.open(path)).transpose(2, 0, 1)[[1, 2, 0]]  # so that 3, 1, 2 is the order the model knows
        bands[:, :4] = 9
        write_raster(workplace / "turned" / "images" / f"{path.stem}.tif", bands)
    shutil.copytree(squares / "target_val" / "masks", workplace / "turned" / "masks")
    more = {"data__source__val": [], "data__target__val": [], "data__target__test": [str(workplace / "turned")]}
    turned = scored(squares, trained, model, **more)
    assert np.sum(matrix(turned, "target_test")) == 5 * 28 * 32
    plain = scored(squares, trained, model, **more, data__target__bands=[2, 3, 1], data__target__nodata=[])
    assert np.sum(matrix(plain, "target_test")) == 5 * 32 * 32
    assert tags_of(turned)["dann.normalisation_from"] == "target: model"
    assert matrix(turned, "target_test") != matrix(plain, "target_test")


def test_older_notes_with_mean_and_std_alone_are_used_for_both_domains(trained, squares, workplace):
    model = edited(trained, workplace / "model", reading=None, mean=[0.3, 0.4, 0.5], std=[0.2, 0.3, 0.4])
    result = scored(squares, trained, model)
    for domain in ("source", "target"):
        expected = counted(model, squares / f"{domain}_val", 0, 255, [0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
        assert matrix(result, f"{domain}_val") == expected.tolist()
    params = client(result).get_run(result.run_id).data.params
    assert (params["cfg.data.normalization"], params["cfg.data.mean"]) == ("fixed", "[0.3, 0.4, 0.5]")


def test_a_model_of_four_floating_point_bands_needs_no_settings_of_its_images(trained, squares, workplace):
    """Without its notes, the settings would lack the range and the mean of the fourth band."""
    arguments = {
        "encoder_name": "resnet18",
        "in_channels": 4,
        "classes": 2,
        "encoder_depth": 2,
        "decoder_channels": [8, 8],
    }
    network = smp.Unet(**arguments, encoder_weights=None)
    reading = Reading(scale=(-1.0, 1.0)), Normalization((-1.0,) * 4, (1.0,) * 4, (0.5,) * 4, (0.2,) * 4)
    facts = {"class_names": ["ground", "square"], "reading": {"target": reading_facts(*reading)}}
    save_model(workplace / "model", network, "unet", arguments, facts)
    values = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32)).astype(np.float32)
    write_raster(workplace / "set" / "images" / "0.tif", values)
    write_raster(workplace / "set" / "masks" / "0.tif", np.zeros((1, 32, 32), np.uint8))
    more = {"data__source__val": [], "data__target__val": [], "data__target__test": [str(workplace / "set")]}
    result = scored(squares, trained, workplace / "model", **more)
    with torch.no_grad():
        image = (torch.from_numpy(values) / 2 + 0.5 - 0.5) / 0.2
        squares_seen = int(network.eval()(image[None]).argmax(1).sum())
    assert matrix(result, "target_test") == [[32 * 32 - squares_seen, squares_seen], [0, 0]]


def test_a_domain_the_model_knows_nothing_of_is_normalised_by_the_settings(trained, squares, workplace, caplog):
    notes = json.loads((folder_of(trained) / "dann.json").read_text())["reading"]
    model = edited(trained, workplace / "model", reading={"source": notes["source"]})
    result = scored(squares, trained, model, data__mean=[0.3, 0.4, 0.5], data__std=[0.2, 0.3, 0.4])
    expected = counted(model, squares / "target_val", 0, 255, [0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
    assert matrix(result, "target_val") == expected.tolist()
    source = notes["source"]
    expected = counted(model, squares / "source_val", 0, 255, source["mean"], source["std"])
    assert matrix(result, "source_val") == expected.tolist()
    assert tags_of(result)["dann.normalisation_from"] == "source: model, target: settings"
    assert "does not record how target images are normalized" in caplog.text


def test_a_folder_of_save_pretrained_tells_its_network(trained, squares, workplace):
    network = smp.from_pretrained(str(folder_of(trained)))
    network.save_pretrained(str(workplace / "theirs"))
    fixed = {"data__mean": [0.3, 0.4, 0.5], "data__std": [0.2, 0.3, 0.4]}
    result = scored(squares, trained, workplace / "theirs", **fixed, data__class_names=["a", "b"])
    expected = counted(workplace / "theirs", squares / "target_val", 0, 255, *fixed.values())
    assert matrix(result, "target_val") == expected.tolist()
    assert "class_iou/target_val/b" in result.metrics
    assert tags_of(result)["dann.normalisation_from"] == "source: settings, target: settings"


def with_other_values(squares: Path, where: Path) -> Path:
    """target_val with masks that hold 7 for square, 3 for ground."""
    shutil.copytree(squares / "target_val", where)
    for path in (where / "masks").iterdir():
        Image.fromarray(np.where(np.array(Image.open(path)) == 1, 7, 3).astype(np.uint8)).save(path)
    return where


@pytest.mark.parametrize("names", [None, ["square", "ground"], ["tree", "square", "ground"]])
def test_named_labels_mean_the_model_s_classes_whatever_the_settings_call_theirs(trained, squares, workplace, names):
    folder = with_other_values(squares, workplace / "named")
    classes = {} if names is None else {"data__class_names": names, "model__classes": len(names)}
    result = scored(
        squares, trained, data__target__test=[str(folder)], data__target__value_map={7: "square", 3: "ground"},
        data__target__val=[], data__source__val=[], **classes,
    )  # fmt: skip
    assert result.metrics["class_iou/target_test/square"] == trained.metrics["class_iou/target_val/square"]
    assert result.metrics["class_iou/target_test/ground"] == trained.metrics["class_iou/target_val/ground"]


def test_plain_ids_with_other_names_of_as_many_classes_go_by_the_model_s_names(trained, squares, workplace, caplog):
    result = scored(squares, trained, data__class_names=["soil", "block"])
    assert "class_iou/target_val/square" in result.metrics
    warning = (
        "data.target: the plain ids in its masks are taken as the model's classes, ['ground', 'square'], although "
    )
    assert warning + "data.class_names names ['soil', 'block']" in caplog.text


def test_a_class_the_target_lacks_has_empty_scores_and_an_empty_normalised_row(trained, squares, workplace):
    folder = with_other_values(squares, workplace / "half")
    result = scored(
        squares, trained, data__target__test=[str(folder)], data__target__value_map={7: "square", 3: "ignored"},
        data__target__val=[], data__source__val=[],
    )  # fmt: skip
    assert table_of(result, "confusion_target_test_normalised").iloc[0, 1:].isna().all()
    row = table_of(result, "scores").set_index("class").loc["ground"]
    assert np.isnan(row["recall"])
    assert row["precision"] == row["f1"] == row["iou"] == 0
    assert "recall/target_test/ground" not in result.metrics


def test_what_was_chosen_by_target_labels_stays_tagged(trained, squares, workplace):
    store = client(trained)
    assert tags_of(scored(squares, trained))["dann.selected_with_target_labels"] == "false"
    store.set_tag(trained.run_id, "dann.selected_with_target_labels", "true")
    try:
        assert tags_of(scored(squares, trained))["dann.selected_with_target_labels"] == "true"
    finally:
        store.set_tag(trained.run_id, "dann.selected_with_target_labels", "false")


def test_sets_without_masks_are_left_out_with_a_word(trained, squares, workplace, caplog):
    caplog.set_level("INFO", logger="dann_experiments")
    result = scored(squares, trained, data__target__test=["target"])
    assert set(table_of(result, "scores")["set"]) == {"source_val", "target_val"}
    assert "data.target.test has no masks and is not scored" in caplog.text
    contexts = [item.tags[0].value for item in client(result).get_run(result.run_id).inputs.dataset_inputs]
    assert sorted(contexts) == ["source val", "target val"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({CHECKPOINT: None}, "evaluate needs a model: set source_checkpoint"),
        ({CHECKPOINT: "none.ckpt"}, "pretrained_checkpoint.path is none.ckpt, which does not exist"),
        ({CHECKPOINT: "runs:/0123456789abcdef0123456789abcdef"}, "which the tracking store does not have"),
        ({CHECKPOINT: "models:/nobody@champion"}, "which the tracking store does not have"),
        ({CHECKPOINT: "text.pt"}, "is not a checkpoint that torch can read"),
        ({"data.source.val": [], "data.target.val": [], "data.target.test": []}, "evaluate needs labeled images"),
        (
            {"data.source.val": [], "data.target.val": [], "data.target.test": ["target"]},
            "evaluate needs labeled images",
        ),
        ({"data.target.test": ["nowhere"]}, "nowhere, which does not exist"),
        (
            {"model.classes": 3, "data.class_names": ["a", "b", "c"]},
            "data.class_names names 3 classes, ['a', 'b', 'c'], but the model has 2, ['ground', 'square'], and the masks of "
            "data.source hold plain ids; map them to the model's classes with data.source.value_map",
        ),
        ({"data.class_names": ["square", "ground"]}, "has the model's classes in another order"),
        ({"data.target.value_map": {0: "tree", 1: "lake"}}, "names ['tree', 'lake'], but the model's classes are"),
        ({"data.target.ignore_values": [0, 1]}, "data.target.val: no pixel of its masks belongs to a class"),
        ({"data.target.value_map": {0: "ground"}}, "holds id 1, but data.target.value_map knows [0]"),
        ({"data.target.bands": [1, 2, 4]}, "has 3 bands, but data.target.bands is [1, 2, 4]"),
        (
            {"data.target.bands": [1, 2, 3, 4], "model.in_channels": 4, "data.normalization": "domain"},
            "bands names 4 bands",
        ),
        ({"trainer.accelerator": "mps"}, "trainer.accelerator is 'mps', but there is none on this machine"),
    ],
)
def test_wrong_input_is_refused_before_a_run_is_opened(trained, squares, workplace, settings, message):
    (workplace / "text.pt").write_text("no checkpoint")
    before = len(client(trained).search_runs([trained.experiment_id]))
    with pytest.raises(InputError) as error:
        evaluate(load_config(None, evaluation(squares, trained) | settings))
    assert message in str(error.value)
    assert len(client(trained).search_runs([trained.experiment_id])) == before
    assert not Path("outputs").exists()


def test_notes_of_a_saved_model_come_back_as_they_were_written(tmp_path):
    network = smp.Unet(
        "resnet18", encoder_weights=None, encoder_depth=2, decoder_channels=(8, 8), in_channels=2, classes=3
    )
    reading = Reading(bands=(4, 2), scale=(-1.0, 1.0), nodata=(-9999.0, float("nan")), pixel_size=0.3)
    normalisation = Normalization((-1.0, -1.0), (1.0, 1.0), (0.1, 0.2), (0.3, 0.4))
    arguments = {
        "encoder_name": "resnet18",
        "in_channels": 2,
        "classes": 3,
        "encoder_depth": 2,
        "decoder_channels": [8, 8],
    }
    facts = {
        "class_names": ["a", "b", "c"],
        "ignore_index": 0,
        "reading": {"target": reading_facts(reading, normalisation)},
    }
    save_model(tmp_path / "m", network, "unet", arguments, facts)
    notes = read_model_notes(tmp_path / "m")
    assert notes is not None
    assert (notes.arch, notes.arguments, notes.class_names, notes.ignore_index) == (
        "unet",
        arguments,
        ("a", "b", "c"),
        0,
    )
    assert (notes.in_channels, notes.classes) == (2, 3)
    assert list(notes.readings) == ["target"]
    assert repr(notes.readings["target"]) == repr((reading, normalisation))  # NaN is unequal to itself
    before = torch.get_rng_state()
    built = {name: value.shape for name, value in notes.build().state_dict().items()}
    assert torch.equal(torch.get_rng_state(), before)  # no weights are drawn that the saved ones replace
    assert built == {name: value.shape for name, value in network.state_dict().items()}


def test_a_checkpoint_file_and_another_library_s_folder_have_no_notes(trained, tmp_path):
    torch.save({}, tmp_path / "a.ckpt")
    shutil.copy(folder_of(trained) / "config.json", tmp_path)
    assert read_model_notes(tmp_path / "a.ckpt") is None
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    assert read_model_notes(tmp_path) is None


FACTS = {"low": [0] * 3, "high": [255] * 3, "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize(
    ("config", "notes", "message"),
    [
        ({}, {"arch": "os.system"}, "arch in its dann.json is 'os.system'; it must be one of ['deeplabv3'"),
        ({}, {"arch": None}, "arch in its dann.json is None"),
        ({"encoder_name": "tu-hf-hub:somebody/something"}, {}, "encoder_name in its config.json is 'tu-hf-hub:"),
        ({"encoder_name": ["resnet18"]}, {}, "encoder_name in its config.json is ['resnet18']"),
        ({"classes": 1}, {}, "classes in its config.json is 1; it must be a whole number of at least 2"),
        ({"in_channels": "3"}, {}, "in_channels in its config.json is '3'"),
        ({"_target_": "os.system"}, {}, "_target_ in its config.json is 'os.system'"),
        ({"aux_params": {"classes": 2}}, {}, "aux_params in its config.json"),
        ({}, {"class_names": ["ground"]}, "class_names in its dann.json is ['ground']; it must be 2 different names"),
        ({}, {"class_names": ["ground", "ground"]}, "it must be 2 different names"),
        ({}, {"class_names": [1, 2]}, "it must be 2 different names"),
        ({}, {"ignore_index": 256}, "ignore_index in its dann.json is 256"),
        ({}, {"reading": []}, "reading in its dann.json is []"),
        ({}, {"reading": {"target": {"mean": [0.5] * 3}}}, "reading.target in its dann.json is"),
        (
            {},
            {"reading": {"target": FACTS | {"mean": [0.5]}}},
            "reading.target.mean in its dann.json is (0.5,); it must be 3",
        ),
        ({}, {"reading": {"target": FACTS | {"mean": ["a"] * 3}}}, "reading.target.mean"),
        ({}, {"reading": {"target": FACTS | {"std": [1, 0, 1]}}}, "reading.target.std in its dann.json is (1, 0, 1)"),
        ({}, {"reading": {"target": FACTS | {"high": [0, 0, 0]}}}, "reading.target.high"),
        ({}, {"reading": {"target": FACTS | {"bands": [1, 2]}}}, "reading.target.bands"),
        ({}, {"reading": {"target": FACTS | {"scale": "twice"}}}, "reading.target.scale"),
        ({}, {"reading": {"target": FACTS | {"nodata": ["none"]}}}, "reading.target.nodata"),
        ({}, {"reading": {"target": FACTS | {"pixel_size": -1}}}, "reading.target.pixel_size"),
        ({}, {"reading": None, "mean": [0.5] * 3}, "std in its dann.json is None"),
    ],
)
def test_damaged_notes_are_refused_by_name(trained, tmp_path, config, notes, message):
    model = edited(trained, tmp_path / "model", **notes)
    whole = json.loads((model / "config.json").read_text()) | config
    (model / "config.json").write_text(json.dumps(whole))
    with pytest.raises(InputError) as error:
        read_model_notes(model, where="runs:/abc")
    assert str(error.value).startswith("model runs:/abc: ")
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "dann.json"])
def test_notes_that_are_no_json_mapping_are_refused_by_name(trained, tmp_path, name, content):
    model = edited(trained, tmp_path / "model")
    (model / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"its {name} (cannot be read|holds list)"):
        read_model_notes(model)


def test_notes_without_the_network_s_settings_are_refused(trained, tmp_path):
    model = edited(trained, tmp_path / "model")
    (model / "config.json").unlink()
    with pytest.raises(InputError, match=r"has dann\.json but no config\.json"):
        read_model_notes(model)


@pytest.mark.parametrize(("pixels", "shown"), [(0, "0"), (9999, "9999"), (10_000, "10k"), (12_345, "12.3k"), (999_499, "999k"),
                                               (999_600, "1M"), (4_560_000, "4.56M"), (2_000_000_000, "2G")])  # fmt: skip
def test_counts_in_the_figure_have_four_digits_at_most(pixels, shown):
    assert short_count(pixels) == shown


@pytest.mark.parametrize("count", [2, 7, 19])
def test_a_field_of_the_figure_is_as_large_whatever_the_number_of_classes(tmp_path, count):
    """Legible means enough room for two lines of text: 80 pixels a field."""
    counts = np.full((count, count), 1_234_567)
    draw_confusion(tmp_path / "c.png", counts, [f"$_{{$ {index} {'x' * 30}" for index in range(count)], "a set")
    width, height = Image.open(tmp_path / "c.png").size
    assert width / count > 80
    assert height / count > 80


def test_evaluate_of_a_set_in_a_fresh_place_needs_no_settings_but_the_set(trained, tmp_path, workplace):
    """No config of the model's training: the model's folder and the images."""
    root = squares_in(tmp_path / "elsewhere")
    settings = {CHECKPOINT: str(folder_of(trained)), "data.target.test": [str(root / "target_test")],
                "trainer.accelerator": "cpu", "threads": 1}  # fmt: skip
    result = evaluate(load_config(None, settings))
    assert result.metrics["iou/target_test"] == pytest.approx(trained.metrics["iou/target_test"])
    assert (workplace / "mlflow.db").is_file()


def test_a_run_without_a_model_is_refused(trained, squares, workplace):
    scores = scored(squares, trained)
    with pytest.raises(InputError, match=f"is 'runs:/{scores.run_id}', which the tracking store does not have"):
        scored(squares, trained, f"runs:/{scores.run_id}")


def test_another_job_s_own_key_is_named_where_a_model_is_not_there(workplace):
    store = open_store(None, "x")
    for path in ("none.pt", "runs:/0123456789abcdef0123456789abcdef", "models:/nobody/1"):
        with pytest.raises(InputError, match=f"^model is '?{path}'?, which "), fetched(path, store, key="model"):
            raise AssertionError("never reached")


def test_a_run_that_kept_no_file_is_told_as_that(workplace):
    """MLflow makes a run's folder with its first file, so that it is missing in a store that was moved and in this one."""
    store = open_store(None, "x")
    run_id = store.client.create_run(store.client.create_experiment("plain")).info.run_id
    told = pytest.raises(
        InputError, match=r"does not exist: the run kept no file, or the store was made in another folder"
    )
    with told, fetched(f"runs:/{run_id}", store):
        raise AssertionError("never reached")


@pytest.mark.parametrize("path", ["pipe.ckpt", "/dev/zero"])
def test_what_is_no_file_and_no_folder_is_refused_unread(workplace, path):
    """A pipe that nobody writes to would be waited for, a device without an end read until memory runs out."""
    os.mkfifo("pipe.ckpt")
    refusal = pytest.raises(InputError, match=f"path is {path}, which is neither a file nor a folder")
    with refusal, fetched(path, open_store(None, "x")):
        raise AssertionError("never reached")


TARGET_STATISTICS = {"domain_adaptation__batchnorm": "target_stats", "data__target__train": ["target"]}


def with_statistics_by_torch(trained: RunResult, images: Path, where: Path) -> Path:
    """The trained model with the statistics that torch itself keeps of one batch of all `images` (8 bit)."""
    network = smp.from_pretrained(str(folder_of(trained))).train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255 for path in sorted(images.iterdir())]
    mean, std = (torch.tensor(target_facts(trained)[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        network((torch.stack(pixels) - mean) / std)
    network.save_pretrained(str(where))
    return where


def test_with_target_stats_the_model_is_scored_with_the_statistics_of_the_target_s_training_images(
    trained, squares, workplace
):
    """In one batch of all 13 images every layer's statistics are torch's own."""
    before = {path: path.read_bytes() for path in folder_of(trained).iterdir()}
    result = scored(squares, trained, **TARGET_STATISTICS, data__target__batch_size=13)
    model = with_statistics_by_torch(trained, squares / "target" / "images", workplace / "adabn")
    notes = json.loads((folder_of(trained) / "dann.json").read_text())["reading"]
    for name in ("source_val", "target_val", "target_test"):
        facts = notes[name.split("_")[0]]
        assert matrix(result, name) == counted(model, squares / name, 0, 255, facts["mean"], facts["std"]).tolist()
    plain = scored(squares, trained)
    assert matrix(result, "target_val") != matrix(plain, "target_val")
    assert tags_of(result)["dann.batchnorm"] == "target_stats"
    assert "dann.batchnorm" not in tags_of(plain)
    assert {path: path.read_bytes() for path in folder_of(trained).iterdir()} == before
    inputs = client(result).get_run(result.run_id).inputs.dataset_inputs
    shown = {found.tags[0].value for found in inputs}
    assert shown == {"source val", "target val", "target test", "target train"}
    assert set(table_of(result, "scores")["set"]) == {"source_val", "target_val", "target_test"}


def test_the_run_s_config_yaml_gives_the_same_numbers_with_target_stats(trained, squares, workplace):
    result = scored(squares, trained, **TARGET_STATISTICS)
    assert evaluate(load_config(Path(str(result.artifacts)) / "config.yaml")).metrics == result.metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"data__crop_size": 16, "data__target__augmentation": "strong"},
        {"data__eval_batch_size": 1},
        {"seed": 7},
        {"data__memory_gb": 0},
    ],
    ids=str,
)
def test_target_statistics_are_of_whole_images_as_they_are_whatever_training_would_draw(
    trained, squares, workplace, more
):
    expected = scored(squares, trained, **TARGET_STATISTICS).metrics
    assert scored(squares, trained, **TARGET_STATISTICS, **more).metrics == pytest.approx(expected, abs=1e-6)


def test_masks_of_the_target_s_training_images_are_not_looked_for(trained, squares, workplace):
    expected = scored(squares, trained, **TARGET_STATISTICS).metrics
    shutil.copytree(squares / "target" / "images", workplace / "masked" / "images")
    (workplace / "masked" / "masks").mkdir()
    for path in (workplace / "masked" / "images").iterdir():
        (workplace / "masked" / "masks" / path.name).write_text("no mask at all")
    given = TARGET_STATISTICS | {"data__target__train": [str(workplace / "masked")]}
    assert scored(squares, trained, **given).metrics == expected


def test_target_stats_without_target_images_to_score_reads_them_as_the_model_does(trained, squares, workplace):
    expected = scored(squares, trained, **TARGET_STATISTICS).metrics
    less = {"data__target__val": [], "data__target__test": []}
    result = scored(squares, trained, **TARGET_STATISTICS, **less)
    assert result.metrics == {name: value for name, value in expected.items() if "source_val" in name}
    assert tags_of(result)["dann.normalisation_from"] == "source: model, target: model"


@pytest.mark.parametrize("value", ["joint", "source_only"])
def test_other_values_of_batchnorm_change_nothing_in_evaluate(trained, squares, workplace, value):
    more = TARGET_STATISTICS | {"domain_adaptation__batchnorm": value}
    result = scored(squares, trained, **more)
    assert result.metrics == scored(squares, trained).metrics
    assert "dann.batchnorm" not in tags_of(result)


def test_target_stats_without_training_images_or_without_batchnorm_is_refused_before_a_run(trained, squares, workplace):
    with pytest.raises(InputError, match=r"data\.target\.train, but that is empty; add target images"):
        scored(squares, trained, domain_adaptation__batchnorm="target_stats")
    arguments = {"encoder_name": "mit_b0", "in_channels": 3, "classes": 2, "decoder_use_norm": False}
    save_model(workplace / "plain", smp.Unet(**arguments, encoder_weights=None), "unet", arguments, {})
    runs = len(client(trained).search_runs(["1", "2", "3"]))
    with pytest.raises(InputError, match="no BatchNorm with running statistics; set it to separate"):
        scored(squares, trained, workplace / "plain", **TARGET_STATISTICS)
    assert len(client(trained).search_runs(["1", "2", "3"])) == runs


def test_with_test_batchnorm_each_set_is_scored_with_the_statistics_of_its_own_images(trained, squares, workplace):
    """In one batch of all images of a set, every layer's statistics are torch's own."""
    before = {path: path.read_bytes() for path in folder_of(trained).iterdir()}
    result = scored(squares, trained, test_batchnorm="images", data__target__batch_size=5)
    facts = target_facts(trained)
    for name in ("target_val", "target_test"):
        model = with_statistics_by_torch(trained, squares / name / "images", workplace / name)
        assert matrix(result, name) == counted(model, squares / name, 0, 255, facts["mean"], facts["std"]).tolist()
    plain = scored(squares, trained)
    assert matrix(result, "target_val") != matrix(plain, "target_val")
    assert tags_of(result)["dann.test_batchnorm"] == "images"
    assert not {"dann.batchnorm", "dann.test_batchnorm"} & tags_of(plain).keys()
    assert " with test-time BN " in client(result).get_run(result.run_id).info.run_name
    assert {path: path.read_bytes() for path in folder_of(trained).iterdir()} == before
    # no set has a part in another's scores, nor have masks, or how many images are scored at a time
    alone = scored(squares, trained, test_batchnorm="images", data__source__val=[], data__target__test=[], seed=3,
                   data__target__batch_size=5, data__eval_batch_size=1)  # fmt: skip
    assert alone.metrics == {
        name: pytest.approx(value) for name, value in result.metrics.items() if "target_val" in name
    }
    again = evaluate(load_config(Path(str(result.artifacts)) / "config.yaml"))
    assert again.metrics == result.metrics


def test_with_test_batchnorm_images_of_other_contrast_are_scored_like_those_of_training(trained, squares, workplace):
    """The source's own validation images, as target: at a third of their contrast the model as it is loses much."""
    facts = json.loads((folder_of(trained) / "dann.json").read_text())["reading"]["source"]
    model = edited(trained, workplace / "one", reading={"source": facts, "target": facts})
    mean = np.array(facts["mean"]) * 255  # contrast around the mean of training
    for name, factor in (("whole", 1.0), ("third", 1 / 3)):
        shutil.copytree(squares / "source_val", workplace / name)
        for path in (workplace / name / "images").iterdir():
            pixels = mean + (np.array(Image.open(path)) - mean) * factor
            Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(path)
    found = {
        (name, way): scored(
            squares, trained, model, data__target__val=[str(workplace / name)], test_batchnorm=way
        ).metrics
        for name in ("whole", "third")
        for way in ("running", "images")
    }
    iou = {key: metrics["iou/target_val"] for key, metrics in found.items()}
    assert iou["third", "running"] < iou["whole", "running"] - 0.05
    assert iou["third", "images"] == pytest.approx(iou["whole", "images"], abs=0.02)
    assert iou["third", "images"] > iou["third", "running"] + 0.05, iou


def test_test_batchnorm_is_refused_without_batchnorm_and_beside_target_stats_before_a_run(trained, squares, workplace):
    arguments = {"encoder_name": "mit_b0", "in_channels": 3, "classes": 2, "decoder_use_norm": False}
    save_model(workplace / "plain", smp.Unet(**arguments, encoder_weights=None), "unet", arguments, {})
    runs = len(client(trained).search_runs(["1", "2", "3"]))
    with pytest.raises(InputError, match="no BatchNorm with running statistics; set it to running"):
        scored(squares, trained, workplace / "plain", test_batchnorm="images")
    with pytest.raises(InputError, match="a network has one kind of statistics"):
        scored(squares, trained, test_batchnorm="images", **TARGET_STATISTICS)
    assert len(client(trained).search_runs(["1", "2", "3"])) == runs


def test_a_model_adapted_with_target_stats_holds_them_and_evaluate_gives_its_run_s_numbers(squares, pretrained_place):
    settings = small_settings(squares, domain_adaptation__batchnorm="target_stats")
    adapted = adapt(load_config(None, settings))
    scores = ["iou/source_val", "iou/target_val", "iou/target_test"]
    expected = [pytest.approx(adapted.metrics[name], abs=1e-6) for name in scores]
    for more in ({}, TARGET_STATISTICS | {"data__target__batch_size": 3}):
        result = scored(squares, adapted, **more)
        assert [result.metrics[name] for name in scores] == expected
