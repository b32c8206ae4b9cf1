"""Scores of a labelled set: one confusion matrix for the whole set; IoU, precision, recall and F1 a class, their macro
means, pixel accuracy, mean loss.

A score that would be 0 / 0 is NaN, and no NaN enters a mean: the IoU and the F1 of a class neither labelled nor predicted, the
precision of a class never predicted, the recall of a class without truth. So the mean precision is over the classes predicted,
the mean recall over those labelled, IoU and F1 over both together.

Letters: N images, K classes, H x W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from dann_experiments.config.names import labels_in_store
from dann_experiments.models.networks import logits_of_any_size, predicted_classes
from dann_experiments.models.taps import evaluating
from dann_experiments.training.ranks import sum_of

CPU_VALUES = 2**19
"""Logits of a batch that are scored at a time on a CPU, in whole images: 2 MB, which stay in its cache."""
MOST_VALUES = 2**23
"""The same on other devices, where each call costs: bounds the memory that scores need (128 MB)."""


@dataclass(frozen=True)
class Scores:
    """What one labelled set gave."""

    confusion: np.ndarray
    """(K, K) pixel counts, rows = truth, columns = prediction, ignored pixels left out."""
    loss: float
    """Mean cross-entropy a labelled pixel."""

    @property
    def class_iou(self) -> np.ndarray:
        """(K,) intersection over union, 0..1; NaN for a class neither labelled nor predicted."""
        return class_iou(self.confusion)

    @property
    def iou(self) -> float:
        """Macro mean over the classes present; NaN where no pixel is labelled."""
        return mean_iou(self.confusion)

    @property
    def class_precision(self) -> np.ndarray:
        """(K,) share of the pixels predicted as a class that are of it; NaN for a class never predicted."""
        return _ratio(np.diag(self.confusion), self.predicted_pixels)

    @property
    def class_recall(self) -> np.ndarray:
        """(K,) share of a class's pixels that are predicted as it; NaN for a class without truth."""
        return _ratio(np.diag(self.confusion), self.truth_pixels)

    @property
    def class_f1(self) -> np.ndarray:
        """(K,) harmonic mean of precision and recall, 2 hits / (truth + predicted), which is Dice; NaN as for IoU, and 0
        where precision or recall alone is NaN."""
        return _ratio(2 * np.diag(self.confusion), self.truth_pixels + self.predicted_pixels)

    @property
    def accuracy(self) -> float:
        """Share of the labelled pixels that are right; NaN where no pixel is labelled."""
        return float(_ratio(np.trace(self.confusion), self.confusion.sum()))

    @property
    def truth_pixels(self) -> np.ndarray:
        """(K,) labelled pixels of each class."""
        return self.confusion.sum(1)

    @property
    def predicted_pixels(self) -> np.ndarray:
        """(K,) pixels predicted as each class, where labelled."""
        return self.confusion.sum(0)

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint: a tensor and a number."""
        return {"confusion": torch.from_numpy(self.confusion), "loss": self.loss}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Scores:
        """What `as_plain` gave."""
        return cls(plain["confusion"].numpy(), plain["loss"])

    def metrics(self, name: str, class_names: Sequence[str]) -> dict[str, float]:
        """Under the names of a run: `iou/NAME` and `class_iou/NAME/CLASS` for the classes present."""
        return {f"iou/{name}": self.iou} | _by_class("class_iou", name, class_names, self.class_iou)

    def all_metrics(self, name: str, class_names: Sequence[str]) -> dict[str, float]:
        """`metrics`, then `precision`, `recall`, `f1`: each /NAME (macro mean) and /NAME/CLASS where it is defined; and
        `accuracy/NAME`."""
        values = self.metrics(name, class_names)
        for kind, scores in (("precision", self.class_precision), ("recall", self.class_recall), ("f1", self.class_f1)):
            values |= {f"{kind}/{name}": macro_mean(scores)} | _by_class(kind, name, class_names, scores)
        return values | {f"accuracy/{name}": self.accuracy}


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """(K,) IoU from pixel counts (K, K); NaN where a class has no pixel in truth and none in prediction."""
    hits = np.diag(confusion)
    return _ratio(hits, confusion.sum(0) + confusion.sum(1) - hits)


def mean_iou(confusion: np.ndarray) -> float:
    """Macro mean of `class_iou` over the classes present in truth or prediction."""
    return macro_mean(class_iou(confusion))


def macro_mean(scores: np.ndarray) -> float:
    """Mean of the scores (K,) that are defined; NaN if none is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an empty set has no mean: NaN, as documented
        return float(np.nanmean(scores))


