"""Agreement of two maps of the same pixels: how alike are the predictions of two networks?

Letters: K classes, P pixels.
"""

from __future__ import annotations

import numpy as np

from dann_experiments.scores.confusion import as_array

CHUNK = 2**22  # pixels that are counted at once, to bound memory


def count_agreement(first: np.ndarray, second: np.ndarray, num_classes: int, ignore_index: int = 255) -> np.ndarray:
    """Count pixels by the class in each of two maps; a pixel that is `ignore_index` in either one does not count.

    `first` and `second`: class ids of the same shape. Returns (K, K) int64: rows = first, columns = second.

    >>> count_agreement(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 255]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    counts = np.zeros(num_classes**2, np.int64)
    first, second = first.reshape(-1), second.reshape(-1)
    for start in range(0, first.size, CHUNK):
        one, other = (ids[start : start + CHUNK] for ids in (first, second))
        known = (one != ignore_index) & (other != ignore_index)
        pairs = one[known].astype(np.int64) * num_classes + other[known]
        counts += np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def kappa(agreement: np.ndarray) -> float:
    """Return Cohen's kappa (Cohen 1960): the share of equal pixels beyond what chance would give, / its greatest value.

    `agreement`: (K, K), from `count_agreement`. At most 1, which means equal maps; 0: equal as often as chance. NaN without
    pixels, and for two maps of one and the same class, whose agreement says nothing.

    >>> kappa(np.array([[2, 0], [0, 2]])), kappa(np.array([[1, 1], [1, 1]]))
    (1.0, 0.0)
    """
    shares = as_array(agreement).astype(float)
    total = shares.sum()
    if not total:
        return float("nan")
    shares /= total
    by_chance = float(shares.sum(0) @ shares.sum(1))
    return float("nan") if by_chance == 1 else float((np.trace(shares) - by_chance) / (1 - by_chance))


def vote_entropy(votes: np.ndarray) -> np.ndarray:
    """Return how much a committee disagrees per pixel (Dagan & Engelson 1995): the entropy of its votes / log K.

    `votes`: (K, P), the number or the weight of the members that chose each class, at least 0. Returns (P,): 0 where all agree, 1
    where each class has as many votes; 0 where nobody votes.

    >>> vote_entropy(np.array([[4, 2, 0], [0, 2, 0]])).tolist()
    [0.0, 1.0, 0.0]
    """
    total = votes.sum(0)
    shares = votes / np.where(total > 0, total, 1)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.abs((shares * logs).sum(0)) / np.log(len(votes))
