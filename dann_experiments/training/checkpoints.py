"""Saves what a killed run needs to go on: at each epoch's end, and in between by steps and minutes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from dann_experiments.data.dataset import SeededOrder
from dann_experiments.training import checkpoint_files as files
from dann_experiments.training import ranks

log = logging.getLogger(__name__)
STEPS_TO_AGREE = 10  # several ranks compare their clocks each so many steps
_KEY = "dann_experiments"  # of our part in a checkpoint


def reopen(folder: Path) -> None:
    """Give checkpoints of a run that ended the names again from which it can go on."""
    files.reopen(folder, lambda content: content[_KEY]["best_step"])


class Checkpoints(Checkpoint):
    """Keeps the newest `keep` checkpoints in `folder`, and the weights with the best `monitor` (None = no best).

    A checkpoint is saved at each epoch's end, after its validation, and inside an epoch every `every_n_steps` optimizer steps
    and after `every_minutes` (None = not). It holds Lightning's state, that of the callbacks, and where each of the training
    `loaders` stands (with a `SeededOrder` as sampler, combined by max_size_cycle), so that no batch is loaded twice.
    `before_saving` is called before a checkpoint is written. Its files are `checkpoint_files`, which the trainer must have as
    its plugin (`WholeFiles`). Of several ranks all take part, and the first writes.
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
        self._saved_at = 0.0
        self._epoch_ended = False
        self._left_out: set[str] = set()
        self._best_steps: dict[int, int | None] = {}  # step of a kept checkpoint -> the best step that it knows

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # validation is about to follow: saved after it
        by_steps = self._every_n_steps is not None and trainer.global_step % self._every_n_steps == 0
        if by_steps or self._time_is_up(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = float(trainer.callback_metrics[self._monitor])
        if self.best_step is None or self._is_better(value):
            self.best_step, self._best_value = trainer.global_step, value
            path = self.folder / f"{files.BEST_STEP}{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, weights_only=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_ended = True
        self.save(trainer)
        self._epoch_ended = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = {
            "epoch": trainer.current_epoch + self._epoch_ended,
            "loaders": {name: self._position(trainer, loader) for name, loader in self._loaders.items()},
            "best_step": self.best_step,
            "best_value": self._best_value,
        }
        states = checkpoint["callbacks"]
        for name in [name for name, state in states.items() if not files.is_plain(state)]:
            del states[name]  # it could not be loaded without running code
            if name not in self._left_out:
                log.warning(
                    "The state of callback %s holds more than tensors and plain values: a resumed run starts it anew.",
                    name,
                )
                self._left_out.add(name)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint[_KEY]
        for name, loader in self._loaders.items():
            assert isinstance(loader.sampler, SeededOrder)
            loader.sampler.go_on_from(state["loaders"][name], state["epoch"])
        best_step = state["best_step"]
        if best_step is not None and files.best_of(self.folder, best_step) is not None:
            self.best_step, self._best_value = best_step, state["best_value"]

    def best(self) -> Path | None:
        """The file of the best weights; None if there is none, or it is damaged."""
        return None if self.best_step is None else files.best_of(self.folder, self.best_step)

    def close(self) -> None:
        """Training has ended, well or not: leave `last.ckpt` and `best.ckpt` alone."""
        files.finish(self.folder, self.best_step)

    def save(self, trainer: pl.Trainer) -> None:
        """Save a checkpoint now: at the end of a step, or in a step that has changed nothing yet and is done again then."""
        step = trainer.global_step
        self._before_saving()
        ranks.average_buffers(trainer.lightning_module)
        trainer.save_checkpoint(self.folder / f"{files.STEP}{step}.ckpt", weights_only=False)
        self._saved_at = time.monotonic()
        self._best_steps[step] = self.best_step
        if trainer.is_global_zero:
            self._remove_old()

    def _remove_old(self) -> None:
        kept = list(files.numbered(self.folder, files.STEP).items())
        for _, path in kept[: -self._keep]:
            files.remove(path)
        # each checkpoint that is kept still has the best weights that it knows; what one of an earlier process knows is not
        # known here, so its best weights stay
        known = [self._best_steps.get(number, 0) or 0 for number, _ in kept[-self._keep :]]
        for number, path in files.numbered(self.folder, files.BEST_STEP).items():
            if number < min(known):
                files.remove(path)

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        if ranks.world() > 1 and trainer.global_step % STEPS_TO_AGREE:
            return False
        up = time.monotonic() - self._saved_at >= self._every_seconds
        return up if math.isinf(self._every_seconds) else ranks.any_of(up, trainer.strategy.root_device)

    def _position(self, trainer: pl.Trainer, loader: DataLoader) -> dict[str, Any]:
        assert isinstance(loader.sampler, SeededOrder)
        assert loader.batch_size is not None
        if self._epoch_ended:
            return loader.sampler.position(None)
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        loaded = (progress.ready - 1) % len(loader) + 1  # of this pass: the smaller domain starts again within an epoch
        to_be_done_again = progress.ready - progress.processed  # pyright: ignore[reportAttributeAccessIssue]
        return loader.sampler.position((loaded - to_be_done_again) * loader.batch_size)

    def _is_better(self, value: float) -> bool:
        if math.isnan(self._best_value):
            return not math.isnan(value)
        return value < self._best_value if self._lower_is_better else value > self._best_value
