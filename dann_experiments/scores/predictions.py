"""Sums over the predictions for a set, used by entropy, information maximization and batch nuclear norm.

Letters: N images, K classes, P pixels per image, p the softmax at a pixel, H(p) its entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CPU_VALUES = 2**19
"""Logits that are scored at a time on a CPU (in whole images): 2 MB, which fit into its cache."""
MOST_VALUES = 2**23
"""Logits that are scored at a time on other devices, where calls are expensive; limits the memory for scores (128 MB)."""


def in_parts(logits: Tensor) -> Iterator[slice]:
    """Yield slices of a few images of a batch (N, K, ...), so that computations on each fit into the cache of the processor."""
    most = CPU_VALUES if logits.device.type == "cpu" else MOST_VALUES
    images = max(most // max(logits[:1].numel(), 1), 1)
    for start in range(0, len(logits), images):
        yield slice(start, start + images)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-softmax over the classes of logits (N, K, ...), in float32 and without gradient."""
    with torch.no_grad():
        return logits.float().log_softmax(1)


@dataclass(frozen=True)
class PredictionMeans:
    """Means over all pixels with data."""

    classes: int
    """K."""
    pixels: float
    """Number of pixels with data."""
    entropy: float
    """Mean H(p) in nats; NaN without valid pixels, or if logits were not finite."""
    gram: np.ndarray
    """Sum of the outer products p p^T, (K, K)."""

    @property
    def is_defined(self) -> bool:
        """True if there are pixels with data and all values are finite."""
        return not math.isnan(self.entropy)

    @property
    def greatest_entropy(self) -> float:
        """The largest possible entropy, log K."""
        return math.log(self.classes)


class PredictionSums:
    """Accumulates predictions part by part; the sums stay on the device until `means`."""

    def __init__(self) -> None:
        self.classes = 0
        self.pixels: Tensor | float = 0.0
        self.entropy: Tensor | float = 0.0
        self.gram: Tensor | float = 0.0

    def add(self, logs: Tensor, known: Tensor | None) -> Tensor:
        """Add log p (N, K, P), which is overwritten; `known` (N, P) is true where pixels have data (None = everywhere).

        Returns p (N, K, P), 0 where there is no data.
        """
        self.classes = logs.shape[1]
        shares = logs.exp()
        if known is not None:
            # Zeros add nothing to any sum. They are set by bits, because nodata may have made NaN, and NaN times 0 is NaN;
            # masked_fill takes many times as long on a CPU.
            bits = known.to(torch.int32).neg_()[:, None]  # all 1 or all 0
            shares.view(torch.int32).bitwise_and_(bits)
            logs.view(torch.int32).bitwise_and_(bits)
        self.pixels = self.pixels + (logs[:, 0].numel() if known is None else known.sum().double())
        self.entropy = self.entropy - logs.mul_(shares).sum((1, 2)).double().sum()
        # rounding errors of the sums show in the roots of small eigenvalues, so they are in double precision
        wide = shares.double()
        self.gram = self.gram + torch.bmm(wide, wide.mT).sum(0)
        return shares

    def over_ranks(self, sum_of: Callable[[Tensor], Tensor]) -> PredictionSums:
        """Return the sums over several processes; `sum_of` sums a tensor over them."""
        assert isinstance(self.gram, Tensor)
        merged = PredictionSums()
        merged.classes = self.classes
        sums = [torch.as_tensor(part, device=self.gram.device).double() for part in (self.pixels, self.entropy)]
        merged.pixels, merged.entropy = sum_of(torch.stack(sums))
        merged.gram = sum_of(self.gram)
        return merged

    def means(self) -> PredictionMeans:
        """Return the means of everything added."""
        pixels, entropy, gram = float(self.pixels), math.nan, np.zeros((0, 0))
        if pixels:
            assert isinstance(self.gram, Tensor)
            entropy, gram = float(self.entropy) / pixels, self.gram.cpu().numpy()
            if not (math.isfinite(entropy) and np.isfinite(gram).all()):
                entropy = math.nan
        return PredictionMeans(self.classes, pixels, entropy, gram)


def parts_of(
    logits: Tensor, valid: Tensor | None, logs: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield log p (N, K, P) and a mask of pixels with data (N, P), for a few images at a time.

    `logits`: (N, K, ...) of any float type; `valid`: (N, ...), 0 where a pixel has no data (None = all have); `logs`: the
    `log_probabilities` of the logits, if already computed. Raises ValueError for fewer than two classes and for other shapes.
    """
    shape = tuple(logits.shape)
    if len(shape) < 3:
        raise ValueError(
            f"logits have shape {shape}; give (N, K, ...): images, classes, pixels. One pixel per image is (N, K, 1)."
        )
    if valid is not None and tuple(valid.shape) != (shape[0], *shape[2:]):
        # also with as many pixels: of (N, W, H) the wrong pixels would be left out
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}, logits {shape}; valid must be {(shape[0], *shape[2:])}."
        )
    if logits.shape[1] < 2:
        raise ValueError(f"logits of shape {shape} have fewer than two classes: nothing to be unsure of")
    for part in in_parts(logits):
        of_part = log_probabilities(logits[part]) if logs is None else logs[part]
        yield of_part.flatten(2), None if valid is None else valid[part].flatten(1) != 0


def means_of(logits: Tensor, valid: Tensor | None = None) -> PredictionMeans:
    """Return the means over all pixels with data of logits (N, K, ...); `valid`: (N, ...), 0 where a pixel has no data."""
    sums = PredictionSums()
    with torch.no_grad():
        for logs, known in parts_of(logits, valid):
            sums.add(logs, known)
    return sums.means()


def in_range(score: float) -> float:
    """Clip a score to 0..1, because rounding may exceed it; NaN stays NaN."""
    return min(max(score, 0.0), 1.0) if score == score else score
