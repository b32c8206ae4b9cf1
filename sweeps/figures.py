"""The figures of a sweep: the study as Optuna draws it, and what its importances rest on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState

from dann_experiments.reports.plots.study import draw_study
from dann_experiments.reports.tables import number
from sweeps.seeds import spread_of
from sweeps.study import DEFINITION, Sweep

FEWEST_FOR_IMPORTANCES = 20
"""Number of complete trials below which importances (Optuna's PED-ANOVA) are not shown."""
ENOUGH_FOR_IMPORTANCES = 50
"""Number of complete trials that they need to be reliable, as we measured: with 20 trials, one of two settings without any effect
got 0.98 (tests/test_sweep_report.py has that study)."""


def draw(study: Sweep, folder: Path, levels: Mapping[str, float]) -> tuple[list[Markup], dict[str, str]]:
    """Draw the figures of a study into `folder`, with `levels` (name -> score to beat) as lines.

    Return the interactive figures, and name -> reason for those that could not be drawn.
    """
    refusal = importances_refused(study)
    without = {} if refusal is None else {"importances": refusal}
    objective = study.attribute(DEFINITION)["objective"]
    return draw_study(_short_names(study), folder, objective, levels, importances_note(study), without)


def complete_in_search(study: Sweep) -> list[FrozenTrial]:
    """Return the complete trials that samplers and figures see: those of the budget without references."""
    return [t for t in study.counted() if t.state == TrialState.COMPLETE and not t.user_attrs.get("reference")]


def importances_refused(study: Sweep) -> str | None:
    """Return why the importances of settings are not shown; None if they are."""
    complete = len(complete_in_search(study))
    if complete >= FEWEST_FOR_IMPORTANCES:
        return None
    return (
        f"{complete} complete trials of the search are too few: below {FEWEST_FOR_IMPORTANCES}, Optuna's estimate (PED-ANOVA) "
        "gives large shares to settings that do not matter, such as 0.5 and 0.5 to two of them"
    )


def importances_note(study: Sweep) -> str:
    """Return a note on the importances: how many trials they come from, how far these differ, and how reliable they are."""
    values = [trial.value for trial in complete_in_search(study) if trial.value is not None]
    note = f"Importances from {len(values)} complete trials"
    if len(values) > 1:
        low, high, spread = (number(value, digits=3) for value in (min(values), max(values), statistics.stdev(values)))
        note += f", which scored from {low} to {high} (standard deviation {spread}"
    spreads = [spread for trial in complete_in_search(study) if (spread := spread_of(trial)) is not None]
    if spreads:
        note += f", of one trial between its seeds {number(statistics.fmean(spreads), digits=3)}"
    note += ")" if len(values) > 1 else ""
    if len(values) >= ENOUGH_FOR_IMPORTANCES:
        return f"{note}."
    warning = f"Below about {ENOUGH_FOR_IMPORTANCES} trials, settings that do not matter get large shares too."
    return f"{note}: a hint at most. {warning}"


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
                constraints=trial.constraints,
            )
        )
    return copy
