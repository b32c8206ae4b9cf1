"""Runs the best trials again over new seeds, so that the best mean wins, not one lucky run; registers the winner's model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import InputError, config_to_yaml
from dann_experiments.config.untrusted import refuse_stored_code
from dann_experiments.config.workers import RAY_ONLY
from dann_experiments.jobs.shared_data import shared_by
from dann_experiments.names import Metric, Tag
from dann_experiments.reports.tables import markdown, number
from dann_experiments.tracking.notes import escaped
from dann_experiments.tracking.registry import register
from dann_experiments.tracking.store import Store, open_store
from dann_experiments.workers.pool import refuse_unshared
from sweeps.cleanup import clean_up_at_start
from sweeps.definition import store_settings, stored_settings
from sweeps.driver import drive, find_study, in_store, only_driver, open_workers, study_config
from sweeps.ranking import FORGETTING, forgot, mean_forgot, order, ranked
from sweeps.report import KEPT, baselines, config_of, label, top_trials, write_trials
from sweeps.seeds import seeds_per_trial
from sweeps.settings import SweepConfig, storage_address
from sweeps.study import (
    DEFINITION,
    SETTINGS,
    SOURCE_ONLY,
    TRACKING,
    Slot,
    Sweep,
    is_journal,
    open_storage,
    superseded,
)

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_TOP = 3
ALL_FORGOT = (
    "Every candidate with all its seeds forgot the source in the mean (by more than monitor.forgetting_threshold); the best of "
    "them is no winner, and its model does not become the champion."
)
EFFECTIVE = {
    "confirm_top",
    "confirm_seeds",
    "model_name",
    "workers",
    "launcher",
    *RAY_ONLY,
    "timeout",
    "max_failures",
    "nested",
    "allow_class_path",
}


@dataclass(frozen=True)
class Confirmation:
    """The results over the new seeds."""

    study: str
    objective: str
    table: pd.DataFrame
    """One row per candidate, best mean first: mean, standard deviation and values of objective and test score."""
    winner: int | None
    """Number of the trial with the best mean; None if none was confirmed."""
    beats_control: bool | None
    """True if the winner's mean is better than the control's; None without a winner or a control."""
    winner_forgot: bool
    """True if the winner forgot the source in the mean, as all candidates did."""
    model: str | None
    """Address of the registered model, models:/NAME@champion if it became the champion; None without a winner."""
    folder: Path


def confirm(
    name: str,
    storage: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    tracking: Mapping[str, Any] | None = None,
) -> Confirmation:
    """Run the best `confirm_top` trials and the control over `confirm_seeds` new seeds; finished runs are reused.

    `overrides`: settings of the sweep, only those in EFFECTIVE; `tracking`: dotted `tracking.*`, the store of the study's runs.
    Raises InputError if the study has no complete trial.
    """
    address = storage_address(storage, name)
    parent = find_study(name, address)
    overrides = dict(overrides or {})
    without_effect = [key for key in overrides if key not in EFFECTIVE]
    if without_effect:
        raise InputError(f"{without_effect[0]} has no effect in confirm; give some of {sorted(EFFECTIVE)}.")
    single = {"pruner": "none", "seeds_per_trial": 1, "report_every_n_steps": None}  # here each seed is a trial
    top = parent.attribute(SETTINGS).get("confirm_top") or DEFAULT_TOP
    sweep = stored_settings(parent, {"confirm_top": top, **overrides, **single, "storage": storage})
    refuse_unshared(sweep, "storage", address)
    candidates = top_trials(parent, sweep.confirm_top)
    if not candidates:
        raise InputError(f"study {name!r} has no complete trial to confirm; `dann-sweep status --study {name}`.")
    first = parent.attribute(DEFINITION)["config"]["seed"] + seeds_per_trial(parent)
    contest = _Contest(parent, candidates, range(first, first + sweep.confirm_seeds))
    config = study_config(parent, tracking or {})
    for trial in contest.trials():
        named = config_of(parent, trial).domain_adaptation.method.class_path
        refuse_stored_code(named, sweep.allowed_classes, f"trial {trial.number} of study {name!r}")
    with (
        shared_by(sweep.launcher, Path(config.tracking.folder)) as decoded,
        only_driver(address, name),
        open_workers(sweep, config) as pool,
    ):
        store = open_store(config.tracking.uri, config.tracking.experiment)
        refuse_unshared(sweep, "tracking.uri", store.uri)
        config = in_store(config, store)
        study = _confirming_study(contest, sweep, address, store)

        def report(confirmed: Sweep, store: Store, folder: Path) -> None:
            table = contest.table(confirmed)
            write_trials(confirmed, folder / "trials.csv")
            table.to_csv(folder / "confirm.csv", index=False)
            if len(table):
                (folder / "report.md").write_text(_text(parent, table, contest.winner_forgot(confirmed)))
            winner = contest.winner(confirmed)
            if winner is not None:
                (folder / "best_config.yaml").write_text(config_to_yaml(config_of(parent, winner)))

        result = drive(study, sweep, config, store, address, pool, decoded, report)
        table, winner = contest.table(study), contest.winner(study)
        model_name = sweep.model_name or config.tracking.registered_model_name or name
        beats_control = contest.beats_control(table, winner)
        model = None if winner is None else _register(store, model_name, contest, study, winner, beats_control)
    return Confirmation(
        study.name,
        sweep.objective,
        table,
        None if winner is None else winner.number,
        beats_control,
        contest.winner_forgot(study),
        model,
        result.folder,
    )


def _confirming_study(contest: _Contest, sweep: SweepConfig, address: str, store: Store) -> Sweep:
    """Return the study of the confirming runs, with the missing ones added."""
    parent, storage = contest.parent, open_storage(address)
    name = f"{parent.name}-confirm"
    study = Sweep.find(storage, name) or Sweep.create(storage, name, parent.maximizes)
    for attribute in (DEFINITION, TRACKING):
        study.set_attribute(attribute, parent.attribute(attribute))
    clean_up_at_start(study, store, is_journal(address))
    present = {
        (t.user_attrs["candidate"], t.user_attrs["overrides"]["seed"]) for t in study.counted() if not _failed(t)
    }
    study.add([slot for slot in contest.slots() if (slot.candidate, slot.overrides["seed"]) not in present])
    store_settings(study, sweep, len(study.counted()))
    return study


@dataclass(frozen=True)
class _Contest:
    """Candidates, the recipe and the control over the same new seeds."""

    parent: Sweep
    candidates: Sequence[FrozenTrial]
    seeds: Sequence[int]

    def trials(self) -> list[FrozenTrial]:
        """Return the candidates, then recipe and control if they are no candidates."""
        numbers = {trial.number for trial in self.candidates}
        return [*self.candidates, *(trial for trial in baselines(self.parent) if trial.number not in numbers)]

    def slots(self) -> list[Slot]:
        """Return one run per trial and seed."""
        return [
            Slot(
                "confirm",
                {**(trial.user_attrs.get("point") or {}), **trial.user_attrs["overrides"], "seed": seed},
                reference=True,
                candidate=trial.number,
            )
            for trial in self.trials()
            for seed in self.seeds
        ]

    def runs(self, study: Sweep, trial: FrozenTrial) -> list[FrozenTrial]:
        """Return the complete runs of one trial with the seeds of this contest."""
        return [
            run
            for run in study.trials(TrialState.COMPLETE)
            if run.user_attrs.get("candidate") == trial.number and run.user_attrs["overrides"]["seed"] in self.seeds
        ]

    def table(self, study: Sweep) -> pd.DataFrame:
        """Return one row per trial with a complete run: those that kept the source in the mean first, best mean first."""
        import pandas as pd

        objective = self.parent.attribute(DEFINITION)["objective"]
        rows = []
        for trial in self.trials():
            runs = self.runs(study, trial)
            if not runs:
                continue
            row: dict[str, Any] = {"trial": trial.number, "settings": label(trial), "seeds": len(runs)}
            columns = {objective: [run.value for run in runs]}
            for metric in (Metric.SOURCE_VAL_IOU, Metric.SOURCE_DROP, Metric.TARGET_TEST_IOU):
                columns[metric] = [run.user_attrs.get("scores", {}).get(metric) for run in runs]
            for metric, values in columns.items():
                given = [float(value) for value in values if value is not None]
                if given:
                    row[f"{metric} mean"] = statistics.fmean(given)
                    row[f"{metric} sd"] = statistics.stdev(given) if len(given) > 1 else float("nan")
                    row[f"{metric} values"] = " ".join(f"{value:.4f}" for value in given)
            row["chosen by"] = trial.value
            if any(FORGETTING in run.constraints for run in runs):
                row[KEPT] = "NO" if mean_forgot(runs) else "yes"
            rows.append((self._order(trial, runs), row))
        return pd.DataFrame([row for _, row in sorted(rows, key=lambda entry: entry[0])])

    def _order(self, trial: FrozenTrial, runs: Sequence[FrozenTrial]) -> tuple[bool, float, int]:
        """Return the key by which trials with confirming runs are sorted, best first."""
        mean = statistics.fmean(run.value for run in runs if run.value is not None)
        return order(mean_forgot(runs), mean, trial.number, self.parent.maximizes)

    def winner(self, study: Sweep) -> FrozenTrial | None:
        """Return the candidate (or recipe) with the best mean once all runs have ended.

        One with a failed seed cannot win; one that forgot the source in the mean wins only if all did."""
        if any(not trial.state.is_finished() or superseded(trial) for trial in study.counted()):
            return None
        entered = [trial for trial in self.trials() if trial.user_attrs["role"] != "control"]
        whole = [trial for trial in entered if len(self.runs(study, trial)) == len(self.seeds)]
        return min(whole, key=lambda trial: self._order(trial, self.runs(study, trial)), default=None)

    def winner_forgot(self, study: Sweep) -> bool:
        """Return whether the winner forgot the source in the mean over the new seeds."""
        winner = self.winner(study)
        return winner is not None and mean_forgot(self.runs(study, winner))

    def beats_control(self, table: pd.DataFrame, winner: FrozenTrial | None) -> bool | None:
        """Return whether the winner's mean is better than the control's; None if one of them is missing."""
        if winner is None or not len(table):
            return None
        column = f"{self.parent.attribute(DEFINITION)['objective']} mean"
        means = dict(zip(table["trial"], table[column], strict=True))
        control = next((trial.number for trial in self.trials() if trial.user_attrs["role"] == "control"), None)
        if control not in means:
            return None
        better, worse = (winner.number, control) if self.parent.maximizes else (control, winner.number)
        return bool(means[better] > means[worse])


def _failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and not superseded(trial)


def _register(
    store: Store, name: str, contest: _Contest, study: Sweep, winner: FrozenTrial, beats_control: bool | None
) -> str:
    """Register the model of the winner's run with the median score, which is typical and not just lucky.

    Runs that forgot the source are left out if others did not. The model does not become the champion if the control is better or
    the winner forgot the source.
    """
    runs = contest.runs(study, winner)
    kept = [run for run in runs if not forgot(run)] or runs
    typical = ranked(kept, study.maximizes)[len(kept) // 2]
    among = "" if len(kept) == len(runs) else " of those that kept the source"
    objective = study.attribute(DEFINITION)["objective"]
    about = (
        f"Trial {winner.number} of study {escaped(contest.parent.name)}, confirmed over {len(runs)} seeds; the run with the "
        f"median {objective}{among}, {typical.value:.4f}."
    )
    tags = {Tag.STUDY: contest.parent.name, Tag.TRIAL: str(winner.number)}
    may_lead = beats_control is not False and not contest.winner_forgot(study)
    return register(store, name, typical.user_attrs["run_id"], about, tags, may_lead=may_lead)


def _source_line(parent: Sweep) -> str:
    source = parent.attribute(SOURCE_ONLY)
    if source is None:
        return ""
    return (
        "The source model, not adapted: " + ", ".join(f"`{k}` {number(v)}" for k, v in source["scores"].items()) + "."
    )


def _text(parent: Sweep, table: pd.DataFrame, winner_forgot: bool) -> str:
    objective = parent.attribute(DEFINITION)["objective"]
    first = table["trial"].tolist()[0]
    control = [trial.number for trial in baselines(parent) if trial.user_attrs["role"] == "control"]
    note = "The control has the best mean: no adapted candidate beats it." if first in control else ""
    return "\n".join(
        [
            f"# Study {parent.name}, confirmed",
            "",
            f"Each candidate, run again over new seeds, ordered by the mean of `{objective}`; those that forgot the source in "
            "the mean come last. `chosen by` is the single value by which it was selected. Standard deviations are over the "
            "seeds.",
            note,
            ALL_FORGOT if winner_forgot else "",
            _source_line(parent),
            "",
            *markdown(table),
            "",
        ]
    )
