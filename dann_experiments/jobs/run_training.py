"""Trains one network in one tracked run: the common part of `pretrain` and `adapt`."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.numpy import save_file
from torch import nn

from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.checkpoints.files import BEST, LAST
from dann_experiments.config import Config, InputError, TrainingFailed, config_to_yaml, flatten, replace
from dann_experiments.config.atomic_write import writing
from dann_experiments.config.store_names import labels_in_store
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.loaders import Loaders
from dann_experiments.jobs.build import make_loaders
from dann_experiments.jobs.build_training import class_weights_of, make_loop, make_module
from dann_experiments.jobs.identity import domain_name, domain_tags, label_tags, public_settings
from dann_experiments.jobs.model_files import write_model
from dann_experiments.jobs.other_ranks import other_ranks
from dann_experiments.jobs.pictures import KEY, Album, PicturesByStep
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.resume import CHECKPOINTS, SETTINGS, checkpoint_to_go_on_from, folder_of_runs
from dann_experiments.models.taps import Tap
from dann_experiments.names import TARGET_LABELLED, Domain, Job, Metric, OneDomain, SetName, Split, Tag
from dann_experiments.reports.plots.confusion import draw_confusion
from dann_experiments.reports.plots.predictions import draw_predictions
from dann_experiments.reports.plots.run_curves import draw_curves
from dann_experiments.scores import predicted_shares, true_shares
from dann_experiments.tracking.notes import WEAK_LABELS_WORDS, description, iou_changes, link, links_of, run_page
from dann_experiments.tracking.pictures import Pictures
from dann_experiments.tracking.run import PARAM_PREFIX, RunLogger, TrackedRun, tracked_run
from dann_experiments.tracking.store import Store, local_artifact_folder, remove_artifacts
from dann_experiments.training.alignment import Alignment, Gap, probe_loaders
from dann_experiments.training.batch_size import domains_of_a_step, fits_on_gpu, largest_factor, step_fits
from dann_experiments.training.curves import Curves
from dann_experiments.training.memory import advice_for_training, explain_out_of_memory
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback
from dann_experiments.training.random_states import reseed
from dann_experiments.training.scoring import Scores, metrics_of_sets, score_set
from dann_experiments.workers.processes import visible_gpus

log = logging.getLogger(__name__)
CURVES_FILE = "figures/curves.png"
FEATURES_FILE = "features.safetensors"
"""Artifact with the pooled features at `layer` (its metadata): `before/source`, `before/target`, `after/...`, (N, 2C)."""


@dataclass(frozen=True)
class Parts:
    """The network, method, taps and image sets of a training."""

    network: nn.Module
    method: DomainAdaptationMethod
    taps: Sequence[Tap]
    sets: ImageSets


@dataclass(frozen=True)
class Outcome:
    """The result of a training: scores by set, before the first step and of the final model."""

    before: Mapping[SetName, Scores]
    after: Mapping[SetName, Scores]
    final_step: int
    unlabelled: Mapping[str, float]
    """Metrics of the final model that need no labels: `select/...` of the target, `da/domain_acc_val`, and those of the probe."""
    alignment: str
    """Explanation of the domain gap, in words; empty for pretraining."""

    def metrics(self, class_names: Sequence[str]) -> dict[str, float]:
        """Return all metrics of the final model, by metric name."""
        return {**_metrics(self.after, class_names), **self.unlabelled}


def tracked_training(
    job: str,
    config: Config,
    store: Store,
    parts: Parts,
    name: str,
    tags: Mapping[str, Any],
    resumed: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
    main_job: bool = True,
    source_run_id: str | None = None,
) -> RunResult:
    """Train in a new run, or in `resumed`, the id of a killed one.

    `job`: `Job.PRETRAIN`, which uses the settings under `pretraining`, or `Job.ADAPT`, which probes the domain gap before and
    after. `tags`: tags of the run in addition to those of its job, domains and seed. `main_job`: False for a pretraining that
    `adapt` starts, which uses neither the run created by `mlflow run` nor its name. `source_run_id`: the run that made the source
    model. Raises TrainingFailed if memory runs out, and NotStored if the store does not accept everything."""
    folder = folder_of_runs(store, resumed, config.tracking.folder)
    run_name = config.tracking.run_name if main_job else None
    labelled = parts.sets.get(TARGET_LABELLED)
    of_labels = label_tags(job, config, 0 if labelled is None else len(labelled.samples))
    tags = {Tag.JOB: job, **domain_tags(config), "seed": config.seed, **of_labels, **tags}
    batch_sizes = make_loaders(config, parts.sets).batch_sizes
    links = [*source_links(store, source_run_id), *links_of(tags, store.experiment_id)]
    with (
        tracked_run(store, run_name, name, tags, folder, main_job, resumed, config.tracking.system_metrics) as run,
        explain_out_of_memory(
            TrainingFailed, lambda: advice_for_training(parts.sets.training(), batch_sizes, config.data.crop_size)
        ),
    ):
        checkpoint = None if resumed is None else checkpoint_to_go_on_from(store, run.run_id, run.folder)
        describe_run(run, config, parts.sets)
        weights = class_weights_of(config, parts.sets)
        if weights is not None:
            shown = ", ".join(f"{name} {one:.4g}" for name, one in zip(config.class_names, weights, strict=True))
            log.info("Class weights of the losses: %s.", shown)
            run.set_tags({Tag.CLASS_WEIGHTS: shown})
        if job == Job.PRETRAIN:
            reseed(config.seed)
        outcome = train(config, run, parts, callbacks, pretraining=job == Job.PRETRAIN, checkpoint=checkpoint)
        write_model(run, config, parts.network, parts.sets, name, tags, list(outcome.after), outcome.final_step)
        metrics, baseline = outcome.metrics(config.class_names), _metrics(outcome.before, config.class_names)
        links = [*links, link("curves", run_page(store.experiment_id, run.run_id, CURVES_FILE))]
        weak = WEAK_LABELS_WORDS if Tag.WEAK_LABELS in tags else ""
        explained = f"{weak} {outcome.alignment}".strip()
        run.set_tags({Tag.NOTE: description(name, iou_changes(baseline, metrics), links, explained)})
    artifacts = local_artifact_folder(store, run.run_id)
    return RunResult(
        job=job,
        run_id=run.run_id,
        experiment_id=store.experiment_id,
        tracking_uri=store.uri,
        metrics=metrics,
        baseline=baseline,
        source_run_id=source_run_id,
        artifacts=None if artifacts is None else str(artifacts),
    )


def source_links(store: Store, source_run_id: str | None) -> list[str]:
    """Return the link to the run that made the model a run starts from, for its description; none if it is not known."""
    if source_run_id is None:
        return []
    source = store.client.get_run(source_run_id).info
    return [f"Model of {link(source.run_name, run_page(source.experiment_id, source_run_id))}"]


def describe_run(run: TrackedRun, config: Config, sets: ImageSets) -> None:
    """Log params, `config.yaml` and data sets: everything that determines the run. A resumed run has most of it already."""
    config = public_settings(config, run.store.experiment)
    if not (run.folder / SETTINGS).exists():  # first: without it a killed run cannot be resumed
        part = run.folder / f"{SETTINGS}.part"
        with writing(run.folder / SETTINGS, part):
            part.write_text(config_to_yaml(config))
            os.replace(part, run.folder / SETTINGS)
    known = run.store.client.get_run(run.run_id).data.params if run.resumed else {}
    run.log_params({key: value for key, value in flatten(config).items() if PARAM_PREFIX + key not in known})
    data_sets = []
    for name, dataset in sets.sets.items():
        entries = getattr(config.data.written[name.one], name.split)
        masks = "with masks" if dataset.has_masks else "no masks"
        data_sets.append((
            f"{domain_name(config, name.domain, name.member)} {name.split}", sets.digests[str(name)], name.words,
            ", ".join(str(entry) for entry in entries) or "of the preset",
            f'{{"images": {len(dataset.samples)}, "windows": {len(dataset)}, "masks": "{masks}"}}',
        ))  # fmt: skip
    run.log_inputs(data_sets)


def train(
    config: Config,
    run: TrackedRun,
    parts: Parts,
    callbacks: Sequence[pl.Callback] = (),
    pretraining: bool = False,
    checkpoint: Path | None = None,
) -> Outcome:
    """Train, choose the final weights, score them, and write checkpoints, figures and tables to the run's folder.

    `checkpoint`: one that an earlier process of this run saved. `network` must then be in its state before training, as it was
    for that process, because that state is measured again. With `trainer.devices` above 1 the other ranks are processes that
    this one starts."""
    network, sets = parts.network, parts.sets
    loaders = make_loaders(config, sets)
    alignment = None
    if not pretraining:
        used = [tap for tap in parts.taps if tap.name in parts.method.aligned_layers]
        adversary = config.domain_adaptation.method.name != "lambda_zero"
        probed = probe_loaders(loaders) if config.monitor.probe else None
        alignment = Alignment(
            network, used, config.model.in_channels, probed, config.seed, adversary, len(config.data.domains)
        )
    with other_ranks(config, sets, run.folder, pretraining, checkpoint) as ranks:
        curves = Curves()
        pictures = {str(one): Album(sets.shown(one)) for one in config.data.domains}
        if config.tracking.images:
            callbacks = [PicturesByStep(pictures, config.model.classes, Pictures(run, KEY)), *callbacks]
        loop = make_loop(
            config, network, parts.method, parts.taps, make_loaders(config, sets, ranks.first), run.folder,
            pretraining=pretraining, resumed=checkpoint is not None, rank=ranks.first, curves=curves,
            logger=_CurveLogger(run, curves), persist=run.persist, beside=run.beside, callbacks=callbacks,
        )  # fmt: skip
        for album in pictures.values():
            album.add("before", network)
        if alignment is not None:
            alignment.measure("before", network, loop.device)
        if checkpoint is None:
            run.log_metrics({Metric.PASSES: float(loop.module.passes_per_step)}, step=0)
        last = loop.module.memory_format == torch.channels_last
        run.set_tags({Tag.MEMORY_FORMAT: "channels_last" if last else "contiguous"})
        with closing(loop.checkpoints):  # however training ends, rename its files to last and best
            ranks.wait()
            loop.run(checkpoint)
            monitor, final_step = loop.monitor, loop.trainer.global_step
            unlabelled = monitor.target_scores | monitor.domain_accuracy | monitor.predicted_shares()
            unlabelled |= {} if monitor.guard is None else monitor.guard.metrics()
            if Metric.SOURCE_KEPT in monitor.metrics():
                unlabelled[Metric.SOURCE_KEPT] = monitor.metrics()[Metric.SOURCE_KEPT]
            explained = ""
            if alignment is not None:
                alignment.measure("after", network, loop.device)
                lambdas = [value for _, value in curves.numbers().get(Metric.LAMBDA, [])]
                gap = _log_gap(run, alignment, monitor, final_step, idle=bool(lambdas) and not any(lambdas))
                unlabelled, explained = unlabelled | gap.after, gap.text
            outcome = Outcome(
                before=_by_set(monitor.baseline),
                after=_final_scores(config, network, loaders, monitor),
                final_step=final_step,
                unlabelled=unlabelled,
                alignment=explained,
            )
            for album in pictures.values():
                album.add("after", network)
            network.cpu()
            _write_results(config, run, network, sets, outcome, pictures, curves.numbers())
    if checkpoint is not None:  # an earlier process may have uploaded its own checkpoints
        remove_artifacts(run.store, run.run_id, CHECKPOINTS, {LAST, BEST})
    return outcome


def with_batch_sizes(config: Config, parts: Parts) -> Config:
    """Return the settings with both domains' batch sizes doubled for as long as a training step fits into the GPU's memory, up to
    the size of the smaller set; unchanged without `trainer.auto_batch_size`. Network, method and random states do not change.
    Raises InputError if there is no GPU, or if not even the batch sizes in the settings fit."""
    if not config.trainer.auto_batch_size:
        return config
    if not visible_gpus(config.trainer.accelerator):
        raise InputError(
            "trainer.auto_batch_size is true, but there is no GPU (trainer.accelerator "
            f"{config.trainer.accelerator}). On a CPU the number of cores limits useful batch sizes, not memory. Set it to false."
        )
    if parts.sets.get(TARGET_LABELLED) is not None:
        raise InputError(
            "trainer.auto_batch_size does not know the memory that data.target.train_labelled needs; set data.source.batch_size "
            "and data.target.batch_size instead."
        )
    domains = domains_of_a_step(parts.method, parts.taps)
    datasets = {domain: parts.sets.training()[domain] for domain in domains}
    own = {domain: getattr(config.data, domain).batch_size for domain in domains}
    device = torch.device("cuda")

    def make(network: nn.Module, method: DomainAdaptationMethod) -> Any:
        return make_module(config, network, method, parts.taps, device)

    def fits(factor: int) -> bool:
        shapes: dict[Domain, torch.Size] = {domain: datasets[domain][0]["image"].shape for domain in domains}
        sizes: dict[Domain, int] = {domain: factor * own[domain] for domain in domains}
        precision = config.trainer.precision
        return fits_on_gpu(
            lambda: step_fits(make, parts.network, parts.method, shapes, sizes, device, precision)
        )  # fmt: skip

    factor = largest_factor(fits, min(len(datasets[domain]) // size for domain, size in own.items()))
    if factor == 0:
        raise InputError(f"trainer.auto_batch_size: not even the configured batches fit into the GPU's memory ({own}).")
    sizes = {f"data.{domain}.batch_size": factor * size for domain, size in own.items()}
    log.info("trainer.auto_batch_size: %s.", ", ".join(f"{key} {size}" for key, size in sizes.items()))
    return replace(config, sizes | {"trainer.auto_batch_size": False})  # the run's settings record the result


def _log_gap(
    run: TrackedRun, alignment: Alignment, monitor: DomainAdaptationMonitorCallback, final_step: int, idle: bool
) -> Gap:
    """Log the results of the probes: metrics at step 0 and `final_step`, features as a file, and an explanation in words."""
    gap = alignment.finish(monitor.domain_accuracy.get(Metric.DOMAIN_ACCURACY_VAL), monitor.harmed, idle)
    run.log_metrics(gap.before, step=0)
    run.log_metrics(gap.after, step=final_step)
    log.info("%s", gap.text)
    run.set_tags({Tag.ALIGNMENT: gap.text})
    if gap.features:
        with writing(run.folder / FEATURES_FILE):
            save_file(gap.features, run.folder / FEATURES_FILE, metadata={"layer": gap.layer})
            shutil.copymode(
                run.folder / SETTINGS, run.folder / FEATURES_FILE
            )  # safetensors lets only the owner read its file
    return gap


def _metrics(scores: Mapping[SetName, Scores], class_names: Sequence[str]) -> dict[str, float]:
    """Return scores by metric name."""
    return metrics_of_sets(scores, class_names)


def _by_set(of_validation: Mapping[str, Scores]) -> dict[SetName, Scores]:
    domains = {OneDomain.parse(name): scores for name, scores in of_validation.items()}
    return {SetName(one.role, "val", one.name): scores for one, scores in domains.items()}


def _final_scores(
    config: Config, network: nn.Module, loaders: Loaders, monitor: DomainAdaptationMonitorCallback
) -> dict[SetName, Scores]:
    """Return the validation scores of the final model, which are those of the last validation, and its test scores."""
    scores = _by_set(monitor.latest)
    splits: tuple[Split, ...] = ("test", "val")
    for name in [SetName(one.role, split, one.name) for split in splits for one in config.data.domains]:
        dataset = loaders.sets.sets.get(name)
        if dataset is not None and dataset.has_masks and name not in scores:
            loader = loaders.scoring(dataset, name.domain)
            scores[name] = score_set(network, loader, config.model.classes, config.data.ignore_index)
    return scores


class _CurveLogger(RunLogger):
    """The run's logger, which also passes metrics to the curves."""

    def __init__(self, run: TrackedRun, curves: Curves) -> None:
        super().__init__(run)
        self._curves = curves

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self._curves.add(metrics, step or 0)


