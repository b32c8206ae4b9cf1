"""Callbacks for Lightning: they link a run to its trial, report the objective after each epoch, and end a run that is pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import optuna
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from dann_experiments.names import Metric, Tag
from dann_experiments.tracking.run import EndedEarly, RunLogger
from sweeps.dashboard import add_to_note, run_line
from sweeps.ranking import set_forgetting


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

    Raises Pruned if the pruner decides so and `may_prune` is set. The run of a pruned trial gets the tags `dann.pruned` and
    `dann.pruned_after_epochs`. Whether its network had forgotten the source by then, by more than `forgetting_threshold` (0..1),
    is stored with the trial.
    """

    def __init__(
        self, trial: optuna.Trial, metric: str, may_prune: bool = True, forgetting_threshold: float = 0.05
    ) -> None:
        super().__init__(trial, metric)
        self.may_prune = may_prune
        self.forgetting_threshold = forgetting_threshold

    def validated(self, trainer: pl.Trainer, epochs: int, values: Mapping[str, float]) -> None:
        """Report the objective, and prune."""
        if self.metric not in values:
            return
        self.trial.report(values[self.metric], step=epochs)
        if self.may_prune and epochs < (trainer.max_epochs or 0) and self.trial.should_prune():
            logger = trainer.logger
            assert isinstance(logger, RunLogger)
            logger.run.set_tags({Tag.PRUNED: "true", Tag.PRUNED_AFTER_EPOCHS: epochs})
            drop = values.get(Metric.SOURCE_DROP)
            if drop is not None:
                self.trial.set_user_attr("scores", {Metric.SOURCE_DROP: drop})
            set_forgetting(self.trial, drop, self.forgetting_threshold)
            raise Pruned(f"pruned after {epochs} of {trainer.max_epochs} epochs")
