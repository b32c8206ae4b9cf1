"""Stores and statuses of runs, with real servers and real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import small_settings
from test_jobs import nested

from dann_experiments import adapt, load_config, pretrain
from dann_experiments.tracking.store import without_secrets


@pytest.mark.slow
def test_a_run_on_a_server_holds_the_same_as_on_sqlite(server, workplace, squares, shared_runs):
    source = pretrain(load_config(None, small_settings(squares, tracking__uri=server)))
    result = adapt(load_config(None, small_settings(squares, tracking__uri=server)))
    client = mlflow.MlflowClient(tracking_uri=server)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    for metric in (
        "da/domain_loss",
        "da/domain_acc",
        "da/lambda",
        "loss/train_seg",
        "loss/train_da",
        "loss/train_total",
    ):
        assert [point.step for point in client.get_metric_history(result.run_id, metric)] == list(range(8))
    assert {item.path for item in client.list_artifacts(result.run_id)} == {
        "config.yaml",
        "checkpoints",
        "figures",
        "images",
        "tables",
        "features.safetensors",
    }
    assert [
        model.name
        for model in client.search_logged_models([result.experiment_id], f"source_run_id = '{result.run_id}'")
    ] == ["model"]
    assert len(run.inputs.dataset_inputs) == 5
    assert result.source_run_id == source.run_id  # found on the server
    assert result.metrics == shared_runs.result("adapt").metrics


def test_passwords_in_addresses_are_not_shown():
    assert without_secrets("http://me:secret@host:5000/x") == "http://host:5000/x"
    assert without_secrets("sqlite:///mlflow.db") == "sqlite:///mlflow.db"
    message = (
        "API request to http://me:se/c#r@et@host:5000/api failed; postgresql://host/db?user=me&password=secret&x=1 too"
    )
    assert without_secrets(message) == (
        "API request to http://host:5000/api failed; postgresql://host/db?user=***&password=***&x=1 too"
    )


def clean_environment(folder: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    environment["MLFLOW_ENV_ROOT"] = f"{folder}/envs"  # each test builds its environments anew
    return environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_killed_run_is_killed_in_the_store_with_its_metrics_and_checkpoints(pretrained_place, squares, signum, code):
    settings = small_settings(squares, trainer__max_epochs=500, trainer__enable_progress_bar=True)
    Path("c.yaml").write_text(yaml.safe_dump(nested(settings)))
    process = subprocess.Popen(
        [sys.executable, "-m", "dann_experiments", "adapt", "--config", "c.yaml"],
        env=clean_environment(pretrained_place), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 3/500"):
            process.send_signal(signum)
            break
    process.stdout.read()
    assert process.wait() == code
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{pretrained_place}/mlflow.db")
    run = client.search_runs(["1"], "tags.`dann.job` = 'adapt'")[0]
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "loss/train_seg")) >= 12
    assert [item.path for item in client.list_artifacts(run.info.run_id, "checkpoints")]


def test_runs_that_bring_the_same_new_data_set_at_once_are_all_logged(workplace):
    """MLflow refuses all but one of simultaneous first uses of a data set: each run must end with its input."""
    from concurrent.futures import ThreadPoolExecutor

    from dann_experiments.tracking.run import tracked_run
    from dann_experiments.tracking.store import open_store

    store = open_store(None, "inputs")

    def one_run(number: int) -> str:
        with tracked_run(store, None, f"run {number}", {}, workplace / "out", use_claimed=False) as run:
            for data_set in range(5):
                run.log_input(f"set {data_set}", "0" * 32, "source train", "nowhere", "{}")
            return run.run_id

    with ThreadPoolExecutor(6) as pool:
        run_ids = list(pool.map(one_run, range(6)))
    for run_id in run_ids:
        run = store.client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert len(run.inputs.dataset_inputs) == 5
