"""Runs the best trials again over new seeds: one lucky run does not win, the best mean does, and its model is registered."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import Config, InputError, config_to_dict, config_to_yaml
from dann_experiments.config.parsing import load_settings
from dann_experiments.tracking.store import Store, open_store
from sweeps.driver import drive, find_study, in_store, only_driver
from sweeps.report import baselines, config_of, label, top_trials, trials_table
from sweeps.settings import SweepConfig
from sweeps.study import DEFINITION, SETTINGS, Slot, Sweep, open_storage, storage_address

if TYPE_CHECKING:
    import pandas as pd

ALIAS = "champion"
DEFAULT_TOP = 3


@dataclass(frozen=True)
class Confirmation:
    """What the new seeds showed."""

    study: str
    objective: str
    table: pd.DataFrame
    """A row each candidate, best mean first: objective and test score, mean, standard deviation, values."""
    winner: int | None
    """Number of the trial with the best mean; None if none was confirmed."""
    beats_control: bool | None
    """Whether its mean is better than the control's; None without a control."""
    model: str | None
    """models:/NAME@champion."""
    folder: Path


def confirm(name: str, storage: str | None, overrides: Mapping[str, Any], config: Config) -> Confirmation:
    """Run the best `confirm_top` trials and the control over `confirm_seeds` seeds that chose nothing; runs that exist are
    not run again. Raises InputError where the study has no complete trial."""
    address = storage_address(storage, name)
    parent = find_study(name, address)
    definition = parent.attribute(DEFINITION)
    stored = {**parent.attribute(SETTINGS), "objective": definition["objective"], "pruner": "none"}
    sweep = load_settings(SweepConfig, None, {**stored, "confirm_top": DEFAULT_TOP, **overrides, "study": name})
    candidates = top_trials(parent, sweep.confirm_top)
    if not candidates:
        raise InputError(f"study {name!r} has no complete trial to confirm; `python -m sweeps status --study {name}`.")
    known = [trial for trial in baselines(parent) if trial.number not in {found.number for found in candidates}]
    first_seed = definition["config"]["seed"] + 1
    slots = [
        Slot(
            "confirm",
            _all_settings(parent, trial) | {"seed": first_seed + index},
            reference=True,
            candidate=trial.number,
        )
        for trial in [*candidates, *known]
        for index in range(sweep.confirm_seeds)
    ]
    with only_driver(address, name):
        store = open_store(config.tracking.uri, config.tracking.experiment)
        config = in_store(config, store)
        study_name = f"{name}-confirm"
        again = open_storage(address)
        study = Sweep.find(again, study_name) or Sweep.create(again, study_name, parent.maximizes)
        study.set_attribute(DEFINITION, definition)
        present = {(t.user_attrs["candidate"], t.user_attrs["overrides"]["seed"]) for t in study.counted()}
        study.add([slot for slot in slots if (slot.candidate, slot.overrides["seed"]) not in present])
        settings = {key: value for key, value in config_to_dict(sweep).items() if key in stored}
        study.set_attribute(SETTINGS, settings | {"n_trials": len(study.counted())})

        def report(confirmed: Sweep, store: Store, folder: Path) -> None:
            table = summary(parent, confirmed)
            trials_table(confirmed).to_csv(folder / "trials.csv", index=False)
            table.to_csv(folder / "confirm.csv", index=False)
            if len(table):
                (folder / "report.md").write_text(_text(parent, confirmed, table))

        result = drive(study, sweep, config, store, address, report)
        table = summary(parent, study)
        ranked = (
            [number for number in table["trial"].tolist() if _role(parent, number) != "control"] if len(table) else []
        )
        winner = ranked[0] if ranked else None
        model = None
        if winner is not None:
            model = _register(store, sweep.model_name or name, parent, study, winner)
            best = next(trial for trial in parent.trials() if trial.number == winner)
            (result.folder / "best_config.yaml").write_text(config_to_yaml(config_of(parent, best)))
    return Confirmation(
        study_name, definition["objective"], table, winner, _beats_control(parent, table, winner), model, result.folder
    )


