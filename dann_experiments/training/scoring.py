"""Scores whole sets: adds up over batches and ranks what the functions in `scores` need, and names a run's metrics.

Letters: N images, K classes, H x W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from dann_experiments import scores
from dann_experiments.config.store_names import labels_in_store
from dann_experiments.models.networks import logits_of_any_size, predicted_classes
from dann_experiments.models.symmetries import mean_probabilities
from dann_experiments.models.taps import evaluating
from dann_experiments.names import Metric, SetName, Tta
from dann_experiments.scores.average_precision import BINS, class_average_precision_from, count_probabilities
from dann_experiments.scores.bnm import batch_nuclear_norm_from
from dann_experiments.scores.confusion import count_pairs
from dann_experiments.scores.entropy import mean_entropy_from
from dann_experiments.scores.infomax import information_maximization_from
from dann_experiments.scores.predictions import PredictionSums, in_parts, in_range, log_probabilities, parts_of
from dann_experiments.scores.snd import PixelSample, neighborhood_density
from dann_experiments.training.ranks import gathered, sum_of, world


@dataclass(frozen=True)
class Scores:
    """The scores of one labeled set; the functions in `scores` document when a score is NaN."""

    confusion: np.ndarray
    """(K, K) pixel counts: rows = truth, columns = prediction, without ignored pixels."""
    loss: float
    """Mean cross-entropy per labeled pixel."""
    class_ap: np.ndarray | None = None
    """(K,) average precision per class, 0..1; None if it was not measured, as in checkpoints of earlier versions."""

    @property
    def class_iou(self) -> np.ndarray:
        """(K,) intersection over union, 0..1."""
        return scores.class_iou(self.confusion)

    @property
    def iou(self) -> float:
        """Macro mean over the classes present, 0..1; NaN if no pixel is labeled."""
        return scores.mean_iou(self.confusion)

    @property
    def floor(self) -> float:
        """Mean IoU of the best constant prediction, 0..1; NaN if no pixel is labeled."""
        return scores.constant_iou(self.confusion)

    @property
    def class_precision(self) -> np.ndarray:
        """(K,) share of each class's predicted pixels that are correct, 0..1."""
        return scores.class_precision(self.confusion)

    @property
    def class_recall(self) -> np.ndarray:
        """(K,) share of each class's labeled pixels that are found, 0..1."""
        return scores.class_recall(self.confusion)

    @property
    def class_f1(self) -> np.ndarray:
        """(K,) harmonic mean of precision and recall, 0..1."""
        return scores.class_f1(self.confusion)

    @property
    def accuracy(self) -> float:
        """Share of the labeled pixels that are correct, 0..1."""
        return scores.pixel_accuracy(self.confusion)

    @property
    def truth_pixels(self) -> np.ndarray:
        """(K,) number of labeled pixels per class."""
        return self.confusion.sum(1)

    @property
    def predicted_pixels(self) -> np.ndarray:
        """(K,) number of labeled pixels predicted as each class."""
        return self.confusion.sum(0)

    def as_plain(self) -> dict[str, Any]:
        """Return the scores as tensors and a number, for a checkpoint."""
        plain = {"confusion": torch.from_numpy(self.confusion), "loss": self.loss}
        return plain if self.class_ap is None else plain | {"class_ap": torch.from_numpy(self.class_ap)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Scores:
        """Make the scores from the result of `as_plain`."""
        class_ap = plain.get("class_ap")
        return cls(plain["confusion"].numpy(), plain["loss"], None if class_ap is None else class_ap.numpy())

    def metrics(self, name: str, class_names: Sequence[str]) -> dict[str, float]:
        """Return `iou/NAME`, and where they are defined `floor/NAME`, `class_iou/NAME/CLASS`, `map/NAME`, `ap/NAME/CLASS`,
        `share/NAME/CLASS` and `true_share/NAME/CLASS`."""
        values = {Metric.iou(name): self.iou}
        if not math.isnan(self.floor):
            values[Metric.floor(name)] = self.floor
        values |= _by_class(Metric.CLASS_IOU, name, class_names, self.class_iou)
        if self.class_ap is not None and not np.isnan(self.class_ap).all():
            values[f"{Metric.MEAN_AVERAGE_PRECISION}{name}"] = scores.macro_mean(self.class_ap)
            values |= _by_class(Metric.AVERAGE_PRECISION, name, class_names, self.class_ap)
        values |= _by_class(Metric.SHARE, name, class_names, scores.predicted_shares(self.confusion))
        return values | _by_class(Metric.TRUE_SHARE, name, class_names, scores.true_shares(self.confusion))

    def all_metrics(self, name: str, class_names: Sequence[str]) -> dict[str, float]:
        """Return `metrics`, then `precision`, `recall` and `f1`, each as /NAME (macro mean) and /NAME/CLASS (if defined), and
        `accuracy/NAME`."""
        values = self.metrics(name, class_names)
        for kind, found in (("precision", self.class_precision), ("recall", self.class_recall), ("f1", self.class_f1)):
            values |= {f"{kind}/{name}": scores.macro_mean(found)} | _by_class(f"{kind}/", name, class_names, found)
        return values | {f"accuracy/{name}": self.accuracy}


def metrics_of_sets(
    scores: Mapping[SetName, Scores], class_names: Sequence[str], complete: bool = False
) -> dict[str, float]:
    """Return the metrics of each set (`Scores.metrics`, or `all_metrics` if `complete`).

    For several domains also their means, so that each domain counts equally: iou/target_val is the mean of iou/target_val.NAME,
    without domains in which a score is not defined.
    """
    values: dict[str, float] = {}
    for whole in dict.fromkeys(name.whole for name in scores):
        own = [
            found.all_metrics(str(whole), class_names) if complete else found.metrics(str(whole), class_names)
            for name, found in scores.items() if name.whole == whole
        ]  # fmt: skip
        values |= {key: mean_of(found[key] for found in own if key in found) for key in dict.fromkeys(chain(*own))}
    for name, found in scores.items():
        if name.member is not None:
            values |= (found.all_metrics if complete else found.metrics)(str(name), class_names)
    return values


def shares_of_sets(predicted: Mapping[SetName, np.ndarray], class_names: Sequence[str]) -> dict[str, float]:
    """Return `share/SET/CLASS` of sets without labels, of which `predicted` has the pixels per predicted class, (K,).

    For several domains also the means, so that each domain counts equally."""
    values: dict[str, float] = {}
    shares = {name: counts / counts.sum() for name, counts in predicted.items() if counts.sum()}
    for whole in dict.fromkeys(name.whole for name in shares):
        own = [found for name, found in shares.items() if name.whole == whole]
        values |= _by_class(Metric.SHARE, str(whole), class_names, np.mean(own, 0))
    for name, found in shares.items():
        if name.member is not None:
            values |= _by_class(Metric.SHARE, str(name), class_names, found)
    return values


def mean_of(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _by_class(kind: str, name: str, class_names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    called = labels_in_store(class_names)
    return {
        f"{kind}{name}/{called[label]}": float(value)
        for label, value in zip(class_names, values, strict=True)
        if not np.isnan(value)
    }


class Scorer:
    """Adds up batches of logits and labels; the sums stay on the device until `compute`."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._confusion: Tensor = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._loss: Tensor | float = 0.0
        self._probabilities: Tensor | None = None

    def update(self, logits: Tensor, labels: Tensor, logs: Tensor | None = None) -> None:
        """Add a batch: logits (N, K, H, W), labels (N, H, W); `logs`: their `log_probabilities` (computed if None)."""
        for part in in_parts(logits):
            self._add(logits[part], labels[part], log_probabilities(logits[part]) if logs is None else logs[part])

    def _add(self, logits: Tensor, labels: Tensor, logs: Tensor) -> None:
        predicted = predicted_classes(logits)
        counts = count_pairs(predicted, labels, self.num_classes, self.ignore_index)
        self._confusion = self._confusion.to(logits.device) + counts
        self._loss = (
            self._loss + functional.nll_loss(logs, labels, ignore_index=self.ignore_index, reduction="sum").double()
        )
        counted = count_probabilities(logs, labels, self.ignore_index)
        self._probabilities = counted if self._probabilities is None else self._probabilities.add_(counted)

    def compute(self, over_ranks: bool = False) -> Scores:
        """Return the scores of everything added; `over_ranks`: by all ranks, which must all call this and get equal scores."""
        confusion = self._confusion
        loss = torch.as_tensor(self._loss, device=confusion.device).double()
        if over_ranks:
            confusion, loss = sum_of(confusion), sum_of(loss)
        histogram = self._probabilities
        if histogram is None:
            histogram = torch.zeros(self.num_classes, 2, BINS, dtype=torch.int64, device=confusion.device)
        if over_ranks:
            histogram = sum_of(histogram)
        pixels = int(confusion.sum())  # number of labeled pixels
        return Scores(
            confusion.cpu().numpy(),
            float(loss) / pixels if pixels else float("nan"),
            class_average_precision_from(histogram),
        )


class ShareCounter:
    """Counts the pixels predicted as each class in images without labels; the sums stay on the device until `compute`."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, logits: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch: logits (N, K, H, W); valid (N, H, W), 0 where a pixel has no data (None = all have)."""
        predicted = predicted_classes(logits)
        no_class = self.num_classes  # counted as the label to ignore
        labels = torch.zeros_like(predicted)
        if valid is not None:
            labels.masked_fill_(valid == 0, no_class)
        self._counts = self._counts.to(logits.device) + count_pairs(predicted, labels, self.num_classes, no_class)

    def compute(self, over_ranks: bool = False) -> np.ndarray:
        """Return the number of pixels per predicted class, (K,); `over_ranks`: of what all ranks added."""
        counts = sum_of(self._counts) if over_ranks else self._counts
        return counts.sum(0).cpu().numpy()


class SelectionScorer:
    """Adds up batches of logits of the unlabeled target; the sums stay on the device until `compute`.

    The scores do not depend on how the images are split into batches and among ranks. `first_image` is the index, in the whole
    set, of the first image added.
    """

    def __init__(self, first_image: int = 0) -> None:
        self._sums = PredictionSums()
        self._sample = PixelSample(first_image)

    def update(self, logits: Tensor, valid: Tensor | None = None, logs: Tensor | None = None) -> None:
        """Add a batch: logits (N, K, H, W) of any float type; valid (N, H, W), 0 where a pixel has no data (None = all have);
        `logs`: their `log_probabilities` (computed if None), which are overwritten. Raises ValueError for fewer than two
        classes and for other shapes."""
        with torch.no_grad():
            for of_part, known in parts_of(logits, valid, logs):
                self._sample.add(self._sums.add(of_part, known), known)

    def compute(self, over_ranks: bool = False) -> dict[str, float]:
        """Return `entropy`, `infomax`, `snd` and `bnm` of everything added, 0..1. All are NaN if no pixel has data or logits were
        not finite; `snd` also with fewer than three pixels. `over_ranks`: of what all ranks added, which must all call this and
        get equal scores."""
        sums, sample = self._sums, self._sample
        if over_ranks and world() > 1:
            sums, sample = sums.over_ranks(sum_of), sample.over_ranks(gathered)
        means = sums.means()
        return {
            "entropy": mean_entropy_from(means),
            "infomax": information_maximization_from(means),
            "snd": in_range(neighborhood_density(sample.rows())) if means.is_defined else math.nan,
            "bnm": batch_nuclear_norm_from(means),
        }


def score_set(network: nn.Module, loader: DataLoader, num_classes: int, ignore_index: int, tta: Tta = "none") -> Scores:
    """Return the scores of `network` in eval mode over every image of `loader`. `tta`: score the mean probabilities of several
    forward passes of each image (`models.symmetries`), else each image is forwarded once."""
    device = next(network.parameters()).device
    scorer = Scorer(num_classes, ignore_index)
    with evaluating(network):
        for batch in loader:
            scorer.update(_logits(network, batch["image"].to(device), tta), batch["mask"].to(device))
    return scorer.compute()


def _logits(network: nn.Module, images: Tensor, tta: Tta) -> Tensor:
    """Return logits (N, K, H, W), of which the softmax is the mean of the predictions if `tta` is not none."""
    forward = functools.partial(logits_of_any_size, network)
    if tta == "none":
        return forward(images)
    probabilities = mean_probabilities(forward, images, tta)
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def predict_images(network: nn.Module, images: Sequence[Tensor]) -> list[np.ndarray]:
    """Return class ids (H, W) for each normalized image (B, H, W), predicted in eval mode."""
    device = next(network.parameters()).device
    with evaluating(network):
        return [
            predicted_classes(logits_of_any_size(network, image[None].to(device)))[0].cpu().numpy() for image in images
        ]
