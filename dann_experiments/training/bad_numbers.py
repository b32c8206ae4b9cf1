"""Detects losses and gradients that are NaN or infinite, and prevents such a step from changing anything.

Weights, optimizer state and buffers (BatchNorm's running statistics) stay as they were before the step.
docs/decisions/0010-a-bad-step-changes-nothing.md explains how this works without waiting for a GPU.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dann_experiments.config.errors import TrainingFailed
from dann_experiments.names import Metric
from dann_experiments.training import ranks
from dann_experiments.training.module import AdaptationModule, StepLosses

log = logging.getLogger(__name__)
MOST_UNDER_WAY = 8  # steps whose numbers have not reached the host; limits how many batches are held in memory


@dataclass(frozen=True)
class _Step:
    """One step's numbers, on their way to the host."""

    number: int
    epoch: int
    numbers: Tensor
    """(1 + G,) total loss, and the gradient norm of each of G parameter groups; on the host after the event `copied`."""
    copied: torch.cuda.Event | None
    groups: list[str]
    losses: StepLosses
    rates: dict[str, float]
    batches: list[Mapping[str, Mapping[str, Tensor]]]

    def known(self) -> bool:
        """Return whether the numbers can be read without waiting."""
        return self.copied is None or self.copied.query()

    def bad(self) -> bool:
        """Return whether a number is not finite; waits until they have been copied."""
        if self.copied is not None:
            self.copied.synchronize()
        return not bool(torch.isfinite(self.numbers).all())


