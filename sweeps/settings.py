"""All settings of a sweep: search space, sampler, budget, workers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from dann_experiments.config import InputError, limits
from dann_experiments.config.limits import FILE_NAME, above, between
from dann_experiments.config.run import TARGET_LABEL_METRICS, MonitorConfig
from dann_experiments.config.workers import PoolSettings
from dann_experiments.names import Metric

QUESTION = (
    "space",
    "objective",
    "direction",
    "sampler",
    "sampler_seed",
    "pruner",
    "seeds_per_trial",
    "report_every_n_steps",
)  # changing one of these makes another study


@dataclass(frozen=True)
class SweepConfig(PoolSettings):
    """A search over settings of `adapt`, written in a YAML file (`--space FILE`). Each setting is also a flag."""

    space: dict[str, Any] = field(default_factory=dict)
    """Settings to search, only in the file that the flag --space names: dotted setting -> {type: float, low, high, log,
    step}, {type: int, low, high, log, step}, {type: categorical, choices}, each with an optional
    `when: {other.setting: value}`; `auto` for domain_adaptation.method.feature_layer means all useful layers of the
    network."""
    study: Annotated[str | None, FILE_NAME] = None
    """Name of the study; null = from the file names of the space and the config. An existing study is continued."""
    storage: str | None = None
    """Where the study is stored: a journal file, or an address like postgresql://USER@HOST/DATABASE or sqlite:///FILE; null =
    the journal file studies/STUDY/journal.log. Keep passwords in ~/.pgpass."""
    n_trials: Annotated[int | None, between(1, 100_000)] = None
    """Number of trials, including the values of the config and the lambda = 0 control; null = 20, or the whole grid."""
    timeout: Annotated[float | None, above(0, infinite=True)] = None
    """Start no further trial after this many seconds; null = no limit."""
    objective: str = Metric.TARGET_VAL_IOU
    """Metric that chooses the best trial. One of the target uses target labels: the runs are tagged, and the report says so."""
    direction: Literal["maximize", "minimize"] | None = None
    """Direction of the objective; null = smaller for a loss, a gap, a drop or the entropy, else larger."""
    sampler: Literal["tpe", "gp", "qmc", "random", "grid"] = "tpe"
    """How values are proposed. tpe: tree-structured Parzen estimator; gp: Gaussian process; qmc: quasi-Monte Carlo (Sobol);
    random: independent draws; grid: every point of a grid."""
    sampler_seed: Annotated[int, between(0, 2**32 - 1)] = 0
    """Seed of the proposals. The runs have their own, `seed`."""
    seeds_per_trial: Annotated[int, between(1, 1000)] = 1
    """Number of seeds with which each trial is trained: seed, seed + 1, ... Its value is the mean over them, and each training is
    a run of its own."""
    pruner: Literal["median", "halving", "hyperband", "wilcoxon", "none"] | None = None
    """Rule that stops poor trials early. halving (asynchronous successive halving): after an eighth and three eighths of a
    run, in runs of fewer than 8 epochs within an epoch too, about one trial of three goes on. After each epoch: median (worse
    than the median), hyperband (Hyperband). After each seed, with seeds_per_trial above 1: wilcoxon (Wilcoxon's signed-rank
    test against the best trial, from the fourth seed). none: run all to the end. null = median, or wilcoxon with several
    seeds."""
    report_every_n_steps: Annotated[int | None, between(1, 10**9)] = None
    """Also score the objective on the whole validation sets every N optimizer steps within an epoch, and let the pruner judge
    by it; its steps are then optimizer steps. Results of a trial that is not pruned do not change. null = after each epoch, and
    where halving judges."""
    max_failures: Annotated[int, between(1, 100_000)] = 5
    """Stop the sweep after this many failed trials in a row."""
    nested: bool = False
    """Nest the runs of the trials under the run of the sweep in MLflow. The chart view shows only runs that are not nested."""
    confirm_top: Annotated[int, between(0, 1000)] = 0
    """After the sweep, run this many of the best trials again over new seeds; the best mean wins. 0 = none."""
    confirm_seeds: Annotated[int, between(1, 1000)] = 3
    """Number of new seeds per confirmed trial."""
    model_name: Annotated[str | None, FILE_NAME] = None
    """Name under which the model of the confirmed winner is registered (docs/models.md); null =
    tracking.registered_model_name, else the name of the study."""
    allow_class_path: str | list[str] | None = None
    """For resume and confirm: a domain_adaptation.method.class_path, or several, that the storage of the study names and that may
    be imported. By default no code named in a storage is imported. This setting is not stored."""

    @property
    def allowed_classes(self) -> list[str]:
        """`allow_class_path` as a list."""
        given = self.allow_class_path
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    @property
    def maximizes(self) -> bool:
        """True if larger is better, by `direction` or, if that is null, by the name of the objective."""
        if self.direction is not None:
            return self.direction == "maximize"
        return MonitorConfig(metric=self.objective).direction == "max"

    @property
    def pruner_used(self) -> str:
        """`pruner`, or the one that null stands for."""
        return self.pruner or ("median" if self.seeds_per_trial == 1 else "wilcoxon")

    @property
    def uses_target_labels(self) -> bool:
        """True if the objective is computed from target labels."""
        return self.objective.startswith(TARGET_LABEL_METRICS)

    def __post_init__(self) -> None:
        limits.check(self)
        self.check_pool()
        if self.pruner == "wilcoxon" and self.seeds_per_trial == 1:
            raise InputError(
                "pruner is 'wilcoxon', which compares seeds, but seeds_per_trial is 1; raise it or remove pruner."
            )
        if self.pruner not in (None, "wilcoxon", "none") and self.seeds_per_trial > 1:
            raise InputError(
                f"pruner is {self.pruner!r}, which judges epochs, but seeds_per_trial is {self.seeds_per_trial}; give wilcoxon "
                "or none, or remove pruner."
            )
        if self.report_every_n_steps is not None and self.pruner_used in ("wilcoxon", "none"):
            raise InputError(
                f"report_every_n_steps is {self.report_every_n_steps}, but pruner {self.pruner_used} does not judge within a "
                "run; remove it or choose median, halving or hyperband."
            )
        if re.search(r"_test(/|$)", self.objective):
            raise InputError(
                f"objective is {self.objective!r}, a score of the held-out test set, which can no longer test what was "
                "chosen by it. Choose by a validation metric; the report shows the test scores as well."
            )


def storage_address(storage: str | None, study: str) -> str:
    """Return the storage of a study: an address with a scheme, or the path of a journal file (by default in its folder)."""
    return storage if storage is not None else str(study_folder(study) / "journal.log")


def study_folder(study: str) -> Path:
    """Return the folder of a study: its journal (by default), the logs of the workers, the report."""
    return Path("studies") / study
