"""Every setting of `compare`: which arms, over which seeds, or which runs that exist. The strings are their help texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dann_experiments.config.errors import InputError
from dann_experiments.config.schema import MOST_PROCESSES
from dann_experiments.config.workers import PoolSettings

Kind = Literal["source_only", "statistics", "control", "adapted", "oracle"]
"""source_only: the source model as it is; statistics: that model with BatchNorm statistics of the target (AdaBN); control:
lambda = 0; adapted: what is judged; oracle: trained on target labels."""
KINDS: tuple[Kind, ...] = get_args(Kind)
ARM_NAMES: Mapping[Kind, str] = {
    "source_only": "source only",
    "statistics": "AdaBN",
    "control": "lambda = 0 control",
    "adapted": "DANN",
    "oracle": "oracle",
}
DEFAULT_ARMS: Mapping[str, Mapping[str, Any]] = {name: {"kind": kind} for kind, name in ARM_NAMES.items()}

MOST_SEEDS = 1000  # more is a seed where their number is wanted


@dataclass(frozen=True)
class CompareConfig(PoolSettings):
    """Did adaptation help? Arms over several seeds, judged against the source model and the lambda = 0 control."""

    arms: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """What is compared (in a YAML file alone; the flag --arms names the file): name -> dotted settings in which the arm
    differs, and `kind`: adapted (default: what is judged), source_only (the source model as it is), statistics (that model
    with BatchNorm statistics of the target, AdaBN), control (lambda = 0), oracle (trained on data.oracle). {} = source only,
    AdaBN, lambda = 0 control, DANN, and the oracle where data.oracle names its images."""
    seeds: int | list[int] = 5
    """How many seeds, counted from `seed`; or the seeds. At least 3 are needed for a verdict, 5 are better."""
    workers: int | None = None
    """Runs at a time; null = as many as the GPUs hold (gpus_per_trial) where there are GPUs (ray: as many as the cluster
    holds), else one per core, at most 4. The cores are shared among them."""
    launcher: Literal["processes", "ray"] = "processes"
    """Where the runs are made. processes: on this machine; ray: on an existing Ray cluster."""
    ray_address: str = "auto"
    """Address of the Ray cluster; auto = the one this machine belongs to."""
    cpus_per_trial: float = 1.0
    """Cores of the Ray cluster that each run takes."""
    gpus_per_trial: float | None = None
    """GPUs that each run takes; 0.5 = two runs share one. null = 1 (launcher ray: 0, and the GPUs are hidden from the runs)."""
    runs: list[str] = field(default_factory=list)
    """Ids of finished runs to compare; nothing is trained then. Their source models' runs are added."""

    def seed_list(self, first: int) -> list[int]:
        """The seeds, from `first` on where only their number is given."""
        return list(range(first, first + self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    def __post_init__(self) -> None:
        given = self.seeds if isinstance(self.seeds, list) else [0] * min(self.seeds, 1)
        if not isinstance(self.seeds, list) and self.seeds > MOST_SEEDS:
            raise InputError(f"seeds is {self.seeds}; give how many, at most {MOST_SEEDS}, or a list of seeds.")
        if not given or (isinstance(self.seeds, list) and len(set(given)) < len(given)):
            raise InputError(f"seeds is {self.seeds}; give how many (at least 1), or a list of different seeds.")
        if any(not 0 <= seed < 2**32 for seed in given):
            raise InputError(f"seeds is {self.seeds}; seeds are whole numbers from 0 to 4294967295.")
        if self.workers is not None and not 1 <= self.workers <= MOST_PROCESSES:
            raise InputError(f"workers is {self.workers}; give a number from 1 to {MOST_PROCESSES}, or null.")
        self.check_pool()
        if len(set(self.runs)) < len(self.runs):
            raise InputError("runs names a run twice; name each once.")
        if self.runs and self.arms:
            raise InputError("arms has no effect with runs, whose arms are read from the store; give one of the two.")
        for name, arm in self.arms.items():
            kind = (arm or {}).get("kind", "adapted")
            if not str(name).strip():
                raise InputError("arms holds an arm without a name; name it.")
            if kind not in KINDS:
                raise InputError(f"arms.{name}.kind is {kind!r}; it is one of {list(KINDS)}.")
        kinds = [(arm or {}).get("kind", "adapted") for arm in self.arms.values()]
        for kind in ("source_only", "control", "oracle"):
            if kinds.count(kind) > 1:
                raise InputError(f"arms holds {kinds.count(kind)} arms of kind {kind}; keep one.")
        if self.arms and "adapted" not in kinds:
            raise InputError("arms holds no arm of kind adapted, so there is nothing to judge; add one.")