class BadNumbers(pl.Callback):
    """Skips up to `most_skipped` bad steps of an AdaptationModule's training, and raises TrainingFailed at the next one.

    A step is bad if the loss, or the norm of a parameter group's gradient, is infinite or NaN. It changes no weight, no
    optimizer state and no buffer, but counts as a step for schedules and step numbers. The metric `bad_steps` counts them.
    `names` maps a domain to a function from an item's index to its file. Before TrainingFailed is raised, `save` is called with
    the trainer, whose module is then as it was before the bad step. At the end of each epoch the weights are checked, too.

    On a CUDA device with a fused optimizer, or with the gradient scaler of 16-mixed, no step waits for the device: the device
    itself skips the step, and the host learns of it a step or two later. `at_once` overrides that choice. With several ranks
    all skip or all fail; the message is that of a rank whose own losses are not finite.
    """

    def __init__(
        self,
        most_skipped: int = 0,
        save: Callable[[pl.Trainer], None] | None = None,
        names: Mapping[str, Callable[[int], str]] | None = None,
        at_once: bool | None = None,
    ) -> None:
        super().__init__()
        self.most_skipped = most_skipped
        self.bad_steps = 0
        self.save = save
        self.names = dict(names or {})
        self.at_once = at_once
        self._buffers = _Buffers(nn.Module())
        self._batches: list[Mapping[str, Mapping[str, Tensor]]] = []  # of the step under way
        self._of_step: int | None = None
        self._under_way: deque[_Step] = deque()
        self._first = True

    def state_dict(self) -> dict[str, Any]:
        return {Metric.BAD_STEPS: self.bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bad_steps = state_dict[Metric.BAD_STEPS]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._buffers, self._first, self._of_step = _Buffers(pl_module), True, None
        self._under_way.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        while self._under_way and (self._under_way[0].known() or len(self._under_way) > MOST_UNDER_WAY):
            self._look_at(self._under_way.popleft(), trainer, pl_module)
        if self._of_step != trainer.global_step:  # the first batch of a step
            self._of_step, self._batches = trainer.global_step, []
            self._buffers.keep()
        self._batches.append(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        scaled = _has_scaler(trainer)
        losses, groups = _losses_of(pl_module), [] if scaled else optimizer.param_groups
        total = ranks.mean_of({"total": losses.total}, pl_module.device)["total"]  # all ranks must decide the same
        found = [total, *(_norm(group) for group in groups)]
        numbers = torch.stack([value.detach().float().to(pl_module.device) for value in found])
        later = self._may_look_later(pl_module, optimizer, scaled)
        step = _Step(
            trainer.global_step, trainer.current_epoch, numbers.to("cpu", non_blocking=later), _copied(numbers, later),
            _group_names(groups), losses, _rates(optimizer), self._batches,
        )  # fmt: skip
        if later:
            bad = ~torch.isfinite(numbers).all()
            self._buffers.put_back(bad)
            if not scaled:
                optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue] # as torch's scaler does
            self._under_way.append(step)
        elif step.bad():
            self._buffers.put_back()
            optimizer.zero_grad(set_to_none=True)  # torch's optimizers skip parameters without a gradient
            self._look_at(step, trainer, pl_module)
        self._first = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._settle(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle(trainer, pl_module)

    def _may_look_later(self, module: pl.LightningModule, optimizer: Optimizer, scaled: bool) -> bool:
        gated = scaled or all(group.get("fused") for group in optimizer.param_groups)
        if ranks.world() > 1:  # ranks would learn of it at different steps, but must decide at the same one
            return False
        later = module.device.type == "cuda" if self.at_once is None else not self.at_once
        # Fused SGD leaves its momentum uninitialized if the device skips the very first step.
        return later and gated and not self._first

    def _settle(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check the steps that are still under way, and the weights, before they are scored or saved."""
        while self._under_way:
            self._look_at(self._under_way.popleft(), trainer, module)
        if not _finite(module):
            raise TrainingFailed(
                f"After step {trainer.global_step - 1} (epoch {trainer.current_epoch + 1}) there are weights that are not "
                f"finite, although loss and gradients were: the last update was too large. Learning rates: "
                f"{_listed(_rates(trainer.optimizers[0]))}; use smaller ones. These weights are not kept."
            )

    def _look_at(self, step: _Step, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not step.bad():
            return
        self.bad_steps += 1
        for logger in trainer.loggers:
            logger.log_metrics({Metric.BAD_STEPS: self.bad_steps}, step=step.number)
        stories = ranks.gathered_texts(self._story(step), module.device)
        guilty = ranks.gathered_texts("yes" if _wrong_parts(step) else "no", module.device)
        story = stories[guilty.index("yes") if "yes" in guilty else 0]
        if self.bad_steps <= self.most_skipped:
            log.warning("%s Stepped over (%d of trainer.skip_bad_steps %d).", story, self.bad_steps, self.most_skipped)
            return
        raise TrainingFailed(f"{story} {self._kept(trainer, module)} {_advice(self.most_skipped)}")

    def _kept(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        if self.save is None:
            return "The weights are those before this step."
        if not _finite(module):
            return "The weights before this step were not finite either: an update was too large. They are not kept."
        self.save(trainer)
        return "The weights before this step are the run's last checkpoint."

    def _story(self, step: _Step) -> str:
        wrong = _what_is_wrong(step)
        rest = {name: float(value) for name, value in step.losses.parts.items() if name not in wrong}
        others = f" ({_listed(rest)})" if rest else ""
        weight = f"; lambda {step.losses.weight:.4g}" if len(step.losses.parts) > 1 else ""
        files = "".join(f" {domain.capitalize()} batch: {text}." for domain, text in self._files(step).items())
        return (
            f"Step {step.number} (epoch {step.epoch + 1}): {_listed(wrong)}{others}. "
            f"Learning rates: {_listed(step.rates)}{weight}.{files}"
        )

    def _files(self, step: _Step) -> dict[str, str]:
        """Return, for each domain, a text that lists the step's files, and those with pixels that are not finite."""
        told = {}
        for domain in step.batches[0]:
            mine = [batch[domain] for batch in step.batches]
            if domain not in self.names or "index" not in mine[0]:
                continue
            files = [self.names[domain](int(index)) for part in mine for index in part["index"].tolist()]
            finite = [fine for part in mine for fine in torch.isfinite(part["image"]).flatten(1).all(1).tolist()]
            broken = [file for file, fine in zip(files, finite, strict=True) if not fine]
            note = f" (not finite as the network sees them: {', '.join(broken)})" if broken else ""
            told[domain] = ", ".join(files) + note
        return told


class _Buffers:
    """Saves and restores the buffers of a module (they keep their shapes), with a few operations for all of them."""

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[torch.dtype, list[tuple[nn.Module, str]]] = {}
        self._kept: dict[torch.dtype, Tensor] = {}
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                self._places.setdefault(buffer.dtype, []).append((owner, name))

    def keep(self) -> None:
        """Remember the buffers as they are."""
        self._kept = {dtype: _flat(self._now(dtype)) for dtype in self._places}

    def put_back(self, where: Tensor | None = None) -> None:
        """Restore the buffers as they were at `keep`; with `where` (a bool on the device), only if that is true."""
        for dtype, old in self._kept.items():
            now = self._now(dtype)
            values = old if where is None else torch.where(where, old, _flat(now))
            torch._foreach_copy_(now, list(_unflatten_dense_tensors(values, now)))

    def _now(self, dtype: torch.dtype) -> list[Tensor]:
        # looked up each time: a module may replace a buffer by a new tensor. By `_buffers`, as `get_buffer` does much more,
        # which takes a millisecond for the 186 buffers of a mobilenet_v2
        return [cast(Tensor, owner._buffers[name]) for owner, name in self._places[dtype]]


def _flat(buffers: list[Tensor]) -> Tensor:
    """Return a copy of all buffers (N,), made in one call from Python."""
    flat = _flatten_dense_tensors(buffers)
    return flat.clone() if len(buffers) == 1 else flat  # torch returns a view of a single tensor


def _copied(numbers: Tensor, later: bool) -> torch.cuda.Event | None:
    """Return an event that marks the end of an asynchronous copy from a CUDA device; None if the copy is synchronous."""
    if not (later and numbers.is_cuda):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _has_scaler(trainer: pl.Trainer) -> bool:
    """Return whether the precision is 16-mixed, whose gradient scaler itself skips steps with gradients that are not finite."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def _losses_of(module: pl.LightningModule) -> StepLosses:
    assert isinstance(module, AdaptationModule)
    assert module.losses is not None
    return module.losses


def _norm(group: Mapping[str, Any]) -> Tensor:
    return get_total_norm([parameter.grad for parameter in group["params"] if parameter.grad is not None])


def _group_names(groups: list[dict[str, Any]]) -> list[str]:
    return [str(group.get("name", index)) for index, group in enumerate(groups)]


def _rates(optimizer: Optimizer) -> dict[str, float]:
    names = _group_names(optimizer.param_groups)
    return {name: float(group["lr"]) for name, group in zip(names, optimizer.param_groups, strict=True)}


def _finite(module: nn.Module) -> bool:
    """Return whether all weights and buffers are finite."""
    tensors = [*module.parameters(), *module.buffers()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _what_is_wrong(step: _Step) -> dict[str, float]:
    """Return the losses that are not finite; if all are, their sum or the gradients that are not."""
    total, *norms = step.numbers.tolist()
    gradients = {f"the norm of the gradient of {name}": norm for name, norm in zip(step.groups, norms, strict=True)}
    return _wrong_parts(step) or _not_finite({"the sum of the losses": total}) or _not_finite(gradients)


def _wrong_parts(step: _Step) -> dict[str, float]:
    """Return the losses of this rank that are not finite."""
    return _not_finite({name: float(value) for name, value in step.losses.parts.items()})


def _not_finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if not math.isfinite(value)}


def _listed(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _advice(most_skipped: int) -> str:
    allowed = f"{most_skipped} such steps were" if most_skipped else "no such step is"
    return (
        f"Check the files. If training diverges, use smaller learning rates or trainer.gradient_clip_val. To skip single bad "
        f"batches, set trainer.skip_bad_steps ({allowed} allowed)."
    )
