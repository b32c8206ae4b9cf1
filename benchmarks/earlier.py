"""The project as it was at an earlier commit, so that a benchmark can run both versions in turn."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BEFORE = "fa582de"
"""The commit from which the goals of docs/performance.md are counted."""


@contextlib.contextmanager
def earlier_version(commit: str = BEFORE) -> Iterator[Path]:
    """Check out a commit into a temporary folder, and remove it at the end. A shallow clone has no such commit: git says so."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "earlier"
        git = ["git", "-C", str(PROJECT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def environment_of(folder: Path, threads: int | None = None) -> dict[str, str]:
    """Return the environment in which `python -m dann_experiments` is the version in `folder`, with so many threads if said."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "benchmarks")])}
    return environ if threads is None else {**environ, "OMP_NUM_THREADS": str(threads)}
