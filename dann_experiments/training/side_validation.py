"""Scores a network in the middle of an epoch as a validation would, without any effect on the training."""

from __future__ import annotations

from contextlib import nullcontext

import pytorch_lightning as pl
import torch

from dann_experiments.models.batchnorm import target_statistics
from dann_experiments.models.taps import evaluating
from dann_experiments.scores.selection import choice_value
from dann_experiments.training.averaging import AverageWeights
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback, TargetStatistics
from dann_experiments.training.random_states import random_states, restore


def score_now(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Return the validation metrics of the network as it is now, or of its averaged weights, by name, with the values by which it
    is chosen (`choice_value`).

    `trainer` is in the middle of an epoch of `fit`, with a `DomainAdaptationMonitorCallback`. Everything that training depends on
    is restored: random states, the mode of every module, and all buffers, such as BatchNorm's statistics. Nothing is logged.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    monitor = next(one for one in callbacks if isinstance(one, DomainAdaptationMonitorCallback)).beside()
    loaders = trainer.val_dataloaders or []
    states, buffers = random_states(), {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with evaluating(module), trainer.precision_plugin.val_step_context():
            for callback in callbacks:
                if isinstance(callback, TargetStatistics):
                    target_statistics(module.network, callback.loader)  # pyright: ignore[reportArgumentType]
            average = next((one for one in callbacks if isinstance(one, AverageWeights)), None)
            with nullcontext() if average is None else average.as_average(module):  # as in a validation
                for index, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
                    for number, batch in enumerate(loader):
                        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
                        outputs = module.validation_step(batch, number, index)
                        monitor.on_validation_batch_end(trainer, module, outputs, batch, number, index)
            monitor.finish()
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
        restore(states)
    metrics = monitor.metrics()
    return {name: choice_value(name, metrics) for name in metrics}
