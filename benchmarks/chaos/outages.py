"""Takes a run's MLflow server away again and again, and starts runs side by side in a store that is not there: what is lost?"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from benchmarks.chaos.runs import FORK, Process, Source, Witness, as_points, points_in, rows_of, runs_in, settings
from dann_experiments.config import Config
from dann_experiments.jobs import pictures
from dann_experiments.jobs.adapt import adapt
from dann_experiments.tracking.run import RunLogger

TAG = "chaos"
START = "domain_adaptation.pretrained_checkpoint.path"
MOST_SECONDS = 60.0
"""The longest wait for a server to answer, and for a run to send."""


class Server:
    """A real MLflow server on sqlite that serves its artifacts, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "server.db"
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._port = one.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it; returns when it answers."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environ = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "a") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + MOST_SECONDS
        while not self._answers():
            if time.monotonic() > until:
                raise RuntimeError(f"no server:\n{(self.folder / 'server.log').read_text()[-4000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def points(self) -> int:
        """How many metric points it has; read from its file, so that it is not asked."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute("SELECT count(*) FROM metrics").fetchone()[0]
        return 0

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


class Until(pl.Callback):
    """Ends training when a file appears; measures the pauses between two steps of an epoch, and sets a tag at each epoch's start,
    as a run does that forgets its source."""

    def __init__(self, file: Path) -> None:
        self.pauses: list[tuple[float, float]] = []
        """When a step ended, and the seconds since the one before, whatever the cause."""
        self.tag = ""
        """What was set last."""
        self._file = file
        self._before: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._before = None
        self.tag = f"epoch {trainer.current_epoch}"
        assert isinstance(trainer.logger, RunLogger)
        trainer.logger.set_tag(TAG, self.tag)

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        now = time.monotonic()
        if self._before is not None:
            self.pauses.append((now, now - self._before))
        self._before = now
        trainer.should_stop = self._file.exists()


@dataclass(frozen=True)
class Logged:
    """What a run logged beside what the store has of it."""

    status: str
    exit_code: int | None
    points: int
    missing: int
    surplus: int
    has_tag: bool
    """Whether the store has the tag that was set last."""
    calls: Mapping[str, int]
    """Of tracking, on the training thread: name -> how many."""
    longest: tuple[float, str]
    """The longest of them: seconds, and in what."""
    longest_pauses: tuple[float, float]
    """Seconds between two steps, whatever the cause: while the store was away, and while it was there."""
    pictures: int = 0
    """Pictures by step that it logged; each is two files."""
    pictures_missing: int = 0
    """Of them, those that the store lacks or has a part of."""

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost."""
        return (
            (self.status, self.exit_code) == ("FINISHED", 0)
            and self.points > 0
            and self.has_tag
            and not self.missing + self.surplus + self.pictures_missing
        )


@dataclass(frozen=True)
class Outage:
    """One time that the server was away."""

    when: str
    began: float
    ended: float
    """By the clock of the machine, in seconds."""

    @property
    def seconds(self) -> float:
        """How long it was away."""
        return self.ended - self.began


def witnessed(config: Config, folder: Path, barrier: Any = None) -> Process:
    """`adapt` in a process of its own that keeps what it logs in `folder`, and ends when a file `stop` appears there."""
    folder.mkdir()

    def job(pipe: Any) -> None:
        witness, until = Witness(), Until(folder / "stop")
        witness.watch()
        setattr(pictures, "is_shown", lambda epoch, epochs: True)  # noqa: B010  (of the 100,000 epochs else one in 5,000)
        if barrier is not None:
            barrier.wait()
        adapt(config, [until, witness])
        witness.save(folder / "logged.json", pauses=until.pauses, tag=until.tag)

    return Process(job, folder / "output.log")


def logged(
    process: Process, folder: Path, database: Path, run_id: str, outages: Sequence[Outage] = (), artifacts: Path | None = None
) -> Logged:  # fmt: skip
    """How a run ended. `artifacts`: where the store keeps files, to count pictures."""
    code = process.wait()
    if code != 0:
        print(process.log.read_text()[-4000:], file=sys.stderr)
        return Logged(runs_in(database, "adapt")[run_id][0], code, 0, 0, 0, False, {}, (0.0, ""), (0.0, 0.0))
    kept = json.loads((folder / "logged.json").read_text())
    longest = [0.0, 0.0]
    for when, seconds in kept["pauses"]:
        there = not any(one.began < when and when - seconds < one.ended for one in outages)
        longest[there] = max(longest[there], seconds)
    wanted, found = as_points(kept["points"]), points_in(database, run_id)
    return Logged(
        runs_in(database, "adapt")[run_id][0], code, wanted.total(), (wanted - found).total(), (found - wanted).total(),
        rows_of(database, "SELECT value FROM tags WHERE run_uuid = ? AND key = ?", run_id, TAG) == [(kept["tag"],)],
        kept["calls"], tuple(kept["longest"]), (longest[0], longest[1]), *_pictures(kept["pictures"], run_id, artifacts),
    )  # fmt: skip


def _pictures(steps: Sequence[int], run_id: str, artifacts: Path | None) -> tuple[int, int]:
    """Return how many pictures a run logged, and how many of them are not whole in the store."""
    if artifacts is None:
        return 0, 0
    files = [path for path in artifacts.glob(f"**/{run_id}/artifacts/images/*") if path.stat().st_size > 0]
    names = [path.name for path in files]
    whole = [step for step in steps if sum(f"+step+{step}+" in name for name in names) == 2]
    return len(steps), len(steps) - len(whole)


def take_the_store_away(folder: Path, data: Path, source: Source, seed: int, times: int) -> Iterator[Outage | Logged]:
    """One run while its server is killed and started `times` times: at the last time as the run ends."""
    folder.mkdir()
    draw, server = random.Random(f"{seed} outages"), Server(folder)
    server.start()
    try:
        more = {
            START: str(source.model),
            "trainer.max_epochs": 100_000,
            "optimizer.schedule": "constant",
        }
        process = witnessed(settings(data, server.uri, folder / "outputs", more), folder / "run")
        outages: list[Outage] = []
        for number in range(times):
            before = server.points()
            wait_until(lambda before=before: server.points() > before, process)  # the run sends
            time.sleep(draw.uniform(0, 2))
            if number == times - 1:
                (folder / "run" / "stop").touch()
                time.sleep(draw.uniform(0, 1))
            server.kill()
            killed = time.monotonic()
            time.sleep(draw.uniform(0, 3))
            server.start()
            when = "as the run ended" if number == times - 1 else "while it trained"
            outages.append(Outage(when, killed, time.monotonic()))
            yield outages[-1]
        (run_id,) = runs_in(server.database, "adapt")
        yield logged(process, folder / "run", server.database, run_id, outages, server.folder / "artifacts")
    finally:
        server.kill()


def wait_until(met: Any, process: Process) -> None:
    """Wait for something that a living process does."""
    until = time.monotonic() + MOST_SECONDS
    while not met():
        if process.wait(0.05) is not None or time.monotonic() > until:
            raise RuntimeError(f"the run does not go on:\n{process.log.read_text()[-4000:]}")


def start_together(folder: Path, data: Path, source: Source, runs: int) -> Iterator[Logged]:
    """`runs` runs that begin at once, in a store that none of them finds."""
    folder.mkdir()
    barrier, database = FORK.Barrier(runs), folder / "fresh.db"
    processes = []
    for number in range(runs):
        more = {START: str(source.model), "seed": number}
        config = settings(data, f"sqlite:///{database}", folder / f"outputs_{number}", more)
        processes.append(witnessed(config, folder / f"run_{number}", barrier))
    for process in processes:
        process.wait()
    run_ids = dict(rows_of(database, "SELECT value, run_uuid FROM tags WHERE key = 'seed'"))
    for number, process in enumerate(processes):
        yield logged(process, folder / f"run_{number}", database, run_ids[str(number)])
    shutil.rmtree(folder)
