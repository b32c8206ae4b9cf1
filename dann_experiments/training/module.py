"""The training step: source through the whole network, target up to the tapped layers, one backward pass for both losses.

Metrics logged at step i belong to the weights after i optimizer steps: the first training step is step 0, and a validation
after k steps is logged at step k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from dann_experiments.adaptation.method import DomainAdaptationMethod, MethodLoss, Progress, StepOutputs
from dann_experiments.config.loss import LossTerm
from dann_experiments.models.batchnorm import statistics_kept
from dann_experiments.models.compiling import has_compiled, uncompiled
from dann_experiments.models.networks import logits_of_any_size, valid_as_seen
from dann_experiments.models.passes import Passes, check_joint, choose, forward_with_taps
from dann_experiments.models.taps import Tap, recording
from dann_experiments.names import DOMAINS, SOURCE_AND_TARGET, Metric, OneDomain
from dann_experiments.training import parts, ranks
from dann_experiments.training.losses import SegmentationLoss
from dann_experiments.training.optimizers import LearningRates, build_scheduler, order_states


@dataclass(frozen=True)
class StepLosses:
    """The losses that a training step differentiated, detached, on the step's device."""

    total: Tensor
    parts: Mapping[str, Tensor | float]
    """The terms of the total, by their names in messages; a domain loss over several layers has one term per layer."""
    weight: float
    """The method's weight, lambda."""


