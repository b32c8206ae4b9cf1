"""Scores a model on every labeled validation and test set of the settings, in a separate run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dann_experiments.checkpoints.saved_model import ModelNotes, read_model_notes
from dann_experiments.config import Config, InputError, replace
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.joined import Items
from dann_experiments.data.loaders import eval_loader
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.jobs.build import find_data, make_loaders, make_network, seeded
from dann_experiments.jobs.identity import domain_tags, evaluation_name
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.run_training import describe_run, source_links
from dann_experiments.jobs.score_files import write_scores
from dann_experiments.jobs.source_model import chosen_by_target_labels, load_weights
from dann_experiments.models.batchnorm import (
    NO_BATCHNORM,
    Origin,
    has_batchnorm,
    statistics_loader,
    statistics_of,
    target_statistics,
)
from dann_experiments.names import SCORED_SETS, TARGET_TRAIN, Job, OneDomain, SetName, Tag
from dann_experiments.tracking.fetch_model import fetched
from dann_experiments.tracking.notes import description, iou_changes, links_of
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import Store, local_artifact_folder, open_store
from dann_experiments.training.memory import explain_out_of_memory, size_of_largest
from dann_experiments.training.scoring import Scores, metrics_of_sets, score_set

log = logging.getLogger(__name__)
STATISTICS_SET = TARGET_TRAIN


def evaluate(config: Config, tags: Mapping[str, str] | None = None) -> RunResult:
    """Score the model at `pretrained_checkpoint.path` on the labeled val and test lists: IoU, precision, recall and F1 per class,
    pixel accuracy and confusion matrices, as metrics, tables and figures of a new run.

    A saved model brings its own network, classes and normalization, regardless of `model`; a plain checkpoint uses those of the
    settings. With `domain_adaptation.batchnorm: target_stats` the model is scored with the BatchNorm statistics of the images in
    `data.target.train` (AdaBN; their masks are not read); other values have no effect here. `tta` other than none scores the mean
    of several predictions per image, `test_batchnorm: images` each set with the BatchNorm statistics of its own images; the run's
    name and tags say so. `tags` are added to the run's own,
    or replace them. Raises InputError before a run is opened: if there is no model or no labeled image, if weights or classes do
    not fit, for target statistics without images or without BatchNorm, and for unreadable files (masks that do not fit into
    `data.memory_gb` are read only during the run). Also raises InputError during the run, if memory runs out.
    """
    path = config.domain_adaptation.pretrained_checkpoint.path
    if path is None:
        raise InputError(
            "evaluate needs a model: set source_checkpoint (a file, a folder, runs:/ID or models:/NAME@ALIAS)."
        )
    if _with_target_statistics(config) and not config.data.entries(STATISTICS_SET):
        raise InputError(
            "domain_adaptation.batchnorm is 'target_stats', which uses the statistics of the images in data.target.train, but "
            "that is empty; add target images (no masks needed), or set batchnorm to separate to score the model as it is."
        )
    if _with_target_statistics(config) and config.test_batchnorm == "images":
        raise InputError(
            "test_batchnorm is 'images' and domain_adaptation.batchnorm is 'target_stats', but a network has one kind of "
            "statistics; set test_batchnorm to running, or domain_adaptation.batchnorm to separate."
        )
    device = _device(config)
    store = open_store(config.tracking.uri, config.tracking.experiment)
    with seeded(config):
        with fetched(path, store) as (local, model_run_id):
            notes = read_model_notes(local, path)
            if notes is not None:
                config = _with_the_models_own(config, notes)
            every_weight_comes = config.domain_adaptation.pretrained_checkpoint.strict_loading
            network = make_network(config, with_weights=False, initialize=not every_weight_comes)
            load_weights(config, network, local, path)
        if _with_target_statistics(config) and not has_batchnorm(network):
            raise InputError(
                "domain_adaptation.batchnorm is 'target_stats', but this network has no BatchNorm with running statistics; set "
                "it to separate."
            )
        if config.test_batchnorm == "images" and not has_batchnorm(network):
            raise InputError(NO_BATCHNORM)
        sets = _read(config, notes)
        network.to(device)
        if _with_target_statistics(config):
            # batches as in training, so that data.eval_batch_size changes no score
            size, images = config.data.target.batch_size, sets.get(STATISTICS_SET)
            assert images is not None
            with _memory_explained("data.target.batch_size", size, images):
                target_statistics(network, statistics_loader(images, size))
        all_tags = {**_tags(config, store, notes, model_run_id), **(tags or {})}
        folder = Path(config.tracking.folder)
        model_tags = {} if model_run_id is None else store.client.get_run(model_run_id).data.tags
        title = evaluation_name(config, model_tags)
        links = [*source_links(store, model_run_id), *links_of(all_tags, store.experiment_id)]
        with tracked_run(
            store, config.tracking.run_name, title, all_tags, folder, use_claimed=True,
            system_metrics=config.tracking.system_metrics,
        ) as run:  # fmt: skip
            describe_run(run, config, sets)
            scores: dict[SetName, Scores] = {}
            loaders = make_loaders(config, sets)
            size = loaders.eval_batch_size_of("source")  # for both domains
            for name in [name for whole in SCORED_SETS for name in sets.parts(whole)]:
                with _memory_explained("data.eval_batch_size", size, sets.sets[name]):
                    loader = eval_loader(
                        sets.sets[name], size, num_workers=loaders.num_workers, pin_memory=loaders.pin_memory
                    )
                    with _own_statistics(config, network, name, sets.sets[name]):
                        scores[name] = score_set(
                            network, loader, config.model.classes, config.data.ignore_index, config.tta
                        )
            names = config.class_names
            metrics = metrics_of_sets(scores, names, complete=True)
            run.log_metrics(metrics, step=0)
            run.set_tags({Tag.NOTE: description(title, iou_changes({}, metrics), links)})
            write_scores(run.folder, scores, names)
    folder = local_artifact_folder(store, run.run_id)
    return RunResult(
        job=Job.EVALUATE, run_id=run.run_id, experiment_id=store.experiment_id, tracking_uri=store.uri,
        metrics=metrics, source_run_id=model_run_id, artifacts=None if folder is None else str(folder),
    )  # fmt: skip


def _own_statistics(
    config: Config, network: nn.Module, name: SetName, images: Items
) -> contextlib.AbstractContextManager[Any]:
    """Let the network have the BatchNorm statistics of `test_batchnorm` in the block: those of the set's `images`, or its own."""
    if config.test_batchnorm == "running":
        return contextlib.nullcontext()
    # batches as in training, so that data.eval_batch_size changes no score
    size = getattr(config.data, name.domain).batch_size
    origin = Origin(name.key, "give it two images of each size, or set a data.window_size that all have")
    return statistics_of(network, statistics_loader(images, size), origin)


