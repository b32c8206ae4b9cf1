"""Monitors both domains during training: IoU, the gap between the domains, how much of the source is forgotten, how well the
domains can be distinguished, and the target scores that need no labels."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, MLFlowLogger
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from dann_experiments.config.store_names import labels_in_store
from dann_experiments.models.batchnorm import target_statistics
from dann_experiments.names import DOMAINS, SOURCE_AND_TARGET, Metric, OneDomain, SetName, Tag
from dann_experiments.scores.floor import predicted_shares, true_shares
from dann_experiments.scores.predictions import in_parts, log_probabilities
from dann_experiments.scores.selection import SCORES, choice_value
from dann_experiments.training.guards import WAY_OUT, TargetGuard
from dann_experiments.training.ranks import sum_of
from dann_experiments.training.scoring import (
    Scorer,
    Scores,
    SelectionScorer,
    ShareCounter,
    mean_of,
    metrics_of_sets,
    shares_of_sets,
)

log = logging.getLogger(__name__)


class DomainAdaptationMonitorCallback(pl.Callback):
    """Scores both domains at each validation, from the logits that validation computes anyway: each image is forwarded once.

    Needs validation loaders of the domains `validated`, by default [source] or [source, target], and a `validation_step` that
    returns {"logits": (N, K, H, W), "labels": (N, H, W) or None}, and optionally "valid" (N, H, W; 0 at nodata) and
    "domain_hits" (layer -> (2,): a domain classifier's correct decisions, all its decisions). Logs to every logger of the
    trainer, at the number of optimizer steps done: `iou/source_val`, `iou/target_val`, each with its `floor/...`,
    `class_iou/...`, `map/...`, `ap/...`, `share/...` and `true_share/...`; `loss/val_source`, `loss/val_target`,
    `iou/gap_source_minus_target`, `iou/source_drop_from_baseline`, `da/domain_acc_val` (balanced over the domains, of which
    there are `domains`), and `select/...` of the target (see `scores.selection`; they do not use its labels). Of a target without
    labels, `share/target_val/CLASS` is logged as well.
    With several domains, IoU is also logged for each, `iou/target_val.NAME`, and all other values are means over the domains.
    With a `guard`, logs its `guard/...`; when it speaks for the first time, warns and sets the MLflow tag `dann.guard`.
    The baseline is the sanity check before training (`num_sanity_val_steps=-1`), logged at step 0. When the source IoU falls
    more than `forgetting_threshold` (0..1) below its baseline, warns once per fall and sets the MLflow tag `dann.forgot_source`;
    not with `can_forget` False, for a network that has not learned the source yet. Raises ValueError if the number of
    `class_names` is not `num_classes`.
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        log_every_n_epochs: int = 1,
        forgetting_threshold: float = 0.05,
        ignore_index: int = 255,
        can_forget: bool = True,
        validated: Sequence[OneDomain] = SOURCE_AND_TARGET,
        domains: int = len(SOURCE_AND_TARGET),
        guard: TargetGuard | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_names = list(class_names or [f"class_{index}" for index in range(num_classes)])
        if len(self.class_names) != num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for num_classes {num_classes}")
        self.log_every_n_epochs = log_every_n_epochs
        self.forgetting_threshold = forgetting_threshold
        self.ignore_index = ignore_index
        self.can_forget = can_forget
        self.validated, self.domains, self.guard = list(validated), domains, guard
        self.baseline: dict[str, Scores] = {}
        """Scores of the warm start, by domain."""
        self.latest: dict[str, Scores] = {}
        """Scores of the last validation, by domain."""
        self.target_scores: dict[str, float] = {}
        """`select/...` of the last validation."""
        self.predicted: dict[str, np.ndarray] = {}
        """Pixels per predicted class, (K,), of the target domains without labels in the last validation, by domain."""
        self.domain_accuracy: dict[str, float] = {}
        """`da/domain_acc_val` of the last validation; with several layers, also one value per layer."""
        self._scorers: dict[int, Scorer] = {}
        self._unlabeled: dict[int, SelectionScorer] = {}
        self._shares: dict[int, ShareCounter] = {}
        self._hits: dict[str, dict[int, Tensor]] = {}
        self._forgetting = False
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "baseline": {domain: scores.as_plain() for domain, scores in self.baseline.items()},
            "latest": {domain: scores.as_plain() for domain, scores in self.latest.items()},
            "target_scores": dict(self.target_scores),
            "predicted": {domain: torch.from_numpy(counts) for domain, counts in self.predicted.items()},
            "domain_accuracy": dict(self.domain_accuracy),
            "forgetting": self._forgetting,
            "guard": None if self.guard is None else self.guard.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.baseline = {domain: Scores.from_plain(plain) for domain, plain in state_dict["baseline"].items()}
        self.latest = {domain: Scores.from_plain(plain) for domain, plain in state_dict["latest"].items()}
        self.target_scores, self.domain_accuracy = state_dict["target_scores"], state_dict["domain_accuracy"]
        self.predicted = {domain: counts.numpy() for domain, counts in state_dict.get("predicted", {}).items()}
        self._forgetting, self._resumed = state_dict["forgetting"], True
        if self.guard is not None and state_dict.get("guard") is not None:
            self.guard.load_state_dict(state_dict["guard"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._resumed:  # the baseline was loaded from the checkpoint
            return
        if sum(trainer.num_sanity_val_batches) < sum(trainer.num_val_batches):
            found = "a baseline from a part of validation" if self.baseline else "no baseline"
            log.warning(
                "num_sanity_val_steps is %s, which gives %s to compare later source scores with; set it to -1 in the Trainer.",
                trainer.num_sanity_val_steps, found,
            )  # fmt: skip

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._scorers, self._unlabeled, self._shares, self._hits = {}, {}, {}, {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits, labels, valid = outputs["logits"], outputs["labels"], outputs.get("valid")
        if labels is not None and dataloader_idx not in self._scorers:
            self._scorers[dataloader_idx] = Scorer(self.num_classes, self.ignore_index)
        of_target = self.validated[dataloader_idx].role == "target"
        if of_target and dataloader_idx not in self._unlabeled:
            self._unlabeled[dataloader_idx] = SelectionScorer(_first_item(trainer, dataloader_idx))
        if of_target and labels is None and dataloader_idx not in self._shares:
            self._shares[dataloader_idx] = ShareCounter(self.num_classes)
        for part in in_parts(logits):
            logs = log_probabilities(logits[part])  # for both scorers
            if labels is not None:
                self._scorers[dataloader_idx].update(logits[part], labels[part], logs)
            if of_target:
                known = None if valid is None else valid[part]
                self._unlabeled[dataloader_idx].update(logits[part], known, logs)
                if labels is None:
                    self._shares[dataloader_idx].update(logits[part], known)
                if self.guard is not None:
                    domain = str(self.validated[dataloader_idx])
                    self.guard.update(domain, logits[part], known, _first_item(trainer, dataloader_idx))
        for layer, hits in outputs.get("domain_hits", {}).items():
            of_layer = self._hits.setdefault(layer, {})
            of_layer[dataloader_idx] = of_layer.get(dataloader_idx, 0) + hits

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.finish()
        if trainer.sanity_checking:
            self.baseline, self._forgetting = dict(self.latest), False
        last_epoch = not trainer.sanity_checking and trainer.current_epoch + 1 == trainer.max_epochs
        self._ask_the_guard(trainer, last_epoch)
        metrics = self.metrics()
        due = (trainer.current_epoch + 1) % self.log_every_n_epochs == 0
        by_itself = trainer.state.fn != TrainerFn.FITTING  # `trainer.validate` was called: always log
        if trainer.sanity_checking or last_epoch or due or by_itself:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        if not trainer.sanity_checking:
            values = {name: choice_value(name, metrics) for name in metrics}
            # for checkpoints; `log` would take a millisecond per value
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            for name in (Metric.SOURCE_VAL_IOU, Metric.TARGET_VAL_IOU):  # for the progress bar only
                if name in values:
                    pl_module.log(name, values[name], prog_bar=True, logger=False, add_dataloader_idx=False)
            if self.can_forget:
                self._warn_of_forgetting(trainer.loggers)

    def finish(self) -> None:
        """Compute the scores of the batches since the last call."""
        self.latest = {
            str(self.validated[index]): scorer.compute(True) for index, scorer in sorted(self._scorers.items())
        }
        self.predicted = {
            str(self.validated[index]): counter.compute(True) for index, counter in sorted(self._shares.items())
        }
        by_domain = {
            str(self.validated[index]): scorer.compute(True) for index, scorer in sorted(self._unlabeled.items())
        }
        found = list(by_domain.values())
        self.target_scores = {
            Metric.SELECT + name: mean_of(scores[name] for scores in found) if len(found) > 1 else found[0][name]
            for name in (found[0] if found else ())
        }
        hits = {layer: {index: sum_of(own) for index, own in of.items()} for layer, of in self._hits.items()}
        self.domain_accuracy = _domain_accuracy(hits, self.domains)
        if self.guard is not None:
            shares = {name: counts / counts.sum() for name, counts in self.predicted.items() if counts.sum()}
            shares |= {name: predicted_shares(scores.confusion) for name, scores in self.latest.items()}
            self.guard.finish(shares, by_domain)
        self._scorers, self._unlabeled, self._shares, self._hits = {}, {}, {}, {}

    def beside(self) -> DomainAdaptationMonitorCallback:
        """Return a monitor with the same settings and baseline, for a validation that leaves no trace in this one."""
        other = DomainAdaptationMonitorCallback(
            self.num_classes,
            self.class_names,
            forgetting_threshold=self.forgetting_threshold,
            ignore_index=self.ignore_index,
            validated=self.validated,
            domains=self.domains,
        )
        other.baseline = dict(self.baseline)
        return other

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last validation, by metric name."""
        values = validation_metrics(self.latest, self.baseline, self.class_names)
        values |= self.target_scores | self.domain_accuracy | self.predicted_shares()
        values |= {} if self.guard is None else self.guard.metrics()
        drop = values.get(Metric.SOURCE_DROP)
        if self.target_scores and drop is not None:
            values[Metric.SOURCE_KEPT] = float(drop <= self.forgetting_threshold)
        return values

    def predicted_shares(self) -> dict[str, float]:
        """Return `share/target_val/CLASS` of target domains without labels in the last validation; where other domains have
        labels, the mean over the target is of these."""
        domains = {OneDomain.parse(name): counts for name, counts in self.predicted.items()}
        shares = shares_of_sets(
            {SetName(one.role, "val", one.name): counts for one, counts in domains.items()}, self.class_names
        )
        labeled = any(OneDomain.parse(name).role == "target" for name in self.latest)
        return {
            name: share
            for name, share in shares.items()
            if not (labeled and name.startswith(f"{Metric.SHARE}target_val/"))
        }

    def _ask_the_guard(self, trainer: pl.Trainer, last: bool) -> None:
        """Let the guard judge this validation; warn when it speaks for the first time."""
        if self.guard is None:
            return
        if trainer.sanity_checking:
            self.guard.start()
        findings = self.guard.judge(self._source_shares(), last)
        if findings and trainer.state.fn == TrainerFn.FITTING:
            self._let_speak(trainer, findings)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the last validation counts alone; early stopping (monitor.patience) tells only afterwards which one it was
        if self.guard is not None and not self.guard.spoken and trainer.current_epoch > 0:
            findings = self.guard.judge(self._source_shares(), last=True)
            if findings:
                self._let_speak(trainer, findings)

    @property
    def harmed(self) -> bool:
        """Whether the guard has spoken, or the network forgot the source in its last validation."""
        return self._forgetting or (self.guard is not None and self.guard.spoken)

    def _source_shares(self) -> np.ndarray | None:
        found = [true_shares(own.confusion) for name, own in self.latest.items() if name.startswith(DOMAINS[0])]
        return np.mean(found, 0) if found else None

    def _let_speak(self, trainer: pl.Trainer, findings: Sequence[str]) -> None:
        assert self.guard is not None
        if not self.guard.spoken:
            self.guard.spoken = True
            text = f"at step {trainer.global_step} {'; '.join(findings)}"
            log.warning("The guard speaks: %s. %s", text, WAY_OUT)
            for logger in trainer.loggers:
                _set_tag(logger, Tag.GUARD, text)

    def _warn_of_forgetting(self, loggers: Sequence[Logger]) -> None:
        metrics = self.metrics()
        drop = metrics.get(Metric.SOURCE_DROP, 0.0)
        if drop > self.forgetting_threshold and not self._forgetting:
            log.warning(
                "iou/source_val fell to %.3f, %.3f below the warm start (monitor.forgetting_threshold is %.3f): the "
                "network is forgetting the source. Try a smaller lambda_da or learning rate.",
                metrics[Metric.SOURCE_VAL_IOU], drop, self.forgetting_threshold,
            )  # fmt: skip
            for logger in loggers:
                _set_tag(logger, Tag.FORGOT_SOURCE, "true")
        self._forgetting = drop > self.forgetting_threshold


def _first_item(trainer: pl.Trainer, dataloader_idx: int) -> int:
    """Return the index, in the whole set, of the first item that this rank validates."""
    loaders = trainer.val_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
    return getattr(getattr(loader, "batch_sampler", None), "first_item", 0)


def _domain_accuracy(hits: Mapping[str, Mapping[int, Tensor]], domains: int) -> dict[str, float]:
    """Return the balanced accuracy as the mean over the layers that have decisions for all domains."""
    by_layer: dict[str, float] = {}
    for layer, of_domain in hits.items():
        if len(of_domain) == domains and all(float(counts[1]) > 0 for counts in of_domain.values()):
            by_layer[layer] = float(torch.stack([counts[0] / counts[1] for counts in of_domain.values()]).mean())
    if not by_layer:
        return {}
    values = {Metric.DOMAIN_ACCURACY_VAL: sum(by_layer.values()) / len(by_layer)}
    if len(hits) > 1:
        values |= {f"da_layer/{layer}/domain_acc_val": accuracy for layer, accuracy in by_layer.items()}
    return values


def _set_tag(logger: Logger, key: str, value: str) -> None:
    """Set a tag of an MLflow run, through our logger or Lightning's; other loggers have no tags."""
    if isinstance(logger, MLFlowLogger):
        logger.experiment.set_tag(logger.run_id, key, value)
    elif hasattr(logger, "set_tag"):
        logger.set_tag(key, value)  # pyright: ignore[reportAttributeAccessIssue]


def validation_metrics(
    latest: Mapping[str, Scores], baseline: Mapping[str, Scores], class_names: Sequence[str]
) -> dict[str, float]:
    """Return the metrics of a validation: scores of both domains, their gap, and the source's drop from its baseline."""
    values = _iou_and_loss(latest, class_names)
    iou = [values.get(name) for name in (Metric.SOURCE_VAL_IOU, Metric.TARGET_VAL_IOU)]
    if iou[0] is not None and iou[1] is not None:
        values[Metric.GAP] = iou[0] - iou[1]
    before = _iou_and_loss(baseline, class_names).get(Metric.SOURCE_VAL_IOU)
    if before is not None and iou[0] is not None:
        values[Metric.SOURCE_DROP] = before - iou[0]
    return values


def _iou_and_loss(scores: Mapping[str, Scores], class_names: Sequence[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for role in DOMAINS:
        own = {one: found for name, found in scores.items() if (one := OneDomain.parse(name)).role == role}
        if own:
            sets = {SetName(role, "val", one.name): found for one, found in own.items()}
            values |= metrics_of_sets(sets, class_names)
            values[Metric.val_loss(role)] = mean_of(found.loss for found in own.values())
    return values


def metrics_to_choose_by(class_names: Sequence[str], domains: Iterable[OneDomain] = ()) -> list[str]:
    """Return the metrics by which a checkpoint or a trial can be chosen if both domains have labeled images; `domains`: those
    that the settings name, if there are several."""
    known = [Metric.GAP, Metric.SOURCE_DROP, *(Metric.val_loss(role) for role in DOMAINS)]
    for one in (*SOURCE_AND_TARGET, *(one for one in domains if one.name is not None)):
        name = SetName(one.role, "val", one.name)
        known += [Metric.iou(name), *(Metric.class_iou(name, label) for label in labels_in_store(class_names).values())]
    return known + list(SCORES)


class RatesAndTimes(pl.Callback):
    """Logs the learning rates (`lr/GROUP`) and the duration including validation (`time/epoch_seconds`) of each epoch."""

    def __init__(self) -> None:
        self._start = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds_of_epoch": time.perf_counter() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = time.perf_counter() - state_dict["seconds_of_epoch"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()
        groups = trainer.optimizers[0].param_groups
        rates = {f"lr/{group.get('name', index)}": float(group["lr"]) for index, group in enumerate(groups)}
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({Metric.EPOCH_SECONDS: time.perf_counter() - self._start}, step=trainer.global_step)


class TargetStatistics(pl.Callback):
    """Recomputes BatchNorm's running statistics on the target's training images before each validation (AdaBN), so that the
    network that is scored is the one that is saved. The baseline, before training, is scored with the warm start's statistics."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            target_statistics(pl_module.network, self.loader)  # pyright: ignore[reportArgumentType]
