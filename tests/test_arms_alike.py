"""Each setting of training reaches every arm of a comparison alike; otherwise a verdict would compare two things at once."""

from __future__ import annotations

from typing import Any

import pytest

from dann_experiments import load_config
from dann_experiments.comparison.arms import _settings, arms_of
from dann_experiments.config import flatten
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import known_keys

SHARED = ("loss", "class_weights", "optimizer.", "pretraining.", "trainer.", "monitor.", "model.")
OTHER = {
    "loss": [{"name": "dice", "weight": 2.0}, {"name": "cross_entropy", "weight": 1.0}],
    "class_weights": "auto",
    "model.arch": "fpn",
    "model.encoder_name": "resnet18",
    "model.encoder_weights": None,
    "trainer.accelerator": "cpu",
    "trainer.channels_last": True,
    "trainer.precision": "bf16-mixed",
    "monitor.metric": "loss/val_source",
    "monitor.mode": "max",
    "monitor.final_model": "best",
    "optimizer.name": "sgd",
    "optimizer.schedule": "cosine",
    "optimizer.betas": [0.5, 0.9],
    "model.classes": 3,
    "model.in_channels": 3,
    "model.decoder_channels": [16, 8],
}
OTHER |= {
    key.replace("optimizer.", "pretraining.optimizer.", 1): OTHER[key] for key in OTHER if key.startswith("optimizer.")
}


def another(key: str, value: Any) -> Any:
    """A valid value of a setting that is not its default."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 if value else 0.5 if isinstance(value, float) else None


KEYS = [key for key in known_keys() if key.startswith(SHARED)]


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_of_training_reaches_every_arm(key):
    base = load_config(overrides={"data.oracle": ["labelled"], "data.target.train": ["target"]})
    wanted = another(key, flatten(base)[key])
    if wanted is None and flatten(base)[key] is None:
        wanted = 1 if not key.startswith("model.") else None
    if wanted is None and key.startswith("model."):
        pytest.skip("options of one architecture: the whole group is held by `ALIKE`")
    config = load_config(overrides={"data.oracle": ["labelled"], "data.target.train": ["target"], key: wanted})
    assert flatten(config)[key] != flatten(base)[key] or key == "model.in_channels"
    arms, _ = arms_of(CompareConfig(), config)
    assert {arm.kind for arm in arms} == {"source_only", "statistics", "control", "adapted", "oracle"}
    for arm in arms:
        assert flatten(_settings(arm, config, 7))[key] == flatten(config)[key], arm.name
