"""What does logging six metrics a step cost the training thread, and how much memory do metrics on their way take?

    python benchmarks/tracking.py [--write]

The run's own logger, with tensors as the training module gives them, into a real sqlite store and a real MLflow server (on
127.0.0.1, a free port, its own sqlite file). Blocks of steps that log nothing, log into the one and into the other follow each
other in one process, so that what else the machine does meets all alike; between two blocks what waits is sent.
A picture is logged at the start of each block, and system metrics every ten seconds. A step is torch
work of some milliseconds on one thread, or nothing at all (back to back). What the training thread waits, for Python or for a
core, is its clock less its seconds of the processor, which the machine's speed hardly moves. Goal: at most 0.3 ms a step. Then
the server is killed, steps go on, it is started again, and every point is counted in the store. `--write` puts the tables into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pages import circumstances, put, spread
from PIL import Image

from dann_experiments.tracking.pictures import Pictures
from dann_experiments.tracking.run import RunLogger, tracked_run
from dann_experiments.tracking.sender import MOST_IN_MEMORY, SPOOL
from dann_experiments.tracking.store import open_store

METRICS = (
    "loss/train_seg", "loss/train_da", "loss/train_total", "da/domain_loss", "da/domain_acc", "da/lambda",
)  # fmt: skip
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (270, 766, 3), dtype=np.uint8)).quantize(256)
BLOCK_SECONDS = 4.0
LONGEST_BLOCK = 3000  # steps


class Server:
    """A real MLflow server on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._port = one.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Start it, on the same store if it has been started before; returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self._folder}/server.db",
                   "--artifacts-destination", str(self._folder / "artifacts")]  # fmt: skip
        environ = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self._folder / "server.log", "a") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)  # noqa: S310
                return
            time.sleep(0.2)
        raise TimeoutError("the MLflow server does not answer")

    def kill(self) -> None:
        """End it at once, as a machine that loses its power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass
class Place:
    """A store with an open run in it, and what was measured there."""

    name: str
    logger: RunLogger
    pictures: Pictures
    steps: int = 0
    requests: int = 0
    calls: list[float] = field(default_factory=list)
    """Seconds in `log_metrics`, each step."""
    whole: list[tuple[float, float]] = field(default_factory=list)
    """Mean seconds of a step, and those of them that the training thread waited, each block."""
    peak: int = 0
    """Most points in memory."""
    sender_seconds: float = 0.0
    """Of the processor, in the sending thread."""

    def log(self, values: Mapping[str, Any]) -> None:
        """One step, by the clock."""
        start = time.perf_counter()
        self.logger.log_metrics(values, step=self.steps)
        self.calls.append(time.perf_counter() - start)
        self.steps += 1
        self.peak = max(self.peak, len(self.logger.run.sender._memory))

    def drain(self) -> None:
        """Wait until the store has all."""
        sender = self.logger.run.sender
        while sender._memory or sender._spool.left:
            time.sleep(0.02)
        time.sleep(0.1)  # what follows the answer

    def processor(self) -> float:
        """Seconds of the processor that the sending thread has had."""
        thread = self.logger.run.sender._thread.ident
        assert thread is not None
        return time.clock_gettime(time.pthread_getcpuclockid(thread))

    def stored(self) -> int:
        """How many points the store has of the run."""
        run = self.logger.run
        return sum(len(run.store.client.get_metric_history(run.run_id, name)) for name in METRICS)

    def forget(self) -> None:
        """Measure anew, in the same run."""
        self.calls, self.whole, self.peak, self.requests, self.sender_seconds = [], [], 0, 0, 0.0


@contextlib.contextmanager
def place(name: str, uri: str, folder: Path) -> Iterator[Place]:
    """A run in the store at `uri`."""
    store = open_store(uri, "tracking")
    with tracked_run(store, None, "tracking", {}, folder / "runs", use_claimed=False, system_metrics=True) as run:
        found = Place(name, RunLogger(run), Pictures(run, "predictions"))
        send = run.sender._send

        def counted(points: Any) -> None:
            found.requests += 1
            send(points)

        run.sender._send = counted
        yield found


def work(milliseconds: float) -> Any:
    """Torch work of about so long on one thread, in pieces, as a training step calls many operators; None for 0."""
    if not milliseconds:
        return lambda: None
    a, pieces = torch.randn(160, 160), 1

    def do() -> None:
        for _ in range(pieces):
            torch.mm(a, a)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(50):
            do()
        return (time.perf_counter() - start) / 50

    seconds()
    pieces = max(1, round(milliseconds / 1e3 / min(seconds() for _ in range(5))))
    return do


def measured(places: list[Place], milliseconds: float, blocks: int) -> list[tuple[float, float]]:
    """Blocks of steps in each place and without logging, in turn; of the latter what `Place.whole` holds."""
    do, silent = work(milliseconds), []
    losses = torch.rand(6)
    steps = min(LONGEST_BLOCK, round(BLOCK_SECONDS / (milliseconds / 1e3))) if milliseconds else LONGEST_BLOCK

    def block(log: Any) -> tuple[float, float]:
        start, worked = time.perf_counter(), time.thread_time()
        for _ in range(steps):
            do()
            log(
                {name: losses[index] * 2 for index, name in enumerate(METRICS)}
            )  # six new tensors, as a step makes them
        whole, worked = time.perf_counter() - start, time.thread_time() - worked
        return whole / steps, (whole - worked) / steps

    for _ in range(blocks):
        silent.append(block(lambda values: None))
        for one in places:
            before = one.processor()
            one.pictures.log(PICTURE, one.steps)  # one a block, as after a validation
            one.whole.append(block(one.log))
            one.drain()
            one.sender_seconds += one.processor() - before
    return silent


def row(one: Place, silent: list[tuple[float, float]], work_name: str) -> str:
    """A line of the table."""
    calls = 1e3 * np.array(one.calls)
    longer, waits = 1e3 * (np.array(one.whole) - np.array(silent)).T
    return (
        f"| {one.name} | {work_name} | {len(calls)} | {np.median(calls):.3f} | {np.quantile(calls, 0.99):.3f} "
        f"| {calls.mean():.3f} | {calls.max():.1f} | {1e3 * one.sender_seconds / len(calls):.2f} "
        f"| {spread(longer, '+.2f')} | {spread(waits, '+.2f')} | {len(calls) / one.requests:.0f} | {one.peak:,} |"
    )


def bytes_a_point() -> float:
    """Memory of a point that waits: its tensor, its tuple and its place in the list."""
    count = 10 * MOST_IN_MEMORY
    before = psutil.Process().memory_info().rss
    kept = [(METRICS[0], value, 1_700_000_000_000 + step, 1000 + step) for step, value in enumerate(torch.rand(count))]
    after = psutil.Process().memory_info().rss
    return (after - before) / len(kept)


def away(server: Server, one: Place, seconds: float) -> str:
    """Lines about a server that is killed and comes back."""
    one.forget()
    already = one.stored()
    server.kill()
    process = psutil.Process()
    before = most = process.memory_info().rss
    values, start, steps = torch.rand(6), time.monotonic(), 0
    while time.monotonic() - start < seconds:
        one.log({name: values[index] * 2 for index, name in enumerate(METRICS)})
        steps += 1
        if steps % 100 == 0:
            most = max(most, process.memory_info().rss)
            time.sleep(0.1)
    calls = 1e3 * np.array(one.calls)
    sender = one.logger.run.sender
    sender.persist()
    size, left = (sender._folder / SPOOL).stat().st_size, sender._spool.left
    server.start()
    one.drain()
    arrived = one.stored() - already
    each = bytes_a_point()
    return "\n".join(
        [
            f"| server killed, {steps:,} steps in {seconds:.0f} s | |",
            "|---|---|",
            f"| `log_metrics`, ms a step: median, 99 %, mean, most | {np.median(calls):.3f}, {np.quantile(calls, 0.99):.3f}, "
            f"{calls.mean():.3f}, {calls.max():.0f} |",
            f"| most points in memory (bound {MOST_IN_MEMORY:,} and one step) | {one.peak:,} |",
            f"| bytes a point in memory, so at the bound | {each:.0f}, {each * MOST_IN_MEMORY / 1e6:.1f} MB |",
            f"| the process grew by at most | {(most - before) / 1e6:.0f} MB |",
            f"| the file beside the run: points, bytes a point | {left:,}, {size / left:.0f} |",
            f"| points in the store after the server came back | {arrived:,} of {6 * steps:,} |",
        ]
    )


def main() -> None:
    """Print the tables, and put them into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help=f"blocks of some {BLOCK_SECONDS:.0f} s a line")
    parser.add_argument("--ms", type=float, nargs="+", default=[20.0, 3.0, 0.0], help="torch work a step; 0 is none")
    parser.add_argument("--away", type=float, default=40.0, help="seconds without a server; 0 leaves it out")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| store | work of a step | steps | `log_metrics`: median, ms | 99 % | mean | most | the sender's processor, ms a step "
        "| whole step longer by, ms (quartiles of blocks) | of it waits, ms | steps a request | most points in memory |",
        "|" + "---|" * 12,
    ]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        server = Server(folder)
        stack.callback(server.kill)
        places = [
            stack.enter_context(place("sqlite", f"sqlite:///{folder}/mlflow.db", folder)),
            stack.enter_context(place("server", server.uri, folder)),
        ]
        measured(places, 0.0, 1)
        for milliseconds in arguments.ms:
            for one in places:
                one.forget()
            silent = measured(places, milliseconds, arguments.blocks)
            words = (
                f"{1e3 * statistics.median(whole for whole, _ in silent):.1f} ms"
                if milliseconds
                else "none, back to back"
            )
            lines += [row(one, silent, words) for one in places]
            print("\n".join(lines[-2:]), flush=True)
        if arguments.away:
            lines += ["", away(server, places[1], arguments.away)]
    load = os.getloadavg()[1]
    text = "\n".join([*lines, "", f"Load of the machine {load:.1f}. {circumstances('torch', 'mlflow', 'sqlalchemy')}"])
    print(text)
    if arguments.write:
        put("performance.md", "tracking", text)


if __name__ == "__main__":
    main()
