"""System metrics: MLflow's own collectors and names, on the run's sender; they end with the run and never end it."""

from __future__ import annotations

import sys
import threading

import mlflow
import pytest
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from test_sweeps import until

from dann_experiments import evaluate, load_config
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.sender import Sender
from dann_experiments.tracking.store import open_store
from tests.conftest import small_settings

CPU = "system/cpu_utilization_percentage"


def sampler_is_alive() -> bool:
    return any(thread.name == "system-metrics" for thread in threading.enumerate())


def logged(place, wanted, **more) -> tuple[mlflow.MlflowClient, str]:
    """A store's client and the id of a run that ended at once."""
    store = open_store(None, "x")
    with tracked_run(store, None, "x", {}, place / "out", use_claimed=False, system_metrics=wanted, **more) as run:
        assert sampler_is_alive() == bool(wanted)
    assert not sampler_is_alive()
    return store.client, run.run_id


def test_a_run_shorter_than_the_interval_has_one_sample_with_mlflow_s_own_names(workplace):
    client, run_id = logged(workplace, True)
    own = SystemMetricsMonitor(run_id, tracking_uri=client.tracking_uri)
    own.collect_metrics()
    names = {f"system/{name}" for name in own.aggregate_metrics()}
    assert CPU in names
    assert set(client.get_run(run_id).data.metrics) == names
    assert [point.step for name in names for point in client.get_metric_history(run_id, name)] == [0] * len(names)


@pytest.mark.parametrize("variable", ["true", "false", None])
def test_unset_mlflow_s_variable_decides_and_a_setting_is_stronger(workplace, monkeypatch, variable):
    if variable is not None:
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", variable)
    store = open_store(None, "x")
    for wanted, is_on in ((None, variable == "true"), (True, True), (False, False)):
        with tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False, system_metrics=wanted):
            assert sampler_is_alive() == is_on


def waiting(sender: Sender) -> set[str]:
    """The names of metrics that were logged and not sent yet."""
    return {point[0] for point in [*sender._memory, *sender._spool.waiting()]}


def test_samples_follow_the_interval_and_a_resumed_run_counts_on(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "n1")
    name, store = CPU.replace("/", "/n1/"), open_store(None, "x")
    options = {"folder": workplace / "out", "use_claimed": False, "system_metrics": True}
    with tracked_run(store, None, "x", {}, **options) as run:
        until(lambda: name in waiting(run.sender))
    steps = [point.step for point in store.client.get_metric_history(run.run_id, name)]
    assert sorted(steps) == list(range(len(steps)))
    with tracked_run(store, None, "x", {}, resume=run.run_id, **options):
        pass
    more = [point.step for point in store.client.get_metric_history(run.run_id, name)]
    assert sorted(more) == list(range(len(more)))
    assert len(more) > len(steps)


def test_a_collector_that_fails_is_reported_once_and_the_others_go_on(workplace, monkeypatch, caplog):
    def broken(self):
        raise RuntimeError("no such disk")

    monkeypatch.setattr(DiskMonitor, "collect_metrics", broken)
    client, run_id = logged(workplace, True)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert CPU in client.get_run(run_id).data.metrics
    assert "system/disk_usage_percentage" not in client.get_run(run_id).data.metrics
    assert caplog.text.count("There are no more system metrics of DiskMonitor: no such disk.") == 1


@pytest.mark.parametrize("problem", ["no collectors", "a name for the machine that no metric may have"])
def test_what_makes_all_of_them_impossible_is_reported_once_and_ends_no_run(workplace, monkeypatch, caplog, problem):
    store = open_store(None, "x")
    if problem == "no collectors":
        monkeypatch.setitem(sys.modules, "mlflow.system_metrics.metrics.cpu_monitor", None)
    else:
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "a\nb")
    with tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False, system_metrics=True) as run:
        pass
    assert store.client.get_run(run.run_id).info.status == "FINISHED"
    assert store.client.get_run(run.run_id).data.metrics == {}
    assert caplog.text.count("system metrics") == 1


def test_the_thread_ends_with_a_run_that_fails(workplace):
    store = open_store(None, "x")
    with (
        pytest.raises(ZeroDivisionError),
        tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False, system_metrics=True) as run,
    ):
        raise ZeroDivisionError
    assert not sampler_is_alive()
    assert CPU in store.client.get_run(run.run_id).data.metrics


def test_an_evaluation_logs_them_too(squares, pretrained_place):
    settings = small_settings(squares, tracking__system_metrics=True)
    run = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    settings["domain_adaptation.pretrained_checkpoint.path"] = f"runs:/{run.info.run_id}/model"
    result = evaluate(load_config(None, settings))
    assert CPU in mlflow.MlflowClient().get_run(result.run_id).data.metrics
