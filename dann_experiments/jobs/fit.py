"""The part of a training that every rank takes part in: steps, validations, checkpoints, and the choice of the final weights."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.config import Config, InputError
from dann_experiments.data.dataset import SegmentationDataset, eval_loader, train_loader
from dann_experiments.jobs import setup
from dann_experiments.jobs.curves import CURVES, CurveLogger, Curves
from dann_experiments.jobs.resume import CHECKPOINTS
from dann_experiments.jobs.setup import Data
from dann_experiments.models.batchnorm import statistics_loader
from dann_experiments.models.compiling import compile_parts, is_of_compiling
from dann_experiments.models.networks import keeps_channels_last
from dann_experiments.models.passes import choose
from dann_experiments.models.taps import Tap
from dann_experiments.tracking.run import TrackedRun
from dann_experiments.training import ranks
from dann_experiments.training.bad_numbers import BadNumbers
from dann_experiments.training.checkpoint_files import WholeFiles
from dann_experiments.training.checkpoints import Checkpoints
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.monitor import (
    DOMAINS,
    DomainAdaptationMonitorCallback,
    RatesAndTimes,
    TargetStatistics,
)
from dann_experiments.training.random_states import RandomStates
from dann_experiments.training.ranks import Rank
from dann_experiments.workers.processes import available_cores, visible_gpus

log = logging.getLogger(__name__)
MOST_WORKERS = 4  # a loader, where they are chosen from the machine
ONE_POSITION = (
    "a training batch of one image meets a BatchNorm on a map of one position, which has no variance; raise "
    "data.source.batch_size and data.target.batch_size, or take larger images or crops."
)


class Fit:
    """One network's training on one rank; `run` is None on all but the first, which tracks and shows progress.

    `pretraining`: by the settings of the source model's training. `resumed`: `go` will be given a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        network: nn.Module,
        method: DomainAdaptationMethod,
        taps: Sequence[Tap],
        data: Data,
        folder: Path,
        *,
        pretraining: bool,
        resumed: bool,
        rank: Rank,
        run: TrackedRun | None = None,
        callbacks: Sequence[pl.Callback] = (),
    ) -> None:
        self._config, self._rank, self._run = config, rank, run
        optimizer, epochs = config.optimizer, config.trainer.max_epochs
        if pretraining:
            optimizer, epochs = config.pretraining.optimizer, config.pretraining.max_epochs
        self.monitor = DomainAdaptationMonitorCallback(
            config.model.classes, config.class_names, config.monitor.log_every_n_epochs,
            config.monitor.forgetting_threshold, config.data.ignore_index,
        )  # fmt: skip
        self.curves = Curves()
        loaders = train_loaders(config, data, rank)
        self._loaders = together(loaders)
        self._val_loaders = _val_loaders(config, data, rank)
        self.checkpoints = _checkpoints(config, folder, loaders, (lambda: None) if run is None else run.persist)
        own = [
            RandomStates(), self.monitor, RatesAndTimes(), self.curves, *_statistics_of_the_target(config, data),
            _watch(config, self.checkpoints, data),
        ]  # fmt: skip
        on_terminal = run is not None and config.trainer.enable_progress_bar and sys.stdout.isatty()
        bars: list[pl.Callback] = []
        if run is not None and config.trainer.enable_progress_bar:
            bars = [RichProgressBar()] if on_terminal else [_EpochLines()]
        self.trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator=config.trainer.accelerator,
            devices=rank.world,
            strategy=rank.strategy(),
            precision=config.trainer.precision,  # pyright: ignore[reportArgumentType]
            gradient_clip_val=config.trainer.gradient_clip_val,
            deterministic="warn" if config.trainer.deterministic else False,
            limit_train_batches=config.trainer.limit_train_batches,
            num_sanity_val_steps=0 if resumed else -1,  # the whole of validation: the warm start's own scores
            logger=False if run is None else CurveLogger(run, self.curves),
            callbacks=[*own, *callbacks, *bars, self.checkpoints],
            plugins=[WholeFiles()],
            enable_progress_bar=on_terminal,
            enable_model_summary=False,
            log_every_n_steps=1,
            default_root_dir=str(folder),
            use_distributed_sampler=False,  # our loaders take their rank's share themselves
        )
        channels_last = keeps_channels_last(config.trainer.channels_last, network, self.device)
        self.module = AdaptationModule(
            network, method, taps, setup.optimizer_maker(optimizer, config.trainer.precision), optimizer.schedule,
            config.data.ignore_index, config.domain_adaptation.batchnorm, channels_last,
        )  # fmt: skip
        if method.uses_target and self.module.taps:
            self.module.passes = choose(
                network, self.module.taps, config.domain_adaptation.batchnorm, config.model.in_channels
            )
        if config.trainer.compile:
            compile_parts(network, {tap.module for tap in self.module.taps})

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        return self.trainer.strategy.root_device

    def go(self, go_on_from: Path | None) -> None:
        """Train, from a checkpoint if one is given, and end with the weights that `monitor.final_model` names, whose scores
        close every series."""
        self._rank.meet(self.device)
        # Lightning looks for a way to resume a loader; ours is in its sampler
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        if self._rank.world > 1:  # what we log is the same on all ranks
            warnings.filterwarnings("ignore", message=".*It is recommended to use .*sync_dist=True.*")
        try:
            self.trainer.fit(self.module, self._loaders, self._val_loaders, ckpt_path=go_on_from, weights_only=True)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(ONE_POSITION) from None
        except Exception as error:
            if self._config.trainer.compile and is_of_compiling(error):
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"trainer.compile is true, but torch cannot compile this network here ({reason}); set it to false."
                ) from None
            raise
        if not self.module.ended:  # it went on from its last step, so that Lightning had nothing to do
            self.module.on_train_end()
        if self._config.monitor.final_model == "best":
            self._take_the_best()
        self.module.network.to(self.device)

    def _take_the_best(self) -> None:
        best = self.checkpoints.best_weights() if self._rank.is_first else None
        if not ranks.any_of(best is not None, self.device):
            log.warning(
                "monitor.final_model is best, but the best checkpoint is damaged or gone, and no validation came after the "
                "run went on: it ends with its last weights."
            )
            return
        if best is not None:  # the other ranks get the first one's weights when validation begins
            self.module.load_state_dict(best)
        with contextlib.nullcontext() if self._run is None else self._run.beside():
            self.trainer.validate(self.module, self._val_loaders, verbose=False)


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


