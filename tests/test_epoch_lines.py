"""Progress without a terminal: a line per epoch and, where an epoch or a validation takes longer, one a minute."""

from types import SimpleNamespace
from typing import Any

import pytest
from conftest import small_settings
from pytorch_lightning.trainer.states import TrainerFn

from dann_experiments import adapt, load_config
from dann_experiments.training.epoch_lines import EpochLines

SECONDS = 25.0
"""What each batch takes by the test's clock."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trainer_of(**values: Any) -> Any:
    plain = {
        "current_epoch": 1, "max_epochs": 9, "num_training_batches": 10, "sanity_checking": False, "num_val_batches": [4, 4],
        "num_sanity_val_batches": [2, 6], "callback_metrics": {}, "state": SimpleNamespace(fn=TrainerFn.FITTING),
    }  # fmt: skip
    return SimpleNamespace(**plain | values)


def train(lines: EpochLines, clock: Clock, trainer: Any, batches: range) -> None:
    for index in batches:
        clock.now += SECONDS
        lines.on_train_batch_end(trainer, None, None, None, index)  # pyright: ignore[reportArgumentType]


def test_a_long_epoch_says_each_minute_how_far_it_is(capsys):
    lines, trainer = EpochLines(clock := Clock()), trainer_of()
    lines.on_train_start(trainer, None)  # pyright: ignore[reportArgumentType]
    train(lines, clock, trainer, range(10))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 2/9: batch 3 of 10, about 3 min left",  # 7 batches of 25 s
        "epoch 2/9: batch 6 of 10, about 2 min left",  # 4
        "epoch 2/9: batch 9 of 10, about 25 s left",
    ]


def test_an_epoch_that_was_resumed_counts_the_time_of_its_own_batches(capsys):
    lines, trainer = EpochLines(clock := Clock()), trainer_of()
    clock.now = 1000.0
    lines.on_train_start(trainer, None)  # pyright: ignore[reportArgumentType]
    train(lines, clock, trainer, range(5, 8))
    assert capsys.readouterr().out.splitlines() == ["epoch 2/9: batch 8 of 10, about 50 s left"]


@pytest.mark.parametrize(("sanity", "told"), [(False, "batch 7 of 8"), (True, "batch 5 of 8")])
def test_a_long_validation_counts_the_batches_of_all_its_sets(sanity, told, capsys):
    lines, trainer = EpochLines(clock := Clock()), trainer_of(sanity_checking=sanity)
    lines.on_validation_start(trainer, None)  # pyright: ignore[reportArgumentType]
    clock.now += EpochLines.SECONDS
    lines.on_validation_batch_end(trainer, None, None, None, 2, dataloader_idx=1)  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().out.splitlines() == [f"validation: {told}"]


@pytest.mark.usefixtures("pretrained_place")
def test_a_real_run_tells_its_batches(squares, monkeypatch, capsys):
    monkeypatch.setattr(EpochLines, "SECONDS", 0.0)
    adapt(load_config(None, small_settings(squares, trainer__enable_progress_bar=True)))
    told = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "batch" in line]
    steps = [f"epoch {epoch}/2: batch {batch} of 4" for epoch in (1, 2) for batch in (1, 2, 3)]
    assert [line for line in told if line.startswith("epoch")] == steps
    validations = [line for line in told if line.startswith("validation")]
    assert len(validations) >= 3  # before the first step, and after each epoch