def _memory_explained(key: str, size: int, dataset: Items) -> contextlib.AbstractContextManager[None]:
    """Raise InputError if memory runs out in the block, with advice to reduce the batch size `size`, set by `key`."""

    def advice() -> str:
        largest = size_of_largest([dataset])
        return (
            f"A batch is {size} images or windows of {largest}. Use a smaller {key}, smaller windows (data.window_size), or "
            "trainer.accelerator cpu if this was a GPU."
        )

    return explain_out_of_memory(InputError, advice)


def _device(config: Config) -> torch.device:
    wanted = config.trainer.accelerator
    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted, True):
        raise InputError(f"trainer.accelerator is {wanted!r}, but there is none on this machine; use cpu or auto.")
    if wanted == "mps":
        return torch.device("mps")
    return torch.device("cuda" if wanted != "cpu" and there["gpu"] else "cpu")


def _tags(config: Config, store: Store, notes: ModelNotes | None, model_run_id: str | None) -> dict[str, Any]:
    domains = _domains(config)
    tags = {
        Tag.JOB: Job.EVALUATE,
        **domain_tags(config),
        Tag.MODEL: config.domain_adaptation.pretrained_checkpoint.path,
        Tag.NETWORK_FROM: "settings" if notes is None else "model",
        Tag.NORMALIZATION_FROM: ", ".join(
            f"{one}: {'settings' if reading_of(notes, one) is None else 'model'}" for one in domains
        ),
        Tag.SELECTED_WITH_TARGET_LABELS: str(chosen_by_target_labels(store, model_run_id)).lower(),
        "seed": config.seed,
    }
    if _with_target_statistics(config):
        tags[Tag.BATCHNORM] = "target_stats"
    if config.tta != "none":
        tags[Tag.TTA] = config.tta
    if config.test_batchnorm != "running":
        tags[Tag.TEST_BATCHNORM] = config.test_batchnorm
    return tags if model_run_id is None else tags | {Tag.SOURCE_RUN_ID: model_run_id}


