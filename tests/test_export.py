"""Exported models: ONNX and torch.export files return what `predict` maps, say what they take, and are refused if they differ."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
import torch
from torch import nn

from dann_experiments.checkpoints.trained_model import Model, model_digest
from dann_experiments.cli import main
from dann_experiments.config import InputError
from dann_experiments.config.export import ExportConfig
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.jobs import export as export_job  # the function
from dann_experiments.jobs import predict
from dann_experiments.models.networks import build_network
from dann_experiments.prediction import standalone_files
from dann_experiments.prediction.arrays import map_arrays
from dann_experiments.prediction.standalone import BinMeans, Standalone, stride_of

PROJECT = Path(__file__).parents[1]
TREES = PROJECT.parent / "shared" / "data" / "neon_trees"
NAMES = ("ground", "roof", "tree")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
NETWORKS = {
    "unet": "resnet18",
    "deeplabv3plus": "mobilenet_v2",
    "segformer": "mit_b0",
    "pspnet": "resnet18",
    "fpn": "tu-mobilenetv3_small_050",
}


def a_model(arch: str = "unet", encoder: str = "tu-test_resnet", reading: Reading | None = None) -> Model:
    """A network of random weights whose classes are about equally frequent, with BatchNorm statistics unlike those of new layers,
    and bands of unlike ranges."""
    torch.manual_seed(0)
    network = build_network(arch, encoder, None, 3, len(NAMES), {})
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    normalization = Normalization((0.0, 10.0, 0.0), (255.0, 200.0, 255.0), (0.5, 0.4, 0.45), (0.25, 0.2, 0.22))
    with torch.no_grad():
        logits = network.eval()(torch.randn(2, 3, 128, 128))
        head = network.segmentation_head[0]
        head.weight.div_(logits.std((0, 2, 3))[:, None, None, None])
        head.bias.sub_(logits.mean((0, 2, 3))).div_(logits.std((0, 2, 3)))
    return Model(network, NAMES, 3, reading or Reading(), normalization, model_digest(network, NAMES), None)


def written(model: Model, path: Path, tile_size: int | None = None) -> standalone_files.Run:
    """The function of a file of the model."""
    graph = standalone_files.traced(Standalone(model, tile_size is None), 3, tile_size, stride_of(model))
    if path.suffix == ".onnx":
        standalone_files.write_onnx(graph, path, {}, {})
        return standalone_files.opened_onnx(path)
    standalone_files.write_pt2(graph, path, {})
    return standalone_files.opened_pt2(path)


def real_tiles(height: int, width: int) -> np.ndarray:
    """(2, 3, height, width) float32, a corner of each of the two orthophotos of trees."""
    tiles = []
    for path in sorted(TREES.glob("*/images/*.png")):
        with rasterio.open(path) as file:
            tiles.append(file.read([1, 2, 3], window=((0, height), (0, width))))
    return np.stack(tiles).astype(np.float32)


def logits(probabilities: np.ndarray) -> np.ndarray:
    """Logits up to a constant per pixel, from probabilities: their logarithms, without those too small to have digits."""
    return np.log(np.maximum(probabilities, 1e-6))


def test_the_graph_returns_what_predict_maps_also_beyond_the_range_and_where_data_lack():
    model = a_model()
    [image] = standalone_files.drawn_images(model, [(2, 64, 96)], 16)
    image[0, 1, 10:20, 30:50] = np.nan
    image[1, 2, 5, 5] = np.inf
    image[1, :, 40:50, :] = 1000.0
    with torch.no_grad():
        found = Standalone(model)(torch.from_numpy(image)).numpy()
    expected = map_arrays(model, image, tile_size=96)
    seen = expected != 255
    assert (~seen).sum() == 201
    assert np.isfinite(found).all()
    assert (found.argmax(1) == expected)[seen].all()
    assert len(np.unique(expected[seen])) > 1


@pytest.mark.parametrize("bins", [(1, 2), (2, 2), (3, 3), (6, 6)])
@pytest.mark.parametrize("size", [(6, 7), (8, 8), (5, 23)])
def test_bin_means_are_those_of_adaptive_pooling(bins, size):
    values = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(BinMeans(*bins)(values), nn.AdaptiveAvgPool2d(bins)(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "encoder"),
    [("unet", "tu-test_resnet"), *(pytest.param(*one, marks=pytest.mark.slow) for one in NETWORKS.items())],
)
def test_onnxruntime_finds_the_same_classes_at_several_sizes(arch, encoder, tmp_path):
    model = a_model(arch, encoder)
    run = written(model, tmp_path / "model.onnx")
    drawn = list(standalone_files.drawn_images(model, [(1, 64, 64), (3, 96, 160), (2, 256, 128)], 16))
    real = [real_tiles(128, 128), real_tiles(320, 256)] if TREES.exists() else []
    for images in [*drawn, *real]:
        expected = map_arrays(model, images, tile_size=max(images.shape[2:]), probabilities=True)
        found = run(images)
        np.testing.assert_allclose(logits(found), logits(expected), atol=1e-3)
        best = np.sort(expected, axis=1)
        sure = best[:, -1] - best[:, -2] > 1e-5  # else both classes are equally right
        assert (found.argmax(1) == expected.argmax(1))[sure].all()
        assert sure.mean() > 0.99
    stride = stride_of(model)
    shape = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].shape
    assert shape == ["batch", 3, f"{stride}*rows", f"{stride}*columns"]
    assert len(np.unique(np.concatenate([run(images).argmax(1).ravel() for images in drawn]))) > 1


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_of_one_size_takes_any_number_of_images(suffix, tmp_path):
    model = a_model("pspnet")
    run = written(model, tmp_path / f"model{suffix}", 64)
    for images in standalone_files.drawn_images(model, [(1, 64, 64), (5, 64, 64)], 16):
        expected = map_arrays(model, images, tile_size=64, probabilities=True)
        np.testing.assert_allclose(run(images), expected, atol=1e-5)


def deepness(path: Path, tile: np.ndarray) -> np.ndarray:
    """Class ids (h, w) of a tile (h, w, bands) uint8, with the steps of the plugin and the metadata that it reads."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [taken], [returned] = session.get_inputs(), session.get_outputs()
    assert returned.shape[2] == returned.shape[3], "the plugin refuses others"
    assert isinstance(taken.shape[-1], int), "it takes the size of a tile from here"
    facts = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    mean, std = (np.array(facts[f"standardization_{what}"], np.float32) for what in ("mean", "std"))
    values = (np.float32(tile[None] * (1.0 / 255.0)) - mean) / std
    [result] = session.run(None, {taken.name: values.transpose(0, 3, 1, 2)})
    result[result < facts["seg_thresh"]] = 0.0
    return result.argmax(1)[0]


