"""Several processes of one machine that train one network together (data parallel): who is who, and what they tell each other.

Each process, called by its rank 0..W-1, takes its share of every batch; torch's DistributedDataParallel makes gradients their
mean. What is here makes the rest the same everywhere: metrics are means over the ranks, counts are sums, running statistics are
averaged before anybody scores or keeps them. With one process (no process group) every function gives back what it gets.
All goes over the loopback interface, and as tensors, never as pickled objects.
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
    """One process of those that train together."""

    index: int = 0
    world: int = 1
    """How many there are."""
    meeting_point: Path | None = None
    """A file, not there yet, by which they find each other; None for a process alone."""

    @property
    def is_first(self) -> bool:
        """Rank 0 tracks, saves, and does alone what is not training."""
        return self.index == 0

    @property
    def share(self) -> tuple[int, int]:
        """As loaders take it: rank, and how many."""
        return self.index, self.world

    def strategy(self) -> DDPStrategy | str:
        """Lightning's strategy for a trainer of this process, with `devices` = `world`."""
        if self.world == 1:
            return "auto"
        # A forward must not wait for other ranks: validation gives them unequal numbers of batches. See average_buffers.
        # Encoders of less than full depth keep stages that no step uses.
        return DDPStrategy(
            cluster_environment=_OneMachine(self), forward_sync_buffers=False, find_unused_parameters=True
        )

    def meet(self, device: torch.device) -> None:
        """Form the process group, by NCCL on CUDA devices, else gloo; returns when all ranks are here."""
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
    """How many processes train together now."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Which of them this process is."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_of(metrics: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Each metric (one number) as its mean over the ranks, which must all call this with the same names in the same order."""
    if world() == 1 or not metrics:
        return dict(metrics)
    values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in metrics.values()])
    dist.all_reduce(values)
    return dict(zip(metrics, values / world(), strict=True))


def sum_of(value: Tensor) -> Tensor:
    """The sum over the ranks of a tensor of one shape."""
    if world() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def gathered(value: Tensor) -> list[Tensor]:
    """The tensors of all ranks, in their order; they may differ in the length of their first dimension."""
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
    """The texts of all ranks, in their order."""
    own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device)
    return [bytes(part.tolist()).decode() for part in gathered(own)]


def any_of(decision: bool, device: torch.device) -> bool:
    """Whether any rank decides so; waits for all."""
    return decision if world() == 1 else bool(sum_of(torch.tensor(float(decision), device=device)) > 0)


def average_buffers(module: nn.Module) -> None:
    """Make every floating-point buffer, such as BatchNorm's running statistics, the mean over the ranks: each saw its own share
    of the images."""
    if world() == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world()


class _OneMachine(ClusterEnvironment):
    """Tells Lightning that the processes are there already."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"  # asked for, not used: the group is there when Lightning looks for it

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
