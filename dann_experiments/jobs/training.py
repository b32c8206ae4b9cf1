"""Trains one network in one tracked run: what `pretrain` and `adapt` have in common."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from torch import nn

from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.config import Config, config_to_yaml, flatten
from dann_experiments.config.atomic_write import writing
from dann_experiments.config.names import labels_in_store
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.jobs import setup
from dann_experiments.jobs.alignment import Alignment
from dann_experiments.jobs.fit import Fit, validation_loader
from dann_experiments.jobs.other_ranks import other_ranks
from dann_experiments.jobs.resume import CHECKPOINTS, SETTINGS
from dann_experiments.jobs.setup import Data
from dann_experiments.models.files import save_model
from dann_experiments.models.taps import Tap
from dann_experiments.tracking.figures import display_image, draw_confusion, draw_curves, draw_predictions
from dann_experiments.tracking.run import PARAM_PREFIX, TrackedRun
from dann_experiments.tracking.store import remove_artifacts
from dann_experiments.training.checkpoint_files import BEST, LAST
from dann_experiments.training.monitor import (
    DOMAINS,
    DomainAdaptationMonitorCallback,
)
from dann_experiments.training.scores import Scores, predict_images, score_set
from dann_experiments.training.selection import KEPT

log = logging.getLogger(__name__)
PICTURES = 6  # images a domain in the prediction figures


@dataclass(frozen=True)
class Outcome:
    """What training gave: scores by set name, before the first step and of the final model."""

    before: Mapping[str, Scores]
    after: Mapping[str, Scores]
    final_step: int
    unlabelled: Mapping[str, float]
    """Of the final model, without labels: `select/...` of the target, `da/domain_acc_val`, and what `alignment` measured."""

    def metrics(self, class_names: Sequence[str]) -> dict[str, float]:
        """Everything about the final model under the names of a run."""
        return {**final_metrics(self.after, class_names), **self.unlabelled}


def describe_run(run: TrackedRun, config: Config, data: Data) -> None:
    """Params, `config.yaml` and data sets: what the run was given. A resumed run has most or all of it already."""
    config = setup.public_settings(config, run.store.experiment)
    if not (run.folder / SETTINGS).exists():  # first: without it a killed run cannot go on
        part = run.folder / f"{SETTINGS}.part"
        with writing(run.folder / SETTINGS, part):
            part.write_text(config_to_yaml(config))
            os.replace(part, run.folder / SETTINGS)
    known = run.store.client.get_run(run.run_id).data.params
    run.log_params({key: value for key, value in flatten(config).items() if PARAM_PREFIX + key not in known})
    for name, dataset in data.sets.items():
        domain, split = name.split("_")
        entries = ", ".join(str(entry) for entry in getattr(getattr(config.data, domain), split)) or "of the preset"
        masks = "with masks" if dataset.has_masks else "no masks"
        run.log_input(
            f"{setup.domain_name(config, domain)} {split}", data.digests[name], f"{domain} {split}", entries,
            f'{{"images": {len(dataset.samples)}, "windows": {len(dataset)}, "masks": "{masks}"}}',
        )  # fmt: skip


def train(
    config: Config,
    run: TrackedRun,
    network: nn.Module,
    method: DomainAdaptationMethod,
    taps: Sequence[Tap],
    data: Data,
    callbacks: Sequence[pl.Callback] = (),
    pretraining: bool = False,
    alignment: Alignment | None = None,
    go_on_from: Path | None = None,
) -> Outcome:
    """Train, choose the final weights, score them, leave checkpoints, model, figures and tables in the run's folder.
    `pretraining`: by the settings of the source model's training. `alignment`: measures before and after training whether the
    domains can be told apart. `go_on_from`: a checkpoint that an earlier process of this run saved; `network` then comes as it
    came to that process, so that what it was before training is measured again, not kept. With `trainer.devices` above 1 the
    other ranks are processes that this one starts."""
    with other_ranks(config, data, run.folder, pretraining, go_on_from) as ranks:
        fit = Fit(
            config, network, method, taps, data, run.folder, pretraining=pretraining, resumed=go_on_from is not None,
            rank=ranks.first, run=run, callbacks=callbacks,
        )  # fmt: skip
        pictures = {domain: Album(data.get(f"{domain}_val") or data.get(f"{domain}_train")) for domain in DOMAINS}
        for album in pictures.values():
            album.add("before", network)
        if alignment is not None:
            alignment.measure("before", network, fit.device)
        with closing(fit.checkpoints):  # whatever the end, its files are called last and best
            ranks.wait()
            fit.go(go_on_from)
            monitor, final_step = fit.monitor, fit.trainer.global_step
            unlabelled = monitor.target_scores | monitor.domain_accuracy
            if KEPT in monitor.metrics():
                unlabelled[KEPT] = monitor.metrics()[KEPT]
            if alignment is not None:
                alignment.measure("after", network, fit.device)
                unlabelled |= alignment.finish(run, monitor.domain_accuracy.get("da/domain_acc_val"), final_step)
            outcome = Outcome(
                before={f"{domain}_val": scores for domain, scores in monitor.baseline.items()},
                after=_final_scores(config, network, data, monitor),
                final_step=final_step,
                unlabelled=unlabelled,
            )
            for album in pictures.values():
                album.add("after", network)
            network.cpu()
            _write_results(config, run, network, data, outcome, pictures, fit.curves.numbers())
    if go_on_from is not None:  # an earlier process may have stored those of its own time
        remove_artifacts(run.store, run.run_id, CHECKPOINTS, {LAST, BEST})
    return outcome


def final_metrics(scores: Mapping[str, Scores], class_names: Sequence[str]) -> dict[str, float]:
    """Scores by set name under the names of a run."""
    return {key: value for name, found in scores.items() for key, value in found.metrics(name, class_names).items()}


def _final_scores(
    config: Config, network: nn.Module, data: Data, monitor: DomainAdaptationMonitorCallback
) -> dict[str, Scores]:
    """Validation scores of the final model, which are those of the last validation, and its test scores."""
    scores = {f"{domain}_val": found for domain, found in monitor.latest.items()}
    for name in [f"{domain}_test" for domain in DOMAINS] + [f"{domain}_val" for domain in DOMAINS]:
        dataset = data.labelled(name)
        if dataset is not None and name not in scores:
            loader = validation_loader(config, dataset, name.partition("_")[0])
            scores[name] = score_set(network, loader, config.model.classes, config.data.ignore_index)
    return scores


class Album:
    """A few images of a set, spread over it, with predictions of several networks, or of one at several times."""

    def __init__(self, dataset: SegmentationDataset | None, most: int = PICTURES) -> None:
        count = 0 if dataset is None else min(most, len(dataset))
        # spread over the set, so that a manifest sorted by scene shows more than one
        indices = [int(index) for index in np.linspace(0, len(dataset) - 1, count)] if dataset is not None else []
        items = [dataset[index] for index in indices] if dataset is not None else []
        self.images = (
            [display_image(dataset.picture(item), stretch=dataset.headers[0].dtype != "uint8") for item in items]
            if dataset is not None
            else []
        )
        self.truth = [item["mask"].numpy() for item in items if "mask" in item]
        self.predictions: dict[str, list[np.ndarray]] = {}
        self._inputs = [item["image"] for item in items]

    def add(self, when: str, network: nn.Module) -> None:
        """Predict all pictures with the network as it is now."""
        self.predictions[when] = predict_images(network, self._inputs)


def _write_results(
    config: Config,
    run: TrackedRun,
    network: nn.Module,
    data: Data,
    outcome: Outcome,
    pictures: Mapping[str, Album],
    series: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    names = config.class_names
    tests = {key: found for key, found in outcome.after.items() if key.endswith("_test")}
    run.log_metrics(final_metrics(tests, names), step=outcome.final_step)
    save_model(
        run.folder / "model", network, config.model.arch, setup.model_arguments(config), setup.model_facts(config, data)
    )
    figures = run.folder / "figures"
    for domain, album in pictures.items():
        if album.images:
            path = figures / f"predictions_{domain}.png"
            draw_predictions(path, album.images, album.truth, album.predictions, names, f"{domain} images")
    for name, scores in outcome.after.items():
        title = f"{name.replace('_', ' ')}: mean IoU {scores.iou:.3f}"
        draw_confusion(figures / f"confusion_{name}.png", scores.confusion, names, title)
    if series:
        draw_curves(figures / "curves.png", series, f"run {run.run_id[:8]}")
    _write_class_table(run.folder / "tables" / "class_iou.csv", outcome, names)


def _write_class_table(path: Path, outcome: Outcome, class_names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    called = labels_in_store(class_names)
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "class", "iou_before", "iou_after"])
        for name, scores in outcome.after.items():
            before = outcome.before.get(name)
            for index, label in enumerate(class_names):
                earlier = "" if before is None else f"{before.class_iou[index]:.6f}"
                writer.writerow([name, called[label], earlier, f"{scores.class_iou[index]:.6f}"])
            writer.writerow([name, "mean", "" if before is None else f"{before.iou:.6f}", f"{scores.iou:.6f}"])
