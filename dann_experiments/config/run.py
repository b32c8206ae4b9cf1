"""Settings of training and tracking: optimizer, trainer, monitor, MLflow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import FILE_NAME, above, at_least, between, fraction_below, not_empty
from dann_experiments.config.paths import local_text
from dann_experiments.names import Metric

MOST_PROCESSES = 1024  # upper limit of processes and threads; guards against halting the machine
TARGET_LABEL_METRICS = ("iou/target", "class_iou/target", "loss/val_target", "iou/gap")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of the network. The domain classifier uses the same kind, with its own learning rate."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Kind of optimizer."""
    lr: Annotated[float, above(0)] = 1e-3
    """Learning rate of the network."""
    betas: Annotated[tuple[float, float], fraction_below(1)] = (0.9, 0.999)
    """Decay rates of Adam's moments (adam, adamw). 0.5 for the first is common in adversarial training."""
    momentum: Annotated[float, fraction_below(1)] = 0.9
    """Momentum (sgd)."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Weight decay."""
    schedule: Literal["constant", "annealed", "one_cycle", "cosine", "polynomial", "plateau"] = "constant"
    """Learning rates as a function of progress p, which runs from 0 to 1. annealed: divided by (1 + 10 p)^0.75 (Ganin &
    Lempitsky 2015, section 4); one_cycle: up and down again (Smith 2018); cosine: down to 0; polynomial: times (1 - p)^power
    (Chen et al. 2018). plateau: times factor when monitor.metric has not improved for more than patience validations."""
    power: Annotated[float, above(0)] = 0.9
    """Exponent of the schedule polynomial."""
    factor: Annotated[float, fraction_below(1)] = 0.1
    """Factor of the schedule plateau."""
    patience: Annotated[int, at_least(0)] = 10
    """Validations without improvement that the schedule plateau waits for."""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """Optimizer steps in which the learning rates rise linearly to those of the schedule; not with plateau, and not with
    one_cycle, which rises by itself."""
    lr_factors: Annotated[dict[str, float], above(0)] = field(default_factory=dict)
    """Part of the network -> factor of its learning rate, such as {encoder: 0.1}. Parts: encoder, decoder, segmentation_head, or
    modules within them (encoder.layer1)."""
    freeze: list[str] = field(default_factory=list)
    """Parts of the network that are not trained, such as [encoder]: their weights, BatchNorm statistics and dropout stay as they
    are and as in evaluation. The domain loss then changes nothing in or before them."""
    freeze_epochs: Annotated[int | None, at_least(1)] = None
    """Number of epochs after which the parts in freeze are trained as well; null = never."""

    def check(self, prefix: str) -> None:
        """Raise InputError for settings that would have no effect."""
        if self.warmup_steps and self.schedule in ("one_cycle", "plateau"):
            raise InputError(
                f"{prefix}warmup_steps is {self.warmup_steps}, which the schedule {self.schedule} cannot follow; set it to 0, or "
                f"{prefix}schedule to constant, annealed, cosine or polynomial."
            )
        if self.freeze_epochs is not None and not self.freeze:
            raise InputError(f"{prefix}freeze_epochs has no effect, because {prefix}freeze names no part; remove it.")
        if not all(factor > 0 for factor in self.lr_factors.values()):
            raise InputError(
                f"{prefix}lr_factors is {self.lr_factors}; give factors above 0 (freeze keeps a part as it is)."
            )


