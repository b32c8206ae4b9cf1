"""Scores of predictions on the unlabelled target, to choose a checkpoint or a trial without target labels.

Entropy, information maximisation, soft neighbourhood density and batch nuclear norm, each normalised to 0..1. All four judge
how sure and how varied predictions are, none whether they are right: a confident wrong network may score well.

Letters: N images, K classes, H x W pixels, p the softmax at a pixel, H(p) its entropy in nats, n pixels compared with each
other, S slots (a slot is a place for one pixel of an image in that comparison).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dann_experiments.training.ranks import gathered, sum_of, world
from dann_experiments.training.scores import in_parts, log_shares

PREFIX = "select/"
KEPT = "select/source_kept"
"""1 where the source's IoU is within `monitor.forgetting_threshold` of its baseline, else 0."""

TEMPERATURE = 0.05  # Saito et al. 2021
COMPARED = 2048
"""Most pixels that are compared with each other (their similarities take 16 MB)."""
SLOTS = 256
"""Most pixels of one image among them."""
_ROWS = 256  # similarities of so many pixels at a time: 2 MB, which stays in the processor's cache
_WEYL = 2654435769  # 2^32 / golden ratio: its multiples, modulo 2^32, spread evenly (Knuth, TAOCP 3, 6.4)


@dataclass(frozen=True)
class Score:
    """How a score is read."""

    better: Literal["max", "min"]
    worst: float
    """A value just outside of the score's range 0..1, so that it loses against the poorest that can be measured."""
    title: str


SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "select/entropy": Score("min", 2.0, "mean entropy"),
        "select/infomax": Score("max", -1.0, "information maximisation"),
        "select/snd": Score("max", -1.0, "soft neighbourhood density"),
        "select/bnm": Score("max", -1.0, "batch nuclear norm"),
    }
)
"""The scores by their full metric name."""


def choice_value(metric: str, metrics: Mapping[str, float]) -> float:
    """The value of `metric` by which a checkpoint or a trial is chosen, out of all its metrics.

    A `select/` score counts as its worst where `select/source_kept` is 0, so that a network that forgot the source is taken
    only if there is no other, and where it is NaN (no pixel with data, or logits that are not numbers). Without
    `select/source_kept` the source counts as kept. Other metrics stay as they are. Raises KeyError if `metric` is missing.
    """
    value = float(metrics[metric])
    score = SCORES.get(metric)
    if score is not None and (math.isnan(value) or metrics.get(KEPT, 1.0) == 0):
        return score.worst
    return value