def summary(parent: Sweep, study: Sweep) -> pd.DataFrame:
    """A row each candidate with at least one complete run, best mean first."""
    import pandas as pd

    objective = parent.attribute(DEFINITION)["objective"]
    rows = []
    for trial in parent.trials():
        runs = _runs_of(study, trial.number)
        if not runs:
            continue
        row: dict[str, Any] = {"trial": trial.number, "settings": label(trial), "seeds": len(runs)}
        columns = {objective: [run.value for run in runs]}
        for metric in ("iou/source_val", "iou/target_test"):
            columns[metric] = [run.user_attrs.get("scores", {}).get(metric) for run in runs]
        for metric, values in columns.items():
            given = [float(value) for value in values if value is not None]
            if given:
                row[f"{metric} mean"] = statistics.fmean(given)
                row[f"{metric} sd"] = statistics.stdev(given) if len(given) > 1 else float("nan")
                row[f"{metric} values"] = " ".join(f"{value:.4f}" for value in given)
        row["chosen by"] = trial.value
        rows.append(row)
    table = pd.DataFrame(rows)
    if not rows:
        return table
    return table.sort_values(f"{objective} mean", ascending=not parent.maximizes, ignore_index=True)


def _runs_of(study: Sweep, candidate: int) -> list[FrozenTrial]:
    return [t for t in study.trials(TrialState.COMPLETE) if t.user_attrs.get("candidate") == candidate]


def _role(parent: Sweep, number: int) -> str:
    return next(trial.user_attrs["role"] for trial in parent.trials() if trial.number == number)


def _all_settings(parent: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    return {**(trial.user_attrs.get("point") or {}), **trial.user_attrs["overrides"]}


def _beats_control(parent: Sweep, table: pd.DataFrame, winner: int | None) -> bool | None:
    control = [number for number in table["trial"].tolist() if _role(parent, number) == "control"] if len(table) else []
    if winner is None or not control:
        return None
    order = table["trial"].tolist()
    return order.index(winner) < order.index(control[0])


def _register(store: Store, name: str, parent: Sweep, study: Sweep, winner: int) -> str | None:
    """Register the model of the winner's run with the median score (a typical one, not the luckiest)."""
    from mlflow.exceptions import MlflowException

    runs = sorted(_runs_of(study, winner), key=parent.rank)
    typical = runs[(len(runs) - 1) // 2]
    run_id = typical.user_attrs["run_id"]
    try:
        store.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{store.client.get_run(run_id).info.artifact_uri}/model"
    objective = parent.attribute(DEFINITION)["objective"]
    description = (
        f"Trial {winner} of study {parent.name}, confirmed over {len(runs)} seeds; the run with the median {objective}, "
        f"{typical.value:.4f}."
    )
    version = store.client.create_model_version(name, source, run_id=run_id, description=description)
    store.client.set_registered_model_alias(name, ALIAS, version.version)
    return f"models:/{name}@{ALIAS}"


def _text(parent: Sweep, study: Sweep, table: pd.DataFrame) -> str:
    objective = parent.attribute(DEFINITION)["objective"]
    head = [str(name) for name in table.columns]
    cells: Sequence[Sequence[str]] = [
        [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in table.values.tolist()
    ]
    rows = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]
    first = table["trial"].tolist()[0]
    note = "The control has the best mean: no adaptation here beats it." if _role(parent, first) == "control" else ""
    return "\n".join(
        [
            f"# Study {parent.name}, confirmed",
            "",
            "Each candidate again over seeds that chose nothing, from the same source model; ordered by the mean of "
            f"`{objective}`. `chosen by` is the single value that put it into the list. Standard deviations are over the seeds.",
            note,
            "",
            *rows,
            "",
        ]
    )
