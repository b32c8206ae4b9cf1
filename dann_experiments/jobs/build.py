"""Builds objects from settings: data and loaders, network, taps, method, optimizer, and the training loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dann_experiments.adaptation.build import (
    COMPANIONS,
    build_companion,
    build_method,
    build_schedule,
    load_own_method,
)
from dann_experiments.adaptation.method import OUTPUT_LAYER, DomainAdaptationMethod
from dann_experiments.checkpoints.encoder_file import checked_file, encoder_weights, load_encoder
from dann_experiments.checkpoints.files import WholeFiles
from dann_experiments.config import Config, InputError
from dann_experiments.config.run import OptimizerConfig
from dann_experiments.data.checks import labelled_pixels
from dann_experiments.data.domain_data import Cut, DataPlan, DomainData, DomainImages
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.joined import Items
from dann_experiments.data.labels import LabelMap, label_map
from dann_experiments.data.loaders import ClassSampling, Loaders, class_sampling
from dann_experiments.data.reading import Reading, reading_facts
from dann_experiments.jobs.resume import CHECKPOINTS
from dann_experiments.models.batchnorm import has_batchnorm, statistics_loader
from dann_experiments.models.compiling import compile_parts
from dann_experiments.models.networks import build_network, keeps_channels_last
from dann_experiments.models.passes import check_joint, choose
from dann_experiments.models.taps import Tap, resolve_taps
from dann_experiments.names import (
    ALL_SETS,
    DOMAINS,
    SOURCE_AND_TARGET,
    SPLITS,
    TARGET_LABELLED,
    TARGET_TRAIN,
    Domain,
    OneDomain,
    SetName,
    Split,
)
from dann_experiments.training import random_states
from dann_experiments.training.averaging import AverageWeights, TrainedWeights
from dann_experiments.training.bad_numbers import BadNumbers
from dann_experiments.training.checkpointing import Checkpoints
from dann_experiments.training.curves import Curves
from dann_experiments.training.guards import KeepsLastGood, TargetGuard
from dann_experiments.training.loop import EpochLines, Loop
from dann_experiments.training.losses import SegmentationLoss, class_weights_from
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback, RatesAndTimes, TargetStatistics
from dann_experiments.training.optimizers import LearningRates, build_optimizer
from dann_experiments.training.parts import FrozenParts
from dann_experiments.training.random_states import RandomStates
from dann_experiments.training.ranks import Rank
from dann_experiments.training.validated import Plateau, StopsEarly
from dann_experiments.workers.processes import available_cores, visible_gpus

log = logging.getLogger(__name__)
LARGEST_BLANK = 1024  # pixels; divisible by every network's stride
MOST_WORKERS = 4  # per loader, if the number of workers depends on the machine


def seeded(config: Config) -> contextlib.AbstractContextManager[None]:
    """Seed all random generators and set the number of torch threads for the block."""
    threads = config.threads
    if threads is None and config.trainer.devices > 1:
        threads = max(available_cores() // config.trainer.devices, 1)
    return random_states.seeded(config.seed, threads)


def data_plan(config: Config, unused: bool = False) -> DataPlan:
    """Return everything that determines the sets of images; with `unused`, also weak labels that no companion uses."""
    data, embedded = config.data, config.data.embedded
    cut = Cut(
        data.window_size, data.windows == "random", data.window_count, data.crop_size, data.pad_to_crop, config.seed
    )
    return DataPlan(
        {one: _images(config, one, unused) for one in config.data.domains}, config.model.in_channels, cut, tuple(data.mean),
        tuple(data.std), data.normalization == "domain", data.memory_gb, data.root, embedded.name, embedded.seed,
        embedded.folder, config.trainer.enable_progress_bar,
    )  # fmt: skip


def find_data(config: Config, names: Iterable[SetName] = ALL_SETS) -> DomainData:
    """Find the named sets and check the header of every file. Raises one InputError that lists all problems."""
    return DomainData(data_plan(config), names)


def _images(config: Config, one: OneDomain, unused: bool) -> DomainImages:
    settings, preset = config.data.domains[one], config.data.written[one].preset
    reading = Reading(
        None if settings.bands is None else tuple(settings.bands),
        (settings.scale[0], settings.scale[1]) if isinstance(settings.scale, list) else settings.scale,
        settings.nodata_values, settings.pixel_size, settings.file_pixel_size, settings.nodata_bands,
        settings=f"{one.key}.",
    )  # fmt: skip
    splits: tuple[Split, ...] = (*SPLITS, "train_labelled")
    if unused or config.domain_adaptation.uses_weak_labels:
        splits = (*splits, "weak_labels")
    entries: dict[Split, list[Any]] = {split: getattr(settings, split) for split in splits}
    return DomainImages(
        entries, reading, _labels(config, one), settings.augmentation, settings.root, preset, settings.labelled_count
    )  # fmt: skip


def _labels(config: Config, one: OneDomain) -> LabelMap:
    settings = config.data.domains[one]
    return label_map(
        config.class_names, config.data.ignore_index, settings.value_map, settings.colors, settings.ignore_values,
        f"{one.key}.",
    )  # fmt: skip


def make_loaders(config: Config, sets: ImageSets, rank: Rank | None = None) -> Loaders:
    """Return the loaders of a job's sets, or of the share of `rank`."""
    on_gpu = bool(visible_gpus(config.trainer.accelerator))
    workers = config.data.num_workers
    if workers is None:
        cores = available_cores() // config.trainer.devices
        workers = min(MOST_WORKERS, cores // (2 * len(DOMAINS))) if on_gpu else 0
    batch_sizes: dict[Domain, int] = {role: getattr(config.data, role).batch_size for role in DOMAINS}
    return Loaders(
        sets, batch_sizes, config.data.eval_batch_size, config.seed, workers, on_gpu, (rank or Rank()).share,
        config.data.target.labelled_batch_size,
        None if config.data.source.sampling == "shuffled" else functools.partial(_class_sampling, config),
    )  # fmt: skip


def make_network(config: Config, with_weights: bool = True, initialize: bool = True) -> nn.Module:
    """Build the network of the `model` settings. With `with_weights` False the encoder's pretrained weights are not loaded. With
    `initialize` False all weights stay uninitialized; load a complete checkpoint before use."""
    model, file = config.model, config.model.encoder_file
    if with_weights and file is not None:
        checked_file(file)  # before the time that a large network takes
    weights = model.encoder_weights if with_weights and file is None else None
    network = build_network(
        model.arch, model.encoder_name, weights, model.in_channels, model.classes, model.network_arguments(), initialize
    )
    if with_weights and file is not None:
        load_encoder(network, file, model.in_channels)
    return network


def network_to_adapt(config: Config, initialize: bool = True) -> nn.Module:
    """Return `make_network` without the encoder's pretrained weights, which come with the source model. If that is not named, and
    so may have to be trained, check that the file of `model.encoder_weights` fits. Raises InputError if it does not."""
    network, file = make_network(config, with_weights=False, initialize=initialize), config.model.encoder_file
    if file is not None and config.domain_adaptation.pretrained_checkpoint.path is None:
        encoder_weights(network, file, config.model.in_channels)
    return network


def make_taps(config: Config, network: nn.Module) -> list[Tap]:
    """Return the taps on the network's layers that `domain_adaptation` names. Raises InputError for layers that do not fit."""
    batchnorm = config.domain_adaptation.batchnorm
    if batchnorm in ("source_only", "target_stats") and not has_batchnorm(network):
        raise InputError(
            f"domain_adaptation.batchnorm is {batchnorm!r}, but this network has no BatchNorm; use separate."
        )
    of_method, size = config.domain_adaptation.method, blank_size(config)
    layers = [] if of_method.name == "source_only" and of_method.class_path is None else config.domain_adaptation.layers
    if any("target_logits" in COMPANIONS[term.name].needs for term in config.domain_adaptation.companions):
        layers = list(dict.fromkeys([*layers, OUTPUT_LAYER]))
    if not layers:
        return []
    taps = resolve_taps(network, layers, config.model.in_channels, size)
    if batchnorm == "joint":
        check_joint([tap for tap in taps if tap.name in config.domain_adaptation.method.layers])
    return taps


def blank_size(config: Config) -> int:
    """Return the side length, in pixels, of the blank image that finds the layers: that of the crops, limited to save memory."""
    return min(config.data.crop_size or 64, LARGEST_BLANK)


def make_method(config: Config, taps: Sequence[Tap]) -> DomainAdaptationMethod:
    """Build the adaptation method of the settings. Raises InputError for a method that does not fit the taps."""
    method = config.domain_adaptation.method
    channels = {tap.name: tap.channels for tap in taps}
    if method.class_path is not None:
        own = load_own_method(method.class_path, method.init_args, channels)
        missing = [layer for layer in own.feature_layers if layer not in channels]
        if missing:
            raise InputError(
                f"domain_adaptation.feature_layers captures {list(channels)}, but {method.class_path} needs {missing}; "
                "add them to domain_adaptation.feature_layers."
            )
        return own
    if method.name == "lambda_zero":
        log.info("lambda_zero: lambda is 0 throughout; lambda_da and lambda_schedule have no effect.")
    return build_method(
        method.name,
        method.layers,
        channels,
        method.in_channels,
        build_schedule(method.lambda_schedule.kind, method.lambda_schedule.gamma),
        classifier=method.classifier,
        hidden_size=method.hidden_size,
        discriminator_lr=method.discriminator_lr,
        lambda_da=method.lambda_da,
        step_mode=method.step_mode,
        domains=len(config.data.domains),
        companions=[
            build_companion(term, config.seed, config.data.ignore_index) for term in config.domain_adaptation.companions
        ],
    )


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


def model_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of `smp.create_model`, without the architecture's name."""
    model = config.model
    common = {"encoder_name": model.encoder_name, "in_channels": model.in_channels, "classes": model.classes}
    return {**common, **model.network_arguments()}


def model_facts(config: Config, sets: ImageSets) -> dict[str, Any]:
    """Return what a user of the saved model needs in addition to its weights."""
    read = {str(one): sets.any_of(one) for one in config.data.domains}
    return {
        "class_names": config.class_names,
        "ignore_index": config.data.ignore_index,
        "reading": {
            domain: reading_facts(dataset.reading, dataset.normalization_of(0))
            for domain, dataset in read.items() if dataset is not None
        },
    }  # fmt: skip


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
        keeps_channels_last(config.trainer.channels_last, network, device),
        SegmentationLoss(config.loss, config.data.ignore_index, class_weights),
        {part: factor * optimizer.lr for part, factor in optimizer.lr_factors.items()},
        validated, list(config.data.domains), scaling,
    )  # fmt: skip


def _class_sampling(config: Config, dataset: Items) -> ClassSampling:
    pixels, holds = dataset.count_classes()
    source, classes = config.data.source, config.model.classes
    temperature = None if source.sampling == "balanced" else source.sampling_temperature
    return class_sampling(labelled_pixels(pixels, classes, config.data.ignore_index), holds[:, :classes], temperature)


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
