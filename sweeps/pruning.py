"""Callbacks for Lightning: they link a run to its trial, report the objective after each epoch, and end a run that is pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from dann_experiments.names import Metric, Tag
from dann_experiments.tracking.run import EndedEarly, RunLogger
from dann_experiments.training.side_validation import score_now
from sweeps.dashboard import add_to_note, run_line
from sweeps.ranking import set_forgetting
from sweeps.sampling import RUNGS


class Pruned(EndedEarly):
    """The pruner ended this trial."""


class RunCallback(pl.Callback):
    """Stores with `trial` the id of its run and the number of epochs done, after each validation.

    Raises FloatingPointError if a loss or `metric` is not finite. `epochs_before`: those of the trial's earlier runs, with other
    seeds.
    """

    def __init__(self, trial: optuna.Trial, metric: str, epochs_before: int = 0) -> None:
        super().__init__()
        self.trial = trial
        self.metric = metric
        self.epochs_before = epochs_before

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Store the run id with the trial before anything can fail, and the address of the run for optuna-dashboard."""
        if stage != TrainerFn.FITTING:
            return
        logger = trainer.logger
        assert isinstance(logger, RunLogger)
        self.trial.set_user_attr("run_id", logger.version)
        add_to_note(self.trial, run_line(logger.run.store, logger.version, "run in MLflow"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:  # the best epoch was scored again
            return
        epochs = trainer.current_epoch + 1
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        wrong = {
            name: value for name, value in values.items() if name.startswith(Metric.LOSS) and not math.isfinite(value)
        }
        if wrong or not math.isfinite(values.get(self.metric, 0.0)):
            raise FloatingPointError(f"after epoch {epochs}: {wrong or {self.metric: values[self.metric]}}")
        self.trial.set_user_attr("epochs", self.epochs_before + epochs)
        self.validated(trainer, epochs, values)

    def validated(self, trainer: pl.Trainer, epochs: int, values: Mapping[str, float]) -> None:
        """Do nothing more: with several seeds a trial is judged when the run has ended."""


class PruningCallback(RunCallback):
    """Also reports `metric` to `trial` after each validation, at step = epochs done.

    With `every_n_steps`, the network is also scored every so many optimizer steps within an epoch, and all reports are at step =
    optimizer steps done. With `parts`, reports are at step = parts of the run done, of so many, and the network is also scored
    within an epoch where `halving` judges. Raises Pruned if the pruner decides so and `may_prune` is set; a trial that may not be
    pruned is one of those with which others are compared. The run of a pruned trial gets the tags `dann.pruned` and
    `dann.pruned_after_epochs`, the number of whole epochs. Whether its network had forgotten the source by then, by more than
    `forgetting_threshold` (0..1), is stored with the trial.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        metric: str,
        may_prune: bool = True,
        forgetting_threshold: float = 0.05,
        every_n_steps: int | None = None,
        parts: int | None = None,
    ) -> None:
        super().__init__(trial, metric)
        self.may_prune = may_prune
        self.forgetting_threshold = forgetting_threshold
        self.every_n_steps = every_n_steps
        self.parts = parts
        self._within = every_n_steps is not None or parts is not None  # whether it is scored within an epoch
        self._seen = 0  # optimizer steps when the last batch ended: a skipped step does not count
        self._reported = 0  # step of the last report

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._within or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # validation comes next
            return
        if not self._due(trainer):
            return
        values = score_now(trainer, pl_module)
        if self.metric not in values:  # validation does not score it
            self._within = False
        elif math.isfinite(values[self.metric]):  # a loss that is not finite may recover until validation
            self._report(trainer, trainer.current_epoch, values)

    def validated(self, trainer: pl.Trainer, epochs: int, values: Mapping[str, float]) -> None:
        """Report the objective, and prune."""
        if self.metric in values:
            self._report(trainer, epochs, values)

    def _due(self, trainer: pl.Trainer) -> bool:
        if self.every_n_steps is not None:
            return trainer.global_step % self.every_n_steps == 0
        part = self._parts_done(trainer)
        return part > self._reported and part in RUNGS

    def _parts_done(self, trainer: pl.Trainer) -> int:
        return trainer.global_step * (self.parts or 1) // max(int(trainer.estimated_stepping_batches), 1)

    def _report(self, trainer: pl.Trainer, epochs: int, values: Mapping[str, float]) -> None:
        step = trainer.global_step if self.every_n_steps else self._parts_done(trainer) if self.parts else epochs
        if step <= self._reported:  # the same part of the run
            return
        self.trial.report(values[self.metric], step=step)
        self._reported = step
        if epochs >= (trainer.max_epochs or 0) or not self.trial.should_prune() or not self.may_prune:
            return
        logger = trainer.logger
        assert isinstance(logger, RunLogger)
        logger.run.set_tags({Tag.PRUNED: "true", Tag.PRUNED_AFTER_EPOCHS: epochs})
        drop = values.get(Metric.SOURCE_DROP)
        if drop is not None:
            self.trial.set_user_attr("scores", {Metric.SOURCE_DROP: drop})
        set_forgetting(self.trial, drop, self.forgetting_threshold)
        self.trial.set_user_attr("share", trainer.global_step / trainer.estimated_stepping_batches)
        if self._within:
            self.trial.set_user_attr("steps", trainer.global_step)
        raise Pruned(f"pruned after {trainer.global_step} steps" if self._within else f"pruned after {epochs} epochs")
