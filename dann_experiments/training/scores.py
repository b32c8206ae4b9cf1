"""Scores of a labelled set: one confusion matrix for the whole set, IoU a class, their macro mean, mean loss.

Letters: N images, K classes, H x W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.models.taps import evaluating


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

    def metrics(self, name: str, class_names: Sequence[str]) -> dict[str, float]:
        """Under the names of a run: `iou/NAME` and `class_iou/NAME/CLASS` for the classes present."""
        values = {f"iou/{name}": self.iou}
        values |= {
            f"class_iou/{name}/{metric_name(label)}": float(value)
            for label, value in zip(class_names, self.class_iou, strict=True)
            if not np.isnan(value)
        }
        return values


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """(K,) IoU from pixel counts (K, K); NaN where a class has no pixel in truth and none in prediction."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def mean_iou(confusion: np.ndarray) -> float:
    """Macro mean of `class_iou` over the classes present in truth or prediction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an empty set has no mean: NaN, as documented
        return float(np.nanmean(class_iou(confusion)))


def metric_name(label: str) -> str:
    """`label` with the characters that MLflow refuses in a metric's name, and slashes, replaced by _."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-. ") else "_" for letter in label)


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy over labelled pixels, 0 where there are none; logits (N, K, H, W), labels (N, H, W)."""
    total = functional.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp_min(1)


class Scorer:
    """Adds up batches of logits and labels; the sums stay on the device until `compute`."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self._confusion = MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)
        self._loss: Tensor | float = 0.0
        self._pixels: Tensor | float = 0.0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (N, K, H, W), labels (N, H, W)."""
        self._confusion.to(logits.device).update(logits.argmax(1), labels)
        self._loss = (
            self._loss
            + functional.cross_entropy(logits.float(), labels, ignore_index=self.ignore_index, reduction="sum").double()
        )
        self._pixels = self._pixels + (labels != self.ignore_index).sum()

    def compute(self) -> Scores:
        """The scores of everything added."""
        pixels = float(self._pixels)
        return Scores(
            confusion=self._confusion.compute().cpu().numpy(),
            loss=float(self._loss) / pixels if pixels else float("nan"),
        )


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
        return [logits_of_any_size(network, image[None].to(device)).argmax(1)[0].cpu().numpy() for image in images]
