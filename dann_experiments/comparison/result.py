"""The data of a comparison: arms, their runs over seeds, and everything that the report draws. It needs no store.

Letters: K classes, H x W pixels, N images, C features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dann_experiments.config.comparison import Kind

if TYPE_CHECKING:
    import pandas as pd

    from dann_experiments.comparison.choice import Choice
    from dann_experiments.comparison.verdict import Verdict


@dataclass(frozen=True)
class Arm:
    """One way to get a model, run once per seed."""

    name: str
    kind: Kind
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Dotted settings in which the arm differs from the base settings."""


@dataclass(frozen=True)
class ArmRun:
    """One finished run of an arm."""

    arm: str
    seed: int
    run_id: str
    metrics: Mapping[str, float]
    """Metric -> final value: `iou/target_val`, `class_iou/target_test/CLASS`, `da/probe_acc`, ..."""
    history: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Metric -> (step, value) in order of steps: both IoUs, `da/lambda`, `da/domain_acc`, `da/domain_acc_val`, the probe, and
    every `select/...`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    reused: bool = False
    """True if the run existed before this comparison."""


@dataclass(frozen=True)
class Panel:
    """One held-out target tile with the predictions of the arms."""

    image: np.ndarray
    """Image (H, W, 3) uint8."""
    truth: np.ndarray | None
    """(H, W) class ids, `ignore_index` where ignored; None without masks."""
    predictions: Mapping[str, np.ndarray]
    """Arm -> (H, W) class ids."""


@dataclass(frozen=True)
class FeatureCloud:
    """Pooled features of held-out images of both domains under one network."""

    source: np.ndarray
    """Features (N, C)."""
    target: np.ndarray
    """Features (N, C)."""


@dataclass(frozen=True)
class Comparison:
    """All data of a report."""

    title: str
    """Source -> target, as in `mnist -> mnist-m`."""
    arms: Sequence[Arm]
    runs: Sequence[ArmRun]
    class_names: Sequence[str]
    ignore_index: int
    verdicts: Sequence[Verdict]
    """One verdict per adapted arm."""
    metric: str
    """The judged score: `iou/target_test` if it is known, else `iou/target_val`; empty without target labels."""
    floor: float = math.nan
    """The mean IoU of the best constant prediction on the judged set, 0..1; NaN if the runs do not have it."""
    panels: Sequence[Panel] = ()
    panel_seed: int | None = None
    """The seed of the models behind the panels and feature clouds."""
    features: Mapping[str, FeatureCloud] = field(default_factory=dict)
    """`before` and `after` adaptation -> cloud at the tapped layer."""
    feature_layer: str = ""
    selection: pd.DataFrame | None = None
    """The table of `selection_quality.score_quality`: how well label-free scores choose."""
    parts: pd.DataFrame | None = None
    """The table of `parts.part_table`: what the adversary and each companion add; None without two arms to tell."""
    choice: Choice | None = None
    """The choice among the arms without target labels; None for one adapted arm whose target has labels."""
    domains: int = 2
    """Number of classes of the domain classifier."""
    notes: Sequence[str] = ()
    """Notes for the reader: arms left out and why, failed runs, selection by target labels, different commits."""

    def runs_of(self, arm: str) -> list[ArmRun]:
        """Return the runs of one arm in the order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)
