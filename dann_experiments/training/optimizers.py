"""Builds torch's optimizers and learning rate schedulers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR


def build_optimizer(
    groups: list[dict[str, Any]],
    name: str,
    lr: float,
    betas: tuple[float, float],
    momentum: float,
    weight_decay: float,
    fused: bool = False,
) -> Optimizer:
    """Build `adam`, `adamw` or `sgd` for parameter groups; a group's own `lr` takes precedence over `lr`.

    `fused`: use torch's fused implementation if all parameters are on CPU or CUDA devices. It takes a sixth of the time on a
    CPU (docs/performance.md), and can skip a step by itself on a CUDA device (decision 10)."""
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    kernel = True if fused and kinds <= {"cpu", "cuda"} else None
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=kernel)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=kernel)


def order_states(optimizer: Optimizer) -> None:
    """Give each optimizer state of a parameter's shape the memory format of the parameter.

    States loaded from a checkpoint have the memory format that they were saved with, which may differ (channels last on a CPU,
    not on a GPU). Torch's fused kernels on a CPU assume that both are the same, and would silently mix up values (torch 2.15)."""
    for parameter, states in optimizer.state.items():
        for name, value in states.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                states[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def annealing(progress: float) -> float:
    """Return 1 / (1 + alpha p)^beta with alpha = 10, beta = 0.75, for progress p in 0..1 (Ganin & Lempitsky 2015, section 4)."""
    return (1.0 + 10.0 * progress) ** -0.75


@dataclass(frozen=True)
class LearningRates:
    """How all learning rates change from step to step."""

    schedule: str = "constant"
    """constant, annealed, one_cycle, cosine or polynomial; plateau is constant here (see `Plateau`)."""
    warmup_steps: int = 0
    """Steps in which the rates rise linearly; not for one_cycle."""
    power: float = 0.9
    """Exponent of polynomial."""

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor of the learning rates in the step after `step` steps; not for one_cycle."""
        progress = min(step / total_steps, 1.0)
        shape = {
            "annealed": lambda: annealing(progress),
            "cosine": lambda: (1 + math.cos(math.pi * progress)) / 2,
            "polynomial": lambda: (1 - progress) ** self.power,
        }.get(self.schedule, lambda: 1.0)
        return min((step + 1) / (self.warmup_steps + 1), 1.0) * shape()


def build_scheduler(optimizer: Optimizer, rates: LearningRates, total_steps: int) -> LRScheduler | None:
    """Build a scheduler to be stepped once per optimizer step, which scales each group's own learning rate; None if the rates
    stay as they are."""
    schedule = rates.schedule
    if rates.warmup_steps or schedule in ("annealed", "polynomial"):
        return LambdaLR(optimizer, lambda step: rates.factor(step, total_steps))
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    if schedule == "one_cycle":
        # the momentum is not cycled: that would override betas chosen for adversarial training
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=max(total_steps, 2), cycle_momentum=False)
    return None
