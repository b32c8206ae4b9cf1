"""What the command line prints of a study: tables by rich, links, where the files are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dann_experiments.config import Config
from dann_experiments.config.schema import TARGET_LABEL_METRICS
from dann_experiments.tracking.store import open_store
from sweeps.driver import SweepResult, find_study
from sweeps.progress import describe_end
from sweeps.report import baselines, label, point_of, short_names, top_trials, write_report
from sweeps.study import DEFINITION, HALT, SETTINGS, Sweep, is_journal, storage_address, study_folder

if TYPE_CHECKING:
    from sweeps.confirm import Confirmation


def result(ended: SweepResult, store: str) -> None:
    """A sweep that ended: the best trials beside the known ones, and where everything is."""
    print_table(ended.sweep)
    counts = ended.sweep.counts()
    print(", ".join(f"{counts[state]} {state}" for state in ("complete", "pruned", "fail", "waiting") if counts[state]))
    print(f"Report, figures, best_config.yaml, trials.csv: {ended.folder}")
    for what, page in ended.links.items():
        print(f"MLflow, {what}: {store if store.startswith('http') else 'http://127.0.0.1:5000/'}{page}")
    if not store.startswith("http"):
        print(f"  after: {store}")
    if ended.best is not None:
        print(
            f"Next: python -m sweeps confirm --study '{ended.study}'   (the best again over new seeds; its mean counts)"
        )


def print_table(study: Sweep) -> None:
    """The best trials beside the known ones."""
    definition = study.attribute(DEFINITION)
    objective, names = definition["objective"], short_names(list(definition["space"]))
    shown = {trial.number: trial for trial in [*baselines(study), *top_trials(study)]}
    scores = [name for name in ("iou/source_val", "iou/target_test") if name != objective]
    table = Table(title=f"study {study.name}")
    for name in ("trial", objective, *scores, *names.values(), "run"):
        table.add_column(name.replace("_", "\n_").replace("/", "/\n"), overflow="fold", min_width=5)
    for trial in sorted(shown.values(), key=study.rank, reverse=True):
        found = trial.user_attrs.get("scores", {})
        cells = [_score(trial.value), *(_score(found.get(name)) for name in scores)]
        point = point_of(study, trial)
        cells += [f"{value:.3g}" if isinstance(value := point.get(key), float) else _text(value) for key in names]
        table.add_row(label(trial).removeprefix("trial "), *cells, str(trial.user_attrs.get("run_id", ""))[:8])
    Console().print(table)
    if str(objective).startswith(TARGET_LABEL_METRICS):
        print(
            f"Chosen by {objective}, which uses target labels: the best of many is flattered; iou/target_test is not."
        )


def status(name: str, storage: str | None, config: Config) -> None:
    """How far a study is, trial by trial."""
    address = storage_address(storage, name)
    study = find_study(name, address)
    counts, settings = study.counts(), study.attribute(SETTINGS)
    print(f"study {name}: {sum(counts.values())} trials; " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    print(
        f"sampler {settings['sampler']}, pruner {settings['pruner']}, objective {study.attribute(DEFINITION)['objective']}"
    )
    if study.attribute(HALT):
        print(f"stopped: {study.attribute(HALT)}")
    for trial in study.trials():
        known = trial.user_attrs
        if trial.state.is_finished():
            print(f"  trial {trial.number} {describe_end(trial)}")
        elif trial.state.name == "RUNNING":
            last = trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None
            score = "" if last is None else f", {last:.4f}"
            print(
                f"  trial {trial.number} running: epoch {known.get('epochs', 0)} done{score}, run {known.get('run_id')}"
            )
    if counts["waiting"]:
        print(f"{counts['waiting']} waiting; `python -m sweeps resume --study '{name}'` runs them.")
    if is_journal(address):
        print(f"To watch: optuna-dashboard '{address}'")


def report(name: str, storage: str | None, config: Config) -> None:
    """Write the report again and show its table."""
    study = find_study(name, storage_address(storage, name))
    folder = study_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(study, open_store(config.tracking.uri, config.tracking.experiment), folder)
    print_table(study)
    print(f"Report, figures, best_config.yaml, trials.csv: {folder}")


def confirmation(found: Confirmation) -> None:
    """The candidates by their means."""
    if not len(found.table):
        print("No confirming run is complete.")
        return
    means = [str(name) for name in found.table.columns if str(name).endswith(" mean")]
    table = Table(
        "", "seeds", *(name.removesuffix(" mean") for name in means), "chosen by", title=f"study {found.study}"
    )
    for row in found.table.to_dict("records"):
        cells = [f"{row[name]:.4f} ± {row[name.removesuffix('mean') + 'sd']:.4f}" for name in means]
        table.add_row(str(row["settings"]), str(row["seeds"]), *cells, _score(row["chosen by"]))
    Console().print(table)
    if found.beats_control is False:
        print("The lambda = 0 control has the better mean: what was found does not beat it.")
    if found.model is not None:
        print(f"Winner: trial {found.winner}; its model (the run with the median score) is {found.model}")
    print(f"Tables, best_config.yaml: {found.folder}")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _text(value: object) -> str:
    return "" if value is None else str(value)
