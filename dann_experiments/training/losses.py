"""The segmentation loss: cross-entropy, or a weighted sum of cross-entropy and the losses of segmentation-models-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import segmentation_models_pytorch.losses as smp_losses
import torch
from torch import Tensor, nn
from torch.nn import functional

from dann_experiments.config.loss import LossTerm

MODE = smp_losses.MULTICLASS_MODE


def segmentation_loss(
    logits: Tensor, labels: Tensor, ignore_index: int, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean cross-entropy over labeled pixels, 0 if there are none; logits (N, K, H, W), labels (N, H, W).

    With `weights` (K,) it is the weighted mean, each pixel by the weight of its class. `label_smoothing` e replaces a label by
    1 - e of it plus e/K of each class (Szegedy et al. 2016, section 7).
    """
    total = functional.cross_entropy(
        logits.float(), labels, weights, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    labelled = labels != ignore_index
    if weights is None:
        return total / labelled.sum().clamp_min(1)
    counted = (weights[torch.where(labelled, labels, 0)] * labelled).sum()
    return total / torch.where(counted > 0, counted, 1)


class SegmentationLoss(nn.Module):
    """The weighted sum of the terms in the setting `loss`.

    Called with logits (N, K, H, W) of any float type and labels (N, H, W), it returns the sum, a scalar in float32, and each term
    by name, before its weight. Pixels with the label `ignore_index` reach no term, whatever their logits; a batch without any
    labeled pixel has the loss 0 and the gradient 0. `class_weights`: (K,), at least 0.

    >>> loss = SegmentationLoss([LossTerm("cross_entropy"), LossTerm("dice")], ignore_index=255)
    >>> logits = torch.tensor([-100.0, 100.0])[None, :, None, None].expand(1, 2, 4, 4)
    >>> total, parts = loss(logits, torch.ones(1, 4, 4, dtype=torch.int64))
    >>> float(total), sorted(parts)
    (0.0, ['cross_entropy', 'dice'])
    """

    def __init__(
        self, terms: Sequence[LossTerm], ignore_index: int, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)
        self.terms = [(term.name, term.weight, self._built(term, class_weights)) for term in terms]
        names = [term.name for term in terms]
        self.names = [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]
        """Names of the terms; a loss that stands twice gets its number in the list."""

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the sum of the terms and the terms."""
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, (_, weight, term) in zip(self.names, self.terms, strict=True):
            parts[name] = term(logits, labels)
            weighted = parts[name] if weight == 1 else weight * parts[name]
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, parts

    def _built(self, term: LossTerm, class_weights: Sequence[float] | None) -> Callable[[Tensor, Tensor], Tensor]:
        ignored, given = self.ignore_index, None if class_weights is None else list(class_weights)
        if term.name == "cross_entropy":
            smoothing = term.label_smoothing or 0.0
            return lambda logits, labels: segmentation_loss(logits, labels, ignored, self.weights, smoothing)  # pyright: ignore[reportArgumentType]
        if term.name == "dice":
            return self._of_labelled(smp_losses.DiceLoss(MODE, ignore_index=ignored, class_weights=given))
        if term.name == "jaccard":
            return self._of_labelled(smp_losses.JaccardLoss(MODE, ignore_index=ignored, class_weights=given))
        if term.name == "tversky":
            return self._of_labelled(
                smp_losses.TverskyLoss(
                    MODE, ignore_index=ignored, class_weights=given, alpha=_or(term.alpha, 0.5),
                    beta=_or(term.beta, 0.5), gamma=_or(term.gamma, 1.0),
                )
            )  # fmt: skip
        if term.name == "focal":
            focal = smp_losses.FocalLoss(MODE, gamma=_or(term.gamma, 2.0), ignore_index=ignored, class_weights=given)
            return self._of_labelled(focal, zero_without=True)
        return self._of_labelled(smp_losses.LovaszLoss(MODE, ignore_index=ignored), zero_without=True)

    def _of_labelled(self, loss: nn.Module, zero_without: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a loss of the labeled pixels in float32.

        `zero_without`: make it 0 if there are none, where focal is NaN by itself and Lovász an empty tensor. That waits for the
        device, as these two do anyway; the others are 0 by themselves.
        """

        def of_labelled(logits: Tensor, labels: Tensor) -> Tensor:
            labelled = labels != self.ignore_index
            # 0 * NaN is NaN, so masking inside the loss would let a bad pixel through
            seen = torch.where(labelled.unsqueeze(1), logits.float(), 0)
            if zero_without and not bool(labelled.any()):
                return seen.sum()
            with torch.autocast(logits.device.type, enabled=False):
                return loss(seen, labels)

        return of_labelled


def class_weights_from(pixels: np.ndarray) -> list[float]:
    """Return the weights N / (K n_k) of classes with n_k of N pixels: each class then has the same share in a weighted sum over
    pixels, and the mean weight of a pixel is 1 (King & Zeng 2001, as `balanced` in scikit-learn). A class without pixels gets 0.

    `pixels`: (K,) counts.

    >>> class_weights_from(np.array([75, 25, 0]))
    [0.6666666666666666, 2.0, 0.0]
    """
    present = pixels > 0
    weights = np.zeros(len(pixels))
    weights[present] = pixels.sum() / (present.sum() * pixels[present])
    return weights.tolist()


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
