"""The interface of an adaptation method: what it is given each step and what it gives back.

Letters: S source and T target images, K classes, C channels, H x W positions of a tapped layer, h x w pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Progress:
    """Where training stands, counted from 0."""

    epoch: int
    max_epochs: int
    step: int
    total_steps: int

    @property
    def fraction(self) -> float:
        """p by batches, 0 up to (not including) 1."""
        return self.step / self.total_steps


@dataclass(frozen=True)
class StepOutputs:
    """What one training step's forwards gave."""

    source_logits: Tensor
    """(S, K, h, w)"""
    source_labels: Tensor
    """(S, h, w), class ids and ignore_index."""
    source_valid: Tensor
    """(S, h, w), 1 where the label counts, 0 at ignored pixels."""
    source_features: Mapping[str, Tensor]
    """Layer name -> (S, C, H, W)."""
    target_features: Mapping[str, Tensor]
    """Layer name -> (T, C, H, W); empty for a method that does not use the target."""
    target_valid: Tensor | None = None
    """(T, h, w), 1 where the target image has data, 0 at nodata; None = everywhere."""


@dataclass(frozen=True)
class MethodLoss:
    """A method's share of the loss."""

    differentiated: Tensor | None
    """Added to the segmentation loss for the backward pass; None = nothing."""
    value: Tensor | None
    """The same loss unweighted, logged as loss/train_da."""
    weight: float
    """Its weight in what the encoder feels: loss/train_total is logged as L_seg + weight * value."""
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    """More to log this step, under full names such as da/domain_acc."""


class DomainAdaptationMethod(nn.Module, ABC):
    """A way to adapt. Subclass it, name the class in `domain_adaptation.method.class_path`, and `adapt` trains with it.

    The network's forwards and the segmentation loss are done for you; the method sees features and adds its loss. What it
    keeps from step to step belongs in parameters, buffers or `get_extra_state`: a resumed run gets those back.
    """

    feature_layers: tuple[str, ...] = ()
    """Layers whose features `loss` needs."""
    uses_target: bool = True
    """False: target images are not forwarded at all."""

    @abstractmethod
    def loss(self, outputs: StepOutputs, progress: Progress) -> MethodLoss:
        """The method's loss for one step, on a graph that reaches the network through the features."""

    def domain_hits(self, features: Mapping[str, Tensor], domain: int, valid: Tensor | None) -> Mapping[str, Tensor]:
        """Called in validation, in eval mode, with the features of one batch of `domain` (0 source, 1 target): layer -> (2,)
        right decisions of the method's domain classifier and all of them. `da/domain_acc_val` comes from their sums;
        default: there is no such classifier."""
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the method's own parameters; default: one group at the network's learning rate."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": parameters, "name": "method"}] if parameters else []

    def on_train_start(self, network: nn.Module) -> None:
        """Called once, before the first step; in a resumed run before the state of its checkpoint is put in."""

    def on_epoch_start(self, progress: Progress) -> None:
        """Called before each epoch."""

    def on_train_end(self, network: nn.Module) -> None:
        """Called once, after the last step."""
