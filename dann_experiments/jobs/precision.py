"""Chooses `trainer.precision: auto` by what was measured to be quicker on a GPU or processor like this one."""

from __future__ import annotations

import logging

from dann_experiments.config import Config, replace
from dann_experiments.workers.processes import visible_gpus

log = logging.getLogger(__name__)
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Instructions of a processor, as torch names them, with which bfloat16 is quicker. Without them it is emulated and slower."""


def with_precision(config: Config) -> Config:
    """Return the settings with the precision that `auto` stands for on this machine, which the run then records; unchanged if
    another was set."""
    if config.trainer.precision != "auto":
        return config
    chosen, reason = _chosen(config.trainer.accelerator)
    log.info("trainer.precision auto: %s (%s).", chosen, reason)
    return replace(config, {"trainer.precision": chosen})


def _chosen(accelerator: str) -> tuple[str, str]:
    import torch

    if visible_gpus(accelerator):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU computes in bfloat16"
        return "32-true", "the GPU does not compute in bfloat16"
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return "32-true", "bfloat16 was not measured on this device"
    found = [name for name in BF16_INSTRUCTIONS if torch.cpu.get_capabilities().get(name)]
    if found:
        return "bf16-mixed", f"the processor has {found[0]}"
    return "32-true", f"the processor has neither of {', '.join(BF16_INSTRUCTIONS)}, and bfloat16 would be slower"
