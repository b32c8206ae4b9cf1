"""Pruning callback for Lightning: reports the objective after each epoch and ends the run if the pruner decides so."""

from __future__ import annotations

import math

import optuna
import pytorch_lightning as pl

from dann_experiments.names import Metric, Tag
from dann_experiments.tracking.run import EndedEarly, RunLogger


class Pruned(EndedEarly):
    """The pruner ended this trial."""


class PruningCallback(pl.Callback):
    """Reports `metric` to `trial` after each validation, at step = epochs done.

    Raises Pruned if the pruner decides so and `may_prune` is set, FloatingPointError if a loss or the metric is not finite. The
    run of a pruned trial gets the tags `dann.pruned` and `dann.pruned_after_epochs`.
    """

    def __init__(self, trial: optuna.Trial, metric: str, may_prune: bool = True) -> None:
        super().__init__()
        self.trial = trial
        self.metric = metric
        self.may_prune = may_prune

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Store the run id with the trial before anything can fail."""
        logger = trainer.logger
        assert isinstance(logger, RunLogger)
        self.trial.set_user_attr("run_id", logger.version)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        epochs = trainer.current_epoch + 1
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        wrong = {
            name: value for name, value in values.items() if name.startswith(Metric.LOSS) and not math.isfinite(value)
        }
        if wrong or not math.isfinite(values.get(self.metric, 0.0)):
            raise FloatingPointError(f"after epoch {epochs}: {wrong or {self.metric: values[self.metric]}}")
        self.trial.set_user_attr("epochs", epochs)
        if self.metric not in values:
            return
        self.trial.report(values[self.metric], step=epochs)
        if self.may_prune and epochs < (trainer.max_epochs or 0) and self.trial.should_prune():
            logger = trainer.logger
            assert isinstance(logger, RunLogger)
            logger.run.set_tags({Tag.PRUNED: "true", Tag.PRUNED_AFTER_EPOCHS: epochs})
            raise Pruned(f"pruned after {epochs} of {trainer.max_epochs} epochs")
