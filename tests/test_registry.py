"""Models are registered by name, and the champion changes only by the stated rule."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import small_settings

from dann_experiments import CompareConfig, adapt, compare, load_config
from dann_experiments.__main__ import main
from dann_experiments.comparison.compare import _register
from dann_experiments.config import config_to_yaml
from dann_experiments.config.errors import StoreAway
from dann_experiments.jobs.load_model import load_model
from dann_experiments.tracking.fetch_model import registered
from dann_experiments.tracking.logged_model import logged_model
from dann_experiments.tracking.registry import register
from dann_experiments.tracking.store import Store, open_store


@pytest.fixture
def store(workplace, shared_runs) -> Store:
    """A store with a pretraining and an adaptation."""
    shutil.copy(shared_runs.folder / "mlflow.db", workplace / "mlflow.db")
    return open_store(None, None, for_runs=False)


def scored_run(
    store: Store, experiment_id: str, value: float | None, digest: str = "d1", metric: str = "iou/target_test",
    classes: tuple[str, ...] = ("a", "b"),
) -> str:  # fmt: skip
    """A run with a model that has this score of this data over these classes."""
    from mlflow.entities import Metric

    run_id = store.client.create_run(experiment_id).info.run_id
    model = store.client.create_logged_model(experiment_id, "model", run_id)
    if value is not None:
        point = Metric(metric, value, 1, 1, model.model_id, "set", digest, run_id)
        of_classes = [Metric(metric.replace("iou/", "class_iou/") + f"/{name}", value, 1, 1) for name in classes]
        store.client.log_batch(run_id, metrics=[point, *of_classes])
    return run_id


def champion(store: Store) -> str:
    return store.client.get_model_version_by_alias("net", "champion").run_id


def test_the_champion_is_the_best_on_the_same_data(store, shared_runs):
    experiment = shared_runs.result("adapt").experiment_id
    first = scored_run(store, experiment, 0.5)
    assert register(store, "net", first, "first") == "models:/net@champion"
    worse, equal, better = (scored_run(store, experiment, value) for value in (0.4, 0.5, 0.6))
    assert register(store, "net", worse, "worse") == "models:/net/2"
    assert register(store, "net", equal, "equal") == "models:/net/3"
    assert champion(store) == first
    assert register(store, "net", better, "better") == "models:/net@champion"
    assert champion(store) == better


@pytest.mark.parametrize(
    "other",
    [
        {"value": 0.9, "digest": "d2"},
        {"value": 0.9, "metric": "iou/target_val"},
        {"value": None},
        {"value": 0.9, "classes": ("a", "b", "c")},
    ],
)
def test_what_cannot_be_compared_leaves_the_champion(store, shared_runs, other, caplog):
    experiment = shared_runs.result("adapt").experiment_id
    first = scored_run(store, experiment, 0.5)
    register(store, "net", first, "first")
    with caplog.at_level("INFO"):
        assert register(store, "net", scored_run(store, experiment, **other), "other") == "models:/net/2"
    assert champion(store) == first
    assert "champion stays as it is" in caplog.text


def test_of_models_registered_at_one_moment_the_best_leads(store, shared_runs, monkeypatch):
    """Another process registers a better model after this one has compared itself with the champion, before it sets the alias."""
    experiment = shared_runs.result("adapt").experiment_id
    first, good, best = (scored_run(store, experiment, value) for value in (0.4, 0.5, 0.6))
    register(store, "net", first, "first")
    set_alias, met = store.client.set_registered_model_alias, []

    def late(name: str, alias: str, version: str) -> None:
        if not met:
            met.append(version)
            assert register(store, "net", best, "best") == "models:/net@champion"
        set_alias(name, alias, version)

    monkeypatch.setattr(store.client, "set_registered_model_alias", late)
    register(store, "net", good, "good")
    assert met
    assert champion(store) == best


def test_an_alias_that_a_user_moved_back_is_not_moved_to_the_model_that_led_before(store, shared_runs, monkeypatch):
    experiment = shared_runs.result("adapt").experiment_id
    first, best, between = (scored_run(store, experiment, value) for value in (0.4, 0.6, 0.5))
    register(store, "net", first, "first")
    register(store, "net", best, "best")
    store.client.set_registered_model_alias("net", "champion", "1")
    monkeypatch.setattr("dann_experiments.tracking.registry.AT_ONCE_MS", -1)  # as if it had been made long before
    register(store, "net", between, "between")
    assert champion(store) == between


def test_a_store_that_goes_away_before_registering_is_told_with_the_way_out(store, shared_runs, monkeypatch):
    from mlflow.exceptions import MlflowException

    def away(*args: object) -> None:
        raise MlflowException("connection refused")

    run_id = scored_run(store, shared_runs.result("adapt").experiment_id, 0.5)
    monkeypatch.setattr(store.client, "create_registered_model", away)
    told = rf"run {run_id} is finished, but its model is not registered as 'net' \(.*connection refused.*mlflow\.register_model"
    with pytest.raises(StoreAway, match=told):
        register(store, "net", run_id, "about")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("models:/net/latest", ""),
        ("models:/net", "an address of a registered model is"),
        ("models:/nobody/latest", "no registered model 'nobody'"),
    ],
)
def test_addresses_of_registered_models(store, shared_runs, address, told):
    experiment = shared_runs.result("adapt").experiment_id
    runs = [scored_run(store, experiment, value) for value in (0.6, 0.5)]
    for run_id in runs:
        register(store, "net", run_id, "about")
    if told:
        with pytest.raises(ValueError, match=told):
            registered(address, store)
    else:
        assert registered(address, store)[1] == runs[1]


def test_a_model_that_may_not_lead_is_registered_all_the_same(store, shared_runs):
    run_id = scored_run(store, shared_runs.result("adapt").experiment_id, 0.5)
    assert register(store, "net", run_id, "about", may_lead=False) == "models:/net/1"
    assert "champion" not in store.client.get_registered_model("net").aliases


def test_a_run_is_registered_once(store, shared_runs):
    run_id = scored_run(store, shared_runs.result("adapt").experiment_id, 0.5)
    for _ in range(2):
        assert register(store, "net", run_id, "about") == "models:/net@champion"
    assert len(store.client.search_model_versions("name = 'net'")) == 1


def test_adapt_registers_its_model(pretrained_place, squares):
    Path("c.yaml").write_text(config_to_yaml(load_config(None, small_settings(squares))))
    assert main(["adapt", "--config", "c.yaml", "--tracking.registered_model_name", "net"]) == 0
    store = open_store(None, None, for_runs=False)
    version = store.client.get_model_version_by_alias("net", "champion")
    run = store.client.get_run(version.run_id)
    assert run.data.tags["dann.job"] == "adapt"
    assert version.source == logged_model(store.client, run.info.experiment_id, version.run_id).artifact_location
    assert version.tags["dann.score"] == "iou/target_test"
    assert float(version.tags["dann.score_value"]) == run.data.metrics["iou/target_test"]
    digest = next(entry.dataset.digest for entry in run.inputs.dataset_inputs if entry.dataset.name.endswith(" test"))
    assert version.tags["dann.score_data"] == digest
    assert f"/runs/{version.run_id}" in version.description
    model = logged_model(store.client, run.info.experiment_id, version.run_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "net", "version": version.version}]
    assert load_model("models:/net@champion", "target", None, store).run_id == version.run_id


def test_a_store_that_is_not_that_of_the_process_has_its_own_registry(store, shared_runs, tmp_path, monkeypatch):
    """MLflow itself would look for the model in the store of the process."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    run_id = shared_runs.result("adapt").run_id
    assert register(store, "net", run_id, "about") == "models:/net@champion"
    assert load_model("models:/net@champion", "target", None, store).run_id == run_id