class SelectionScorer:
    """Adds up batches of logits of the unlabelled target; the sums stay on the device until `compute`.

    `compute` gives, over every pixel with data:

    - `entropy`: mean H(p) / log K; lower is better (Grandvalet & Bengio 2004; as a validator Morerio et al. 2018).
    - `infomax`: (H(mean p) - mean H(p)) / log K, the mutual information of pixel and class; higher is better (Krause et al.
      2010, Shi & Sha 2012; as a validator Musgrave et al. 2022). Unlike entropy it does not reward one class everywhere.
    - `bnm`: nuclear norm of the matrix of all p (pixels x K) over sqrt(pixels * K), its greatest value; higher is better
      (Cui et al. 2020, who take it over a training batch; here the whole set is one batch). At least 1 / K, by uniform p.
    - `snd`: mean entropy of each pixel's soft neighbourhood, softmax(cosine of its p to the p of every other pixel / 0.05);
      higher is better (Saito et al. 2021). It differs from theirs in that it takes at most 2048 pixels, drawn evenly
      over the set and compared across images, and that it is divided by log(n - 1), its greatest value. It has a
      blind spot: one class everywhere is one dense neighbourhood and scores 1.

    The pixels of `snd` depend on the order of the images, their sizes and `valid` alone: each validation takes the same, however
    the images are split into batches, and into shares of several ranks: `first_image` is the number of the first one added.
    """

    def __init__(self, first_image: int = 0) -> None:
        self._images = first_image
        self._stride = 1  # every so many slots are looked at; doubles while the set turns out to be longer
        self._pool: list[tuple[Tensor, Tensor, Tensor]] = []
        """Numbers of slots (S,), their p (S, K), and whether a slot holds a pixel (S,)."""
        self._pooled = 0
        self._pixels: Tensor | float = 0.0
        self._entropy: Tensor | float = 0.0
        self._gram: Tensor | float = 0.0
        self._classes = 0

    def update(self, logits: Tensor, valid: Tensor | None = None, logs: Tensor | None = None) -> None:
        """Add a batch: logits (N, K, H, W) of any float type, valid (N, H, W), 0 where a pixel has no data (None = all have);
        `logs`: the logits' `log_shares`, if somebody has them and needs them no more, as they are overwritten. Raises
        ValueError for fewer than two classes."""
        if logits.shape[1] < 2:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} have fewer than two classes: nothing to be unsure of"
            )
        self._classes = logits.shape[1]
        with torch.no_grad():
            for part in in_parts(logits):
                of_part = log_shares(logits[part]) if logs is None else logs[part]
                self._add(of_part.flatten(2), None if valid is None else valid[part].flatten(1) != 0)

    def _add(self, logs: Tensor, known: Tensor | None) -> None:
        """Some images: log p (N, K, H W), overwritten, known (N, H W)."""
        shares = logs.exp()
        if known is not None:
            # A row of zeros adds nothing to any sum. By bits, as NaN, which nodata may have made, times 0 is NaN; filling by a
            # mask takes many times as long on a CPU.
            bits = known.to(torch.int32).neg_()[:, None]  # all 1 or all 0
            shares.view(torch.int32).bitwise_and_(bits)
            logs.view(torch.int32).bitwise_and_(bits)
        self._pixels = self._pixels + (logs[:, 0].numel() if known is None else known.sum().double())
        self._entropy = self._entropy - logs.mul_(shares).sum((1, 2)).double().sum()
        # the roots of small eigenvalues show the rounding of the sums, so these are made in double precision
        wide = shares.double()
        self._gram = self._gram + torch.bmm(wide, wide.mT).sum(0)
        self._keep(shares, known)
        self._images += len(logs)

    def compute(self, over_ranks: bool = False) -> dict[str, float]:
        """`entropy`, `infomax`, `snd` and `bnm` of everything added, 0..1. All are NaN without a pixel that has data, and where
        logits were not finite; `snd` also with fewer than three pixels, which have no neighbourhood to speak of. `over_ranks`:
        of what all ranks added, which must all call this and get the same."""
        if over_ranks and world() > 1:
            return self._of_all_ranks().compute()
        pixels = float(self._pixels)
        scores = dict.fromkeys((name.removeprefix(PREFIX) for name in SCORES), math.nan)
        if not pixels:
            return scores
        assert isinstance(self._gram, Tensor)
        entropy, greatest = float(self._entropy) / pixels, math.log(self._classes)
        gram = self._gram.cpu().numpy()
        if not (math.isfinite(entropy) and np.isfinite(gram).all()):
            return scores
        mean = gram.sum(0) / pixels  # of p, as each p has the sum 1
        of_mean = -float(np.sum(mean * np.log(np.maximum(mean, np.finfo(float).tiny))))
        norm = float(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0)).sum())  # of the singular values
        scores |= {
            "entropy": entropy / greatest,
            "infomax": (of_mean - entropy) / greatest,
            "snd": neighbourhood_density(self._compared()),
            "bnm": norm / math.sqrt(pixels * self._classes),
        }
        return {name: min(max(value, 0.0), 1.0) if value == value else value for name, value in scores.items()}

    def _keep(self, shares: Tensor, known: Tensor | None) -> None:
        """Keep p of some pixels of these images: shares (N, K, H W), known (N, H W).

        Each image has SLOTS slots, numbered through the set. The pixels of an image that have data are cut into as many runs
        of about equal length as there are slots; a slot takes one pixel of its run, at a place that its number scatters, and
        each image starts with another run, so that any every so many slots lie all over the images.
        """
        count, _, size = shares.shape
        first = self._images * SLOTS
        slots = torch.arange(
            first + (-first) % self._stride, first + count * SLOTS, self._stride, device=shares.device
        )  # (S,)
        image, slot = slots // SLOTS, slots % SLOTS
        here = image - self._images
        seen = None if known is None else known.flatten().cumsum(0)  # (N H W,) pixels with data so far
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
        place = start + _scattered(slots, end - start)  # among the pixels of the image that have data
        if seen is not None:
            place = torch.where(filled, torch.searchsorted(seen, before + place + 1) - here * size, 0)
        self._pool.append((slots, shares[here, :, place], filled))
        self._pooled += len(slots)
        self._thin()

    def _thin(self) -> None:
        """Keep the slots that are multiples of the stride, which doubles while they are too many."""
        while self._pooled > 2 * COMPARED:
            self._stride *= 2
            slots, rows, filled = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
            kept = slots % self._stride == 0
            self._pool = [(slots[kept], rows[kept], filled[kept])]
            self._pooled = len(self._pool[0][0])

    def _of_all_ranks(self) -> SelectionScorer:
        """What one process that saw all images would have."""
        merged = SelectionScorer()
        merged._classes = self._classes
        slots, rows, filled = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
        sums = [torch.as_tensor(part, device=rows.device) for part in (self._pixels, self._entropy)]
        merged._pixels, merged._entropy = sum_of(torch.stack([part.double() for part in sums]))
        assert isinstance(self._gram, Tensor)
        merged._gram = sum_of(self._gram)
        strides = gathered(torch.tensor([self._stride], device=rows.device))
        merged._stride = int(torch.cat(strides).max())
        slots, rows, filled = (torch.cat(gathered(part)) for part in (slots, rows, filled.to(torch.uint8)))
        kept = slots % merged._stride == 0
        merged._pool, merged._pooled = [(slots[kept], rows[kept], filled[kept] != 0)], int(kept.sum())
        merged._thin()
        return merged

    def _compared(self) -> Tensor:
        """p (n, K) of the pixels that are compared with each other."""
        _, rows, filled = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
        rows = rows[filled]
        if len(rows) > COMPARED:
            rows = rows[torch.arange(COMPARED, device=rows.device) * len(rows) // COMPARED]
        return rows


def neighbourhood_density(shares: Tensor, temperature: float = TEMPERATURE) -> float:
    """Soft neighbourhood density of probabilities or features (n, K), over log(n - 1): 0..1; NaN for n < 3."""
    count = len(shares)
    if count < 3:
        return math.nan
    unit = torch.nn.functional.normalize(shares.float(), dim=1)
    total = torch.zeros((), device=unit.device, dtype=torch.float64)
    for start in range(0, count, _ROWS):
        # minus the greatest cosine, 1: a common factor, which leaves the softmax as it is and keeps exp within 1
        scaled = torch.addmm(
            unit.new_tensor(-1.0 / temperature), unit[start : start + _ROWS], unit.T, alpha=1 / temperature
        )
        weights = scaled.exp()
        diagonal = torch.arange(len(scaled), device=unit.device)
        weights[diagonal, start + diagonal] = 0.0  # a pixel is no neighbour of itself
        normaliser = weights.sum(1)
        total += (normaliser.log() - weights.mul_(scaled).sum(1) / normaliser).double().sum()
    return float(total) / count / math.log(count - 1)


def _scattered(number: Tensor, below: Tensor) -> Tensor:
    """For each number an integer 0 <= i < below (int64, below up to 2^31) that runs evenly over them as numbers go up."""
    return (below * ((number * _WEYL) & 0xFFFFFFFF)) >> 32
