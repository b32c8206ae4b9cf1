"""What do users wait for beside training steps: a small run, a comparison, the demo, the imports? Against an earlier version.

    python benchmarks/waits.py {small,comparison,demo,demo_growth,imports} [--turns N] [--write]

Each is a real process from the command line, run by the version of commit fa582de and by this one in turn, each in a place of its
own with its own store. `--write` puts the table into docs/performance.md.

- small: `adapt`, 2 epochs of 8 images of 32 x 32 pixels, with all artifacts, from a source model that is there; then this version
  with 16 and 32 images. 30 s a turn.
- comparison: `compare` with source only, lambda = 0 control, DANN and oracle over `--seeds` seeds of recipes/digits.yaml, two
  processes; this version also where it may choose half precision. `--epochs` shortens the trainings. `--growth` runs this version
  with 1, 2 and 4 seeds as well.
- demo: what `make demo` runs, each version with its own settings, over seeds 0, 1, ... of `--seeds`, and what it scores.
- demo_growth: the same with this version alone, at three lengths of its trainings.
- imports: `dann --help` and `import dann_experiments` against Python's own start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml
from earlier import BEFORE, PROJECT, earlier_version, environment_of
from pages import circumstances, put
from squares import small_settings, write_domain

HOOKS = Path(__file__).with_name("start_hooks.py")
RECIPE = PROJECT / "recipes" / "digits.yaml"
ARMS = {name: {"kind": name} for name in ("source_only", "control", "adapted", "oracle")}
SCORED = ("iou/source_val", "iou/target_val", "iou/target_test")
COMMAND = ("-m", "dann_experiments")


class Side:
    """One version of the project, with a place of its own."""

    def __init__(self, version: Path, place: Path) -> None:
        self.version, self.place = version, place
        place.mkdir()

    def run(self, *words: str, threads: int | None = 1) -> tuple[float, float, float]:
        """Run Python with `words`; return its seconds, those of them in imports, and those of the processor."""
        with tempfile.TemporaryDirectory() as marks:
            (Path(marks) / "sitecustomize.py").write_bytes(HOOKS.read_bytes())
            environ = {
                name: value
                for name, value in environment_of(self.version, threads).items()
                if not name.startswith("MLFLOW_")
            }
            environ |= {"START_MARKS": marks, "START_UNTIL": "end"}
            environ["PYTHONPATH"] = os.pathsep.join([marks, environ["PYTHONPATH"]])
            used, began = _processor_seconds(), time.perf_counter()
            done = subprocess.run([sys.executable, *words], cwd=self.place, env=environ, capture_output=True, text=True)
            taken = time.perf_counter() - began
            if done.returncode:
                raise RuntimeError(done.stderr)
            noted = [json.loads(path.read_text())["parts"] for path in Path(marks).glob("*.mark")]
            imports = max((parts.get("imports", 0.0) for parts in noted), default=0.0)
        return taken, imports, _processor_seconds() - used

    def scores(self) -> list[tuple[str, str, str, float]]:
        """Return (arm or method, seed, metric, value) of all trainings in the store, sorted."""
        wanted = ", ".join(f"'{name}'" for name in SCORED)
        question = f"""
            SELECT DISTINCT coalesce(arm.value, method.value), seed.value, m.key, m.value FROM latest_metrics m
            JOIN tags seed ON seed.run_uuid = m.run_uuid AND seed.key = 'seed'
            JOIN tags method ON method.run_uuid = m.run_uuid AND method.key = 'dann.method'
            LEFT JOIN tags arm ON arm.run_uuid = m.run_uuid AND arm.key = 'dann.arm'
            WHERE m.key IN ({wanted})"""  # noqa: S608  (names of our own)
        with closing(sqlite3.connect(self.place / "mlflow.db")) as connection:
            return sorted(connection.execute(question))


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def both() -> Iterator[tuple[Side, Side]]:
    """The earlier version and this one."""
    with tempfile.TemporaryDirectory() as place, earlier_version() as folder:
        yield Side(folder, Path(place) / "earlier"), Side(PROJECT, Path(place) / "now")


def small(options: argparse.Namespace) -> str:
    """Time a small run, and how its time grows with the images."""
    seconds: dict[str, list[tuple[float, float, float]]] = {}
    with both() as (before, now), tempfile.TemporaryDirectory() as data:
        files = {count: _small_recipe(Path(data), count) for count in (8, 16, 32)}
        lines = [("fa582de, 8 images", before, 8), *((f"now, {count} images", now, count) for count in files)]
        for turn in range(options.turns + 1):  # the first makes the source models and warms the disk's cache up
            for name, side, count in lines:
                taken = side.run(*COMMAND, "adapt", "--config", str(files[count]))
                print(f"turn {turn}: {name}: {taken[0]:.2f} s, {taken[1]:.2f} of them imports", flush=True)
                if turn:
                    seconds.setdefault(name, []).append(taken)
    base = [whole - imports for whole, imports, _ in seconds[lines[0][0]]]
    rows = [
        "| run | whole, s | imports, s | beyond, s (all turns) | beyond / fa582de, median (all turns) |",
        "|---|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        beyond = [whole - imports for whole, imports, _ in taken]
        ratios = [one / other for one, other in zip(beyond, base, strict=True)]
        whole, imports = (statistics.median(column) for column in list(zip(*taken, strict=True))[:2])
        rows.append(f"| {name} | {whole:.2f} | {imports:.2f} | {_all(beyond)} | {_all(ratios)} |")
    return "\n".join([*rows, "", _about(options.turns)])


def _small_recipe(folder: Path, count: int) -> Path:
    root = folder / str(count)
    for seed, name in enumerate(("source", "source_val", "target", "target_val", "target_test")):
        write_domain(root / name, count, seed, inverted=name.startswith("target"), masks=name != "target")
    path = folder / f"{count}.yaml"
    settings: dict[str, Any] = {}
    for key, value in {**small_settings(root), "model.encoder_name": "tu-test_resnet"}.items():
        *groups, last = key.split(".")
        inner = settings
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    path.write_text(yaml.safe_dump(settings))
    return path


def comparison(options: argparse.Namespace) -> str:
    """Time a comparison, check that both versions score alike, and how far scores move where it may compute in half precision."""
    rows = ["| comparison | precision | fa582de, s | now, s | now / fa582de |", "|---|---|---|---|---|"]
    moved: dict[tuple[str, str], list[tuple[float, float]]] = {}
    alike = True
    for _ in range(options.turns):
        with both() as (before, now), tempfile.TemporaryDirectory() as place:
            half = Side(PROJECT, Path(place) / "half")
            sides = {"half": (half, "auto"), "before": (before, None), "now": (now, None)}
            taken = {
                name: _compared(side, options.seeds, options.epochs, precision)
                for name, (side, precision) in sides.items()
            }
            scores = {name: side.scores() for name, (side, _) in sides.items()}
        alike = alike and bool(scores["now"]) and scores["now"] == scores["before"]
        print(taken, f"{len(scores['now'])} scores alike: {scores['now'] == scores['before']}", flush=True)
        what = f"{options.seeds} seeds x {len(ARMS)} arms, {options.epochs or 3} epochs"
        for name, precision in (("now", "float32"), ("half", "auto")):
            ratio = taken[name] / taken["before"]
            rows.append(f"| {what} | {precision} | {taken['before']:.0f} | {taken[name]:.0f} | {ratio:.2f} |")
        found = {(arm, seed, metric): value for arm, seed, metric, value in scores["half"]}
        for arm, seed, metric, value in scores["now"]:
            moved.setdefault((arm, metric), []).append((value, found[arm, seed, metric]))
    if options.growth:
        rows += ["", "| now, seeds | s |", "|---|---|"]
        for seeds in (1, 2, 4):
            with tempfile.TemporaryDirectory() as place:
                rows.append(f"| {seeds} | {_compared(Side(PROJECT, Path(place) / 'now'), seeds, options.epochs):.0f} |")
    told = f"Scores of all runs in float32 the same to the digit: {'yes' if alike else 'no'}. {_about(options.turns)}"
    return "\n".join([*rows, "", *_moved(moved, "arm", "float32", "auto"), "", told])


def _compared(side: Side, seeds: int, epochs: int | None, precision: str | None = None) -> float:
    (side.place / "arms.yaml").write_text(yaml.safe_dump({"arms": ARMS, "seeds": seeds}))
    words = ["--config", str(RECIPE), "--arms", "arms.yaml", "--workers", "2", "--data.embedded.folder", _digits()]
    if epochs:
        words += ["--trainer.max_epochs", str(epochs), "--pretraining.max_epochs", str(epochs)]
    if precision:
        words += ["--trainer.precision", precision]
    # the clock alone: what workers of another parent use of the processor is not counted as this process's children's
    return side.run(*COMMAND, "compare", *words, threads=None)[0]


def _moved(found: dict[tuple[str, str], list[tuple[float, float]]], row: str, first: str, second: str) -> list[str]:
    """Return the table of how far each score moved from `first` to `second`, in points, by seed and on average."""
    rows = [
        f"| {row} | score | {first}, mean | {second} - {first}, points: each seed | mean |",
        "|---|---|---|---|---|",
    ]
    for (name, metric), values in found.items():
        points = [100 * (new - old) for old, new in values]
        each = ", ".join(f"{one:+.1f}" for one in points)
        mean = statistics.fmean(old for old, _ in values)
        rows.append(f"| {name} | `{metric}` | {mean:.3f} | {each} | {statistics.fmean(points):+.1f} |")
    return rows


def _digits() -> str:
    """Where both versions find the digits: made once."""
    return str(Path(tempfile.gettempdir()) / "dann-benchmark-digits")


def demo(options: argparse.Namespace) -> str:
    """Time what `make demo` runs, over seeds, and compare what it scores."""
    rows = [
        "| seed | fa582de: clock, processor, s | now: clock, processor, s | clock, processor, now / fa582de |",
        "|---|---|---|---|",
    ]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with both() as sides:
        for seed in range(options.seeds):
            taken, scores = [], []
            for side, more in zip(sides, ([], ["--trainer.precision", "auto"]), strict=True):
                settings = ["--seed", str(seed), "--data.embedded.folder", _digits(), *more]
                # a seed of its own source model, as in a store where nothing is
                (side.place / "mlflow.db").unlink(missing_ok=True)
                taken.append(_demo(side, settings))
                scores.append({(method, metric): value for method, _, metric, value in side.scores()})
                print(seed, side.version.name, taken[-1], scores[-1], flush=True)
            first, second = taken
            rows.append(
                f"| {seed} | {first[0]:.0f}, {first[1]:.0f} | {second[0]:.0f}, {second[1]:.0f} | "
                f"{second[0] / first[0]:.2f}, {second[1] / first[1]:.2f} |"
            )
            for row, value in scores[0].items():
                found.setdefault(row, []).append((value, scores[1][row]))
    rows += ["", *_moved(found, "row", "fa582de", "now")]
    return "\n".join([*rows, "", _about(1)])


def _demo(side: Side, settings: Sequence[str]) -> tuple[float, float]:
    """Run the commands of `make demo`; return their seconds by the clock and of the processor."""
    control = ["--domain_adaptation.method.name", "lambda_zero"]
    commands = (["adapt", *control, *settings], ["adapt", *settings], ["runs"])
    clock, _, processor = zip(*(side.run(*COMMAND, *words, threads=None) for words in commands), strict=True)
    return sum(clock), sum(processor)


def demo_growth(options: argparse.Namespace) -> str:
    """Time what `make demo` runs with this version, at three lengths of its trainings."""
    rows = ["| epochs of each training | clock, s | processor, s |", "|---|---|---|"]
    for epochs in (1, 2, 3):
        length = ["--trainer.max_epochs", str(epochs), "--pretraining.max_epochs", str(epochs)]
        settings = ["--data.embedded.folder", _digits(), "--trainer.precision", "auto", *length]
        with tempfile.TemporaryDirectory() as place:
            clock, processor = _demo(Side(PROJECT, Path(place) / "now"), settings)
        print(epochs, clock, processor, flush=True)
        rows.append(f"| {epochs} | {clock:.0f} | {processor:.0f} |")
    return "\n".join([*rows, "", _about(1, None)])


def imports(options: argparse.Namespace) -> str:
    """Time the start of the program."""
    commands = {
        "python": ["-c", "pass"],
        "`import dann_experiments`": ["-c", "import dann_experiments"],
        "`dann --help`": [*COMMAND, "--help"],
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    with both() as sides:
        for turn in range(options.turns + 1):
            for name, words in commands.items():
                for version, side in zip(("fa582de", "now"), sides, strict=True):
                    environ = environment_of(side.version)
                    began = time.perf_counter()
                    subprocess.run(
                        [sys.executable, *words], cwd=side.place, env=environ, check=True, capture_output=True
                    )
                    if turn:
                        seconds.setdefault((name, version), []).append(time.perf_counter() - began)
    rows = ["| | fa582de, s beyond Python's start | now, s beyond Python's start (all turns) |", "|---|---|---|"]
    for name in list(commands)[1:]:
        beyond = {
            version: [one - bare for one, bare in zip(seconds[name, version], seconds["python", version], strict=True)]
            for version in ("fa582de", "now")
        }
        rows.append(f"| {name} | {statistics.median(beyond['fa582de']):.2f} | {_all(beyond['now'])} |")
    return "\n".join([*rows, "", _about(options.turns)])


def _all(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _about(turns: int, against: str | None = BEFORE) -> str:
    commit = f" against commit {against}," if against else ""
    load = f"load of the machine {os.getloadavg()[1]:.1f}"
    return f"{turns} turn(s),{commit} {load}. {circumstances('torch', 'mlflow', 'matplotlib')}"


WAITS: dict[str, Callable[[argparse.Namespace], str]] = {
    "small": small, "comparison": comparison, "demo": demo, "demo_growth": demo_growth,
    "imports": imports,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wait", choices=list(WAITS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="of each training of the comparison; default: the recipe's three")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = WAITS[options.wait](options)
    print(text)
    if options.write:
        put("performance.md", f"waits {options.wait}", text)


if __name__ == "__main__":
    main()
