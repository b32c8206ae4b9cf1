"""The segmentation loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross-entropy over labeled pixels, 0 if there are none; logits (N, K, H, W), labels (N, H, W)."""
    total = functional.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp_min(1)
