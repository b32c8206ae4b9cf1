"""A model as one function from stored pixel values to class probabilities, for files that run without this project.

Letters: N images, B bands, K classes, h x w pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.data.reading import plain_reading
from dann_experiments.prediction.arrays import TILE_SIZE
from dann_experiments.prediction.tiling import grid_stride

INPUT, OUTPUT = "image", "probabilities"
MEANING_OF_INPUT = (
    "image: (N, bands, height, width) float32, the values as an image file stores them, neither scaled nor normalized, in "
    "the order of `bands` (numbers of the bands in the file, from 1; null = all). A pixel with NaN or infinity in any band "
    "lacks data: it counts as the mean, as in `predict`, and its probabilities mean nothing."
)
MEANING_OF_OUTPUT = "probabilities: (N, classes, height, width) float32, which sum to 1; the largest one is the class."
OVERLAP_PERCENT = 25  # as in `predict`: a quarter of a tile
CENTIMETERS = {"metre": 100.0, "meter": 100.0, "m": 100.0}
"""Centimeters per unit of a CRS, by the unit's name."""


class Standalone(nn.Module):
    """Maps stored values (N, B, h, w) float32 to class probabilities (N, K, h, w), as `predict` does for one tile.

    Normalization is a part of it, in the order of operations of `data.reading.Normalization`, so the results are the same to
    the last bits. Both sides must be multiples of `stride`.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, any_size: bool = False) -> None:
        """`any_size`: True if the graph is to take images of more than one size. The network of `model` is copied."""
        super().__init__()
        self.network = copy.deepcopy(model.network)
        if any_size:
            _pool_any_size(self.network)
        for name in ("low", "high", "mean", "std"):
            values = torch.tensor(getattr(model.normalisation, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image).softmax(1)

    def logits(self, image: Tensor) -> Tensor:
        """Return the network's logits (N, K, h, w)."""
        valid = torch.isfinite(image).all(1, keepdim=True)
        scaled = ((image - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        normalized = (scaled - self.mean) / self.std
        # where, not a product: NaN times 0 is NaN
        return self.network(torch.where(valid, normalized, torch.zeros_like(normalized)))


class BinMeans(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two matrix products, as its own ONNX graph only holds for images of the size that was traced."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, values: Tensor) -> Tensor:
        height, width = values.shape[-2:]
        return _averaging(self.rows, height, values) @ values @ _averaging(self.columns, width, values).mT


def _averaging(bins: int, length: int, like: Tensor) -> Tensor:
    """Return (bins, length) weights: row i has 1 / n at the n positions from floor(i * length / bins) to before
    ceil((i + 1) * length / bins), the bins of `nn.AdaptiveAvgPool2d`."""
    position = torch.arange(length, device=like.device)
    index = torch.arange(bins, device=like.device)[:, None]
    first = torch.div(index * length, bins, rounding_mode="floor")
    end = torch.div((index + 1) * length + bins - 1, bins, rounding_mode="floor")
    return ((position >= first) & (position < end)).to(like.dtype) / (end - first).to(like.dtype)


def _pool_any_size(network: nn.Module) -> None:
    """Replace each adaptive pooling to more than one bin."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.AdaptiveAvgPool2d):
                size = layer.output_size
                rows, columns = size if isinstance(size, tuple) else (size, size)
                if rows is not None and columns is not None and (rows, columns) != (1, 1):
                    setattr(parent, name, BinMeans(rows, columns))


def stride_of(model: Model) -> int:
    """Return the number that the sides of images must be multiples of."""
    return grid_stride(model.network)


def centimeters(model: Model) -> float | None:
    """Return the side of a pixel on the ground that the model was trained with; None if it is not known in meters."""
    factor = CENTIMETERS.get(model.reading.unit or "")
    return None if factor is None or model.reading.pixel_size is None else model.reading.pixel_size * factor


def facts_of(model: Model, domain: str, tile_size: int | None, software: str) -> dict[str, Any]:
    """Return what a user of the file must know, as plain values; `tile_size`: side of its images, None = any size."""
    reading, values = plain_reading(model.reading), model.normalisation
    return {
        "input": MEANING_OF_INPUT,
        "output": MEANING_OF_OUTPUT,
        "class_names": list(model.class_names),
        "bands": reading["bands"],
        "domain": domain,
        "tile_size": tile_size,
        "multiple_of": stride_of(model),
        "low": list(values.low),
        "high": list(values.high),
        "mean": list(values.mean),
        "std": list(values.std),
        "scale": reading["scale"],
        "nodata": reading["nodata"],
        "pixel_size": reading["pixel_size"],
        "unit": reading["unit"],
        "run_id": model.run_id,
        "model_digest": model.digest,
        "software": software,
    }


def deepness_facts(facts: Mapping[str, Any], resolution: float | None) -> dict[str, Any]:
    """Return the metadata that the QGIS plugin Deepness reads, by its names; `facts`: of `facts_of`, `resolution` in cm.

    The plugin divides values by 255, subtracts `standardization_mean` and divides by `standardization_std`. 0 and 1 / 255 undo
    that, since this file normalizes by itself.
    """
    bands = len(facts["mean"])
    found = {
        "model_type": "Segmentor",
        "class_names": {str(number): name for number, name in enumerate(facts["class_names"])},
        "tile_size": facts["tile_size"] or TILE_SIZE,
        "tiles_overlap": OVERLAP_PERCENT,
        "standardization_mean": [0.0] * bands,
        "standardization_std": [1 / 255] * bands,
        "seg_thresh": 0.0,  # each pixel gets its most probable class
        "seg_small_segment": 0,
    }
    return found if resolution is None else {**found, "resolution": resolution}
