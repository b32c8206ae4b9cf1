"""Recipes: found by name from anywhere, and each runs as it is, but for its length."""

from __future__ import annotations

from pathlib import Path

import pytest

from dann_experiments import adapt, load_config
from dann_experiments.cli import main
from dann_experiments.config.recipes import RECIPES as SHIPPED
from dann_experiments.config.recipes import settings_file
from sweeps.cli import SPACES
from sweeps.cli import main as sweeps_main

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
ELSEWHERE = {
    "neon_trees": "needs images of the user's: tests/test_neon_trees.py",
    "neon_florida": "needs images and an encoder of the user's: tests/test_documented_examples.py",
    "neon_soaproot": "needs images and an encoder of the user's: tests/test_documented_examples.py",
    "landsat_bands": "needs images and an encoder of the user's: tests/test_documented_examples.py",
    "landsat_regions": "needs images and an encoder of the user's: tests/test_documented_examples.py",
    "nuclei": "needs images and an encoder of the user's: tests/test_documented_examples.py",
    "vega": "needs images of the user's: tests/test_documented_examples.py",
    "classic": "runs on few images of the same data in tests/test_documented_examples.py",
    "target_dialect": "runs on few images of the same data in tests/test_documented_examples.py",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem not in ELSEWHERE], ids=lambda path: path.name)
def test_the_recipe_runs(recipe, workplace):
    short = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "pretraining.max_epochs": 1}
    result = adapt(load_config(recipe, {**short, "trainer.enable_progress_bar": False}))
    assert {"iou/source_val", "iou/target_val", "iou/target_test"} <= set(result.metrics)


def test_the_recipes_that_ship_with_the_package_are_those_at_the_top():
    assert (Path(__file__).parents[1] / "recipes").samefile(SHIPPED)


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "recipes/digits.yaml", "./digits"])
def test_a_recipe_is_found_by_its_name_in_any_folder(name, empty_place):
    assert settings_file(name) == SHIPPED / "digits.yaml"
    assert load_config(name) == load_config(SHIPPED / "digits.yaml")


def test_a_space_is_found_by_its_name_in_any_folder(empty_place):
    assert settings_file("wide", "--space", SPACES).read_text() == (SPACES / "wide.yaml").read_text()


def test_a_file_of_the_users_comes_before_a_recipe_of_its_name_and_a_folder_does_not(empty_place):
    (empty_place / "digits").mkdir()
    assert settings_file("digits") == SHIPPED / "digits.yaml"
    (empty_place / "classic").write_text("seed: 7")
    assert load_config("classic").seed == 7


@pytest.mark.parametrize("name", ["digit", "other/digits.yaml", "digits.yml", "recipes/none.yaml"])
def test_what_is_neither_file_nor_recipe_is_refused_with_the_list_of_recipes(name, empty_place, capsys):
    assert main(["config", "--config", name]) == 2
    assert (
        f"{name} does not exist; give the path of a file, or one of these names: classic, digits, "
        in capsys.readouterr().err
    )
    assert sweeps_main(["run", "--space", name]) == 2
    assert "one of these names: dann, ladder, wide." in capsys.readouterr().err


def test_the_default_recipe_is_named_and_only_where_it_is_used(empty_place, capsys):
    assert main(["config"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "No --config, so the recipe 'digits' is used.\n"
    assert main(["config", "--config", "digits"]) == 0
    assert capsys.readouterr() == (shown.out, "")


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        # a group of settings that do not fit together, refused when the network is made
        (["layers", "--model.encoder_name", "efficientnet-b0"], "from the recipe 'digits': model.arch is 'pspnet', "),
        # one setting, refused when settings are loaded
        (["config", "--model.classes", "3"], "from the recipe 'digits': data.class_names is ['background', 'stroke']."),
    ],
)
def test_an_error_names_values_of_the_default_recipe_that_the_user_never_wrote(
    arguments, explanation, empty_place, capsys
):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert explanation in message
    assert f"{arguments[1].removeprefix('--')} is " not in message.partition("recipe")[2]
    assert main([*arguments, "--config", "digits"]) == 2
    assert "Without --config" not in capsys.readouterr().err


def test_a_suggestion_is_not_explained_as_a_value_of_the_recipe(empty_place, capsys):
    assert main(["config"]) == 0  # the default recipe is in use
    assert main(["config", "--model.arc", "unet"]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'model.arch'" in message
    assert "Without --config" not in message
