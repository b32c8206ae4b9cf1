"""The settings of worker pools, which comparisons and sweeps share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import above, between
from dann_experiments.config.run import MOST_PROCESSES

RAY_ONLY = {"ray_address": "auto", "cpus_per_trial": 1.0}
"""Settings that only launcher ray uses, with their defaults."""
MOST_RUNS_PER_GPU = 64
MOST_GPUS = 1000


@dataclass(frozen=True)
class PoolSettings:
    """Base class of `SweepConfig` and `CompareConfig` with the settings of a worker pool."""

    workers: Annotated[int | None, between(1, MOST_PROCESSES)] = None
    """Runs at a time; null = as many as fit on the GPUs (gpus_per_trial), without GPUs one per core, at most 4; with launcher
    ray, as many as fit on the cluster. They share the cores."""
    launcher: Literal["processes", "ray"] = "processes"
    """Where runs are made. processes: on this machine; ray: on an existing Ray cluster."""
    ray_address: str = "auto"
    """Address of the Ray cluster; auto = the one that this machine belongs to."""
    cpus_per_trial: Annotated[float, above(0)] = 1.0
    """Cores of the Ray cluster per run."""
    gpus_per_trial: Annotated[float | None, between(0, MOST_GPUS)] = None
    """GPUs per run; 0.5 = two runs share one. null = 1; with launcher ray 0, and runs see no GPU."""

    def check_pool(self) -> None:
        """Raise InputError for settings that contradict each other."""
        if self.launcher == "ray":
            return
        for name, default in RAY_ONLY.items():
            if getattr(self, name) != default:
                raise InputError(f"{name} has no effect with launcher: processes; remove it, or set launcher: ray.")
        gpus = self.gpus_per_trial
        if gpus is not None and not 1 / MOST_RUNS_PER_GPU <= gpus <= 1:
            raise InputError(
                f"gpus_per_trial is {gpus} with launcher: processes, where each run has one GPU or shares it; give 1, or a part "
                f"such as 0.5 (two runs share one), not below {1 / MOST_RUNS_PER_GPU:g}."
            )
