"""What a sweep leaves behind: trials.csv, best_config.yaml, figures and report.md, from the study alone."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import textwrap
import warnings
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
from dann_experiments.tracking.store import TRAINING_PAGES, Store
from dann_experiments.training.selection import SCORES as SCORES_WITHOUT_LABELS
from sweeps.objective import trial_config
from sweeps.study import DEFINITION, HALT, SETTINGS, SOURCE_ONLY, Sweep, superseded

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
FIGURES = {
    "history": "plot_optimization_history",
    "importances": "plot_param_importances",
    "parallel_coordinates": "plot_parallel_coordinate",
    "slices": "plot_slice",
    "contour": "plot_contour",
}
MOST_IN_CONTOUR = 5  # its panels grow with the square of the parameters
TOP = 5
ORACLE = "iou/target_val"  # what target labels would choose by
FEWEST_FOR_IMPORTANCES = 50
"""Complete trials that importances (Optuna's PED-ANOVA) need, by our own measurements: with 20 trials, one of two settings that
did not matter got 0.98 (tests/test_sweep_report.py has that study)."""
FEWEST_RANKED = 3  # two are always in order, or in none
SCORES = ("iou/source_val", "iou/target_val", "iou/source_test", "iou/target_test")


def trials_table(study: Sweep) -> pd.DataFrame:
    """All trials, a row each, those that were put in again included: how they ended, their scores, values and runs."""
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
    """The table as CSV; whole numbers stay whole where some are missing."""
    trials_table(study).convert_dtypes().to_csv(path, index=False)


def config_of(study: Sweep, trial: FrozenTrial) -> Config:
    """The settings that a trial ran with, ready for `adapt`."""
    base = config_from_dict(study.attribute(DEFINITION)["config"])
    return trial_config(base, trial.user_attrs["overrides"], trial.user_attrs.get("point") or trial.params)


def point_of(study: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    """The values of the searched settings that a trial ran with; of a known one, those that its settings have."""
    if not trial.user_attrs.get("reference"):
        return dict(trial.user_attrs.get("point") or trial.params)
    settings = flatten(config_of(study, trial))
    return {key: settings.get(key) for key in study.attribute(DEFINITION)["space"]}


def write_report(study: Sweep, store: Store, folder: Path) -> None:
    """Write everything into `folder`; what cannot be drawn yet is left out and named."""
    write_trials(study, folder / "trials.csv")
    best = study.best()
    if best is not None:
        header = (
            f"# Trial {best.number} of study {study.name}: {study.attribute(DEFINITION)['objective']} {best.value!r}\n"
            "# python -m dann_experiments adapt --config best_config.yaml   (in the same tracking store: the source model is "
            "there)\n"
        )
        (folder / "best_config.yaml").write_text(header + config_to_yaml(config_of(study, best)))
    missing = write_figures(study, folder / "figures")
    (folder / "report.md").write_text(_report(study, store, missing))


def write_figures(study: Sweep, folder: Path) -> dict[str, str]:
    """PNG files, and study.html with all figures to explore; returns those that could not be drawn, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    objective = study.attribute(DEFINITION)["objective"]
    missing: dict[str, str] = {}
    drawn = _short_names(study)
    parts: list[str] = []
    import plotly.io
    from matplotlib import pyplot as plt

    complete = [trial for trial in drawn.trials if trial.state == TrialState.COMPLETE]
    ranked = sorted({name for trial in complete for name in trial.params})
    for name, function in FIGURES.items():
        wanted = {"target_name": objective}
        if name == "contour":
            wanted["params"] = _for_contour(drawn, ranked)
        try:
            if len(complete) < 2:
                raise ValueError("fewer than two complete trials")
            with warnings.catch_warnings(), plt.rc_context({"figure.autolayout": False}):
                warnings.simplefilter("ignore")  # Optuna calls its Matplotlib figures experimental
                optuna.logging.set_verbosity(optuna.logging.ERROR)
                getattr(optuna.visualization.matplotlib, function)(drawn, **wanted)
                figure = plt.gcf()
                if name in ("contour", "slices"):
                    figure.set_size_inches(3.2 * max(2, len(ranked)), 3.2 * (len(wanted.get("params", [])) or 1) + 1)
                elif name == "parallel_coordinates":
                    figure.set_size_inches(max(7.0, 2.2 * len(ranked)), 5)
                _tidy(figure)
                if name == "history":
                    _draw_references(figure.axes[0], study)
                if name == "importances":
                    note = textwrap.fill(importances_note(complete_in_search(study)), 72)
                    figure.axes[0].set_title(note, loc="left", fontsize=11)  # in place of Optuna's
                figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
                interactive = getattr(optuna.visualization, function)(drawn, **wanted)
                if name == "importances":
                    title = {"text": importances_note(complete_in_search(study)), "font": {"size": 13}}
                    interactive.update_layout(title=title)
            parts.append(plotly.io.to_html(interactive, include_plotlyjs=not parts, full_html=False))
        except Exception as error:  # whatever a figure lacks: the report must not fail for it
            missing[name] = " ".join(str(error).split())[:200]
        finally:
            plt.close("all")
            optuna.logging.set_verbosity(optuna.logging.WARNING)
    if parts:
        page = f"<!doctype html><meta charset='utf-8'><title>{study.name}</title><h1>{study.name}</h1>" + "\n".join(
            parts
        )
        (folder / "study.html").write_text(page, encoding="utf-8")
    return missing


def complete_in_search(study: Sweep) -> int:
    """The number of complete trials that samplers and figures see: those of the budget without the references."""
    trials = study.counted()
    return sum(t.state == TrialState.COMPLETE and not t.user_attrs.get("reference") for t in trials)


def importances_note(complete: int) -> str:
    """What the importances rest on, and how much they can be trusted."""
    if complete >= FEWEST_FOR_IMPORTANCES:
        return f"Importances from {complete} complete trials."
    return (
        f"Importances from {complete} complete trials: a hint at most. Below about {FEWEST_FOR_IMPORTANCES}, settings that do "
        "not matter get large shares too."
    )


def _tidy(figure: Figure) -> None:
    """Words on an axis side by side, and no labels between the powers of ten."""
    from matplotlib.ticker import NullFormatter

    figure.canvas.draw()
    for axes in figure.axes:
        axes.xaxis.set_minor_formatter(NullFormatter())
        if any(
            len(text.get_text()) > 6 and text.get_text().strip("'")[:1].isalpha() for text in axes.get_xticklabels()
        ):
            axes.tick_params(axis="x", rotation=20)


def _draw_references(axes: Axes, study: Sweep) -> None:
    """The control and the source model as lines: what the search must beat."""
    objective, source = study.attribute(DEFINITION)["objective"], study.attribute(SOURCE_ONLY)
    control = next((trial for trial in baselines(study) if trial.user_attrs["role"] == "control"), None)
    levels = {"lambda = 0 control": None if control is None else control.value}
    if source is not None:
        levels["source only"] = source["scores"].get(objective)
    for (name, value), style in zip(levels.items(), ("--", ":"), strict=False):
        if value is not None:
            axes.axhline(value, color="black", linestyle=style, label=f"{name} {value:.3f}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _for_contour(drawn: optuna.Study, names: Sequence[str]) -> list[str]:
    """The parameters that matter most."""
    if len(names) <= MOST_IN_CONTOUR:
        return list(names)
    with contextlib.suppress(Exception):
        return list(optuna.importance.get_param_importances(drawn))[:MOST_IN_CONTOUR]
    return list(names)[:MOST_IN_CONTOUR]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted names, as many as tell them apart."""
    short: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        short[key] = next(
            (name for name in endings if sum(other == name or other.endswith(f".{name}") for other in keys) == 1), key
        )
    return short


def _short_names(study: Sweep) -> optuna.Study:
    """A copy of the search in memory, under names that fit on an axis."""
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
    """Pages of the MLflow UI: the chart of all trials, and the comparison of some; beginning with `#`."""
    runs = [trial.user_attrs["run_id"] for trial in trials if "run_id" in trial.user_attrs]
    escaped = quote(f"tags.`dann.study` = '{study.name}'", safe="")
    chart = f"#/experiments/{store.experiment_id}/runs?searchFilter={escaped}&compareRunsMode=CHART&{TRAINING_PAGES}"
    compare = (
        f"#/compare-runs?runs={quote(json.dumps(runs), safe='')}"
        f"&experiments={quote(json.dumps([store.experiment_id]), safe='')}"
    )
    return {"chart of all trials": chart, "comparison": compare}


def top_trials(study: Sweep, count: int = TOP) -> list[FrozenTrial]:
    """The best complete trials, the control apart, best first."""
    found = [t for t in study.trials(TrialState.COMPLETE) if t.user_attrs.get("role") in ("recipe", "search")]
    return sorted(found, key=study.rank, reverse=True)[:count]


def baselines(study: Sweep) -> list[FrozenTrial]:
    """The recipe's own values and the control, where they are complete."""
    found = [t for t in study.trials(TrialState.COMPLETE) if t.user_attrs.get("role") in ("recipe", "control")]
    return sorted(found, key=lambda trial: trial.number)


def label(trial: FrozenTrial) -> str:
    """What a table calls a trial."""
    role = {"recipe": " (recipe)", "control": " (control)"}.get(trial.user_attrs["role"], "")
    return f"trial {trial.number}{role}"


def _report(study: Sweep, store: Store, missing: Mapping[str, str]) -> str:
    definition, settings = study.attribute(DEFINITION), study.attribute(SETTINGS)
    objective, counts = definition["objective"], study.counts()
    best, control = study.best(), next((t for t in baselines(study) if t.user_attrs["role"] == "control"), None)
    lines = [f"# Sweep {study.name}", ""]
    ended = ", ".join(f"{counts[state]} {state}" for state in ("complete", "pruned", "fail", "running", "waiting"))
    lines += [
        f"{sum(counts.values())} trials: {ended}. {definition['direction'].capitalize()} `{objective}`; sampler "
        f"{settings['sampler']} (seed {settings['sampler_seed']}), pruner {settings['pruner']}; "
        f"{_epochs_share(study, definition):.0%} of the epochs that the complete and pruned trials have in full were trained.",
        "",
    ]
    if study.attribute(HALT):
        lines += [f"**Stopped**: {study.attribute(HALT)}.", ""]
    if str(objective).startswith(TARGET_LABEL_METRICS):
        lines += [
            f"**Chosen by target labels**: `{objective}` needs masks of the target, so every run is tagged "
            "`dann.selected_with_target_labels`, and the best of many values is flattered by the choice. Trust the test "
            "columns where there are any, and `python -m sweeps confirm` (new seeds).",
            "",
        ]
    if best is not None:
        lines += [_verdict(study, best, control, objective), ""]
    shown = {trial.number: trial for trial in [*baselines(study), *top_trials(study)]}
    lines += ["## Best trials beside the known ones", "", *markdown(comparison(study, list(shown.values()))), ""]
    lines += ["## All trials", "", *markdown(comparison(study, study.counted())), ""]
    quality = target_free_choice(study)
    if quality is not None:
        lines += [
            "## Choosing without target labels", "", *markdown(quality), "",
            f"How well each score ranks the finished trials of the search, against `{ORACLE}` (Spearman, + is right), and how "
            "much of it the choice by that score costs (regret; regret_kept: among trials that keep the source). "
            "docs/selection.md has the scores.", "",
        ]  # fmt: skip
    failed = [trial for trial in study.counted() if trial.state == TrialState.FAIL]
    if failed:
        lines += ["## Failed", "", *(f"- trial {t.number}: {t.user_attrs.get('error')}" for t in failed), ""]
    lines += ["## Figures", ""]
    lines += [f"![{name}](figures/{name}.png)" for name in FIGURES if name not in missing]
    if "importances" not in missing:
        lines += ["", importances_note(complete_in_search(study))]
        if len(definition["space"]) > MOST_IN_CONTOUR:
            lines[-1] += f" The contour shows the {MOST_IN_CONTOUR} settings with the largest."
    lines += ["", "To explore: figures/study.html."] if len(missing) < len(FIGURES) else []
    lines += [f"- {name}: not drawn ({reason})." for name, reason in missing.items()]
    lines += ["", "## Where it is", ""]
    lines += [f"- {what}: {page}" for what, page in links(store, study, list(shown.values())).items()]
    if best is not None:
        lines += ["- run the best again: `python -m dann_experiments adapt --config best_config.yaml`"]
    return "\n".join(lines) + "\n"


def _verdict(study: Sweep, best: FrozenTrial, control: FrozenTrial | None, objective: str) -> str:
    text = f"Best: **{label(best)}**, `{objective}` {best.value:.4f}"
    if control is None or control.value is None or best.value is None:
        return text + "; the control is not complete."
    difference = best.value - control.value
    if study.rank(best) <= study.rank(control):
        return text + f": **no better than the lambda = 0 control** ({control.value:.4f})."
    return text + f", {difference:+.4f} against the lambda = 0 control ({control.value:.4f}); one seed each."


def _epochs_share(study: Sweep, definition: Mapping[str, Any]) -> float:
    trained = whole = 0
    for trial in study.counted():
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            trained += trial.user_attrs.get("epochs", 0)
            settings = trial.user_attrs.get("point") or {}
            whole += settings.get("trainer.max_epochs", definition["config"]["trainer"]["max_epochs"])
    return trained / whole if whole else 0.0


def comparison(study: Sweep, trials: Sequence[FrozenTrial]) -> pd.DataFrame:
    """The source model as it was, if it was scored, and `trials`: scores, values of the searched settings (short names),
    run. Columns without any value are left out."""
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
    """How well each score that needs no target labels would have chosen among the complete trials of the search
    (`score_quality`); None with fewer than three, or without target labels to tell."""
    import pandas as pd

    rows = [
        {"group": study.name, **trial.user_attrs.get("scores", {})}
        for trial in study.trials(TrialState.COMPLETE)
        if trial.user_attrs.get("role") in ("recipe", "search")
    ]
    rows = [row for row in rows if ORACLE in row and any(name in row for name in SCORES_WITHOUT_LABELS)]
    return score_quality(pd.DataFrame(rows), ORACLE) if len(rows) >= FEWEST_RANKED else None


def markdown(table: pd.DataFrame) -> list[str]:
    """The table as lines of Markdown."""
    if not len(table):
        return ["none"]
    head = [str(name) for name in table.columns]
    cells = [[number(cell) for cell in row] for row in table.values.tolist()]
    return [
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in (head, ["---"] * len(head), *cells)
    ]


def number(value: Any, digits: int = 4) -> str:
    """A cell: so many digits of a fraction, nothing for what is missing."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else f"{value:.{digits}g}" if isinstance(value, float) else str(value)
