"""Guards the target's map without target labels: speaks when adaptation has moved it to where it is hardly right.

Letters: N images, K classes, H x W pixels, n sampled pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from dann_experiments.models.networks import predicted_classes
from dann_experiments.names import Metric
from dann_experiments.scores import plausibility
from dann_experiments.scores.snd import PixelSample
from dann_experiments.training.ranks import gathered, world

log = logging.getLogger(__name__)
IN_A_ROW = 2
"""Implausible validations in a row after which the guard speaks: adversarial training swings from epoch to epoch."""
MOST_GROWTH = 1.25
"""Growth of the factor between the odds of a share and of the source's, on one side, that is no change."""
WAY_OUT = (
    "The map may be destroyed: look at the pictures of the run. If it is right, state the shares that you expect in "
    "monitor.expected_shares; if not, lower lambda_da or optimizer.lr, or the weight of "
    "weak labels and companions if there are any (docs/guards.md)."
)


@dataclass(frozen=True)
class View:
    """The predictions for one target domain in one validation."""

    shares: np.ndarray
    """(K,) share of the pixels predicted as each class; NaN if no pixel counts."""
    entropy: float
    """Mean normalized entropy of the predictions, 0..1."""
    diversity: float
    """Normalized entropy of the mean prediction, 0..1."""
    classes: Tensor
    """(n,) int64, predicted classes at the sampled pixels, which are the same in each validation."""

    def as_plain(self) -> dict[str, Any]:
        """Return tensors and numbers, for a checkpoint."""
        shares = torch.from_numpy(self.shares)
        return {"shares": shares, "entropy": self.entropy, "diversity": self.diversity, "classes": self.classes}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> View:
        """Make the view from the result of `as_plain`."""
        return cls(plain["shares"].numpy(), plain["entropy"], plain["diversity"], plain["classes"].cpu())

    def agreement(self, other: View) -> float:
        """Return the share of the sampled pixels with the same class in both views, 0..1; NaN without pixels."""
        if not len(self.classes) or len(self.classes) != len(other.classes):
            return math.nan
        return float((self.classes == other.classes).double().mean())


