"""From settings to objects: the one place that unpacks a Config for the layers below."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from dann_experiments.adaptation.build import build_method, build_schedule, load_own_method
from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.config import Config, InputError
from dann_experiments.config.schema import OptimizerConfig
from dann_experiments.data.dataset import SegmentationDataset, check_files
from dann_experiments.data.digits import build_digits
from dann_experiments.data.samples import content_digest, find_samples
from dann_experiments.models.networks import build_network, output_stride
from dann_experiments.models.taps import Tap, check_joint, resolve_taps
from dann_experiments.tracking.store import without_secrets
from dann_experiments.training.optimizers import build_optimizer
from dann_experiments.training.scores import metric_name

log = logging.getLogger(__name__)
SETS = ("source_train", "source_val", "source_test", "target_train", "target_val", "target_test")


@dataclass(eq=False)
class Data:
    """The data sets of a job by name (`source_train`, ...); one that is not given is absent."""

    sets: Mapping[str, SegmentationDataset]

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Of each set, over the bytes of its files."""
        return {name: content_digest(dataset.samples) for name, dataset in self.sets.items()}

    def get(self, name: str) -> SegmentationDataset | None:
        """The set, None if it is not given."""
        return self.sets.get(name)

    def labelled(self, name: str) -> SegmentationDataset | None:
        """The set if it is given and has masks."""
        found = self.sets.get(name)
        return found if found is not None and found.has_masks else None


@contextlib.contextmanager
def seeded(config: Config) -> Iterator[None]:
    """Seed everything random and set the threads; thread number and determinism are given back as found."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    reseed(config)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def reseed(config: Config) -> None:
    """Put all random states to `seed`; what follows does not depend on what ran before."""
    pl.seed_everything(config.seed, workers=True, verbose=False)


def data_root(config: Config) -> Path:
    """The folder that the data lists are relative to; builds the embedded data if it is asked for and not there yet."""
    embedded = config.data.embedded
    if config.data.root is not None:
        return Path(config.data.root).expanduser()
    if embedded.name is None:
        return Path.cwd()
    return build_digits(embedded_folder(embedded.folder), embedded.seed, embedded.name)


def embedded_folder(folder: str | None) -> Path:
    """Where embedded data are built: `folder`, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dann_experiments"
    return Path(folder).expanduser() if folder is not None else cache


def load_data(config: Config, names: tuple[str, ...] = SETS) -> Data:
    """Find, check and (with `data.keep_in_memory`) decode the named sets. Target training masks are never looked for."""
    root = data_root(config)
    sets: dict[str, SegmentationDataset] = {}
    for name in names:
        domain, split = name.split("_")
        entries = getattr(getattr(config.data, domain), split)
        key = f"data.{domain}.{split}"
        if not entries:
            if split == "train":
                raise InputError(f"{key} is empty; name a CSV manifest or a folder with images/ to train on.")
            continue
        masks = "no" if name == "target_train" else "if present" if name == "target_val" else "required"
        sets[name] = SegmentationDataset(
            find_samples(entries, root, key, masks),
            num_classes=config.model.classes,
            mean=config.data.mean,
            std=config.data.std,
            ignore_index=config.data.ignore_index,
            crop_size=config.data.crop_size if split == "train" else None,
            keep_in_memory=config.data.keep_in_memory,
        )
    return Data(sets)


