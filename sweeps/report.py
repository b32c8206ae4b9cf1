"""Writes the results of a sweep: trials.csv, best_config.yaml, figures and report.md. It reads only the study."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import optuna
from optuna.trial import FrozenTrial, TrialState

from dann_experiments.comparison.selection_quality import score_quality
from dann_experiments.config import Config, config_to_yaml, flatten
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.config.run import TARGET_LABEL_METRICS
from dann_experiments.names import Metric
from dann_experiments.reports.pages import write_page
from dann_experiments.reports.plots.study import FIGURES, MOST_IN_CONTOUR, draw_study
from dann_experiments.reports.tables import number
from dann_experiments.scores.selection import SCORES as SCORES_WITHOUT_LABELS
from dann_experiments.tracking.notes import description, link, run_page
from dann_experiments.tracking.store import TRAINING_PAGES, Store
from sweeps.objective import trial_config
from sweeps.study import DEFINITION, HALT, SETTINGS, SOURCE_ONLY, Sweep, superseded

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
TOP = 5
FEWEST_FOR_IMPORTANCES = 50
"""Number of complete trials that importances (Optuna's PED-ANOVA) need, as we measured: with 20 trials, one of two settings
without any effect got 0.98 (tests/test_sweep_report.py has that study)."""
FEWEST_RANKED = 3  # the rank correlation of two trials is always 1 or -1
SCORES = (Metric.SOURCE_VAL_IOU, Metric.TARGET_VAL_IOU, Metric.SOURCE_TEST_IOU, Metric.TARGET_TEST_IOU)


def trials_table(study: Sweep) -> pd.DataFrame:
    """Return one row per trial, including retried ones: how it ended, its scores, values and run."""
    import pandas as pd

    rows = []
    for trial in study.trials():
        known = trial.user_attrs
        rows.append(
            {
                "trial": trial.number,
                "role": known.get("role"),
                "state": "superseded" if superseded(trial) else trial.state.name.lower(),
                study.attribute(DEFINITION)["objective"]: trial.value if trial.state == TrialState.COMPLETE else None,
                "last_report": trial.intermediate_values.get(trial.last_step) if trial.last_step else None,
                "epochs": known.get("epochs"),
                "seconds": known.get("seconds"),
                "seed": known.get("seed"),
                "sampler_seed": known.get("sampler_seed"),
                **known.get("scores", {}),
                **(known.get("point") or trial.params),
                "candidate": known.get("candidate"),
                "attempt": known.get("attempt"),
                "retry_of": known.get("retry_of"),
                "run_id": known.get("run_id"),
                "error": known.get("error"),
            }
        )
    table = pd.DataFrame(rows)
    return table.dropna(axis="columns", how="all") if len(table) else table


def write_trials(study: Sweep, path: Path) -> None:
    """Write the table as CSV. Integer columns stay integers even if values are missing."""
    trials_table(study).convert_dtypes().to_csv(path, index=False)


def config_of(study: Sweep, trial: FrozenTrial) -> Config:
    """Return the settings that a trial ran with, ready for `adapt`."""
    base = config_from_dict(study.attribute(DEFINITION)["config"])
    return trial_config(base, trial.user_attrs["overrides"], trial.user_attrs.get("point") or trial.params)


def point_of(study: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    """Return the values of the searched settings that a trial ran with. Those of a reference come from its full settings."""
    if not trial.user_attrs.get("reference"):
        return dict(trial.user_attrs.get("point") or trial.params)
    settings = flatten(config_of(study, trial))
    return {key: settings.get(key) for key in study.attribute(DEFINITION)["space"]}


def write_report(study: Sweep, store: Store, folder: Path) -> None:
    """Write all files into `folder`. The report names the figures that cannot be drawn yet."""
    write_trials(study, folder / "trials.csv")
    best = study.best()
    if best is not None:
        header = (
            f"# Trial {best.number} of study {study.name}: {study.attribute(DEFINITION)['objective']} {best.value!r}\n"
            "# python -m dann_experiments adapt --config best_config.yaml   (in the same tracking store: the source model is "
            "there)\n"
        )
        (folder / "best_config.yaml").write_text(header + config_to_yaml(config_of(study, best)))
    figures, missing = draw_study(_short_names(study), folder / "figures", *_drawn_with(study))
    if figures:
        write_page(folder / "figures" / "study.html", "sweep.html.j2", name=study.name, figures=figures)
    write_page(folder / "report.md", "sweep.md.j2", **_report(study, store, missing))


def _drawn_with(study: Sweep) -> tuple[str, dict[str, float], str]:
    """Return the objective, the scores to beat (control and source model), and a note on importances."""
    objective, source, control = study.attribute(DEFINITION)["objective"], study.attribute(SOURCE_ONLY), _control(study)
    levels = {
        "lambda = 0 control": None if control is None else control.value,
        "source only": None if source is None else source["scores"].get(objective),
    }
    known = {name: value for name, value in levels.items() if value is not None}
    return objective, known, importances_note(complete_in_search(study))


def complete_in_search(study: Sweep) -> int:
    """Return the number of complete trials that samplers and figures see: those of the budget without references."""
    trials = study.counted()
    return sum(t.state == TrialState.COMPLETE and not t.user_attrs.get("reference") for t in trials)


def importances_note(complete: int) -> str:
    """Return a note that says how many trials the importances come from and how reliable they are."""
    if complete >= FEWEST_FOR_IMPORTANCES:
        return f"Importances from {complete} complete trials."
    return (
        f"Importances from {complete} complete trials: a hint at most. Below about {FEWEST_FOR_IMPORTANCES}, settings that do "
        "not matter get large shares too."
    )


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return dotted name -> its shortest ending that no other name has."""
    short: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        short[key] = next(
            (name for name in endings if sum(other == name or other.endswith(f".{name}") for other in keys) == 1), key
        )
    return short


def _short_names(study: Sweep) -> optuna.Study:
    """Return an in-memory copy of the study, with parameter names that fit on an axis."""
    shown = {trial.number for trial in study.counted() if not trial.user_attrs.get("reference")}
    names = short_names(list(study.attribute(DEFINITION)["space"]))
    copy = optuna.create_study(direction="maximize" if study.maximizes else "minimize")
    for trial in study.trials():
        if trial.number not in shown or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            copy.add_trial(optuna.create_trial(state=TrialState.FAIL))  # not drawn, but the others keep their numbers
            continue
        copy.add_trial(
            optuna.create_trial(
                state=trial.state,
                values=trial.values,
                params={names[key]: value for key, value in trial.params.items()},
                distributions={names[key]: value for key, value in trial.distributions.items()},
                intermediate_values=trial.intermediate_values,
            )
        )
    return copy


def links(store: Store, study: Sweep, trials: Sequence[FrozenTrial]) -> dict[str, str]:
    """Return pages of the MLflow UI, as fragments that start with `#`: a chart of all trials and a comparison of `trials`."""
    runs = [trial.user_attrs["run_id"] for trial in trials if "run_id" in trial.user_attrs]
    escaped = quote(f"tags.`dann.study` = '{study.name}'", safe="")
    chart = f"#/experiments/{store.experiment_id}/runs?searchFilter={escaped}&compareRunsMode=CHART&{TRAINING_PAGES}"
    compare = (
        f"#/compare-runs?runs={quote(json.dumps(runs), safe='')}"
        f"&experiments={quote(json.dumps([store.experiment_id]), safe='')}"
    )
    return {"chart of all trials": chart, "comparison": compare}


def sweep_note(study: Sweep, store: Store, run_id: str, best: FrozenTrial | None) -> str:
    """Return the description of the run of a sweep: its best trial, the control, and links to report, trials and best run."""
    objective, levels, _ = _drawn_with(study)
    results = [] if best is None else [f"best {label(best)} with {objective} {number(best.value)}"]
    results += [f"{name} {number(value)}" for name, value in levels.items()]
    pages = {"report": run_page(store.experiment_id, run_id, "report.md"), **links(store, study, top_trials(study))}
    if best is not None and "run_id" in best.user_attrs:
        pages |= {f"run of {label(best)}": run_page(store.experiment_id, best.user_attrs["run_id"])}
    return description(f"Sweep {study.name}", results, [link(*page) for page in pages.items()])


def top_trials(study: Sweep, count: int = TOP) -> list[FrozenTrial]:
    """Return the best complete trials, best first, without the control."""
    found = [t for t in study.trials(TrialState.COMPLETE) if t.user_attrs.get("role") in ("recipe", "search")]
    return sorted(found, key=study.rank, reverse=True)[:count]


def baselines(study: Sweep) -> list[FrozenTrial]:
    """Return the trials with the values of the recipe and of the control that are complete."""
    found = [t for t in study.trials(TrialState.COMPLETE) if t.user_attrs.get("role") in ("recipe", "control")]
    return sorted(found, key=lambda trial: trial.number)


def label(trial: FrozenTrial) -> str:
    """Return the name of a trial in tables."""
    role = {"recipe": " (recipe)", "control": " (control)"}.get(trial.user_attrs["role"], "")
    return f"trial {trial.number}{role}"


def _control(study: Sweep) -> FrozenTrial | None:
    return next((trial for trial in baselines(study) if trial.user_attrs["role"] == "control"), None)


def _report(study: Sweep, store: Store, missing: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the template sweep.md.j2."""
    definition, best, control = study.attribute(DEFINITION), study.best(), _control(study)
    shown = list({trial.number: trial for trial in [*baselines(study), *top_trials(study)]}.values())
    failed = [trial for trial in study.counted() if trial.state == TrialState.FAIL]
    return {
        "name": study.name,
        "counts": study.counts(),
        "direction": definition["direction"],
        "objective": definition["objective"],
        "settings": study.attribute(SETTINGS),
        "epochs_share": _epochs_share(study, definition),
        "halt": study.attribute(HALT),
        "needs_target_labels": str(definition["objective"]).startswith(TARGET_LABEL_METRICS),
        "best": best and {
            "label": label(best),
            "value": best.value,
            "beats_control": control is None or study.rank(best) > study.rank(control),
        },
        "control_value": control and control.value,
        "top": comparison(study, shown),
        "trials": comparison(study, study.counted()),
        "quality": target_free_choice(study),
        "oracle": Metric.TARGET_VAL_IOU,
        "failed": [(trial.number, trial.user_attrs.get("error")) for trial in failed],
        "figures": list(FIGURES),
        "missing": missing,
        "importances": importances_note(complete_in_search(study)),
        "contour_is_cut": len(definition["space"]) > MOST_IN_CONTOUR,
        "most_in_contour": MOST_IN_CONTOUR,
        "links": links(store, study, shown),
    }  # fmt: skip


def _epochs_share(study: Sweep, definition: Mapping[str, Any]) -> float:
    trained = whole = 0
    for trial in study.counted():
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            trained += trial.user_attrs.get("epochs", 0)
            settings = trial.user_attrs.get("point") or {}
            whole += settings.get("trainer.max_epochs", definition["config"]["trainer"]["max_epochs"])
    return trained / whole if whole else 0.0


def comparison(study: Sweep, trials: Sequence[FrozenTrial]) -> pd.DataFrame:
    """Return a table of the unadapted source model (if it was scored) and `trials`: scores, searched values (short names), run.

    Columns without any value are left out.
    """
    import pandas as pd

    definition, source = study.attribute(DEFINITION), study.attribute(SOURCE_ONLY)
    objective, names = definition["objective"], short_names(list(definition["space"]))
    scores = [objective, *(name for name in SCORES if name != objective)]
    rows = []
    if source is not None:
        found = {name: source["scores"].get(name) for name in scores}
        rows.append({"": "source only", "state": "not adapted", **found, "run": source["run_id"][:8]})
    for trial in trials:
        known = trial.user_attrs
        found = {name: known.get("scores", {}).get(name) for name in scores}
        found[objective] = trial.value if trial.state == TrialState.COMPLETE else None
        point = point_of(study, trial)
        values = {short: point.get(key) for key, short in names.items()}
        row = {"": label(trial), "state": trial.state.name.lower(), **found, **values}
        rows.append({**row, "run": str(known.get("run_id", ""))[:8]})
    columns = ["", "state", *scores, *names.values(), "run"]
    return pd.DataFrame(rows, columns=columns, dtype=object).dropna(axis="columns", how="all")


def target_free_choice(study: Sweep) -> pd.DataFrame | None:
    """Return how well each label-free score would have chosen among the complete trials of the search (`score_quality`).

    None for fewer than three trials with a target IoU and a label-free score.
    """
    import pandas as pd

    rows = [
        {"group": study.name, **trial.user_attrs.get("scores", {})}
        for trial in study.trials(TrialState.COMPLETE)
        if trial.user_attrs.get("role") in ("recipe", "search")
    ]
    rows = [row for row in rows if Metric.TARGET_VAL_IOU in row and any(name in row for name in SCORES_WITHOUT_LABELS)]
    return score_quality(pd.DataFrame(rows), Metric.TARGET_VAL_IOU) if len(rows) >= FEWEST_RANKED else None
