"""Disks that fill up or become read-only, stores that are locked, clocks that are put back: told, and nothing is lost or damaged.

Each fault is a real one. A small disk is a tmpfs, where this may be mounted (else the test is skipped); the same facts
are tested everywhere by a limit on the size of files, which the kernel refuses in the same way (EFBIG instead of ENOSPC).
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import pytorch_lightning as pl
import torch
from conftest import small_settings
from test_resume import values, weights

from dann_experiments import jobs
from dann_experiments.__main__ import main
from dann_experiments.config import Config, config_to_yaml, load_config
from dann_experiments.config.errors import InputError, NotWritten, StoreAway
from dann_experiments.jobs import RunResult
from dann_experiments.tracking import run, sqlite
from dann_experiments.tracking.clock import Clock
from dann_experiments.tracking.processes import live_process, process_name
from dann_experiments.tracking.sender import SPOOL, Sender
from dann_experiments.tracking.store import open_store
from dann_experiments.training import checkpoint_files as files

CHECKPOINT = 51_000_000  # bytes, of the network of these tests
LIMIT = 20_000_000  # a store and figures are smaller, checkpoints and model are larger


def copy_of_store(store: Path, to: Path) -> str:
    """A store with the pretraining in it; its address."""
    with closing(sqlite3.connect(store)) as source, closing(sqlite3.connect(to)) as copy:
        source.backup(copy)
    return f"sqlite:///{to}"


@dataclass
class Whole:
    """The jobs with nothing in their way."""

    adapted: RunResult
    store: Path
    """A copy of the store after pretraining."""


SETTINGS = {"trainer.checkpoint_every_n_steps": 3, "monitor.final_model": "best", "monitor.metric": "iou/source_val"}


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    given = small_settings(squares, tracking__uri=f"sqlite:///{folder}/mlflow.db", tracking__folder=str(folder / "o"))
    config = load_config(None, given | SETTINGS)
    jobs.pretrain(config)
    copy_of_store(folder / "mlflow.db", folder / "pretrained.db")
    return Whole(jobs.adapt(config), folder / "pretrained.db")


class At(pl.Callback):
    """Does something before some steps (counted from 0)."""

    def __init__(self, **actions: Callable[[], Any]) -> None:
        self.actions = {int(name.removeprefix("step_")): action for name, action in actions.items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.actions.get(trainer.global_step, lambda: None)()


@dataclass
class Place:
    """A store, outputs, and the command line on them."""

    config: Config
    file: Path
    capsys: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture
    monkeypatch: pytest.MonkeyPatch

    @property
    def outputs(self) -> Path:
        return Path(self.config.tracking.folder)

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(tracking_uri=self.config.tracking.uri)

    def run(self, *words: str, callbacks: list[pl.Callback] | None = None) -> tuple[int, str]:
        """Exit code, and all that stands on the terminal."""
        with self.monkeypatch.context() as patch:
            patch.setattr(jobs, "adapt", functools.partial(jobs.adapt, callbacks=callbacks or []))
            self.file.write_text(config_to_yaml(self.config))
            code = main([words[0], *([] if "--resume" in words else ["--config", str(self.file)]), *words[1:]])
        told = self.caplog.text + "".join(self.capsys.readouterr())
        self.caplog.clear()
        assert "Traceback" not in told
        return code, " ".join(told.split())

    def resume(self) -> tuple[int, str]:
        where = ["--tracking.uri", str(self.config.tracking.uri), "--tracking.folder", str(self.outputs)]
        return self.run("adapt", "--resume", self.run_id, *where)

    @property
    def run_id(self) -> str:
        (run,) = self.client.search_runs(["1"], "tags.`dann.job` = 'adapt'")
        return run.info.run_id

    @property
    def status(self) -> str:
        return self.client.get_run(self.run_id).info.status

    def result(self) -> RunResult:
        run = self.client.get_run(self.run_id)
        artifacts = run.info.artifact_uri.removeprefix("file://")
        return RunResult("adapt", self.run_id, "1", str(self.config.tracking.uri), {}, {}, None, artifacts)


@pytest.fixture
def place(workplace, squares, whole, capsys, caplog, monkeypatch) -> Callable[..., Place]:
    def make(outputs: Path, store: Path = workplace, **more: object) -> Place:
        store.mkdir(exist_ok=True)
        uri = copy_of_store(whole.store, store / "mlflow.db")
        given = small_settings(squares, tracking__uri=uri, tracking__folder=str(outputs), **more)
        return Place(load_config(None, given | SETTINGS), workplace / "config.yaml", capsys, caplog, monkeypatch)

    return make


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many bytes."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def limit(size: int = resource.RLIM_INFINITY) -> None:
    """The kernel lets this process write no file beyond `size`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(params=["file size limit", "small disk"])
def fault(request, tmp_path, monkeypatch) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder for outputs, what makes its disk refuse large files, and what mends that."""
    if request.param == "file size limit":
        close = run._close

        def close_elsewhere(*arguments):  # the artifacts lie on another disk
            limit()
            return close(*arguments)

        monkeypatch.setattr(run, "_close", close_elsewhere)
        yield tmp_path / "outputs", lambda: limit(LIMIT), limit
        limit()
    else:
        disk = request.getfixturevalue("small_disk")(8 * CHECKPOINT)
        yield disk / "outputs", lambda: fill(disk), lambda: (disk / "filler").unlink(missing_ok=True)


def assert_same(place: Place, whole: Whole) -> None:
    """The run ended as if nothing had been in its way, each value of its history once."""
    assert place.status == "FINISHED"
    result = place.result()
    assert weights(result) == weights(whole.adapted)
    assert values(result) == values(whole.adapted)
    kept = Path(str(result.artifacts)) / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert files.read(kept / "last.ckpt")["global_step"] == 8
    tags = place.client.get_run(place.run_id).data.tags
    assert tags["dann.alignment"] == tags["mlflow.note.content"]


def test_a_disk_that_is_full_to_the_end_is_one_message_and_the_run_goes_on_to_the_same_weights(place, fault, whole):
    outputs, breaks, mends = fault
    here = place(outputs)
    code, told = here.run("adapt", callbacks=[At(step_5=breaks)])
    assert code == 2
    (error,) = told.split("Error: ")[1:]
    assert f"{outputs / here.run_id / 'model'} cannot be written: " in error
    assert "MB wanted" in error
    assert f"adapt --resume {here.run_id}" in error
    assert told.count("Training goes on without this checkpoint (the one of step 4 is kept)") == 1
    assert here.status == "FAILED"
    kept = Path(str(here.result().artifacts))
    assert not list(outputs.rglob("*.part"))
    assert not (kept / "model").exists()
    assert files.read(kept / "checkpoints" / "last.ckpt")["global_step"] == 4
    mends()
    assert here.resume()[0] == 0
    assert_same(here, whole)


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(place, fault, whole):
    outputs, breaks, mends = fault
    here = place(outputs)
    code, told = here.run("adapt", callbacks=[At(step_2=breaks, step_5=mends)])  # the first epoch's best weights wait
    assert code == 0
    assert told.count("Training goes on without this checkpoint") == 1
    assert told.count("checkpoints are saved again") == 1
    assert_same(here, whole)
