"""Builds the training of one network from settings: the step, the callbacks, and the loop around them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.checkpoints.files import WholeFiles
from dann_experiments.config import Config
from dann_experiments.config.run import OptimizerConfig
from dann_experiments.data.checks import labelled_pixels
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.loaders import Loaders
from dann_experiments.jobs.resume import CHECKPOINTS
from dann_experiments.models.batchnorm import statistics_loader
from dann_experiments.models.compiling import compile_parts
from dann_experiments.models.networks import keeps_channels_last
from dann_experiments.models.passes import choose
from dann_experiments.models.taps import Tap
from dann_experiments.names import (
    SOURCE_AND_TARGET,
    TARGET_LABELLED,
    TARGET_TRAIN,
    OneDomain,
)
from dann_experiments.training.averaging import AverageWeights, TrainedWeights
from dann_experiments.training.bad_numbers import BadNumbers
from dann_experiments.training.checkpointing import Checkpoints
from dann_experiments.training.curves import Curves
from dann_experiments.training.epoch_lines import EpochLines
from dann_experiments.training.guards import KeepsLastGood, TargetGuard
from dann_experiments.training.loop import Loop
from dann_experiments.training.losses import SegmentationLoss, class_weights_from
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback, RatesAndTimes, TargetStatistics
from dann_experiments.training.optimizers import LearningRates, build_optimizer
from dann_experiments.training.parts import FrozenParts
from dann_experiments.training.random_states import RandomStates
from dann_experiments.training.ranks import Rank
from dann_experiments.training.validated import Plateau, StopsEarly


def optimizer_maker(
    optimizer: OptimizerConfig, precision: str
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Return a function that makes an optimizer from parameter groups. With precision 16-mixed it is not fused, because
    Lightning does not clip the gradients of a fused optimizer with a gradient scaler."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return build_optimizer(
            groups, optimizer.name, optimizer.lr, optimizer.betas, optimizer.momentum, optimizer.weight_decay,
            fused=precision != "16-mixed",
        )  # fmt: skip

    return make


def make_module(
    config: Config, network: nn.Module, method: DomainAdaptationMethod, taps: Sequence[Tap], device: torch.device,
    pretraining: bool = False, class_weights: Sequence[float] | None = None,
    validated: Sequence[OneDomain] = SOURCE_AND_TARGET, scaling: tuple[Tensor, Tensor] | None = None,
) -> AdaptationModule:  # fmt: skip
    """Build the training step. `pretraining`: use the optimizer settings of the source model's training. `class_weights`: the
    result of `class_weights_of`. `validated`: the domain of each validation loader. `scaling`: `ImageSets.scaling`."""
    optimizer = config.pretraining.optimizer if pretraining else config.optimizer
    return AdaptationModule(
        network, method, taps, optimizer_maker(optimizer, config.trainer.precision),
        LearningRates(optimizer.schedule, optimizer.warmup_steps, optimizer.power),
        config.data.ignore_index, config.domain_adaptation.batchnorm,
        keeps_channels_last(config.trainer.channels_last, network, device, config.trainer.precision),
        SegmentationLoss(config.loss, config.data.ignore_index, class_weights),
        {part: factor * optimizer.lr for part, factor in optimizer.lr_factors.items()},
        validated, list(config.data.domains), scaling,
    )  # fmt: skip


def class_weights_of(config: Config, sets: ImageSets) -> list[float] | None:
    """Return the weight of each class in the segmentation loss; None = all 1. `class_weights: auto` counts the pixels of the
    source's training masks, and reads those again that do not fit into memory."""
    if config.class_weights != "auto":
        return config.class_weights
    pixels, _ = sets.training()["source"].count_classes()
    return class_weights_from(labelled_pixels(pixels, config.model.classes, config.data.ignore_index))


