"""Finds the largest batch sizes with which a training step fits into the memory of a GPU (`trainer.auto_batch_size`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dann_experiments.adaptation.method import DomainAdaptationMethod, Progress
from dann_experiments.models.taps import Tap
from dann_experiments.names import DOMAINS, Domain
from dann_experiments.training.memory import is_out_of_memory
from dann_experiments.training.module import AdaptationModule

MOST_TAKEN = 0.9  # of the GPU's memory; the rest is a reserve for what a step on noise does not show
MakeModule = Callable[[nn.Module, DomainAdaptationMethod], AdaptationModule]


def largest_factor(fits: Callable[[int], bool], most: int) -> int:
    """Return the last of 1, 2, 4, ... up to `most` (at least 1 is tried) that fits; 0 if none does."""
    found, factor = 0, 1
    while factor <= max(most, 1) and fits(factor):
        found, factor = factor, 2 * factor
    return found


def domains_of_a_step(method: DomainAdaptationMethod, taps: Sequence[Tap]) -> Sequence[Domain]:
    """Return the domains whose images a training step uses: source only if the method does not use the target."""
    return DOMAINS if method.uses_target and (taps or method.needs) else ("source",)


def fits_on_gpu(step_fits: Callable[[], bool]) -> bool:
    """Return whether the step ran and left part of the GPU's memory free."""
    torch.cuda.reset_peak_memory_stats()
    fine = step_fits()
    return fine and torch.cuda.max_memory_reserved() <= MOST_TAKEN * torch.cuda.get_device_properties(0).total_memory


def step_fits(
    make_module: MakeModule, network: nn.Module, method: DomainAdaptationMethod, shapes: Mapping[Domain, torch.Size],
    sizes: Mapping[Domain, int], device: torch.device, precision: str = "32-true",
) -> bool:  # fmt: skip
    """Return whether a training step (forward, backward, optimizer) runs without running out of memory.

    `shapes`: (B, h, w) of each domain's images; `sizes`: images per batch. The step uses noise as images, and copies of network
    and method; these and the random states are not changed."""
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            module = make_module(copy.deepcopy(network), copy.deepcopy(method)).to(device).train()
            # a user's own method may create there what its loss needs
            module.method.on_train_start(module.network)
            batch = {
                domain: {
                    "image": torch.randn(size, *shapes[domain], device=device),
                    "domain": torch.full((size,), DOMAINS.index(domain), device=device),
                }
                for domain, size in sizes.items()
            }
            for part in batch.values():  # the target's are needed by weak labels alone, and take little
                part["mask"] = torch.zeros(part["image"][:, 0].shape, dtype=torch.int64, device=device)
            optimizer = module.make_optimizer(module.param_groups())
            half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
            with torch.autocast(device.type, half, enabled=half is not None):
                outputs = module.step_outputs({str(domain): part for domain, part in batch.items()})
                loss, _ = module.segmentation(outputs.source_logits, outputs.source_labels)
                share = module.method.loss(outputs, Progress(0, 1, 0, 1)).differentiated
            (loss if share is None else loss + share).backward()
            optimizer.step()
        return True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        module = batch = optimizer = outputs = loss = share = None  # pyright: ignore
        if device.type == "cuda":
            torch.cuda.empty_cache()
