"""Pools the features of a whole set to one row per image, for the probe of the domain gap.

Letters: N images, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, functional
from torch.utils.data import DataLoader, default_collate

from dann_experiments.adaptation.dann import OUTPUT_LAYER
from dann_experiments.models.networks import output_stride
from dann_experiments.models.passes import forward_to_taps
from dann_experiments.models.taps import Tap, evaluating
from dann_experiments.scores.domain_probe import mean_and_std


def pooled_features(
    network: Module, taps: Sequence[Tap], loader: DataLoader, most_images: int = 500
) -> dict[str, np.ndarray]:
    """Return, for each layer, the `mean_and_std` (N, 2C) float32 of its features, one row per image.

    Images without a valid pixel are left out. Features of `segmentation_head` are class logits, converted to probabilities, as
    in the run's own classifier.

    `loader` comes from `eval_loader` (all images of a batch have one size). If it has more than `most_images` items, the set is
    divided into `most_images` stretches of equal length, and one item is drawn from each: spread over the whole set, the same at
    each call, and not only the left column of a grid of windows. Runs in eval mode, without gradients, and only up to the deepest
    tap; restores the mode of each module.
    """
    by_name = {tap.name: tap for tap in taps}  # a layer named twice would never count as "all taps reached"
    if not by_name:
        return {}
    device = next(network.parameters()).device
    rows: dict[str, list[Tensor]] = {name: [] for name in by_name}
    with evaluating(network):
        for batch in _spread(loader, most_images):
            images, valid = batch["image"].to(device), batch.get("valid")
            if valid is not None:
                valid = valid.to(device)
                known = (valid > 0).any(2).any(1)
                images, valid = images[known], valid[known]
                if not len(images):
                    continue
            images, valid = _filled_up(network, images, valid)
            for name, features in forward_to_taps(network, images, list(by_name.values())).items():
                features = features.float().softmax(1) if name == OUTPUT_LAYER else features.float()
                rows[name].append(mean_and_std(features, valid).cpu())
    return {
        name: torch.cat(parts).numpy() if parts else np.zeros((0, 2 * by_name[name].channels), np.float32)
        for name, parts in rows.items()
    }


def _spread(loader: DataLoader, most: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield the loader's batches, or batches of `most` of its items, spread over the set; each batch has images of one size."""
    dataset: Any = loader.dataset
    if len(dataset) <= most:
        yield from loader
        return
    edges = np.arange(most + 1) * len(dataset) // most
    chosen = np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()
    batch_sampler: Any = loader.batch_sampler
    batch_size = loader.batch_size or max(len(batch) for batch in batch_sampler)  # None with a sampler of batches
    waiting: list[dict[str, Tensor]] = []
    for index in chosen:  # batched here: which of the chosen items have the same size is known only when they are read
        item = dataset[index]
        if waiting and (len(waiting) == batch_size or item["image"].shape != waiting[0]["image"].shape):
            yield default_collate(waiting)
            waiting = []
        waiting.append(item)
    yield default_collate(waiting)


def _filled_up(network: Module, images: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Pad images to sides that the network accepts, as `logits_of_any_size` does; the padding is marked as not valid."""
    height, width = images.shape[-2:]
    stride = output_stride(network)
    padding = (0, -width % stride, 0, -height % stride)
    if not any(padding):
        return images, valid
    if valid is None:
        valid = torch.ones((len(images), height, width), device=images.device)
    return functional.pad(images, padding, mode="replicate"), functional.pad(valid, padding)
