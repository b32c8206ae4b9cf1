"""Habits of MLflow users: variables left behind, runs deleted in the UI, artifacts kept elsewhere, old file stores."""

from __future__ import annotations

import contextlib
import logging
import shlex
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from conftest import small_settings
from mlflow.cli import cli as mlflow_command
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from test_sweep_cluster import free_port, start_server, stop_server

from dann_experiments import adapt, evaluate, load_config
from dann_experiments.__main__ import main
from dann_experiments.config import InputError
from dann_experiments.jobs import check_data
from dann_experiments.jobs.overview import overview
from dann_experiments.tracking import artifacts, environment, sender
from dann_experiments.tracking.run import TrackedRun, tracked_run
from dann_experiments.tracking.store import Store, open_store


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What a process remembers of stores that it has seen is forgotten; warnings are kept."""
    monkeypatch.setattr(artifacts, "_good", set())
    monkeypatch.setattr(environment, "_told", set())
    monkeypatch.setattr(sender, "SEND_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "dann_experiments")


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, workplace: Path) -> str:
    """A sqlite store, and a real server's."""
    return f"sqlite:///{workplace}/mlflow.db" if request.param == "sqlite" else request.getfixturevalue("server")


# --- MLFLOW_RUN_ID -----------------------------------------------------------------------------------------------------------


def left_run(store: Store, how: str) -> str:
    """The id of a run that no new job may write to."""
    if how == "unknown":
        return "0" * 32
    if how == "no id":
        return "it's, no id"
    run_id = store.client.create_run(store.experiment_id).info.run_id
    if how == "has a job":
        store.client.set_tag(run_id, "dann.job", "adapt")
    elif how == "deleted":
        store.client.delete_run(run_id)
    else:
        store.client.set_terminated(run_id, how)
    return run_id


@pytest.mark.parametrize("how", ["FINISHED", "FAILED", "KILLED", "has a job", "deleted", "unknown", "no id"])
def test_a_run_left_in_the_environment_is_left_alone_and_named_once(workplace, monkeypatch, caplog, how):
    store = open_store(None, "other")
    run_id = left_run(store, how)
    before = None if how in ("unknown", "no id") else store.client.get_run(run_id).to_dictionary()
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    open_store(None, None, for_runs=False)  # as `--resume` looks first
    opened = open_store(None, None)
    assert (opened.claimed_run_id, opened.experiment) == (None, "dann")
    with tracked_run(opened, None, "x", {"dann.job": "x"}, workplace / "out", use_claimed=True) as run:
        assert run.run_id != run_id
    if before is not None:
        assert store.client.get_run(run_id).to_dictionary() == before
    (told,) = [record.getMessage() for record in caplog.records if "MLFLOW_RUN_ID" in record.getMessage()]
    assert run_id in told
    assert "unset MLFLOW_RUN_ID" in told


