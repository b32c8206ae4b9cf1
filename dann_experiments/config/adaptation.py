"""Settings of domain adaptation: the method, the source model that it starts from, and BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dann_experiments.config.companions import CompanionTerm
from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import above, at_least, between, matching


@dataclass(frozen=True)
class ScheduleConfig:
    """How lambda grows during training."""

    kind: Literal["dann", "linear", "constant"] = "dann"
    """Lambda as a function of progress p, which runs from 0 to 1. dann: 2 / (1 + exp(-gamma p)) - 1 (Ganin & Lempitsky 2015);
    linear: p; constant: 1."""
    gamma: Annotated[float, above(0)] = 10.0
    """Steepness of the dann schedule. 10 is the value of the paper."""


@dataclass(frozen=True)
class MethodConfig:
    """The adaptation method."""

    name: Literal["dann", "lambda_zero", "source_only"] = "dann"
    """dann: adversarial training; lambda_zero: the control, the same training with lambda 0, so that target images pass through
    the network but it receives no domain loss; source_only: train only on source images."""
    class_path: Annotated[str | None, matching(r"[^\W\d]\w*(\.[^\W\d]\w*)+", "package.module.Class")] = None
    """Use your own method instead: the import path of a subclass of DomainAdaptationMethod."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of your own method."""
    feature_layer: str | list[str] = "encoder"
    """Layer or layers whose features are aligned. The command `layers` lists them."""
    in_channels: int | list[int] | None = None
    """Channels at that layer, one number per layer; null = read from the network."""
    classifier: Literal["pooled", "pixel", "patch"] = "pooled"
    """Domain classifier. pooled: one decision per image, after global average pooling; pixel: one per position (1 x 1
    convolutions); patch: strided convolutions, which see shapes. With feature_layer segmentation_head they judge the predicted
    class map."""
    hidden_size: Annotated[int, between(1, 16384)] = 1024
    """Width of the hidden layers of the domain classifier."""
    discriminator_lr: Annotated[float, above(0)] = 1e-4
    """Learning rate of the domain classifier."""
    lambda_da: Annotated[float, at_least(0)] = 1.0
    """Factor on the schedule, that is the largest lambda. With lambda_schedule null: lambda itself."""
    lambda_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    step_mode: Literal["epoch", "batch"] = "epoch"
    """Update lambda once per epoch or at every batch."""

    @property
    def layers(self) -> list[str]:
        """`feature_layer` as a list."""
        return [self.feature_layer] if isinstance(self.feature_layer, str) else list(self.feature_layer)

    def check(self, prefix: str) -> None:
        """Raise InputError for settings that contradict each other."""
        if not all(self.layers) or not self.layers or len(set(self.layers)) != len(self.layers):
            raise InputError(f"{prefix}feature_layer is {self.feature_layer!r}; name each layer once.")
        if self.in_channels is not None:
            channels = [self.in_channels] if isinstance(self.in_channels, int) else self.in_channels
            if len(channels) != len(self.layers):
                raise InputError(
                    f"{prefix}in_channels has {len(channels)} values for {len(self.layers)} feature layers; give one per "
                    "layer, or null to read them from the network."
                )
        if self.init_args and self.class_path is None:
            raise InputError(f"{prefix}init_args has no effect without class_path; remove it or name your class.")


@dataclass(frozen=True)
class CheckpointConfig:
    """The source model that adaptation starts from."""

    path: str | None = None
    """A file, a folder, runs:/ID[/path] or models:/NAME@ALIAS; null = the newest finished pretraining run of the same
    model and source data, or a new one if there is none."""
    source_format: Literal["auto", "pytorch_lightning", "pytorch", "smp"] = "auto"
    """Format. pytorch_lightning: .ckpt; pytorch: a plain state dict; smp: a save_pretrained folder; auto: recognize it."""
    strict_loading: bool = True
    """Refuse a checkpoint with missing or additional weights. false: load the weights that fit and report the others."""
    source_prefix: str | None = None
    """Prefix of the network's parameter names, such as model or ema_model, in a checkpoint that holds several networks; a full
    stop means names without a prefix. null: take the only network, refuse a file with several."""

    def check(self, prefix: str) -> None:
        """Raise InputError for a prefix without a checkpoint."""
        if self.source_prefix is not None and self.path is None:
            raise InputError(
                f"{prefix}source_prefix is {self.source_prefix!r}, but no checkpoint is set; set {prefix}path, or leave "
                "source_prefix out."
            )


@dataclass(frozen=True)
class DomainAdaptationConfig:
    """How the network is adapted to the target domain."""

    feature_layers: list[str] | None = None
    """Layers whose features are captured; null = those in method.feature_layer."""
    method: MethodConfig = field(default_factory=MethodConfig)
    batchnorm: Literal["separate", "joint", "source_only", "target_stats"] = "separate"
    """separate: each domain has its own forward pass, so BatchNorm normalizes it with its own batch statistics; joint: one
    forward pass of both domains up to the tapped layer, with the statistics of the mixture; source_only: like separate, but
    target images do not update the running statistics; target_stats: like separate, but validation, tests and the saved model
    use the statistics of the target's training images (AdaBN, Li et al. 2018), also in `evaluate`."""
    companions: list[CompanionTerm] = field(default_factory=list)
    """Losses on target images beside that of the method (entropy, maximum_squares, self_training, weak_labels) and changes of
    the source images (style, moments, histogram, fda), also in its lambda = 0 control: names, or mappings such as
    {name: self_training, weight: 1} (docs/companions.md)."""
    pretrained_checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def uses_weak_labels(self) -> bool:
        """True if the companion weak_labels is among the companions."""
        return any(term.name == "weak_labels" for term in self.companions)

    @property
    def layers(self) -> list[str]:
        """The captured layers, in their order."""
        return self.method.layers if self.feature_layers is None else list(self.feature_layers)

    def check(self, prefix: str) -> None:
        """Raise InputError if the method needs a layer that is not captured."""
        names = [term.name for term in self.companions]
        if len(set(names)) < len(names):
            raise InputError(f"{prefix}companions is {names}; name each once.")
        if names and self.method.class_path is not None:
            raise InputError(
                f"{prefix}companions go with the methods dann, lambda_zero and source_only; leave them out with "
                f"{prefix}method.class_path, or compute their losses in your class."
            )
        missing = [layer for layer in self.method.layers if layer not in self.layers]
        if missing:
            raise InputError(
                f"{prefix}method.feature_layer is {self.method.feature_layer!r}, but {prefix}feature_layers captures only "
                f"{self.layers}; add {missing} there, or leave feature_layers out."
            )
