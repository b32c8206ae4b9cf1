"""Prints the choice without target labels, and the tiles to label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape

from dann_experiments.reports.terminal import cell, print_table, where_to_look

if TYPE_CHECKING:
    import pandas as pd

MOST_SHOWN = 20  # tiles
SHOWN = {
    "source_kept": "source kept",
    "guard": "guard warned",
    "seed_agreement": "seed agreement",
    "consensus": "consensus",
    "share_distance": "share distance",
}
"""Column of the table -> heading; the other columns are in tables/choice.csv."""


def print_choice(table: pd.DataFrame, line: str) -> None:
    """Print the scores without labels of each arm, and what follows. `table`: that of `comparison.choice.choice_table`."""
    scores = [name for name in SHOWN if bool(table[name].notna().any())]
    rows = [
        [str(row["arm"]), *(cell(float(row[name])) for name in scores), str(row["seeds"])]
        for row in table.to_dict("records")
    ]
    heads = ["", *(SHOWN[name] for name in scores), "seeds"]
    print_table("Without target labels (docs/selection.md)", heads, rows, SIMPLE)
    Console().print(f"[bold]{escape(line)}[/bold]")


def print_way_to_labels(run_id: str) -> None:
    """Print how to find the tiles to label after a comparison."""
    print(f"Target tiles on which the arms disagree most: suggest-labels --comparison {run_id}")


def print_suggestion(result: Any) -> None:
    """Print the result of `suggest-labels`."""
    print_choice(result.choice.table, result.choice.line)
    tiles: Sequence[Any] = result.tiles[:MOST_SHOWN]
    rows = [
        [str(number), f"{value:.3f}", str(list(tile.region)), tile.image.name]
        for number, (tile, value) in enumerate(tiles, 1)
    ]
    print_table(
        "Tiles to label, the most disputed first",
        ["", "disagreement", "region (left, top, right, bottom)", "image"],
        rows,
    )
    if len(result.tiles) > len(tiles):
        print(f"... and {len(result.tiles) - len(tiles)} more, in tables/tiles.csv.")
    if result.files:
        print(f"Images to label: {result.files[0].parent}")
    if result.artifacts:
        print(f"Picture and tables: {Path(result.artifacts)}")
    print(f"Run {result.run_id}; {where_to_look(result.tracking_uri)}")
