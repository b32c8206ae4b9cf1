"""The search space: what it holds, what it refuses before anything starts, and that a point survives the way to settings."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from conftest import small_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from dann_experiments.config import InputError, config_to_yaml, load_config, replace
from dann_experiments.config.parsing import load_settings
from dann_experiments.jobs import build
from dann_experiments.names import Key
from sweeps import space as space_module
from sweeps.cli import main
from sweeps.objective import check_objective
from sweeps.settings import SweepConfig
from sweeps.space import Space, label_of, read_space, read_stored, settings_of

PROJECT = Path(__file__).parents[1]
METHOD = "domain_adaptation.method"
GAMMA = f"{METHOD}.lambda_schedule.gamma"
BASE = load_config(None, small_settings(Path("nowhere")))


def space_of(entries: dict, config=BASE) -> Space:
    return read_space(entries, config)


def draw(space: Space, number: int = 0, sampler_seed: int = 0) -> dict:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sampler_seed))
    for _ in range(number):
        space.suggest(study.ask())
    return space.suggest(study.ask())


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((PROJECT / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_space_fits_the_recipes_and_says_how_to_run_it(file):
    sweep = load_settings(SweepConfig, file, {})
    for recipe in ("digits", "classic"):
        config = load_config(PROJECT / "recipes" / f"{recipe}.yaml")
        space = read_space(
            sweep.space,
            config if file.name == "dann.yaml" else replace(config, {"domain_adaptation.batchnorm": "separate"}),
        )
        assert space.parameters
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"sweeps/{file.name}" in header


def test_the_default_space_searches_the_four_of_the_mission():
    described = read_space(load_settings(SweepConfig, PROJECT / "sweeps" / "dann.yaml", {}).space, BASE).described()
    assert set(described) == {GAMMA, f"{METHOD}.hidden_size", f"{METHOD}.discriminator_lr", Key.FEATURE_LAYER}
    assert (described[GAMMA]["low"], described[GAMMA]["high"]) == (1, 20)
    assert described[f"{METHOD}.discriminator_lr"]["log"] is True


def test_auto_means_the_useful_layers_of_this_network_each_once():
    choices = space_of({Key.FEATURE_LAYER: "auto"}).described()[Key.FEATURE_LAYER]["choices"]
    assert {"encoder", "decoder", "segmentation_head"} <= set(choices)
    assert len([name for name in choices if name.startswith("encoder.")]) == 2  # three stages; the deepest is `encoder`
    joint = replace(BASE, {"domain_adaptation.batchnorm": "joint"})
    assert set(space_of({Key.FEATURE_LAYER: "auto"}, joint).described()[Key.FEATURE_LAYER]["choices"]) <= set(choices)


def test_in_channels_follows_the_layer():
    config = replace(BASE, {f"{METHOD}.in_channels": 128, "domain_adaptation.feature_layers": ["encoder"]})
    for layer in space_of({Key.FEATURE_LAYER: "auto"}, config).described()[Key.FEATURE_LAYER]["choices"]:
        changed = replace(config, settings_of({Key.FEATURE_LAYER: layer}))
        build.make_method(changed, build.make_taps(changed, build.make_network(changed)))  # refuses a wrong number


def test_a_layer_is_looked_up_once_however_many_ends_are_checked_with_it(monkeypatch):
    asked, make_taps = [], build.make_taps
    monkeypatch.setattr(build, "make_taps", lambda config, network: asked.append(1) or make_taps(config, network))
    monkeypatch.setattr(space_module, "_networks", {})
    entries = {GAMMA: FLOAT, f"{METHOD}.hidden_size": {"type": "int", "low": 32, "high": 256}}
    assert len(space_of(entries).parameters) == 2
    assert len(asked) == 1


FLOAT = {"type": "float", "low": 1, "high": 20}
REFUSED = {
    "unknown setting": ({"gamma": FLOAT}, "did you mean 'domain_adaptation.method.lambda_schedule.gamma'"),
    "no mapping": ({GAMMA: 3}, f"{GAMMA} is 3"),
    "no type": ({GAMMA: {"low": 1, "high": 2}}, f"{GAMMA}.type is None"),
    "unknown field": ({GAMMA: {**FLOAT, "logarithmic": True}}, "logarithmic"),
    "no end": ({GAMMA: {"type": "float", "low": 1}}, f"{GAMMA}.high is None"),
    "text for a number": ({GAMMA: {**FLOAT, "high": "20"}}, f"{GAMMA}.high is '20'"),
    "turned round": ({GAMMA: {**FLOAT, "low": 30}}, GAMMA),
    "log from 0": ({f"{METHOD}.lambda_da": {"type": "float", "low": 0, "high": 1, "log": True}}, "lambda_da"),
    "an end refused by the settings": ({GAMMA: {**FLOAT, "low": 0}}, f"{GAMMA} = 0.0 is refused"),
    "the other end": ({"optimizer.momentum": {"type": "float", "low": 0.5, "high": 1.0}}, "optimizer.momentum = 1.0"),
    "fractions of a whole number": ({f"{METHOD}.hidden_size": {"type": "float", "low": 1.5, "high": 8.5}}, "hidden_size"),
    "a choice that is none": ({f"{METHOD}.classifier": {"type": "categorical", "choices": ["pooled", "voxel"]}}, "'voxel'"),
    "a width that no memory holds": (
        {f"{METHOD}.hidden_size": {"type": "int", "low": 8, "high": 2**30, "log": True}}, "1073741824 is refused",
    ),
    "a layer that is not there": ({Key.FEATURE_LAYER: {"type": "categorical", "choices": ["encoder.layer9"]}}, "encoder.layer9"),
    "auto elsewhere": ({f"{METHOD}.classifier": "auto"}, "auto"),
    "choices twice": ({Key.FEATURE_LAYER: {"type": "categorical", "choices": ["encoder", "encoder"]}}, "once"),
    "the seed": ({"seed": {"type": "int", "low": 0, "high": 9}}, "seed cannot be searched"),
    "tracking": ({"tracking.experiment": {"type": "categorical", "choices": ["a"]}}, "cannot be searched"),
    "pretraining": ({"pretraining.max_epochs": {"type": "int", "low": 1, "high": 9}}, "cannot be searched"),
    "a parent that is not searched": ({GAMMA: {**FLOAT, "when": {"optimizer.name": "adam"}}}, "optimizer.name"),
    "a parent's value that is none": (
        {"optimizer.name": {"type": "categorical", "choices": ["adam", "sgd"]},
         "optimizer.momentum": {"type": "float", "low": 0, "high": 0.9, "when": {"optimizer.name": "adamw"}}},
        "adamw",
    ),
    "a parent's number out of its range": (
        {f"{METHOD}.hidden_size": {"type": "int", "low": 32, "high": 64}, GAMMA: {**FLOAT, "when": {f"{METHOD}.hidden_size": 9}}},
        "hidden_size = 9",
    ),
    "a ring": (
        {GAMMA: {**FLOAT, "when": {"optimizer.lr": 1}}, "optimizer.lr": {**FLOAT, "when": {GAMMA: 1}}},
        "ring",
    ),
    "nothing": ({}, "space is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_space_is_refused_with_its_key(case):
    entries, message = REFUSED[case]
    with pytest.raises(InputError, match="space") as error:
        space_of(entries)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain_adaptation.method.hidden_siz", "3"], "hidden_siz"),
        (["--n_trial", "3"], "did you mean --n_trials"),
        (["--backbone", "3"], "unknown flag --backbone; --help lists all"),
        (["--n_trials", "0"], "n_trials is 0"),
        (["--n_trials", "many"], "n_trials"),
        (["--sampler", "cma"], "sampler"),
        (["--objective", "iou/target_test"], "held-out"),
        (["--objective", "iou/mars_val"], "iou/mars_val"),
        (["--space", "none.yaml"], "none.yaml does not exist"),
        (["--study", "a/b"], "study is 'a/b'"),
        (["--storage", "mongodb://here"], "storage is 'mongodb://here'"),
        (["--storage", "postgresql://me:hidden@127.0.0.1:1/none"], "postgresql://127.0.0.1:1/none"),
        (["--launcher", "ray"], "other machines cannot share"),
        (["--sampler", "grid"], "has no grid"),
        (["--timeout", ".nan"], "timeout is nan"),
        (["--storage", "sqlite://"], "storage is 'sqlite://'"),
        (["--gpus_per_trial", "1.5"], "gpus_per_trial is 1.5 with launcher: processes"),
        (
            ["--launcher", "ray", "--storage", "postgresql://127.0.0.1/x", "--ray_address", "127.0.0.1:1"],
            "no Ray cluster answers",
        ),
    ],
)
def test_wrong_words_end_with_code_2_and_nothing_started(arguments, message, empty_place, squares, capsys):
    Path("c.yaml").write_text(config_to_yaml(load_config(None, small_settings(squares))))
    assert main(["run", "--config", "c.yaml", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert message in said
    assert "hidden@" not in said
    assert not (empty_place / "mlflow.db").exists()
    assert not list(empty_place.glob("studies/*/journal.log"))


def test_a_metric_that_no_run_logs_is_no_objective(squares, tmp_path):
    config = load_config(None, small_settings(squares, data__class_names=["ground (any)", "square"]))
    good = ("iou/target_val", "class_iou/target_val/ground _any_", "loss/val_source", "da/domain_acc")
    for name in good:
        check_objective(load_settings(SweepConfig, None, {"objective": name}), config, build.find_data(config).labelled)
    for name in ("iou/tarket_val", "class_iou/target_val/ground (any)", "da/domain_accuracy", "loss/train_x"):
        with pytest.raises(InputError, match="do not log"):
            check_objective(
                load_settings(SweepConfig, None, {"objective": name}), config, build.find_data(config).labelled
            )
    (tmp_path / "bare").mkdir()  # not in `squares`, which other tests count
    (tmp_path / "bare" / "images").symlink_to(squares / "target_val" / "images")
    unlabelled = replace(config, {"data.target.val": [str(tmp_path / "bare")]})
    for name in ("iou/target_val", "iou/gap_source_minus_target"):
        with pytest.raises(InputError, match=r"labeled images in data\.target\.val"):
            check_objective(
                load_settings(SweepConfig, None, {"objective": name}), unlabelled, build.find_data(unlabelled).labelled
            )


@pytest.mark.parametrize(
    ("objective", "maximizes"), [("iou/target_val", True), ("loss/val_source", False), ("da/domain_acc", True)]
)
def test_the_direction_follows_from_the_name_and_can_be_given(objective, maximizes):
    assert load_settings(SweepConfig, None, {"objective": objective}).maximizes is maximizes
    assert load_settings(SweepConfig, None, {"objective": objective, "direction": "minimize"}).maximizes is False


CONDITIONAL = {
    "optimizer.momentum": {"type": "float", "low": 0.0, "high": 0.9, "step": 0.3, "when": {"optimizer.name": "sgd"}},
    "optimizer.name": {"type": "categorical", "choices": ["adam", "sgd"]},
    f"{METHOD}.hidden_size": {"type": "int", "low": 8, "high": 24, "step": 8},
}


def test_a_conditional_setting_is_drawn_only_where_its_parent_wants_it():
    space = space_of(CONDITIONAL)
    points = [draw(space, sampler_seed=seed) for seed in range(30)]
    assert {point["optimizer.name"] for point in points} == {"adam", "sgd"}
    assert all(("optimizer.momentum" in point) == (point["optimizer.name"] == "sgd") for point in points)


def test_a_grid_is_every_point_once():
    points = list(space_of(CONDITIONAL).grid())
    assert len(points) == len({tuple(sorted(point.items())) for point in points}) == 3 * (1 + 4)


def test_the_points_of_a_grid_are_values_of_the_space():
    space = space_of({f"{METHOD}.lambda_da": {"type": "float", "low": 0.1, "high": 0.7, "step": 0.1}})
    points = [point[f"{METHOD}.lambda_da"] for point in space.grid()]
    assert points == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    distribution = space.parameters[0].distribution
    assert all(distribution._contains(point) for point in points)


def test_a_stored_space_is_read_back_to_the_same():
    space = space_of({**CONDITIONAL, Key.FEATURE_LAYER: "auto"})
    assert read_stored(space.described()) == space


LISTS = {
    Key.FEATURE_LAYER: {"type": "categorical", "choices": ["encoder", ["encoder", "decoder"]]},
    "optimizer.betas": {"type": "categorical", "choices": [[0.5, 0.999], [0.9, 0.999]]},
    "trainer.gradient_clip_val": {"type": "categorical", "choices": [None, 1.0]},
    "trainer.deterministic": {"type": "categorical", "choices": [True, False]},
    "optimizer.lr": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
    f"{METHOD}.hidden_size": {"type": "int", "low": 4, "high": 64, "log": True},
}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_point_is_found_again_in_the_settings_it_makes(seed):
    space = LIST_SPACE
    point = draw(space, sampler_seed=seed)
    config = replace(BASE, settings_of(point))
    assert space.values_of(config) == point
    assert config.domain_adaptation.method.layers == (
        ["encoder", "decoder"] if point[Key.FEATURE_LAYER] == label_of(["encoder", "decoder"]) else ["encoder"]
    )


LIST_SPACE = read_space(LISTS, BASE)


def test_settings_outside_the_space_are_no_point_of_it():
    space = space_of({GAMMA: {"type": "float", "low": 1, "high": 5}})
    assert space.values_of(BASE) is None  # gamma is 10
    assert space.values_of(replace(BASE, {GAMMA: 2.0})) == {GAMMA: 2.0}