def _checkpoints(
    config: Config, folder: Path, loaders: Mapping[str, DataLoader], persist: Callable[[], object]
) -> Checkpoints:
    every = config.trainer
    return Checkpoints(
        folder / CHECKPOINTS, loaders, every.checkpoint_every_n_steps, every.checkpoint_every_minutes,
        every.checkpoints_kept, config.monitor.metric, config.monitor.direction,
        persist,  # so that no kill leaves a checkpoint that is ahead of the history
    )  # fmt: skip


def train_loaders(config: Config, data: Data, rank: Rank | None = None) -> dict[str, DataLoader]:
    """Of each domain, or a rank's share of it."""
    loaders = {}
    for offset, domain in enumerate(DOMAINS):  # each domain has its own order
        dataset = data.get(f"{domain}_train")
        if dataset is not None:
            loaders[domain] = train_loader(
                dataset, getattr(config.data, domain).batch_size, f"data.{domain}.train", config.seed + offset * 2**32,
                (rank or Rank()).share, **loading(config),
            )  # fmt: skip
    return loaders


def together(loaders: Mapping[str, DataLoader]) -> CombinedLoader:
    """An epoch is one pass over the larger domain; the smaller one starts again."""
    return CombinedLoader(dict(loaders), mode="max_size_cycle")


def _val_loaders(config: Config, data: Data, rank: Rank) -> list[DataLoader]:
    """The source's, which needs masks, and the target's, which does not; none without the source's."""
    source, target = data.labelled("source_val"), data.held_out("target")
    if source is None:
        return []
    loaders = [validation_loader(config, source, "source", rank)]
    return loaders if target is None else [*loaders, validation_loader(config, target, "target", rank)]


def validation_loader(
    config: Config, dataset: SegmentationDataset, domain: str, rank: Rank | None = None
) -> DataLoader:
    """Every item of a set of `domain`, or a rank's share of it, in the batches of validation."""
    batch_size = config.data.eval_batch_size or getattr(config.data, domain).batch_size
    return eval_loader(dataset, batch_size, (rank or Rank()).share, **loading(config))


def loading(config: Config) -> dict[str, Any]:
    """How loaders bring what they load: by how many processes, and pinned in memory, from which a GPU copies by itself."""
    on_gpu = bool(visible_gpus(config.trainer.accelerator))
    workers = config.data.num_workers
    if workers is None:
        cores = available_cores() // config.trainer.devices
        workers = min(MOST_WORKERS, cores // (2 * len(DOMAINS))) if on_gpu else 0
    return {"num_workers": workers, "pin_memory": on_gpu}


def _statistics_of_the_target(config: Config, data: Data) -> list[pl.Callback]:
    if config.domain_adaptation.batchnorm != "target_stats" or data.get("target_train") is None:
        return []
    return [TargetStatistics(statistics_loader(data.sets["target_train"], config.data.target.batch_size))]


def _watch(config: Config, checkpoints: Checkpoints, data: Data) -> BadNumbers:
    """Keeps weights that are no numbers out of the run; what it ends leaves the last good state as last checkpoint."""
    sets = {domain: data.get(f"{domain}_train") for domain in DOMAINS}
    names = {domain: dataset.name_of for domain, dataset in sets.items() if dataset is not None}
    return BadNumbers(config.trainer.skip_bad_steps, checkpoints.save, names)