@dataclass(frozen=True)
class PretrainingConfig:
    """Training of the source model if none is set."""

    max_epochs: Annotated[int, at_least(1)] = 20
    """Epochs of pretraining, each one pass over the source's training images."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class TrainerConfig:
    """Lightning's trainer, with its argument names, and checkpoints of running trainings."""

    max_epochs: Annotated[int, at_least(1)] = 20
    """Epochs of adaptation. An epoch is one pass over the larger training set; the smaller one is repeated."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Hardware to train on; auto: the best there is."""
    devices: Annotated[int, between(1, MOST_PROCESSES)] = 1
    """Processes that train together on this machine, each on its own GPU or its share of the cores. Batch sizes are per process
    (docs/several-processes.md)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "auto"] = "32-true"
    """Floating point precision, as Lightning names it. auto: bf16-mixed where it is quicker (a GPU that computes in bfloat16, a
    processor with AMX or AVX-512 BF16), else 32-true; the run records which. Changes results within what a seed does
    (docs/performance.md)."""
    channels_last: bool | None = None
    """Store images and feature maps with the channels last. null: on a CPU, for networks with depthwise convolutions, where a
    step then takes 0.9 of the time, and with bf16-mixed (docs/performance.md); on a GPU, try true with bf16-mixed. Changes the
    last digits of results."""
    compile: bool = False
    """Compile the network with torch.compile: a minute or more before the first step, then faster steps on a GPU (not on a
    CPU). Needs a C++ compiler. Changes the last digits of results."""
    auto_batch_size: bool = False
    """On a GPU, `adapt` doubles the batch sizes of both domains as long as a training step fits into memory, and records the
    sizes in the run. Not for sweeps and comparisons, because their runs would differ in more than the compared settings."""
    accumulate_grad_batches: Annotated[int, at_least(1)] = 1
    """Batches whose gradients are averaged for one optimizer step, as if the batch sizes were that much larger. BatchNorm still
    sees single batches. Steps, schedules and limits count optimizer steps."""
    ema_decay: Annotated[float | None, fraction_below(1)] = None
    """Validate, and end with, an exponential moving average of the weights: after each step, average = decay * average + (1 -
    decay) * weights, from the weights after the first step on. Typical are 0.99 to 0.9999. null = no average. Takes the network's
    memory once more."""
    gradient_clip_val: Annotated[float | None, above(0)] = None
    """Clip the gradient norm of the network, and of each domain classifier by itself, to this; null = do not clip."""
    skip_bad_steps: Annotated[int, at_least(0)] = 0
    """Number of batches with a NaN or infinite loss or gradient to skip before the run fails. A skipped batch does not update
    anything. The run that fails keeps the weights before the bad step as its last checkpoint."""
    deterministic: bool = True
    """Use deterministic algorithms if torch has them: always on a CPU; on a GPU it warns where there is none."""
    limit_train_batches: Annotated[int | None, at_least(1)] = None
    """Stop each epoch after this many steps; null = never."""
    enable_progress_bar: bool = True
    """Show progress: a bar on a terminal; elsewhere a line per epoch, and in long epochs and validations one a minute."""
    checkpoint_every_n_steps: Annotated[int | None, at_least(1)] = None
    """Save a resumable checkpoint every N optimizer steps within an epoch (docs/resume.md); null = not by steps. The end of each
    epoch is always saved."""
    checkpoint_every_minutes: Annotated[float | None, above(0)] = 10.0
    """Save a resumable checkpoint every N minutes within an epoch; null = not by time."""
    checkpoints_kept: Annotated[int, at_least(1)] = 2
    """Number of resumable checkpoints to keep, the newest ones. If the last is damaged, the one before is used."""


@dataclass(frozen=True)
class MonitorConfig:
    """The metric that chooses the best epoch, and which weights a run ends with."""

    metric: str | None = Metric.SOURCE_VAL_IOU
    """Metric that chooses checkpoints/best; null = no best checkpoint. iou/target_val uses target labels, and the run is tagged
    accordingly. select/entropy, select/infomax, select/snd and select/bnm use none (docs/selection.md); with them an epoch
    counts only if the source has not dropped by more than forgetting_threshold."""
    mode: Literal["max", "min"] | None = None
    """Direction of the metric: max = larger is better; null = smaller for a loss, a gap, a drop or the entropy, else larger."""
    patience: Annotated[int | None, at_least(1)] = None
    """Stop when metric has not improved for this many validations; null = never. With select/entropy or another select/ score
    it needs no target labels. Schedules keep the length of max_epochs."""
    final_model: Literal["last", "best"] = "last"
    """Weights that become the run's model and are scored on the test sets."""
    log_every_n_epochs: Annotated[int, at_least(1)] = 1
    """Log validation metrics every N epochs, and after the last."""
    forgetting_threshold: Annotated[float, between(0, 1)] = 0.05
    """Warn if iou/source_val drops by more than this below its value at the start of adaptation. In a sweep, a trial whose final
    model did is the best only if all trials did (docs/sweeps.md)."""
    expected_shares: dict[str, list[float]] = field(default_factory=dict)
    """Class -> [low, high], the share of the target's pixels that you expect, 0 to 1, such as {tree: [0.1, 0.5]}. A run warns
    when its predictions leave the range (docs/guards.md). {} = the run compares them with the source's masks."""
    on_guard: Literal["warn", "stop"] = "warn"
    """What a run does when the guard of the target's map speaks (docs/guards.md). warn: warn once. stop: also end the training,
    with the last weights that were plausible, which checkpoints then hold as well."""
    probe: bool = True
    """Before and after adaptation, train a new classifier to distinguish the domains by the features of up to 500 images per
    domain (docs/alignment.md). false saves that time, which is long for large images on a CPU: da/probe_acc, da/a_distance and
    the picture of the features are then absent."""

    @property
    def direction(self) -> Literal["max", "min"]:
        """`mode`, or if it is null, the direction that the name of the metric implies."""
        falling = self.metric is not None and (
            self.metric.startswith((Metric.LOSS, Metric.SELECT_ENTROPY))
            or "gap" in self.metric
            or "drop" in self.metric
        )
        return self.mode or ("min" if falling else "max")

    @property
    def uses_target_labels(self) -> bool:
        """True if the metric that chooses is computed from target labels."""
        return self.metric is not None and self.metric.startswith(TARGET_LABEL_METRICS)

    def check(self, prefix: str) -> None:
        """Raise InputError if final_model is best but there is no metric."""
        if self.metric is None and self.final_model == "best":
            raise InputError(
                f"{prefix}final_model is 'best', but {prefix}metric is null; name the metric that chooses."
            )
        if self.metric is None and self.patience is not None:
            raise InputError(
                f"{prefix}patience is {self.patience}, but {prefix}metric is null; name the metric to watch."
            )
        for name, bounds in self.expected_shares.items():
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
                raise InputError(
                    f"{prefix}expected_shares gives {name} the range {bounds}; give [low, high] with 0 <= low <= high <= 1."
                )
        if sum(bounds[0] for bounds in self.expected_shares.values()) > 1:
            raise InputError(
                f"{prefix}expected_shares is {self.expected_shares}, with lower ends that add up to more than 1; lower them."
            )


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    uri: str | None = None
    """Address of the tracking store; null = MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    experiment: Annotated[str | None, not_empty("give it a name")] = None
    """Name of the experiment; null = MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else dann."""
    run_name: str | None = None
    """Name of the run; null = the one given to `mlflow run --run-name`, else method, target and seed: DANN mnist-m seed 0."""
    registered_model_name: Annotated[str | None, FILE_NAME] = None
    """Register the model of `adapt`, or that of the best arm of `compare` if it helped, under this name; the alias `champion`
    moves to it if it is better (docs/models.md). null = do not register."""
    folder: str = "outputs"
    """Folder for the files of a run until the store has them."""
    images: bool = True
    """Log a picture of two images per domain with the network's predictions before training and after epochs, 20 times at most
    (pretrain, adapt)."""
    system_metrics: bool | None = None
    """Log the use of CPU, memory, disk, network and GPUs every 10 s, or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL (pretrain, adapt,
    evaluate, predict); null = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING, else false."""

    def check(self, prefix: str) -> None:
        """Raise InputError for a folder that is an address."""
        folder = local_text(self.folder, f"{prefix}folder")
        if folder != self.folder:
            raise InputError(f"{prefix}folder is {self.folder!r}; give it as a path, {folder!r}.")