def make_loop(
    config: Config,
    network: nn.Module,
    method: DomainAdaptationMethod,
    taps: Sequence[Tap],
    loaders: Loaders,
    folder: Path,
    *,
    pretraining: bool,
    resumed: bool,
    rank: Rank,
    curves: Curves,
    logger: Logger | None = None,
    persist: Callable[[], object] = lambda: None,
    beside: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    callbacks: Sequence[pl.Callback] = (),
) -> Loop:
    """Build one network's training on one rank.

    `pretraining`: use the settings of the source model's training. `resumed`: the loop will start from a checkpoint. `logger`:
    None on all ranks except the first, which tracks and shows progress. `persist` is called before each checkpoint; `beside`
    makes the context in which the final weights are validated."""
    training, validation, every = loaders.training(), loaders.validation(), config.trainer
    stops = config.monitor.on_guard == "stop" and not pretraining
    guard = None if pretraining else TargetGuard(config.class_names, config.monitor.expected_shares, stops)
    may_end = config.monitor.patience is not None or stops  # then any validation may be the last
    monitor = DomainAdaptationMonitorCallback(
        config.model.classes, config.class_names, 1 if may_end else config.monitor.log_every_n_epochs,
        config.monitor.forgetting_threshold, config.data.ignore_index, can_forget=not pretraining,
        validated=list(validation), domains=len(config.data.domains), guard=guard,
    )  # fmt: skip
    last_good = KeepsLastGood(guard) if guard is not None and stops else None
    average = None if every.ema_decay is None else AverageWeights(every.ema_decay)
    checkpoints = Checkpoints(
        folder / CHECKPOINTS, training, every.checkpoint_every_n_steps, every.checkpoint_every_minutes,
        every.checkpoints_kept, config.monitor.metric, config.monitor.direction,
        persist,  # so that a killed run has no checkpoint that is ahead of the history
        contextlib.nullcontext if average is None else average.as_average,
        may_be_best=lambda: last_good is None or not last_good.guard.findings,
    )  # fmt: skip
    statistics: list[pl.Callback] = []
    target = loaders.sets.get(TARGET_TRAIN)
    if config.domain_adaptation.batchnorm == "target_stats" and target is not None:
        statistics = [TargetStatistics(statistics_loader(target, loaders.batch_sizes["target"]))]
    names = {str(role): dataset.name_of for role, dataset in loaders.sets.training().items()}
    labelled = loaders.sets.get(TARGET_LABELLED)
    if labelled is not None:
        names["labelled"] = labelled.name_of
    watch = BadNumbers(every.skip_bad_steps, checkpoints.save, names)
    extra = _optimization(config, config.pretraining.optimizer if pretraining else config.optimizer)
    if average is not None:
        extra.append(average)
    limit = None if every.limit_train_batches is None else every.limit_train_batches * every.accumulate_grad_batches
    on_terminal = logger is not None and every.enable_progress_bar and sys.stdout.isatty()
    bars: list[pl.Callback] = []
    if logger is not None and every.enable_progress_bar:
        bars = [RichProgressBar()] if on_terminal else [EpochLines()]
    trainer = pl.Trainer(
        max_epochs=config.pretraining.max_epochs if pretraining else every.max_epochs,
        accelerator=every.accelerator,
        devices=rank.world,
        strategy=rank.strategy(),
        precision=every.precision,  # pyright: ignore[reportArgumentType]
        gradient_clip_val=every.gradient_clip_val,
        deterministic="warn" if every.deterministic else False,
        limit_train_batches=limit,
        accumulate_grad_batches=every.accumulate_grad_batches,
        num_sanity_val_steps=0 if resumed else -1,  # the complete validation sets, for the baseline scores
        logger=False if logger is None else logger,
        callbacks=[
            RandomStates(), monitor, RatesAndTimes(), curves, *statistics, *extra, watch, *callbacks, *bars,
            *([] if last_good is None else [last_good]),
            *([] if average is None else [TrainedWeights(average)]), checkpoints,
        ],
        plugins=[WholeFiles()],
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=str(folder),
        use_distributed_sampler=False,  # our loaders select their rank's share themselves
    )  # fmt: skip
    weights = class_weights_of(config, loaders.sets)
    module = make_module(
        config,
        network,
        method,
        taps,
        trainer.strategy.root_device,
        pretraining,
        weights,
        list(validation),
        loaders.sets.scaling,
    )
    if method.uses_target and module.taps:
        module.passes = choose(network, module.taps, config.domain_adaptation.batchnorm, config.model.in_channels)
    if every.compile:
        compile_parts(network, {tap.module for tap in module.taps})
    best = config.monitor.final_model == "best"
    return Loop(
        trainer, module, training, list(validation.values()), monitor, checkpoints, rank, best, every.compile, beside, average
    )  # fmt: skip


def _optimization(config: Config, optimizer: OptimizerConfig) -> list[pl.Callback]:
    """Return the callbacks that frozen parts, the schedule plateau, and early stopping need."""
    metric, mode = config.monitor.metric, config.monitor.direction
    found: list[pl.Callback] = []
    if optimizer.freeze:
        found.append(FrozenParts(optimizer.freeze, optimizer.freeze_epochs))
    if optimizer.schedule == "plateau" and metric is not None:
        found.append(Plateau(metric, mode, optimizer.factor, optimizer.patience))
    if config.monitor.patience is not None and metric is not None:
        found.append(StopsEarly(metric, mode, config.monitor.patience))
    return found
