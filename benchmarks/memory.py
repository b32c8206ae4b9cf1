"""How much memory does a training take, and a worker of a sweep, against the earlier version and the bare imports?

    python benchmarks/memory.py [--turns 3] [--write]

Real processes on recipes/digits.yaml, shortened, in turn: `import torch, pytorch_lightning, mlflow`, `adapt` from a source model
that is there, `adapt` that trains it first, and a sweep by two workers; the last three of this version and of the earlier one.
Processes alone: their peak (ru_maxrss). Workers share pages with the process that they are forked from: the largest
proportional share (PSS) of any process below the driver, looked at five times a second. Linux only. About 8 minutes on two idle
cores with three turns; `--only` leaves parts out. --write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from earlier import BEFORE, PROJECT, earlier_version, environment_of
from pages import circumstances, put

RECIPE = PROJECT / "recipes" / "digits.yaml"
SHORT = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 15, "pretraining.max_epochs": 1}
IMPORTS = "imports"
KINDS = {
    IMPORTS: "`import torch, pytorch_lightning, mlflow`",
    "first": "`adapt` that trains its source model first",
    "adapt": "`adapt` from a source model",
    "sweep": "a worker of a sweep (PSS)",
}


def peak_of(command: Sequence[str], place: Path, environment: Mapping[str, str]) -> float:
    """Return the peak memory of a process, megabytes."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss / 1024


def peak_below(command: Sequence[str], place: Path, environment: Mapping[str, str]) -> float:
    """Return the largest proportional share of memory of any process below that of `command`, megabytes."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    most = 0.0
    while process.poll() is None:
        most = max([most, *(_share(pid) for pid in _below(process.pid))])
        time.sleep(0.2)
    assert process.returncode == 0, command
    return most


def _below(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_below(child)]
    return found


def _share(pid: int) -> float:
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def peak(kind: str, place: Path, version: Path) -> float:
    """Return the peak memory of a kind of process of a version, whose stores and files lie in `place`."""
    environment = environment_of(version, threads=1)
    if kind == IMPORTS:
        return peak_of(["-c", "import torch, pytorch_lightning, mlflow"], place, environment)
    words = ["--config", str(RECIPE), "--data.embedded.folder", str(place.parent / "data")]
    words += [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    words += ["--trainer.enable_progress_bar", "false"]
    store = "first.db" if kind == "first" else "mlflow.db"
    words += ["--tracking.uri", f"sqlite:///{place / store}"]
    if kind == "first":
        (place / store).unlink(missing_ok=True)
    if kind == "sweep":
        name = f"sweep{len(list(place.glob('studies/*')))}"
        command = ["-m", "sweeps", "run", *words, "--n_trials", "4", "--workers", "2", "--pruner", "none"]
        return peak_below([*command, "--study", name], place, environment)
    return peak_of(["-m", "dann_experiments", "adapt", *words], place, environment)


def table(found: Mapping[tuple[str, str], Sequence[float]], turns: int) -> str:
    """The table of all kinds that were measured."""
    lines = [
        f"| peak of | at {BEFORE}, MB | now, MB (spread) | now / before | the same beyond the imports |",
        "|---|---|---|---|---|",
    ]
    imports = statistics.median(found[IMPORTS, "now"])
    for kind, title in KINDS.items():
        now = found.get((kind, "now"))
        if now is None:
            continue
        text = f"{statistics.median(now):.0f} ({min(now):.0f} to {max(now):.0f})"
        if kind == IMPORTS:
            lines.append(f"| {title} | | {text} | | |")
            continue
        before = statistics.median(found[kind, "before"])
        ratios = [one / other for one, other in zip(now, found[kind, "before"], strict=True)]
        beyond = "" if kind == "sweep" else f"{(statistics.median(now) - imports) / (before - imports):.2f}"
        lines.append(f"| {title} | {before:.0f} | {text} | {statistics.median(ratios):.2f} | {beyond} |")
    return "\n".join([*lines, "", f"{turns} turn(s). {circumstances('torch', 'pytorch-lightning', 'mlflow')}"])


def main() -> None:
    """Print the table, and put it into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), help="the imports always are")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, earlier_version() as earlier:
        places = {"now": Path(folder) / "now", "before": Path(folder) / "before"}
        for place in places.values():
            place.mkdir()
        versions = {"now": PROJECT, "before": earlier}
        if set(options.only) & {"adapt", "sweep"}:
            for name, place in places.items():  # trains the source model
                peak("adapt", place, versions[name])
        for _ in range(options.turns):
            for kind in [kind for kind in KINDS if kind in options.only or kind == IMPORTS]:
                for name in ("now",) if kind == IMPORTS else ("before", "now"):
                    value = peak(kind, places[name], versions[name])
                    print(f"{kind}, {name}: {value:.0f} MB", flush=True)
                    found.setdefault((kind, name), []).append(value)
    text = table(found, options.turns)
    print(text)
    if options.write:
        put("performance.md", "memory", text)


if __name__ == "__main__":
    main()
