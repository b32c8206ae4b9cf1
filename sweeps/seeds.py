"""The trainings of one trial: one per seed, a run each, whose mean is the value of the trial."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dann_experiments.names import Metric
from sweeps.ranking import set_forgetting
from sweeps.study import SETTINGS, Sweep


@dataclass(frozen=True)
class Training:
    """A finished training of a trial."""

    seed: int
    value: float
    """The objective."""
    scores: dict[str, float]
    """The metrics that are stored with the trial; with the source's labels, `iou/source_drop_from_baseline` is one of them."""
    run_id: str


def mean_value(trainings: Sequence[Training]) -> float:
    """Return the mean of the objective over the seeds."""
    return statistics.fmean(training.value for training in trainings)


def attributes(trainings: Sequence[Training]) -> dict[str, Any]:
    """Return what is stored with a trial of several seeds: mean scores, the objective and run of each seed, their spread."""
    names = [name for name in trainings[0].scores if all(name in training.scores for training in trainings)]
    values = [training.value for training in trainings]
    return {
        "scores": {name: statistics.fmean(training.scores[name] for training in trainings) for name in names},
        "run_id": trainings[0].run_id,
        "seed_scores": {str(training.seed): training.value for training in trainings},
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "run_ids": [training.run_id for training in trainings],
    }


def constrain(trial: optuna.Trial, trainings: Sequence[Training], threshold: float) -> None:
    """Store with a running trial how much its models forgot the source, in the mean over the seeds."""
    drops = [training.scores.get(Metric.SOURCE_DROP, math.nan) for training in trainings]
    set_forgetting(trial, math.fsum(drops) / len(drops), threshold)


def seeds_done(trial: FrozenTrial) -> int:
    """Return the number of finished trainings of a trial of several seeds; 0 for a trial of one seed."""
    return len(trial.user_attrs.get("seed_scores", {}))


def runs_of(trial: FrozenTrial) -> list[str]:
    """Return the ids of the runs of a trial, by seed."""
    known = trial.user_attrs
    return known.get("run_ids") or ([known["run_id"]] if "run_id" in known else [])


def spread_of(trial: FrozenTrial) -> float | None:
    """Return the standard deviation of a trial's objective over its seeds; None for fewer than two."""
    return trial.user_attrs.get("spread")


def seeds_per_trial(study: Sweep) -> int:
    """Return the number of seeds of each trial of a study; 1 in studies of earlier versions."""
    return (study.attribute(SETTINGS) or {}).get("seeds_per_trial", 1)


def trainings_counted(study: Sweep) -> str | None:
    """Return a sentence that counts the trainings of a study, also those that were done twice; None with one seed per trial."""
    each = seeds_per_trial(study)
    if each == 1:
        return None
    counted = study.counted()
    numbers = {trial.number for trial in counted}
    done = sum(map(seeds_done, counted))
    twice = sum(seeds_done(trial) for trial in study.trials() if trial.number not in numbers)
    parts = [f"{done} of {each * len(counted)} trainings done ({each} seeds per trial)"]
    for state, words in ((TrialState.PRUNED, "spared by pruning"), (TrialState.FAIL, "missing in failed trials")):
        missing = sum(each - seeds_done(trial) for trial in counted if trial.state == state)
        parts += [f"{missing} {words}"] if missing else []
    parts += [f"{twice} more by trials that were run again from their first seed"] if twice else []
    return ", ".join(parts)