def test_the_command_writes_what_deepness_reads_and_makes_no_run(pretrained_place, shared_runs, squares, capsys):
    run_id = shared_runs.result("pretrain").run_id
    client = mlflow.MlflowClient(f"sqlite:///{pretrained_place}/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    before = len(client.search_runs(ids))
    words = ["--model", f"runs:/{run_id}", "--output", "out/model.onnx", "--tile_size", "32", "--resolution", "50"]
    assert main(["export", *words]) == 0
    told = capsys.readouterr().out
    assert "Written: out/model.onnx" in told
    assert "32 pixels" in told
    assert "0 pixels have another class" in told
    assert len(client.search_runs(ids)) == before
    assert sorted(path.name for path in Path("out").iterdir()) == ["model.onnx"]

    facts = {prop.key: json.loads(prop.value) for prop in onnx.load("out/model.onnx").metadata_props}
    own = facts["dann"]
    assert own["run_id"] == run_id
    assert len(own["model_digest"]) == 32
    assert own["multiple_of"] == 8
    assert facts["model_type"] == "Segmentor"
    assert facts["class_names"] == {str(number): name for number, name in enumerate(own["class_names"])}
    assert (facts["resolution"], facts["tile_size"]) == (50.0, 32)

    image = sorted((squares / "target_val" / "images").iterdir())[0]
    predict(PredictConfig(f"runs:/{run_id}", input=str(image), output="map.tif"))
    with rasterio.open(image) as file, rasterio.open("map.tif") as mapped:
        assert (deepness(Path("out/model.onnx"), file.read().transpose(1, 2, 0)) == mapped.read(1)).all()

    assert main(["export", *words]) == 2
    assert "overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pt2_file_runs_without_this_project_and_takes_images_of_any_size(pretrained_place, shared_runs):
    run_id = shared_runs.result("pretrain").run_id
    result = export_job(ExportConfig(f"runs:/{run_id}", output="model.pt2"))
    assert (result.tile_size, result.multiple_of) == (None, 8)
    program = """
import json, sys, torch
extra = {"dann.json": ""}
module = torch.export.load("model.pt2", extra_files=extra).module()
shapes = [list(module(torch.zeros(count, 3, height, width)).shape) for count, height, width in ((1, 64, 96), (3, 128, 64))]
print(json.dumps([shapes, json.loads(extra["dann.json"]), "dann_experiments" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    shapes, facts, imported = json.loads(done.stdout.splitlines()[-1])
    assert shapes == [[1, 2, 64, 96], [3, 2, 128, 64]]
    assert facts["run_id"] == run_id
    assert facts["tile_size"] is None
    assert not imported


@pytest.mark.parametrize("wrong", [0.001, float("nan")])
def test_a_file_that_differs_from_predict_is_removed(wrong, pretrained_place, shared_runs, monkeypatch):
    opened = standalone_files.opened_pt2
    monkeypatch.setattr(standalone_files, "opened_pt2", lambda path: lambda images: opened(path)(images) + wrong)
    Path("out").mkdir()
    with pytest.raises(InputError, match="differ from those of predict"):
        export_job(ExportConfig(f"runs:/{shared_runs.result('pretrain').run_id}", output="out/model.pt2"))
    assert not list(Path("out").iterdir())


def test_missing_packages_are_named_with_the_way_to_install_them(empty_place, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else found(name, *more))
    with pytest.raises(InputError, match=r"needs the package onnx: pip install --editable \S*\[export\]"):
        export_job(ExportConfig("folder", output="model.onnx"))
    assert not list(empty_place.iterdir())


def test_a_tile_size_off_the_stride_is_refused(pretrained_place, shared_runs):
    with pytest.raises(InputError, match="tile_size is 50, but this network needs a multiple of 8, such as 56"):
        export_job(ExportConfig(f"runs:/{shared_runs.result('pretrain').run_id}", output="model.pt2", tile_size=50))


def test_a_network_of_one_size_asks_for_tile_size(tmp_path):
    model = a_model("pan")  # its small maps are pooled three times
    with pytest.raises(InputError, match=r"cannot trace this network for images of any size .*; set tile_size"):
        written(model, tmp_path / "model.pt2")


@pytest.mark.parametrize("settings", [{"output": "model.h5"}, {"output": "onnx"}, {"model": ""}, {"output": ""}])
def test_wrong_settings_are_refused(settings: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(settings))):
        ExportConfig(**{"model": "m", "output": "model.onnx", **settings})
