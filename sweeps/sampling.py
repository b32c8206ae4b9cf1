"""Samplers and pruners of Optuna, and the part of a study that they see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from sweeps.ranking import FORGETTING, ranked
from sweeps.settings import SweepConfig

P_OF_SEEDS = 0.1  # Optuna's own default; four seeds that are all worse have p = 1/16, three 1/8
PARTS = 8
"""Parts of a run by which `halving` counts in new studies; a study keeps its own."""
FACTOR = 3  # one of three goes on
RUNGS = (1, FACTOR)
"""Parts after which it judges: of 8, an eighth of the run and three eighths."""


class SearchView:
    """A storage that hides the references, which would mislead a sampler, and failed trials, which would mislead a pruner.

    References have the same values as a trial of the search but another method, or none of the searched values. A trial that was
    cut off is run again, and would compete with its own scores. The best trial is that
    of `sweeps.ranking`, whatever the storage does about ties.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Sequence[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=cast(Any, states))
        hidden = (trial.user_attrs.get("reference") or trial.state == TrialState.FAIL for trial in found)
        return _all_constrained([trial for trial, is_hidden in zip(found, hidden, strict=True) if not is_hidden])

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        found = self.get_all_trials(study_id, deepcopy=False, states=[TrialState.COMPLETE])
        if not found:
            raise ValueError("No trials are completed yet.")
        maximizes = self._storage.get_study_directions(study_id)[0] == optuna.study.StudyDirection.MAXIMIZE
        return ranked(found, maximizes)[0]


def _all_constrained(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials, each complete one with the constraint if any has it.

    Those of an earlier version have none, and count as just within it: Optuna's Gaussian process refuses a mixture.
    """
    if not any(FORGETTING in trial.constraints for trial in trials):
        return trials
    return [
        _just_within(trial) if trial.state == TrialState.COMPLETE and FORGETTING not in trial.constraints else trial
        for trial in trials
    ]


def _just_within(trial: FrozenTrial) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.system_attrs = dict(trial.system_attrs)  # `copy` shares it with the storage's own trial
    changed.set_constraint(FORGETTING, 0.0)
    return changed


def build_sampler(
    sweep: SweepConfig, conditional: bool, trial_number: int, n_trials: int
) -> optuna.samplers.BaseSampler:
    """Return the sampler for one trial, seeded by its number: the same in every worker, and after a resume."""
    seed = (sweep.sampler_seed * 1_000_003 + trial_number) % 2**32
    startup = max(4, min(10, n_trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls `group` and QMC experimental
        if sweep.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        if sweep.sampler == "qmc":  # one scrambled sequence for all
            return _QMCSampler(
                trial_number, scramble=True, seed=sweep.sampler_seed, warn_independent_sampling=False,
                independent_sampler=optuna.samplers.RandomSampler(seed=seed),
            )  # fmt: skip
        if sweep.sampler in ("random", "grid"):  # the slots of a grid hold its points
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, group=conditional)


class _QMCSampler(optuna.samplers.QMCSampler):
    """Takes the point of the sequence with the number of the trial. Optuna counts the trials in the study, so two workers at the
    same time would get the same point."""

    def __init__(self, trial_number: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._trial_number = trial_number

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, Any]) -> int:
        return self._trial_number


def judges_by_parts(name: str, max_epochs: int, every_n_steps: int | None = None, parts: int | None = PARTS) -> bool:
    """Return whether the steps of the pruner are parts of a run, 1 to `parts`: `halving`, where the run has fewer epochs."""
    return name == "halving" and every_n_steps is None and parts is not None and max_epochs < parts


def build_pruner(
    name: str, max_epochs: int, every_n_steps: int | None = None, parts: int | None = PARTS
) -> optuna.pruners.BasePruner:
    """Return the pruner. Its steps are epochs, 1 to `max_epochs`, or parts of a run (`judges_by_parts`); optimizer steps if it
    judges every `every_n_steps` of them; or for `wilcoxon` the numbers of seeds, from 0."""
    first = every_n_steps or 1
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_min_trials=3)
    if name == "halving":
        first = every_n_steps or max(1, max_epochs // (parts or max_epochs))
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=FACTOR)
    if name == "hyperband":
        # "auto": the steps of the first complete trial; it is not known here how many an epoch has
        last = max_epochs if every_n_steps is None else "auto"
        return optuna.pruners.HyperbandPruner(min_resource=first, max_resource=last, reduction_factor=3)
    if name == "wilcoxon":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls it experimental
            return optuna.pruners.WilcoxonPruner(p_threshold=P_OF_SEEDS)
    return optuna.pruners.NopPruner()
