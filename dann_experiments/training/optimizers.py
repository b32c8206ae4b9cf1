"""Optimizers and the course of their learning rates, from torch."""

from __future__ import annotations

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
    """`adam`, `adamw` or `sgd` over parameter groups; a group's own `lr` wins over `lr`. `fused`: torch's fused kind, which
    takes a sixth of the time on a CPU (docs/performance.md), and on a CUDA device can leave out a step by itself (decision 10);
    where all parameters are on such devices."""
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    kernel = True if fused and kinds <= {"cpu", "cuda"} else None
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=kernel)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=kernel)


def order_states(optimizer: Optimizer) -> None:
    """Give each state of a parameter's shape the parameter's order in memory. A checkpoint brings the order that it was saved
    with, which may be another (channels last on a CPU, not on a GPU), and torch's fused kernels on a CPU take both to be the
    same: they would mix up the values, silently (torch 2.15)."""
    for parameter, states in optimizer.state.items():
        for name, value in states.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                states[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def annealing(progress: float) -> float:
    """1 / (1 + alpha p)^beta with alpha = 10, beta = 0.75 (Ganin & Lempitsky 2015, section 4), p in 0..1."""
    return (1.0 + 10.0 * progress) ** -0.75


def build_scheduler(optimizer: Optimizer, schedule: str, total_steps: int) -> LRScheduler | None:
    """Stepped every batch; scales each group from its own learning rate. `constant` gives None."""
    if schedule == "annealed":
        return LambdaLR(optimizer, lambda step: annealing(step / total_steps))
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    if schedule == "one_cycle":
        # the momentum stays as set: cycling it would undo betas chosen for adversarial training
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=max(total_steps, 2), cycle_momentum=False)
    return None
