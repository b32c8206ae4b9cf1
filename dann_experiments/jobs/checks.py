"""Checks data, monitor and devices against the settings before anything is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

import torch
from torch import nn

from dann_experiments.config import Config, InputError
from dann_experiments.config.nearest import meant
from dann_experiments.data.checks import absent_classes, label_map_remarks, range_of_some
from dann_experiments.data.domain_data import DomainData
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.overlaps import shared_images
from dann_experiments.models.networks import output_stride
from dann_experiments.names import (
    DOMAINS,
    SOURCE_TRAIN,
    SOURCE_VAL,
    TARGET_TRAIN,
    TARGET_TRAINING,
    TARGET_VAL,
    TARGET_WEAK,
    OneDomain,
    SetName,
)
from dann_experiments.scores.selection import SCORES
from dann_experiments.training.monitor import metrics_to_choose_by
from dann_experiments.training.parts import check_parts
from dann_experiments.workers.processes import visible_gpus

log = logging.getLogger(__name__)


def checked_sets(config: Config, data: DomainData, network: nn.Module) -> ImageSets:
    """Read the files that fit into memory, and return the sets. Raises InputError for the first bad file, for a monitor that
    cannot choose, and for missing devices; warns of unusual data."""
    sets = data.read(stride=output_stride(network))
    if config.data.normalization == "fixed":
        for name, dataset in sets.sets.items():
            if name.split == "train":
                _warn(range_of_some(dataset, name.one.key))
    if len(config.data.domains) > len(DOMAINS):
        log.info("%d domains: %s.", len(config.data.domains), ", ".join(map(str, config.data.domains)))
    map_remarks = remarks_on_label_maps(config)
    for text in map_remarks:
        log.warning("%s", text)
    source = sets.labelled(SOURCE_TRAIN)
    if source is not None and source.class_pixels is not None:
        _warn(
            absent_classes(
                source.class_pixels, config.class_names, config.data.ignore_index, map_remarks, source.samples
            )
        )
    shared = shared_images({str(name): dataset.samples for name, dataset in sets.sets.items()}, data.digest_of)
    shared = [one for one in shared if not may_share(one[0], one[2])]
    if shared:
        name, image, other, _ = shared[0]
        log.warning(
            "%d images are in two sets that should not share any; the first is %s, in %s and %s. Scores on them say "
            "little about new images; `check-data` lists all.", len(shared), image, name, other,
        )  # fmt: skip
    if TARGET_VAL in data.labelled and SOURCE_VAL not in data.labelled:
        raise InputError(
            f"{TARGET_VAL.key} has masks, but {SOURCE_VAL.key} is empty; add source images for validation, too."
        )
    _check_monitor(config, data.labelled)
    by_target = config.domain_adaptation.batchnorm == "target_stats" and sets.get(TARGET_TRAIN) is not None
    if config.trainer.ema_decay is not None and by_target:
        raise InputError(
            "trainer.ema_decay averages BatchNorm's statistics, which domain_adaptation.batchnorm target_stats replaces; set "
            "one of them to its default."
        )
    for prefix, optimizer in (("", config.optimizer), ("pretraining.", config.pretraining.optimizer)):
        check_parts(network, list(optimizer.lr_factors), f"{prefix}optimizer.lr_factors")
        check_parts(network, optimizer.freeze, f"{prefix}optimizer.freeze")
    accelerator = config.trainer.accelerator
    missing = {"gpu": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(accelerator):
        raise InputError(f"trainer.accelerator is {accelerator!r}, but there is none on this machine; use cpu or auto.")
    if config.trainer.devices > 1:
        _check_devices(config, sets)
    return sets


def may_share(one: str, other: str) -> bool:
    """Return whether two sets, by their names, may hold the same image: labeled target images may be among all of them."""
    wholes = {SetName.parse(name).whole for name in (one, other)}
    return len(wholes) == 2 and wholes <= set(TARGET_TRAINING)


def remarks_on_label_maps(config: Config) -> list[str]:
    """Return sentences about label maps that name classes which the network does not have, or lack some of its classes."""
    mapped: dict[OneDomain, list[str]] = {}
    own: list[OneDomain] = []
    for one, written in config.data.written.items():
        names = config.data.domains[one].class_names
        if names is not None:
            mapped[one] = names
        if written.preset is None or written.value_map is not None or written.color_map is not None:
            own.append(one)
    return label_map_remarks(config.class_names, mapped, own)


def refuse_several_processes(config: Config, what: str) -> None:
    """Raise InputError if there are several ranks, because only one of them would know of `what` (callbacks, a sweep)."""
    if config.trainer.devices > 1:
        raise InputError(
            f"trainer.devices is {config.trainer.devices}, but {what} run in one process; set trainer.devices to 1."
        )


def refuse_auto_batch_size(config: Config, what: str) -> None:
    """Raise InputError for `trainer.auto_batch_size`, because each run of `what` could get different batch sizes."""
    if config.trainer.auto_batch_size:
        raise InputError(
            f"trainer.auto_batch_size is true, but {what} must train with the same batch sizes; set data.source.batch_size and "
            "data.target.batch_size instead."
        )


def refuse_test_batchnorm(config: Config, what: str) -> None:
    """Raise InputError for BatchNorm statistics of the scored images, because `what` must score the model that is saved."""
    if config.test_batchnorm != "running":
        raise InputError(
            f"test_batchnorm is {config.test_batchnorm!r}, but {what} score the model with its own statistics; leave it out, "
            "and give it to evaluate or predict, or compare an arm of kind test_statistics."
        )


def refuse_tta(config: Config, what: str) -> None:
    """Raise InputError for test-time augmentation, because `what` must score single predictions, as training does."""
    if config.tta != "none":
        raise InputError(
            f"tta is {config.tta!r}, but {what} score single predictions; leave it out, and give it to evaluate or predict."
        )


def check_labels(
    labelled: Collection[SetName], key: str, metric: str, way_out: str = "or choose another metric"
) -> None:
    """Raise InputError if `key` = `metric` needs labels that do not exist. `labelled`: the sets with masks; `way_out`: the
    alternative, for the message."""
    for domain in DOMAINS:
        name = SetName(domain, "val")
        of_one = next((part for part in metric.split("/") if part.startswith(f"{name}.")), None)
        name = name if of_one is None else SetName.parse(of_one)
        if domain in metric and name not in labelled:
            raise InputError(f"{key} is {metric!r}, which needs labeled images in {name.key}; add them, {way_out}.")


def _check_monitor(config: Config, labelled: Collection[SetName]) -> None:
    metric = config.monitor.metric
    if metric is None:
        return
    known = metrics_to_choose_by(config.class_names, config.data.domains)
    if metric not in known:
        raise InputError(f"monitor.metric is {metric!r}; it is one of {known}{meant(metric, known) or '.'}")
    if metric in SCORES and SOURCE_VAL not in labelled:
        raise InputError(
            f"monitor.metric is {metric!r}, which is measured when the source is validated; add labeled images in "
            f"{SOURCE_VAL.key}, or set it to null to keep only the last checkpoint."
        )
    way_out = "choose another metric, or null to keep only the last checkpoint"
    check_labels(labelled, "monitor.metric", metric, way_out)


def _check_devices(config: Config, sets: ImageSets) -> None:
    """Raise InputError if a rank would have no device, or no image of a set."""
    devices, gpus = config.trainer.devices, len(visible_gpus(config.trainer.accelerator))
    on_mps = config.trainer.accelerator in ("auto", "mps") and torch.backends.mps.is_available()
    if on_mps or 0 < gpus < devices:
        there = "on mps there is one" if on_mps else f"this machine has {gpus}"
        raise InputError(f"trainer.devices is {devices}, but {there}; use fewer, or trainer.accelerator cpu.")
    for name, dataset in sets.sets.items():
        if name.split != "test" and len(dataset) < devices:
            raise InputError(
                f"trainer.devices is {devices}, but {name.key} has {len(dataset)} images, fewer than one for "
                "each process; use fewer devices."
            )


def warn_of_idle_adversary(config: Config) -> None:
    """Warn if lambda is 0 in half of the epochs or all of them (see `idle_adversary`)."""
    _warn(idle_adversary(config))


def idle_adversary(config: Config) -> str | None:
    """Return a warning if lambda, which is 0 in the first epoch of a schedule by epochs, is 0 in half of the epochs or all."""
    method, epochs = config.domain_adaptation.method, config.trainer.max_epochs
    by_epochs = method.step_mode == "epoch" and method.lambda_schedule.kind != "constant"
    if method.name != "dann" or method.class_path is not None or not by_epochs or epochs > 2:
        return None
    share = (
        "in the only epoch, so this run is its own lambda = 0 control" if epochs == 1 else "in the first of 2 epochs"
    )
    return f"lambda is 0 {share} (domain_adaptation.method.step_mode is epoch); set step_mode to batch, or train for more epochs."


def warn_of_a_single_step(config: Config, sets: ImageSets) -> None:
    """Warn if training is a single step: a schedule of lambda starts at 0, and so ends there."""
    method = config.domain_adaptation.method
    if method.name != "dann" or method.class_path is not None or method.lambda_schedule.kind == "constant":
        return
    shares = {role: max(len(dataset) // config.trainer.devices, 1) for role, dataset in sets.training().items()}
    batches = max(share // min(share, getattr(config.data, role).batch_size) for role, share in shares.items())
    batches = min(batches, config.trainer.limit_train_batches or batches)
    steps = math.ceil(batches / config.trainer.accumulate_grad_batches) * config.trainer.max_epochs
    if steps == 1 and method.step_mode == "batch":
        log.warning(
            "Training is a single step, in which lambda is 0, so this run is its own lambda = 0 control; train for more epochs, "
            "or lower data.source.batch_size and data.target.batch_size."
        )


def warn_of_unused_weak_labels(config: Config) -> None:
    """Warn if masks are listed as weak labels, but no companion uses them."""
    if config.data.entries(TARGET_WEAK) and not config.domain_adaptation.uses_weak_labels:
        log.warning(
            "%s is not used, because domain_adaptation.companions has no weak_labels; add it to train on these masks.",
            TARGET_WEAK.key,
        )


def _warn(text: str | None) -> None:
    if text is not None:
        log.warning("%s", text)
