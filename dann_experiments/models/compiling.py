"""`torch.compile` for the parts of a network between its taps; training steps alone use what was compiled."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import nn

MOST_VARIANTS = 64  # compiled for one piece of code, which several stages share; torch's own limit is 8


def compile_parts(network: nn.Module, tapped: Set[str]) -> None:
    """Compile in place the largest modules that neither are nor hold one of `tapped` (names of modules): hooks on those, and
    what ends a forward at the last of them, stay outside. Names and weights stay; compiling itself comes with the first step."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    for part in _parts(network, "", tapped):
        part.compile()


def is_of_compiling(error: Exception) -> bool:
    """Whether an exception comes from torch's compiler: a C++ compiler that is missing, a network that it cannot take."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, (TorchDynamoException, InductorError))


def has_compiled(network: nn.Module) -> bool:
    """Whether any of its modules was compiled."""
    return any(module._compiled_call_impl is not None for module in network.modules())


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Forwards inside run as they were written: evaluation sees images of many sizes, each of which would be compiled."""
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