def _write_results(
    config: Config,
    run: TrackedRun,
    network: nn.Module,
    sets: ImageSets,
    outcome: Outcome,
    pictures: Mapping[str, Album],
    series: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    names = config.class_names
    tests = {name: found for name, found in outcome.after.items() if name.split == "test"}
    run.log_metrics(_metrics(tests, names), step=outcome.final_step)
    figures = run.folder / "figures"
    for domain, album in pictures.items():
        if album.images:
            path = figures / f"predictions_{domain}.png"
            title = f"{OneDomain.parse(domain).words} images"
            draw_predictions(path, album.images, album.truth, album.predictions, names, title)
    for name, scores in outcome.after.items():
        title = f"{name.words}: mean IoU {scores.iou:.3f}"
        draw_confusion(figures / f"confusion_{name}.png", scores.confusion, names, title)
    if series:
        draw_curves(run.folder / CURVES_FILE, series, f"run {run.run_id[:8]}", len(config.data.domains))
    _write_class_table(run.folder / "tables" / "class_iou.csv", outcome, names)


def _write_class_table(path: Path, outcome: Outcome, class_names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    called = labels_in_store(class_names)
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "set",
                "class",
                "iou_before",
                "iou_after",
                "ap_before",
                "ap_after",
                "share_before",
                "share_after",
                "true_share",
            ]
        )
        for name, after in outcome.after.items():
            before = outcome.before.get(name)
            columns = [None if found is None else found.class_iou for found in (before, after)]
            columns += [None if found is None else found.class_ap for found in (before, after)]
            columns += [None if found is None else predicted_shares(found.confusion) for found in (before, after)]
            columns.append(true_shares(after.confusion))
            for index, label in enumerate(class_names):
                writer.writerow([name, called[label], *("" if one is None else f"{one[index]:.6f}" for one in columns)])
            writer.writerow([name, "mean", "" if before is None else f"{before.iou:.6f}", f"{after.iou:.6f}"])
            floors = ["" if found is None else f"{found.floor:.6f}" for found in (before, after)]
            writer.writerow([name, "floor", *floors])
