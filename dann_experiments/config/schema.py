"""Every setting there is: frozen dataclasses whose field docstrings are the help texts.

A setting has one dotted name everywhere (YAML, flag, sweep space, MLflow parameter), for example
`domain_adaptation.method.hidden_size`. Settings that must agree are compared here, once, in `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dann_experiments.config.errors import InputError
from dann_experiments.config.places import local_text
from dann_experiments.config.presets import IGNORED, filled
from dann_experiments.names import DOMAINS, Domain

Arch = Literal[
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet",
    "segformer", "dpt",
]  # fmt: skip
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_IMAGES = 100_000  # in a batch: more is no batch, and lists of that length are made
MOST_PROCESSES = 1024  # or threads: more would halt the machine
TARGET_LABEL_METRICS = ("iou/target", "class_iou/target", "loss/val_target", "iou/gap")


@dataclass(frozen=True)
class ModelConfig:
    """The network, under the names of `segmentation_models_pytorch.create_model`; null = the network's own default."""

    arch: Arch = "unet"
    """Architecture."""
    encoder_name: str = "resnet34"
    """Encoder, one of segmentation-models-pytorch's (`tu-NAME` for any of timm's)."""
    encoder_weights: str | None = "imagenet"
    """Weights the encoder starts with (downloaded when first used); null = random."""
    in_channels: int = 3
    """Bands of the images."""
    classes: int = 2
    """Number of classes, background included."""
    encoder_depth: int | None = None
    """Number of encoder stages."""
    encoder_output_stride: int | None = None
    """Output stride of a dilated encoder (deeplabv3, deeplabv3plus, pan)."""
    encoder_output_indices: list[int] | None = None
    """Encoder blocks whose features are used (dpt)."""
    decoder_channels: int | list[int] | None = None
    """Channels of the decoder, or of each decoder block."""
    decoder_use_norm: bool | str | dict[str, Any] | None = None
    """Normalisation in the decoder: batchnorm, layernorm, instancenorm, inplace, identity."""
    decoder_attention_type: str | None = None
    """Attention in the decoder blocks (unet, unetplusplus): scse."""
    decoder_interpolation: str | None = None
    """Interpolation in the decoder: nearest, bilinear, bicubic, area."""
    decoder_pab_channels: int | None = None
    """Channels of the position attention block (manet)."""
    decoder_pyramid_channels: int | None = None
    """Channels of the feature pyramid (fpn)."""
    decoder_segmentation_channels: int | None = None
    """Channels of the segmentation branches (fpn, segformer)."""
    decoder_merge_policy: str | None = None
    """How pyramid levels are merged (fpn): add or cat."""
    decoder_dropout: float | None = None
    """Dropout in the decoder (fpn), 0 to 1."""
    decoder_atrous_rates: list[int] | None = None
    """Dilation rates of the ASPP module (deeplabv3, deeplabv3plus)."""
    decoder_aspp_separable: bool | None = None
    """Separable convolutions in the ASPP module (deeplabv3, deeplabv3plus)."""
    decoder_aspp_dropout: float | None = None
    """Dropout of the ASPP module (deeplabv3, deeplabv3plus), 0 to 1."""
    decoder_readout: str | None = None
    """What becomes of the prefix tokens (dpt): ignore, add, cat."""
    decoder_intermediate_channels: list[int] | None = None
    """Channels of the reassembled features (dpt)."""
    decoder_fusion_channels: int | None = None
    """Channels of the fusion blocks (dpt)."""
    psp_out_channels: int | None = None
    """Channels of the pyramid pooling module (pspnet)."""
    psp_dropout: float | None = None
    """Dropout of the pyramid pooling module (pspnet), 0 to 1."""
    upsampling: int | None = None
    """Factor by which the segmentation head enlarges its map."""

    def network_arguments(self) -> dict[str, Any]:
        """The constructor arguments that were set, beside the five that every network takes."""
        common = {"arch", "encoder_name", "encoder_weights", "in_channels", "classes"}
        return {
            name: value for name, value in dataclasses.asdict(self).items() if name not in common and value is not None
        }

    def __post_init__(self) -> None:
        _between("model.in_channels", self.in_channels, 1, 65535)  # the bands that a TIFF can have
        _between("model.classes", self.classes, 2, 256)  # masks are 8 bit
        for key in ("decoder_dropout", "psp_dropout", "decoder_aspp_dropout"):
            if getattr(self, key) is not None:
                _between(f"model.{key}", getattr(self, key), 0, 1)
        for name, value in self.network_arguments().items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int):  # the network knows better; this keeps it from filling the memory
                    _between(f"model.{name}", number, -65535, 65535)


