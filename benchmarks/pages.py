"""Puts what a benchmark measured into a page of the documentation, between its markers."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parents[1] / "docs"
RUNS = DOCS / "results_runs.csv"
RUNS_COLUMNS: list[str] = ["page", "group", "what", "seed", "metric", "value", "value_of", "run_id"]


def put(page: str, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME: start -->` and `<!-- NAME: end -->` of docs/PAGE; the markers must be there."""
    file = DOCS / page
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, found, rest = file.read_text().partition(start)
    _, closed, after = rest.partition(end)
    assert found and closed, f"{file} has no markers {start} ... {end}"  # noqa: PT018
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


def put_runs(page: str, group: str, rows: list[dict[str, object]]) -> None:
    """Replace the rows of one table of docs/PAGE in docs/results_runs.csv, which keeps run ids out of the prose."""
    with RUNS.open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if (row["page"], row["group"]) != (page, group)]
    with RUNS.open("w", newline="") as file:
        writer = csv.DictWriter(file, RUNS_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({"page": page, "group": group, **row} for row in rows)])


def spread(values: Any, form: str = ".3f") -> str:
    """Median (quartiles), each in the format `form`."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def circumstances(*packages: str) -> str:
    """Machine, versions and date, in a line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    today = datetime.date.today().isoformat()
    return f"{cores} cores, {platform.machine()}, Python {platform.python_version()}, {versions}; {today}."
