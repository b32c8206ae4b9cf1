"""Soft neighborhood density (Saito et al. 2021): measures how many close neighbors each prediction has among the others.

Letters: N images, K classes, P pixels per image, n pixels compared with each other, S slots (each holds one pixel of an image
for that comparison).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dann_experiments.scores.predictions import in_range, parts_of

TEMPERATURE = 0.05  # Saito et al. 2021
COMPARED = 2048
"""Maximal number of pixels that are compared with each other (their similarities take 16 MB)."""
SLOTS = 256
"""Maximal number of pixels per image among them."""
_ROWS = 256  # similarities are computed for so many pixels at a time: 2 MB, which fits into the cache of the processor
_WEYL = 2654435769  # 2^32 / golden ratio: its multiples, modulo 2^32, spread evenly (Knuth, TAOCP 3, 6.4)


def soft_neighborhood_density(logits: Tensor, valid: Tensor | None = None) -> float:
    """Return the `neighborhood_density` of the softmax at up to 2048 pixels, spread evenly over all images; higher is better.

    `logits`: (N, K, ...), such as (N, K, H, W); `valid`: (N, ...), 0 where a pixel has no data. The pixels depend only on the
    order and sizes of the images and on `valid`, so two networks are compared at the same pixels. The range is 0..1; NaN for
    fewer than three pixels with data. Limitation: one class everywhere is one dense neighborhood and scores 1. Raises ValueError
    for fewer than two classes and for other shapes.

    >>> round(soft_neighborhood_density(torch.zeros(2, 5, 8, 8)), 3)
    1.0
    >>> round(soft_neighborhood_density(100 * torch.eye(4)[:, :, None].repeat(5, 1, 1)), 3)
    0.471
    """
    sample = PixelSample()
    with torch.no_grad():
        for logs, known in parts_of(logits, valid):
            sample.add(logs.exp(), known)
    return in_range(neighborhood_density(sample.rows()))


def neighborhood_density(rows: Tensor, temperature: float = TEMPERATURE) -> float:
    """Return the mean entropy of the rows' soft neighborhoods divided by its maximum, log(n - 1): 0..1.

    The soft neighborhood of a row is softmax(cosine to every other row / temperature). `rows`: probabilities or features (n, F).
    NaN for n < 3.

    >>> clusters = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    >>> round(neighborhood_density(clusters), 3)  # each row has 2 neighbors among 5: log 2 / log 5
    0.431
    """
    count = len(rows)
    if count < 3:
        return math.nan
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    total = torch.zeros((), device=unit.device, dtype=torch.float64)
    for start in range(0, count, _ROWS):
        # minus the largest cosine, 1: this does not change the softmax and keeps exp within 1
        scaled = torch.addmm(
            unit.new_tensor(-1.0 / temperature), unit[start : start + _ROWS], unit.T, alpha=1 / temperature
        )
        weights = scaled.exp()
        diagonal = torch.arange(len(scaled), device=unit.device)
        weights[diagonal, start + diagonal] = 0.0  # a row is not its own neighbor
        normalizer = weights.sum(1)
        total += (normalizer.log() - weights.mul_(scaled).sum(1) / normalizer).double().sum()
    return float(total) / count / math.log(count - 1)


class PixelSample:
    """Keeps p of at most COMPARED pixels, spread evenly over a set that is added image by image.

    The choice of pixels depends only on order, size and valid pixels of the images, not on how they are split into batches or
    over processes. `first_image`: index, in the whole set, of the first image that is added here.
    """

    def __init__(self, first_image: int = 0) -> None:
        self._images = first_image
        self._stride = 1  # only slots that are multiples of it are used; it doubles as the set grows
        self._pool: list[tuple[Tensor, Tensor, Tensor]] = []
        """Numbers of slots (S,), their p (S, K), and a mask of the slots that hold a pixel (S,)."""
        self._pooled = 0

    def add(self, shares: Tensor, known: Tensor | None) -> None:
        """Keep p of some pixels of these images: `shares` (N, K, P), `known` (N, P), true where there is data.

        Each image has SLOTS slots, which are numbered over the whole set. The valid pixels of an image are divided into as many
        runs of about equal length as there are slots. A slot takes one pixel of its run, at a position that depends on its
        number, and each image starts with another run, so that every n-th slot still covers the whole image area.
        """
        count, _, size = shares.shape
        first = self._images * SLOTS
        slots = torch.arange(
            first + (-first) % self._stride, first + count * SLOTS, self._stride, device=shares.device
        )  # (S,)
        image, slot = slots // SLOTS, slots % SLOTS
        here = image - self._images
        seen = None if known is None else known.flatten().cumsum(0)  # (N P,) number of pixels with data so far
        if seen is None:
            before, pixels = 0, torch.full_like(slots, size)
        else:
            ends = seen[size - 1 :: size]  # (N,)
            starts = torch.cat([ends.new_zeros(1), ends[:-1]])
            before, pixels = starts[here], (ends - starts)[here]
        runs = pixels.clamp_max(SLOTS)
        filled = slot < runs
        safe = runs.clamp_min(1)
        run = (slot + _scattered(image, safe)) % safe
        start, end = run * pixels // safe, (run + 1) * pixels // safe
        place = start + _scattered(slots, end - start)  # index among the pixels of the image that have data
        if seen is not None:
            place = torch.where(filled, torch.searchsorted(seen, before + place + 1) - here * size, 0)
        self._pool.append((slots, shares[here, :, place], filled))
        self._pooled += len(slots)
        self._images += count
        self._thin()

    def over_ranks(self, gathered: Callable[[Tensor], list[Tensor]]) -> PixelSample:
        """Return the sample that one process with all images would have; `gathered` collects a tensor from every process."""
        merged = PixelSample()
        slots, rows, filled = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
        strides = gathered(torch.tensor([self._stride], device=rows.device))
        merged._stride = int(torch.cat(strides).max())
        slots, rows, filled = (torch.cat(gathered(part)) for part in (slots, rows, filled.to(torch.uint8)))
        kept = slots % merged._stride == 0
        merged._pool, merged._pooled = [(slots[kept], rows[kept], filled[kept] != 0)], int(kept.sum())
        merged._thin()
        return merged

    def rows(self) -> Tensor:
        """Return p (n, K) of the pixels to compare with each other."""
        if not self._pool:
            return torch.zeros(0, 1)
        _, rows, filled = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
        rows = rows[filled]
        if len(rows) > COMPARED:
            rows = rows[torch.arange(COMPARED, device=rows.device) * len(rows) // COMPARED]
        return rows

    def _thin(self) -> None:
        """Double the stride while there are too many slots, and keep only its multiples."""
        while self._pooled > 2 * COMPARED:
            self._stride *= 2
            slots, rows, filled = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
            kept = slots % self._stride == 0
            self._pool = [(slots[kept], rows[kept], filled[kept])]
            self._pooled = len(self._pool[0][0])


def _scattered(number: Tensor, below: Tensor) -> Tensor:
    """Return an integer 0 <= i < below (int64, up to 2^31) per number; they spread evenly as numbers increase."""
    return (below * ((number * _WEYL) & 0xFFFFFFFF)) >> 32
