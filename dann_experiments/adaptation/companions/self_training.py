"""Self-training with a mean teacher and ClassMix (Tranheden et al. 2021, DACS; Hoyer et al. 2022, DAFormer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from dann_experiments.adaptation.companions.companion import Companion
from dann_experiments.adaptation.method import Need, Progress, StepOutputs
from dann_experiments.config.errors import InputError
from dann_experiments.models.batchnorm import batch_statistics
from dann_experiments.names import Metric

WEIGHT = 1.0
THRESHOLD = 0.968  # DAFormer, section 4.1
EMA_DECAY = 0.99  # DAFormer takes 0.999 in 40,000 steps


class SelfTraining(Companion):
    """Cross-entropy on target images with source classes pasted in, against the predictions of a mean teacher.

    1. The teacher is an average of the network's weights, theta' <- a theta' + (1 - a) theta with a = min(1 - 1 / (i + 1),
       `ema_decay`) at step i (DAFormer, eq. 2), so it begins as the network itself. It predicts the target images of the batch,
       normalized by the statistics of the batch, without dropout; its most probable classes are pseudo labels.
    2. q = share of the batch's pixels whose probability is above `threshold` (DAFormer, eq. 3).
    3. ClassMix (Olsson et al. 2021): of each source image half of its classes, drawn at random and rounded up, are pasted with
       their labels onto a target image.
    4. L = mean over pixels of w * cross-entropy of the network on the mixed images; w is 1 for pasted pixels and q elsewhere.
       Pixels without data or label count as 0 in the mean.

    Costs two forward passes per step, one with a backward pass. The random draws have a generator of their own, `seed`.
    """

    name = "self_training"
    needs: frozenset[Need] = frozenset({"images"})
    further_passes = 2  # the teacher's, and that of the mixed images

    def __init__(
        self,
        weight: float | None = None,
        ramp: float = 0.0,
        threshold: float | None = None,
        ema_decay: float | None = None,
        seed: int = 0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(WEIGHT if weight is None else weight, ramp)
        self.threshold = THRESHOLD if threshold is None else threshold
        self.ema_decay = EMA_DECAY if ema_decay is None else ema_decay
        self.ignore_index = ignore_index
        self._teacher: list[AveragedModel] = []
        self._draws = torch.Generator().manual_seed(seed)
        self._network: list[nn.Module] = []
        # Both in lists, so that they are no parts of this module: the teacher would be averaged, synchronized and saved as a
        # second network beside the one that is trained. Its state is in the extra state.
        self._step: int | None = None

    def on_train_start(self, network: nn.Module) -> None:
        """Copy the network, without gradients, as the teacher."""
        self._network = [network]
        self._teacher = [AveragedModel(network, multi_avg_fn=self._average).requires_grad_(False)]

    @property
    def teacher(self) -> AveragedModel:
        """The mean teacher; exists from `on_train_start` on."""
        return self._teacher[0]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the random draws and of the teacher."""
        return {"draws": self._draws.get_state(), "teacher": self.teacher.state_dict() if self._teacher else {}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._draws.set_state(state["draws"].cpu())
        if state["teacher"]:
            self.teacher.load_state_dict(state["teacher"])

    def loss(self, outputs: StepOutputs, progress: Progress) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return the loss, the share of certain pixels, and on how many target pixels network and teacher agree."""
        source, target = outputs.images
        if source.shape[1:] != target.shape[1:]:
            raise InputError(
                f"self_training pastes source classes into target images, but they are of {tuple(source.shape[2:])} and "
                f"{tuple(target.shape[2:])} pixels; set data.crop_size, which gives both one size."
            )
        self.teacher.to(target.device)  # a resumed run made it before the network was moved
        if self._step != progress.step:  # not again for further batches of the same step
            self.teacher.update_parameters(self._network[0])
            self._step = progress.step
        labels, certain = self._pseudo_labels(target)
        known = torch.ones_like(labels, dtype=torch.bool)
        if outputs.target_valid is not None:
            known = outputs.target_valid > 0
        share = ((certain > self.threshold) & known).sum() / known.sum().clamp_min(1)
        count = min(len(source), len(target))
        pasted = self._masks(outputs.source_labels[:count])
        own_labels = outputs.source_labels[:count]
        labels = labels[:count].masked_fill(~known[:count], self.ignore_index)
        mixed = torch.where(pasted[:, None], source[:count], target[:count])
        wanted = torch.where(pasted, own_labels, labels)
        weights = torch.where(pasted, torch.ones_like(share), share)
        logits = outputs.forward(mixed).float()
        kept = known[:count] & ~pasted
        # drift: does the network, on the target pixels of the mixed images, still say what its teacher says?
        same = ((logits.argmax(1) == labels) & kept).sum() / kept.sum().clamp_min(1)
        losses = functional.cross_entropy(logits, wanted, ignore_index=self.ignore_index, reduction="none")
        return (losses * weights).mean(), {
            f"{Metric.PART}{self.name}_certain": share,
            Metric.GUARD_TEACHER: same.detach(),
        }

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, updates: Any) -> None:
        decay = (1 - 1 / (updates + 1)).clamp_max(self.ema_decay)
        for mine, theirs in zip(averaged, current, strict=True):
            mine.lerp_(theirs.detach(), (1 - decay).to(mine.dtype))

    @torch.no_grad()
    def _pseudo_labels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class ids (T, h, w) and their probabilities (T, h, w)."""
        with batch_statistics(self.teacher.module):
            certain, labels = self.teacher.module(images).float().softmax(1).max(1)
        return labels, certain

    def _masks(self, labels: Tensor) -> Tensor:
        """Return (N, h, w), True at the pixels of half of each image's classes."""
        found = []
        for of_image in labels:
            classes = of_image.unique()
            classes = classes[classes != self.ignore_index]
            order = torch.randperm(len(classes), generator=self._draws)[: -(-len(classes) // 2)]
            found.append(torch.isin(of_image, classes[order.to(classes.device)]))
        return torch.stack(found)
