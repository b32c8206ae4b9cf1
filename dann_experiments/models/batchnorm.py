"""Controls BatchNorm statistics: forward passes that do not update them, and statistics of chosen images alone (AdaBN).

In training mode, BatchNorm (Ioffe & Szegedy 2015, arXiv:1502.03167) normalizes with the mean and variance of the batch and moves
its running statistics towards them; in eval mode, it normalizes with the running statistics. docs/batchnorm.md explains the
values of `domain_adaptation.batchnorm`. Letters: N images, C channels, H x W positions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dann_experiments.config.errors import InputError
from dann_experiments.data.joined import Items
from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.models.taps import evaluating

MOST_IMAGES = 2000
"""Enough images for `target_statistics`: their mean is accurate to 2 % of their standard deviation."""

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # timm's norm-act layers are subclasses
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
NO_BATCHNORM = (
    "test_batchnorm is 'images', but this network has no BatchNorm with running statistics; set it to running."
)
T = TypeVar("T")


class Origin(NamedTuple):
    """Where the images of statistics come from, for messages."""

    images: str
    """Their name."""
    way_out: str
    """What to do if a batch of one image is too small."""


def has_batchnorm(network: nn.Module) -> bool:
    """Return True if any BatchNorm keeps running statistics; without one, `source_only` and `target_stats` have no effect."""
    return bool(_layers(network))


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[nn.Module]:
    """Keep forward passes in the block from updating running statistics and `num_batches_tracked` of any BatchNorm.

    Normalization is unchanged: layers in training mode and layers without running statistics use the batch, other layers in eval
    mode (frozen ones) their running statistics. The layers are restored afterwards.
    """
    # A momentum of 0 would keep mean and variance, but still count the batch.
    tracking = [layer for layer in _layers(network) if layer.track_running_stats]
    for layer in tracking:
        layer.track_running_stats = False  # with running statistics, read only in training mode
    try:
        yield network
    finally:
        for layer in tracking:
            layer.track_running_stats = True


@contextmanager
def by_domain(network: nn.Module, count: int, keep_target: bool = False) -> Iterator[nn.Module]:
    """Make every BatchNorm in training mode normalize the first `count` images (source) and the others (target) separately.

    This equals two forward passes, one after the other. With `keep_target`, the target does not update running statistics.
    Batches of up to `count` images are unaffected. The layers are restored after the block.
    """
    layers: list[Any] = [module for module in network.modules() if isinstance(module, _KINDS) and module.training]
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__, layer.source_count, layer.keep_target = _by_domain(kind), count, keep_target
    try:
        yield network
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
            del layer.source_count, layer.keep_target


@functools.cache  # the same class in all steps, or torch.compile would recompile
def _by_domain(kind: Any) -> Any:
    class ByDomain(kind):
        def forward(self, values: Tensor) -> Tensor:
            if len(values) <= self.source_count:
                return super().forward(values)
            source, target = values.split([self.source_count, len(values) - self.source_count])
            normalized = super().forward(source)
            tracking = self.track_running_stats
            self.track_running_stats = tracking and not self.keep_target  # as in `statistics_kept`
            try:
                return torch.cat([normalized, super().forward(target)])
            finally:
                self.track_running_stats = tracking

    return ByDomain


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[nn.Module]:
    """Let every BatchNorm normalize with the statistics of the batch, and keep its running ones. All else is in eval mode,
    without gradients; modes are restored afterwards."""
    with evaluating(network), statistics_kept(network):
        for layer in _layers(network):
            layer.training = True
        yield network


TRAINING_IMAGES = Origin(
    "data.target.train",
    "give data.target.train two images or more of each size, or set a data.window_size that all have",
)


@contextmanager
def statistics_of(network: nn.Module, loader: Iterable[Mapping[str, Tensor]], origin: Origin) -> Iterator[nn.Module]:
    """Let every BatchNorm have the statistics of the loader's images (`target_statistics`) in the block; its own are restored
    afterwards, to the bit. Raises InputError as `target_statistics` does, before the block runs."""
    buffers = [buffer for layer in _layers(network) for buffer in (layer.running_mean, layer.running_var)]
    before = [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]
    try:
        target_statistics(network, loader, origin=origin)
        yield network
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def target_statistics(
    network: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    most_images: int = MOST_IMAGES,
    origin: Origin = TRAINING_IMAGES,
) -> None:
    """Replace the running mean and variance of every BatchNorm by those of the loader's images.

    This is AdaBN (Li et al. 2018, Adaptive Batch Normalization for practical domain adaptation, Pattern Recognition 80, section
    3). Batches are {"image": (N, B, H, W)}. Each image passes once through the whole network, without gradients, until at least
    `most_images` are done. Only BatchNorm runs in training mode, so dropout is inactive.

    Each batch is normalized with its own statistics, so layers get the inputs that they get in training. A layer stores the mean
    and variance (with n - 1, as torch does) of all its values in all batches together; an average of batch variances would
    miss the differences between batches. Hence the first BatchNorm does not depend on how images are batched, and deeper ones
    depend on it only slightly; the order of batches has no effect.

    Every position counts, including nodata (0 in the image, the mean), as in training. Layers in eval mode are re-estimated, too.
    Layers that no image reaches and `num_batches_tracked` do not change; the modes of all modules are restored. Raises
    InputError, and changes nothing, if there are no images or a batch of one image reaches a BatchNorm on a map of one position;
    the message names the `origin` of the images.
    """
    device = next(network.parameters()).device
    seen: dict[_BatchNorm, list[tuple[int, Tensor, Tensor]]] = {layer: [] for layer in _layers(network)}

    def record(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].float()
        variance, mean = torch.var_mean(values, [dim for dim in range(values.ndim) if dim != 1], correction=0)
        seen[layer].append(
            (values.numel() // values.shape[1], mean, variance)
        )  # stay on the device, to avoid a synchronization

    handles = [layer.register_forward_pre_hook(record) for layer in seen]
    images_done = 0
    try:
        with batch_statistics(network):
            for batch in loader:
                logits_of_any_size(network, batch["image"].to(device))
                images_done += len(batch["image"])
                if images_done >= most_images:
                    break
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"the BatchNorm statistics of {origin.images} need batches of two images or more, as this network has a BatchNorm on "
            f"a map of one position; {origin.way_out}."
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    if not images_done:
        raise InputError(f"the BatchNorm statistics need images, but {origin.images} has none.")
    with torch.no_grad():
        for layer, batches in seen.items():
            if batches:
                _put_together(layer, batches)


def statistics_loader(dataset: Items, batch_size: int) -> DataLoader:
    """Return a loader for `target_statistics`: every item once, whole, without augmentation, in a fixed order.

    A batch holds images of one size, evenly spaced over the set, so that batches of a manifest sorted by scene mix scenes, and
    the first batches are a fair sample. Batches of one size differ by at most one image. None has a single image unless its
    size is unique (a `batch_size` of 1 makes pairs).
    """
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(dataset.pieces):
        sizes.setdefault((piece.window.height, piece.window.width), []).append(index)
    batches: list[tuple[float, list[int]]] = []
    for indices in sizes.values():
        alike = spread_batches(indices, batch_size)
        # sort by relative position among batches of the same size, to interleave sizes
        batches += [((start + 0.5) / len(alike), batch) for start, batch in enumerate(alike)]
    ordered = [indices for _, indices in sorted(batches)]
    # own generator: a loader draws a number per pass, which must not change the random state of training
    return DataLoader(dataset.as_evaluated(), batch_sampler=ordered, generator=torch.Generator())


def spread_batches(items: Sequence[T], batch_size: int) -> list[list[T]]:
    """Divide items into batches that are evenly spaced over them and differ by at most one item. None has a single item, unless
    there is only one (a `batch_size` of 1 makes pairs)."""
    count = max(min(-(-len(items) // batch_size), len(items) // 2), 1)
    return [list(items[start::count]) for start in range(count)]


def _layers(network: nn.Module) -> list[_BatchNorm]:
    """Return every BatchNorm with running statistics."""
    layers = [module for module in network.modules() if isinstance(module, _KINDS)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


def _put_together(layer: _BatchNorm, batches: list[tuple[int, Tensor, Tensor]]) -> None:
    """Set the layer's statistics from (number of values, mean (C,), variance (C,)) per batch.

    The total variance is the mean of the variances within batches plus the variance of their means.
    """
    assert layer.running_mean is not None
    assert layer.running_var is not None
    counts = torch.tensor([count for count, _, _ in batches], dtype=torch.float64)
    total = counts.sum()
    shares = (counts / total)[:, None]
    means = (
        torch.stack([mean for _, mean, _ in batches]).cpu().double()
    )  # .double() after .cpu(), as MPS has no float64
    variances = torch.stack([variance for _, _, variance in batches]).cpu().double()
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance * total / (total - 1))
