"""Prints a study on the command line: its trials, links, and where the files are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console

from dann_experiments.config.run import TARGET_LABEL_METRICS
from dann_experiments.names import Metric
from dann_experiments.reports.tables import number
from dann_experiments.reports.terminal import print_table
from dann_experiments.tracking.saved_views import address
from dann_experiments.tracking.store import open_store
from sweeps.driver import SweepResult, find_study, study_config
from sweeps.progress import describe_end
from sweeps.ranking import ranked
from sweeps.report import (
    ENDED,
    baselines,
    below_source_note,
    comparison,
    forgetting_note,
    passed_over_note,
    target_free_choice,
    top_trials,
    write_report,
)
from sweeps.seeds import seeds_done, trainings_counted
from sweeps.settings import storage_address, study_folder
from sweeps.study import DEFINITION, HALT, SETTINGS, Sweep, flags_of, is_journal

if TYPE_CHECKING:
    from sweeps.confirm import Confirmation

EDGES, CELL_WIDTH = 4, 10  # of a table, and of a column that holds a run's id
FEWEST_CHOSEN_AMONG = 10  # with fewer trials, how well a score ranks them is an accident


def result(ended: SweepResult, store: str) -> None:
    """Print the results of a sweep: the best trials next to recipe and control, and where the files are."""
    print_study(ended.sweep)
    counts = ended.sweep.counts()
    print(", ".join(f"{counts[state]} {word}" for state, word in ENDED.items() if counts[state]))
    print(f"Report, figures, best_config.yaml, trials.csv: {ended.folder}")
    if not store.startswith("http"):
        print(f"Look at it: {store}")
    for what, page in ended.links.items():
        print(f"MLflow, {what}: {address(store, page)}")
    if ended.best is not None:
        flags = flags_of(ended.study, ended.settings.storage)
        print(f"Next: dann-sweep confirm {flags}   (the best again over new seeds; the best mean wins)")


def print_study(study: Sweep) -> None:
    """Print one column per trial, as many as fit on the terminal: recipe, control, source model and the best trials."""
    known = baselines(study)
    names = [str(name) for name in comparison(study, known or top_trials(study, 1)).columns]
    columns = (Console().width - max(map(len, names)) - EDGES) // CELL_WIDTH
    best = top_trials(study, max(1, columns - len(known) - 1))
    shown = {trial.number: trial for trial in [*best, *known]}
    found = comparison(study, ranked(shown.values(), study.maximizes)).set_index("").T
    headings = [
        str(name).removeprefix("trial ").replace(" (", "\n").replace("source only", "source\nonly").rstrip(")")
        for name in found.columns
    ]
    rows = [
        [str(name), *(number(cell, digits=3) for cell in row)] for name, row in found.drop(index="state").iterrows()
    ]
    print_table(f"study {study.name}", ["trial", *headings], rows, SIMPLE)
    for note in (forgetting_note(study), passed_over_note(study), below_source_note(study)):
        if note is not None:
            print(note)
    objective = study.attribute(DEFINITION)["objective"]
    if str(objective).startswith(TARGET_LABEL_METRICS):
        print(
            f"Chosen by {objective}, which uses target labels: the best of many scores is too optimistic; iou/target_test is not."
        )
    quality = target_free_choice(study)
    if quality is not None and max(quality["candidates"].tolist()) >= FEWEST_CHOSEN_AMONG:
        rows = [[number(cell, digits=3) for cell in row] for row in quality.itertuples(index=False)]
        title = f"how well scores without target labels choose a trial by {Metric.TARGET_VAL_IOU} (docs/selection.md)"
        print_table(title, [str(name) for name in quality.columns], rows, SIMPLE)


def status(name: str, storage: str | None) -> None:
    """Print the progress of a study, trial by trial."""
    address = storage_address(storage, name)
    study = find_study(name, address)
    counts, settings = study.counts(), study.attribute(SETTINGS)
    print(f"study {name}: {sum(counts.values())} trials; " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    print(
        f"sampler {settings['sampler']}, pruner {settings['pruner']}, objective {study.attribute(DEFINITION)['objective']}"
    )
    trained = trainings_counted(study)
    if trained is not None:
        print(trained)
    if study.attribute(HALT):
        print(f"stopped: {study.attribute(HALT)}")
    for trial in study.trials():
        known = trial.user_attrs
        if trial.state.is_finished():
            print(f"  trial {trial.number} {describe_end(trial)}")
        elif trial.state.name == "RUNNING":
            last = trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None
            score = "" if last is None else f", {last:.4f}"
            score = f", {seeds_done(trial)} seeds done" + score if seeds_done(trial) else score
            print(
                f"  trial {trial.number} running: epoch {known.get('epochs', 0)} done{score}, run {known.get('run_id')}"
            )
    for note in (forgetting_note(study), passed_over_note(study)):
        if note is not None:
            print(note)
    if counts["waiting"]:
        print(f"{counts['waiting']} waiting; `dann-sweep resume {flags_of(name, storage)}` runs them.")
    if is_journal(address):
        print(f"To watch: optuna-dashboard '{address}'")


def report(name: str, storage: str | None, tracking: Mapping[str, Any]) -> None:
    """Write the report again and print its table. `tracking`: dotted `tracking.*`, if the runs have been moved."""
    study = find_study(name, storage_address(storage, name))
    config = study_config(study, tracking)
    folder = study_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(config.tracking.uri, config.tracking.experiment, for_runs=False)
    write_report(study, store, folder)
    print_study(study)
    print(f"Report, figures, best_config.yaml, trials.csv: {folder}")


def confirmation(found: Confirmation) -> None:
    """Print the candidates with their means."""
    if not len(found.table):
        print("No confirming run is complete.")
        return
    means = [str(name) for name in found.table.columns if str(name).endswith(" mean")]
    headings = [name.removesuffix(" mean").replace("/", "/\n") for name in means]
    rows = [
        [
            str(row["settings"]),
            str(row["seeds"]),
            *(f"{row[name]:.3f} ± {row[name.removesuffix('mean') + 'sd']:.3f}" for name in means),
            number(row["chosen by"]),
        ]
        for row in found.table.to_dict("records")
    ]
    print_table(f"study {found.study}", ["", "seeds", *headings, "chosen by"], rows, SIMPLE)
    if found.beats_control is False:
        print("The lambda = 0 control has the better mean: no trial of the search beats it.")
    if found.winner_forgot:
        from sweeps.confirm import ALL_FORGOT

        print(ALL_FORGOT)
    if found.winner is None:
        print(
            "No winner yet: some runs are missing (the same command runs them), or each candidate failed with some seed."
        )
    if found.model is not None:
        print(f"Winner: trial {found.winner}; its model (the run with the median score) is {found.model}")
    print(f"Tables, best_config.yaml: {found.folder}")
