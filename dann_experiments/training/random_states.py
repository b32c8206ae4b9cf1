"""Sets seeds, saves the random states of Python, NumPy, torch and CUDA in checkpoints, and restores them on resuming."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from dann_experiments.training import ranks


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Use `threads` torch threads in the block (None = as before)."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def seeded(seed: int, threads: int | None = None) -> Iterator[None]:
    """Seed all random generators, and use `threads` torch threads in the block (None = as before). The number of threads and the
    determinism settings are restored at its end."""
    exact: Any = torch.utils.deterministic
    filling = exact.fill_uninitialized_memory
    # it would fill each new tensor before use, only to make reading uninitialized memory visible
    exact.fill_uninitialized_memory = False
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with torch_threads(threads):
            reseed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        exact.fill_uninitialized_memory = filling


def reseed(seed: int) -> None:
    """Set all random states to those of `seed`, independent of what ran before."""
    pl.seed_everything(seed, workers=True, verbose=False)


class RandomStates(pl.Callback):
    """Restores the random states of a checkpoint. It must be the first callback, so that no other draws numbers before it."""

    def __init__(self) -> None:
        self._to_restore: Mapping[str, Any] | None = None
        self._device = torch.device("cpu")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = trainer.strategy.root_device

    def state_dict(self) -> dict[str, Any]:
        return random_states() | {"of_ranks": self._of_ranks()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._to_restore = state_dict

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore()  # when training resumes within an epoch, on_train_epoch_start is not called again

    def _restore(self) -> None:
        if self._to_restore is not None:
            restore(self._to_restore)
            own = self._to_restore.get("of_ranks")
            if own and ranks.world() == len(own):
                torch_state, cuda_state = own[ranks.index()]
                torch.set_rng_state(torch_state)
                if self._device.type == "cuda":
                    torch.cuda.set_rng_state(cuda_state, self._device)
            self._to_restore = None

    def _of_ranks(self) -> list[list[torch.Tensor]]:
        """Return the states of torch and CUDA of each rank; all other states are equal on all ranks. Empty for a single rank."""
        if ranks.world() == 1:
            return []
        on_cuda = self._device.type == "cuda"
        own = [torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_cuda else torch.empty(0)]
        found = [ranks.gathered(state.to(torch.uint8).to(self._device)) for state in own]
        return [[state.cpu() for state in pair] for pair in zip(*found, strict=True)]


def random_states() -> dict[str, Any]:
    """Return all states, as tensors and plain values."""
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
    """Restore what `random_states` returned; CUDA's states only if the number of devices is the same."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(("MT19937", numpy["numbers"].numpy().astype(np.uint32), *numpy["rest"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