def _with_target_statistics(config: Config) -> bool:
    return config.domain_adaptation.batchnorm == "target_stats"


def reading_of(notes: ModelNotes | None, one: OneDomain) -> tuple[Reading, Normalization] | None:
    """Return how a model reads and normalizes images of a domain (its only target for target.NAME); None if unknown."""
    readings = {} if notes is None else notes.readings
    return readings.get(str(one)) or readings.get(one.role)


def _domains(config: Config) -> list[OneDomain]:
    """Return the domains whose images are read."""
    domains = _scored_domains(config)
    statistics = config.data.of_role("target") if _with_target_statistics(config) else ()
    return domains + [one for one in statistics if one not in domains]


def _scored_domains(config: Config) -> list[OneDomain]:
    """Return the domains with validation or test images."""
    return [one for one, settings in config.data.domains.items() if settings.val or settings.test]


def _with_the_models_own(config: Config, notes: ModelNotes) -> Config:
    """Return the settings with the network, classes, and way of reading images that a saved model brings."""
    changes: dict[str, Any] = {
        "model": {"arch": notes.arch, "encoder_weights": None, **notes.arguments},
        "data.class_names": _class_names(config, notes),
    }
    domains = _domains(config)
    known = {one: found for one in domains if (found := reading_of(notes, one)) is not None}
    for one, (reading, _) in known.items():
        changes |= _reading_changes(config, one, reading)
    if known and len(known) == len(domains):  # recorded only: `_read` takes the normalization from the notes
        found = {(made.mean, made.std) for _, made in known.values()}
        mean, std = next(iter(found))
        one = {"data.normalization": "fixed", "data.mean": list(mean), "data.std": list(std)}
        changes |= one if len(found) == 1 else {"data.normalization": "domain"}
    log.info(
        "The network (%s, %s), its classes%s are the model's own.",
        notes.arch, notes.arguments["encoder_name"],
        f" and the normalization of {', '.join(map(str, known))}" if known else "",
    )  # fmt: skip
    for domain in domains:
        if domain not in known:
            log.warning("The model does not record how %s images are normalized: the settings are used.", domain)
    for one in known:
        if one.name is not None and str(one) not in notes.readings:
            log.warning(
                "The model has one %s, without a name: images of %s are read and normalized like those.", one.role, one
            )
    if notes.ignore_index not in (None, config.data.ignore_index):
        log.warning(
            "data.ignore_index is %d, but the model was trained with %d; pixels of %d are ignored here.",
            config.data.ignore_index, notes.ignore_index, config.data.ignore_index,
        )  # fmt: skip
    return replace(config, changes)


def _class_names(config: Config, notes: ModelNotes) -> list[str] | None:
    """Return the model's class names, else those of the settings, else None; checks that the masks can be mapped to them."""
    mapped_source = (settings.class_names for settings in config.data.of_role("source").values())
    given = config.data.class_names or next(filter(None, mapped_source), None)
    if notes.class_names is None:
        return given
    own = list(notes.class_names)
    for domain in _scored_domains(config):
        mapped = config.data.domains[domain].class_names
        if mapped is not None:
            _check_mapped(domain, mapped, own)
        elif given is not None and given != own:
            _check_unmapped(domain, given, "data.class_names" if config.data.class_names else "data.source", own)
    if given is not None and given != own:
        log.info("The model's classes are used, %s, not those of the settings, %s.", own, given)
    return own


