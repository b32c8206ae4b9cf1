"""Many images mapped by the worker pool: the maps of one process, in one run; a killed worker or machine loses nothing."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import rasterio
from test_predict import make_network, picture, run, save, write_tiff
from test_sweeps import environment, finish, until

from dann_experiments.config import InputError
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.jobs.predict import PredictResult
from dann_experiments.jobs.predict_workers import Task, map_in_pool, map_scene
from dann_experiments.prediction.mapping import Ended, Outcome
from dann_experiments.training.random_states import torch_threads
from dann_experiments.workers import pool as pools
from dann_experiments.workers.processes import available_cores

network = functools.cache(make_network)


@pytest.fixture
def model(workplace: Path) -> str:
    return str(save("model", network()))


def content(path: Path) -> bytes:
    """The bytes of a map without the id of its run."""
    with rasterio.open(path) as file:
        run_id = file.tags()["dann_run_id"]
    return path.read_bytes().replace(run_id.encode(), b"")


def run_alone(**given: Any) -> PredictResult:
    """A prediction by this process, with the threads of one worker of two: with others, last digits may differ."""
    with torch_threads(max(1, available_cores() // 2)):
        return run(**given)


def manifest(folder: str | Path) -> list[dict[str, str]]:
    """The rows of the only manifest below a folder."""
    (path,) = Path(folder).rglob("scenes.csv")
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scenes(count: int, height: int = 90, width: int = 80) -> None:
    Path("scenes").mkdir()
    for number in range(count):
        write_tiff(f"scenes/{number}.tif", picture(height, width, seed=number))


def test_workers_make_the_maps_of_one_process_in_one_run(model):
    scenes(3)
    (Path("scenes") / "3.tif").write_bytes(Path("scenes/0.tif").read_bytes()[:3000])
    more: dict[str, Any] = {"model": model, "input": "scenes", "tile_size": 64, "overlap": 16, "confidence": "entropy"}
    with pytest.raises(InputError, match=r"1 of 4 images have no map(?s:.*)3\.tif"):
        run_alone(**more, output="alone", vector="gpkg")
    with pytest.raises(InputError, match=r"1 of 4 images have no map(?s:.*)3\.tif"):
        run(**more, output="together", vector="gpkg", workers=2)
    names = sorted(path.name for path in Path("alone").iterdir())
    assert sorted(path.name for path in Path("together").iterdir()) == names
    assert len([name for name in names if name.endswith(".tif")]) == 6  # map and confidence
    for name in names:
        if name.endswith(".tif"):
            assert content(Path("alone") / name) == content(Path("together") / name)
    Path("scenes/3.tif").unlink()
    result = run(**more, output="together", vector="gpkg", workers=2)
    client = mlflow.MlflowClient(
        tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}"
    )  # MLflow keeps a store per address
    found = client.search_runs([result.experiment_id], order_by=["attributes.start_time"])
    assert len(found) == 3  # none of a worker's own
    alone, together = (one.data.metrics for one in found[:2])
    for key in ("predict/maps", "predict/pixels", "predict/polygons"):
        assert alone[key] == together[key] > 0
    assert result.metrics["predict/maps"] == 0  # all were there
    statuses = [
        [
            (Path(row["input"]).name, row["status"])
            for row in manifest(Path("mlruns") / result.experiment_id / one.info.run_id)
        ]
        for one in found
    ]
    wanted = [*((f"{number}.tif", "mapped") for number in range(3)), ("3.tif", "failed")]
    assert statuses == [wanted, wanted, [(f"{number}.tif", "existing") for number in range(3)]]


class FakePool(pools.Pool):
    """Workers that die as often as told."""

    def __init__(self, deaths: dict[int, int]) -> None:
        super().__init__(print, 2, 1)
        self.left, self._running = deaths, []

    @property
    def running(self) -> list[pools.Key]:
        return self._running

    def submit(self, key: pools.Key, task: Any) -> None:
        self._running.append(key)

    def _ended(self, seconds: float | None) -> list[pools.Ended]:
        key = int(self._running.pop(0))
        if self.left.get(key, 0):
            self.left[key] -= 1
            return [pools.Ended(key, death="was killed by SIGKILL")]
        return [pools.Ended(key, (Outcome(np.array([key])), 1.0))]

    def stop(self) -> list[pools.Key]:
        return []


def test_an_image_whose_workers_die_twice_is_given_up_and_named_and_the_others_are_mapped():
    tasks: list[Any] = [Task(Path(f"{number}.tif"), Path("x"), None, None, {}, "") for number in range(4)]  # pyright: ignore
    shown: list[float] = []
    ends = list(map_in_pool(FakePool({1: 1, 2: 5}), tasks, lambda done, name: shown.append(done)))
    assert sorted(end.number for end in ends) == [0, 1, 2, 3]
    failed = [end for end in ends if end.outcome is None]
    assert failed == [Ended(2, problem="2.tif: the worker that mapped it was killed by SIGKILL, 2 times.")]
    assert shown == [1, 2, 3, 4]


def two_midway(folder: Path) -> bool:
    """Two images have some finished rows, and are not finished."""
    return sum(rows_done(path) >= 2 for path in folder.glob("*.partial")) == 2


def rows_done(partial: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((partial / "state.json").read_text())["rows"]
    return 0


def start(*words: str, **more: Any) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "dann_experiments", "predict", "--model", "model", "--input", "scenes", "--tile_size", "64",
        "--batch_size", "2", "--accelerator", "cpu", *words,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **more,
    )


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_another_one_resumes_its_image(model):
    scenes(3, 900, 600)
    process = start("--output", "maps", "--workers", "2")
    until(lambda: two_midway(Path("maps")), process)
    first = next(Path("outputs").rglob("logs/worker-*.log"))
    os.kill(int(first.stem.partition("-")[2]), signal.SIGKILL)
    printed = " ".join(finish(process).split())  # lines are wrapped
    assert "was killed by SIGKILL" in printed
    assert "another one resumes it" in printed
    assert {row["status"] for row in manifest("mlruns")} == {"mapped"}
    run_alone(model=model, input="scenes", output="alone", tile_size=64, overlap=None, batch_size=2)
    for number in range(3):
        assert content(Path(f"maps/{number}.tif")) == content(Path(f"alone/{number}.tif"))
    assert not list(Path("maps").glob("*.partial"))


@pytest.mark.slow
def test_a_ray_machine_that_dies_loses_nothing(model, server):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    scenes(2, 2000, 600)  # long enough to be midway when the machine is gone
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = start(
            "--output", "maps", "--launcher", "ray", "--ray_address", cluster.address, "--tracking.uri", server
        )
        until(lambda: two_midway(Path("maps")), process)
        cluster.remove_node(second, allow_graceful=False)
        printed = " ".join(finish(process).split())  # lines are wrapped
    finally:
        cluster.shutdown()
    assert "another one resumes it" in printed
    run_alone(model=model, input="scenes", output="alone", tile_size=64, overlap=None, batch_size=2)
    for number in range(2):
        assert content(Path(f"maps/{number}.tif")) == content(Path(f"alone/{number}.tif"))


def test_a_cluster_needs_a_tracking_server_and_one_image_needs_no_workers(model, caplog):
    scenes(1)
    with pytest.raises(InputError, match=r"launcher is 'ray', but tracking\.uri is 'sqlite"):
        run(model=model, input="scenes", output="maps", launcher="ray")
    with pytest.raises(InputError, match="cpus_per_trial has no effect with launcher: processes"):
        run(model=model, input="scenes", output="maps", cpus_per_trial=2)
    run(model=model, input="scenes", output="maps", workers=2)
    assert "workers has no effect: there is one image." in caplog.text


def test_a_model_that_is_replaced_meanwhile_is_refused(model):
    scenes(1)
    settings = PredictConfig(model=model, input="scenes", output="maps", accelerator="cpu")
    task = Task(Path("scenes/0.tif"), Path("0.tif"), settings, None, {}, "digest of the model that the driver loaded")
    with pytest.raises(InputError, match="model model was replaced while images were mapped"):
        map_scene(task)
    assert not Path("0.tif").exists()
