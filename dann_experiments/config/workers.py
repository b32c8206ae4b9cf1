"""The settings of worker pools, shared by comparisons and sweeps. Their help texts are in the classes that inherit them."""

from __future__ import annotations

from typing import Literal

from dann_experiments.config.errors import InputError

RAY_ONLY = {"ray_address": "auto", "cpus_per_trial": 1.0}
"""Settings that only launcher ray uses, with their defaults."""
MOST_RUNS_PER_GPU = 64
MOST_GPUS = 1000


class PoolSettings:
    """Base class of `SweepConfig` and `CompareConfig` with the settings of a worker pool."""

    workers: int | None
    launcher: Literal["processes", "ray"]
    ray_address: str
    cpus_per_trial: float
    gpus_per_trial: float | None

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
