"""Makes predictions quicker: BatchNorm folded into the convolutions before it, and maps with the channels last.

In eval mode, BatchNorm multiplies each channel by a number and adds another one. Both can be part of the weights of the
convolution before it (Jacob et al. 2018, arXiv:1712.05877, section 3.2). The logits are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.models.taps import evaluating

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
SIDE = 64
"""Side of the image with which pairs are looked for."""
ROUNDING = 1e-4
"""Largest difference between logits with and without folding, as a share of the largest logit. Rounding of float32 gives 1e-6."""


def foldable(network: nn.Module, in_channels: int) -> list[Pair]:
    """Return each convolution with the BatchNorm that gets its output and nothing else does.

    The pairs are found in a forward pass of an image of noise; they are returned only if a second pass with all of them folded
    gives the same logits, else none is. Subclasses of either layer may do more, so they are left as they are.
    """
    made: dict[nn.Conv2d, list[Tensor]] = {}
    taken: dict[nn.BatchNorm2d, list[Tensor]] = {}

    def after(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        made.setdefault(layer, []).append(output)

    def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        taken.setdefault(layer, []).append(inputs[0])

    handles = [layer.register_forward_hook(after) for layer in network.modules() if type(layer) is nn.Conv2d]
    handles += [
        layer.register_forward_pre_hook(before)
        for layer in network.modules()
        if type(layer) is nn.BatchNorm2d and layer.running_mean is not None
    ]
    like = next(network.parameters())
    noise = torch.rand(1, in_channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).sub_(0.5).mul_(4)
    noise = noise.to(like.device, like.dtype)
    with evaluating(network):
        try:
            expected = logits_of_any_size(network, noise)
        except (RuntimeError, ValueError, AssertionError):  # a network of images of another size
            return []
        finally:
            for handle in handles:
                handle.remove()
        pairs = [
            (convolution, norm)
            for norm, inputs in taken.items()
            for convolution, outputs in made.items()
            if len(inputs) == len(outputs) == 1 and inputs[0] is outputs[0]
        ]
        with folded(pairs):
            found = logits_of_any_size(network, noise)
    is_same = (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    return pairs if is_same else []


@contextmanager
def folded(pairs: Sequence[Pair]) -> Iterator[None]:
    """Fold the BatchNorm of each pair, with the statistics that it has now, into its convolution in the block, which must run in
    eval mode. Afterwards all layers are as before, to the bit."""
    before = [(convolution.weight, convolution.bias) for convolution, _ in pairs]
    try:
        for convolution, norm in pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            vars(norm)["forward"] = _unchanged  # in front of the method of its class
        yield
    finally:
        for (convolution, norm), (weight, bias) in zip(pairs, before, strict=True):
            convolution.weight, convolution.bias = weight, bias
            vars(norm).pop("forward", None)


@contextmanager
def channels_last(network: nn.Module) -> Iterator[None]:
    """Let convolutions have their weights, and so their maps, in memory with the channels last in the block."""
    layers = [layer for layer in network.modules() if type(layer) is nn.Conv2d]
    before = [layer.weight for layer in layers]
    try:
        for layer in layers:
            weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = weight


def _unchanged(values: Tensor) -> Tensor:
    return values
