"""Settings that have no effect are told: another source model's training, an adversary that never acts."""

from __future__ import annotations

import logging

import pytest
from conftest import small_settings

from dann_experiments import InputError, load_config
from dann_experiments.jobs.build import find_data
from dann_experiments.jobs.checks import warn_of_a_single_step, warn_of_idle_adversary
from dann_experiments.jobs.source_model import find_or_make_source_model
from dann_experiments.names import Tag
from dann_experiments.tracking.store import open_store

METHOD = "domain_adaptation.method"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, []),
        ({"seed": 7}, ["seed 0 (yours: 7)"]),
        (
            {"pretraining.max_epochs": 9, "pretraining.optimizer.lr": 0.005},
            ["pretraining.max_epochs", "(yours: 9)", "pretraining.optimizer.lr", "(yours: 0.005)"],
        ),
    ],
)
def test_a_source_model_that_was_trained_otherwise_is_told(pretrained_place, squares, monkeypatch, caplog, more, told):
    config = load_config(None, small_settings(squares) | more)
    store = open_store(None, None, for_runs=False)
    (run,) = store.client.search_runs([store.experiment_id], f"tags.`{Tag.JOB}` = 'pretrain'")
    monkeypatch.setattr("dann_experiments.jobs.source_model.source_digest", lambda *_: run.data.tags[Tag.SOURCE_DIGEST])
    with caplog.at_level(logging.WARNING):
        assert find_or_make_source_model(config, store, {}) == f"runs:/{run.info.run_id}/model"
    assert bool(caplog.text) == bool(told)
    for words in told:
        assert words in caplog.text


@pytest.mark.parametrize(("seed", "newest"), [(0, False), (1, True), (7, True)])
def test_of_several_source_models_one_of_the_same_seed_is_taken(pretrained_place, squares, monkeypatch, seed, newest):
    """`compare` leaves one for each seed, and what `adapt` starts from does not change by it."""
    store = open_store(None, None, for_runs=False)
    (run,) = store.client.search_runs([store.experiment_id], f"tags.`{Tag.JOB}` = 'pretrain'")
    digest = run.data.tags[Tag.SOURCE_DIGEST]
    newer = store.client.create_run(store.experiment_id, tags={Tag.JOB: "pretrain", Tag.SOURCE_DIGEST: digest})
    store.client.log_param(newer.info.run_id, "cfg.seed", "1")
    store.client.set_terminated(newer.info.run_id)
    monkeypatch.setattr("dann_experiments.jobs.source_model.source_digest", lambda *_: digest)
    found = find_or_make_source_model(load_config(None, small_settings(squares) | {"seed": seed}), store, {})
    assert found == f"runs:/{(newer if newest else run).info.run_id}/model"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"trainer.max_epochs": 1}, "in the only epoch, so this run is its own lambda = 0 control"),
        ({"trainer.max_epochs": 2}, "in the first of 2 epochs"),
        ({"trainer.max_epochs": 3}, ""),
        ({"trainer.max_epochs": 1, f"{METHOD}.step_mode": "batch"}, ""),
        ({"trainer.max_epochs": 1, f"{METHOD}.lambda_schedule.kind": "constant"}, ""),
        ({"trainer.max_epochs": 1, f"{METHOD}.name": "lambda_zero"}, ""),
    ],
)
def test_an_adversary_that_hardly_acts_is_told(squares, caplog, more, told):
    with caplog.at_level(logging.WARNING):
        warn_of_idle_adversary(load_config(None, small_settings(squares) | more))
    assert told in caplog.text
    assert bool(caplog.text) == bool(told)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"trainer.max_epochs": 1}, True),
        ({"trainer.max_epochs": 2}, False),
        ({"trainer.max_epochs": 1, "data.source.batch_size": 1, "data.target.batch_size": 1}, False),
        ({"trainer.max_epochs": 1, "data.source.batch_size": 1, "trainer.accumulate_grad_batches": 99}, True),
        ({"trainer.max_epochs": 1, f"{METHOD}.lambda_schedule.kind": "constant"}, False),
    ],
)
def test_a_training_of_one_step_is_told_to_have_no_adversary(squares, caplog, more, told):
    """A schedule of lambda begins at 0: set to `batch`, as the warning above advises, it is still 0 in the only step."""
    large = {"data.source.batch_size": 99, "data.target.batch_size": 99}
    config = load_config(None, small_settings(squares) | {f"{METHOD}.step_mode": "batch", **large} | more)
    with caplog.at_level(logging.WARNING):
        warn_of_a_single_step(config, find_data(config).read())
    assert ("a single step, in which lambda is 0" in caplog.text) is told


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("gama", "domain_adaptation.method.lambda_schedule.gamma"),
        ("max_epoch", "trainer.max_epochs"),
        ("data.target.vals", "data.target.val"),
        ("optimizer.gamma", "domain_adaptation.method.lambda_schedule.gamma"),
    ],
)
def test_a_misspelled_setting_is_told_by_the_nearest_name(given, meant):
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        load_config(None, {given: 3})


@pytest.mark.parametrize("given", ["backbone", "gpus", "output"])
def test_a_setting_like_no_other_gets_no_guess(given):
    with pytest.raises(InputError, match=f"unknown setting '?{given}'?; `--help` lists all"):
        load_config(None, {given: 3})