class AdaptationModule(pl.LightningModule):
    """A network, the method that adapts it, and the optimizer for both.

    Training batches are {"source": {"image", "mask"}, "target": {"image"}}; methods that do not use the target need no "target".
    The target part has "mask" if the method needs "weak_labels".
    A part "labelled": {"image", "mask"} of labeled target images joins the segmentation loss: its mean is over all pixels.
    With several domains, every part also has "domain" (N,), the label of each image's domain.
    Validation loaders are those of the domains `validated`; batches of a target need no "mask". A validation step returns
    {"logits" (N, K, H, W), "labels" (N, H, W) or None, "valid" (N, H, W) or None, "domain_hits"}. `batchnorm`: how the
    target's forward pass treats BatchNorm statistics in training, a value of that setting (docs/batchnorm.md).
    `channels_last`: use the channels-last memory format for the network and the images. `segmentation`: the loss of source logits
    and labels; None = cross-entropy. `part_rates`: part of the network -> its own learning rate. `domains`: all domains; the
    index is the label that a domain classifier learns. `scaling`: mean and standard deviation by which images of each domain were
    normalized, (D, B) both, for methods that need "raw_images".
    """

    def __init__(
        self,
        network: nn.Module,
        method: DomainAdaptationMethod,
        taps: Sequence[Tap],
        make_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        rates: LearningRates | None = None,
        ignore_index: int = 255,
        batchnorm: str = "separate",
        channels_last: bool = False,
        segmentation: SegmentationLoss | None = None,
        part_rates: Mapping[str, float] | None = None,
        validated: Sequence[OneDomain] = SOURCE_AND_TARGET,
        domains: Sequence[OneDomain] = SOURCE_AND_TARGET,
        scaling: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.method = method
        self.taps = [tap for tap in taps if tap.name in method.feature_layers]
        self.make_optimizer = make_optimizer
        self.rates = rates or LearningRates()
        self.part_rates = dict(part_rates or {})
        self.validated, self.domains = list(validated), list(domains)
        self.scaling = scaling
        self.ignore_index = ignore_index
        self.segmentation = segmentation or SegmentationLoss([LossTerm()], ignore_index)
        self.batchnorm = batchnorm
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        if channels_last:
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.losses: StepLosses | None = None
        """Losses of the last training step."""
        self._of_step: list[
            tuple[Mapping[str, Any], StepLosses]
        ] = []  # of its batches so far (accumulate_grad_batches)
        self.passes: Passes | None = None
        """How both domains are forwarded, chosen in the first step."""
        self._total_steps: int | None = None
        self._started = False
        self._may_have_compiled = True  # looked up once per validation: once per batch would be measurably slower
        self.ended = False
        """True after the method's `on_train_end`."""
        if batchnorm == "joint" and method.uses_target:
            check_joint(self.taps)

    def progress(self) -> Progress:
        """Return the current epoch and step, and their totals."""
        if self._total_steps is None:  # computed once: Lightning goes through the loaders for it
            self._total_steps = max(int(self.trainer.estimated_stepping_batches), 1)
        total_steps = self._total_steps
        max_epochs = self.trainer.max_epochs or 1
        if max_epochs < 0:  # the trainer is limited by steps only
            max_epochs = math.ceil(total_steps / max(int(self.trainer.num_training_batches), 1))
        return Progress(self.trainer.current_epoch, max_epochs, self.trainer.global_step, total_steps)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        batch = self.method.prepare(self._with_scaling(batch) if "raw_images" in self.method.needs else batch)
        outputs = self.step_outputs(batch)
        segmentation, terms = self.segmentation(*self._supervised(outputs, batch.get("labelled")))
        share = self.method.loss(outputs, self.progress())
        metrics: dict[str, Any] = {
            Metric.SEGMENTATION_LOSS: segmentation.detach(),
            Metric.TOTAL_LOSS: segmentation.detach(),
        }
        if len(terms) > 1:
            metrics |= {f"{Metric.SEGMENTATION_LOSS}_{name}": term.detach() for name, term in terms.items()}
        if share.value is not None:
            metrics[Metric.ADAPTATION_LOSS] = share.value
            metrics[Metric.TOTAL_LOSS] = segmentation.detach() + share.weight * share.value
        if share.added is not None:
            metrics[Metric.TOTAL_LOSS] = metrics[Metric.TOTAL_LOSS] + share.added
        total = segmentation if share.differentiated is None else segmentation + share.differentiated
        losses = StepLosses(total.detach(), _loss_parts(terms, share, self.method), share.weight)
        self._of_step.append((metrics | dict(share.metrics), losses))
        if not self.trainer.fit_loop.epoch_loop._should_accumulate():  # this batch is the last of its step
            self._log_step()
        return total

    def _with_scaling(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the batch with "mean" and "std" (N, B, 1, 1) of the images of both domains."""
        assert self.scaling is not None, 'a method that needs "raw_images" must be given `scaling`'
        made = dict(batch)
        for number, role in enumerate(DOMAINS):
            if role in batch:
                images, own = batch[role]["image"], batch[role].get("domain")
                label = torch.full((len(images),), number, device=images.device) if own is None else own
                mean, std = (side.to(images.device)[label][:, :, None, None] for side in self.scaling)
                made[role] = {**batch[role], "mean": mean, "std": std}
        return made

    def _supervised(self, outputs: StepOutputs, labelled: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the logits and labels that the segmentation loss takes: the source's, with those of labeled target images all
        pixels in one row, (1, K, P, 1) and (1, P, 1).

        Target images have a forward pass of their own, so BatchNorm normalizes them with the statistics of their batch; with
        `batchnorm` source_only they do not update the running ones."""
        if labelled is None:
            return outputs.source_logits, outputs.source_labels
        images = labelled["image"].to(memory_format=self.memory_format)
        with statistics_kept(self.network) if self.batchnorm == "source_only" else nullcontext():
            logits = self.network(images)
        pixels = [part.movedim(1, 0).flatten(1) for part in (outputs.source_logits, logits)]
        labels = torch.cat([outputs.source_labels.flatten(), labelled["mask"].flatten()])
        return torch.cat(pixels, 1)[None, :, :, None], labels[None, :, None]

    def _log_step(self) -> None:
        """Log the metrics of the step's batches, and keep their losses; the means of both if there are several batches."""
        metrics, self.losses = self._of_step[0] if len(self._of_step) == 1 else _mean_of_batches(self._of_step)
        self._of_step = []
        metrics = ranks.mean_of(dict(metrics), self.device)
        for logger in self.loggers:
            # as tensors: a .item() here would wait for the device in each step
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def step_outputs(self, batch: dict[str, dict[str, Tensor]]) -> StepOutputs:
        """Forward one training batch and return logits, labels and features."""
        images, labels = batch["source"]["image"].to(memory_format=self.memory_format), batch["source"]["mask"]
        target_features: dict[str, Tensor] = {}
        if self.method.uses_target and self.taps:  # without a tap nothing would use the target's features
            if self.passes is None:
                self.passes = choose(self.network, self.taps, self.batchnorm, images.shape[1])
            target_images = batch["target"]["image"].to(memory_format=self.memory_format)
            logits, source_features, target_features = self.passes(
                self.network, images, target_images, self.method.learns_from_target
            )
        else:
            logits, source_features = forward_with_taps(self.network, images, self.taps)
        valid = (labels != self.ignore_index).to(images.dtype)
        target = batch["target"] if self.method.uses_target and "target" in batch else {}
        given: dict[str, Any] = {}
        if "images" in self.method.needs:
            both = (images, target["image"].to(memory_format=self.memory_format))
            given = {"given_images": both, "given_forward": self._forward_more}
        if "weak_labels" in self.method.needs:
            given["given_weak_labels"] = target["mask"]
        return StepOutputs(
            logits, labels, valid, source_features, target_features, target.get("valid"), batch["source"].get("domain"),
            target.get("domain"), **given,
        )  # fmt: skip

    def _forward_more(self, images: Tensor) -> Tensor:
        """Return the logits of further images; with `batchnorm` source_only they do not update running statistics."""
        with statistics_kept(self.network) if self.batchnorm == "source_only" else nullcontext():
            return self.network(images.to(memory_format=self.memory_format))

    def on_validation_start(self) -> None:
        self._may_have_compiled = has_compiled(self.network)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            ranks.average_buffers(self)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        images, labels, valid = batch["image"], batch.get("mask"), batch.get("valid")
        images = images.to(memory_format=self.memory_format)
        as_written = uncompiled(self.network) if self._may_have_compiled else nullcontext()
        with recording(self.network, self.taps) as features, as_written:
            logits = logits_of_any_size(self.network, images)
        counted = valid  # the pixels on which a classifier decides the domain, as in training
        domain = self.validated[dataloader_idx]
        if domain.role == "source" and labels is not None:
            counted = (labels != self.ignore_index).to(images.dtype)
        if counted is None:
            counted = torch.ones_like(images[:, 0])
        hits = self.method.domain_hits(features, self.domains.index(domain), valid_as_seen(self.network, counted))
        return {"logits": logits, "labels": labels, "valid": valid, "domain_hits": hits}

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.param_groups())
        scheduler = build_scheduler(optimizer, self.rates, self.progress().total_steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the parameters of the network, those of parts with a learning rate of their own apart, and of the method."""
        return [*parts.param_groups(self.network, self.part_rates), *self.method.param_groups()]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the network and each classifier separately: with one norm, a classifier's gradient would scale the network's."""
        if gradient_clip_val is None:
            return
        of_network = [group["params"] for group in optimizer.param_groups if parts.is_of_network(group)]
        others = [group["params"] for group in optimizer.param_groups if not parts.is_of_network(group)]
        for parameters in (list(itertools.chain(*of_network)), *others):
            clip_grad_norm_(parameters, gradient_clip_val)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # before the saved state is loaded: it may include modules that the method creates here
        self.method.on_train_start(self.network)
        self._started = True

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:  # a checkpoint's states have been loaded by now
            order_states(optimizer)
        if not self._started:
            self.method.on_train_start(self.network)
            self._started = True

    @property
    def passes_per_step(self) -> int:
        """Number of batches that networks take per step: the source's, the target's (up to the last tap), and those that the
        method asks for; labeled target images are one more, and not counted."""
        return 1 + (self.method.uses_target and bool(self.taps)) + self.method.further_passes

    def on_train_epoch_start(self) -> None:
        self.method.on_epoch_start(self.progress())

    def on_train_end(self) -> None:
        self.method.on_train_end(self.network)
        self.ended = True


def _mean_of_batches(
    batches: Sequence[tuple[Mapping[str, Any], StepLosses]],
) -> tuple[dict[str, Any], StepLosses]:
    metrics = {name: _mean([one[name] for one, _ in batches]) for name in batches[0][0]}
    losses = [own for _, own in batches]
    parts = {name: _mean([own.parts[name] for own in losses]) for name in losses[0].parts}
    return metrics, StepLosses(_mean([own.total for own in losses]), parts, losses[-1].weight)


def _mean(values: Sequence[Any]) -> Any:
    return sum(values[1:], start=values[0]) / len(values)


def _loss_parts(
    terms: Mapping[str, Tensor], share: MethodLoss, method: DomainAdaptationMethod
) -> dict[str, Tensor | float]:
    parts: dict[str, Tensor | float] = {
        "the segmentation loss" if len(terms) == 1 else f"the segmentation loss {name}": term.detach()
        for name, term in terms.items()
    }
    if share.added is not None:
        names = [name for name in share.metrics if name.count("/") == 1 and name.startswith(Metric.PART)]
        parts |= {f"the companion {name.removeprefix(Metric.PART)}": share.metrics[name] for name in names}
        if share.value is not None:
            parts[f"the domain loss of {', '.join(method.aligned_layers)}"] = share.value
    elif share.differentiated is not None:
        of_layers = {
            f"the domain loss of {layer}": share.metrics[f"da_layer/{layer}/domain_loss"]
            for layer in method.feature_layers
            if f"da_layer/{layer}/domain_loss" in share.metrics
        }
        whole = {f"the domain loss of {', '.join(method.feature_layers)}": share.differentiated.detach()}
        parts |= of_layers or whole
    return parts
