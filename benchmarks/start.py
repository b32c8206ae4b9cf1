"""How long does a job take to its first training step, and where does that time go?

    python benchmarks/start.py [--rounds N] [--write]

Real processes from the command line on recipes/digits.yaml, with a store and a source model that are there, one after another
in turn: the bare imports of torch, Lightning and MLflow, `adapt`, and sweeps by one worker and by two. Each is ended at its
first training step. About 2 minutes a round on two idle cores; --write puts the tables into docs/performance.md.

A `sitecustomize.py` on PYTHONPATH, which every Python process reads when it starts, workers too, keeps the time: the program
itself is the one that users run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import circumstances, put

PROJECT = Path(__file__).resolve().parents[1]
HOOKS = Path(__file__).with_name("start_hooks.py")
RECIPE = PROJECT / "recipes" / "digits.yaml"
PACKAGES = "torch, pytorch_lightning, mlflow"
PARTS = {
    "imports": "imports (all of the process)",
    "settings": "settings",
    "store": "store opened",
    "data": "data: headers, decoding, digests",
    "network": "network, source model found and loaded",
    "run": "run opened, params and data sets noted",
    "before": "pictures and features of the warm start (forwards)",
    "baseline": "baseline validation (forwards)",
    "trainer": "trainer made",
    "first batch": "first batch",
    "other": "all else",
}
LONGEST_SECONDS = 300.0
Mark = Mapping[str, Any]


def environment(marks: Path, project: Path = PROJECT) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    paths = [str(marks), str(project), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "START_MARKS": str(marks), "PYTHONPATH": os.pathsep.join(paths)}


def ready(place: Path) -> None:
    """A store with a finished pretraining of the recipe, short, as its length does not count here."""
    words = ["pretrain", "--config", str(RECIPE), "--pretraining.max_epochs", "1", "--trainer.limit_train_batches", "5"]
    command = [sys.executable, "-m", "dann_experiments", *words, *place_words(place)]
    subprocess.run(command, cwd=place, env=environment(place), check=True, stdout=subprocess.DEVNULL)


def place_words(place: Path) -> list[str]:
    return ["--data.embedded.folder", str(place / "data"), "--trainer.enable_progress_bar", "false"]


def until_first_step(
    command: Sequence[str], place: Path, project: Path = PROJECT, more: Mapping[str, str] | None = None
) -> tuple[float, Mark]:
    """Seconds from the start of `command` to the first training step of it or of one of its workers, and what its process
    noted. `project`: the version to run; `more`: variables of its environment."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        if (place / "mlflow.db").exists():
            (folder / "mlflow.db").write_bytes((place / "mlflow.db").read_bytes())
        (folder / "sitecustomize.py").write_bytes(HOOKS.read_bytes())
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env={**environment(folder, project), **(more or {})},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            mark = json.loads(_first_mark(folder, process).read_text())
        finally:
            _end(process)
        return mark["time"] - began, mark


def _first_mark(folder: Path, process: subprocess.Popen) -> Path:
    until = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < until:
        for path in folder.glob("*.mark"):
            return path
        if process.poll() not in (None, 0):
            raise RuntimeError(process.communicate()[1])
        time.sleep(0.01)
    raise TimeoutError(f"no first step after {LONGEST_SECONDS:.0f} s")


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def commands(place: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    settings = ["--config", str(RECIPE), *place_words(place)]
    sweep = ["-m", "sweeps", "run", *settings, "--n_trials", "4", "--study", "start"]
    return {
        "imports": ["-c", f"import {PACKAGES}; import sitecustomize; sitecustomize.mark()"],
        "adapt": ["-m", "dann_experiments", "adapt", *settings],
        "sweep, 1 worker": [*sweep, "--workers", "1"],
        "sweep, 2 workers": [*sweep, "--workers", "2"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of what is timed")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    parts: list[Mapping[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        ready(place)
        for number in range(options.rounds + 1):  # the first warms the disk's cache up
            for what, command in commands(place).items():
                if options.only and what not in options.only:
                    continue
                taken, mark = until_first_step(command, place)
                print(f"round {number}: {what} {taken:.2f} s", flush=True)
                if number:
                    seconds.setdefault(what, []).append(taken)
                    if what == "adapt":
                        parts.append(mark["parts"])
    text = tables(seconds, parts)
    print(text)
    if options.write:
        put("performance.md", "start", text)


def tables(seconds: Mapping[str, Sequence[float]], parts: Sequence[Mapping[str, float]]) -> str:
    """Both tables: from start to first step, and the parts of `adapt`."""
    median: Callable[[Sequence[float]], float] = statistics.median
    lines = ["| from the command to | median, s | quickest to slowest | against `adapt` |", "|---|---|---|---|"]
    for what, taken in seconds.items():
        title = f"`import {PACKAGES}` done" if what == "imports" else f"the first training step, {what}"
        ratio = f"{median(taken) / median(seconds['adapt']):.2f}" if "adapt" in seconds and what != "imports" else ""
        lines.append(f"| {title} | {median(taken):.2f} | {min(taken):.2f} to {max(taken):.2f} | {ratio} |")
    if parts and "imports" in seconds:
        beyond = median([one - bare for one, bare in zip(seconds["adapt"], seconds["imports"], strict=True)])
        forwards = median([part.get("before", 0.0) + part.get("baseline", 0.0) for part in parts])
        lines += [
            "",
            f"`adapt` beyond these imports: {beyond:.2f} s, of which {forwards:.2f} s are forwards of the warm start.",
        ]
        lines += ["", "| part of `adapt` | median, s |", "|---|---|"]
        lines += [f"| {title} | {median([part.get(key, 0.0) for part in parts]):.2f} |" for key, title in PARTS.items()]
    rounds = len(next(iter(seconds.values())))
    load = f"load of the machine {os.getloadavg()[1]:.1f}"
    return "\n".join([*lines, "", f"{rounds} rounds, {load}. {circumstances('torch', 'pytorch-lightning', 'mlflow')}"])


if __name__ == "__main__":
    main()
