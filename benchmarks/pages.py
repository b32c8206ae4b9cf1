"""Puts what a benchmark measured into a page of the documentation, between its markers."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parents[1] / "docs"


def put(page: str, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME: start -->` and `<!-- NAME: end -->` of docs/PAGE; the markers must be there."""
    file = DOCS / page
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, found, rest = file.read_text().partition(start)
    _, closed, after = rest.partition(end)
    assert found and closed, f"{file} has no markers {start} ... {end}"  # noqa: PT018
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


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
