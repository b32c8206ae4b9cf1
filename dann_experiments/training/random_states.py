"""The random states of python, numpy, torch and CUDA: kept in a checkpoint, put back before the first step after it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch


class RandomStates(pl.Callback):
    """Must be the first callback: it puts the states back before anybody else draws."""

    def __init__(self) -> None:
        self._to_restore: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._to_restore = state_dict

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore()  # training goes on inside an epoch, whose start is not told again

    def _restore(self) -> None:
        if self._to_restore is not None:
            restore(self._to_restore)
            self._to_restore = None


def random_states() -> dict[str, Any]:
    """All states, as tensors and plain values."""
    version, words, gauss = random.getstate()
    _, numbers, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "numbers": torch.from_numpy(np.asarray(numbers).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave; CUDA's where there are as many devices as there were."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(("MT19937", numpy["numbers"].numpy().astype(np.uint32), *numpy["rest"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
