"""Applies `torch.compile` to the parts of a network between its taps; only training steps run compiled code."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import nn

MOST_VARIANTS = 64  # recompilations per function, which several stages share; torch's default limit is 8


def compile_parts(network: nn.Module, tapped: Set[str]) -> None:
    """Compile in place the largest modules that neither are nor contain one of `tapped` (module names).

    Hooks on tapped modules thus stay outside compiled code. Names and weights do not change. Compilation runs in the first step.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    for part in _parts(network, "", tapped):
        part.compile()


def is_of_compiling(error: Exception) -> bool:
    """Return True if an exception comes from torch's compiler, such as a missing C++ compiler or an unsupported network."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, (TorchDynamoException, InductorError))


def has_compiled(network: nn.Module) -> bool:
    """Return True if any module of the network is compiled."""
    return any(module._compiled_call_impl is not None for module in network.modules())


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Run forward passes in the block without compiled code; evaluation would recompile for each image size."""
    if has_compiled(network):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _parts(module: nn.Module, name: str, tapped: Set[str]) -> Iterator[nn.Module]:
    for last, child in module.named_children():
        full = f"{name}.{last}" if name else last
        if any(tap == full or tap.startswith(f"{full}.") for tap in tapped):
            yield from _parts(child, full, tapped)
        elif not isinstance(child, nn.Identity):
            yield child
