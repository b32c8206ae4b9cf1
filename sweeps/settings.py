"""Every setting of a sweep: what is searched, by whom, for how long. The strings under the fields are their help texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dann_experiments.config import InputError
from dann_experiments.config.schema import MOST_PROCESSES, TARGET_LABEL_METRICS, MonitorConfig
from dann_experiments.config.workers import PoolSettings

QUESTION = ("space", "objective", "direction", "sampler", "sampler_seed", "pruner")  # another one is another study
RANGES = {
    "n_trials": (1, 100_000), "workers": (1, MOST_PROCESSES), "max_failures": (1, 100_000), "confirm_seeds": (1, 1000),
    "confirm_top": (0, 1000), "sampler_seed": (0, 2**32 - 1),
}  # fmt: skip


@dataclass(frozen=True)
class SweepConfig(PoolSettings):
    """A search over settings of `adapt`. Written in a YAML file (`--space FILE`); each can be given as a flag as well."""

    space: dict[str, Any] = field(default_factory=dict)
    """What is searched (in the file alone; the flag --space names the file): dotted setting -> {type: float, low, high, log,
    step}, {type: int, low, high, log, step}, {type: categorical, choices}, each with an optional
    `when: {other.setting: value}`; `auto` for domain_adaptation.method.feature_layer means all useful layers of the
    network."""
    study: str | None = None
    """Name of the study; null = from the names of the space's and the config's files. A study that exists is continued."""
    storage: str | None = None
    """Where the study is kept: a journal file, or an address like postgresql://USER@HOST/DATABASE or sqlite:///FILE; null =
    the journal file studies/STUDY/journal.log. A password is best left to ~/.pgpass."""
    n_trials: int | None = None
    """Trials in all, the recipe's own values and the lambda = 0 control among them; null = 20, or the whole grid."""
    timeout: float | None = None
    """Seconds after which no further trial is started; null = no limit."""
    objective: str = "iou/target_val"
    """Metric that chooses. Target metrics use target labels: the runs are tagged and the report says so."""
    direction: Literal["maximize", "minimize"] | None = None
    """Whether more or less of it is better; null = less of a loss, a gap or a drop, more of all else."""
    sampler: Literal["tpe", "gp", "qmc", "random", "grid"] = "tpe"
    """How values are proposed: tree-structured Parzen estimator, Gaussian process, quasi-Monte Carlo (Sobol), independent
    draws, or every point of a grid."""
    sampler_seed: int = 0
    """Seed of the proposals (the runs' own is `seed`)."""
    pruner: Literal["median", "halving", "hyperband", "none"] = "median"
    """Which trials are ended early, judged after each epoch: those below the median, by asynchronous successive halving, by
    Hyperband, or none."""
    workers: int | None = None
    """Trials at a time; null = as many as the GPUs hold (gpus_per_trial) where there are GPUs (ray: as many as the cluster
    holds), else one a core, at most 4. The cores are shared among them."""
    launcher: Literal["processes", "ray"] = "processes"
    """processes: on this machine; ray: on an existing Ray cluster."""
    ray_address: str = "auto"
    """Address of the Ray cluster; auto = the one this machine belongs to."""
    cpus_per_trial: float = 1.0
    """Cores a trial takes of the Ray cluster."""
    gpus_per_trial: float | None = None
    """GPUs a trial takes; 0.5 = two trials share one. null = 1 (launcher ray: 0, and the GPUs are hidden from the trials)."""
    max_failures: int = 5
    """So many trials failing one after another stop the sweep."""
    nested: bool = False
    """Put the trials' runs under the sweep's run in the MLflow list. The chart view shows flat ones only."""
    confirm_top: int = 0
    """So many of the best trials are run again over new seeds when the sweep is done; the best mean wins. 0 = none."""
    confirm_seeds: int = 3
    """New seeds each of them is run with."""
    model_name: str | None = None
    """Name under which the confirmed winner's model is registered, alias `champion`; null = the study's name."""

    allow_class_path: str | list[str] | None = None
    """For resume and confirm: the domain_adaptation.method.class_path (or several) that the study's storage names and that may
    be imported. Without, a storage names no code. It is not stored."""

    @property
    def allowed_classes(self) -> list[str]:
        """`allow_class_path` as a list."""
        given = self.allow_class_path
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    @property
    def maximizes(self) -> bool:
        """`direction`, or what the objective's name says."""
        if self.direction is not None:
            return self.direction == "maximize"
        return MonitorConfig(metric=self.objective).direction == "max"

    @property
    def uses_target_labels(self) -> bool:
        """Whether the objective is computed from target labels."""
        return self.objective.startswith(TARGET_LABEL_METRICS)

    def __post_init__(self) -> None:
        for key, (least, most) in RANGES.items():
            value = getattr(self, key)
            if value is not None and not least <= value <= most:
                raise InputError(f"{key} is {value}; give a number from {least} to {most}.")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}; give seconds above 0.")
        self.check_pool()
        for key in ("study", "model_name"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[\w][\w .+-]{0,99}", value):
                raise InputError(
                    f"{key} is {value!r}; give up to 100 letters, digits, blanks and . + - _ (it names files)."
                )
        if re.search(r"_test(/|$)", self.objective):
            raise InputError(
                f"objective is {self.objective!r}, a score of the held-out test list; what chooses by it cannot be tested "
                "on it. Choose by a validation metric: the test scores stand beside it in the report."
            )
