"""Starts the other ranks of a training (`trainer.devices`) as processes that run one loop, without a tracking store.

One line on their standard input describes the training. They end when that input is closed, so that none outlives the first rank,
however that ends. Each writes one line when it is ready, and one if it fails.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl

from dann_experiments.adaptation.dann import SourceOnly
from dann_experiments.config import Config, InputError, TrainingFailed, config_to_dict
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.jobs.build import (
    find_data,
    make_loaders,
    make_method,
    make_network,
    make_taps,
    seeded,
)
from dann_experiments.jobs.build_training import make_loop
from dann_experiments.names import SetName
from dann_experiments.training.curves import Curves
from dann_experiments.training.ranks import Rank, leave
from dann_experiments.workers.processes import how_it_ended

READY = "ready"
LAST_WORDS_SECONDS = 20.0  # to wait for a process to report its error, after the first rank has lost it
LOST = ("gloo", "NCCL", "closed by peer", "reset by peer")  # in torch's messages about a rank that does not answer
TOLD_ALIKE = {kind.__name__: kind for kind in (InputError, TrainingFailed)}


@dataclass(frozen=True)
class Ranks:
    """All ranks, as seen by the first one."""

    first: Rank
    others: Sequence[_Process] = ()

    def wait(self) -> None:
        """Wait until all other ranks are ready to form the process group. Raises the error of a rank that fails before."""
        for process in self.others:
            if process.answer() != READY:
                _raise_what_they_said([process], None, LAST_WORDS_SECONDS)


@contextlib.contextmanager
def other_ranks(
    config: Config, sets: ImageSets, folder: Path, pretraining: bool, go_on_from: Path | None
) -> Iterator[Ranks]:
    """Run the ranks 1 to `trainer.devices` - 1 during the block.

    `folder`: the run's folder; `go_on_from`: the checkpoint to resume from. If a rank fails, raises its InputError or
    TrainingFailed, else TrainingFailed with its error; its output then stays in `folder`."""
    world = config.trainer.devices
    if world == 1:
        yield Ranks(Rank())
        return
    with tempfile.TemporaryDirectory(prefix="dann_ranks_") as place, contextlib.ExitStack() as stack:
        stack.callback(leave)
        order = {
            "config": config_to_dict(config), "folder": str(folder.resolve()), "world": world,
            "meeting_point": f"{place}/meeting_point", "pretraining": pretraining,
            "sets": [str(name) for name in sets.sets if name.split != "test"],
            "go_on_from": None if go_on_from is None else str(go_on_from.resolve()),
        }  # fmt: skip
        others: list[_Process] = []
        for index in range(1, world):
            others.append(_Process(order | {"index": index}, folder / f"process_{index + 1}.log"))
            stack.callback(others[-1].end)
        try:
            yield Ranks(Rank(0, world, Path(order["meeting_point"])), others)
        except RuntimeError as error:
            lost = any(sign in str(error) for sign in LOST)
            _raise_what_they_said(others, error, LAST_WORDS_SECONDS if lost else 0.0)
            raise
        for process in others:
            process.log.unlink(missing_ok=True)


def main() -> None:
    """Run the process of another rank."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that what libraries print is not taken for an answer
    for number in (signal.SIGINT, signal.SIGTERM):  # the whole group gets them, but the first rank ends the training
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_first_rank, daemon=True).start()
    code = 0
    try:
        _train(order, answers)
    except BaseException as error:
        traceback.print_exc()
        print(json.dumps({"kind": type(error).__name__, "text": str(error)}), file=answers)
        code = 1
    sys.stderr.flush()
    os._exit(code)  # a thread is still reading the standard input


def _train(order: Mapping[str, Any], answers: TextIO) -> None:
    config = config_from_dict(order["config"])
    rank = Rank(order["index"], order["world"], Path(order["meeting_point"]))
    with seeded(config):
        sets = find_data(config, [SetName.parse(text) for text in order["sets"]]).read()
        network = make_network(config, with_weights=False)  # the weights come from the first rank when all meet
        taps = [] if order["pretraining"] else make_taps(config, network)
        method = SourceOnly() if order["pretraining"] else make_method(config, taps)
        go_on_from = None if order["go_on_from"] is None else Path(order["go_on_from"])
        loop = make_loop(
            config, network, method, taps, make_loaders(config, sets, rank), Path(order["folder"]),
            pretraining=order["pretraining"], resumed=go_on_from is not None, rank=rank, curves=Curves(),
        )  # fmt: skip
        pl.seed_everything(config.seed + rank.index, verbose=False)  # dropout must differ between ranks
        print(READY, file=answers)
        loop.run(go_on_from)


class _Process:
    """The process of another rank, and the file with its output."""

    def __init__(self, order: Mapping[str, Any], log: Path) -> None:
        self.index, self.world, self.log = order["index"], order["world"], log
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with open(log, "w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import main; main()"], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):  # `answer` and `failure` report why it ended
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def answer(self) -> str:
        """Return the next line that the process writes; empty if it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def failure(self, seconds: float) -> Exception | None:
        """Return the error of the process if it fails within `seconds`, else None."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        if code == 0:
            return None
        assert self._process.stdout is not None
        said = next((line for line in self._process.stdout if line.startswith("{")), None)
        if said is None:
            return TrainingFailed(
                f"process {self.index + 1} of {self.world} {how_it_ended(code)}; its output: {self.log}"
            )
        told = json.loads(said)
        if any(sign in told["text"] for sign in LOST):
            return None  # it only lost the connection to this or another rank
        if told["kind"] in TOLD_ALIKE:
            return TOLD_ALIKE[told["kind"]](told["text"])
        return TrainingFailed(f"process {self.index + 1} of {self.world}: {told['kind']}: {told['text']}")

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


def _raise_what_they_said(processes: Sequence[_Process], error: Exception | None, seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        failure = process.failure(max(until - time.monotonic(), 0.0))
        if failure is not None:
            raise failure from error


def _end_with_the_first_rank() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)