def row_shares(confusion: np.ndarray) -> np.ndarray:
    """(K, K) each row of pixel counts as shares of its class's truth; a row of NaN for a class without truth."""
    return _ratio(confusion, confusion.sum(1, keepdims=True))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _by_class(kind: str, name: str, class_names: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    called = labels_in_store(class_names)
    return {
        f"{kind}/{name}/{called[label]}": float(value)
        for label, value in zip(class_names, scores, strict=True)
        if not np.isnan(value)
    }


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy over labelled pixels, 0 where there are none; logits (N, K, H, W), labels (N, H, W)."""
    total = functional.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp_min(1)


def in_parts(logits: Tensor) -> Iterator[slice]:
    """A batch of logits (N, K, H, W) as slices of a few images, so that what is made of them stays in a processor's cache and
    needs little memory."""
    most = CPU_VALUES if logits.device.type == "cpu" else MOST_VALUES
    images = max(most // max(logits[:1].numel(), 1), 1)
    for start in range(0, len(logits), images):
        yield slice(start, start + images)


def log_shares(logits: Tensor) -> Tensor:
    """Logarithms of the classes' probabilities (N, K, H, W), in single precision."""
    with torch.no_grad():
        return logits.float().log_softmax(1)


class Scorer:
    """Adds up batches of logits and labels; the sums stay on the device until `compute`."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._confusion: Tensor = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._loss: Tensor | float = 0.0

    def update(self, logits: Tensor, labels: Tensor, logs: Tensor | None = None) -> None:
        """Add a batch: logits (N, K, H, W), labels (N, H, W); `logs`: the logits' `log_shares`, if somebody has them."""
        for part in in_parts(logits):
            self._add(logits[part], labels[part], log_shares(logits[part]) if logs is None else logs[part])

    def _add(self, logits: Tensor, labels: Tensor, logs: Tensor) -> None:
        self._confusion = self._confusion.to(logits.device) + self._counts(predicted_classes(logits), labels)
        self._loss = (
            self._loss + functional.nll_loss(logs, labels, ignore_index=self.ignore_index, reduction="sum").double()
        )

    def _counts(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """(K, K) pixels by truth and prediction. Not torchmetrics': under deterministic algorithms, our default, it compares each
        pixel with each of K x K pairs, which takes longer than the network's forward (docs/performance.md)."""
        kinds = self.num_classes**2
        pairs = (labels * self.num_classes).add_(predicted).masked_fill_(labels == self.ignore_index, kinds).flatten()
        if pairs.device.type == "cpu":
            counts = torch.bincount(pairs, minlength=kinds + 1)
        else:  # bincount would wait for the device
            counts = torch.zeros(kinds + 1, dtype=torch.int64, device=pairs.device)
            counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        return counts[:kinds].view(self.num_classes, self.num_classes)

    def compute(self, over_ranks: bool = False) -> Scores:
        """The scores of everything added; `over_ranks`: by all ranks, which must all call this and get the same."""
        confusion = self._confusion
        loss = torch.as_tensor(self._loss, device=confusion.device).double()
        if over_ranks:
            confusion, loss = sum_of(confusion), sum_of(loss)
        pixels = int(confusion.sum())  # every labelled one is in it
        return Scores(confusion.cpu().numpy(), float(loss) / pixels if pixels else float("nan"))


def score_set(network: nn.Module, loader: DataLoader, num_classes: int, ignore_index: int) -> Scores:
    """Scores of `network` in eval mode over every image of `loader`, each forwarded once."""
    device = next(network.parameters()).device
    scorer = Scorer(num_classes, ignore_index)
    with evaluating(network):
        for batch in loader:
            scorer.update(logits_of_any_size(network, batch["image"].to(device)), batch["mask"].to(device))
    return scorer.compute()


def predict_images(network: nn.Module, images: Sequence[Tensor]) -> list[np.ndarray]:
    """Class ids (H, W) for each normalised image (B, H, W), in eval mode."""
    device = next(network.parameters()).device
    with evaluating(network):
        return [
            predicted_classes(logits_of_any_size(network, image[None].to(device)))[0].cpu().numpy() for image in images
        ]
