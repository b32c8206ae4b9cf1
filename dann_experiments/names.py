"""Names that several rooms share: domains, splits, sets of images, jobs, settings, tags and metrics.

Only this module builds and parses names of sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

Domain = Literal["source", "target"]
Split = Literal["train", "val", "test", "train_labelled", "weak_labels"]
DOMAINS: tuple[Domain, ...] = ("source", "target")
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Tta = Literal["none", "mirror", "d4"]
"""Values of the setting `tta`; `models.symmetries` says which copies of an image each stands for."""
TestBatchnorm = Literal["running", "images"]
"""Values of the setting `test_batchnorm`: whose BatchNorm statistics normalize predictions."""
Confidence = Literal["max_probability", "entropy"]
"""Values of the setting `confidence`; `prediction.confidence` has their formulas."""
VECTOR_SUFFIXES = (".gpkg", ".geojson")
"""Files of polygons that the setting `vector` of `predict` names."""
IndexName = Literal["excess_green", "ndvi", "ndwi", "band", "change_vector"]
"""Values of the setting `rule` of weak labels; `data.indices` has their formulas."""


@dataclass(frozen=True)
class OneDomain:
    """The source or the target, or one of several domains that the settings name under it.

    >>> str(OneDomain("target")), str(OneDomain("target", "winter"))
    ('target', 'target.winter')
    >>> OneDomain.parse("target.winter").key
    'data.target.domains.winter'
    """

    role: Domain
    name: str | None = None

    def __str__(self) -> str:
        """Return the domain in tables, files and models: source, or source.summer."""
        return self.role if self.name is None else f"{self.role}.{self.name}"

    @property
    def key(self) -> str:
        """The group of settings: data.source, or data.source.domains.summer."""
        return f"data.{self.role}" if self.name is None else f"data.{self.role}.domains.{self.name}"

    @property
    def words(self) -> str:
        """The domain in titles: source, or source summer."""
        return self.role if self.name is None else f"{self.role} {self.name}"

    @classmethod
    def parse(cls, text: str) -> OneDomain:
        """Return the domain of a text made by `str`. Raises ValueError for any other text."""
        role, dot, name = text.partition(".")
        if role not in DOMAINS or bool(dot) != bool(name):
            raise ValueError(f"{text!r} is no domain; give source, target, or one with a name: target.NAME.")
        return cls(cast(Domain, role), name or None)


SOURCE_AND_TARGET = (OneDomain("source"), OneDomain("target"))
"""The domains of settings that name none; the index is the label that a domain classifier learns."""


@dataclass(frozen=True)
class SetName:
    """The name of one set of images; `member`: of which domain, if the settings name several under the source or target.

    >>> str(SetName("target", "val")), str(SetName("target", "val", "winter"))
    ('target_val', 'target_val.winter')
    >>> SetName("target", "val").key, SetName("target", "val", "winter").key
    ('data.target.val', 'data.target.domains.winter.val')
    >>> SetName.parse("target_val") == TARGET_VAL
    True
    """

    domain: Domain
    split: Split
    member: str | None = None

    def __str__(self) -> str:
        """Return the name in metrics, tables, tags and files: source_train, or source_train.summer."""
        return f"{self.domain}_{self.split}{'' if self.member is None else f'.{self.member}'}"

    @property
    def one(self) -> OneDomain:
        """The domain of the images."""
        return OneDomain(self.domain, self.member)

    @property
    def whole(self) -> SetName:
        """The set of all domains of the source or target together."""
        return SetName(self.domain, self.split)

    @property
    def key(self) -> str:
        """The setting that lists the images: data.source.train, or data.source.domains.summer.train."""
        return f"{self.one.key}.{self.split}"

    @property
    def words(self) -> str:
        """The name in titles: source train, or source summer train."""
        return f"{self.one.words} {self.split}"

    @property
    def training(self) -> bool:
        """True for a set to train on."""
        return self.split not in ("val", "test")

    @classmethod
    def parse(cls, text: str) -> SetName:
        """Return the set with this name, such as source_train. Raises ValueError for any other text."""
        whole, dot, member = text.partition(".")
        domain, _, split = whole.partition("_")
        if domain not in DOMAINS or split not in get_args(Split) or bool(dot) != bool(member):
            raise ValueError(f"{text!r} is no set of images; they are {', '.join(map(str, ALL_SETS))}.")
        return cls(cast(Domain, domain), cast(Split, split), member or None)


TARGET_LABELLED = SetName("target", "train_labelled")
"""A few target images with labels, which join the segmentation loss of adaptation."""
TARGET_WEAK = SetName("target", "weak_labels")
"""The images of TARGET_TRAIN with noisy masks, for the companion weak_labels."""
ALL_SETS = (*(SetName(domain, split) for domain in DOMAINS for split in SPLITS), TARGET_LABELLED, TARGET_WEAK)
RESUME_AUTO = "auto"
"""Value of `--resume` that names the newest unfinished run of the same settings."""
SOURCE_TRAIN, SOURCE_VAL, SOURCE_TEST, TARGET_TRAIN, TARGET_VAL, TARGET_TEST, *_ = ALL_SETS
TARGET_TRAINING = (TARGET_TRAIN, TARGET_LABELLED, TARGET_WEAK)
"""The sets of target images to train on, which may hold the same images."""
PRETRAINING_SETS = tuple(name for name in ALL_SETS if name not in TARGET_TRAINING)
"""The sets that training of the source model uses."""
SCORED_SETS = tuple(name for name in ALL_SETS if not name.training)
"""The sets that `evaluate` scores."""


class Job:
    """Values of the tag `dann.job`: the kinds of runs."""

    CHECK_DATA = "check-data"
    PRETRAIN = "pretrain"
    ADAPT = "adapt"
    EVALUATE = "evaluate"
    PREDICT = "predict"
    WEAK_LABELS = "weak-labels"
    COMPARE = "compare"
    SUGGEST_LABELS = "suggest-labels"
    SWEEP = "sweep"
    TRIAL = "trial"


class Key:
    """Dotted names of settings that several rooms use."""

    ENCODER_WEIGHTS = "model.encoder_weights"
    SOURCE_MODEL = "domain_adaptation.pretrained_checkpoint.path"
    SOURCE_PREFIX = "domain_adaptation.pretrained_checkpoint.source_prefix"
    METHOD = "domain_adaptation.method.name"
    CLASS_PATH = "domain_adaptation.method.class_path"
    INIT_ARGS = "domain_adaptation.method.init_args"
    FEATURE_LAYER = "domain_adaptation.method.feature_layer"
    FEATURE_LAYERS = "domain_adaptation.feature_layers"


LAMBDA_ZERO = {Key.METHOD: "lambda_zero", Key.CLASS_PATH: None, Key.INIT_ARGS: {}}
"""Settings of the control: the same training with lambda = 0, also if the user has set an own method."""


class Tag:
    """Tags of runs in MLflow. docs/tags.md shows the comments as their meanings."""

    NOTE = "mlflow.note.content"  # description of the run or experiment, in Markdown
    NOTE_DIGEST = "dann.note_digest"  # digest of the experiment's description that this program wrote
    JOB = "dann.job"  # kind of run: the command that made it, or trial
    METHOD = "dann.method"  # method of a training: dann, lambda_zero, source_only, or the class of an own method
    SOURCE = "dann.source"  # name of the source domain
    TARGET = "dann.target"  # name of the target domain
    DIGEST = "dann.digest"  # digest of settings and data, by which an equal finished run is found again
    DATA_DIGEST = "dann.data_digest"  # digest of the images and masks of all sets, by which saved views tell data apart
    SOURCE_DIGEST = "dann.source_digest"  # digest of all that the source model depends on, by which `adapt` finds it
    ENCODER_DIGEST = "dann.encoder_digest"  # digest of the bytes of the file in `model.encoder_weights`
    SOURCE_RUN_ID = "dann.source_run_id"  # run of the model that this run started from or used
    RESUMED_RUN_ID = "dann.resumed_run_id"  # run that was resumed instead of this empty one
    PROCESS = "dann.process"  # machine and process that write the run
    CLOSED_BY = "dann.closed_by"  # what closed the run after its process was gone: doctor, a comparison, a sweep
    KILLED_BY = "dann.killed_by"  # signal that ended the run: SIGTERM or SIGINT
    SELECTED_WITH_TARGET_LABELS = "dann.selected_with_target_labels"  # true if target labels chose the model
    FORGOT_SOURCE = "dann.forgot_source"  # true if the source score fell by more than `monitor.forgetting_threshold`
    GUARD = "dann.guard"  # text of the warning that the target's map looks wrong
    ALIGNMENT = "dann.alignment"  # text that says what domain accuracy and probe mean together
    BATCHNORM = "dann.batchnorm"  # target_stats if an evaluation used BatchNorm statistics of the target
    TARGET_LABELS = "dann.target_labels"  # number of labeled target images in training
    CLASS_WEIGHTS = "dann.class_weights"  # weights of the classes in the losses
    MEMORY_FORMAT = "dann.memory_format"  # channels_last or contiguous: what `trainer.channels_last` came to
    COMPANIONS = "dann.companions"  # companions of the method
    WEAK_LABELS = "dann.weak_labels"  # true if training or scores used weak target labels
    TTA = "dann.tta"  # copies of each image that an evaluation averaged (setting `tta`)
    TEST_BATCHNORM = "dann.test_batchnorm"  # BatchNorm statistics that an evaluation used (setting `test_batchnorm`)
    MODEL = "dann.model"  # address of the evaluated model
    NETWORK_FROM = "dann.network_from"  # source of the network of an evaluated model: settings or model
    NORMALIZATION_FROM = "dann.normalisation_from"  # source of each domain's normalization; spelled as in users' stores
    COMPARISON = "dann.comparison"  # run of the comparison that made this run
    ARM = "dann.arm"  # arm of a comparison
    KIND = "dann.kind"  # kind of the arm: source_only, statistics, test_statistics, masks, control, adapted or oracle
    VERDICT = "dann.verdict"  # outcomes of a comparison, by arm; of a registered model, its own
    CHOICE = "dann.choice"  # arm that was chosen without target labels, or none
    STUDY = "dann.study"  # name of the Optuna study
    OBJECTIVE = "dann.objective"  # objective of a sweep
    SWEEP_RUN_ID = "dann.sweep_run_id"  # run of the sweep that made this trial
    TRIAL = "dann.trial"  # number of the trial in its study
    ROLE = "dann.role"  # why a trial ran: recipe, control, search or confirm
    RETRY_OF = "dann.retry_of"  # number of the trial that this one repeats after its worker died
    PRUNED = "dann.pruned"  # true if the trial was ended early
    PRUNED_AFTER_EPOCHS = "dann.pruned_after_epochs"  # number of epochs after which it was


class Metric:
    """Names of metrics; `METRICS` explains them. Those that end in a slash or underscore are prefixes."""

    IOU = "iou/"
    CLASS_IOU = "class_iou/"
    SOURCE_VAL_IOU = "iou/source_val"
    TARGET_VAL_IOU = "iou/target_val"
    SOURCE_TEST_IOU = "iou/source_test"
    TARGET_TEST_IOU = "iou/target_test"
    FLOOR = "floor/"
    AVERAGE_PRECISION = "ap/"
    MEAN_AVERAGE_PRECISION = "map/"
    SHARE = "share/"
    TRUE_SHARE = "true_share/"
    GAP = "iou/gap_source_minus_target"
    SOURCE_DROP = "iou/source_drop_from_baseline"
    DOMAIN_ACCURACY = "da/domain_acc"
    DOMAIN_ACCURACY_VAL = "da/domain_acc_val"
    DOMAIN_LOSS = "da/domain_loss"
    LAMBDA = "da/lambda"
    PROBE_ACCURACY = "da/probe_acc"
    A_DISTANCE = "da/a_distance"
    LOSS = "loss/"
    SEGMENTATION_LOSS = "loss/train_seg"
    ADAPTATION_LOSS = "loss/train_da"
    TOTAL_LOSS = "loss/train_total"
    VAL_LOSS = "loss/val_"
    SELECT = "select/"
    SELECT_ENTROPY = "select/entropy"
    SELECT_INFOMAX = "select/infomax"
    SELECT_SND = "select/snd"
    SELECT_BNM = "select/bnm"
    SOURCE_KEPT = "select/source_kept"
    GUARD_AGREEMENT = "guard/agreement"
    GUARD_DIVERSITY = "guard/diversity"
    GUARD_IMPLAUSIBLE = "guard/implausible"
    GUARD_OUTSIDE = "guard/outside_expected"
    GUARD_SHARE_ODDS = "guard/share_odds"
    GUARD_TEACHER = "guard/teacher_agreement"
    LEARNING_RATE = "lr/"
    EPOCH_SECONDS = "time/epoch_seconds"
    BAD_STEPS = "bad_steps"
    PART = "da_part/"
    WEAK_LABELS = "weak_labels/"
    RULE_OPEN = "weak_labels/open"
    PASSES = "time/passes_per_step"

    @staticmethod
    def iou(name: SetName | str) -> str:
        """Return the name of the mean IoU of a set: iou/target_val."""
        return f"{Metric.IOU}{name}"

    @staticmethod
    def class_iou(name: SetName | str, label: str) -> str:
        """Return the name of the IoU of one class of a set: class_iou/target_val/road."""
        return f"{Metric.CLASS_IOU}{name}/{label}"

    @staticmethod
    def floor(name: SetName | str) -> str:
        """Return the name of the mean IoU of the best constant prediction for a set: floor/target_val."""
        return f"{Metric.FLOOR}{name}"

    @staticmethod
    def val_loss(domain: Domain | str) -> str:
        """Return the name of a domain's validation loss: loss/val_target."""
        return f"{Metric.VAL_LOSS}{domain}"


