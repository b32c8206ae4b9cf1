"""Histogram matching: the values of each source image get the distribution of those of a target image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dann_experiments.adaptation.companions.appearance import Images, TargetAppearance

PROBABILITY = 0.5  # as for `moments`


class HistogramMatching(TargetAppearance):
    """Each band of a source image gets the histogram of that of a target image of the batch (Gonzalez & Woods, Digital image
    processing, section 3.3; for domain adaptation Abramov et al. 2020).

        x <- Q_t(F_s(x)), F_s(x) = share of the source's pixels <= x,

    Q_t: the quantile function of the target, linear between its values as in `skimage.exposure.match_histograms`.
    """

    name = "histogram"

    def __init__(self, probability: float | None = None, seed: int = 0) -> None:
        super().__init__(PROBABILITY if probability is None else probability, seed)

    def like(self, source: Images, target: Images, batch: dict[str, dict[str, Tensor]], drawn: Tensor) -> Tensor:
        """Return the source images with the histograms of the target images."""
        own, order = _values(source).sort(2)
        theirs, _ = _values(target).sort(2)
        made = matched(own, _count(source), theirs, _count(target))
        return torch.empty_like(made).scatter_(2, order, made).view_as(source.pixels)


def _values(images: Images) -> Tensor:
    """Return (N, B, pixels), infinite where there is no data, which comes last in rising order."""
    return images.pixels.masked_fill(images.valid == 0, math.inf).flatten(2)


def _count(images: Images) -> Tensor:
    """Return the number of pixels with data, (N, 1, 1)."""
    return images.valid.sum((1, 2, 3)).long()[:, None, None].clamp_min(1)


def matched(source: Tensor, count: Tensor, target: Tensor, target_count: Tensor) -> Tensor:
    """Return the values of `source` (N, B, pixels) with the distribution of `target`; both in rising order, as they are found
    faster than in any other. The counts are those of the values that are not infinite; infinite ones become 0."""
    rank = torch.searchsorted(source, source, right=True).clamp_max(count)  # source pixels <= the value
    wanted = rank * target_count  # the quantile times both counts, so that comparisons are exact
    place = ((wanted + count - 1) // count - 1).clamp_min(0).clamp_max(target_count - 1)
    upper = target.gather(2, place)  # the smallest target value whose quantile is not below
    at_most = torch.searchsorted(target, upper, right=True).clamp_max(target_count)
    below = torch.searchsorted(target, upper)  # target pixels < `upper`
    lower = torch.where(below > 0, target.gather(2, (below - 1).clamp_min(0)), upper)
    share = (wanted - below * count).float() / ((at_most - below) * count).float()
    mixed = torch.where(upper > lower, lower + share * (upper - lower), upper)
    return torch.where(source.isinf(), 0.0, mixed)