def check_data(config: Config, data: Data, network: nn.Module) -> None:
    """Read the files before anything trains; raises InputError for the first that is wrong, and for a useless monitor."""
    for name, dataset in data.sets.items():
        check_files(
            dataset, f"data.{name.replace('_', '.')}", output_stride(network), for_training=name.endswith("train")
        )
    _check_classes(config, data)
    if data.labelled("target_val") is not None and data.labelled("source_val") is None:
        raise InputError(
            "data.target.val has masks, but data.source.val is empty; give source images to validate on too."
        )
    if config.monitor.metric is not None:
        _check_monitor(config, data)
    accelerator = config.trainer.accelerator
    missing = {"gpu": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(accelerator):
        raise InputError(
            f"trainer.accelerator is {accelerator!r}, but there is none on this machine; give cpu or auto."
        )


def _check_classes(config: Config, data: Data) -> None:
    """Masks of 0 and 255 would train on nothing: 255 is ignored by default."""
    dataset = data.labelled("source_train")
    if dataset is None or not config.data.keep_in_memory:
        return
    found: set[int] = set()
    for index in range(len(dataset)):
        mask = dataset.read(index)[1]
        assert mask is not None
        found |= set(np.unique(mask).tolist())
    classes = sorted(found - {config.data.ignore_index})
    names = config.class_names
    if len(classes) < 2:
        raise InputError(
            f"data.source.train: the masks hold the ids {sorted(found)}, of which {config.data.ignore_index} is ignored "
            f"(data.ignore_index); that leaves {len(classes)} class to learn. Write the classes as 0 to {len(names) - 1}."
        )
    absent = [name for index, name in enumerate(names) if index not in classes]
    if absent:
        log.warning("data.source.train: no mask holds the classes %s.", absent)


def _check_monitor(config: Config, data: Data) -> None:
    metric = config.monitor.metric
    assert metric is not None
    known = validation_metrics(config)
    if metric not in known:
        raise InputError(f"monitor.metric is {metric!r}; it is one of {known}.")
    _refuse_unlabelled(
        data, "monitor.metric", metric, "choose another metric, or null to keep the last checkpoint alone"
    )


def validation_metrics(config: Config) -> list[str]:
    """The names of all that validation scores where both domains have labelled images for it."""
    known = ["iou/gap_source_minus_target", "iou/source_drop_from_baseline"]
    for domain in ("source", "target"):
        known += [f"iou/{domain}_val", f"loss/val_{domain}"]
        known += [f"class_iou/{domain}_val/{metric_name(name)}" for name in config.class_names]
    return known


def check_labels(config: Config, key: str, metric: str) -> None:
    """Refuse setting `key` = `metric` (one of `validation_metrics`) where the labels that it needs are not there."""
    names = tuple(f"{domain}_val" for domain in ("source", "target") if domain in metric)
    lazy = dataclasses.replace(config, data=dataclasses.replace(config.data, keep_in_memory=False))
    _refuse_unlabelled(load_data(lazy, names), key, metric, "or choose another metric")


def _refuse_unlabelled(data: Data, key: str, metric: str, way_out: str) -> None:
    for domain in ("source", "target"):
        if domain in metric and data.labelled(f"{domain}_val") is None:
            raise InputError(
                f"{key} is {metric!r}, which needs labelled images in data.{domain}.val; give them, {way_out}."
            )


def public_settings(config: Config) -> Config:
    """The settings as a run may show them: without a password in the tracking store's address."""
    if config.tracking.uri is None:
        return config
    tracking = dataclasses.replace(config.tracking, uri=without_secrets(config.tracking.uri))
    return dataclasses.replace(config, tracking=tracking)


def make_network(config: Config, with_weights: bool = True) -> nn.Module:
    """The network of `model`; `with_weights` False leaves the encoder's weights out, as a checkpoint will bring them."""
    model = config.model
    weights = model.encoder_weights if with_weights else None
    return build_network(
        model.arch, model.encoder_name, weights, model.in_channels, model.classes, model.network_arguments()
    )


def make_taps(config: Config, network: nn.Module) -> list[Tap]:
    """The layers of `domain_adaptation`, looked up in the network."""
    if config.domain_adaptation.method.name == "source_only" and config.domain_adaptation.method.class_path is None:
        return []
    size = config.data.crop_size or 64
    taps = resolve_taps(network, config.domain_adaptation.layers, config.model.in_channels, size)
    if config.domain_adaptation.batchnorm == "joint":
        check_joint([tap for tap in taps if tap.name in config.domain_adaptation.method.layers])
    return taps


def make_method(config: Config, taps: list[Tap]) -> DomainAdaptationMethod:
    """The adaptation method that the settings name."""
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
    )


def optimizer_maker(optimizer: OptimizerConfig):
    """A function from parameter groups to an optimizer."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return build_optimizer(
            groups, optimizer.name, optimizer.lr, optimizer.betas, optimizer.momentum, optimizer.weight_decay
        )

    return make


def model_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `smp.create_model`, without the architecture's name."""
    model = config.model
    common = {"encoder_name": model.encoder_name, "in_channels": model.in_channels, "classes": model.classes}
    return {**common, **model.network_arguments()}


def model_facts(config: Config) -> dict[str, Any]:
    """What a user of the saved model needs beside its weights."""
    data = config.data
    return {
        "class_names": config.class_names,
        "ignore_index": data.ignore_index,
        "mean": list(data.mean),
        "std": list(data.std),
        "image_scale": "0..1",
    }


def source_digest(config: Config, data: Data) -> str:
    """Equal for equal network settings, equal source training data and equal reading of it: 32 hex digits."""
    reading = {key: getattr(config.data, key) for key in ("ignore_index", "mean", "std", "crop_size")}
    facts = {
        "model": dataclasses.asdict(config.model),
        "classes": config.class_names,
        "reading": reading,
        "source": data.digests["source_train"],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def domain_name(config: Config, domain: str) -> str:
    """What runs call a domain."""
    settings = getattr(config.data, domain)
    return settings.name or (settings.train[0] if settings.train else domain)