Entry = str | dict[str, Any]


@dataclass(frozen=True)
class DomainDataConfig:
    """The images of one domain, and how their files are read. Settings a preset brings are used where yours are unset."""

    name: str | None = None
    """What runs call this domain; null = from its preset or its first training entry."""
    preset: str | None = None
    """A known data set: loveda, potsdam, vaihingen, openearthmap, inria, landcoverai, cityscapes, gta5."""
    scene: str | None = None
    """Part of the preset's data set (LoveDA: Urban or Rural; Inria: a city; OpenEarthMap: a region); null = its default."""
    root: str | None = None
    """Folder that this domain's entries are relative to; null = data.root."""
    train: list[Entry] = field(default_factory=list)
    """Training images; the target's need no masks, and masks given there are not read. An entry is a CSV manifest (columns
    image, mask, split; paths relative to it), a folder with images/ and masks/ of equal stems, a glob pattern, a list file
    (.txt, a path a line), an image file, or a mapping {images: ..., masks: ...} of folders, patterns, list files or files;
    patterns are paired by what their wildcards stand for. The mapping also takes names: (a list, or a file of names, to
    keep) and region: [left, top, right, bottom] in pixels of the file."""
    val: list[Entry] = field(default_factory=list)
    """Validation images, scored each epoch where they have masks."""
    test: list[Entry] = field(default_factory=list)
    """Held-out images, scored once after training."""
    bands: list[int] | None = None
    """Bands to read, in this order, counted from 1; null = all."""
    scale: Literal["type", "percentiles"] | list[float] = "type"
    """What becomes 0..1: type = the range of 8 or 16 bit; percentiles = the 2nd to 98th of the training windows, a band;
    [LOW, HIGH] = this range (float, signed and 12 bit images)."""
    nodata: Literal["file"] | float | list[float] = "file"
    """Pixels that hold this value (or one of these) count nowhere; file = the file's own nodata value. The file's own mask and
    alpha band count as well; [] = none of these. NaN in any band always is nodata."""
    nodata_bands: Literal["any", "all"] | None = None
    """Whether a pixel lacks data where any of its bands holds a nodata value, or only where all do. null = all for 8 bit
    images, in which 0 and 255 are also colors, any for other types, whose fill values would be taken for measurements."""
    ignore_values: list[int] = field(default_factory=list)
    """Mask values that count nowhere, beside data.ignore_index."""
    value_map: dict[int, str] | None = None
    """Mask value -> class name; null = the values are class ids. A name that is not in data.class_names counts nowhere."""
    color_map: dict[str, str] | None = None
    """"RED,GREEN,BLUE" -> class name, for masks in colours."""
    pixel_size: float | None = None
    """Resample to pixels of this size, in the unit of the files' CRS (metre, degree), so that two sensors meet; null = the
    files' own pixels."""
    file_pixel_size: float | None = None
    """Size of the files' pixels where they are not georeferenced."""
    augmentation: Literal["none", "light", "strong"] = "none"
    """Of training images. light: flips and quarter turns; strong: also scale, colour and blur."""
    batch_size: int = 8
    """Images a training step."""

    @property
    def class_names(self) -> list[str] | None:
        """The names that the label map gives, in the order of the ids, each once; None without a map."""
        named = self.value_map if self.value_map is not None else self.color_map
        if named is None:
            return None
        ordered = [name for _, name in sorted(named.items())] if named is self.value_map else list(named.values())
        return [name for name in dict.fromkeys(ordered) if name != IGNORED]

    @property
    def colours(self) -> dict[tuple[int, int, int], str] | None:
        """`color_map` with its keys as (red, green, blue)."""
        return None if self.color_map is None else {_colour(key): name for key, name in self.color_map.items()}

    @property
    def nodata_values(self) -> Literal["file"] | tuple[float, ...]:
        """`nodata` as values, or file."""
        if self.nodata == "file":
            return "file"
        return tuple(self.nodata) if isinstance(self.nodata, list) else (float(self.nodata),)

    def __post_init__(self) -> None:
        _between("data.source.batch_size and data.target.batch_size", self.batch_size, 1, MOST_IMAGES)
        if self.value_map is not None and self.color_map is not None:
            raise InputError("value_map and color_map are both given (data.source, data.target); keep one.")
        if self.value_map is not None and not self.value_map:
            raise InputError("value_map is empty; name the values, or null to take them as class ids.")
        _ = self.colours
        if self.bands is not None and (not self.bands or min(self.bands) < 1):
            raise InputError(f"bands is {self.bands}; name bands counted from 1.")
        if isinstance(self.scale, list) and (
            len(self.scale) != 2 or not -float("inf") < self.scale[0] < self.scale[1] < float("inf")
        ):
            raise InputError(f"scale is {self.scale}; give [LOW, HIGH] with LOW below HIGH, type, or percentiles.")
        for key in ("pixel_size", "file_pixel_size"):
            value = getattr(self, key)
            if value is not None:
                _above(f"data.source.{key} and data.target.{key}", value, 0)
        if self.file_pixel_size is not None and self.pixel_size is None:
            raise InputError("file_pixel_size has no effect without pixel_size, the size to resample to; remove it.")
        for split in ("train", "val", "test"):
            for entry in getattr(self, split):
                _check_entry(split, entry)


