"""What depends on the metric of validation that chooses epochs: when training ends, and the learning rates of `plateau`."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.trainer.states import TrainerFn
from torch.optim.lr_scheduler import ReduceLROnPlateau

log = logging.getLogger(__name__)


class StopsEarly(EarlyStopping):
    """Ends training when `metric` has not improved for `patience` validations. A run that was killed after that moment ends when
    it is resumed, instead of training on."""

    def __init__(self, metric: str, mode: str, patience: int) -> None:
        # our select/ scores are infinitely bad while the source is forgotten: that is no reason to stop at once
        super().__init__(
            metric, min_delta=0.0, patience=patience, mode=mode, check_finite=False,
            check_on_train_epoch_end=False,
        )  # fmt: skip

    @property
    def stopped(self) -> bool:
        """Return whether training was ended."""
        return self.wait_count >= self.patience

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stopped:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self.stopped and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            log.info(
                "Training ends after epoch %d of %s: %s has not improved for %d validations (monitor.patience).",
                trainer.current_epoch + 1, trainer.max_epochs, self.monitor, self.patience,
            )  # fmt: skip


class Plateau(pl.Callback):
    """Multiplies all learning rates by `factor` when `metric` has not improved for more than `patience` validations.

    Torch's ReduceLROnPlateau, stepped at the end of each validation: Lightning steps it after the epoch's checkpoint is saved,
    so that a resumed run would miss a step.
    """

    def __init__(self, metric: str, mode: Any, factor: float, patience: int) -> None:
        super().__init__()
        self.metric, self.mode, self.factor, self.patience = metric, mode, factor, patience
        self._scheduler: ReduceLROnPlateau | None = None
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        state = {} if self._scheduler is None else self._scheduler.state_dict()
        return {name: state[name] for name in ("best", "num_bad_epochs", "last_epoch") if name in state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._scheduler = ReduceLROnPlateau(
            trainer.optimizers[0], self.mode, self.factor, self.patience, threshold=0.0, threshold_mode="abs"
        )
        if self._loaded:
            self._scheduler.load_state_dict(self._scheduler.state_dict() | self._loaded)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._scheduler is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._scheduler.step(float(trainer.callback_metrics[self.metric]))
