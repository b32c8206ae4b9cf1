"""Trains one network in one tracked run: what `pretrain` and `adapt` have in common."""

from __future__ import annotations

import csv
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.config import Config, InputError, config_to_yaml, flatten
from dann_experiments.config.schema import OptimizerConfig
from dann_experiments.data.dataset import SegmentationDataset, eval_loader, train_loader
from dann_experiments.jobs import setup
from dann_experiments.jobs.alignment import Alignment
from dann_experiments.jobs.curves import CURVES, CurveLogger, Curves
from dann_experiments.jobs.resume import CHECKPOINTS, SETTINGS
from dann_experiments.jobs.setup import Data
from dann_experiments.models.batchnorm import statistics_loader
from dann_experiments.models.files import save_model
from dann_experiments.models.taps import Tap
from dann_experiments.tracking.figures import display_image, draw_confusion, draw_curves, draw_predictions
from dann_experiments.tracking.run import PARAM_PREFIX, RunLogger, TrackedRun
from dann_experiments.tracking.store import remove_artifacts
from dann_experiments.training.bad_numbers import BadNumbers
from dann_experiments.training.checkpoint_files import BEST, LAST, WholeFiles, read
from dann_experiments.training.checkpoints import Checkpoints
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.monitor import (
    DOMAINS,
    DomainAdaptationMonitorCallback,
    RatesAndTimes,
    TargetStatistics,
)
from dann_experiments.training.random_states import RandomStates
from dann_experiments.training.scores import Scores, metric_name, predict_images, score_set
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


class _EpochLines(pl.Callback):
    """Progress where there is no terminal to draw a bar on: a line an epoch."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shown = [
            f"{name} {float(trainer.callback_metrics[name]):.3f}"
            for name in CURVES[:2]
            if name in trainer.callback_metrics
        ]
        if not trainer.sanity_checking:
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  " + "  ".join(shown), flush=True)


def describe_run(run: TrackedRun, config: Config, data: Data) -> None:
    """Params, `config.yaml` and data sets: what the run was given. A resumed run has most or all of it already."""
    config = setup.public_settings(config)
    if not (run.folder / SETTINGS).exists():  # first: without it a killed run cannot go on
        part = run.folder / f"{SETTINGS}.part"
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
    max_epochs: int,
    optimizer: OptimizerConfig,
    callbacks: Sequence[pl.Callback] = (),
    alignment: Alignment | None = None,
    go_on_from: Path | None = None,
) -> Outcome:
    """Train, choose the final weights, score them, leave checkpoints, model, figures and tables in the run's folder.
    `alignment`: measures before and after training whether the domains can be told apart. `go_on_from`: a checkpoint that
    an earlier process of this run saved; `network` then comes as it came to that process, so that what it was before training
    is measured again, not kept."""
    module = AdaptationModule(
        network, method, taps, setup.optimizer_maker(optimizer, config.trainer.precision), optimizer.schedule,
        config.data.ignore_index, config.domain_adaptation.batchnorm,
    )  # fmt: skip
    monitor = DomainAdaptationMonitorCallback(
        config.model.classes, config.class_names, config.monitor.log_every_n_epochs,
        config.monitor.forgetting_threshold, config.data.ignore_index,
    )  # fmt: skip
    pictures = {domain: Album(data.get(f"{domain}_val") or data.get(f"{domain}_train")) for domain in DOMAINS}
    for album in pictures.values():
        album.add("before", network)
    curves, train_loaders, loaders = Curves(), _train_loaders(config, data), _val_loaders(config, data)
    checkpoints = _checkpoints(config, run, train_loaders)
    own = [
        RandomStates(), monitor, RatesAndTimes(), curves, *_statistics_of_the_target(config, data),
        _watch(config, checkpoints, data),
    ]  # fmt: skip
    trainer = _trainer(
        config,
        run.folder,
        CurveLogger(run, curves),
        max_epochs,
        [*own, *callbacks],
        checkpoints,
        go_on_from is not None,
    )
    if alignment is not None:
        alignment.measure("before", network, trainer.strategy.root_device)
    # Lightning looks for a way to resume a loader; ours is in its sampler
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    with closing(checkpoints):  # whatever the end, its files are called last and best
        try:
            trainer.fit(module, _together(train_loaders), loaders, ckpt_path=go_on_from, weights_only=True)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                "a training batch of one image meets a BatchNorm on a map of one position, which has no variance; raise "
                "data.source.batch_size and data.target.batch_size, or take larger images or crops."
            ) from None
        if not module.ended:  # it went on from its last step, so that Lightning had nothing to do
            module.on_train_end()
        if config.monitor.final_model == "best":
            module.load_state_dict(read(checkpoints.best())["state_dict"])
            with run.beside():  # the chosen weights' scores close every series
                trainer.validate(module, loaders, verbose=False)
        network.to(trainer.strategy.root_device)
        unlabelled = monitor.target_scores | monitor.domain_accuracy
        if KEPT in monitor.metrics():
            unlabelled[KEPT] = monitor.metrics()[KEPT]
        if alignment is not None:
            alignment.measure("after", network, trainer.strategy.root_device)
            unlabelled |= alignment.finish(run, monitor.domain_accuracy.get("da/domain_acc_val"), trainer.global_step)
        outcome = Outcome(
            before={f"{domain}_val": scores for domain, scores in monitor.baseline.items()},
            after=_final_scores(config, network, data, monitor),
            final_step=trainer.global_step,
            unlabelled=unlabelled,
        )
        for album in pictures.values():
            album.add("after", network)
        network.cpu()
        _write_results(config, run, network, data, outcome, pictures, curves.numbers())
    if go_on_from is not None:  # an earlier process may have stored those of its own time
        remove_artifacts(run.store, run.run_id, CHECKPOINTS, {LAST, BEST})
    return outcome


def final_metrics(scores: Mapping[str, Scores], class_names: Sequence[str]) -> dict[str, float]:
    """Scores by set name under the names of a run."""
    return {key: value for name, found in scores.items() for key, value in found.metrics(name, class_names).items()}


def _checkpoints(config: Config, run: TrackedRun, loaders: Mapping[str, DataLoader]) -> Checkpoints:
    every = config.trainer
    return Checkpoints(
        run.folder / CHECKPOINTS, loaders, every.checkpoint_every_n_steps, every.checkpoint_every_minutes,
        every.checkpoints_kept, config.monitor.metric, config.monitor.direction,
        run.persist,  # so that no kill leaves a checkpoint that is ahead of the history
    )  # fmt: skip


def _trainer(
    config: Config,
    folder: Path,
    logger: RunLogger,
    max_epochs: int,
    callbacks: Sequence[pl.Callback],
    checkpoints: Checkpoints,
    resumed: bool,
) -> pl.Trainer:
    on_terminal = config.trainer.enable_progress_bar and sys.stdout.isatty()
    bars: list[pl.Callback] = []
    if config.trainer.enable_progress_bar:
        bars = [RichProgressBar()] if on_terminal else [_EpochLines()]
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,  # pyright: ignore[reportArgumentType]
        gradient_clip_val=config.trainer.gradient_clip_val,
        deterministic="warn" if config.trainer.deterministic else False,
        limit_train_batches=config.trainer.limit_train_batches,
        num_sanity_val_steps=0 if resumed else -1,  # the whole of validation: the warm start's own scores
        logger=logger,
        callbacks=[*callbacks, *bars, checkpoints],
        plugins=[WholeFiles()],
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=str(folder),
    )


def _train_loaders(config: Config, data: Data) -> dict[str, DataLoader]:
    loaders = {}
    for offset, domain in enumerate(DOMAINS):  # each domain has its own order
        dataset = data.get(f"{domain}_train")
        if dataset is not None:
            batch_size = getattr(config.data, domain).batch_size
            seed = config.seed + offset * 2**32
            loaders[domain] = train_loader(dataset, batch_size, f"data.{domain}.train", seed, config.data.num_workers)
    return loaders


def _together(loaders: Mapping[str, DataLoader]) -> CombinedLoader:
    """An epoch is one pass over the larger domain; the smaller one starts again."""
    return CombinedLoader(dict(loaders), mode="max_size_cycle")


def _val_loaders(config: Config, data: Data) -> list:
    """The source's, which needs masks, and the target's, which does not; none without the source's."""
    source, target = data.labelled("source_val"), data.held_out("target")
    if source is None:
        return []
    loaders = [_eval_loader(config, source, "source")]
    return loaders if target is None else [*loaders, _eval_loader(config, target, "target")]


