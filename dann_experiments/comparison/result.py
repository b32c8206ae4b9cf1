"""What a comparison holds: arms, their runs over seeds, and what the report draws of them. Plain data, no store needed.

Letters: K classes, H x W pixels, N images, C features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dann_experiments.config.comparison import Kind

if TYPE_CHECKING:
    import pandas as pd

    from dann_experiments.comparison.verdict import Verdict


@dataclass(frozen=True)
class Arm:
    """One way to get a model, run once a seed."""

    name: str
    kind: Kind
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Dotted settings in which it differs from the base settings."""


@dataclass(frozen=True)
class ArmRun:
    """One finished run of an arm."""

    arm: str
    seed: int
    run_id: str
    metrics: Mapping[str, float]
    """Final values under the names of a run: `iou/target_val`, `class_iou/target_test/CLASS`, `da/probe_acc`, ..."""
    history: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Metric -> (step, value) in order, for the curves: both IoUs, `da/lambda`, `da/domain_acc`, `da/domain_acc_val`, and
    every `select/...`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    reused: bool = False
    """Whether it had been there before this comparison."""


@dataclass(frozen=True)
class Panel:
    """One held-out target tile with what the arms predict there."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    truth: np.ndarray | None
    """(H, W) class ids, `ignore_index` where ignored; None without masks."""
    predictions: Mapping[str, np.ndarray]
    """Arm -> (H, W) class ids."""


@dataclass(frozen=True)
class FeatureCloud:
    """Pooled features of held-out images of both domains under one network."""

    source: np.ndarray
    """(N, C)."""
    target: np.ndarray
    """(N, C)."""


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows."""

    title: str
    """Source -> target, as in `mnist -> mnist-m`."""
    arms: Sequence[Arm]
    runs: Sequence[ArmRun]
    class_names: Sequence[str]
    ignore_index: int
    verdicts: Sequence[Verdict]
    """One for each adapted arm."""
    metric: str
    """The score that the verdict judges: `iou/target_test` where there is one, else `iou/target_val`."""
    panels: Sequence[Panel] = ()
    panel_seed: int | None = None
    """The seed whose models made the panels and the feature clouds."""
    features: Mapping[str, FeatureCloud] = field(default_factory=dict)
    """`before` and `after` -> clouds at the tapped layer."""
    feature_layer: str = ""
    selection: pd.DataFrame | None = None
    """How well target-free scores choose: the columns of `selection_quality.score_quality`."""
    notes: Sequence[str] = ()
    """What a reader must know: arms left out and why, failed runs, selection by target labels, commits that differ."""

    def runs_of(self, arm: str) -> list[ArmRun]:
        """The runs of one arm by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)