CURVES = (
    Metric.SOURCE_VAL_IOU,
    Metric.TARGET_VAL_IOU,
    Metric.DOMAIN_ACCURACY,
    Metric.DOMAIN_ACCURACY_VAL,
    Metric.LAMBDA,
)
"""Metrics whose course over training is drawn, of one run and of all arms of a comparison."""
METRICS = (
    (
        (Metric.SOURCE_VAL_IOU, Metric.TARGET_VAL_IOU),
        "mean IoU over the classes present, from one confusion matrix of the whole set, without ignored pixels; step 0 = before "
        "adaptation. With [several domains](several-domains.md), the mean of `iou/target_val.NAME`",
    ),
    ((Metric.SOURCE_TEST_IOU, Metric.TARGET_TEST_IOU), "the same for the test sets, once, with the final weights"),
    (("class_iou/SET/CLASS",), "IoU of one class"),
    (
        ("floor/SET",),
        "the floor of `iou/SET`: the mean IoU of the best map that is one class everywhere. A score near it says nothing "
        "([scores.md](scores.md#the-floor))",
    ),
    (
        ("map/SET", "ap/SET/CLASS"),
        "average precision per class, and its mean: how well the probability of a class ranks the pixels, without a threshold; "
        "chance gives the share of the class",
    ),
    (
        ("share/SET/CLASS", "true_share/SET/CLASS"),
        "share of the pixels predicted as a class, and its true share. For an unlabeled target only what is predicted, for all "
        "pixels with data: compare it with `true_share/source_val/CLASS`",
    ),
    (
        ("precision/SET", "recall/SET", "f1/SET", "accuracy/SET"),
        "only in `evaluate`, the first three also per class (`/CLASS`), with tables and confusion matrices",
    ),
    ((Metric.GAP, Metric.SOURCE_DROP), "how far the target is behind the source; how much of the source was forgotten"),
    (
        (Metric.DOMAIN_ACCURACY, Metric.DOMAIN_LOSS),
        "accuracy of the domain classifier, balanced over the domains (1 / their number = confused: 0.5 for two), and its loss",
    ),
    ((Metric.DOMAIN_ACCURACY_VAL,), "the accuracy of the same classifier on held-out images, once per epoch"),
    (
        (Metric.PROBE_ACCURACY, Metric.A_DISTANCE),
        "a new classifier on the features, before (step 0) and after adaptation: can it distinguish the domains? "
        "[alignment.md](alignment.md)",
    ),
    (
        ("select/*",),
        "label-free scores of the target, for choosing epochs and trials: [selection.md](selection.md)",
    ),
    (
        ("guard/*",),
        "has adaptation destroyed the target's map? Needs no target labels: [guards.md](guards.md)",
    ),
    ((Metric.LAMBDA,), "weight of the reversed gradient"),
    (
        (Metric.SEGMENTATION_LOSS, Metric.ADAPTATION_LOSS, Metric.TOTAL_LOSS),
        "training losses per step: of the [segmentation](losses.md), the method's own, and their weighted sum",
    ),
    (
        (Metric.RULE_OPEN,),
        "share of the labeled pixels that the masks of the arm [rule alone](weak-labels.md) leave open, so that its scores "
        "do not count them",
    ),
    (("da_part/NAME",), "the loss of each [companion](companions.md) before its weight"),
    (("loss/val_source", "loss/val_target"), "mean cross-entropy on the validation sets"),
    (
        ("lr/*", "time/*"),
        "learning rates; seconds per epoch; batches that the encoder takes per step (1: the source's alone)",
    ),
    (
        (Metric.BAD_STEPS,),
        "number of skipped steps whose loss or gradient was not finite, if there were any (`trainer.skip_bad_steps`)",
    ),
)
"""The metrics of a run: names and meaning. docs/metrics.md is generated from it; its links are those of that page."""


def metric_table() -> str:
    """Return the table of metrics in Markdown."""
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {meaning} |" for names, meaning in METRICS]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])