@dataclass(frozen=True)
class EmbeddedDataConfig:
    """Digits on photographs, made from installed packages: a real data set for trying things out."""

    name: Literal["digits", "digits_classes"] | None = None
    """digits: stroke or background; digits_classes: which digit; null = none, your own data."""
    seed: int = 0
    """Which digits and photograph areas fall into which set."""
    folder: str | None = None
    """Where it is built once; null = the user's cache folder."""

    def __post_init__(self) -> None:
        _between("data.embedded.seed", self.seed, 0, 2**32 - 1)


@dataclass(frozen=True)
class DataConfig:
    """Images and masks of both domains, and how they are read."""

    embedded: EmbeddedDataConfig = field(default_factory=EmbeddedDataConfig)
    root: str | None = None
    """Folder that the entries are relative to; null = the embedded data if there is one, else the current folder."""
    source: DomainDataConfig = field(default_factory=DomainDataConfig)
    target: DomainDataConfig = field(default_factory=DomainDataConfig)
    oracle: list[Entry] = field(default_factory=list)
    """Labelled training images of the target, for the oracle of `compare` and nothing else; [] = no oracle."""
    class_names: list[str] | None = None
    """Names of the network's classes, index = class id. They are the common language of both domains: each domain's value_map
    or color_map says which of its labels is which. null = the source's map in the order of its ids, else class_0, ..."""
    ignore_index: int = 255
    """Mask value that counts nowhere: not in the losses, not in the metrics."""
    normalization: Literal["fixed", "domain"] = "fixed"
    """fixed: by mean and std below; domain: each domain by its own mean and standard deviation a band, computed once over
    its training windows and kept with the model."""
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    """Mean a band, of images scaled to 0..1, for normalization fixed; the default is ImageNet's."""
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    """Standard deviation a band, of images scaled to 0..1; the default is ImageNet's."""
    window_size: int | None = None
    """Images are cut into windows of this many pixels square, each one item of an epoch, and only windows are read; null =
    whole images, but windows of 1024 from images above 2048 x 2048 pixels."""
    windows: Literal["grid", "random"] = "grid"
    """Where training windows lie: side by side, or drawn once at random places (by the seed)."""
    window_count: int | None = None
    """How many random windows a domain has; null = as many as the grid."""
    crop_size: int | None = None
    """Training takes a random crop of this many pixels square of each item, another each epoch; null = whole items."""
    pad_to_crop: bool = True
    """Fill training images that are smaller than crop_size up to it, at a random place, with pixels that count as nodata; false
    = refuse such images."""
    eval_batch_size: int | None = None
    """Images a validation step; null = the training batch."""
    num_workers: int | None = None
    """Processes that load each set's images; 0 = the training process. null = chosen from the machine: none on a CPU, whose cores
    train; with a GPU up to 4, as there are cores. Changes no result."""
    memory_gb: float = 4.0
    """Decoded images are kept up to this many gigabytes, all sets together, and not decoded again; 0 = none are kept."""

    def resolved(self, domain: Domain) -> DomainDataConfig:
        """Return the settings of a domain with what its preset says wherever they are unset. The fields keep what the user
        wrote."""
        return self._resolved[domain]

    @functools.cached_property
    def _resolved(self) -> dict[Domain, DomainDataConfig]:
        return {"source": filled(self.source), "target": filled(self.target)}

    def __post_init__(self) -> None:
        if self.num_workers is not None:
            _between("data.num_workers", self.num_workers, 0, MOST_PROCESSES)
        for entry in self.oracle:
            _check_entry("data.oracle", entry)
        for key in ("crop_size", "window_size"):
            value = getattr(self, key)
            if value is not None:
                _at_least(f"data.{key}", value, 8)
        if self.window_count is not None:
            _at_least("data.window_count", self.window_count, 1)
            if self.window_count > 10**7:
                raise InputError(f"data.window_count is {self.window_count}; give at most 10000000.")
            if self.windows == "grid":
                raise InputError("data.window_count has no effect with data.windows grid; remove it, or set random.")
        if self.crop_size is not None and self.window_size is not None and self.crop_size > self.window_size:
            raise InputError(
                f"data.crop_size is {self.crop_size}, larger than data.window_size {self.window_size}; crops are cut from "
                "windows."
            )
        if not 0 <= self.memory_gb < 1e9:
            raise InputError(f"data.memory_gb is {self.memory_gb}; give a number of at least 0.")
        if self.eval_batch_size is not None:
            _between("data.eval_batch_size", self.eval_batch_size, 1, MOST_IMAGES)
        if len(self.mean) != len(self.std):
            raise InputError(
                f"data.mean has {len(self.mean)} values, data.std {len(self.std)}; give one a band to both."
            )
        for value in self.mean:
            if not abs(value) < float("inf"):  # NaN fails too
                raise InputError(f"data.mean is {self.mean}; give finite numbers.")
        for value in self.std:
            _above("data.std", value, 0)
        if not 0 <= self.ignore_index <= 255:
            raise InputError(
                f"data.ignore_index is {self.ignore_index}; masks are 8 bit, so give a value from 0 to 255."
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """How lambda grows while training runs."""

    kind: Literal["dann", "linear", "constant"] = "dann"
    """dann: 2 / (1 + exp(-gamma p)) - 1 (Ganin & Lempitsky 2015); linear: p; constant: 1. p runs from 0 to 1."""
    gamma: float = 10.0
    """Steepness of `dann`; 10 is the paper's value."""

    def __post_init__(self) -> None:
        _above("domain_adaptation.method.lambda_schedule.gamma", self.gamma, 0)


@dataclass(frozen=True)
class MethodConfig:
    """The adaptation method."""

    name: Literal["dann", "lambda_zero", "source_only"] = "dann"
    """dann: adversarial; lambda_zero: the control, the same training with lambda 0 (target images forwarded, the network
    feels no domain loss); source_only: the target is not looked at."""
    class_path: str | None = None
    """Your own method instead: `package.module.Class`, an installed subclass of DomainAdaptationMethod."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of your own method's constructor."""
    feature_layer: str | list[str] = "encoder"
    """Layer, or layers, whose features are aligned; `layers` lists them."""
    in_channels: int | list[int] | None = None
    """Channels at that layer (one number a layer); null = read from the network."""
    classifier: Literal["pooled", "pixel", "patch"] = "pooled"
    """pooled: one domain decision an image, after global average pooling; pixel: one a position (1 x 1 convolutions); patch:
    strided convolutions, which see shapes; at feature_layer segmentation_head they judge the predicted class map."""
    hidden_size: int = 1024
    """Width of the domain classifier's hidden layers."""
    discriminator_lr: float = 1e-4
    """Learning rate of the domain classifier."""
    lambda_da: float = 1.0
    """Factor on the schedule: the largest lambda. With lambda_schedule null, lambda itself."""
    lambda_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    step_mode: Literal["epoch", "batch"] = "epoch"
    """When lambda moves: once an epoch or every batch."""

    @property
    def layers(self) -> list[str]:
        """`feature_layer` as a list."""
        return [self.feature_layer] if isinstance(self.feature_layer, str) else list(self.feature_layer)

    def __post_init__(self) -> None:
        _between("domain_adaptation.method.hidden_size", self.hidden_size, 1, 16384)  # its square is a layer's weights
        _above("domain_adaptation.method.discriminator_lr", self.discriminator_lr, 0)
        if not 0 <= self.lambda_da < float("inf"):
            raise InputError(f"domain_adaptation.method.lambda_da is {self.lambda_da}; give a number from 0 up.")
        if not all(self.layers) or not self.layers or len(set(self.layers)) != len(self.layers):
            raise InputError(f"domain_adaptation.method.feature_layer is {self.feature_layer!r}; name each layer once.")
        if self.in_channels is not None:
            given = [self.in_channels] if isinstance(self.in_channels, int) else self.in_channels
            if len(given) != len(self.layers):
                raise InputError(
                    f"domain_adaptation.method.in_channels has {len(given)} values for {len(self.layers)} feature "
                    "layers; give one a layer, or null to read them from the network."
                )
        if self.class_path is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", self.class_path):
            raise InputError(f"domain_adaptation.method.class_path is {self.class_path!r}; give package.module.Class.")
        if self.init_args and self.class_path is None:
            raise InputError(
                "domain_adaptation.method.init_args has no effect without class_path; remove it or name your class."
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """The source model that adaptation starts from."""

    path: str | None = None
    """A file, a folder, runs:/ID[/path] or models:/NAME@ALIAS; null = the newest finished pretraining run of the same
    model and source data, or a new one."""
    source_format: Literal["auto", "pytorch_lightning", "pytorch", "smp"] = "auto"
    """pytorch_lightning: .ckpt; pytorch: a plain state dict; smp: a save_pretrained folder; auto: told from the file."""
    strict_loading: bool = True
    """Refuse a checkpoint that lacks weights or brings others; false loads what fits and says what did not."""
    source_prefix: str | None = None
    """The part before the network's own names, such as model or ema_model, where a checkpoint holds several networks; a full
    stop for names without such a part. null takes the only network there is and refuses a file with several."""

    def __post_init__(self) -> None:
        if self.source_prefix is not None and self.path is None:
            raise InputError(
                f"domain_adaptation.pretrained_checkpoint.source_prefix is {self.source_prefix!r}, but no checkpoint is given; "
                "give domain_adaptation.pretrained_checkpoint.path, or leave source_prefix out."
            )


@dataclass(frozen=True)
class DomainAdaptationConfig:
    """What adapts the network to the target domain."""

    feature_layers: list[str] | None = None
    """Layers captured; null = those that method.feature_layer names."""
    method: MethodConfig = field(default_factory=MethodConfig)
    batchnorm: Literal["separate", "joint", "source_only", "target_stats"] = "separate"
    """separate: each domain is forwarded by itself, so BatchNorm normalises each with its own batch statistics; joint: one
    forward of both together up to the tapped layer, with the statistics of the mixture; source_only: as separate, but target
    forwards do not move the running statistics; target_stats: as separate, but validation, tests and the model kept use
    statistics of the target's training images (AdaBN, Li et al. 2018), in `evaluate` too."""
    pretrained_checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def layers(self) -> list[str]:
        """The layers captured, in the order given."""
        return self.method.layers if self.feature_layers is None else list(self.feature_layers)

    def __post_init__(self) -> None:
        missing = [layer for layer in self.method.layers if layer not in self.layers]
        if missing:
            raise InputError(
                f"domain_adaptation.method.feature_layer is {self.method.feature_layer!r}, but feature_layers captures "
                f"only {self.layers}; add {missing} there, or leave feature_layers out."
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The network's optimizer; the domain classifier shares its kind, with its own learning rate."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Kind."""
    lr: float = 1e-3
    """Learning rate of the network."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the moments (adam, adamw); 0.5 for the first is usual in adversarial training."""
    momentum: float = 0.9
    """Momentum (sgd)."""
    weight_decay: float = 0.0
    """Weight decay."""
    schedule: Literal["constant", "annealed", "one_cycle", "cosine"] = "constant"
    """Course of the learning rates over the run. annealed: divided by (1 + 10 p)^0.75 (Ganin & Lempitsky 2015, section 4);
    one_cycle: up and down again (Smith 2018); cosine: down to 0."""

    def __post_init__(self) -> None:
        _above("optimizer.lr", self.lr, 0)
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"optimizer.weight_decay is {self.weight_decay}; give a number from 0 up.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas is {list(self.betas)}; give two numbers from 0 to below 1.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"optimizer.momentum is {self.momentum}; give a number from 0 to below 1.")


@dataclass(frozen=True)
class PretrainingConfig:
    """How the source model is trained where none is given."""

    max_epochs: int = 20
    """Passes over the source's training images."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _at_least("pretraining.max_epochs", self.max_epochs, 1)


@dataclass(frozen=True)
class TrainerConfig:
    """Lightning's trainer, under its own names, and its checkpoints."""

    max_epochs: int = 20
    """Epochs of adaptation. An epoch is one pass over the larger training set; the smaller one starts again."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to train; auto takes what there is."""
    devices: int = 1
    """Processes that train together on this machine, each on a GPU of its own, or on its share of the cores; batch sizes are
    each one's (docs/several-processes.md)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Lightning's precision."""
    channels_last: bool | None = None
    """Keep images and feature maps in memory with the channels last; null = on a CPU for networks with depthwise convolutions,
    whose steps take 0.9 of the time then (docs/performance.md); on a GPU, try true with bf16-mixed. Results differ in the last
    digits."""
    compile: bool = False
    """Compile the network's parts with torch.compile: a minute or more before the first step, then faster steps on a GPU (not
    on a CPU). Needs a C++ compiler. Results differ in the last digits."""
    auto_batch_size: bool = False
    """`adapt` on a GPU doubles both domains' batches, from those given, while a training step fits into memory. The run records
    the sizes that it took. Not for sweeps and comparisons, whose runs would differ in more than what is compared."""
    gradient_clip_val: float | None = None
    """Largest gradient norm of the network, and of the domain classifiers, each by itself; null = not clipped."""
    skip_bad_steps: int = 0
    """Steps over so many batches whose loss or gradient is infinite or NaN: such a step changes nothing. The next one ends the
    run, with the weights before it as its last checkpoint."""
    deterministic: bool = True
    """Deterministic algorithms wherever torch has them (on a CPU: always; on a GPU it warns where it has none)."""
    limit_train_batches: int | None = None
    """At most so many steps an epoch; null = all."""
    enable_progress_bar: bool = True
    """Show progress bars."""
    checkpoint_every_n_steps: int | None = None
    """Inside an epoch, keep every so many steps what a killed run needs to go on (docs/resume.md); null = not by steps. Each
    epoch's end is always kept."""
    checkpoint_every_minutes: float | None = 10.0
    """Inside an epoch, keep it every so many minutes; null = not by time."""
    checkpoints_kept: int = 2
    """How many of these checkpoints a running training keeps, the newest; if one is damaged the one before is used."""

    def __post_init__(self) -> None:
        _at_least("trainer.max_epochs", self.max_epochs, 1)
        _between("trainer.devices", self.devices, 1, MOST_PROCESSES)
        _at_least("trainer.checkpoints_kept", self.checkpoints_kept, 1)
        if self.checkpoint_every_n_steps is not None:
            _at_least("trainer.checkpoint_every_n_steps", self.checkpoint_every_n_steps, 1)
        if self.checkpoint_every_minutes is not None:
            _above("trainer.checkpoint_every_minutes", self.checkpoint_every_minutes, 0)
        if self.gradient_clip_val is not None:
            _above("trainer.gradient_clip_val", self.gradient_clip_val, 0)
        _at_least("trainer.skip_bad_steps", self.skip_bad_steps, 0)
        if self.limit_train_batches is not None:
            _at_least("trainer.limit_train_batches", self.limit_train_batches, 1)


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched, and which weights a run ends with."""

    metric: str | None = "iou/source_val"
    """Metric that chooses checkpoints/best; null = no best. iou/target_val needs target labels: the run says so in a tag.
    select/entropy, select/infomax, select/snd and select/bnm need none (docs/selection.md); with them an epoch counts only if
    the source is within forgetting_threshold."""
    mode: Literal["max", "min"] | None = None
    """Whether more or less of it is better; null = less of a loss, a gap or a drop, more of all else."""
    final_model: Literal["last", "best"] = "last"
    """The weights that become the run's model and are scored on the test lists."""
    log_every_n_epochs: int = 1
    """Log the validation of every so many epochs (and of the last)."""
    forgetting_threshold: float = 0.05
    """Warn when iou/source_val falls by more than this below the warm start's."""

    @property
    def direction(self) -> Literal["max", "min"]:
        """`mode`, or what the metric's name says."""
        falling = self.metric is not None and (
            self.metric.startswith(("loss/", "select/entropy")) or "gap" in self.metric or "drop" in self.metric
        )
        return self.mode or ("min" if falling else "max")

    @property
    def uses_target_labels(self) -> bool:
        """Whether the metric that chooses is computed from target labels."""
        return self.metric is not None and self.metric.startswith(TARGET_LABEL_METRICS)

    def __post_init__(self) -> None:
        _at_least("monitor.log_every_n_epochs", self.log_every_n_epochs, 1)
        _between("monitor.forgetting_threshold", self.forgetting_threshold, 0, 1)
        if self.metric is None and self.final_model == "best":
            raise InputError("monitor.final_model is 'best', but monitor.metric is null; name the metric that chooses.")


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    uri: str | None = None
    """Tracking store; null = MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    experiment: str | None = None
    """Experiment's name; null = MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else dann."""
    run_name: str | None = None
    """Run's name; null = one that says the method."""
    folder: str = "outputs"
    """Where a run keeps its files until the store has them."""

    def __post_init__(self) -> None:
        if self.experiment is not None and not self.experiment.strip():
            raise InputError(f"tracking.experiment is {self.experiment!r}; give it a name.")
        folder = local_text(self.folder, "tracking.folder")
        if folder != self.folder:
            raise InputError(f"tracking.folder is {self.folder!r}; give it as a path, {folder!r}.")


@dataclass(frozen=True)
class Config:
    """Everything one run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    domain_adaptation: DomainAdaptationConfig = field(default_factory=DomainAdaptationConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    """Seed of everything random: weights, order of images, dropout."""
    threads: int | None = None
    """CPU threads; null = torch's choice. The last digits of a result depend on it."""

    @property
    def class_names(self) -> list[str]:
        """One name a class."""
        named = self.data.class_names or self.data.resolved("source").class_names
        return named or [f"class_{index}" for index in range(self.model.classes)]

    def __post_init__(self) -> None:
        if len(self.class_names) != self.model.classes:
            where = "data.class_names" if self.data.class_names else "the label map of data.source"
            raise InputError(
                f"{where} has {len(self.class_names)} names, but model.classes is {self.model.classes}; give one name a "
                f"class (they are {self.class_names})."
            )
        self.data.resolved("target")  # a preset that is none is refused here
        if self.data.ignore_index < self.model.classes:
            for domain in DOMAINS:
                if self.data.resolved(domain).class_names is not None:
                    raise InputError(
                        f"data.ignore_index is {self.data.ignore_index}, which is the network's id of class "
                        f"{self.class_names[self.data.ignore_index]!r}, so that class would count nowhere; leave it at 255, and "
                        f"list what the masks of data.{domain} hold for it in data.{domain}.ignore_values."
                    )
        for domain in DOMAINS:
            bands = self.data.resolved(domain).bands
            if bands is not None and len(bands) != self.model.in_channels:
                raise InputError(
                    f"data.{domain}.bands names {len(bands)} bands, but model.in_channels is {self.model.in_channels}; "
                    "they must agree."
                )
        if len(set(self.class_names)) != len(self.class_names):
            raise InputError(f"data.class_names is {self.class_names}; give each class a name of its own.")
        if self.data.normalization == "fixed" and len(self.data.mean) != self.model.in_channels:
            raise InputError(
                f"data.mean has {len(self.data.mean)} values, but model.in_channels is {self.model.in_channels}; "
                "give data.mean and data.std one value a band, or set data.normalization to domain."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; give a whole number from 0 to 4294967295.")
        if self.threads is not None:
            _between("threads", self.threads, 1, MOST_PROCESSES)


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise InputError(f"{key} is {value}; give a number of at least {least}.")


def _between(key: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN fails too
        raise InputError(f"{key} is {value}; give a number from {least} to {most}.")


def _above(key: str, value: float, bound: float) -> None:
    if not bound < value < float("inf"):
        raise InputError(f"{key} is {value}; give a number above {bound}.")


def _colour(text: str) -> tuple[int, int, int]:
    try:
        red, green, blue = (int(part) for part in str(text).split(","))
    except ValueError:
        raise InputError(f'color_map has the key {text!r}; give colours as "RED,GREEN,BLUE".') from None
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise InputError(f"color_map has the key {text!r}; red, green and blue go from 0 to 255.")
    return red, green, blue


def _check_entry(split: str, entry: Any) -> None:
    if isinstance(entry, str):
        return
    unknown = sorted(set(entry) - {"images", "masks", "names", "region"})
    if unknown or "images" not in entry:
        raise InputError(
            f"{split} has the entry {entry}; a mapping takes images (needed), masks, names and region"
            + (f", not {unknown[0]}." if unknown else ".")
        )
    for key in ("images", "masks", "names"):
        value = entry.get(key)
        texts = value if isinstance(value, list) else [value]
        if value is not None and not (texts and all(isinstance(text, (str, int)) for text in texts)):
            raise InputError(
                f"{split} has the entry {entry}, whose {key} is {value!r}; give a path, a pattern or a list."
            )
    region = entry.get("region")
    if region is not None:
        whole = isinstance(region, list) and len(region) == 4 and all(type(side) is int for side in region)
        if not whole or not (0 <= region[0] < region[2] and 0 <= region[1] < region[3]):
            raise InputError(
                f"{split} has the entry {entry}, whose region is {region!r}; give [left, top, right, bottom] in pixels."
            )
