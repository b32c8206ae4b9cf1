"""Names of runs: what a run is, unless its user named it; which names MLflow made up."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import small_settings
from mlflow.utils import name_utils

from dann_experiments import evaluate, load_config
from dann_experiments.config import replace
from dann_experiments.config.store_names import LONGEST_RUN_NAME
from dann_experiments.jobs import identity
from dann_experiments.jobs.identity import evaluation_name, run_digest, run_name, trial_name
from dann_experiments.tracking.generated_names import is_generated
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import open_store

DIGITS = load_config("digits")


def test_every_name_that_mlflow_makes_up_is_known():
    made = {name_utils._generate_random_name() for _ in range(500)}
    made |= {
        f"{name_utils._GENERATOR_PREDICATES[0]}-{noun}-{n}" for noun in name_utils._GENERATOR_NOUNS for n in (0, 1000)
    }
    assert [name for name in made if len(name) <= 20 and not is_generated(name)] == []
    assert is_generated("marvelous-moth-442")


def test_a_name_that_mlflow_cut_is_known(monkeypatch):
    """After ten names that are too long MLflow cuts the last one."""
    for predicate, noun in (("rambunctious", "squirrel"), ("entertaining", "penguin"), ("sophisticated", "shrike")):
        monkeypatch.setattr(name_utils, "_GENERATOR_PREDICATES", [predicate])
        monkeypatch.setattr(name_utils, "_GENERATOR_NOUNS", [noun])
        monkeypatch.setattr(name_utils.random, "randint", lambda low, high: high)
        name = name_utils._generate_random_name()
        assert len(name) == 20
        monkeypatch.undo()
        assert is_generated(name), name


@pytest.mark.parametrize(
    "name",
    ["my-moth-442", "marvelous-moth", "marvelous-moth-", "marvelous-moth-x", "marvelous-moth-442-b", "marvelous-moth-44200",
     "Marvelous-Moth-442", "rambunctious-squirr", "DANN mnist-m seed 0", "my own best run, 2nd", "",
     "marvelous-moth-\N{ARABIC-INDIC DIGIT ONE}"],
)  # fmt: skip
def test_a_name_of_a_user_is_not_taken_for_one_of_mlflow(name):
    assert not is_generated(name)


def test_without_mlflow_s_words_no_name_counts_as_made_up(monkeypatch):
    monkeypatch.delattr(name_utils, "_GENERATOR_NOUNS")
    assert not is_generated("marvelous-moth-442")


@pytest.mark.parametrize(
    ("job", "changes", "name"),
    [
        ("adapt", {}, "DANN mnist-m seed 0"),
        ("adapt", {"domain_adaptation.method.name": "lambda_zero", "seed": 3}, "lambda = 0 control mnist-m seed 3"),
        ("adapt", {"domain_adaptation.method.name": "source_only"}, "source only mnist-m seed 0"),
        ("adapt", {"domain_adaptation.method.class_path": "mine.methods.Coral"}, "Coral mnist-m seed 0"),
        ("pretrain", {}, "source model mnist seed 0"),
        ("compare", {}, "compare mnist-m"),
        ("check-data", {}, "check-data mnist-m"),
    ],
)
def test_a_run_is_named_by_what_it_does(job, changes, name):
    assert run_name(job, replace(DIGITS, changes)) == name


def test_arms_trials_and_evaluations_say_whose_they_are():
    assert run_name("pretrain", DIGITS, "source only") == "source only mnist-m seed 0"
    assert trial_name("digits16", 3, DIGITS) == "digits16 trial 3, DANN mnist-m seed 0"
    assert evaluation_name(DIGITS, {}) == "evaluation mnist-m seed 0"
    of = {"dann.method": "lambda_zero", "seed": "7"}
    assert evaluation_name(DIGITS, of) == "evaluation of lambda = 0 control mnist-m seed 7"
    statistics = replace(DIGITS, {"domain_adaptation.batchnorm": "target_stats"})
    assert evaluation_name(statistics, {"dann.method": "dann"}) == "evaluation of DANN with AdaBN mnist-m seed 0"


def test_however_long_its_parts_are_a_name_fits_and_keeps_its_seed():
    data = dataclasses.replace(DIGITS.data.target, name="a\nb" * 1000)
    config = dataclasses.replace(DIGITS, data=dataclasses.replace(DIGITS.data, target=data), seed=2**32 - 1)
    own = replace(config, {"domain_adaptation.method.class_path": "mine." + "C" * 500})
    name = trial_name("s" * 500, 123456, own)
    assert len(name) <= LONGEST_RUN_NAME
    assert name.endswith("b seed 4294967295")
    assert "\n" not in name


@pytest.mark.parametrize(
    ("given", "setting", "name"),
    [(None, None, "ours"), (None, "set", "set"), ("theirs", None, "theirs"), ("theirs", "set", "set")],
)
def test_a_run_of_mlflow_run_gets_our_name_unless_its_user_gave_one(workplace, monkeypatch, given, setting, name):
    store = open_store(None, "named")
    waiting = store.client.create_run(store.experiment_id, run_name=given)  # as `mlflow run` does
    monkeypatch.setenv("MLFLOW_RUN_ID", waiting.info.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    with tracked_run(open_store(None, None), setting, "ours", {}, workplace / "out", use_claimed=True) as run:
        assert run.run_id == waiting.info.run_id
    found = store.client.get_run(run.run_id)
    assert (found.info.run_name, found.data.tags["mlflow.runName"]) == (name, name)


def test_runs_of_the_jobs_carry_these_names(pretrained_place, shared_runs, squares):
    def name_of(result):
        return open_store(result.tracking_uri, None).client.get_run(result.run_id).info.run_name

    assert name_of(shared_runs.result("pretrain")) == "source model source seed 0"
    assert name_of(shared_runs.result("adapt")) == "DANN target seed 0"
    path = {"domain_adaptation__pretrained_checkpoint__path": shared_runs.result("pretrain").model_uri}
    result = evaluate(load_config(None, small_settings(squares, **path)))
    assert name_of(result) == "evaluation of source only target seed 0"


def test_the_words_of_methods_are_in_one_place():
    from dann_experiments.adaptation.build import METHODS

    assert identity.METHOD_WORDS.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("job", "digest"),
    [("adapt", "b051df0231c1fdf6576372082ec4b499"), ("pretrain", "347d29a96d71870ddaa0d9f4f541c22e"),
     ("evaluate", "af1953a82b64fd280c18940983e1f9b6")],
)  # fmt: skip
def test_runs_made_before_monitor_probe_existed_are_still_found(job, digest):
    def of(**changes: object) -> str:
        return run_digest(job, replace(DIGITS, changes), {"source_train": "0" * 32}, "1" * 32)

    assert of() == digest
    assert (of(**{"monitor.probe": False}) == digest) is (job != "adapt")  # only `adapt` probes
