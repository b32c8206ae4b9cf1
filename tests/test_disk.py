"""Disks that fill up or become read-only, stores that are locked, clocks that are put back: told, and nothing is lost or damaged.

Each fault is a real one. A small disk is a tmpfs, where this may be mounted (else the test is skipped); the same facts
are tested everywhere by a limit on the size of files, which the kernel refuses in the same way (EFBIG instead of ENOSPC).
"""

from __future__ import annotations

import contextlib
import functools
import resource
import sqlite3
import subprocess
import sys
import threading
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
from conftest import model_folder, small_settings
from test_resume import values, weights
from test_sender import Refusing

from dann_experiments import jobs
from dann_experiments.__main__ import main
from dann_experiments.checkpoints import files
from dann_experiments.config import Config, config_to_yaml, load_config
from dann_experiments.config.errors import InputError, NotWritten, StoreAway
from dann_experiments.jobs import RunResult
from dann_experiments.jobs.resume import checkpoint_to_go_on_from
from dann_experiments.tracking import run, sqlite
from dann_experiments.tracking.clock import Clock
from dann_experiments.tracking.fetch_model import fetched
from dann_experiments.tracking.notes import escaped
from dann_experiments.tracking.processes import live_process, process_name
from dann_experiments.tracking.sender import SPOOL, Sender
from dann_experiments.tracking.store import local_artifact_folder, open_store
from dann_experiments.training.checkpointing import _copied

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


SETTINGS = {
    "model.encoder_name": "resnet18",  # with checkpoints of 51 MB
    "trainer.checkpoint_every_n_steps": 3,
    "monitor.final_model": "best",
    "monitor.metric": "iou/source_val",
}


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


@pytest.fixture(params=["file size limit", pytest.param("small disk", marks=pytest.mark.slow)])
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
    assert tags["mlflow.note.content"].endswith(escaped(tags["dann.alignment"]))


@pytest.mark.slow
def test_a_disk_that_is_full_to_the_end_is_one_message_and_the_run_goes_on_to_the_same_weights(place, fault, whole):
    outputs, breaks, mends = fault
    here = place(outputs)
    code, told = here.run("adapt", callbacks=[At(step_5=breaks)])
    assert code == 2
    (error,) = told.split("Error: ")[1:]
    assert f"{outputs / here.run_id}/" in error
    assert "cannot be written: " in error
    assert "MB needed" in error or "0.0 MB free" in error
    assert f"adapt --resume {here.run_id}" in error
    assert told.count("Training continues without this checkpoint (the one of step 4 is kept)") == 1
    assert here.status == "FAILED"
    kept = Path(str(here.result().artifacts))
    assert not list(outputs.rglob("*.part"))
    with pytest.raises(StopIteration):
        model_folder(kept)
    assert files.read(kept / "checkpoints" / "last.ckpt")["global_step"] == 4
    mends()
    assert here.resume()[0] == 0
    assert_same(here, whole)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(place, fault, whole):
    outputs, breaks, mends = fault
    here = place(outputs)
    code, told = here.run("adapt", callbacks=[At(step_2=breaks, step_5=mends)])  # the first epoch's best weights wait
    assert code == 0
    assert told.count("Training continues without this checkpoint") == 1
    assert told.count("checkpoints are being saved again") == 1
    assert_same(here, whole)