def _check_mapped(domain: OneDomain, mapped: Sequence[str], own: Sequence[str]) -> None:
    if not set(mapped) & set(own):
        raise InputError(
            f"{domain.key}: its label map names {list(mapped)}, but the model's classes are {list(own)}; map the masks' "
            "values to the model's classes."
        )
    lacking = [name for name in own if name not in mapped]
    more = [name for name in mapped if name not in own]
    if lacking:
        log.warning("%s: its label map lacks the model's classes %s.", domain.key, lacking)
    if more:
        log.warning("%s: its classes %s are not classes of the model and are ignored.", domain.key, more)


def _check_unmapped(domain: OneDomain, given: Sequence[str], where: str, own: Sequence[str]) -> None:
    """Raise InputError for masks with plain ids if the classes of the settings differ from the model's in number or order."""
    if len(given) != len(own):
        problem = f"names {len(given)} classes, {list(given)}, but the model has {len(own)}, {list(own)}"
    elif set(given) == set(own):
        problem = f"has the model's classes in another order, {list(given)}, not {list(own)}"
    else:
        log.warning(
            "%s: the plain ids in its masks are taken as the model's classes, %s, although %s names %s.",
            domain.key, list(own), where, list(given),
        )  # fmt: skip
        return
    raise InputError(
        f"{where} {problem}, and the masks of {domain.key} hold plain ids; map them to the model's classes with "
        f"{domain.key}.value_map (or color_map), or leave {domain.key}.val and {domain.key}.test empty."
    )


def _reading_changes(config: Config, domain: OneDomain, reading: Reading) -> dict[str, Any]:
    """Return what the model knows about reading a domain: its scale in any case, the rest if the settings do not set it."""
    given = config.data.domains[domain]
    scale = list(reading.scale) if isinstance(reading.scale, tuple) else reading.scale
    if given.scale not in ("type", scale):
        log.warning("%s.scale is %s, but the model was trained with %s, which is used.", domain.key, given.scale, scale)
    changes: dict[str, Any] = {"scale": scale}
    if given.bands is None and reading.bands is not None:
        changes["bands"] = list(reading.bands)
    if given.nodata == "file" and reading.nodata != "file":
        changes["nodata"] = list(reading.nodata)
    if given.pixel_size is None and reading.pixel_size is not None:
        changes["pixel_size"] = reading.pixel_size
    for key in [name for name in changes if name != "scale"]:
        log.info("%s.%s is taken from the model: %s.", domain.key, key, changes[key])
    return {f"{domain.key}.{key}": value for key, value in changes.items()}


def _read(config: Config, notes: ModelNotes | None) -> ImageSets:
    """Return the sets with masks and, for target statistics, the target's training images; images are read now while they fit
    into memory. Each domain has the model's own normalization, else that of the settings. Raises InputError if no set has masks,
    or a file cannot be read."""
    data = find_data(config, (*SCORED_SETS, STATISTICS_SET) if _with_target_statistics(config) else SCORED_SETS)
    names = [name for name in data.names if name.whole == STATISTICS_SET or name in data.labelled]
    for name in data.names:
        if name not in names:
            log.info("%s has no masks and is not scored.", name.key)
    if not data.labelled:
        raise InputError("evaluate needs labeled images in data.source or data.target, under val or test.")
    known = {one: found[1] for one in config.data.domains if (found := reading_of(notes, one)) is not None}
    sets = data.read(names, known=known)
    for name, dataset in sets.sets.items():
        if dataset.class_pixels is not None and not np.delete(dataset.class_pixels, config.data.ignore_index).any():
            raise InputError(
                f"{name.key}: no pixel of its masks belongs to a class of {config.class_names}: all are ignored "
                f"(data.ignore_index {config.data.ignore_index}, ignore_values, or names in the label map that are not classes)."
            )
    return sets
