"""Watches both domains while training runs: IoU, their gap, and how much of the source has been forgotten."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from dann_experiments.training.scores import Scorer, Scores

log = logging.getLogger(__name__)
DOMAINS = ("source", "target")  # validation loader 0 and 1


class DomainAdaptationMonitorCallback(pl.Callback):
    """Scores validation of both domains from the logits that validation makes anyway: each image is forwarded once.

    Needs validation loaders [source] or [source, target] and a `validation_step` that returns {"logits": (N, K, H, W),
    "labels": (N, H, W)}. Logs to every logger of the trainer, at the step = optimizer steps done: `iou/source_val`,
    `iou/target_val`, `class_iou/...`, `loss/val_source`, `loss/val_target`, `iou/gap_source_minus_target`,
    `iou/source_drop_from_baseline`. The baseline is the sanity check before training (`num_sanity_val_steps=-1`), logged
    at step 0. Warns once each time the source falls by more than `forgetting_threshold` (0..1) below its baseline.
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        log_every_n_epochs: int = 1,
        forgetting_threshold: float = 0.05,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_names = list(class_names or [f"class_{index}" for index in range(num_classes)])
        if len(self.class_names) != num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for num_classes {num_classes}")
        self.log_every_n_epochs = log_every_n_epochs
        self.forgetting_threshold = forgetting_threshold
        self.ignore_index = ignore_index
        self.baseline: dict[str, Scores] = {}
        """Scores of the warm start, by domain."""
        self.latest: dict[str, Scores] = {}
        """Scores of the last validation, by domain."""
        self._scorers: dict[int, Scorer] = {}
        self._forgetting = False

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._scorers = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx not in self._scorers:
            self._scorers[dataloader_idx] = Scorer(self.num_classes, self.ignore_index)
        self._scorers[dataloader_idx].update(outputs["logits"], outputs["labels"])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.latest = {DOMAINS[index]: scorer.compute() for index, scorer in sorted(self._scorers.items())}
        self._scorers = {}
        if trainer.sanity_checking:
            self.baseline = dict(self.latest)
        metrics = self.metrics()
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.sanity_checking or last_epoch or (trainer.current_epoch + 1) % self.log_every_n_epochs == 0:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        if not trainer.sanity_checking:
            shown = {"iou/source_val", "iou/target_val"}
            for name, value in metrics.items():  # for checkpoints and the progress bar; the loggers have them already
                pl_module.log(name, value, prog_bar=name in shown, logger=False, add_dataloader_idx=False)
            self._warn_of_forgetting()

    def metrics(self) -> dict[str, float]:
        """The last validation under the names that a run shows."""
        return validation_metrics(self.latest, self.baseline, self.class_names)

    def _warn_of_forgetting(self) -> None:
        drop = self.metrics().get("iou/source_drop_from_baseline", 0.0)
        if drop > self.forgetting_threshold and not self._forgetting:
            log.warning(
                "iou/source_val fell to %.3f, %.3f below the warm start's (monitor.forgetting_threshold is %.3f): the "
                "network forgets the source; a smaller lambda_da or learning rate helps.",
                self.latest["source"].iou, drop, self.forgetting_threshold,
            )  # fmt: skip
        self._forgetting = drop > self.forgetting_threshold


def validation_metrics(
    latest: Mapping[str, Scores], baseline: Mapping[str, Scores], class_names: Sequence[str]
) -> dict[str, float]:
    """What a validation shows: scores of both domains, their gap, and the source's drop from its baseline."""
    values: dict[str, float] = {}
    for domain, scores in latest.items():
        values |= scores.metrics(f"{domain}_val", class_names)
        values[f"loss/val_{domain}"] = scores.loss
    if len(latest) == 2:
        values["iou/gap_source_minus_target"] = latest["source"].iou - latest["target"].iou
    if "source" in baseline and "source" in latest:
        values["iou/source_drop_from_baseline"] = baseline["source"].iou - latest["source"].iou
    return values


class RatesAndTimes(pl.Callback):
    """Logs each epoch's learning rates (`lr/GROUP`) and length, validation included (`time/epoch_seconds`)."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()
        groups = trainer.optimizers[0].param_groups
        rates = {f"lr/{group.get('name', index)}": float(group["lr"]) for index, group in enumerate(groups)}
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"time/epoch_seconds": time.perf_counter() - self._start}, step=trainer.global_step)
