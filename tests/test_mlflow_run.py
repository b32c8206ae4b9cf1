"""`mlflow run` of this project: its run is the job's, its parameters are settings, its environment is the declared one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import small_settings
from mlflow.exceptions import ExecutionException
from test_jobs import nested
from test_tracking import clean_environment

PROJECT = Path(__file__).parents[1]


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
    assert sorted(run.info.run_name for run in runs) == ["DANN target seed 0", "source model source seed 0"]
    assert adapted.data.params["gamma"] == "2.5"  # the string as mlflow run logged it
    assert adapted.data.params["cfg.domain_adaptation.method.lambda_schedule.gamma"] == "2.5"
    assert adapted.data.params["cfg.trainer.max_epochs"] == "1"
    assert adapted.data.tags["mlflow.project.entryPoint"] == "adapt"
    assert "iou/target_val" in adapted.data.metrics


@pytest.mark.slow
def test_wrong_input_under_mlflow_run_leaves_no_run_running(workplace, squares, monkeypatch, capfd):
    """By the function behind `mlflow run`, which starts the same command in a process."""
    (workplace / "c.yaml").write_text(yaml.safe_dump(nested(small_settings(squares))))
    for name, value in clean_environment(workplace).items():
        monkeypatch.setenv(name, value)
    parameters = {"config": f"{workplace}/c.yaml", "feature_layer": "encoder.layer9"}
    mlflow.set_tracking_uri(f"sqlite:///{workplace}/mlflow.db")  # of this process, which other tests may have set
    try:
        with pytest.raises(ExecutionException):
            mlflow.projects.run(str(PROJECT), "adapt", parameters=parameters, env_manager="local")
    finally:
        mlflow.set_tracking_uri(None)
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
