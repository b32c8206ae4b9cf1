"""DANN (Ganin & Lempitsky 2015), its lambda = 0 control, and training on the source only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dann_experiments.adaptation.domain_classifier import SOURCE, TARGET, DomainClassifier, Kind
from dann_experiments.adaptation.gradient_reversal import GradientReversal
from dann_experiments.adaptation.method import (
    OUTPUT_LAYER,
    DomainAdaptationMethod,
    MethodLoss,
    Progress,
    StepOutputs,
)
from dann_experiments.adaptation.schedules import ConstantScheduler, DANNScheduler, LambdaScheduler
from dann_experiments.names import Metric


class DANNMethod(DomainAdaptationMethod):
    """Domain-adversarial training: one classifier per layer learns the domain, and the network learns to confuse it.

    lambda acts only in the gradient reversal: the network gets -lambda times the gradient of the domain loss, while the
    classifiers get the plain gradient at every lambda, including 0. The domain loss is the mean of the cross-entropies of both
    domains, so that batches of different size have equal weight; with several layers, it is the mean over layers. With more than
    two `domains`, the classifiers have one class for each, and the loss is the mean over the domains in the batch.

    `in_channels`: channels of the layer, or one number per layer. `discriminator_lr`: learning rate of the classifiers.
    `lambda_da` scales the schedule; if `lambda_schedule` is None, it is lambda itself. `step_mode`: progress p is epoch /
    max_epochs ("epoch") or step / total_steps ("batch"). Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        feature_layer: str | Sequence[str],
        in_channels: int | Sequence[int],
        classifier: Kind = "pooled",
        hidden_size: int = 1024,
        discriminator_lr: float = 1e-4,
        lambda_da: float = 1.0,
        lambda_schedule: LambdaScheduler | None = DANNScheduler(),
        step_mode: Literal["epoch", "batch"] = "epoch",
        domains: int = 2,
    ) -> None:
        super().__init__()
        self.feature_layers = (feature_layer,) if isinstance(feature_layer, str) else tuple(feature_layer)
        channels = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        if len(channels) != len(self.feature_layers):
            raise ValueError(f"in_channels has {len(channels)} values for {len(self.feature_layers)} feature layers")
        if step_mode not in ("epoch", "batch"):
            raise ValueError(f"step_mode is {step_mode!r}; give 'epoch' or 'batch'")
        if lambda_da < 0:
            raise ValueError(f"lambda_da is {lambda_da}; it must not be negative")
        self.classifiers = nn.ModuleList(
            DomainClassifier(count, hidden_size, classifier, on_logits=layer == OUTPUT_LAYER, domains=domains)
            for layer, count in zip(self.feature_layers, channels, strict=True)
        )
        self.domains = domains
        self.reversal = GradientReversal()
        self.discriminator_lr = discriminator_lr
        self.lambda_da = lambda_da
        self.schedule = ConstantScheduler() if lambda_schedule is None else lambda_schedule
        self.step_mode = step_mode

    def lambda_at(self, progress: Progress) -> float:
        """Return lambda for this step."""
        if self.step_mode == "epoch":
            return self.lambda_da * self.schedule.get_lambda(progress.epoch, progress.max_epochs)
        return self.lambda_da * self.schedule.get_lambda(progress.step, progress.total_steps)

    def loss(self, outputs: StepOutputs, progress: Progress) -> MethodLoss:
        lambda_now = self.lambda_at(progress)
        losses, accuracies, metrics = [], [], {}
        for layer, classifier in zip(self.feature_layers, self.classifiers, strict=True):
            loss, accuracy = self._layer_loss(classifier, layer, outputs, lambda_now)
            losses.append(loss)
            accuracies.append(accuracy)
            if len(self.feature_layers) > 1:
                metrics[f"da_layer/{layer}/domain_loss"] = loss.detach()
                metrics[f"da_layer/{layer}/domain_acc"] = accuracy
        domain_loss = torch.stack(losses).mean()
        metrics[Metric.DOMAIN_LOSS] = domain_loss.detach()
        metrics[Metric.DOMAIN_ACCURACY] = torch.stack(accuracies).mean()
        metrics[Metric.LAMBDA] = lambda_now
        return MethodLoss(domain_loss, domain_loss.detach(), lambda_now, metrics)

    def domain_hits(self, features: Mapping[str, Tensor], domain: int, valid: Tensor | None) -> Mapping[str, Tensor]:
        """Return the correct decisions and the number of decisions per layer on validation features; see the base class."""
        found = {}
        for layer, classifier in zip(self.feature_layers, self.classifiers, strict=True):
            assert isinstance(classifier, DomainClassifier)
            found[layer] = classifier.hits(features[layer], domain, valid)
        return found

    def param_groups(self) -> list[dict[str, Any]]:
        """Return one group: the classifiers, with `discriminator_lr`."""
        return [{"params": list(self.classifiers.parameters()), "lr": self.discriminator_lr, "name": "discriminator"}]

    def _layer_loss(
        self, classifier: nn.Module, layer: str, outputs: StepOutputs, lambda_now: float
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(classifier, DomainClassifier)
        sides: Mapping[int, tuple[Tensor, Tensor | None]] = {
            SOURCE: (outputs.source_features[layer], outputs.source_valid),
            TARGET: (outputs.target_features[layer], outputs.target_valid),
        }
        decided = classifier.logits_of(
            [(self._reversed(features, lambda_now), valid) for features, valid in sides.values()]
        )
        if self.domains > len(sides):
            return self._loss_of_several(classifier, decided, outputs)
        losses, accuracies = [], []
        for (domain, (_, valid)), logits in zip(sides.items(), decided, strict=True):
            loss, accuracy = classifier.loss_of(logits, domain, valid)
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    def _reversed(self, features: Tensor, lambda_now: float) -> Tensor:
        # at lambda 0 the network would get zeros; detached, the backward pass of a target that is forwarded alone is left out
        return self.reversal(features, lambda_now) if lambda_now else features.detach()

    def _loss_of_several(
        self, classifier: DomainClassifier, decided: Sequence[Tensor], outputs: StepOutputs
    ) -> tuple[Tensor, Tensor]:
        """Return the means over the domains in the batch of their mean cross-entropy and of their accuracy."""
        assert outputs.source_domains is not None
        assert outputs.target_domains is not None
        of_source = classifier.sums_by_domain(decided[0], outputs.source_domains, outputs.source_valid)
        losses, right, count = of_source + classifier.sums_by_domain(
            decided[1], outputs.target_domains, outputs.target_valid
        )
        there = (count > 0).to(losses.dtype)
        means = torch.stack([losses, right]) / count.clamp_min(1e-6)
        loss, accuracy = (means * there).sum(1) / there.sum().clamp_min(1)
        return loss, accuracy.detach()


class LambdaZero(DANNMethod):
    """The control: the forward passes, steps and classifiers of DANN with lambda = 0, so that the network gets no domain loss.

    Any gain over source-only training comes from target images in BatchNorm or from more training, not from the adversary.
    """

    learns_from_target = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lambda_da = 0.0


class SourceOnly(DomainAdaptationMethod):
    """No adaptation: training with only the segmentation loss of the source. Target images are not forwarded."""

    uses_target = False

    def loss(self, outputs: StepOutputs, progress: Progress) -> MethodLoss:
        return MethodLoss(None, None, 0.0)
