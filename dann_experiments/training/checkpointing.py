"""Saves what a killed run needs to resume: at the end of each epoch, and every few steps or minutes within it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from dann_experiments.checkpoints import files
from dann_experiments.config.errors import NotWritten
from dann_experiments.data.loaders import SeededOrder
from dann_experiments.training import ranks

log = logging.getLogger(__name__)
STEPS_TO_AGREE = 10  # number of steps after which several ranks compare their clocks


class Checkpoints(Checkpoint):
    """Keeps the newest `keep` checkpoints in `folder`, and the weights with the best metric `monitor` (None = no best weights).

    A checkpoint is saved at the end of each epoch, after its validation, and within an epoch every `every_n_steps` optimizer
    steps and every `every_minutes` (None = never). It holds Lightning's state, that of the callbacks, and the position of each
    of the training `loaders` (with a `SeededOrder` as sampler, combined by max_size_cycle), so that no batch is loaded twice.
    `before_saving` is called before a checkpoint is written; `may_be_best` says whether the last validation counts for the best
    weights. The trainer must have the plugin `checkpoints.files.WholeFiles`. All
    ranks take part, and the first one writes.

    If the disk is full or not writable, training continues: the previous checkpoint is kept, the next one is tried at its time,
    and the best weights stay in memory until then.
    """

    def __init__(
        self,
        folder: Path,
        loaders: Mapping[str, DataLoader],
        every_n_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 2,
        monitor: str | None = None,
        mode: str = "max",
        before_saving: Callable[[], object] = lambda: None,
        as_scored: Callable[[pl.LightningModule], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        may_be_best: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder = folder
        self.best_step: int | None = None
        """Optimizer steps of the best weights."""
        self._best_value = math.nan
        self._loaders = loaders
        self._every_n_steps = every_n_steps
        self._every_seconds = math.inf if every_minutes is None else 60 * every_minutes
        self._keep = keep
        self._monitor = monitor
        self._lower_is_better = mode == "min"
        self._before_saving = before_saving
        self._as_scored, self._may_be_best = as_scored, may_be_best
        self._saved_at = 0.0
        self._last_step: int | None = None
        self._epoch_ended = False
        self._left_out: set[str] = set()
        self._refused = False  # whether the last write failed
        self._waiting: tuple[Path, dict[str, Any]] | None = None  # best weights that were not written, and their file
        self._best_steps: dict[int, int | None] = {}  # step of a kept checkpoint -> the best step recorded in it

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = time.monotonic()
        self._last_step = trainer.global_step  # no step is done yet, though the first of its batches may be

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # validation comes next; the checkpoint is saved after it
        if trainer.global_step == self._last_step:
            return  # within a step of several batches (accumulate_grad_batches)
        self._last_step = trainer.global_step
        by_steps = self._every_n_steps is not None and trainer.global_step % self._every_n_steps == 0
        if by_steps or self._time_is_up(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = float(trainer.callback_metrics[self._monitor])
        if self._may_be_best() and (self.best_step is None or self._is_better(value)):
            self.best_step, self._best_value = trainer.global_step, value
            path = self.folder / f"{files.BEST_STEP}{trainer.global_step}.ckpt"
            self._waiting = None
            with self._as_scored(pl_module):
                if not self._write(trainer, path, weights_only=True):
                    state = _copied(pl_module.state_dict())
                    facts = {"pytorch-lightning_version": pl.__version__, "epoch": trainer.current_epoch}
                    self._waiting = path, {**facts, "global_step": trainer.global_step, "state_dict": state}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_ended = True
        self.save(trainer)
        self._epoch_ended = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[files.OWN] = {
            "epoch": trainer.current_epoch + self._epoch_ended,
            "loaders": {name: self._position(trainer, loader) for name, loader in self._loaders.items()},
            "best_step": self.best_step,
            "best_value": self._best_value,
        }
        states = checkpoint["callbacks"]
        for name in [name for name, state in states.items() if not files.is_plain(state)]:
            del states[name]  # it could not be loaded without executing code from the file
            if name not in self._left_out:
                log.warning(
                    "The state of callback %s holds more than tensors and plain values; a resumed run starts it afresh.",
                    name,
                )
                self._left_out.add(name)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint[files.OWN]
        for name, loader in self._loaders.items():
            assert isinstance(loader.sampler, SeededOrder)
            loader.sampler.go_on_from(state["loaders"][name], state["epoch"])
        best_step = state["best_step"]
        if best_step is not None and files.best_of(self.folder, best_step) is not None:
            self.best_step, self._best_value = best_step, state["best_value"]

    def best_weights(self) -> dict[str, Any] | None:
        """Return the state dict of the best weights; None if there are none, or their file is damaged or gone."""
        if self._waiting is not None:
            return self._waiting[1]["state_dict"]
        found = None if self.best_step is None else files.best_of(self.folder, self.best_step)
        return None if found is None else files.read(found)["state_dict"]

    def close(self) -> None:
        """Leave only `last.ckpt` and `best.ckpt` when training has ended, successfully or not. Logs disk errors, raises none: the
        error that ended training is the one to report, and a run also resumes from files with their earlier names."""
        best_step = self.best_step
        try:
            self._write_waiting()
        except NotWritten as error:
            best_step = max(files.numbered(self.folder, files.BEST_STEP), default=None)
            log.warning("%s The best weights that were saved before are kept instead.", error)
        try:
            files.finish(self.folder, best_step)
        except OSError as error:
            log.warning("Checkpoints in %s could not be renamed: %s.", self.folder, error)

    def save(self, trainer: pl.Trainer) -> None:
        """Save a checkpoint now: at the end of a step, or within a step that has changed nothing yet and will be repeated."""
        step = trainer.global_step
        ranks.average_buffers(trainer.lightning_module)
        written = self._write(trainer, self.folder / f"{files.STEP}{step}.ckpt")
        self._saved_at = time.monotonic()  # also if it failed: the next step must not try again
        if not written:
            return
        self._best_steps[step] = self.best_step
        if trainer.is_global_zero:
            self._remove_old()

    def _remove_old(self) -> None:
        kept = list(files.numbered(self.folder, files.STEP).items())
        for _, path in kept[: -self._keep]:
            files.remove(path)
        # keep the best weights that each kept checkpoint refers to; for checkpoints of an earlier process these are not known
        # here, so no best weights are removed then
        known = [self._best_steps.get(number, 0) or 0 for number, _ in kept[-self._keep :]]
        for number, path in files.numbered(self.folder, files.BEST_STEP).items():
            if number < min(known):
                files.remove(path)

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        if ranks.world() > 1 and trainer.global_step % STEPS_TO_AGREE:
            return False
        up = time.monotonic() - self._saved_at >= self._every_seconds
        return up if math.isinf(self._every_seconds) else ranks.any_of(up, trainer.strategy.root_device)

    def _write(self, trainer: pl.Trainer, path: Path, weights_only: bool = False) -> bool:
        """Write a checkpoint and return whether that succeeded; logs the first failure, and when writing works again."""
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, files.WholeFiles)
        io.problem = None
        if not weights_only:
            try:  # a checkpoint must be ahead neither of the history nor of the best weights that it refers to
                self._before_saving()
                self._write_waiting()
            except NotWritten as error:
                io.problem = error
        trainer.save_checkpoint(path, weights_only=weights_only)
        if io.problem is not None and not self._refused:
            newest = max(files.numbered(self.folder, files.STEP), default=None)
            kept = "none was saved before" if newest is None else f"the one of step {newest} is kept"
            log.warning("%s Training continues without this checkpoint (%s); the next is tried.", io.problem, kept)
        elif io.problem is None and self._refused:
            log.warning("%s was written: checkpoints are being saved again.", path)
        self._refused = io.problem is not None
        return not self._refused

    def _write_waiting(self) -> None:
        if self._waiting is not None:
            path, content = self._waiting
            files.write(content, path)
            self._waiting = None

    def _position(self, trainer: pl.Trainer, loader: DataLoader) -> dict[str, Any]:
        assert isinstance(loader.sampler, SeededOrder)
        assert loader.batch_size is not None
        if self._epoch_ended:
            return loader.sampler.position(None)
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        loaded = (progress.ready - 1) % len(loader) + 1  # in this pass: the smaller domain starts again within an epoch
        to_be_done_again = progress.ready - progress.processed  # pyright: ignore[reportAttributeAccessIssue]
        return loader.sampler.position((loaded - to_be_done_again) * loader.batch_size)

    def _is_better(self, value: float) -> bool:
        if math.isnan(self._best_value):
            return not math.isnan(value)
        return value < self._best_value if self._lower_is_better else value > self._best_value


def _copied(state: Any) -> Any:
    """Return a copy of a state on the CPU; an extra state, such as that of a companion with a teacher, may be nested."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    return type(state)(map(_copied, state)) if isinstance(state, list | tuple) else state
