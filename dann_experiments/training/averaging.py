"""Validates, saves and ends with an exponential moving average of the weights (Lightning's EMAWeightAveraging)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.trainer.states import TrainerFn

from dann_experiments.config.errors import InputError


class AverageWeights(EMAWeightAveraging):
    """Averages weights and buffers after each optimizer step: average = decay * average + (1 - decay) * weights; it begins as the
    weights after the first step.

    The average is what validation during training scores, what the best weights are, and what training ends with. A checkpoint
    to resume from holds both. Differs from Lightning's class in three points: `trainer.validate` after training scores the
    weights that the module has (Lightning would exchange them for the average); `as_average` serves for saving weights after a
    validation, when the trained weights have been put back; and a run that resumes after its last step ends with the average.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)
        self._copied = self._compared = False

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass  # not yet: `TrainedWeights` does it, behind all that look at what was scored

    def put_back(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Give `module` the trained weights back after a validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a module that got parameters after the average was made: Lightning pairs both by position, and checkpoints would
        hold values under wrong names (findings/lightning-ema-pairs-late-parameters-with-buffers.sh)."""
        if self._compared or self._average_model is None:
            return
        averaged = {name for name, _ in self._average_model.module.named_parameters()}
        late = sorted({name for name, _ in pl_module.named_parameters()} - averaged)
        if late:
            raise InputError(
                f"trainer.ema_decay cannot average {late[0]}, which the method created in on_train_start; create it in its "
                "constructor, or set trainer.ema_decay to null."
            )
        self._compared = True

    @contextlib.contextmanager
    def as_average(self, module: pl.LightningModule) -> Iterator[None]:
        """Give `module` the average within the block."""
        self._swap_models(module)
        try:
            yield
        finally:
            self._swap_models(module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.finish(pl_module)

    def finish(self, module: pl.LightningModule) -> None:
        """Give `module` the average for good, once."""
        if not self._copied:
            self._copy_average_to_current(module)
            self._copied = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        self._copied = False


class TrainedWeights(pl.Callback):
    """Puts the trained weights back at the end of a validation. It stands behind the callbacks that look at what was scored, such
    as that of the pictures; `average` stands before them, since its update after a step comes first."""

    def __init__(self, average: AverageWeights) -> None:
        super().__init__()
        self._average = average

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._average.put_back(trainer, pl_module)
