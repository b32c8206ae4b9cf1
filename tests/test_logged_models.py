"""Every run that ends with a network has a model of MLflow's, which loads, predicts raw values, ranks and is stored once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import rasterio
import segmentation_models_pytorch as smp
import yaml
from conftest import model_folder
from mlflow.exceptions import MlflowException
from test_sweep_cluster import free_port

from dann_experiments import InputError, jobs
from dann_experiments.__main__ import main
from dann_experiments.checkpoints.mlmodel import LOADER_MODULE, check_mlmodel
from dann_experiments.config import load_config
from dann_experiments.jobs.load_model import load_model
from dann_experiments.prediction import pyfunc_model
from dann_experiments.prediction.pyfunc_model import SegmentationModel
from dann_experiments.tracking.fetch_model import fetched
from dann_experiments.tracking.logged_model import logged_model, models_without_run, send_model, write_facts
from dann_experiments.tracking.store import open_store

PARAMETERS = {"output": "classes", "domain": "", "tile_size": 512, "nodata": "", "tta": "none"}


@pytest.fixture
def place(workplace, shared_runs, monkeypatch):
    """A store with a pretraining and an adaptation, which is MLflow's current one."""
    shutil.copy(shared_runs.folder / "mlflow.db", workplace / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    return workplace


def raw_tile(squares: Path) -> np.ndarray:
    with rasterio.open(sorted((squares / "target_val" / "images").iterdir())[0]) as file:
        return file.read()


def test_a_run_has_one_logged_model_whose_scores_name_model_and_data_set(place, shared_runs):
    result = shared_runs.result("adapt")
    store = open_store(None, None, for_runs=False)
    model = logged_model(store.client, result.experiment_id, result.run_id)
    assert (model.status, model.model_type) == ("READY", "segmentation")
    run = store.client.get_run(result.run_id)
    inputs = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    scores = {metric.key: metric for metric in model.metrics}
    assert scores.keys() == {key for key in run.data.metrics if key.startswith("iou/") and key.count("_") == 1}
    for key, metric in scores.items():
        assert metric.value == run.data.metrics[key]
        assert inputs[metric.dataset_name] == metric.dataset_digest
        history = store.client.get_metric_history(result.run_id, key)
        assert (
            len({(point.step, point.timestamp) for point in history}) == len(history) == len({p.step for p in history})
        )
    (output,) = run.outputs.model_outputs
    assert output.model_id == model.model_id
    assert (
        output.step == max(point.step for point in store.client.get_metric_history(result.run_id, "loss/train_seg")) + 1
    )


def test_models_rank_by_a_score(place, shared_runs):
    experiment = [shared_runs.result("adapt").experiment_id]
    found = mlflow.search_logged_models(
        experiment, order_by=[{"field_name": "metrics.iou/target_val", "ascending": False}]
    )
    values = [next(m.value for m in metrics if m.key == "iou/target_val") for metrics in found["metrics"]]
    assert len(values) == 2
    assert values == sorted(values, reverse=True)


def test_the_files_lie_once_without_pickles(place, shared_runs):
    result = shared_runs.result("adapt")
    weights = [path for path in shared_runs.folder.rglob("*.safetensors") if path.name == "model.safetensors"]
    assert len(weights) == 2  # of pretraining and adaptation
    folder = next(path.parent for path in weights if result.run_id in (path.parent / "MLmodel").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "MLmodel", "README.md", "conda.yaml", "config.json", "dann.json", "input_example.json", "model.safetensors",
        "python_env.yaml", "requirements.txt", "serving_input_example.json",
    }  # fmt: skip
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == LOADER_MODULE == pyfunc_model.__name__
    assert described["model_id"] == folder.parent.name
    assert "dann" not in (folder / "requirements.txt").read_text()  # no public index has it
    listed = {
        item.path for item in open_store(None, None, for_runs=False).client.list_artifacts(result.run_id, "model")
    }
    assert "model/model.safetensors" in listed


def test_every_address_loads_the_same_model(place, shared_runs, squares):
    result = shared_runs.result("adapt")
    store = open_store(None, None, for_runs=False)
    model_id = logged_model(store.client, result.experiment_id, result.run_id).model_id
    store.client.create_registered_model("N")
    version = store.client.create_model_version("N", f"models:/{model_id}", result.run_id)
    store.client.set_registered_model_alias("N", "champion", version.version)
    tile = raw_tile(squares)[None]
    maps, digests = [], set()
    for address in (
        result.model_uri,
        f"runs:/{result.run_id}",
        f"models:/{model_id}",
        "models:/N@champion",
        "models:/N/1",
    ):
        digests.add(load_model(address, "target", None, store).digest)
        if address.count("/") > 1 or address.startswith("models"):
            maps.append(mlflow.pyfunc.load_model(address).predict(tile))
        with fetched(address, store) as (local, run_id):
            assert run_id == result.run_id
            network = smp.from_pretrained(str(local)).eval()
            assert sum(weight.numel() for weight in network.parameters()) > 80_000
    assert len(digests) == 1
    assert all(np.array_equal(one, maps[0]) for one in maps)


def test_the_python_function_maps_raw_values_as_predict_does(place, shared_runs, squares, tmp_path):
    result = shared_runs.result("adapt")
    image = sorted((squares / "target_val" / "images").iterdir())[0]
    wanted = load_predicted(result.model_uri, image, tmp_path)
    model = mlflow.pyfunc.load_model(result.model_uri)
    tile = raw_tile(squares)[None]
    ids = model.predict(tile)
    assert ids.dtype == np.uint8
    assert np.array_equal(ids[0], wanted)
    probabilities = model.predict(tile, params={"output": "probabilities"})
    assert probabilities.shape == (1, 2, *tile.shape[2:])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert np.array_equal(probabilities.argmax(1), ids)
    assert np.array_equal(model.predict(np.concatenate([tile, tile])), np.concatenate([ids, ids]))


def load_predicted(model: str, image: Path, folder: Path) -> np.ndarray:
    from dann_experiments import predict
    from dann_experiments.config.parsing import load_settings
    from dann_experiments.config.prediction import PredictConfig

    given = {
        "model": model,
        "input": str(image),
        "output": str(folder / "map.tif"),
        "tracking.folder": str(folder / "o"),
    }
    predict(load_settings(PredictConfig, None, given))
    with rasterio.open(folder / "map.tif") as file:
        return file.read(1)


def test_pixels_without_data_are_marked_and_large_arrays_are_cut_into_tiles(place, shared_runs):
    with fetched(shared_runs.result("adapt").model_uri, open_store(None, None, for_runs=False)) as (local, _):
        model = SegmentationModel(local)
        images = np.random.default_rng(0).integers(1, 255, (1, 3, 70, 130), dtype=np.uint8)
        images[:, :, 10:20, 30:50] = 0
        images[:, 0, 60:, 100:] = 0  # pure in one band of 8 bits: an ordinary color
        ids = model.predict(images, {"nodata": "0", "tile_size": 64})
        assert ids.shape == (1, 70, 130)
        missing = np.zeros((1, 70, 130), bool)
        missing[:, 10:20, 30:50] = True
        assert np.array_equal(ids == 255, missing)
        probabilities = model.predict(images, {"nodata": "0", "tile_size": 64, "output": "probabilities"})
        assert np.array_equal((probabilities == 0).all(1), missing)
        scaled = images.astype(np.float32)
        scaled[0, 1, 5, 5] = np.nan
        assert model.predict(scaled)[0, 5, 5] == 255
        assert model.predict(images[:0]).shape == (0, 70, 130)


@pytest.mark.parametrize(
    ("images", "params", "told"),
    [
        (np.zeros((3, 8, 8), np.uint8), {}, r"shape \(3, 8, 8\); the model takes \(N, 3, height, width\)"),
        (np.zeros((1, 4, 8, 8), np.uint8), {}, r"shape \(1, 4, 8, 8\)"),
        (np.zeros((1, 3, 0, 8), np.uint8), {}, r"shape \(1, 3, 0, 8\)"),
        (np.zeros((1, 3, 8, 8), complex), {}, "complex128"),
        (np.zeros((1, 3, 8, 8), np.uint8), {"output": "logits"}, "output is 'logits'; give classes or probabilities"),
        (np.zeros((1, 3, 8, 8), np.uint8), {"nodata": "x"}, "nodata is 'x'"),
        (np.zeros((1, 3, 8, 8), np.uint8), {"domain": "moon"}, "domain is 'moon'"),
        (np.zeros((1, 3, 8, 8), np.uint8), {"tile_size": 0}, "tile_size is 0"),
        (np.zeros((1, 3, 8, 8), np.uint8), {"tiles": 0}, "no parameter 'tiles'"),
    ],
)
def test_what_does_not_fit_is_told(place, shared_runs, images, params, told):
    with (
        fetched(shared_runs.result("adapt").model_uri, open_store(None, None, for_runs=False)) as (local, _),
        pytest.raises(InputError, match=told),
    ):
        SegmentationModel(local).predict(images, params)


def test_the_card_says_what_the_model_is(place, shared_runs):
    result = shared_runs.result("adapt")
    with fetched(result.model_uri, open_store(None, None, for_runs=False)) as (local, _):
        card = (local / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "segmentation-models-pytorch"
    assert f"| target test | {result.metrics['iou/target_test']:.4f} |" in card
    assert f"run `{result.run_id}`" in card
    assert "No target labels" in card


def test_a_model_that_the_store_could_not_take_is_sent_by_sync(pretrained_place, squares, monkeypatch):
    from dann_experiments.tracking import sender
    from dann_experiments.tracking.processes import process_name
    from dann_experiments.tracking.run import NotStored
    from dann_experiments.tracking.sync import sync

    def away(*args):
        raise OSError("away")

    config = load_config(None, small(squares))
    with monkeypatch.context() as patch:
        patch.setattr(sender, "send_model", away)
        patch.setattr(sender, "CLOSE_SECONDS", 0.0)
        with pytest.raises(NotStored, match="away"):
            jobs.adapt(config)
    store = open_store(None, None, for_runs=False)
    (folder,) = Path("outputs").iterdir()
    store.client.set_tag(folder.name, "dann.process", process_name().rpartition(":")[0] + ":0-0")  # its process is gone
    (leftover,) = sync(store, Path("outputs"))
    assert leftover.outcome == "sent, FINISHED"
    model = logged_model(store.client, store.client.get_run(leftover.run_id).info.experiment_id, leftover.run_id)
    assert model.status == "READY"
    assert {metric.key for metric in model.metrics} == {"iou/source_val", "iou/target_val", "iou/target_test"}


def small(squares: Path) -> dict[str, object]:
    from conftest import small_settings

    return small_settings(squares)


def test_a_model_of_a_run_of_an_older_version_loads(place, shared_runs, tmp_path):
    """These keep the model among the run's own artifacts, without MLmodel."""
    result = shared_runs.result("adapt")
    store = open_store(None, None, for_runs=False)
    with fetched(result.model_uri, store) as (local, _):
        shutil.copytree(
            local, tmp_path / "model", ignore=shutil.ignore_patterns("MLmodel", "*.yaml", "*.txt", "*example*")
        )
    wanted = load_model(result.model_uri, "target", None, store).digest
    run_id = store.client.create_run(result.experiment_id).info.run_id
    store.client.log_artifacts(run_id, str(tmp_path / "model"), "model")
    for address in (f"runs:/{run_id}/model", f"runs:/{run_id}"):
        assert load_model(address, "target", None, store).digest == wanted


@pytest.mark.parametrize(
    ("flavors", "told"),
    [
        (
            {"python_function": {"loader_module": "mlflow.pytorch"}},
            "names another loader 'mlflow.pytorch' than dann_experiments",
        ),
        ({"python_function": {"loader_module": LOADER_MODULE, "code": "code"}}, "brings code"),
        ({"pytorch": {}}, "names another loader than dann_experiments"),
        ("x", "MLmodel file cannot be read"),
    ],
)
def test_another_programs_mlmodel_is_refused(place, shared_runs, tmp_path, flavors, told):
    store = open_store(None, None, for_runs=False)
    with fetched(shared_runs.result("adapt").model_uri, store) as (local, _):
        shutil.copytree(local, tmp_path / "model")
    (tmp_path / "model" / "MLmodel").write_text(json.dumps({"flavors": flavors}))
    with pytest.raises(InputError, match=told):
        load_model(str(tmp_path / "model"), "target", None, store)


@pytest.mark.slow
def test_mlflow_serves_the_champion(place, shared_runs, squares):
    result = shared_runs.result("adapt")
    store = open_store(None, None, for_runs=False)
    model_id = logged_model(store.client, result.experiment_id, result.run_id).model_id
    store.client.create_registered_model("N")
    version = store.client.create_model_version("N", f"models:/{model_id}", result.run_id)
    store.client.set_registered_model_alias("N", "champion", version.version)
    tile = raw_tile(squares)[None]
    wanted = mlflow.pyfunc.load_model("models:/N@champion").predict(tile)
    port = free_port()
    words = ["models", "serve", "-m", "models:/N@champion", "--env-manager", "local", "--host", "127.0.0.1", "--port"]
    environment = (
        os.environ
        | {
            "MLFLOW_TRACKING_URI": store.uri,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated environment: it calls uvicorn
        }
    )
    with (place / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, str(port)], env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{address}/ping"):
            assert server.poll() is None, (place / "serve.log").read_text()
            time.sleep(0.2)
        body = {"inputs": tile.tolist(), "params": {"output": "classes"}}
        assert np.array_equal(np.array(posted(f"{address}/invocations", body)["predictions"]), wanted)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def posted(address: str, body: object) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def test_doctor_names_the_models_whose_run_was_deleted(place, shared_runs, capsys):
    result = shared_runs.result("adapt")
    store = open_store(None, None, for_runs=False)
    assert main(["doctor"]) == 0
    assert "models:/" not in capsys.readouterr().out
    store.client.delete_run(result.run_id)
    assert main(["doctor"]) == 0
    model_id = logged_model(store.client, result.experiment_id, result.run_id).model_id
    assert f"models:/{model_id}: its run was deleted" in capsys.readouterr().out
    assert load_model(f"models:/{model_id}", "target", None, store).run_id == result.run_id


def test_runs_says_that_models_are_left_of_deleted_runs(place, shared_runs, capsys):
    pretrained = shared_runs.result("pretrain")
    assert main(["runs", "--tracking.experiment", "dann"]) == 0
    assert "left of deleted runs" not in capsys.readouterr().out
    open_store(None, None, for_runs=False).client.delete_run(pretrained.run_id)
    assert main(["runs", "--tracking.experiment", "dann"]) == 0
    assert (
        "1 of our models in this experiment are left of deleted runs; `doctor` lists them." in capsys.readouterr().out
    )


def test_a_store_that_was_moved_says_where_it_looks_for_the_files(workplace, shared_runs):
    result = shared_runs.result("adapt")
    shutil.copy(shared_runs.folder / "mlflow.db", workplace / "mlflow.db")
    with closing(sqlite3.connect(workplace / "mlflow.db")) as database, database:
        moved = "UPDATE logged_models SET artifact_location = '/nowhere' || artifact_location"
        assert database.execute(moved).rowcount == 2
    store = open_store(None, None, for_runs=False)
    with pytest.raises(
        InputError, match=r"model is 'runs:/.*files the tracking store has in /nowhere/.*does not exist.*Put"
    ):
        load_model(result.model_uri, "target", None, store)


class OfMlflow2:
    """A client whose server has no logged models; it answers as MLflow 2.22.4 does."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        if "logged_model" not in name:
            return getattr(self._client, name)

        def refuse(*args: Any, **more: Any) -> None:
            text = "API request to endpoint /api/2.0/mlflow/logged-models failed with error code 404 != 200. Response body: ''"
            raise MlflowException(text)

        return refuse


def test_a_server_of_mlflow_2_keeps_the_model_among_the_run_s_files(place, shared_runs, tmp_path, caplog):
    result = shared_runs.result("adapt")
    store = open_store(None, None, for_runs=False)
    run_id = store.client.create_run(result.experiment_id).info.run_id
    with fetched(result.model_uri, store) as (local, _):
        shutil.copytree(local, tmp_path / "model")
    write_facts(tmp_path, result.experiment_id, 8, {}, {}, [])
    older = dataclasses.replace(store, client=OfMlflow2(store.client))
    send_model(older.client, run_id, tmp_path)
    assert "MLflow 2" in caplog.text
    assert load_model(f"runs:/{run_id}", "target", None, older).run_id == run_id
    assert models_without_run(older, [result.experiment_id]) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it has no mapping of flavors"),
        ("flavors: {python_function: dann_experiments.prediction.pyfunc_model}", "names another loader than"),
        (
            "a: &a [1, 1, 1]\nb: &b [*a, *a, *a]\nflavors: {python_function: {loader_module: [*b, *b]}}",
            "names another loader than",
        ),
        (f"flavors: {{python_function: {{loader_module: {'x' * 5000}}}}}", "names another loader 'xxx"),
        (
            "flavors: {python_function: {loader_module: dann_experiments.prediction.pyfunc_model, code: [x]}}",
            r"brings code \(code\)",
        ),
    ],
)
def test_what_a_stranger_s_mlmodel_says_is_not_written_out(tmp_path, text, told):
    """Aliases of a few hundred bytes may stand for gigabytes of text."""
    (tmp_path / "MLmodel").write_text(text)
    with pytest.raises(InputError, match=told) as error:
        check_mlmodel(tmp_path, "models:/m")
    assert len(str(error.value)) < 500


def test_every_file_of_a_model_can_be_read_by_those_who_may_read_one(shared_runs):
    folder = model_folder(str(shared_runs.result("adapt").artifacts))
    assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1


def test_the_description_says_the_size_of_the_whole_model(shared_runs):
    folder = model_folder(str(shared_runs.result("adapt").artifacts))
    size = yaml.safe_load((folder / "MLmodel").read_text())["model_size_bytes"]
    assert size >= (folder / "model.safetensors").stat().st_size


def test_a_service_gets_our_message_as_an_error_of_mlflow_s(shared_runs):
    import mlflow
    from mlflow.exceptions import MlflowException

    model = mlflow.pyfunc.load_model(str(model_folder(str(shared_runs.result("adapt").artifacts))))
    with pytest.raises(MlflowException, match="output is 'bogus'; give classes or probabilities") as error:
        model.predict(np.zeros((1, 3, 32, 32), np.uint8), params={"output": "bogus"})
    assert error.value.get_http_status_code() == 400
    assert isinstance(error.value, InputError)
