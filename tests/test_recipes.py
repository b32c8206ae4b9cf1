"""Every recipe runs as it is, but for its length."""

from __future__ import annotations

from pathlib import Path

import pytest

from dann_experiments import adapt, load_config

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
ELSEWHERE = {
    "neon_trees": "needs images of the user's: tests/test_neon_trees.py",
    "classic": "runs on few images of the same data in tests/test_documented_examples.py",
    "target_dialect": "runs on few images of the same data in tests/test_documented_examples.py",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem not in ELSEWHERE], ids=lambda path: path.name)
def test_the_recipe_runs(recipe, workplace):
    short = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "pretraining.max_epochs": 1}
    result = adapt(load_config(recipe, {**short, "trainer.enable_progress_bar": False}))
    assert {"iou/source_val", "iou/target_val", "iou/target_test"} <= set(result.metrics)
