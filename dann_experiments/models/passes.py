"""Forward passes of a training step: source through the whole network, target up to the last tap, in one pass or two.

One pass over the images of both domains reads weights less often, makes fewer calls and accumulates gradients once. BatchNorm
then normalizes each domain separately, so that the results equal those of two passes. Letters: S source and T target images, K
classes, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dann_experiments.config.errors import InputError
from dann_experiments.models.batchnorm import by_domain, statistics_kept
from dann_experiments.models.taps import JOINT_CUTS, AllTapsReached, Tap, recording

Forwards = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
"""Source logits (S, K, h, w), and features by layer name of source (S, C, H, W) and target (T, C, H, W)."""

TRIAL_IMAGES = 4  # per domain; enough for a variance over a map of one position
TRIAL_SIZE = 64
SAME = 0.02
"""Relative tolerance (mean absolute difference / mean magnitude) below which one pass counts as equal to two.

Rounding gives about 1e-6 (1e-3 with TF32); an image normalized with the other domain, or another draw of dropout, 0.1 or more.
"""


def forward_with_taps(network: nn.Module, images: Tensor, taps: Sequence[Tap]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the whole network; return the logits and each tap's features."""
    with recording(network, taps) as features:
        logits = network(images)
    return logits, features


def forward_to_taps(network: nn.Module, images: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
    """Return each tap's features; layers after the last tap do not run."""
    with recording(network, taps, stop=True) as features, suppress(AllTapsReached):
        network(images)
    return features


def forward_twice(
    network: nn.Module,
    source_images: Tensor,
    target_images: Tensor,
    taps: Sequence[Tap],
    keep_statistics: bool = False,
    learns_from_target: bool = True,
) -> Forwards:
    """Forward the source, then the target; with `keep_statistics`, the target does not update BatchNorm statistics; without
    `learns_from_target`, its features have no graph."""
    logits, source_features = forward_with_taps(network, source_images, taps)
    graph = nullcontext() if learns_from_target else torch.no_grad()
    with graph, statistics_kept(network) if keep_statistics else nullcontext():
        return logits, source_features, forward_to_taps(network, target_images, taps)


def forward_joint(
    network: nn.Module, source_images: Tensor, target_images: Tensor, taps: Sequence[Tap], cut: Tap | None = None
) -> Forwards:
    """Forward both domains in one pass up to `cut`, and only the source from there on.

    `cut`: one of the taps; None = the last of `JOINT_CUTS` that is tapped, else the end of the encoder.
    """
    count, total = len(source_images), len(source_images) + len(target_images)
    cut = cut or _late_cut(taps)

    def source_part(given: Any) -> Any:
        if isinstance(given, (list, tuple)):
            return type(given)(source_part(item) for item in given)
        return given[:count] if isinstance(given, Tensor) and len(given) == total else given

    # modules around the cut may also return earlier maps, such as an encoder its skip connections
    around = [name for name in _parents(cut.module) if name]
    with recording(network, taps) as features:
        # registered after the recording hooks, which thus see the output before it is split
        handles = [cut.hook(network, source_part)]
        for name in around:
            handles.append(
                network.get_submodule(name).register_forward_hook(lambda module, inputs, output: source_part(output))
            )
        try:
            logits = network(torch.cat([source_images, target_images]))
        finally:
            for handle in handles:
                handle.remove()
    parts = {name: both.split([count, total - count]) for name, both in features.items()}
    return logits, {name: part[0] for name, part in parts.items()}, {name: part[1] for name, part in parts.items()}


@dataclass(frozen=True)
class Passes:
    """Forwards both domains in a training step, in the way that `choose` found by a trial."""

    taps: Sequence[Tap]
    batchnorm: str
    """Value of `domain_adaptation.batchnorm` (docs/batchnorm.md)."""
    cut: Tap | None
    """The tap after which only the source goes on; None = two passes or, with `joint`, a later cut."""
    weights: int = 0
    """Number of weights of convolutions and linear layers up to the cut."""
    values_a_pixel: float = 0.0
    """Number of output values of those layers per image pixel."""

    def __call__(
        self, network: nn.Module, source_images: Tensor, target_images: Tensor, learns_from_target: bool = True
    ) -> Forwards:
        """Run the forward passes of a training step on images (S, B, h, w) and (T, B, h, w). `learns_from_target`: see
        `DomainAdaptationMethod`; with joint statistics the source's gradient passes the target's images, too."""
        images, taps, kept = (source_images, target_images), self.taps, self.batchnorm == "source_only"
        if self.batchnorm == "joint":
            return forward_joint(network, *images, taps, self.cut)
        if not learns_from_target or self.cut is None or not self.pays(source_images, target_images):
            return forward_twice(network, *images, taps, kept, learns_from_target)
        with by_domain(network, len(source_images), kept):
            return forward_joint(network, *images, taps, self.cut)

    def pays(self, source_images: Tensor, target_images: Tensor) -> bool:
        """Return True if one pass is faster than two.

        One pass reads the weights once for both domains. On a CPU, its larger maps exceed the caches sooner, which outweighs that
        if maps have more values than there are weights (docs/performance.md). On other devices, fewer calls are always faster.
        """
        if source_images.shape[1:] != target_images.shape[1:]:
            return False
        pixels = source_images.shape[0] * source_images.shape[2] * source_images.shape[3]
        return source_images.device.type != "cpu" or self.weights >= self.values_a_pixel * pixels


def choose(network: nn.Module, taps: Sequence[Tap], batchnorm: str, in_channels: int) -> Passes:
    """Choose one pass if the network can be split at its last tap and then gives the results of two passes, else two.

    A trial on a few noise images decides. Layers that draw random numbers (dropout) or mix images need two passes. The network
    and torch's random state do not change.
    """
    parameter = next(network.parameters())
    device = parameter.device
    devices = [device] if device.type == "cuda" else []
    exact = torch.autocast(device.type, enabled=False)
    with torch.random.fork_rng(devices=devices), torch.no_grad(), exact, _unchanged(network):
        torch.manual_seed(0)
        noise = torch.randn(2, TRIAL_IMAGES, in_channels, TRIAL_SIZE, TRIAL_SIZE, device=device, dtype=parameter.dtype)
        images = noise[0], 3 * noise[1] + 1  # different distributions, so that mixing the domains shows
        try:
            cut, weights, values = _last(network, images[0], taps)
            if batchnorm == "joint":
                forward_joint(network, *images, taps, cut)
                return Passes(taps, batchnorm, cut)
            torch.manual_seed(0)  # same draws of dropout after the cut in both
            apart = forward_twice(network, *images, taps)
            torch.manual_seed(0)
            with by_domain(network, TRIAL_IMAGES):
                together = forward_joint(network, *images, taps, cut)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return Passes(taps, batchnorm, None)  # after the cut, maps of both domains meet maps of one
        pixels = TRIAL_IMAGES * TRIAL_SIZE**2
        return Passes(taps, batchnorm, cut if _same(apart, together) else None, weights, values / pixels)


def check_joint(taps: Sequence[Tap]) -> None:
    """Raise InputError for taps at which a joint forward pass cannot split the domains."""
    for tap in taps:
        if tap.module not in JOINT_CUTS and not tap.module.startswith("encoder."):
            raise InputError(
                "domain_adaptation.batchnorm is 'joint', which works with layers of the encoder, the whole 'decoder' and "
                f"'segmentation_head', not with {tap.name!r}; tap one of those or set batchnorm to 'separate'."
            )


def _late_cut(taps: Sequence[Tap]) -> Tap:
    tapped = {tap.module for tap in taps}
    last = max((cut for cut in JOINT_CUTS if cut in tapped), key=JOINT_CUTS.index, default="encoder")
    return Tap(last, last, None, 0, 0.0, copy=False)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _last(network: nn.Module, images: Tensor, taps: Sequence[Tap]) -> tuple[Tap, int, int]:
    """Return the tap reached last, and how many weights and output values convolutions and linear layers have up to it."""
    counts = [0, 0]

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        counts[0] += sum(weight.numel() for weight in module.parameters(recurse=False))
        counts[1] += output.numel()

    layers = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        reached = list(forward_to_taps(network, images, taps))
    finally:
        for handle in handles:
            handle.remove()
    return {tap.name: tap for tap in taps}[reached[-1]], counts[0], counts[1]


def _same(one: Forwards, other: Forwards) -> bool:
    pairs = [(one[0], other[0])]
    for first, second in zip(one[1:], other[1:], strict=True):
        pairs += [(features, second[name]) for name, features in first.items()]
    return all(bool((first - second).abs().mean() <= SAME * first.abs().mean()) for first, second in pairs)


@contextmanager
def _unchanged(network: nn.Module) -> Iterator[None]:
    """Restore the network's buffers after the block."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
