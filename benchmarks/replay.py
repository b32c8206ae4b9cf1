"""Replays the recorded curves of an unpruned sweep under a pruner: what it would have trained, and which trial would have won."""

from __future__ import annotations

import csv
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeps.ranking import FORGETTING
from sweeps.sampling import PARTS
from sweeps.study import Role, Slot, Sweep


@dataclass(frozen=True)
class Curve:
    """One recorded trial."""

    role: Role
    reports: tuple[float, ...]
    """The objective after each epoch; the last one is the trial's value."""
    test: float = float("nan")
    """The final model's score on the test set, which nothing is chosen by."""
    forgot: bool = False
    """True if the final model forgot the source."""


@dataclass(frozen=True)
class Replayed:
    """The result of a replay."""

    epochs: tuple[int, ...]
    """Epochs trained, by trial."""
    share: float
    """Epochs trained, divided by those of the unpruned sweep."""
    best: int
    """Number of the best complete trial, without the control."""


def made_curves(ends: Sequence[float]) -> list[Curve]:
    """Return curves of a recipe, a control and a search that rise evenly from 0.4 to `ends`, every second from 0.01 lower."""
    first: tuple[Role, ...] = ("recipe", "control")
    curves = []
    for number, end in enumerate(ends):
        role = first[number] if number < len(first) else "search"
        low = 0.01 * (number % 2)
        reports = [0.4 + (end - 0.4) * part / PARTS - (low if part == 1 else 0) for part in range(1, PARTS + 1)]
        curves.append(Curve(role, tuple(reports)))
    return curves


def curve_of(trial: FrozenTrial) -> Curve:
    """Return the curve of a complete trial that reported after each epoch."""
    reports = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    test = trial.user_attrs["scores"].get("iou/target_test", float("nan"))
    return Curve(trial.user_attrs["role"], tuple(reports), test, trial.constraints.get(FORGETTING, 0.0) > 0)


def write_curves(path: Path, sweeps: dict[str, list[Curve]]) -> None:
    """Write the curves of sweeps into a CSV file."""
    epochs = max(len(one.reports) for curves in sweeps.values() for one in curves)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["sweep", "trial", "role", "forgot", "test", *range(1, epochs + 1)])
        for name, curves in sweeps.items():
            for number, one in enumerate(curves):
                shown = [f"{value:.5f}" for value in (one.test, *one.reports)]
                rows.writerow([name, number, one.role, int(one.forgot), *shown])


def read_curves(path: Path) -> dict[str, list[Curve]]:
    """Return the curves of a file that `write_curves` wrote, by sweep in the order of their numbers."""
    found: dict[str, list[Curve]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            reports = tuple(float(value) for name, value in row.items() if name.isdigit() and value)
            one = Curve(cast(Role, row["role"]), reports, float(row["test"]), row["forgot"] == "1")
            found.setdefault(row["sweep"], []).append(one)
    return found


def replay(curves: Sequence[Curve], pruner: Callable[[], optuna.pruners.BasePruner], workers: int = 2) -> Replayed:
    """Run the recorded trials by simulated workers of equal speed; each trial is judged by a `pruner` of its own."""
    sweep = Sweep.create(optuna.storages.InMemoryStorage(), "replay", maximizes=True)
    sweep.add([Slot(one.role, {}, reference=one.role == "control") for one in curves])
    epochs = [0] * len(curves)
    clock = [(0, worker) for worker in range(workers)]
    running: dict[int, optuna.Trial] = {}
    while clock:
        now, worker = heapq.heappop(clock)
        if worker not in running:
            slot = sweep.claim(f"host:{worker}:0", "replay")
            if slot is None:
                continue
            study = sweep.for_sampling(optuna.samplers.RandomSampler(seed=0), pruner())
            running[worker] = optuna.Trial(study, slot._trial_id)
        trial = running[worker]
        curve = curves[trial.number]
        epochs[trial.number] += 1
        done = epochs[trial.number]
        trial.report(curve.reports[done - 1], done)
        if done == len(curve.reports):
            if curve.forgot:
                trial.set_constraint(FORGETTING, 1.0)
            trial.study.tell(trial, curve.reports[-1])
            del running[worker]
        elif trial.should_prune() and curve.role == "search":
            trial.study.tell(trial, state=TrialState.PRUNED)
            del running[worker]
        heapq.heappush(clock, (now + 1, worker))
    best = sweep.best()
    assert best is not None
    return Replayed(tuple(epochs), sum(epochs) / sum(len(one.reports) for one in curves), best.number)


def best_of(curves: Sequence[Curve]) -> int:
    """Return the number of the trial that wins the unpruned sweep."""
    return replay(curves, optuna.pruners.NopPruner).best


def rank_correlations(curves: Sequence[Curve]) -> list[float]:
    """Return Spearman's correlation of the objective after each epoch but the last with that at the end, over the trials of the
    search."""
    values = np.array([one.reports for one in curves if one.role == "search"])
    ranks = values.argsort(axis=0).argsort(axis=0)
    return [float(np.corrcoef(ranks[:, epoch], ranks[:, -1])[0, 1]) for epoch in range(values.shape[1] - 1)]
