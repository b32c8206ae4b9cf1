"""Writes the results of a sweep: trials.csv, best_config.yaml, figures and report.md. It reads only the study."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from optuna.trial import FrozenTrial, TrialState

from dann_experiments.comparison.selection_quality import score_quality
from dann_experiments.config import Config, config_to_yaml, flatten
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.config.run import TARGET_LABEL_METRICS
from dann_experiments.names import Metric
from dann_experiments.reports.pages import write_page
from dann_experiments.reports.plots.study import FIGURES, MOST_IN_CONTOUR
from dann_experiments.reports.tables import number
from dann_experiments.reports.terminal import ui_command
from dann_experiments.scores.selection import SCORES as SCORES_WITHOUT_LABELS
from dann_experiments.tracking.notes import description, link, run_page
from dann_experiments.tracking.saved_views import address
from dann_experiments.tracking.store import TRAINING_PAGES, Store
from sweeps.figures import draw, importances_note, short_names
from sweeps.objective import trial_config
from sweeps.ranking import FORGETTING, drop_of, forgot, passed_over
from sweeps.seeds import runs_of, seeds_done, seeds_per_trial, spread_of, trainings_counted
from sweeps.study import DEFINITION, HALT, SETTINGS, SOURCE_ONLY, Sweep, superseded

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
TOP = 5
ENDED = {"complete": "complete", "pruned": "pruned", "fail": "failed", "running": "running", "waiting": "waiting"}
"""States of trials, and the words for them."""
BEST_CONFIG = "best_config.yaml"
FEWEST_RANKED = 3  # the rank correlation of two trials is always 1 or -1
SCORES = (
    Metric.SOURCE_VAL_IOU,
    Metric.SOURCE_DROP,
    Metric.TARGET_VAL_IOU,
    Metric.SOURCE_TEST_IOU,
    Metric.TARGET_TEST_IOU,
)
SPREAD, SEEDS = "sd over seeds", "seeds"
KEPT = "source kept"
"""Column that says whether a trial kept the source: yes or NO, empty where that is not known."""


def trials_table(study: Sweep) -> pd.DataFrame:
    """Return one row per trial, including retried ones: how it ended, its scores, values and run."""
    import pandas as pd

    objective, rows = study.attribute(DEFINITION)["objective"], []
    for trial in study.trials():
        known = trial.user_attrs
        rows.append(
            {
                "trial": trial.number,
                "role": known.get("role"),
                "state": "superseded" if superseded(trial) else trial.state.name.lower(),
                objective: trial.value if trial.state == TrialState.COMPLETE else None,
                "last_report": trial.intermediate_values.get(trial.last_step) if trial.last_step else None,
                "epochs": known.get("epochs"),
                "seconds": known.get("seconds"),
                "seed": known.get("seed"),
                "sampler_seed": known.get("sampler_seed"),
                "seeds": seeds_done(trial) or None,
                "spread": spread_of(trial),
                "seed_scores": " ".join(f"{seed}:{value!r}" for seed, value in known.get("seed_scores", {}).items())
                or None,
                **{name: value for name, value in known.get("scores", {}).items() if name != objective},
                "source_kept": source_kept(trial),
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
            f"# Trial {best.number} of study {study.name}: {study.attribute(DEFINITION)['objective']} {best.value!r}"
            f"{_over_seeds(best)}\n"
            f"# dann adapt --config {shlex.quote(str(folder / BEST_CONFIG))}   (in the same tracking store: the source model "
            "is there)\n"
        )
        note = forgetting_note(study)
        header += "" if note is None else f"# {note}\n"
        (folder / BEST_CONFIG).write_text(header + config_to_yaml(config_of(study, best)))
    figures, missing = draw(study, folder / "figures", _levels(study))
    if figures:
        write_page(folder / "figures" / "study.html", "sweep.html.j2", name=study.name, figures=figures)
    write_page(folder / "report.md", "sweep.md.j2", **_report(study, store, missing, folder))


def _over_seeds(trial: FrozenTrial) -> str:
    seeds = trial.user_attrs.get("seed_scores")
    return f", the mean of the seeds {', '.join(seeds)}" if seeds else ""


def _levels(study: Sweep) -> dict[str, float]:
    """Return the scores to beat: those of the control and of the source model."""
    objective, source, control = study.attribute(DEFINITION)["objective"], study.attribute(SOURCE_ONLY), _control(study)
    levels = {
        "lambda = 0 control": None if control is None else control.value,
        "source only": None if source is None else source["scores"].get(objective),
    }
    return {name: value for name, value in levels.items() if value is not None}


def source_kept(trial: FrozenTrial) -> str | None:
    """Return `yes` or `NO`: whether the model of a trial kept the source; None if that is not known."""
    return None if FORGETTING not in trial.constraints else "NO" if forgot(trial) else "yes"


def forgetting_note(study: Sweep) -> str | None:
    """Return a sentence that says that the best trial forgot the source, as all did; None if it did not."""
    best = study.best()
    if best is None or not forgot(best):
        return None
    control = _control(study)
    aside = "" if control is None or forgot(control) else " except the control"
    return (
        f"Every complete trial{aside} forgot the source by more than {_threshold(study)} (monitor.forgetting_threshold); the "
        "best of them is no winner. Try a smaller lambda_da or learning rate."
    )


def passed_over_note(study: Sweep) -> str | None:
    """Return a sentence about the trial that would have won if it had not forgotten the source; None if there is none."""
    found = passed_over(study.ranked(), study.maximizes)
    if found is None:
        return None
    return (
        f"{label(found).capitalize()} has the best {study.attribute(DEFINITION)['objective']}, {found.value:.4f}, but does not "
        f"count: its source IoU fell by {number(drop_of(found), digits=3)}, more than {_threshold(study)} "
        "(monitor.forgetting_threshold)."
    )


def below_source_note(study: Sweep) -> str | None:
    """Return a sentence that says that the best trial does not beat the source model; None if it does, or if unknown."""
    best, source = study.best(), study.attribute(SOURCE_ONLY)
    objective = study.attribute(DEFINITION)["objective"]
    score = None if source is None else source["scores"].get(objective)
    if best is None or best.value is None or score is None:
        return None
    if best.value > score if study.maximizes else best.value < score:
        return None
    return (
        f"The best trial, with {best.value:.4f}, does not beat the source model, which has {objective} {score:.4f} without any "
        "adaptation."
    )


def _threshold(study: Sweep) -> str:
    return f"{study.attribute(DEFINITION)['config']['monitor']['forgetting_threshold']:g}"


def links(store: Store, study: Sweep, trials: Sequence[FrozenTrial]) -> dict[str, str]:
    """Return pages of the MLflow UI, as fragments that start with `#`: a chart of all trials and a comparison of `trials`."""
    runs = [run for trial in trials for run in runs_of(trial)]
    escaped = quote(f"tags.`dann.study` = '{study.name}'", safe="")
    chart = f"#/experiments/{store.experiment_id}/runs?searchFilter={escaped}&compareRunsMode=CHART&{TRAINING_PAGES}"
    compare = (
        f"#/compare-runs?runs={quote(json.dumps(runs), safe='')}"
        f"&experiments={quote(json.dumps([store.experiment_id]), safe='')}"
    )
    return {"chart of all trials": chart, "comparison": compare}


def sweep_note(study: Sweep, store: Store, run_id: str, best: FrozenTrial | None) -> str:
    """Return the description of the run of a sweep: its best trial, the control, and links to report, trials and best run."""
    objective = study.attribute(DEFINITION)["objective"]
    results = [] if best is None else [f"best {label(best)} with {objective} {number(best.value)}"]
    results += [f"{name} {number(value)}" for name, value in _levels(study).items()]
    pages = {"report": run_page(store.experiment_id, run_id, "report.md"), **links(store, study, top_trials(study))}
    if best is not None and "run_id" in best.user_attrs:
        pages |= {f"run of {label(best)}": run_page(store.experiment_id, best.user_attrs["run_id"])}
    text = forgetting_note(study) or passed_over_note(study) or ""
    return description(f"Sweep {study.name}", results, [link(*page) for page in pages.items()], text)


def top_trials(study: Sweep, count: int = TOP) -> list[FrozenTrial]:
    """Return the best complete trials, best first, without the control."""
    return study.ranked()[:count]


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


def _report(study: Sweep, store: Store, missing: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Return the values of the template sweep.md.j2."""
    definition, best, control = study.attribute(DEFINITION), study.best(), _control(study)
    lost = passed_over(study.ranked(), study.maximizes)
    listed = [*baselines(study), *top_trials(study), *([] if lost is None else [lost])]
    shown = list({trial.number: trial for trial in listed}.values())
    failed = [trial for trial in study.counted() if trial.state == TrialState.FAIL]
    return {
        "name": study.name,
        "counts": {word: study.counts()[state] for state, word in ENDED.items()},
        "total": sum(study.counts().values()),
        "best_config": shlex.quote(str(folder / BEST_CONFIG)),
        "command": ui_command(store.uri),
        "direction": definition["direction"],
        "objective": definition["objective"],
        "settings": study.attribute(SETTINGS),
        "seeds": seeds_per_trial(study),
        "trainings": trainings_counted(study),
        "epochs_share": _epochs_share(study, definition),
        "halt": study.attribute(HALT),
        "needs_target_labels": str(definition["objective"]).startswith(TARGET_LABEL_METRICS),
        "best": best and {
            "label": label(best),
            "value": best.value,
            "beats_control": control is None or study.beats(best, control),
        },
        "control_value": control and control.value,
        "forgetting": forgetting_note(study),
        "passed_over": passed_over_note(study),
        "below_source": below_source_note(study),
        "all_shown": {trial.number for trial in study.counted()} <= {trial.number for trial in shown},
        "top": comparison(study, shown),
        "trials": comparison(study, study.counted()),
        "quality": target_free_choice(study),
        "oracle": Metric.TARGET_VAL_IOU,
        "failed": [(trial.number, trial.user_attrs.get("error")) for trial in failed],
        "figures": list(FIGURES),
        "missing": missing,
        "importances": importances_note(study),
        "contour_is_cut": len(definition["space"]) > MOST_IN_CONTOUR,
        "most_in_contour": MOST_IN_CONTOUR,
        "links": {what: address(store.uri, page) for what, page in links(store, study, shown).items()},
    }  # fmt: skip


def _epochs_share(study: Sweep, definition: Mapping[str, Any]) -> float:
    trained = whole = 0.0
    for trial in study.counted():
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            settings = trial.user_attrs.get("point") or {}
            epochs = settings.get("trainer.max_epochs", definition["config"]["trainer"]["max_epochs"])
            whole += epochs * seeds_per_trial(study)
            share = trial.user_attrs.get("share")  # of a trial that was pruned, perhaps within an epoch
            trained += trial.user_attrs.get("epochs", 0) if share is None else share * epochs
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
        # the control's lambda is 0, whatever its settings say
        idle = "domain_adaptation.method.lambda" if known.get("role") == "control" else None
        values = {short: None if idle and key.startswith(idle) else point.get(key) for key, short in names.items()}
        found |= {SPREAD: spread_of(trial), SEEDS: seeds_done(trial) or None, KEPT: source_kept(trial)}
        row = {"": label(trial), "state": trial.state.name.lower(), **found, **values}
        rows.append({**row, "run": str(known.get("run_id", ""))[:8]})
    columns = ["", "state", objective, SPREAD, SEEDS, *scores[1:], KEPT, *names.values(), "run"]
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
