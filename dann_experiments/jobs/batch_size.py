"""Finds the largest batches whose training step fits into the memory of a GPU (`trainer.auto_batch_size`)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dann_experiments.adaptation.method import DomainAdaptationMethod, Progress
from dann_experiments.config import Config, InputError, replace
from dann_experiments.jobs import setup
from dann_experiments.jobs.memory import is_out_of_memory
from dann_experiments.jobs.setup import Data
from dann_experiments.models.networks import keeps_channels_last
from dann_experiments.models.taps import Tap
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.monitor import DOMAINS
from dann_experiments.training.scores import segmentation_loss
from dann_experiments.workers.processes import visible_gpus

log = logging.getLogger(__name__)
MOST_TAKEN = 0.9  # of the GPU's memory: the rest is for what a step on noise does not show


def with_batch_sizes(
    config: Config, network: nn.Module, method: DomainAdaptationMethod, taps: Sequence[Tap], data: Data
) -> Config:
    """The settings with both domains' batches doubled as often as a training step fits, and no more than the smaller set has
    images; as they are without `trainer.auto_batch_size`. Network, method and random states stay as they are. Raises
    InputError without a GPU, and where not even the given batches fit."""
    if not config.trainer.auto_batch_size:
        return config
    if not visible_gpus(config.trainer.accelerator):
        raise InputError(
            "trainer.auto_batch_size is true, but there is no GPU (trainer.accelerator "
            f"{config.trainer.accelerator}): on a CPU the cores bound what a batch is worth, not memory. Set it to false."
        )
    given = {domain: getattr(config.data, domain).batch_size for domain in domains_of_a_step(method, taps)}
    most = min(len(data.sets[f"{domain}_train"]) // size for domain, size in given.items())
    device = torch.device("cuda")

    def fits(factor: int) -> bool:
        torch.cuda.reset_peak_memory_stats()
        sizes = {domain: factor * size for domain, size in given.items()}
        fine = step_fits(config, network, method, taps, data, sizes, device)
        return (
            fine and torch.cuda.max_memory_reserved() <= MOST_TAKEN * torch.cuda.get_device_properties(0).total_memory
        )

    factor = largest_factor(fits, most)
    if factor == 0:
        raise InputError(f"trainer.auto_batch_size: not even the given batches fit into the GPU's memory ({given}).")
    sizes = {f"data.{domain}.batch_size": factor * size for domain, size in given.items()}
    log.info("trainer.auto_batch_size: %s.", ", ".join(f"{key} {size}" for key, size in sizes.items()))
    return replace(config, sizes | {"trainer.auto_batch_size": False})  # the run says what it took


def largest_factor(fits: Callable[[int], bool], most: int) -> int:
    """The last of 1, 2, 4, ... up to `most` (at least 1 is tried) that fits; 0 if none does."""
    found, factor = 0, 1
    while factor <= max(most, 1) and fits(factor):
        found, factor = factor, 2 * factor
    return found


def domains_of_a_step(method: DomainAdaptationMethod, taps: Sequence[Tap]) -> Sequence[str]:
    """The domains whose images a training step sees: a method that does not look at the target needs no images of it."""
    return DOMAINS if method.uses_target and taps else ("source",)


def step_fits(
    config: Config, network: nn.Module, method: DomainAdaptationMethod, taps: Sequence[Tap], data: Data,
    sizes: Mapping[str, int], device: torch.device,
) -> bool:  # fmt: skip
    """Whether a training step (forwards, backward, optimizer) of batches of these sizes, by domain, on noise of the images'
    size and on copies of network and method, ends without running out of memory."""
    side = {domain: data.sets[f"{domain}_train"][0]["image"].shape for domain in sizes}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            module = AdaptationModule(
                copy.deepcopy(network), copy.deepcopy(method), taps,
                setup.optimizer_maker(config.optimizer, config.trainer.precision), ignore_index=config.data.ignore_index,
                batchnorm=config.domain_adaptation.batchnorm,
                channels_last=keeps_channels_last(config.trainer.channels_last, network, device),
            ).to(device).train()  # fmt: skip
            # a method of the user's own may make there what its loss needs
            module.method.on_train_start(module.network)
            batch = {
                domain: {"image": torch.randn(size, *side[domain], device=device)} for domain, size in sizes.items()
            }
            batch["source"]["mask"] = torch.zeros(
                sizes["source"], *side["source"][1:], dtype=torch.int64, device=device
            )
            optimizer = module.make_optimizer(
                [{"params": list(module.network.parameters()), "name": "network"}, *module.method.param_groups()]
            )
            half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.precision)
            with torch.autocast(device.type, half, enabled=half is not None):
                outputs = module.step_outputs(batch)
                loss = segmentation_loss(outputs.source_logits, outputs.source_labels, config.data.ignore_index)
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
