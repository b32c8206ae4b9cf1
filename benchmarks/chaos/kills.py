"""Kills training at random moments and resumes it: the same run, the same weights to the bit, each metric once."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.runs import FORK, Points, Process, Source, adapting, points_in, runs_in, settings
from benchmarks.squares import model_folder
from dann_experiments.config import Config

KINDS: Mapping[str, Mapping[str, Any]] = {
    "last": {},
    "averaged": {
        "trainer.ema_decay": 0.9, "trainer.accumulate_grad_batches": 2, "loss": ["cross_entropy", "dice"],
        "class_weights": "auto", "optimizer.schedule": "polynomial", "optimizer.warmup_steps": 3,
        "optimizer.freeze": ["encoder"], "optimizer.freeze_epochs": 1, "optimizer.lr_factors": {"decoder": 0.5},
        "monitor.patience": 3,
    },
    "best": {"monitor.final_model": "best", "monitor.metric": "iou/target_val"},
}  # fmt: skip
"""Which weights a run ends with -> its settings. `best` scores them once more behind the last validation; `averaged` has what
keeps a state of its own beside weights and optimizer."""
AT_ONCE = 2
MOST_TRIES = 20


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed."""

    weights: bytes
    points: Points
    seconds: float
    """From its start to its end."""
    training_seconds: float
    """From its first step to its last."""


@dataclass(frozen=True)
class Killed:
    """A run that was killed and resumed, beside the one that was not."""

    number: int
    kind: str
    kills: tuple[str, ...]
    """When, in words."""
    same_run: bool
    status: str
    same_weights: bool
    missing: int
    """Metric points of the run that was not killed which this one has not, with their values."""
    surplus: int
    """Points that it has beyond them: twice, or with another value."""

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost."""
        return self.same_run and self.status == "FINISHED" and self.same_weights and not self.missing + self.surplus


@dataclass(frozen=True)
class Place:
    """Where the runs are."""

    folder: Path
    data: Path
    source: Source

    def config(self, name: str, kind: str) -> Config:
        """Settings of a run in a store of its own, in which the source model is finished."""
        (self.folder / name).mkdir()
        shutil.copy(self.source.database, self.database(name))
        return settings(self.data, f"sqlite:///{self.database(name)}", self.folder / name / "outputs", KINDS[kind])

    def database(self, name: str) -> Path:
        """The store of a run."""
        return self.folder / name / "mlflow.db"


@dataclass(frozen=True)
class Case:
    """A run that was killed."""

    number: int
    kind: str
    config: Config
    log: Path
    database: Path
    run_id: str


def kill_and_resume(folder: Path, data: Path, source: Source, seed: int, runs: int) -> Iterator[Killed]:
    """`runs` runs, killed once to three times each."""
    place = Place(folder, data, source)
    folder.mkdir()
    with ProcessPoolExecutor(AT_ONCE, FORK) as pool:  # two at once here too, so that a run takes as long as later
        wholes = dict(zip(KINDS, pool.map(whole_run, [place] * len(KINDS), KINDS), strict=True))
        kinds = [list(KINDS)[number % len(KINDS)] for number in range(runs)]
        cases = [pool.submit(one_case, place, seed, n, kind, wholes[kind]) for n, kind in enumerate(kinds)]
        for case in as_completed(cases):
            yield case.result()


def whole_run(place: Place, kind: str) -> Whole:
    """A run that nobody kills."""
    name = f"whole_{kind}"
    process = adapting(place.config(name, kind), place.folder / f"{name}.log")
    began = trained = 0.0
    while (sign := process.said()) is not None:
        began, trained = (time.monotonic(), trained) if sign == "training" else (began, time.monotonic())
    process.end_well()
    now = time.monotonic()
    ((run_id, (_, artifacts)),) = runs_in(place.database(name), "adapt").items()
    points = without_times(points_in(place.database(name), run_id))
    return Whole(weights_in(artifacts), points, now - process.started, trained - began)


def one_case(place: Place, seed: int, number: int, kind: str, whole: Whole) -> Killed:
    """One run that was killed at least once, the first time while it trained."""
    draw = random.Random(f"{seed} {number}")
    wanted = draw.choice([1, 1, 1, 2, 2, 3])
    for attempt in range(MOST_TRIES):
        name = f"killed_{number}_{attempt}"
        config, log = place.config(name, kind), place.folder / f"{name}.log"
        process = adapting(config, log)
        process.said()  # its first step is done
        delay = draw.uniform(0, whole.training_seconds)
        if killed(process, delay) and process.said(0) is None:  # it did not say that it had trained
            (run_id,) = runs_in(place.database(name), "adapt")
            first = f"{delay:.2f} s after its first step ({steps_in(place.database(name), run_id)} steps in the store)"
            found = resumed(Case(number, kind, config, log, place.database(name), run_id), [first], wanted, draw, whole)
            shutil.rmtree(place.folder / name)
            return found
    raise RuntimeError(f"run {number} had trained before each of {MOST_TRIES} moments at which it was to be killed")


def resumed(case: Case, kills: list[str], wanted: int, draw: random.Random, whole: Whole) -> Killed:
    """Go on in a killed run until it has ended; killed again and again until `wanted`, wherever it is then, opening and
    closing included."""
    while len(kills) < wanted and runs_in(case.database, "adapt")[case.run_id][0] != "FINISHED":
        process = adapting(case.config, case.log, draw.choice(["auto", case.run_id]))
        delay = draw.uniform(0, whole.seconds)
        if not killed(process, delay):
            break
        kills.append(f"{delay:.2f} s after it was resumed ({steps_in(case.database, case.run_id)} steps)")
    if runs_in(case.database, "adapt")[case.run_id][0] != "FINISHED":
        adapting(case.config, case.log, draw.choice(["auto", case.run_id])).wait()
    runs = runs_in(case.database, "adapt")
    status, artifacts = runs[case.run_id]
    points = without_times(points_in(case.database, case.run_id))
    found = Killed(
        case.number, case.kind, tuple(kills), list(runs) == [case.run_id], status, weights_in(artifacts) == whole.weights,
        (whole.points - points).total(), (points - whole.points).total(),
    )  # fmt: skip
    shutil.rmtree(artifacts, ignore_errors=True)  # a hundred megabytes
    if not found.is_good:
        print(case.log.read_text()[-4000:], whole.points - points, points - whole.points, sep="\n", file=sys.stderr)
    return found


def killed(process: Process, delay: float) -> bool:
    """SIGKILL to a process after `delay` seconds; False if it ended well before."""
    code = process.wait(delay)
    code = process.kill() if code is None else code
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with {code}:\n{process.log.read_text()[-4000:]}")
    return code != 0


def steps_in(database: Path, run_id: str) -> int:
    """How many training steps of a run the store has."""
    return sum(metric == "loss/train_seg" for metric, _, _ in points_in(database, run_id))


def without_times(points: Points) -> Points:
    """Seconds differ from run to run: of them, that they are there once for each epoch."""
    found = Points()
    for (metric, step, value), count in points.items():
        found[metric, step, None if metric.startswith("time/") else value] += count
    return found


def weights_in(artifacts: Path) -> bytes:
    """The final model's; nothing where there is none."""
    try:
        return (model_folder(artifacts) / "model.safetensors").read_bytes()
    except (StopIteration, FileNotFoundError):
        return b""
