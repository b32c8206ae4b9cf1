"""Scores weak target labels by the true masks, without a network: what the rule behind them is worth by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from dann_experiments.config import Config, InputError
from dann_experiments.config.comparison import ARM_NAMES
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.domain_data import DomainData
from dann_experiments.jobs.build import data_plan, seeded
from dann_experiments.jobs.identity import domain_tags, run_name
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.run_training import describe_run
from dann_experiments.jobs.score_files import write_scores
from dann_experiments.names import TARGET_TEST, TARGET_VAL, Job, Metric, SetName, Tag
from dann_experiments.scores.confusion import count_pairs
from dann_experiments.tracking.notes import description, iou_changes, links_of
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import local_artifact_folder, open_store
from dann_experiments.training.scoring import Scores, metrics_of_sets

SETS = (TARGET_VAL, TARGET_TEST)


def find_weak_labels(config: Config) -> list[SetName]:
    """Return the target sets to score that have masks, and a mask in `data.target.weak_labels` for each of their images."""
    plan = dataclasses.replace(data_plan(config, unused=True), masks_of_rule=True)
    truth = dataclasses.replace(plan, masks_of_rule=False)
    names = [name for whole in SETS for name in plan.parts(whole)]
    judged = {name: truth.find(name, lambda _: None) for name in names}
    labelled = [name for name, found in judged.items() if found and any(sample.mask is not None for sample in found)]
    return [name for name in labelled if plan.find(name, lambda _: None)]


def digests_of_weak_labels(config: Config) -> dict[str, str]:
    """Return the digests of the sets that are scored, by name, and of the same images with their weak labels."""
    truth, weak = _data(config)
    return {**truth.digests, **{f"weak labels of {name}": digest for name, digest in weak.digests.items()}}


def evaluate_weak_labels(config: Config, tags: Mapping[str, str] | None = None) -> RunResult:
    """Score the masks of `data.target.weak_labels` by those of the target's validation and test sets, in a run of its own.

    Its metrics, tables and figures are those of `evaluate`, without average precision, which masks do not have. Pixels that the
    rule leaves open (`data.ignore_index` in its masks) are not counted; `weak_labels/open` is their share. `tags` are added to
    the run's own, or replace them. Raises InputError before a run is opened: if no set has both kinds of masks, and for
    unreadable files.
    """
    store = open_store(config.tracking.uri, config.tracking.experiment)
    with seeded(config):
        truth, weak = (data.read() for data in _data(config))
        all_tags = {
            Tag.JOB: Job.EVALUATE,
            **domain_tags(config),
            Tag.WEAK_LABELS: "true",
            "seed": config.seed,
            **(tags or {}),
        }
        title, folder = run_name(Job.EVALUATE, config, ARM_NAMES["masks"]), Path(config.tracking.folder)
        with tracked_run(store, config.tracking.run_name, title, all_tags, folder, use_claimed=True) as run:
            describe_run(run, config, truth)
            found = {name: _scored(truth.sets[name], dataset, config) for name, dataset in weak.sets.items()}
            scores = {name: one for name, (one, _) in found.items()}
            metrics = metrics_of_sets(scores, config.class_names, complete=True)
            metrics[Metric.RULE_OPEN] = max(share for _, share in found.values())
            run.log_metrics(metrics, step=0)
            links = links_of(all_tags, store.experiment_id)
            run.set_tags({Tag.NOTE: description(title, iou_changes({}, metrics), links)})
            write_scores(run.folder, scores, config.class_names)
    artifacts = local_artifact_folder(store, run.run_id)
    return RunResult(
        job=Job.EVALUATE, run_id=run.run_id, experiment_id=store.experiment_id, tracking_uri=store.uri, metrics=metrics,
        artifacts=None if artifacts is None else str(artifacts),
    )  # fmt: skip


def _data(config: Config) -> tuple[DomainData, DomainData]:
    """Return the sets with their masks, and with weak labels in their place."""
    names = find_weak_labels(config)
    if not names:
        raise InputError(
            "data.target.weak_labels does not have a mask for every image of data.target.val or of data.target.test, so there "
            "is nothing to score; add them there."
        )
    plan = data_plan(config, unused=True)
    return DomainData(plan, names), DomainData(dataclasses.replace(plan, masks_of_rule=True), names)


def _scored(truth: SegmentationDataset, weak: SegmentationDataset, config: Config) -> tuple[Scores, float]:
    """Return the scores of the masks of `weak`, and the share (0..1) of the labeled pixels that they leave open."""
    classes, ignored = config.model.classes, config.data.ignore_index
    confusion, labeled = torch.zeros(classes, classes, dtype=torch.int64), 0
    for index in range(len(truth)):
        labels, predicted = (torch.from_numpy(dataset.read(index)[1]).long() for dataset in (truth, weak))
        labeled += int((labels != ignored).sum())
        labels = labels.masked_fill(predicted == ignored, ignored)
        confusion += count_pairs(predicted.masked_fill(predicted == ignored, 0), labels, classes, ignored)
    counted = int(confusion.sum())
    return Scores(confusion.numpy(), float("nan")), 1 - counted / labeled if labeled else float("nan")
