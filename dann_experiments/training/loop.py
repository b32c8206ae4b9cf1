"""The training loop of every rank: steps, validations, checkpoints, and the choice of the final weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader

from dann_experiments.config.errors import InputError
from dann_experiments.models.compiling import is_of_compiling
from dann_experiments.training import ranks
from dann_experiments.training.averaging import AverageWeights
from dann_experiments.training.checkpointing import Checkpoints
from dann_experiments.training.guards import KeepsLastGood
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback
from dann_experiments.training.ranks import Rank

log = logging.getLogger(__name__)
ONE_POSITION = (
    "a BatchNorm layer got a training batch with a single value per channel (one image, a feature map of 1 x 1), which has no "
    "variance; raise data.source.batch_size and data.target.batch_size, or use larger images or crops."
)


class Loop:
    """One network's training on one rank.

    `best`: end with the best weights instead of the last. `compiled`: the network is compiled. `beside`: makes the context in
    which the final weights are validated."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: AdaptationModule,
        training: Mapping[str, DataLoader],
        validation: Sequence[DataLoader],
        monitor: DomainAdaptationMonitorCallback,
        checkpoints: Checkpoints,
        rank: Rank,
        best: bool,
        compiled: bool,
        beside: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        average: AverageWeights | None = None,
    ) -> None:
        self.trainer, self.module, self.monitor, self.checkpoints = trainer, module, monitor, checkpoints
        self._training, self._validation = together(training), list(validation)
        self._rank, self._best, self._compiled, self._beside = rank, best, compiled, beside
        self._average = average
        callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        self._last_good = next((one for one in callbacks if isinstance(one, KeepsLastGood)), None)

    @property
    def device(self) -> torch.device:
        """Return the device on which this rank trains."""
        return self.trainer.strategy.root_device

    def run(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` if set, and end with the final weights, whose scores are the last point of every series.

        Raises InputError if a batch is too small for BatchNorm, or if torch cannot compile the network."""
        self._rank.meet(self.device)
        # Lightning looks for a state in the loader; ours is in its sampler
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        if self._rank.world > 1:  # the values that we log are the same on all ranks
            warnings.filterwarnings("ignore", message=".*It is recommended to use .*sync_dist=True.*")
        try:
            self.trainer.fit(self.module, self._training, self._validation, ckpt_path=checkpoint, weights_only=True)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(ONE_POSITION) from None
        except Exception as error:
            if self._compiled and is_of_compiling(error):
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"trainer.compile is true, but torch cannot compile this network here ({reason}); set it to false."
                ) from None
            raise
        if self._average is not None:
            self._average.finish(self.module)
        if not self.module.ended:  # the run resumed from its last step, so Lightning had nothing to do
            self.module.on_train_end()
        stopped = self._last_good is not None and self._last_good.guard.spoken
        if self._best and not (stopped and self.checkpoints.best_step is None):
            self._take_the_best()
        elif stopped:
            self._take_the_last_good()
        self.module.network.to(self.device)

    def _take_the_best(self) -> None:
        best = self.checkpoints.best_weights() if self._rank.is_first else None
        if not ranks.any_of(best is not None, self.device):
            log.warning(
                "monitor.final_model is best, but the best checkpoint is damaged or gone, and no validation took place after "
                "the run was resumed: the run ends with its last weights."
            )
            return
        if best is not None:  # the other ranks get the weights of the first one when validation begins
            self.module.load_state_dict(best)
        self._score_again()

    def _take_the_last_good(self) -> None:
        assert self._last_good is not None
        self.module.load_state_dict(self._last_good.weights, strict=False)  # extra states were not kept
        self._score_again()

    def _score_again(self) -> None:
        with self._beside():
            self.trainer.validate(self.module, self._validation, verbose=False)


def together(loaders: Mapping[str, DataLoader]) -> CombinedLoader:
    """Combine the domains' loaders: an epoch is one pass over the larger domain; the smaller one starts again."""
    return CombinedLoader(dict(loaders), mode="max_size_cycle")
