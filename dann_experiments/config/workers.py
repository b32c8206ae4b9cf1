"""The settings that say where the runs of a comparison or sweep are made; the classes that have them hold their help texts."""

from __future__ import annotations

from typing import Literal

from dann_experiments.config.errors import InputError

RAY_ONLY = {"ray_address": "auto", "cpus_per_trial": 1.0}
"""Settings without effect on one machine, and their defaults."""
MOST_RUNS_PER_GPU = 64
MOST_GPUS = 1000


class PoolSettings:
    """Settings of a worker pool, as `SweepConfig` and `CompareConfig` have them."""

    workers: int | None
    launcher: Literal["processes", "ray"]
    ray_address: str
    cpus_per_trial: float
    gpus_per_trial: float | None

    def check_pool(self) -> None:
        """Raise InputError for settings that do not agree."""
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