@pytest.mark.slow
def test_a_server_registers_a_model(server, squares):
    settings = small_settings(squares, tracking__uri=server, tracking__registered_model_name="on_server")
    result = adapt(load_config(None, settings | {"tracking.experiment": "registry"}))
    store = open_store(server, "registry", for_runs=False)
    assert store.client.get_model_version_by_alias("on_server", "champion").run_id == result.run_id
    assert load_model("models:/on_server@champion", "target", None, store).run_id == result.run_id


@pytest.mark.parametrize("name", ["a/b", "a:b", "", "x" * 101])
def test_a_name_that_mlflow_does_not_take_is_refused_before_a_run(workplace, squares, name, capsys):
    Path("c.yaml").write_text(config_to_yaml(load_config(None, small_settings(squares))))
    assert main(["adapt", "--config", "c.yaml", f"--tracking.registered_model_name={name or ' '}"]) == 2
    assert "tracking.registered_model_name" in "".join(capsys.readouterr())
    assert not open_store(None, None, for_runs=False).client.search_runs(["0", "1"])


def test_a_comparison_registers_the_median_run_of_the_arm_that_helped_or_nothing(store, shared_runs, squares):
    config = load_config(None, small_settings(squares))
    found = compare(config, CompareConfig(runs=[shared_runs.result("adapt").run_id])).comparison
    run_id = shared_runs.result("adapt").run_id
    assert [verdict.outcome for verdict in found.verdicts] != ["helped"]
    _register(store, "net", found, run_id)
    assert not store.client.search_registered_models("name = 'net'")
    helped = [dataclasses.replace(verdict, outcome="helped") for verdict in found.verdicts]
    _register(store, "net", dataclasses.replace(found, verdicts=helped), run_id)
    version = store.client.get_model_version_by_alias("net", "champion")
    assert version.run_id == run_id
    assert version.tags["dann.verdict"] == "helped"


@pytest.mark.slow
def test_the_arms_of_a_comparison_are_not_registered_one_by_one(pretrained_place, squares):
    settings = small_settings(squares, tracking__registered_model_name="net")
    compare(load_config(None, settings), CompareConfig(seeds=1, workers=1))
    store = open_store(None, None, for_runs=False)
    assert len(store.client.search_model_versions("name = 'net'")) <= 1
