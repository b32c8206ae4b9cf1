"""Small runs, each in a process of its own, and what the store holds of them afterwards, read without MLflow."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from benchmarks.squares import model_folder, small_settings, write_domain
from dann_experiments.config import Config, load_config
from dann_experiments.jobs.adapt import adapt
from dann_experiments.jobs.pretrain import pretrain
from dann_experiments.tracking.pictures import Pictures
from dann_experiments.tracking.run import RunLogger, TrackedRun
from dann_experiments.tracking.sender import Sender

FORK = multiprocessing.get_context("fork")  # a run then begins in a second: torch and MLflow are imported already
Points = Counter[tuple[str, int, float | None]]
"""(metric, step, value), None for NaN -> how often it is there."""


def write_data(root: Path, seed: int) -> None:
    """Folder pairs of 32 px pictures: bright squares on dark noise (source), and dark ones on bright (target)."""
    counts = {"source": 24, "source_val": 4, "target": 36, "target_val": 5, "target_test": 3}
    for number, (folder, count) in enumerate(counts.items()):
        write_domain(root / folder, count, 10 * seed + number, inverted=folder.startswith("target"))


def settings(root: Path, uri: str, outputs: Path, more: Mapping[str, Any]) -> Config:
    """A run of seconds: 2 epochs of 12 steps, in which the source begins anew, with a checkpoint each fourth step; `more` are
    dotted names."""
    own = {
        "data.crop_size": 24, "data.source.augmentation": "light", "data.target.augmentation": "strong",
        "domain_adaptation.method.step_mode": "batch", "optimizer.name": "adamw", "optimizer.schedule": "annealed",
        "trainer.checkpoint_every_n_steps": 4, "tracking.uri": uri, "tracking.folder": str(outputs),
    }  # fmt: skip
    return load_config(None, {**small_settings(root), **own, **more})


class Noise(pl.Callback):
    """Numbers of every random state enter every step, so that a state that does not come back shows in the weights."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        batch["source"]["image"] += 0.01 * (torch.rand(()) + np.random.rand() + random.random())


class Signs(pl.Callback):
    """Says through a pipe when the first step is done, and when the last."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._begun = False

    def on_train_batch_end(self, *arguments: Any) -> None:
        if not self._begun:
            self._begun = True
            self._pipe.send("training")

    def on_train_end(self, *arguments: Any) -> None:
        self._pipe.send("trained")


class Process:
    """A function in a forked process, whose output goes to a file."""

    def __init__(self, job: Callable[[Any], object], log: Path) -> None:
        self.pipe, far = FORK.Pipe()
        self.log = log

        def work() -> None:
            with open(log, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            job(far)

        self.started = time.monotonic()
        self._process = FORK.Process(target=work, daemon=True)
        self._process.start()
        far.close()

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None if it still runs after `seconds`."""
        self._process.join(seconds)
        return self._process.exitcode

    def said(self, seconds: float | None = None) -> str | None:
        """What it says next; None if it has ended, or says nothing for `seconds`."""
        try:
            return self.pipe.recv() if self.pipe.poll(seconds) else None
        except EOFError:
            return None

    def kill(self) -> int | None:
        """SIGKILL, now; the exit code."""
        self._process.kill()
        return self.wait()

    def end_well(self) -> None:
        """Wait for its end, which must be a good one."""
        code = self.wait()
        if code != 0:
            raise RuntimeError(f"a run that nobody killed ended with {code}:\n{self.log.read_text()[-4000:]}")


@dataclass(frozen=True)
class Source:
    """The model that all runs start from."""

    database: Path
    """A store that holds its run alone."""
    model: Path


def source_model(folder: Path, data: Path) -> Source:
    """Pretrain it in `folder`."""
    folder.mkdir()
    config = settings(data, f"sqlite:///{folder}/mlflow.db", folder / "outputs", {})
    Process(lambda pipe: pretrain(config), folder / "output.log").end_well()
    ((_, artifacts),) = runs_in(folder / "mlflow.db", "pretrain").values()
    return Source(folder / "mlflow.db", model_folder(artifacts))


def adapting(config: Config, log: Path, resume: str | None = None) -> Process:
    """`adapt` in a process of its own, which says when it trains."""
    return Process(lambda pipe: adapt(config, [Noise(), Signs(pipe)], resume=resume), log)


class Witness(pl.Callback):
    """Within one process: keeps each number that is logged, and the time that tracking takes from the training thread."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int, Any]] = []
        self.pictures: list[int] = []
        """Step of each picture."""
        self.calls: Counter[str] = Counter()
        self.longest = (0.0, "")
        """Seconds, and in what."""
        self._training = self._inside = False

    def watch(self) -> None:
        """Stand before everything that a run calls while it trains."""
        put = Sender.put

        def kept(sender: Sender, values: Mapping[str, Any], step: int, again: bool = False) -> None:
            self.points += [(name, step, value) for name, value in values.items()]
            put(sender, values, step, again)

        show = Pictures.log

        def shown(pictures: Pictures, picture: Any, step: int) -> None:
            self.pictures.append(step)
            show(pictures, picture, step)

        setattr(Sender, "put", kept)  # noqa: B010
        setattr(Pictures, "log", shown)  # noqa: B010
        for owner in (TrackedRun, RunLogger):
            for name in ("log_metrics", "persist", "set_tags", "set_tag"):
                if hasattr(owner, name):
                    setattr(owner, name, self._timed(getattr(owner, name), name))

    def on_train_start(self, *arguments: Any) -> None:
        self._training = True

    def on_train_end(self, *arguments: Any) -> None:
        self._training = False

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            if not self._training or self._inside or threading.current_thread() is not threading.main_thread():
                return function(*arguments, **more)
            self._inside, start = True, time.monotonic()
            try:
                return function(*arguments, **more)
            finally:
                self.calls[name] += 1
                self.longest = max(self.longest, (time.monotonic() - start, name))
                self._inside = False

        return timed

    def save(self, path: Path, **more: Any) -> None:
        """Everything as JSON."""
        points = [(name, step, _number(float(value))) for name, step, value in self.points]
        kept = {"points": points, "pictures": self.pictures, "calls": self.calls, "longest": self.longest, **more}
        path.write_text(json.dumps(kept))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def as_points(rows: list[Any]) -> Points:
    """Of a list of (metric, step, value)."""
    return Counter((str(name), int(step), value) for name, step, value in rows)


def points_in(database: Path, run_id: str) -> Points:
    """What a store in a sqlite file has of a run."""
    asked = "SELECT key, step, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics WHERE run_uuid = ?"
    return as_points(rows_of(database, asked, run_id))


def runs_in(database: Path, job: str) -> dict[str, tuple[str, Path]]:
    """Run id -> status and folder of artifacts, of all runs of a job."""
    asked = (
        "SELECT runs.run_uuid, status, artifact_uri FROM runs JOIN tags ON runs.run_uuid = tags.run_uuid "
        "WHERE tags.key = 'dann.job' AND tags.value = ?"
    )
    return {run_id: (status, Path(uri)) for run_id, status, uri in rows_of(database, asked, job)}


def rows_of(database: Path, asked: str, *values: Any) -> list[Any]:
    """A question to a sqlite file, in a connection that does not stay."""
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute(asked, values).fetchall()
