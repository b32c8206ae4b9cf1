"""The progress of a training where there is no terminal to draw a bar on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from dann_experiments.config.durations import duration
from dann_experiments.names import CURVES


class EpochLines(pl.Callback):
    """Prints one line per epoch, one for final weights that are not those of the last epoch, and in long epochs and validations
    one line a minute. `clock`: seconds, which never go back."""

    SECONDS = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = self._told = clock()
        self._batches = 0  # of this epoch that this process trained on: a resumed epoch begins in its middle

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = self._told = self._clock()
        self._batches = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done, count = batch_idx + 1, trainer.num_training_batches
        self._batches += 1
        if done < count and self._is_time():
            left = (self._told - self._begun) / self._batches * (count - done)
            where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: batch {done} of {count}"
            print(f"{where}, about {duration(left)} left", flush=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._told = self._clock()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self._is_time():
            counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            print(f"validation: batch {sum(counts[:dataloader_idx]) + batch_idx + 1} of {sum(counts)}", flush=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shown = [
            f"{name} {float(trainer.callback_metrics[name]):.3f}"
            for name in CURVES[:2]
            if name in trainer.callback_metrics
        ]
        if not trainer.sanity_checking:
            after = trainer.state.fn == TrainerFn.VALIDATING  # training is over: the weights that the run ends with
            epoch = "final weights" if after else f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            print("  ".join([epoch, *shown]), flush=True)

    def _is_time(self) -> bool:
        """Return whether the last line is a minute old; if so, count anew."""
        now = self._clock()
        if now - self._told < self.SECONDS:
            return False
        self._told = now
        return True
