"""All settings of a run: `Config`, a tree of frozen dataclasses.

A setting has the same dotted name everywhere (YAML, flag, sweep space, MLflow parameter), for example
`domain_adaptation.method.hidden_size`. Add new settings to `model.py`, `data.py`, `adaptation.py`, or `run.py` for training and
tracking. The string under a field is its help text, and its limits are part of its type (`limits.py`). Settings that must agree
are compared in the `check` of their group, or here if they are in several groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dann_experiments.config import limits
from dann_experiments.config.adaptation import DomainAdaptationConfig
from dann_experiments.config.data import DataConfig
from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import at_least, between, not_empty
from dann_experiments.config.loss import LossTerm
from dann_experiments.config.model import ModelConfig
from dann_experiments.config.run import (
    MOST_PROCESSES,
    MonitorConfig,
    OptimizerConfig,
    PretrainingConfig,
    TrackingConfig,
    TrainerConfig,
)
from dann_experiments.names import TestBatchnorm, Tta


@dataclass(frozen=True)
class Config:
    """Everything that one run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    domain_adaptation: DomainAdaptationConfig = field(default_factory=DomainAdaptationConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    loss: Annotated[list[LossTerm], not_empty("name at least one loss")] = field(default_factory=lambda: [LossTerm()])
    """The segmentation loss of every training: names (cross_entropy, dice, jaccard, tversky, focal, lovasz), or mappings such as
    {name: dice, weight: 1}, whose sum it is (docs/losses.md)."""
    class_weights: Annotated[Literal["auto"] | list[float] | None, at_least(0)] = None
    """Weight of each class in the losses (lovasz has none), in the order of ids; auto: the inverse of its share of the labeled
    source pixels, divided by the number of classes; null = all 1."""
    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    """Seed of everything random: weights, order of images, augmentation, dropout."""
    threads: Annotated[int | None, between(1, MOST_PROCESSES)] = None
    """Number of CPU threads; null = torch's choice. Changes the last digits of results."""
    tta: Tta = "none"
    """Test-time augmentation in `evaluate`: score the mean of the predictions for mirrored and turned copies of each image.
    mirror: the image and its mirror image (2 forward passes), for photographs, in which up is up; d4: all 8 quarter turns and
    mirror images (8 forward passes), for images from above. Trainings, comparisons and sweeps score single predictions and
    refuse it."""
    test_batchnorm: TestBatchnorm = "running"
    """BatchNorm statistics in `evaluate`. running: those of the model; images: those of the scored images, taken from each set by
    itself, without its masks (docs/batchnorm.md). Trainings, comparisons and sweeps refuse it; `compare` has an arm of kind
    test_statistics."""

    @property
    def class_names(self) -> list[str]:
        """The names of all classes: from data.class_names, the label map of the source, or class_0, class_1, ..."""
        mapped = (settings.class_names for settings in self.data.of_role("source").values())
        named = self.data.class_names or next(filter(None, mapped), None)
        return named or [f"class_{index}" for index in range(self.model.classes)]

    def __post_init__(self) -> None:
        limits.check(self)
        self._check_classes()
        self._check_bands()
        self._check_weights()
        self._check_optimization()
        self._check_weak_labels()

    def _check_weak_labels(self) -> None:
        for one, settings in self.data.of_role("target").items():
            if self.domain_adaptation.uses_weak_labels and not settings.weak_labels:
                raise InputError(
                    f"domain_adaptation.companions has weak_labels, but {one.key}.weak_labels lists no images; name images of "
                    f"{one.key}.train with their masks there, or leave the companion out."
                )

    def _check_optimization(self) -> None:
        for prefix, optimizer in (("", self.optimizer), ("pretraining.", self.pretraining.optimizer)):
            if optimizer.schedule == "plateau" and self.monitor.metric is None:
                raise InputError(
                    f"{prefix}optimizer.schedule is plateau, but monitor.metric is null; name the metric to watch."
                )
        if self.trainer.ema_decay is not None and self.trainer.devices > 1:
            raise InputError(
                f"trainer.ema_decay averages weights in one process, but trainer.devices is {self.trainer.devices}; set it to 1."
            )

    def _check_weights(self) -> None:
        weights = self.class_weights
        if weights is None:
            return
        if isinstance(weights, list) and (len(weights) != self.model.classes or not any(weights)):
            raise InputError(
                f"class_weights is {weights}, but model.classes is {self.model.classes}; give one number per class, not all 0."
            )
        if all(term.name == "lovasz" for term in self.loss):
            raise InputError("class_weights has no effect, because the only loss is lovasz, which has none; remove it.")

    def _check_classes(self) -> None:
        names, classes, ignored = self.class_names, self.model.classes, self.data.ignore_index
        if len(names) != classes:
            where = "data.class_names" if self.data.class_names else "the label map of data.source"
            raise InputError(
                f"{where} has {len(names)} names, but model.classes is {classes}; give one name per class (they are {names})."
            )
        if len(set(names)) != len(names):
            raise InputError(f"data.class_names is {names}; give each class a different name.")
        expected = self.monitor.expected_shares
        unknown = [name for name in expected if name not in names]
        if unknown:
            raise InputError(f"monitor.expected_shares names {unknown[0]!r}; the classes are {', '.join(names)}.")
        if len(expected) == classes and sum(high for _, high in expected.values()) < 1:
            raise InputError(
                f"monitor.expected_shares is {expected}, with upper ends that add up to less than 1; raise them."
            )
        for one, settings in self.data.domains.items():
            if ignored < classes and settings.class_names is not None:
                raise InputError(
                    f"data.ignore_index is {ignored}, which is the network's id of class {names[ignored]!r}, so that class "
                    f"would count nowhere; leave it at 255, and list the values that the masks of {one.key} hold for it "
                    f"in {one.key}.ignore_values."
                )

    def _check_bands(self) -> None:
        channels = self.model.in_channels
        for one, settings in self.data.domains.items():
            bands = settings.bands
            if bands is not None and len(bands) != channels:
                raise InputError(
                    f"{one.key}.bands names {len(bands)} bands, but model.in_channels is {channels}; they must agree."
                )
        if self.data.normalization == "fixed" and len(self.data.mean) != channels:
            raise InputError(
                f"data.mean has {len(self.data.mean)} values, but model.in_channels is {channels}; give data.mean and data.std "
                "one value per band, or set data.normalization to domain."
            )
