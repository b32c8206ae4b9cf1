"""Runs of earlier versions beside runs of this one: the same settings, kept in another form, are the same arm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities import Param

from dann_experiments.comparison.collect import arms_of_runs
from dann_experiments.config import config_to_dict, flatten, load_config
from dann_experiments.config.store_names import LONGEST_PARAM, shortened
from dann_experiments.tracking.store import Store, open_store

OWN = {"domain_adaptation.method.class_path": "somebody.Own"}
NESTED = {
    "weight": 0.5,
    "inner": {"a": [1, float("nan")], "b": float("-inf"), "none": None, "empty": {}},
    "text": "it's {x}",
}
MANY = [f"scene_{index:05}.tif" for index in range(600)]


def earlier_params(settings: Mapping[str, Any]) -> dict[str, str]:
    """As earlier versions kept them: every mapping taken apart, values cut without a word."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[f"cfg.{prefix[:-1]}"] = str(value)[:6000]

    walk("", settings)
    return flat


def later_params(settings: Mapping[str, Any]) -> dict[str, str]:
    return {f"cfg.{key}": shortened(value, LONGEST_PARAM) for key, value in settings.items()}


class Runs:
    """Finished runs with params alone, all from one source model."""

    def __init__(self, folder: Path) -> None:
        self.store: Store = open_store(None, "both")
        self.folder = folder
        self.source = self.add({}, {"dann.job": "pretrain", "seed": "0"})

    def add(self, params: Mapping[str, str], tags: Mapping[str, str], config: Any = None) -> str:
        client = self.store.client
        run_id = client.create_run(self.store.experiment_id, tags=dict(tags)).info.run_id
        client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
        if config is not None:
            (self.folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
            client.log_artifact(run_id, str(self.folder / "config.yaml"))
        client.set_terminated(run_id)
        return run_id

    def adapted(self, params: Mapping[str, str], seed: int, config: Any = None) -> str:
        tags = {"dann.job": "adapt", "dann.method": "dann", "seed": str(seed), "dann.source_run_id": self.source}
        return self.add(params, tags, config)

    def arms(self, *run_ids: str) -> list[str]:
        arms, _, _ = arms_of_runs(self.store, run_ids)
        return [arm.name for arm in arms if arm.kind == "adapted"]


@pytest.fixture
def runs(workplace: Path) -> Runs:
    return Runs(workplace)


@pytest.mark.parametrize(
    "settings",
    [
        {"data.source.value_map": {0: "background", 255: "building"}},
        {"data.target.value_map": {15: "building", 2: "bare"}, "data.source.value_map": {3: "it's", 4: 'a "b"'}},
        {**OWN, "domain_adaptation.method.init_args": NESTED},
        {**OWN, "domain_adaptation.method.init_args": {"inner": {"deep": 1}}},
        {},
    ],
)
def test_a_mapping_kept_in_parts_or_as_one_value_is_the_same_arm(runs, settings):
    config = load_config(None, settings)
    earlier, later = earlier_params(config_to_dict(config)), later_params(flatten(config))
    assert (earlier != later) == bool(settings)
    run_ids = [runs.adapted(earlier, 0), runs.adapted(later, 1), runs.adapted({**earlier, **later}, 2)]
    assert len(runs.arms(*run_ids)) == 1


def test_mappings_that_differ_are_different_arms_in_either_form(runs):
    first, second = (load_config(None, {"data.source.value_map": {0: "a", 1: name}}) for name in ("b", "c"))
    run_ids = [runs.adapted(earlier_params(config_to_dict(first)), 0), runs.adapted(later_params(flatten(second)), 1)]
    assert runs.arms(*run_ids) == ["DANN: 1 b", "DANN: 1 c"]


def test_a_setting_that_an_earlier_version_did_not_have_is_at_its_default(runs):
    later = later_params(flatten(load_config()))
    earlier = {key: value for key, value in later.items() if "color_map" not in key and "channels_last" not in key}
    assert len(earlier) < len(later)
    assert len(runs.arms(runs.adapted(earlier, 0), runs.adapted(later, 1))) == 1
    changed = later | {"cfg.trainer.channels_last": "True"}
    assert len(runs.arms(runs.adapted(earlier, 2), runs.adapted(changed, 3))) == 2


@pytest.mark.parametrize(
    ("key", "value"), [("data.source.train", MANY), ("data.source.value_map", dict.fromkeys(range(900), "background"))]
)
def test_a_value_that_was_cut_is_compared_whole(runs, key, value):
    classes = {"data.class_names": ["background", "building"]}
    config = load_config(None, {**classes, key: value})
    run_ids = [
        runs.adapted(earlier_params(config_to_dict(config)), 0, config),
        runs.adapted(later_params(flatten(config)), 1, config),
    ]
    assert len(runs.arms(*run_ids)) == 1
    changed = {**value, 899: "building"} if isinstance(value, dict) else [*value[:-1], "other.tif"]
    other = load_config(None, {**classes, key: changed})
    assert len(runs.arms(*run_ids, runs.adapted(later_params(flatten(other)), 2, other))) == 2
