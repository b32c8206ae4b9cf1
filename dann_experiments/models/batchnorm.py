"""BatchNorm statistics as a choice: forwards that leave them alone, and statistics of the target alone (AdaBN).

A BatchNorm (Ioffe & Szegedy 2015, arXiv:1502.03167) in training mode normalises with the mean and variance of its batch and moves
its running mean and variance towards them; in eval mode it normalises with the running ones. What each value of
`domain_adaptation.batchnorm` makes of this stands in docs/batchnorm.md. N images, C channels, H x W positions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dann_experiments.config.errors import InputError
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.models.taps import evaluating

MOST_IMAGES = 2000
"""Enough for `target_statistics`: the mean of so many images is known to 2 % of their standard deviation."""

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # timm's norm-act layers are subclasses
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def has_batchnorm(network: nn.Module) -> bool:
    """Whether any BatchNorm keeps running statistics; without one, `source_only` and `target_stats` change nothing."""
    return bool(_layers(network))


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[nn.Module]:
    """Forwards inside move no running mean, running variance or `num_batches_tracked` of a BatchNorm.

    They normalise as they would without: layers in training mode with their batch, layers in eval mode (frozen ones) with
    their running statistics, layers without running statistics with their batch. Given back as found.
    """
    # A momentum of 0 would do for mean and variance, but the batch would still be counted.
    tracking = [layer for layer in _layers(network) if layer.track_running_stats]
    for layer in tracking:
        layer.track_running_stats = False  # read in training mode alone, while the layer has running statistics
    try:
        yield network
    finally:
        for layer in tracking:
            layer.track_running_stats = True


@contextmanager
def by_domain(network: nn.Module, count: int, keep_target: bool = False) -> Iterator[nn.Module]:
    """In forwards of more than `count` images inside, every BatchNorm in training mode takes the first `count` (the source) and
    the others (the target) each by themselves, one after the other, as two forwards would. With `keep_target` the target
    moves no running statistics. Forwards of `count` images are as always. Given back as found."""

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


@functools.cache  # one class for all steps: torch.compile compiles anew for another
def _by_domain(kind: Any) -> Any:
    class ByDomain(kind):
        def forward(self, values: Tensor) -> Tensor:
            if len(values) <= self.source_count:
                return super().forward(values)
            source, target = values.split([self.source_count, len(values) - self.source_count])
            normalised = super().forward(source)
            tracking = self.track_running_stats
            self.track_running_stats = tracking and not self.keep_target  # as in `statistics_kept`
            try:
                return torch.cat([normalised, super().forward(target)])
            finally:
                self.track_running_stats = tracking

    return ByDomain


def target_statistics(
    network: nn.Module, loader: Iterable[Mapping[str, Tensor]], most_images: int = MOST_IMAGES
) -> None:
    """Replace running mean and variance of every BatchNorm by those of the loader's images: AdaBN (Li et al. 2018, Adaptive
    Batch Normalization for practical domain adaptation, Pattern Recognition 80, section 3).

    Batches are {"image": (N, B, H, W)}; each image is forwarded once through the whole network, without gradients, until
    `most_images` are done (the batch that reaches the number is still taken). Only BatchNorm runs in training mode, so
    dropout draws nothing. Each batch is normalised with its own statistics on its way, so what a layer sees is what it sees
    in training; what a layer keeps is the mean and the variance of all its values in all batches together (with n - 1, as
    torch does), not an average of batch variances, which would leave out how batches differ. The first BatchNorm's numbers
    therefore do not depend on how images are put into batches, deeper ones' a little; the order of batches changes nothing.

    Every position counts, those of nodata (0 in the image, the mean) too, as in training. Layers in eval mode are
    re-estimated like the others; a layer that no image reaches stays as it is, and `num_batches_tracked` everywhere.
    Every module's mode is given back as found. Raises InputError, and changes nothing, without images, and where one image
    by itself meets a BatchNorm on a map of one position.
    """
    device = next(network.parameters()).device
    seen: dict[_BatchNorm, list[tuple[int, Tensor, Tensor]]] = {layer: [] for layer in _layers(network)}

    def record(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].float()
        variance, mean = torch.var_mean(values, [dim for dim in range(values.ndim) if dim != 1], correction=0)
        seen[layer].append((values.numel() // values.shape[1], mean, variance))  # left on the device: no waiting here

    handles = [layer.register_forward_pre_hook(record) for layer in seen]
    images_done = 0
    try:
        with evaluating(network), statistics_kept(network):
            for layer in seen:
                layer.training = True
            for batch in loader:
                logits_of_any_size(network, batch["image"].to(device))
                images_done += len(batch["image"])
                if images_done >= most_images:
                    break
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "the statistics of target images need batches of two images or more, as this network has a BatchNorm on a map of "
            "one position: give data.target.train two images or more of each size, or a data.window_size that all have."
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    if not images_done:
        raise InputError("the statistics of target images need images, but data.target.train gives none.")
    with torch.no_grad():
        for layer, batches in seen.items():
            if batches:
                _put_together(layer, batches)


def statistics_loader(dataset: SegmentationDataset, batch_size: int) -> DataLoader:
    """A set for `target_statistics`: every item once, whole and without augmentation, in the same order each time.

    A batch holds images of one size from all over the set, so that a manifest sorted by scene gives no batches of one scene,
    and the first batches alone are a fair sample. Batches of a size differ by one image at most; none is of one image unless
    its size is unique (a `batch_size` of 1 makes pairs).
    """
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(dataset.pieces):
        sizes.setdefault((piece.window.height, piece.window.width), []).append(index)
    batches: list[tuple[float, list[int]]] = []
    for indices in sizes.values():
        count = max(min(-(-len(indices) // batch_size), len(indices) // 2), 1)
        # where a batch stands among those of its size: sizes take turns
        batches += [((start + 0.5) / count, indices[start::count]) for start in range(count)]
    ordered = [indices for _, indices in sorted(batches)]
    # a generator of its own: a loader draws a number each time, and training's random state is not ours to move
    return DataLoader(dataset.as_evaluated(), batch_sampler=ordered, generator=torch.Generator())


def _layers(network: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm with running statistics."""
    layers = [module for module in network.modules() if isinstance(module, _KINDS)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


def _put_together(layer: _BatchNorm, batches: list[tuple[int, Tensor, Tensor]]) -> None:
    """Mean and total variance from (positions, mean (C,), variance (C,)) a batch: the mean of the variances within batches
    plus the variance of their means."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    counts = torch.tensor([count for count, _, _ in batches], dtype=torch.float64)
    total = counts.sum()
    shares = (counts / total)[:, None]
    means = torch.stack([mean for _, mean, _ in batches]).cpu().double()  # double after cpu: MPS has none
    variances = torch.stack([variance for _, _, variance in batches]).cpu().double()
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance * total / (total - 1))
