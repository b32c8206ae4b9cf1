"""Builds objects from settings: data and loaders, network, taps, and method. `build_training` builds the rest of a training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from dann_experiments.adaptation.build import (
    COMPANIONS,
    build_companion,
    build_method,
    build_schedule,
    load_own_method,
)
from dann_experiments.adaptation.method import OUTPUT_LAYER, DomainAdaptationMethod
from dann_experiments.checkpoints.encoder_file import checked_file, encoder_weights, load_encoder
from dann_experiments.config import Config, InputError
from dann_experiments.data.checks import labelled_pixels
from dann_experiments.data.domain_data import Cut, DataPlan, DomainData, DomainImages
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.joined import Items
from dann_experiments.data.labels import LabelMap, label_map, vector_rules
from dann_experiments.data.loaders import ClassSampling, Loaders, class_sampling
from dann_experiments.data.reading import Reading, reading_facts
from dann_experiments.models.batchnorm import has_batchnorm
from dann_experiments.models.networks import build_network
from dann_experiments.models.passes import check_joint
from dann_experiments.models.taps import Tap, resolve_taps
from dann_experiments.names import (
    ALL_SETS,
    DOMAINS,
    SPLITS,
    Domain,
    OneDomain,
    SetName,
    Split,
)
from dann_experiments.training import random_states
from dann_experiments.training.ranks import Rank
from dann_experiments.workers.processes import available_cores, visible_gpus

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
        tuple(data.std), data.normalization == "domain", data.memory_gb, data.disk_cache_gb, data.root,
        embedded.name, embedded.seed, embedded.folder, config.trainer.enable_progress_bar,
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
    names, ignored, prefix = config.class_names, config.data.ignore_index, f"{one.key}."
    of_masks = label_map(names, ignored, settings.value_map, settings.colors, settings.ignore_values, prefix)
    of_polygons = vector_rules(
        names, ignored, settings.label_attribute, settings.label_map, settings.label_background, settings.label_all_touched,
        prefix,
    )  # fmt: skip
    return dataclasses.replace(of_masks, vector=of_polygons)


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


def _class_sampling(config: Config, dataset: Items) -> ClassSampling:
    pixels, holds = dataset.count_classes()
    source, classes = config.data.source, config.model.classes
    temperature = None if source.sampling == "balanced" else source.sampling_temperature
    return class_sampling(labelled_pixels(pixels, classes, config.data.ignore_index), holds[:, :classes], temperature)
