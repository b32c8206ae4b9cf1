"""Draws the figures of an Optuna study, as PNG files and as interactive figures."""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from markupsafe import Markup
from optuna.trial import TrialState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = {
    "history": "plot_optimization_history",
    "importances": "plot_param_importances",
    "parallel_coordinates": "plot_parallel_coordinate",
    "slices": "plot_slice",
    "contour": "plot_contour",
}
MOST_IN_CONTOUR = 5  # the number of its panels is the square of this


def draw_study(
    study: optuna.Study,
    folder: Path,
    objective: str,
    levels: Mapping[str, float],
    note: str,
    without: Mapping[str, str] | None = None,
) -> tuple[list[Markup], dict[str, str]]:
    """Write one PNG file per figure into `folder`.

    Arguments:
        objective: name of the values of the trials.
        levels: name -> value to beat, drawn as lines in the history.
        note: title of the importances, which says how reliable they are.
        without: name -> reason for figures not to draw. Without importances the contour does not choose its settings by them.

    Returns the interactive figures as parts of a page, the first of which includes Plotly's script, and name -> reason for the
    figures that could not be drawn.
    """
    import plotly.io
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Markup] = []
    missing = dict(without or {})
    for name in missing:
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
    plt.draw_if_interactive()  # loads the backend: within rc_context, a notebook would show no further figures of the user
    theirs = set(plt.get_fignums())
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    params = sorted({name for trial in complete for name in trial.params})
    for name, function in FIGURES.items():
        if name in missing:
            continue
        wanted: dict[str, Any] = {"target_name": objective}
        if name == "contour":
            wanted["params"] = _for_contour(study, params, "importances" not in missing)
        try:
            if len(complete) < 2:
                raise ValueError("fewer than two complete trials")
            with warnings.catch_warnings(), plt.rc_context({"figure.autolayout": False}):
                warnings.simplefilter("ignore")  # Optuna calls its Matplotlib figures experimental
                optuna.logging.set_verbosity(optuna.logging.ERROR)
                getattr(optuna.visualization.matplotlib, function)(study, **wanted)
                figure = plt.gcf()
                if name in ("contour", "slices"):
                    figure.set_size_inches(3.2 * max(2, len(params)), 3.2 * (len(wanted.get("params", [])) or 1) + 1)
                elif name == "parallel_coordinates":
                    figure.set_size_inches(max(7.0, 2.2 * len(params)), 5)
                elif name == "history":
                    _draw_levels(figure.axes[0], levels)
                else:
                    figure.axes[0].set_title(
                        textwrap.fill(note, 72), loc="left", fontsize=11
                    )  # replaces Optuna's title
                _tidy(figure)
                figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
                interactive = getattr(optuna.visualization, function)(study, **wanted)
            if name == "importances":
                interactive.update_layout(title={"text": note, "font": {"size": 13}})
            html = plotly.io.to_html(interactive, {"responsive": True}, include_plotlyjs=not parts, full_html=False)
            parts.append(Markup(html))  # noqa: S704  (Plotly escapes its input)
        except Exception as error:  # a figure that cannot be drawn must not fail the report
            missing[name] = " ".join(str(error).split())[:200]
        finally:
            for number in set(plt.get_fignums()) - theirs:
                plt.close(number)
            optuna.logging.set_verbosity(optuna.logging.WARNING)
    return parts, missing


def _for_contour(study: optuna.Study, params: list[str], by_importance: bool) -> list[str]:
    """Return the most important parameters, or the first ones if importances are not known."""
    if by_importance and len(params) > MOST_IN_CONTOUR:
        with contextlib.suppress(Exception):
            return list(optuna.importance.get_param_importances(study))[:MOST_IN_CONTOUR]
    return params[:MOST_IN_CONTOUR]


def _draw_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    for (name, value), style in zip(levels.items(), ("--", ":"), strict=False):
        axes.axhline(value, color="black", linestyle=style, label=f"{name} {value:.3f}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _tidy(figure: Figure) -> None:
    """Rotate long words on an axis so that they fit side by side, and drop labels between powers of ten."""
    from matplotlib.ticker import NullFormatter

    for axes in figure.axes:
        axes.xaxis.set_minor_formatter(NullFormatter())
        words = [text.get_text().strip("'") for text in axes.get_xticklabels()]
        if any(len(word) > 4 and word[:1].isalpha() for word in words):
            axes.tick_params(axis="x", rotation=20)
