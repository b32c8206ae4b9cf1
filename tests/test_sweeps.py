"""Whole sweeps: real runs in a real store by real worker processes, some of which are killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from conftest import small_settings, squares_in
from mlflow.entities import Run

from dann_experiments import adapt, load_config
from dann_experiments.config import config_to_yaml
from dann_experiments.names import Tag
from sweeps.cli import main
from sweeps.study import SOURCE_ONLY, Sweep, open_storage

pytestmark = pytest.mark.slow  # a sweep of twelve trials, which most tests here look at

PROJECT = Path(__file__).parents[1]
METHOD = "domain_adaptation.method"
GAMMA, WIDTH = f"{METHOD}.lambda_schedule.gamma", f"{METHOD}.hidden_size"
SPACE = {
    GAMMA: {"type": "float", "low": 1, "high": 20},
    WIDTH: {"type": "int", "low": 4, "high": 32, "log": True},
    f"{METHOD}.feature_layer": {"type": "categorical", "choices": ["encoder", ["encoder", "decoder"]]},
}


def make_place(folder: Path, space: dict[str, Any] | None = None, **changed: object) -> Path:
    """A folder with small data, config.yaml and space.yaml."""
    folder.mkdir(exist_ok=True)
    root = squares_in(folder / "squares")
    settings = small_settings(root, **({"trainer__max_epochs": 4} | changed))
    (folder / "config.yaml").write_text(config_to_yaml(load_config(None, settings)))
    (folder / "space.yaml").write_text(yaml.safe_dump({"space": SPACE if space is None else space}))
    return folder


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}


def sweeps(place: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sweeps", *words]
    return subprocess.Popen(
        command, cwd=place, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def run_words(place: Path, *words: str) -> list[str]:
    return ["run", "--space", str(place / "space.yaml"), "--config", str(place / "config.yaml"), "--study", "s", *words]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    said = process.communicate(timeout=600)[0]
    assert process.returncode == code, said
    return said


def study_in(place: Path, name: str = "s") -> Sweep:
    return Sweep(open_storage(str(place / "studies" / "s" / "journal.log")), name)


def runs_of(place: Path, job: str, uri: str | None = None) -> list[Run]:
    client = mlflow.MlflowClient(uri or f"sqlite:///{place / 'mlflow.db'}")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(ids, f"tags.`dann.job` = '{job}'"))


def until(met: Callable[[], Any], process: subprocess.Popen | None = None, pause: float = 0.1) -> Any:
    """Poll, with pauses of so many seconds, until `met` gives something true; what it gives."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        with contextlib.suppress(KeyError, FileNotFoundError, StopIteration):
            found = met()
            if found:
                return found
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(pause)
    raise AssertionError("waited in vain")


def worker_in_a_run(place: Path) -> int:
    """Process id of a worker that is in the middle of a search trial's run."""
    for trial in study_in(place).trials():
        if trial.state.name == "RUNNING" and "run_id" in trial.user_attrs:
            return int(trial.user_attrs["worker"].rsplit(":", 2)[1])
    raise StopIteration


