"""Each setting of training reaches every arm of a comparison alike; otherwise a verdict would compare two things at once."""

from __future__ import annotations

from typing import Any

import pytest

from dann_experiments import InputError, load_config
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
    "monitor.expected_shares": {"class_0": [0.1, 0.9]},
    "monitor.on_guard": "stop",
    "optimizer.name": "sgd",
    "optimizer.schedule": "cosine",
    "optimizer.betas": [0.5, 0.9],
    "optimizer.lr_factors": {"encoder": 0.1},
    "optimizer.freeze": ["encoder"],
    "trainer.ema_decay": 0.9,
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


OF_ONE_NETWORK = [
    key
    for key, value in flatten(load_config()).items()
    if key.startswith("model.") and value is None and key not in OTHER
]
"""Options of single architectures, without a value that all take; `test_no_arm_may_have_a_network_of_its_own` holds them."""
KEYS = [key for key in known_keys() if key.startswith(SHARED) and key not in OF_ONE_NETWORK]


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_of_training_reaches_every_arm(key):
    base = load_config(overrides={"data.oracle": ["labelled"], "data.target.train": ["target"]})
    wanted = another(key, flatten(base)[key])
    more = {key.replace("freeze_epochs", "freeze"): ["encoder"]} if key.endswith("freeze_epochs") else {}
    if wanted is None and key not in OTHER:
        wanted = 1
    config = load_config(overrides={"data.oracle": ["labelled"], "data.target.train": ["target"], **more, key: wanted})
    assert flatten(config)[key] != flatten(base)[key] or key == "model.in_channels"
    arms, _ = arms_of(CompareConfig(), config)
    assert {arm.kind for arm in arms} == {"source_only", "statistics", "control", "adapted", "oracle"}
    for arm in arms:
        assert flatten(_settings(arm, config, 7))[key] == flatten(config)[key], arm.name


@pytest.mark.parametrize("key", OF_ONE_NETWORK)
def test_no_arm_may_have_a_network_of_its_own(key):
    config = load_config(overrides={"data.target.train": ["target"]})
    settings = CompareConfig(arms={"DANN": {"kind": "adapted", key: 2}})
    with pytest.raises(InputError, match=rf"arms\.DANN sets {key} to 2, but arms start from one source model"):
        arms_of(settings, config)
