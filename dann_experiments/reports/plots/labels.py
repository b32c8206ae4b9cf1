"""Draws the score of each arm over the number of labeled target images."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from dann_experiments.reports.plots.style import drawing, legend_above, new_figure, save

if TYPE_CHECKING:
    import pandas as pd


@drawing()
def draw_label_curve(path: Path, table: pd.DataFrame, title: str, metric: str, per_domain: bool = False) -> None:
    """Draw mean and standard deviation over seeds for each arm; `table`: columns labels, arm, kind, mean, std.

    `per_domain`: the numbers are those of each of several target domains. Arms that use no target labels, or all of them, are
    the same for each number: a horizontal line.
    """
    figure = new_figure(7, 4.2, (0.7, 0.2, 0.9, 0.5))
    axis = figure.subplots()
    counts = sorted(set(table["labels"]))
    places = {
        count: place for place, count in enumerate(counts)
    }  # 0, 1, 5, 20: neither a linear nor a log axis shows them
    for number, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        color = f"C{number}"
        if rows["kind"].iloc[0] in ("control", "adapted"):
            found = [places[count] for count in rows["labels"]]
            axis.errorbar(found, rows["mean"], rows["std"], color=color, marker="o", capsize=3, label=str(arm))
        else:
            level = statistics.fmean(rows["mean"].tolist())
            axis.axhline(level, color=color, linestyle="--", linewidth=1, label=str(arm))
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set_xlabel("labeled target images" + (" per domain" if per_domain else ""))
    axis.set_ylabel(f"{metric}, mean and standard deviation over seeds", fontsize=8)
    axis.grid(alpha=0.6)
    legend_above(axis)
    figure.text(0.7 / 7, 1 - 0.3 / 4.2, title, fontsize=11)
    save(figure, path)