def check_ended(place: Path, trials: int, uri: str | None = None) -> None:
    """Exactly so many trials, all finished, and no run left open."""
    study = study_in(place) if uri is None else None
    if study is not None:
        assert len(study.counted()) == trials
        assert all(trial.state.is_finished() for trial in study.trials())
    runs = [*runs_of(place, "trial", uri), *runs_of(place, "sweep", uri)]
    assert all(run.info.status != "RUNNING" for run in runs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of 12 trials by two workers."""
    folder = make_place(
        tmp_path_factory.mktemp("sweep"), model__encoder_name="resnet18"
    )  # large enough to differ, and be pruned
    finish(sweeps(folder, *run_words(folder, "--n_trials", "12", "--workers", "2")))
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command of `sweeps` in this process, which has everything imported; what it printed, on one line."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)

    def run(place: Path, *words: str, code: int = 0) -> str:
        monkeypatch.chdir(place)
        assert main(words) == code, capsys.readouterr()
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    return run


def test_twelve_trials_end_finished_or_pruned_each_with_one_true_run(place):
    study = study_in(place)
    states = [trial.state.name for trial in study.trials()]
    assert len(states) == 12
    assert set(states) <= {"COMPLETE", "PRUNED"}
    assert "PRUNED" in states
    runs = {run.data.tags["dann.trial"]: run for run in runs_of(place, "trial")}
    assert sorted(map(int, runs)) == list(range(12))
    assert len(runs_of(place, "trial")) == 12
    sweep_run = runs_of(place, "sweep")[0]
    for trial in study.trials():
        run = runs[str(trial.number)]
        tags = run.data.tags
        assert run.info.status == "FINISHED"
        assert (tags["dann.study"], tags["dann.sweep_run_id"]) == ("s", sweep_run.info.run_id)
        assert tags["dann.selected_with_target_labels"] == "true"
        assert trial.user_attrs["run_id"] == run.info.run_id
        assert (tags.get("dann.pruned") == "true") == (trial.state.name == "PRUNED")
        assert "mlflow.parentRunId" not in tags
        for key, value in (trial.user_attrs["point"]).items():
            if value is not None:
                assert run.data.params[f"cfg.{key}"] == str(value)
        if trial.state.name == "PRUNED":
            assert len(trial.intermediate_values) < 4


def test_the_source_model_is_trained_once_for_all(place):
    assert len(runs_of(place, "pretrain")) == 1
    starts = {run.data.params["cfg.domain_adaptation.pretrained_checkpoint.path"] for run in runs_of(place, "trial")}
    assert starts == {f"runs:/{runs_of(place, 'pretrain')[0].info.run_id}/model"}


def test_the_source_model_is_scored_once_as_it_was(place):
    source = study_in(place).attribute(SOURCE_ONLY)
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    pretraining = client.get_run(runs_of(place, "pretrain")[0].info.run_id).data.metrics
    for name in ("iou/source_val", "iou/target_val", "iou/target_test"):
        assert source["scores"][name] == pytest.approx(pretraining[name], abs=1e-6)
    scored = client.get_run(source["run_id"])
    assert scored.data.tags["dann.study"] == "s"
    assert scored.info.start_time > min(run.info.start_time for run in runs_of(place, "trial"))  # none waited for it
    assert len(runs_of(place, "evaluate")) == 1
    assert "source only" in (place / "studies" / "s" / "report.md").read_text()


def test_the_first_trials_are_the_recipe_and_the_control(place):
    recipe, control = study_in(place).trials()[:2]
    assert (recipe.user_attrs["role"], control.user_attrs["role"]) == ("recipe", "control")
    assert recipe.params[GAMMA] == 10.0
    methods = {run.data.tags["dann.trial"]: run.data.tags["dann.method"] for run in runs_of(place, "trial")}
    assert (methods["0"], methods["1"], methods["2"]) == ("dann", "lambda_zero", "dann")


def test_trials_and_sweep_are_named_and_described(place):
    study, (sweep_run,) = study_in(place), runs_of(place, "sweep")
    names = {run.data.tags["dann.trial"]: run.info.run_name for run in runs_of(place, "trial")}
    assert names["0"] == "s trial 0, DANN target seed 0"
    assert names["1"] == "s trial 1, lambda = 0 control target seed 0"
    assert runs_of(place, "evaluate")[0].info.run_name == "s source only target seed 0"
    best = study.best()
    assert best is not None
    note, at = sweep_run.data.tags[Tag.NOTE], f"#/experiments/{sweep_run.info.experiment_id}/runs"
    assert note.startswith(f"**Sweep s**: best trial {best.number}")
    assert "lambda = 0 control 0." in note
    assert f"[report]({at}/{sweep_run.info.run_id}/artifacts/report.md?" in note
    assert f"({at}/{best.user_attrs['run_id']}?" in note
    trial = next(run for run in runs_of(place, "trial") if run.data.tags["dann.trial"] == "1")
    assert f"Made for [sweep]({at}/{sweep_run.info.run_id}?" in trial.data.tags[Tag.NOTE]


def test_reports_stand_in_the_folder_and_in_the_sweeps_run(place):
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    run = runs_of(place, "sweep")[0]
    assert run.info.status == "FINISHED"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"trials.csv", "best_config.yaml", "report.md", "figures", "logs"} <= names
    figures = place / "studies" / "s" / "figures"
    for name in ("history", "parallel_coordinates", "slices", "contour"):
        assert (figures / f"{name}.png").stat().st_size > 5000
    page = (figures / "study.html").read_text()
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page  # self-contained
    table = pd.read_csv(place / "studies" / "s" / "trials.csv")
    assert table["trial"].tolist() == list(range(12))
    assert {GAMMA, WIDTH, "run_id", "seed", "sampler_seed", "iou/target_test"} <= set(table.columns)
    report = (place / "studies" / "s" / "report.md").read_text()
    assert "Chosen by target labels" in report
    assert "importances: not drawn (" in report  # of so few trials
    assert "lambda = 0 control" in report
    assert "iou/target_test" in report


def test_the_best_config_gives_the_same_value_again(place, monkeypatch):
    study = study_in(place)
    best = study.best()
    assert best is not None
    monkeypatch.chdir(place)
    file = place / "studies" / "s" / "best_config.yaml"
    result = adapt(load_config(file, {"tracking.uri": f"sqlite:///{place / 'mlflow.db'}"}))
    assert result.metrics["iou/target_val"] == best.value


def test_any_trial_runs_again_to_the_same_numbers_from_the_settings_its_run_has(place, tmp_path, monkeypatch):
    trial = next(
        t for t in reversed(study_in(place).trials()) if t.state.name == "COMPLETE" and not t.user_attrs["reference"]
    )
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    monkeypatch.chdir(place)
    file = client.download_artifacts(trial.user_attrs["run_id"], "config.yaml", str(tmp_path))
    assert adapt(load_config(file)).metrics["iou/target_val"] == trial.value


def test_status_and_report_read_the_study(place, said):
    assert "12 trials" in said(place, "status", "--study", "s")
    assert "best_config.yaml" in said(place, "report", "--study", "s")
    assert "there is no" in said(place, "status", "--study", "other", code=2)
    assert "needs --study" in said(place, "resume", code=2)
    assert "has no effect in status" in said(place, "status", "--study", "s", "--workers", "2", code=2)
    assert "cannot be changed by resume" in said(place, "resume", "--study", "s", "--optimizer.lr", "1", code=2)
    assert "objective: 'iou/target_val'" in said(
        place, "resume", "--study", "s", "--objective", "loss/val_source", code=2
    )
    assert "sampler has no effect" in said(place, "confirm", "--study", "s", "--sampler", "gp", code=2)


def test_the_same_command_again_runs_nothing_and_more_trials_run_the_difference(place, said):
    said(place, *run_words(place, "--n_trials", "12"))
    assert len(study_in(place).trials()) == 12
    said(place, "resume", "--study", "s", "--n_trials", "13", "--workers", "1")
    check_ended(place, 13)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "iou/source_val"], "objective: 'iou/target_val' in the study, now 'iou/source_val'"),
        (["--direction", "minimize"], "direction"),
        (["--optimizer.lr", "0.5"], "optimizer.lr: 0.001 in the study, now 0.5"),
        (["--sampler", "random"], "sampler: 'tpe' in the study, now 'random'"),
    ],
)
def test_a_study_that_asks_something_else_is_not_continued(place, words, message, said):
    before = len(runs_of(place, "sweep"))
    assert message in said(place, *run_words(place, *words), code=2)
    assert len(runs_of(place, "sweep")) == before


def test_a_changed_space_is_refused_with_the_difference(place, said):
    (place / "wider.yaml").write_text(
        yaml.safe_dump({"space": SPACE | {GAMMA: {"type": "float", "low": 1, "high": 30}}})
    )
    words = run_words(place)
    words[2] = str(place / "wider.yaml")
    message = said(place, *words, code=2)
    assert f"space: {GAMMA}" in message
    assert "30.0" in message


@pytest.mark.slow
def test_confirm_runs_the_best_over_new_seeds_and_registers_the_best_mean(tmp_path, said, caplog):
    place = make_place(tmp_path, trainer__max_epochs=2)
    said(place, *run_words(place, "--n_trials", "3", "--workers", "1"))
    assert caplog.text.count("lambda is 0 in the first of 2 epochs") == 1
    words = ["confirm", "--study", "s", "--confirm_top", "1", "--confirm_seeds", "2", "--model_name", "net"]
    assert "models:/net@champion" in said(place, *words, "--workers", "2")
    table = pd.read_csv(place / "studies" / "s-confirm" / "confirm.csv")
    study = study_in(place, "s-confirm")
    assert {trial.user_attrs["seed"] for trial in study.trials()} == {1, 2}
    assert study_in(place).trials()[1].number in table["trial"].tolist()  # the control is confirmed too
    for _, row in table.iterrows():
        values = [trial.value for trial in study.trials() if trial.user_attrs["candidate"] == row["trial"]]
        assert row["iou/target_val mean"] == pytest.approx(sum(values) / 2)
    start = {"domain_adaptation.pretrained_checkpoint.path": "models:/net@champion"}
    again = adapt(load_config(place / "config.yaml", {**start, "tracking.uri": f"sqlite:///{place / 'mlflow.db'}"}))
    assert again.source_run_id in {trial.user_attrs["run_id"] for trial in study.trials()}
    before = len(study.trials())
    said(place, *words)
    assert len(study_in(place, "s-confirm").trials()) == before