class TargetGuard:
    """Compares the target's predictions in each validation with those of the warm start, the source's true shares and the shares
    that the user expects. `docs/guards.md` has the rules and how they were calibrated.

    `expected`: class name -> [low, high], the shares that the user states, 0..1; where it names a class, these replace the own
    rule about shares. `stops`: whether training ends once the guard has spoken. No target labels are used, except that pixels
    which the masks of a labeled validation set ignore do not count in the shares.
    """

    def __init__(
        self, class_names: Sequence[str], expected: Mapping[str, Sequence[float]] | None = None, stops: bool = False
    ) -> None:
        self.class_names, self.expected, self.stops = list(class_names), dict(expected or {}), stops
        self.spoken = False
        """Whether it has spoken in this run."""
        self.findings: list[str] = []
        """What is implausible in the last validation, in words."""
        self._before: dict[str, View] = {}
        self._now: dict[str, View] = {}
        self._samples: dict[str, PixelSample] = {}
        self._metrics: dict[str, float] = {}
        self._in_a_row = 0

    def update(self, domain: str, logits: Tensor, valid: Tensor | None, first_image: int = 0) -> None:
        """Add a batch of a target domain: logits (N, K, H, W); valid (N, H, W), 0 where a pixel has no data (None = all have);
        `first_image`: index, in the whole set, of the first image that is added for the domain."""
        sample = self._samples.setdefault(domain, PixelSample(first_image))
        classes = predicted_classes(logits).flatten(1)[:, None].float()
        sample.add(classes, None if valid is None else valid.flatten(1) != 0)

    def finish(self, shares: Mapping[str, np.ndarray], scores: Mapping[str, Mapping[str, float]]) -> None:
        """End a validation. `shares`: domain -> (K,), of its predictions; `scores`: domain -> `entropy` and `infomax`. With
        several ranks all must call this."""
        self._now = {}
        for domain, sample in sorted(self._samples.items()):
            whole = sample.over_ranks(gathered) if world() > 1 else sample
            own = scores[domain]
            self._now[domain] = View(
                shares.get(domain, np.full(len(self.class_names), math.nan)),
                own["entropy"],
                own["infomax"] + own["entropy"],  # infomax is the difference of the two
                whole.rows()[:, 0].long().cpu(),
            )
        self._samples = {}

    def start(self) -> None:
        """Take the last validation as the warm start, with which all later ones are compared."""
        self._before, self.spoken, self._in_a_row = dict(self._now), False, 0

    def judge(self, source_shares: np.ndarray | None, last: bool = False) -> list[str]:
        """Find out what is implausible in the last validation; return it, in words, if the guard speaks: at the second
        implausible validation in a row, and at the last one. `source_shares`: (K,) true shares of the source, 0..1; `last`: no
        training follows."""
        self.findings = []
        values: dict[str, list[float]] = {}
        for domain, now in self._now.items():
            before = self._before.get(domain, now)
            where = "the target" if len(self._now) == 1 else domain
            for name, value in self._domain(now, before, source_shares, last, where).items():
                values.setdefault(name, []).append(value)
        worst = {Metric.GUARD_AGREEMENT: min, Metric.GUARD_DIVERSITY: min}
        self._metrics = {name: float(worst.get(name, max)(found)) for name, found in values.items()}
        if self._now:
            self._metrics[Metric.GUARD_IMPLAUSIBLE] = float(bool(self.findings))
        self._in_a_row = self._in_a_row + 1 if self.findings else 0
        return self.findings if last or self._in_a_row >= IN_A_ROW else []

    def metrics(self) -> dict[str, float]:
        """Return `guard/...` of the last validation; of several target domains the worst value."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        before = {domain: view.as_plain() for domain, view in self._before.items()}
        return {
            "before": before,
            "spoken": self.spoken,
            "in_a_row": self._in_a_row,
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._before = {domain: View.from_plain(plain) for domain, plain in state["before"].items()}
        self.spoken, self._in_a_row, self._metrics = state["spoken"], state["in_a_row"], dict(state["metrics"])

    def _domain(self, now: View, before: View, source: np.ndarray | None, last: bool, where: str) -> dict[str, float]:
        """Judge one domain: add to `findings` and return its metrics."""
        metrics = {Metric.GUARD_AGREEMENT: now.agreement(before), Metric.GUARD_DIVERSITY: now.diversity}
        reference = [before.diversity]
        if self.expected:
            metrics[Metric.GUARD_OUTSIDE] = self._stated(now, before, last, where)
        if source is not None:
            reference.append(plausibility.diversity(source))
            if not self.expected:
                metrics[Metric.GUARD_SHARE_ODDS] = self._unstated(now, before, source, where)
        least = plausibility.LEAST_DIVERSITY * min(reference)
        if now.diversity < least and now.entropy <= before.entropy:
            top = int(np.nanargmax(now.shares)) if not np.isnan(now.shares).all() else 0
            self.findings.append(
                f"the predictions for {where} collapse to {self.class_names[top]} (diversity {now.diversity:.3f}, below "
                f"{least:.3f}; before adaptation {before.diversity:.3f})"
            )
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def _stated(self, now: View, before: View, last: bool, where: str) -> float:
        far, far_before = (
            plausibility.outside(np.nan_to_num(one.shares), self.class_names, self.expected) * ~np.isnan(one.shares)
            for one in (now, before)
        )  # a set in which no pixel counts has no shares
        for index, name in enumerate(self.class_names):
            # a share that was on this side of its range from the start may still arrive, unless training ends here
            as_before = 0 < far[index] / (far_before[index] or math.inf) <= 1
            if far[index] and (last or not as_before):
                low, high = self.expected[name]
                self.findings.append(
                    f"{name} covers {now.shares[index]:.1%} of the predictions for {where}, outside of "
                    f"monitor.expected_shares ({low:g} to {high:g}; before adaptation {before.shares[index]:.1%})"
                )
        return float(np.abs(far).max())

    def _unstated(self, now: View, before: View, source: np.ndarray, where: str) -> float:
        factors, factors_before = (plausibility.share_odds(one.shares, source) for one in (now, before))
        as_before = (now.shares > source) == (before.shares > source)  # on the same side of the source
        as_far = factors <= MOST_GROWTH * factors_before
        wrong = (factors > plausibility.MOST_ODDS) & ~(as_before & as_far)
        if wrong.any():  # one class is named: the others follow from it
            index = int(np.argmax(np.where(wrong, factors, 0) * (1 + 1e-9 * (source < 0.5))))
            self.findings.append(
                f"{self.class_names[index]} covers {now.shares[index]:.1%} of the predictions for {where}, but "
                f"{source[index]:.1%} of the labeled source ({factors[index]:.1f} times the odds, above "
                f"{plausibility.MOST_ODDS:g}; before adaptation {before.shares[index]:.1%})"
            )
        return float(factors.max())


class KeepsLastGood(pl.Callback):
    """Keeps the weights of the last validation in which `guard` found nothing implausible, and ends training once it has spoken.

    They are part of each checkpoint, so that a resumed run has them. Stands among the callbacks that look at what was scored.
    """

    def __init__(self, guard: TargetGuard) -> None:
        self.guard = guard
        self.weights: dict[str, Tensor] = {}
        """The weights of network and method, on the CPU; empty before the first validation."""
        self.step = 0
        """The number of steps after which they were scored."""

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights, self.step = state_dict["weights"], state_dict["step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.guard.spoken:  # the run was killed after that
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.guard.spoken:
            trainer.should_stop = True
            log.info(
                "Training ends after epoch %d: the guard has spoken (monitor.on_guard). The weights of the last plausible "
                "validation are kept: %s.", trainer.current_epoch + 1,
                f"after step {self.step}" if self.step else "those of before adaptation",
            )  # fmt: skip
            return
        if self.guard.findings:
            return
        self.step = trainer.global_step
        # without extra states, such as a companion's teacher, which has no use after training
        self.weights = {
            name: value.detach().cpu().clone()
            for name, value in pl_module.state_dict().items()
            if isinstance(value, Tensor)
        }
