"""Several processes of one machine that train one network together (data parallel): their ranks, and what they exchange.

Each process, identified by its rank 0..W-1, takes its share of every batch; torch's DistributedDataParallel averages the
gradients. This module makes everything else equal in all processes: metrics are means over the ranks, counts are sums, and
running statistics are averaged before they are scored or saved. With one process (no process group) every function returns its
argument. All exchange uses the loopback interface, and tensors, never pickled objects.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn


@dataclass(frozen=True)
class Rank:
    """One of the processes that train together."""

    index: int = 0
    world: int = 1
    """Number of processes."""
    meeting_point: Path | None = None
    """A file, not existing yet, by which the processes find each other; None for a single process."""

    @property
    def is_first(self) -> bool:
        """True for rank 0, which tracks, saves, and does everything that is not training."""
        return self.index == 0

    @property
    def share(self) -> tuple[int, int]:
        """Rank and number of ranks, as loaders expect them."""
        return self.index, self.world

    def strategy(self) -> DDPStrategy | str:
        """Return Lightning's strategy for a trainer of this process, with `devices` = `world`."""
        if self.world == 1:
            return "auto"
        # A forward pass must not wait for other ranks: in validation they have unequal numbers of batches. See average_buffers.
        # Encoders of less than full depth keep stages that no step uses: find_unused_parameters.
        return DDPStrategy(
            cluster_environment=_OneMachine(self), forward_sync_buffers=False, find_unused_parameters=True
        )

    def meet(self, device: torch.device) -> None:
        """Form the process group, with NCCL on CUDA devices, else with gloo; returns when all ranks have joined."""
        if self.world == 1:
            return
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{self.meeting_point}", rank=self.index,
            world_size=self.world, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Return the number of processes that train together now."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_of(metrics: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return each metric (one number) as its mean over the ranks, which must all call this with the same names in one order."""
    if world() == 1 or not metrics:
        return dict(metrics)
    values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in metrics.values()])
    dist.all_reduce(values)
    return dict(zip(metrics, values / world(), strict=True))


def sum_of(value: Tensor) -> Tensor:
    """Return the sum over the ranks of a tensor, which must have the same shape on each."""
    if world() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def gathered(value: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, in rank order; they may differ in the length of their first dimension."""
    if world() == 1:
        return [value]
    lengths = torch.zeros(world(), dtype=torch.int64, device=value.device)
    lengths[dist.get_rank()] = len(value)
    dist.all_reduce(lengths)
    longest = int(lengths.max())
    padded = value.new_zeros((longest, *value.shape[1:]))
    padded[: len(value)] = value
    found = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(found, padded)
    return [part[:length] for part, length in zip(found, lengths.tolist(), strict=True)]


def gathered_texts(text: str, device: torch.device) -> list[str]:
    """Return the texts of all ranks, in rank order."""
    own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device)
    return [bytes(part.tolist()).decode() for part in gathered(own)]


def any_of(decision: bool, device: torch.device) -> bool:
    """Return whether `decision` is true on any rank; waits for all ranks."""
    return decision if world() == 1 else bool(sum_of(torch.tensor(float(decision), device=device)) > 0)


def average_buffers(module: nn.Module) -> None:
    """Replace every floating-point buffer, such as BatchNorm's running statistics, by its mean over the ranks, because each rank
    saw only its own share of the images."""
    if world() == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world()


class _OneMachine(ClusterEnvironment):
    """Tells Lightning that the processes exist already."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"  # read but not used: the process group exists before Lightning needs it

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._rank.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._rank.index

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._rank.index

    def node_rank(self) -> int:
        return 0
