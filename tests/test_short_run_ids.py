"""Tables show the first letters of run ids, so the first letters are understood."""

import mlflow
import pytest
from conftest import copy_store, small_settings

from dann_experiments import CompareConfig, InputError, compare, evaluate, load_config
from dann_experiments.jobs.overview import overview
from dann_experiments.tracking.fetch_model import fetched
from dann_experiments.tracking.store import open_store, whole_run_id

SOURCE_MODEL = "domain_adaptation__pretrained_checkpoint__path"


@pytest.fixture
def run_id(workplace, shared_runs):
    copy_store(shared_runs.folder / "mlflow.db", workplace)
    return shared_runs.result("adapt").run_id


def test_the_first_letters_name_a_run(run_id):
    store = open_store(None, None, for_runs=False)
    assert whole_run_id(store, run_id[:8]) == run_id
    assert whole_run_id(store, run_id[:7].upper()) == run_id[:7].upper()  # ids are lower case
    assert whole_run_id(store, "0000abcd") == "0000abcd"
    with fetched(f"runs:/{run_id[:8]}", store) as (_, found):
        assert found == run_id


def test_letters_of_two_runs_name_neither(workplace, monkeypatch):
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    ids = [client.create_run("0").info.run_id for _ in range(2)]
    monkeypatch.setattr(mlflow.MlflowClient, "search_runs", lambda *_, **__: [client.get_run(one) for one in ids])
    with pytest.raises(InputError, match=f"several runs have an id that begins with abcd .*{ids[1]}.*give more of it"):
        whole_run_id(open_store(None, None, for_runs=False), "abcd")


def test_a_comparison_and_an_evaluation_take_them(run_id, squares):
    scores = evaluate(load_config(None, small_settings(squares, **{SOURCE_MODEL: f"runs:/{run_id[:8]}"})))
    whole = evaluate(load_config(None, small_settings(squares, **{SOURCE_MODEL: f"runs:/{run_id}"})))
    assert scores.metrics == whole.metrics
    config = load_config(None, small_settings(squares))
    found = compare(config, CompareConfig(runs=[run_id[:8]])).comparison
    assert run_id in {run.run_id for run in found.runs}


def test_runs_names_the_experiments_that_have_adaptations(run_id):
    with pytest.raises(InputError, match=r"experiment 'none' of .* set --tracking\.experiment \(dann has some\)\."):
        overview(load_config(None, {"tracking.experiment": "none"}))
