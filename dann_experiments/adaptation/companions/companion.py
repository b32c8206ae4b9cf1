"""The interface of companions, and the method that combines them with another one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dann_experiments.adaptation.method import (
    OUTPUT_LAYER,
    DomainAdaptationMethod,
    MethodLoss,
    Need,
    Progress,
    StepOutputs,
)
from dann_experiments.names import Metric


class Part(nn.Module):
    """What the two kinds of companions share: a `Companion` adds a loss, an `Appearance` changes the source images.

    Keep state between steps in parameters, buffers or `get_extra_state`, so that a resumed run restores it.
    """

    name: str
    """Its name in settings and metrics."""
    needs: frozenset[Need] = frozenset()
    """What `prepare` and `loss` need beside features."""
    uses_target: bool = True
    """False if it needs nothing of the target."""
    further_passes: int = 0
    """Batches that networks take for it per step, beside that of the source and that of the target."""

    def prepare(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the training batch as it shall be forwarded, without changing the given one; see that of the method."""
        return batch

    def on_train_start(self, network: nn.Module) -> None:
        """Called once before the first step; in a resumed run, before the checkpoint's state is loaded."""


class Companion(Part, ABC):
    """A loss on the target beside that of a method.

    `weight`: its factor; `ramp`: share of the training (0..1) in which the factor rises linearly from 0 to `weight`.
    """

    def __init__(self, weight: float, ramp: float = 0.0) -> None:
        super().__init__()
        self.weight, self.ramp = weight, ramp

    @abstractmethod
    def loss(self, outputs: StepOutputs, progress: Progress) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return the loss of one step before its weight, a scalar, and further metrics by their full names."""

    def weight_at(self, progress: Progress) -> float:
        """Return the factor of this step."""
        return self.weight * (min(progress.fraction / self.ramp, 1.0) if self.ramp > 0 else 1.0)


class WithCompanions(DomainAdaptationMethod):
    """A method with companions: its loss is L_method + sum of weight * L_companion, on batches that the other companions have
    changed, one after the other in the given order.

    The method's own loss, classifiers and metrics are unchanged, so that DANN with companions and its lambda = 0 control with the
    same companions differ in the adversary alone.
    """

    def __init__(self, method: DomainAdaptationMethod, companions: Sequence[Part]) -> None:
        super().__init__()
        self.method = method
        self.companions = nn.ModuleList(companions)
        self.needs = method.needs.union(*(one.needs for one in companions))
        self.uses_target = method.uses_target or any(one.uses_target for one in companions)
        with_loss = any(isinstance(one, Companion) for one in companions)
        self.learns_from_target = method.learns_from_target or with_loss
        self.further_passes = method.further_passes + sum(one.further_passes for one in companions)
        more = (OUTPUT_LAYER,) if "target_logits" in self.needs else ()
        self.feature_layers = tuple(dict.fromkeys((*method.feature_layers, *more)))

    @property
    def aligned_layers(self) -> tuple[str, ...]:
        """Those of the method."""
        return self.method.aligned_layers

    def loss(self, outputs: StepOutputs, progress: Progress) -> MethodLoss:
        share = self.method.loss(outputs, progress)
        with_loss = [one for one in self.companions if isinstance(one, Companion)]
        if not with_loss:
            return share
        terms = [] if share.differentiated is None else [share.differentiated]
        metrics, added = dict(share.metrics), []
        for companion in with_loss:
            value, more = companion.loss(outputs, progress)
            weighted = companion.weight_at(progress) * value
            terms.append(weighted)
            added.append(weighted.detach())
            metrics |= {f"{Metric.PART}{companion.name}": value.detach(), **more}
        return MethodLoss(sum(terms[1:], start=terms[0]), share.value, share.weight, metrics, torch.stack(added).sum())

    def domain_hits(self, features: Mapping[str, Tensor], domain: int, valid: Tensor | None) -> Mapping[str, Tensor]:
        """Return those of the method."""
        return self.method.domain_hits(features, domain, valid)

    def prepare(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the batch as the companions and then the method change it."""
        for companion in self.companions:
            assert isinstance(companion, Part)
            batch = companion.prepare(batch)
        return self.method.prepare(batch)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return those of the method; companions have no parameters to train."""
        return self.method.param_groups()

    def on_train_start(self, network: nn.Module) -> None:
        for part in (self.method, *self.companions):
            part.on_train_start(network)  # pyright: ignore[reportCallIssue]

    def on_epoch_start(self, progress: Progress) -> None:
        self.method.on_epoch_start(progress)

    def on_train_end(self, network: nn.Module) -> None:
        self.method.on_train_end(network)
