"""The confusion matrix of a labeled set, and precision, recall, F1 and pixel accuracy from it.

A score that would be 0 / 0 is NaN, and means ignore NaN. So the mean precision covers the predicted classes, and the mean
recall the labeled classes.

Letters: N images, K classes, H x W pixels.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by true and predicted class.

    `predicted` and `labels`: class ids of the same shape, such as (N, H, W); pixels labeled `ignore_index` do not count. Returns
    (K, K) int64 on the same device, rows = truth, columns = prediction. The sum over batches is the matrix of the set. Raises
    ValueError for different shapes, and for ids that are no whole numbers or not in 0..K-1, such as 255 (no data) in a map of
    `predict`: leave such pixels out by their label.

    >>> labels = torch.tensor([[0, 0], [1, 255]])
    >>> confusion_matrix(torch.tensor([[0, 1], [1, 1]]), labels, num_classes=2).tolist()
    [[1, 1], [0, 1]]
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predicted has shape {tuple(predicted.shape)}, labels {tuple(labels.shape)}; they must be equal."
        )
    counted = labels != ignore_index
    for name, ids in (("predicted", predicted), ("labels", labels)):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{name} holds {ids.dtype} values; give class ids as whole numbers.")
        wrong = ids[counted & ((ids < 0) | (ids >= num_classes))]
        if wrong.numel():
            raise ValueError(
                f"{name} holds the id {int(wrong[0])} where a pixel is labeled, but num_classes is {num_classes}: ids go "
                f"from 0 to {num_classes - 1}; set the label to ignore_index ({ignore_index}) where nothing is to be counted."
            )
    return count_pairs(predicted, labels, num_classes, ignore_index)


def count_pairs(predicted: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return what `confusion_matrix` returns, for ids known to be right: without checks, which would wait for the device."""
    # Not from torchmetrics: with deterministic algorithms, our default, it compares each pixel with each of the K x K pairs,
    # which takes longer than the forward pass of the network (docs/performance.md).
    kinds = num_classes**2
    pairs = (labels.long() * num_classes).add_(predicted).masked_fill_(labels == ignore_index, kinds).flatten()
    if pairs.device.type == "cpu":
        counts = torch.bincount(pairs, minlength=kinds + 1)
    else:  # bincount would synchronize with the device
        counts = torch.zeros(kinds + 1, dtype=torch.int64, device=pairs.device)
        counts.scatter_add_(0, pairs, torch.ones_like(pairs))
    return counts[:kinds].view(num_classes, num_classes)


def class_precision(confusion: Tensor | np.ndarray) -> np.ndarray:
    """Return the share of each class's predicted pixels that are correct, (K,) in 0..1; NaN for a class never predicted.

    >>> class_precision(torch.tensor([[6, 2], [3, 1]])).round(3).tolist()
    [0.667, 0.333]
    """
    counts = as_array(confusion)
    return ratio(np.diag(counts), counts.sum(0))


def class_recall(confusion: Tensor | np.ndarray) -> np.ndarray:
    """Return the share of each class's labeled pixels that are found, (K,) in 0..1; NaN for a class without labeled pixels.

    >>> class_recall(torch.tensor([[6, 2], [3, 1]])).tolist()
    [0.75, 0.25]
    """
    counts = as_array(confusion)
    return ratio(np.diag(counts), counts.sum(1))


def class_f1(confusion: Tensor | np.ndarray) -> np.ndarray:
    """Return the harmonic mean of precision and recall, 2 hits / (labeled + predicted), (K,) in 0..1. This is Dice.

    NaN for a class neither labeled nor predicted; 0 if only one of precision and recall is NaN.

    >>> class_f1(torch.tensor([[6, 2], [3, 1]])).round(3).tolist()
    [0.706, 0.286]
    """
    counts = as_array(confusion)
    return ratio(2 * np.diag(counts), counts.sum(1) + counts.sum(0))


def pixel_accuracy(confusion: Tensor | np.ndarray) -> float:
    """Return the share of labeled pixels that are correct, 0..1; NaN if no pixel is labeled.

    >>> round(pixel_accuracy(torch.tensor([[6, 2], [3, 1]])), 3)
    0.583
    """
    counts = as_array(confusion)
    return float(ratio(np.trace(counts), counts.sum()))


def row_shares(confusion: Tensor | np.ndarray) -> np.ndarray:
    """Divide each row by the labeled pixels of its class, (K, K); the row of a class without labeled pixels is NaN.

    >>> row_shares(torch.tensor([[6, 2], [3, 1]])).tolist()
    [[0.75, 0.25], [0.75, 0.25]]
    """
    counts = as_array(confusion)
    return ratio(counts, counts.sum(1, keepdims=True))


def macro_mean(scores: np.ndarray) -> float:
    """Return the mean of the per-class scores (K,) that are defined; NaN if none is.

    >>> macro_mean(np.array([0.5, np.nan, 1.0]))
    0.75
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an empty set has no mean: NaN, as documented
        return float(np.nanmean(scores))


def as_array(values: Tensor | np.ndarray) -> np.ndarray:
    """Return a tensor on any device as an array; an array unchanged."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide counts; NaN for 0 / 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