def _statistics_of_the_target(config: Config, data: Data) -> list[pl.Callback]:
    if config.domain_adaptation.batchnorm != "target_stats" or data.get("target_train") is None:
        return []
    return [TargetStatistics(statistics_loader(data.sets["target_train"], config.data.target.batch_size))]


def _watch(config: Config, checkpoints: Checkpoints, data: Data) -> BadNumbers:
    """Keeps weights that are no numbers out of the run; what it ends leaves the last good state as last checkpoint."""
    sets = {domain: data.get(f"{domain}_train") for domain in DOMAINS}
    names = {domain: dataset.name_of for domain, dataset in sets.items() if dataset is not None}
    return BadNumbers(config.trainer.skip_bad_steps, checkpoints.save, names)


def _eval_loader(config: Config, dataset: SegmentationDataset, domain: str):
    return eval_loader(dataset, config.data.eval_batch_size or getattr(config.data, domain).batch_size)


def _final_scores(
    config: Config, network: nn.Module, data: Data, monitor: DomainAdaptationMonitorCallback
) -> dict[str, Scores]:
    """Validation scores of the final model, which are those of the last validation, and its test scores."""
    scores = {f"{domain}_val": found for domain, found in monitor.latest.items()}
    for name in [f"{domain}_test" for domain in DOMAINS] + [f"{domain}_val" for domain in DOMAINS]:
        dataset = data.labelled(name)
        if dataset is not None and name not in scores:
            loader = _eval_loader(config, dataset, name.partition("_")[0])
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
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "class", "iou_before", "iou_after"])
        for name, scores in outcome.after.items():
            before = outcome.before.get(name)
            for index, label in enumerate(class_names):
                earlier = "" if before is None else f"{before.class_iou[index]:.6f}"
                writer.writerow([name, metric_name(label), earlier, f"{scores.class_iou[index]:.6f}"])
            writer.writerow([name, "mean", "" if before is None else f"{before.iou:.6f}", f"{scores.iou:.6f}"])
