"""Training on weak target labels: masks that a rule made, which are not truth (Vega et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from dann_experiments.adaptation.companions.companion import Companion
from dann_experiments.adaptation.method import Need, Progress, StepOutputs

WEIGHT = 1.0  # that of the source's cross-entropy


class WeakLabels(Companion):
    """The mean cross-entropy of the target predictions against weak labels, over the pixels that have one:

        L = - sum over labeled pixels of log p(label) / number of labeled pixels; 0 in a batch without any.

    The idea is that of Vega et al. 2023, who train on masks made by change vector analysis and Otsu's threshold. The predictions
    are those of the plain target images, whose features DANN aligns, so it costs no further pass beyond the target's through the
    whole network. What the network learns is the rule, with its errors.
    """

    name = "weak_labels"
    needs: frozenset[Need] = frozenset({"target_logits", "weak_labels"})

    def __init__(self, weight: float | None = None, ramp: float = 0.0, ignore_index: int = 255) -> None:
        super().__init__(WEIGHT if weight is None else weight, ramp)
        self.ignore_index = ignore_index

    def loss(self, outputs: StepOutputs, progress: Progress) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return the mean cross-entropy over the weakly labeled pixels."""
        labels = outputs.weak_labels
        total = functional.cross_entropy(
            outputs.target_logits.float(), labels, ignore_index=self.ignore_index, reduction="sum"
        )
        return total / (labels != self.ignore_index).sum().clamp_min(1), {}