def test_a_job_leaves_the_tags_of_a_finished_run_as_they_are(pretrained_place, squares, shared_runs, monkeypatch):
    config, first = load_config(None, small_settings(squares)), shared_runs.result("pretrain")
    uri = f"sqlite:///{pretrained_place}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    before = client.get_run(first.run_id).to_dictionary()
    monkeypatch.setenv("MLFLOW_RUN_ID", first.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert check_data(config).run_id != first.run_id
    assert client.get_run(first.run_id).to_dictionary() == before


def test_a_run_that_waits_for_a_job_is_taken_with_its_store_and_experiment(workplace, monkeypatch, caplog):
    store = open_store(f"sqlite:///{workplace}/other.db", "of mlflow run")
    run_id = store.client.create_run(store.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "unused")
    opened = open_store(f"sqlite:///{workplace}/mlflow.db", "settings")
    assert (opened.uri, opened.experiment, opened.claimed_run_id) == (store.uri, "of mlflow run", run_id)
    assert "MLFLOW_RUN_ID" not in caplog.text


def test_a_left_variable_brings_no_other_store(workplace, monkeypatch):
    store = open_store(f"sqlite:///{workplace}/other.db", "other")
    monkeypatch.setenv("MLFLOW_RUN_ID", left_run(store, "FINISHED"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    opened = open_store(f"sqlite:///{workplace}/mlflow.db", None)
    assert opened.uri == f"sqlite:///{workplace}/mlflow.db"


def test_the_second_of_two_commands_under_one_mlflow_run_begins_a_run_of_its_own(workplace, monkeypatch):
    store = open_store(None, "both")
    run_id = store.client.create_run(store.experiment_id).info.run_id
    made = []
    for job in ("check-data", "adapt"):
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        opened = open_store(None, "both")
        with tracked_run(opened, None, job, {"dann.job": job}, workplace / "out", use_claimed=True) as run:
            made.append(run.run_id)
    assert made[0] == run_id != made[1]
    assert store.client.get_run(run_id).data.tags["dann.job"] == "check-data"


# --- MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "name", "number", "used"),
    [
        (None, None, None, "dann"), (None, "mine", None, "mine"), (None, "", "", "dann"), (None, None, "1", "there"),
        (None, "there", "1", "there"), ("set", "mine", "1", "set"), ("dann", "mine", None, "dann"), (None, "new", "1", "new"),
    ],
)  # fmt: skip
def test_the_experiment_is_the_setting_s_else_the_environment_s_else_dann(
    workplace, monkeypatch, setting, name, number, used
):
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db").create_experiment("there")
    for variable, value in (("MLFLOW_EXPERIMENT_NAME", name), ("MLFLOW_EXPERIMENT_ID", number)):
        if value is not None:
            monkeypatch.setenv(variable, value)
    config = load_config(None, {} if setting is None else {"tracking.experiment": setting})
    store = open_store(None, config.tracking.experiment)
    assert store.experiment == used
    assert store.client.get_experiment(store.experiment_id).name == used


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MLFLOW_EXPERIMENT_ID": "77"}, "MLFLOW_EXPERIMENT_ID is '77', which the tracking store does not have"),
        ({"MLFLOW_EXPERIMENT_ID": "a b"}, "MLFLOW_EXPERIMENT_ID is 'a b', which the tracking store does not have"),
        ({"MLFLOW_EXPERIMENT_ID": "0", "MLFLOW_EXPERIMENT_NAME": "there"}, "'there', whose id is 1, but MLFLOW_EXPERIMENT_ID"),
        ({"MLFLOW_EXPERIMENT_NAME": "x" * 501}, "MLFLOW_EXPERIMENT_NAME has 501 characters"),
    ],
)  # fmt: skip
def test_a_variable_that_names_no_experiment_is_told(uri, monkeypatch, variables, message):
    client = mlflow.MlflowClient(tracking_uri=uri)
    with contextlib.suppress(mlflow.MlflowException):
        client.create_experiment("there")
    message = message.replace("id is 1", f"id is {client.get_experiment_by_name('there').experiment_id}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as told:
        open_store(uri, None)
    assert message in str(told.value)


@pytest.mark.parametrize("named_by", ["tracking.experiment", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"])
def test_a_deleted_experiment_is_told_with_the_command_that_restores_it(workplace, monkeypatch, named_by):
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    if named_by.startswith("MLFLOW"):
        monkeypatch.setenv(named_by, number if named_by.endswith("ID") else "gone")
    with pytest.raises(InputError, match=f"{named_by} is .*mlflow experiments restore --experiment-id {number}"):
        open_store(None, "gone" if named_by == "tracking.experiment" else None)


def test_a_run_keeps_the_experiment_in_its_settings_and_goes_on_in_it_without_the_variable(
    pretrained_place, squares, shared_runs, monkeypatch
):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    result = evaluate_of(shared_runs.result("pretrain").model_uri, squares)
    client = mlflow.MlflowClient(tracking_uri=result.tracking_uri)
    run = client.get_run(result.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    assert run.data.params["cfg.tracking.experiment"] == "mine"
    assert "experiment: mine" in Path(str(result.artifacts), "config.yaml").read_text()


def evaluate_of(model: str, squares: Path):
    settings = small_settings(squares, domain_adaptation__pretrained_checkpoint__path=model)
    return evaluate(load_config(None, settings))


def test_looking_makes_no_experiment(workplace, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "none yet")
    with pytest.raises(InputError, match=r"experiment 'none yet' of sqlite:.*mlflow.db has no finished adaptation run"):
        overview(load_config())
    assert main(["doctor"]) == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    assert not (workplace / "mlruns").exists()


def test_the_settings_of_earlier_runs_name_their_experiment(workplace):
    (workplace / "config.yaml").write_text("tracking: {experiment: dann}\n")
    assert load_config("config.yaml").tracking.experiment == "dann"
    assert load_config().tracking.experiment is None


# --- runs and experiments deleted while they log -----------------------------------------------------------------------------


def delete(run: TrackedRun, what: str) -> None:
    if what == "run":
        run.store.client.delete_run(run.run_id)
    else:
        run.store.client.delete_experiment(run.store.experiment_id)


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_a_run_deleted_while_it_logs_is_restored_and_nothing_is_lost(uri, workplace, caplog, what):
    store = open_store(uri, f"deleted {what}")
    with tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False) as run:
        run.log_metrics({"loss": 0.0}, step=0)
        delete(run, what)
        run.log_params({"seed": 1})  # at once, by the training thread
        delete(run, what)
        run.log_input("set", "0" * 32, "source train", "nowhere", "{}")
        delete(run, what)
        for step in range(1, 50):
            run.log_metrics({"loss": float(step)}, step)
        run.set_tags({"a": "b"})
        (run.folder / "note.txt").write_text("kept")
        delete_again(run, what)
    found = store.client.get_run(run.run_id)
    assert (found.info.status, found.info.lifecycle_stage) == ("FINISHED", "active")
    assert [point.step for point in store.client.get_metric_history(run.run_id, "loss")] == list(range(50))
    assert (found.data.params["cfg.seed"], found.data.tags["a"]) == ("1", "b")
    assert len(found.inputs.dataset_inputs) == 1
    assert [item.path for item in store.client.list_artifacts(run.run_id)] == ["note.txt"]
    assert store.client.get_experiment(store.experiment_id).lifecycle_stage == "active"
    assert not run.folder.exists()
    said = "Run %s was deleted" if what == "run" else "Experiment %r was deleted"
    assert sum(record.msg.startswith(said) for record in caplog.records) >= 3
    assert "does not accept what is sent" not in caplog.text


def delete_again(run: TrackedRun, what: str) -> None:
    """At any time: the sending thread may have restored it meanwhile, or not."""
    with contextlib.suppress(mlflow.MlflowException):
        delete(run, what)


def test_what_is_left_of_a_deleted_run_is_neither_sent_nor_removed_and_resume_says_how(workplace, capsys):
    store = open_store(None, "dann")
    run_id = store.client.create_run(store.experiment_id, tags={"dann.job": "adapt"}).info.run_id
    folder = workplace / "outputs" / run_id
    folder.mkdir(parents=True)
    (folder / "note.txt").write_text("kept")
    store.client.delete_run(run_id)
    assert main(["sync"]) == 1
    assert f"mlflow runs restore --run-id {run_id}" in " ".join(capsys.readouterr().out.split())
    assert (folder / "note.txt").exists()
    assert main(["adapt", "--resume", run_id]) == 2
    assert f"mlflow runs restore --run-id {run_id}" in capsys.readouterr().err


# --- places for files that cannot be written ---------------------------------------------------------------------------------


def no_place(workplace: Path, kind: str) -> str:
    (workplace / "a file").write_text("no folder")
    return {
        "below a file": f"{workplace}/a file/mlruns",
        "as an address": f"file://{workplace}/a%20file/mlruns",
        "kernel's": "/proc/mlruns",
        "bucket": "s3://nobody-s-bucket/runs",
        "unknown": "gopher://host/runs",
        "closed port": "mlflow-artifacts://127.0.0.1:9/runs",
    }[kind]


@pytest.mark.parametrize("kind", ["below a file", "as an address", "kernel's", "bucket", "unknown", "closed port"])
def test_a_place_that_takes_no_files_is_told_with_its_experiment_before_a_run_is_made(workplace, monkeypatch, kind):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    location = no_place(workplace, kind)
    number = client.create_experiment("elsewhere", artifact_location=location)
    with pytest.raises(InputError) as told:
        open_store(None, "elsewhere")
    for part in ("experiment 'elsewhere'", location, "tracking.experiment", "mlflow experiments create"):
        assert part in str(told.value)
    assert "\n" not in str(told.value)
    assert client.search_runs([number]) == []


def test_training_does_not_begin_where_its_files_could_not_be_put(workplace, squares, capsys):
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    number = client.create_experiment("elsewhere", artifact_location=no_place(workplace, "below a file"))
    with pytest.raises(InputError, match="experiment 'elsewhere'"):
        adapt(load_config(None, small_settings(squares, tracking__experiment="elsewhere")))
    assert client.search_runs([number]) == []
    assert not list((workplace / "outputs").glob("*"))


def test_looking_for_a_place_leaves_nothing_there(uri, workplace):
    store = open_store(uri, "looked at")
    assert artifacts._good
    assert not (workplace / "mlruns").exists()
    place = store.client.get_experiment(store.experiment_id).artifact_location
    assert get_artifact_repository(place, uri).list_artifacts() == []


def test_a_place_is_looked_at_once_in_a_process(workplace):
    store = open_store(None, "once")
    store.client.get_experiment(store.experiment_id)
    place = Path(store.client.get_experiment(store.experiment_id).artifact_location)
    assert len(artifacts._good) == 1
    place.parent.mkdir(exist_ok=True)
    place.write_text("now it takes nothing")
    assert open_store(None, "once").experiment_id == store.experiment_id


@pytest.mark.slow
def test_a_server_that_cannot_write_its_files_is_told(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (workplace / "artifacts").write_text("where the server would put them")
    port = free_port()
    process = start_server(workplace, port)
    try:
        with pytest.raises(InputError, match="experiment 'served' keeps the files of its runs in mlflow-artifacts:/"):
            open_store(f"http://127.0.0.1:{port}", "served")
    finally:
        stop_server(process)


# --- stores of files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_store(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs as earlier versions of MLflow kept them, made by MLflow."""
    (workplace / "mlflow.db").unlink()
    folder = workplace / "my runs"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(tracking_uri=str(folder))
        run_id = client.create_run(client.create_experiment("old")).info.run_id
        client.log_metric(run_id, "iou/target_val", 0.5)
    return folder


@pytest.mark.parametrize(
    "spelled", ["my runs", "./my runs", "file:./my runs", "file://{here}/my runs", "{here}/my runs"]
)
@pytest.mark.parametrize("by", ["setting", "variable"])
def test_a_folder_of_runs_is_told_with_the_command_that_moves_them(file_store, workplace, monkeypatch, spelled, by):
    spelled = spelled.format(here=workplace)
    if by == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", spelled)
    with pytest.raises(InputError) as told:
        open_store(None if by == "variable" else spelled, None)
    command = f"mlflow migrate-filestore --source {shlex.quote(str(file_store))} --target sqlite:///mlflow.db"
    assert command in str(told.value)
    assert ("MLFLOW_TRACKING_URI is" if by == "variable" else "tracking.uri is") in str(told.value)


def test_the_command_that_moves_runs_works_as_it_is_told_and_overwrites_no_store(file_store, workplace):
    (workplace / "mlflow.db").write_text("of somebody")
    with pytest.raises(InputError) as told:
        open_store("my runs", None)
    command = str(told.value).partition("Move them there: ")[2].partition(" (their files")[0]
    program, *words = shlex.split(command)
    assert program == "mlflow"
    done = CliRunner().invoke(mlflow_command, words)
    assert done.exit_code == 0, done.output[-2000:]
    assert (workplace / "mlflow.db").read_text() == "of somebody"
    store = open_store("sqlite:///mlflow_2.db", "old")
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.data.metrics == {"iou/target_val": 0.5}


@pytest.mark.parametrize("spelled", ["mlruns", "file:./mlruns", "file:///nowhere/mlruns"])
def test_a_folder_without_runs_is_told_to_be_a_database(workplace, spelled):
    with pytest.raises(InputError, match=r"give sqlite:///FILE, .*: MLflow no longer keeps runs in a folder"):
        open_store(spelled, None)