@pytest.mark.slow
def test_outputs_and_store_on_one_full_disk_damage_neither(place, small_disk, whole, monkeypatch):
    monkeypatch.setattr("dann_experiments.tracking.sender.SEND_SECONDS", 0.0)  # so that the full store is asked
    monkeypatch.setattr("dann_experiments.tracking.sender.SPILL_SECONDS", 0.01)  # before the last checkpoint gives room
    disk = small_disk(8 * CHECKPOINT)
    here = place(disk / "outputs", disk / "store")

    def fill_between_transactions() -> None:
        # the journal of an open transaction would be deleted at its end, and leave room for the next one
        with closing(sqlite3.connect(disk / "store" / "mlflow.db", timeout=60, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            fill(disk)
            database.execute("ROLLBACK")

    code, told = here.run("adapt", callbacks=[At(step_5=fill_between_transactions)])
    assert code == 2
    assert told.count("Error: ") == 1
    assert f"adapt --resume {here.run_id}" in told
    assert "does not accept what is sent ((sqlite3.OperationalError) database or disk is full)" in told
    assert here.status == "FAILED"  # the checkpoint that is not the last one gave its place free
    (disk / "filler").unlink()
    with closing(sqlite3.connect(disk / "store" / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert here.resume()[0] == 0
    assert_same(here, whole)


def forget_this_process(here: Place) -> None:
    """The run was written by a process that has ended."""
    gone = process_name().rpartition(":")[0] + ":0-0"
    here.client.set_tag(here.run_id, "dann.process", gone)


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_keeps_its_checkpoint_and_the_run_goes_on_from_it(place, small_disk, whole):
    disk = small_disk(8 * CHECKPOINT)
    here = place(disk / "outputs")
    code, told = here.run("adapt", callbacks=[At(step_5=lambda: remount(disk, "ro"))])
    assert code == 2
    assert "does not accept what is sent" not in told
    assert "its disk is read-only" in told.partition("Error: ")[2]
    assert here.status == "FAILED"
    remount(disk, "rw")
    assert here.resume()[0] == 0
    assert_same(here, whole)


def test_a_folder_for_outputs_that_takes_nothing_is_told_before_a_run_is_made(place, workplace):
    (workplace / "file").touch()
    assert_refused_before_a_run(place(workplace / "outputs"), workplace / "file" / "outputs")


def test_a_read_only_disk_for_outputs_is_told_before_a_run_is_made(place, small_disk):
    disk = small_disk(CHECKPOINT)
    (disk / "outputs").mkdir()
    remount(disk, "ro")
    here = place(disk / "outputs")
    assert_refused_before_a_run(here, disk / "outputs")
    assert_refused_before_a_run(here, disk / "new")


def assert_refused_before_a_run(here: Place, folder: Path) -> None:
    code, told = here.run("adapt", "--tracking.folder", str(folder))
    assert code == 2
    assert f"Error: tracking.folder is '{folder}', which is not writable" in told
    assert not here.client.search_runs(["1"], "tags.`dann.job` = 'adapt'")


@pytest.mark.parametrize("how", ["file size limit", pytest.param("small disk", marks=pytest.mark.slow)])
def test_a_store_that_the_disk_has_no_room_for_is_made_when_there_is(request, workplace, how):
    if how == "small disk":
        disk = request.getfixturevalue("small_disk")(500_000)
        mend = functools.partial(remount, disk, "size=10m")
    else:
        disk, mend = workplace, limit
        limit(500_000)
    uri = f"sqlite:///{disk}/mlflow.db"
    try:
        with pytest.raises(InputError, match=r"tracking\.uri is 'sqlite:.*(disk is full|disk I/O error)"):
            open_store(uri, "x")
    finally:
        mend()
    assert open_store(uri, "x").experiment_id == "1"


def test_a_store_on_a_read_only_disk_is_told_by_its_folder(place, small_disk, workplace):
    disk = small_disk(10_000_000)
    here = place(workplace / "outputs", disk / "store")
    remount(disk, "ro")
    code, told = here.run("doctor")
    assert code == 2
    assert f"folder {disk / 'store'} cannot be written to" in told


def test_a_store_that_cannot_be_written_to_is_told_by_its_file_and_can_be_looked_at(place, workplace):
    """The limit stands in for a file that is read-only, which root may write all the same."""
    here = place(workplace / "outputs")
    limit(100)
    try:
        with pytest.raises(InputError, match=r"tracking\.uri is .*: .*mlflow\.db: "):
            open_store(here.config.tracking.uri, here.config.tracking.experiment)
    finally:
        limit()
    experiment = here.config.tracking.experiment
    assert open_store(here.config.tracking.uri, experiment, to_write=False).experiment_id == "1"


def test_a_store_that_is_no_database_is_told_by_its_file(workplace):
    (workplace / "notes.db").write_text("no database " * 1000)
    with pytest.raises(InputError, match=r"tracking\.uri is .*notes\.db: file is not a database"):
        open_store("sqlite:///notes.db", "x")


class Locking:
    """Another process that keeps a sqlite file locked."""

    def __init__(self, file: Path) -> None:
        script = (
            "import sqlite3, sys\n"
            f"connection = sqlite3.connect({str(file)!r}, timeout=60, isolation_level=None)\n"
            "connection.execute('BEGIN EXCLUSIVE')\nprint('locked', flush=True)\nsys.stdin.read()\n"
        )
        self._command = [sys.executable, "-c", script]

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "locked\n"

    def end(self) -> None:
        self._process.communicate()


def test_a_store_that_another_process_keeps_locked_is_told_by_its_file(place, workplace, monkeypatch):
    here = place(workplace / "outputs")
    monkeypatch.setattr(sqlite, "LOCKED_SECONDS", 0.2)
    locking = Locking(workplace / "mlflow.db")
    locking.start()
    try:
        with pytest.raises(StoreAway, match="kept"):
            open_store(here.config.tracking.uri, "x")
        code, told = here.run("runs")
        assert code == 2
        assert f"another process has kept {workplace / 'mlflow.db'} locked for 0.2 s" in told
    finally:
        locking.end()
    assert here.run("doctor")[0] == 0


@pytest.mark.slow
def test_a_store_that_is_locked_in_mid_training_gets_its_metrics_afterwards(place, workplace, whole):
    """Training waits for nobody: the lock ends at a step behind those in which it is held."""
    here, locking = place(workplace / "outputs"), Locking(workplace / "mlflow.db")
    code, _ = here.run("adapt", callbacks=[At(step_1=locking.start, step_7=locking.end)])
    assert code == 0
    assert_same(here, whole)


@pytest.mark.slow
def test_a_store_that_is_locked_to_the_end_gets_the_run_from_sync(place, workplace, whole, monkeypatch):
    here, locking = place(workplace / "outputs"), Locking(workplace / "mlflow.db")
    try:
        with monkeypatch.context() as patch:  # `sync` gives the store the time that it has
            patch.setattr("dann_experiments.tracking.sender.CLOSE_SECONDS", 0.0)
            code, told = here.run("adapt", callbacks=[At(step_7=locking.start)])
    finally:
        locking.end()
    assert code == 2
    assert "Error: the run ended well, but the tracking store did not accept all of its data" in told
    assert "dann_experiments sync --tracking.folder" in told
    forget_this_process(here)
    assert here.run("sync")[0] == 0
    assert_same(here, whole)


@pytest.mark.slow
def test_a_clock_that_is_put_back_in_mid_run_moves_nothing_back(place, workplace, whole, monkeypatch):
    here, real = place(workplace / "outputs"), time.time
    put_back = functools.partial(monkeypatch.setattr, time, "time", lambda: real() - 3600)
    code, _ = here.run("adapt", callbacks=[At(step_3=put_back)])
    monkeypatch.undo()
    assert code == 0
    assert_same(here, whole)
    info = here.client.get_run(here.run_id).info
    history = here.client.get_metric_history(here.run_id, "loss/train_total")
    times = [info.start_time, *(point.timestamp for point in history), info.end_time]
    assert [point.step for point in history] == list(range(8))
    assert times == sorted(times)
    assert times[-1] - times[0] < 600_000


def test_the_clock_of_a_run_never_goes_back_and_passes_as_time_does(monkeypatch):
    wall, passed = 1000.0, 0.0
    monkeypatch.setattr(time, "time", lambda: wall)
    monkeypatch.setattr(time, "monotonic", lambda: passed)
    clock = Clock(not_before=1_002_000)
    assert clock.now() == 1_002_000  # the run began where the clock was ahead
    wall, passed = 1010.0, 5.0
    assert clock.now() == 1_010_000
    wall, passed = -2590.0, 6.0
    assert clock.now() == 1_011_000
    wall, passed = -2580.0, 16.0
    assert clock.now() == 1_021_000


def test_a_living_process_is_known_as_such_where_the_clock_was_put_back(monkeypatch):
    """On Linux psutil takes the time of day at which the kernel says that it booted, which moves with the clock."""
    import psutil

    name = process_name()
    platform = getattr(psutil, "_psplatform")  # noqa: B009
    booted = platform.boot_time()
    monkeypatch.setattr(platform, "boot_time", lambda: booted - 3600)
    assert live_process(name) is not None
    assert process_name() == name


def test_a_checkpoint_that_finds_no_room_leaves_the_one_of_the_same_name_as_it_was(tmp_path):
    path = tmp_path / "step_1.ckpt"
    files.write({"a": torch.zeros(10)}, path)
    limit(50_000)
    try:
        with pytest.raises(NotWritten, match=r"step_1\.ckpt cannot be written: .*4\.0 MB needed"):
            files.write({"a": torch.ones(1_000_000)}, path)
    finally:
        limit()
    assert torch.equal(files.read(path)["a"], torch.zeros(10))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step_1.ckpt", "step_1.ckpt.blake2b"]


def test_checkpoints_that_could_be_fetched_by_half_alone_are_fetched_again(place, workplace, tmp_path):
    """Half of them would be taken for all that there are, and the run would start from its beginning."""
    here = place(workplace / "outputs")
    store = open_store(here.config.tracking.uri, here.config.tracking.experiment)
    run_id = store.client.create_run(store.experiment_id).info.run_id
    kept = tmp_path / "kept" / "checkpoints"
    files.write({"global_step": 3, "a": torch.zeros(1_000_000)}, kept / "step_3.ckpt")
    store.client.log_artifacts(run_id, str(tmp_path / "kept"))
    limit(1_000_000)
    try:
        with pytest.raises(InputError, match=f"the checkpoints of run {run_id} cannot be copied"):
            checkpoint_to_go_on_from(store, run_id, here.outputs / run_id)
    finally:
        limit()
    assert not list((here.outputs / run_id).iterdir())
    found = checkpoint_to_go_on_from(store, run_id, here.outputs / run_id)
    assert found == here.outputs / run_id / "checkpoints" / "step_3.ckpt"
    assert [path.name for path in (here.outputs / run_id).iterdir()] == ["checkpoints"]


def test_artifacts_that_have_no_room_are_not_copied(place, workplace):
    here = place(workplace / "outputs")
    store = open_store(here.config.tracking.uri, here.config.tracking.experiment)
    run_id = store.client.create_run(store.experiment_id).info.run_id
    model = local_artifact_folder(store, run_id) / "model"
    model.mkdir(parents=True)
    with open(model / "model.safetensors", "wb") as file:
        file.truncate(2**43)  # 8.8 TB that take no place
    limit(LIMIT)  # should it be copied all the same
    try:
        with (
            pytest.raises(NotWritten, match=r"no room in .*: 8796093\.0 MB needed.*TMPDIR"),
            fetched(f"runs:/{run_id}", store),
        ):
            pass
    finally:
        limit()


class Hanging:
    """A store that answers when it is let."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()
        self.steps: list[int] = []

    def log_batch(self, run_id, metrics):
        self.asked.set()
        assert self.may_answer.wait(60)
        self.steps += [metric.step for metric in metrics]

    def set_terminated(self, run_id, status, end_time):
        pass


def test_training_waits_neither_for_a_store_that_hangs_nor_for_a_spool_that_cannot_be_written(tmp_path):
    (tmp_path / "run").touch()  # no folder
    store = Hanging()
    sender = Sender(store, "r", tmp_path / "run")
    sender.put({"a": 0.0}, 0)
    store.asked.wait()
    for step in range(1, 5):
        sender.put({"a": step}, step)
        with pytest.raises(NotWritten, match=SPOOL):
            sender.persist()  # it would never return, if it waited for the store
    store.may_answer.set()
    assert sender.close("FINISHED")
    assert store.steps == list(range(5))


def test_metrics_that_neither_the_store_nor_the_folder_takes_are_told_as_lost(tmp_path, monkeypatch, caplog):
    (tmp_path / "run").touch()  # no folder
    monkeypatch.setattr("dann_experiments.tracking.sender.CLOSE_SECONDS", 0.0)
    sender = Sender(Refusing(float("inf")), "r", tmp_path / "run")
    sender.put({"a": 1.0, "b": 2.0}, 0)
    assert not sender.close("FINISHED")
    assert "2 of these metrics are lost" in caplog.text
    assert caplog.text.count("Metrics are kept in memory") == 1


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon", "MLFLOW_HTTP_REQUEST_TIMEOUT is 'soon', which MLflow cannot read"),
        ("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "x", "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE is 'x', which MLflow cannot read"),
        ("MLFLOW_TRACKING_URI", "nonsense", "Error: MLFLOW_TRACKING_URI is 'nonsense'; give sqlite:///FILE"),
    ],
)
def test_a_wrong_variable_of_mlflow_is_told_by_its_name(workplace, monkeypatch, capsys, variable, value, message):
    monkeypatch.setenv(variable, value)
    assert main(["runs"]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_wait_for_the_disk_are_copies_nested_states_too():
    """A companion's teacher is an extra state: a dictionary of tensors and other values."""
    weight, teacher = torch.zeros(2), {"weights": {"a": torch.zeros(2)}, "steps": 3, "kinds": [torch.zeros(1), "x"]}
    kept = _copied({"network.a": weight, "method._extra_state": teacher})
    weight += 1
    teacher["weights"]["a"] += 1
    assert kept["network.a"].tolist() == [0, 0]
    assert kept["method._extra_state"]["weights"]["a"].tolist() == [0, 0]
    assert (kept["method._extra_state"]["steps"], kept["method._extra_state"]["kinds"][1]) == (3, "x")
