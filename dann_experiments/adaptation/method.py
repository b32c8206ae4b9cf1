"""The interface of adaptation methods: their inputs and outputs per training step.

Letters: S source and T target images, K classes, C channels, H x W positions of a tapped layer, h x w pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

OUTPUT_LAYER = "segmentation_head"  # where features are class logits
Need = Literal["target_logits", "images", "raw_images", "weak_labels"]
"""What a method may ask for beside features: the network's output for target images; the images themselves and further forward
passes; the normalization, by which `prepare` gets back to raw images; the masks in `data.target.weak_labels`, which are not truth
(for companions alone)."""


@dataclass(frozen=True)
class Progress:
    """Progress of training; epochs and steps count from 0."""

    epoch: int
    max_epochs: int
    step: int
    total_steps: int

    @property
    def fraction(self) -> float:
        """Progress p by steps, from 0 to less than 1."""
        return self.step / self.total_steps


@dataclass(frozen=True)
class StepOutputs:
    """Outputs of the forward passes of a training step."""

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
    source_domains: Tensor | None = None
    """(S,), label of each source image's domain, if the settings name several domains; labels count from 0, sources first."""
    target_domains: Tensor | None = None
    """(T,), the same of the target images."""
    given_images: tuple[Tensor, Tensor] | None = None
    """For a method that needs "images": source (S, B, h, w) and target (T, B, h, w), normalized."""
    given_forward: Callable[[Tensor], Tensor] | None = None
    """For the same: runs the network in training mode on images (N, B, h, w) and returns logits (N, K, h, w)."""

    given_weak_labels: Tensor | None = None
    """For a method that needs "weak_labels": (T, h, w), class ids and ignore_index, of masks that are not truth."""

    @property
    def weak_labels(self) -> Tensor:
        """The weak labels of the target images, for a method that needs "weak_labels"."""
        assert self.given_weak_labels is not None, 'the method must name "weak_labels" in `needs`'
        return self.given_weak_labels

    @property
    def target_logits(self) -> Tensor:
        """(T, K, h, w), for a method that needs "target_logits"."""
        return self.target_features[OUTPUT_LAYER]

    @property
    def images(self) -> tuple[Tensor, Tensor]:
        """The images of both domains, for a method that needs "images"."""
        assert self.given_images is not None, 'the method must name "images" in `needs`'
        return self.given_images

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of further images, on a graph that reaches the network, for a method that needs "images"."""
        assert self.given_forward is not None, 'the method must name "images" in `needs`'
        return self.given_forward(images)


@dataclass(frozen=True)
class MethodLoss:
    """A method's contribution to the loss."""

    differentiated: Tensor | None
    """Loss to add to the segmentation loss for the backward pass; None = nothing."""
    value: Tensor | None
    """The same loss unweighted, logged as loss/train_da."""
    weight: float
    """Effective weight of the loss for the encoder; loss/train_total is logged as L_seg + weight * value."""
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Further metrics to log in this step, by full name such as da/domain_acc."""
    added: Tensor | None = None
    """Weighted losses of companions, detached: part of `differentiated` and of loss/train_total."""


class DomainAdaptationMethod(nn.Module, ABC):
    """Base class of adaptation methods. Name a subclass in `domain_adaptation.method.class_path` to train with it.

    The trainer runs the forward passes and computes the segmentation loss; the method gets features and adds its own loss. Keep
    state between steps in parameters, buffers or `get_extra_state`, so that a resumed run restores it.
    """

    feature_layers: tuple[str, ...] = ()
    """Names of the layers whose features `loss` needs."""
    needs: frozenset[Need] = frozenset()
    """What `loss` needs beside features; what no method needs is not computed. A layer `segmentation_head` in `feature_layers`
    comes with "target_logits"."""
    uses_target: bool = True
    """If False, target images are not forwarded."""
    learns_from_target: bool = True
    """If False, no gradient goes from the target's features into the network, and their forward pass keeps none."""
    further_passes: int = 0
    """Batches that networks take per step beside that of the source and that of the target; a run logs the sum."""

    @property
    def aligned_layers(self) -> tuple[str, ...]:
        """Those of `feature_layers` at which the domains are to become alike."""
        return self.feature_layers

    def prepare(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the training batch, {"source": {"image", "mask"}, "target": {"image"}}, as it shall be forwarded; by default, as
        it is. Images are normalized, (N, B, h, w).

        "valid" (N, h, w) is 0 at pixels without data, where images are 0; it is absent if no image of the set lacks data. For a
        method that needs "raw_images" source and target have "mean" and "std", (N, B, 1, 1), with which image * std + mean is
        the raw image, 0..1."""
        return batch

    @abstractmethod
    def loss(self, outputs: StepOutputs, progress: Progress) -> MethodLoss:
        """Return the method's loss for one step; gradients reach the network through the features."""

    def domain_hits(self, features: Mapping[str, Tensor], domain: int, valid: Tensor | None) -> Mapping[str, Tensor]:
        """Return layer -> (2,): the numbers of correct and of all decisions of the domain classifier on a validation batch.

        Called in eval mode with features of `domain` (0 source, 1 target; or the label of one of several domains) and validity
        (N, h, w); da/domain_acc_val is computed from the sums. By default, there is no classifier.
        """
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Return optimizer groups of the method's parameters; by default, one group at the network's learning rate."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": parameters, "name": "method"}] if parameters else []

    def on_train_start(self, network: nn.Module) -> None:
        """Called once before the first step; in a resumed run, before the checkpoint's state is loaded."""

    def on_epoch_start(self, progress: Progress) -> None:
        """Called before each epoch."""

    def on_train_end(self, network: nn.Module) -> None:
        """Called once after the last step."""
