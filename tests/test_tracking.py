"""Stores, statuses and `mlflow run`, with real servers and real processes."""

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
from mlflow.exceptions import ExecutionException
from test_jobs import nested

from dann_experiments import adapt, load_config, pretrain
from dann_experiments.tracking.store import without_secrets

PROJECT = Path(__file__).parents[1]


def test_a_run_on_a_server_holds_the_same_as_on_sqlite(server, workplace, squares, trained):
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
        "model",
        "figures",
        "tables",
        "features.safetensors",
    }
    assert len(run.inputs.dataset_inputs) == 5
    assert result.source_run_id == source.run_id  # found on the server
    assert result.metrics == trained.result("adapt").metrics


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


def mlflow_run(
    workplace: Path, *parameters: str, manager: str = "local", project: Path = PROJECT
) -> subprocess.CompletedProcess:
    arguments = [part for parameter in parameters for part in ("-P", parameter)]
    command = [sys.executable, "-m", "mlflow", "run", str(project), "-e", "adapt", "--env-manager", manager, *arguments]
    return subprocess.run(command, env=clean_environment(workplace), cwd=workplace, capture_output=True, text=True)


def test_mlflow_run_adapts_in_its_own_run_and_pretrains_in_another(workplace, squares):
    config = nested(small_settings(squares))
    (workplace / "c d.yaml").write_text(
        yaml.safe_dump(config)
    )  # a blank in the path: parameters reach the shell quoted
    done = mlflow_run(
        workplace, f"config={workplace}/c d.yaml", "gamma=2.5", "max_epochs=1", f"tracking.folder={workplace}/out"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()])
    assert sorted(run.data.tags["dann.job"] for run in runs) == ["adapt", "pretrain"]
    assert all(run.info.status == "FINISHED" for run in runs)
    adapted = next(run for run in runs if run.data.tags["dann.job"] == "adapt")
    assert adapted.data.params["gamma"] == "2.5"  # the string as mlflow run logged it
    assert adapted.data.params["cfg.domain_adaptation.method.lambda_schedule.gamma"] == "2.5"
    assert adapted.data.params["cfg.trainer.max_epochs"] == "1"
    assert adapted.data.tags["mlflow.project.entryPoint"] == "adapt"
    assert "iou/target_val" in adapted.data.metrics


def test_wrong_input_under_mlflow_run_leaves_no_run_running(workplace, squares, monkeypatch, capfd):
    """By the function behind `mlflow run`, which starts the same command in a process."""
    (workplace / "c.yaml").write_text(yaml.safe_dump(nested(small_settings(squares))))
    for name, value in clean_environment(workplace).items():
        monkeypatch.setenv(name, value)
    parameters = {"config": f"{workplace}/c.yaml", "feature_layer": "encoder.layer9"}
    with pytest.raises(ExecutionException):
        mlflow.projects.run(str(PROJECT), "adapt", parameters=parameters, env_manager="local")
    assert "layers that do" in "".join(capfd.readouterr())
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FAILED"]


@pytest.mark.slow
@pytest.mark.parametrize("manager", ["uv", "virtualenv"])
def test_mlflow_run_builds_its_environment_with(manager, workplace):
    """The real MLproject with a stand-in requirement set: its commands start in the new environment."""
    project = workplace / "project"
    project.mkdir()
    (project / "MLproject").write_text((PROJECT / "MLproject").read_text())
    conda = yaml.safe_load((PROJECT / "conda.yaml").read_text())
    python = next(item for item in conda["dependencies"] if isinstance(item, str) and item.startswith("python="))
    conda["dependencies"] = [python, "pip", {"pip": ["pyyaml==6.0.3", "setuptools"]}]
    (project / "conda.yaml").write_text(yaml.safe_dump(conda))
    stand_in = project / "dann_experiments"
    stand_in.mkdir()
    (stand_in / "__main__.py").write_text(
        "import sys, yaml, pathlib\n"
        "pathlib.Path('seen.yaml').write_text(yaml.safe_dump({'argv': sys.argv[1:], 'python': sys.prefix}))\n"
    )
    done = mlflow_run(workplace, "gamma=2.5", "optimizer.lr=1e-3", manager=manager, project=project)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = yaml.safe_load((project / "seen.yaml").read_text())
    assert seen["python"] != sys.prefix
    assert seen["argv"][0] == "adapt"
    assert seen["argv"][seen["argv"].index("--gamma") + 1] == "2.5"
    assert seen["argv"][-2:] == ["--optimizer.lr", "1e-3"]


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
