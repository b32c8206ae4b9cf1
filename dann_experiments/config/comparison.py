"""All settings of `compare`: arms and seeds, or existing runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dann_experiments.config import limits
from dann_experiments.config.errors import InputError
from dann_experiments.config.workers import PoolSettings

Kind = Literal["source_only", "statistics", "test_statistics", "masks", "control", "adapted", "oracle"]
"""source_only: the unadapted source model; statistics: that model with BatchNorm statistics of the target (AdaBN);
test_statistics: with those of the scored images (test-time BN); masks: no network, but the masks of data.target.weak_labels;
control: lambda = 0; adapted: judged by the verdict; oracle: trained on target labels."""
KINDS: tuple[Kind, ...] = get_args(Kind)
ARM_NAMES: Mapping[Kind, str] = {
    "source_only": "source only",
    "statistics": "AdaBN",
    "test_statistics": "test-time BN",
    "masks": "rule alone",
    "control": "lambda = 0 control",
    "adapted": "DANN",
    "oracle": "oracle",
}
KIND_WORDS: Mapping[Kind, str] = {
    "source_only": "the unadapted source model",
    "statistics": "the source model with BatchNorm statistics of the target",
    "test_statistics": "the source model with BatchNorm statistics of the scored images",
    "masks": "the weak labels themselves, no network",
    "control": "target images forwarded, lambda = 0",
    "adapted": "adapted",
    "oracle": "trained with target labels",
}
"""What an arm of each kind is, for the report."""
DEFAULT_ARMS: Mapping[str, Mapping[str, Any]] = {
    name: {"kind": kind} for kind, name in ARM_NAMES.items() if kind not in ("test_statistics", "masks")
}

_CONTROL = {"domain_adaptation.method.name": "lambda_zero"}
NAMED_ARMS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ladder": {
        **{ARM_NAMES[kind]: {"kind": kind} for kind in KINDS if kind not in ("masks", "oracle")},
        "entropy": {**_CONTROL, "domain_adaptation.companions": ["entropy"]},
        "maximum squares": {**_CONTROL, "domain_adaptation.companions": ["maximum_squares"]},
        "style": {**_CONTROL, "domain_adaptation.companions": ["style"]},
        "moments": {**_CONTROL, "domain_adaptation.companions": ["moments"]},
        "self-training": {**_CONTROL, "domain_adaptation.companions": ["self_training"]},
        "DANN + self-training": {"domain_adaptation.companions": ["self_training"]},
        ARM_NAMES["masks"]: {"kind": "masks"},
        "weak labels": {**_CONTROL, "domain_adaptation.companions": ["weak_labels"]},
        "DANN + weak labels": {"domain_adaptation.companions": ["weak_labels"]},
        ARM_NAMES["oracle"]: {"kind": "oracle"},
    }
}
"""Sets of arms that have a name. ladder: from no adaptation to self-training, each rung beside the one without it."""

MOST_SEEDS = 1000  # a larger number is probably meant as a seed


@dataclass(frozen=True)
class CompareConfig(PoolSettings):
    """Did adaptation help? Arms over several seeds, judged against the source model and the lambda = 0 control."""

    arms: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Arms to compare, in a YAML file, which the flag --arms names (or `--arms ladder`, docs/companions.md): name -> dotted
    settings in which the arm differs, and `kind`: adapted (the default; it is judged), source_only (the source model as it
    is), statistics (that model with BatchNorm statistics of the target, AdaBN), test_statistics (with those of the scored
    images), masks (those of data.target.weak_labels, no network), control (lambda = 0), oracle (trained on data.oracle). {} =
    source only, AdaBN, lambda = 0 control, DANN, and the oracle if data.oracle lists images."""
    seeds: int | list[int] = 5
    """Number of seeds, counted from `seed` (1 to 1000), or a list of seeds. A verdict needs at least 3; 5 are better."""
    labelled: list[int] = field(default_factory=list)
    """Numbers of labeled target images, such as [0, 1, 5, 20]: one comparison for each, with the first ones of
    data.target.train_labelled in DANN and control, and a figure over all (docs/few-labels.md)."""
    runs: list[str] = field(default_factory=list)
    """Ids of finished runs to compare, without training anything. The runs of their source models are added."""

    def seed_list(self, first: int) -> list[int]:
        """Return the list of seeds, or the set number of seeds counted from `first`."""
        return list(range(first, first + self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    def __post_init__(self) -> None:
        given = self.seeds if isinstance(self.seeds, list) else [0] * min(self.seeds, 1)
        if not isinstance(self.seeds, list) and self.seeds > MOST_SEEDS:
            raise InputError(f"seeds is {self.seeds}; give their number, at most {MOST_SEEDS}, or a list of seeds.")
        if not given or (isinstance(self.seeds, list) and len(set(given)) < len(given)):
            raise InputError(f"seeds is {self.seeds}; give their number, at least 1, or a list of different seeds.")
        if any(not 0 <= seed < 2**32 for seed in given):
            raise InputError(f"seeds is {self.seeds}; seeds are whole numbers from 0 to 4294967295.")
        limits.check(self)
        self.check_pool()
        if len(set(self.runs)) < len(self.runs):
            raise InputError("runs names a run twice; name each once.")
        if len(set(self.labelled)) < len(self.labelled) or any(count < 0 for count in self.labelled):
            raise InputError(f"labelled is {self.labelled}; give different numbers of images, from 0.")
        if self.runs and self.labelled:
            raise InputError("labelled has no effect with runs, which are not trained anew; give one of the two.")
        if self.runs and self.arms:
            raise InputError("arms has no effect with runs, whose arms are read from the store; give one of the two.")
        for name, arm in self.arms.items():
            kind = (arm or {}).get("kind", "adapted")
            if not str(name).strip():
                raise InputError("arms holds an arm without a name; name it.")
            if kind not in KINDS:
                raise InputError(f"arms.{name}.kind is {kind!r}; give one of {', '.join(KINDS)}.")
        kinds = [(arm or {}).get("kind", "adapted") for arm in self.arms.values()]
        for kind in ("source_only", "control", "oracle"):
            if kinds.count(kind) > 1:
                raise InputError(f"arms holds {kinds.count(kind)} arms of kind {kind}; keep one.")
        if self.arms and "adapted" not in kinds:
            raise InputError("arms holds no arm of kind adapted, so there is nothing to judge; add one.")
