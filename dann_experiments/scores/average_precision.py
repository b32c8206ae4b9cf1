"""Average precision per class: how well the probability of a class ranks its pixels, whatever threshold a map would use.

The probabilities are counted in a fixed histogram, which adds up over batches and processes. Letters: N images, K classes,
P pixels, B bins.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dann_experiments.scores.confusion import as_array
from dann_experiments.scores.predictions import log_probabilities

STEPS = 8
"""Each octave of -log p has 2^8 bins: one is 0.2 % of p wide at p = 1/2, ever finer towards p = 1, and 3 % at p = 0.0003."""
_DROPPED = 23 - STEPS  # of the 23 bits of a float's fraction
_SMALLEST = (127 - 24) << STEPS  # -log p = 2^-24: a float32 knows no probability between this and 1
BINS = ((127 + 7) << STEPS) - _SMALLEST  # up to -log p = 2^7, below the smallest float32


def bins_of(logs: Tensor) -> Tensor:
    """Return the bin of each log-probability (float32, any shape), int32 in 0..BINS-1, 0 = most probable.

    The order is kept: a smaller probability has the same or a higher bin. NaN counts as the least probable.

    >>> bins_of(torch.tensor([1.0, 0.5, 0.499, 0.0]).log()).tolist()
    [0, 5986, 5987, 7935]
    """
    # The bits of a positive float grow with its value, so its exponent and first bits number the bins without a logarithm.
    bits = logs.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF)
    return bits.bitwise_right_shift_(_DROPPED).sub_(_SMALLEST).clamp_(0, BINS - 1)


def count_probabilities(logs: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return how many pixels are in each bin, (K, 2, B) int64: [:, 1] counts pixels of the class, [:, 0] all labeled pixels.

    `logs`: log-probabilities (N, K, ...) in float32; `labels`: class ids (N, ...), not checked. Sums over batches are the
    histogram of the set.
    """
    count = logs.shape[1]
    labels = labels.flatten(1)
    kept = labels != ignore_index
    bins = bins_of(logs).flatten(2)  # (N, K, P)
    offsets = torch.arange(count, dtype=torch.int32, device=logs.device).mul_(BINS)[:, None]
    everywhere = bins + offsets
    own = everywhere.gather(1, torch.where(kept, labels, 0)[:, None])[:, 0]  # (N, P), of the pixel's true class
    nowhere = count * BINS
    everywhere.masked_fill_(~kept[:, None], nowhere)
    own.masked_fill_(~kept, nowhere)
    return torch.stack([_counted(places, nowhere).view(count, BINS) for places in (everywhere, own)], 1)


def class_average_precision_from(counts: Tensor | np.ndarray) -> np.ndarray:
    """Return `class_average_precision` from a histogram of `count_probabilities`, (K,)."""
    everywhere, own = (as_array(counts)[:, index].astype(np.float64) for index in (0, 1))
    hits, found, positives = own.cumsum(1), everywhere.cumsum(1), own.sum(1)
    precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
    return np.divide((own * precision).sum(1), positives, out=np.full(len(own), np.nan), where=positives > 0)


def class_average_precision(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> np.ndarray:
    """Return the average precision of each class against all others, (K,) in 0..1, higher is better; NaN for a class without
    labeled pixels.

    Pixels are ranked by the probability of the class. It is the mean, over the pixels of the class, of the precision among all
    pixels that rank as high: sum over thresholds of (recall step) x precision. A ranking by chance gives about the share of the
    class. Probabilities in one of the 7936 bins count as equal. `logits`: (N, K, ...); `labels`: class ids (N, ...), where pixels
    labeled `ignore_index` do not count. Raises ValueError if their shapes do not fit.

    >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> class_average_precision(logits, torch.tensor([[0, 1, 0, 255]])).round(3).tolist()  # 0: (1/1 + 2/3) / 2
    [0.833, 0.5]
    """
    if labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}; labels must be "
            f"{(logits.shape[0], *logits.shape[2:])}."
        )
    return class_average_precision_from(count_probabilities(log_probabilities(logits), labels, ignore_index))


def _counted(places: Tensor, size: int) -> Tensor:
    places = places.flatten()
    if places.device.type == "cpu":
        return torch.bincount(places, minlength=size + 1)[:size]
    counts = torch.zeros(size + 1, dtype=torch.int64, device=places.device)  # bincount would wait for the device
    return counts.scatter_add_(0, places.long(), torch.ones_like(places, dtype=torch.int64))[:size]
