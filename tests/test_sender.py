"""Nothing that a run logs is lost: the spool, the sender, `sync` and `doctor`, with real stores and processes that are killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from test_sweeps import until
from test_tracking import clean_environment

from dann_experiments.__main__ import main
from dann_experiments.tracking.processes import process_name
from dann_experiments.tracking.run import END, NotStored, RunLogger, tracked_run
from dann_experiments.tracking.sender import SPOOL, Sender
from dann_experiments.tracking.spool import Point, Spool
from dann_experiments.tracking.store import Store, open_store


def points(*steps: int, name: str = "a") -> list[Point]:
    return [Point(name, float(step), 1000 + step, step) for step in steps]


def test_a_spool_gives_points_in_order_until_they_are_acknowledged_and_then_its_file_is_gone(tmp_path):
    spool = Spool(tmp_path / "run" / "s.jsonl")
    spool.append(points(0, 1, 2))
    assert spool.next(2) == spool.next(2) == points(0, 1)
    spool.acknowledge(2)
    spool.append(points(3))
    assert spool.next(9) == points(2, 3)
    assert Spool(tmp_path / "run" / "s.jsonl").next(9) == points(
        0, 1, 2, 3
    )  # of a process that did not hear the answer
    spool.acknowledge(2)
    assert spool.next(9) == []
    assert not (tmp_path / "run" / "s.jsonl").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-320, 0.1 + 0.2])
def test_a_spool_gives_every_number_back_as_it_was(tmp_path, value):
    Spool(tmp_path / "s").append([Point("größe/x", value, 1, 2)])
    (found,) = Spool(tmp_path / "s").next(1)
    assert (found.name, repr(found.value), found.timestamp, found.step) == ("größe/x", repr(value), 1, 2)


@pytest.mark.parametrize("torn", [b'{"key": "a", "val', b"\xff\xfe", b'{"key": "a"}', b"[]", b'"a"', b"{}"])
def test_a_line_that_a_killed_writer_left_half_done_is_left_out_and_no_other(tmp_path, torn):
    Spool(tmp_path / "s").append(points(0))
    with open(tmp_path / "s", "ab") as file:
        file.write(torn)
    spool = Spool(tmp_path / "s")
    spool.append(points(1))
    assert spool.left == 2
    assert spool.next(9) == points(0, 1)
    spool.acknowledge(2)
    assert not (tmp_path / "s").exists()


def test_an_append_that_finds_no_room_leaves_the_file_as_it_was(tmp_path):
    """A real limit of the process: the kernel writes the part that fits and refuses the rest."""

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        spool = Spool(tmp_path / "s")
        spool.append([Point("a", 0.0, 1, 0)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError):
            spool.append([Point("b", float(step), 1, step) for step in range(1000)])
        spool.append([Point("c", 1.0, 1, 1)])

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [point.name for point in Spool(tmp_path / "s").next(2000)] == ["a", "c"]


class Refusing:
    """A store that refuses requests while it is away: the sender must keep what was not acknowledged."""

    def __init__(self, refusals: float = 0) -> None:
        self.refusals = refusals
        self.requests: list[int] = []
        self.taken: list[tuple[str, float, int]] = []
        self.tags: dict[str, str] = {}
        self.files: list[tuple[str, str | None]] = []
        self.end: str | None = None

    def _answer(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("away")

    def log_batch(self, run_id, metrics=(), tags=()):
        self._answer()
        self.tags |= {tag.key: tag.value for tag in tags}
        if not metrics:
            return
        self.requests.append(len(metrics))
        self.taken += [(metric.key, metric.value, metric.step) for metric in metrics]

    def log_artifact(self, run_id, path, inside):
        self._answer()
        self.files.append((Path(path).name, inside))

    def set_terminated(self, run_id, status, end_time):
        self._answer()
        assert not self.end
        self.end = status


@pytest.mark.parametrize("memory", [20_000, 50])
def test_the_sender_keeps_order_sends_at_most_1000_and_drops_nothing_while_the_store_is_away(
    tmp_path, monkeypatch, memory
):
    monkeypatch.setattr("dann_experiments.tracking.sender.MOST_IN_MEMORY", memory)
    store = Refusing(refusals=3)
    sender = Sender(store, "r", tmp_path)
    for step in range(700):
        sender.put({"a": step, "b": torch.tensor(-step)}, step)
    (tmp_path / "figures").mkdir()
    for path in (tmp_path / "config.yaml", tmp_path / "figures" / "f.png"):
        path.write_text("x")
        sender.put_file(path)
    assert sender.close("FINISHED")
    assert store.taken == [
        (name, float(sign * step), step) for step in range(700) for name, sign in (("a", 1), ("b", -1))
    ]
    assert max(store.requests) <= 1000
    assert len(store.requests) < 20
    assert (store.files, store.end) == ([("config.yaml", None), ("f.png", "figures")], "FINISHED")
    assert not (tmp_path / SPOOL).exists()


def test_tags_and_files_do_not_wait_for_metrics_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dann_experiments.tracking.sender.SPILL_SECONDS", 0.01)
    monkeypatch.setattr("dann_experiments.tracking.sender.SEND_SECONDS", 0.0)
    store = Refusing()
    sender = Sender(store, "r", tmp_path)
    (tmp_path / "config.yaml").write_text("x")
    sender.put_file(tmp_path / "config.yaml")
    sender.put_tags({"a": "1"})
    steps = itertools.count()

    def both_sent_while_metrics_come() -> bool:
        sender.put({"loss": 1.0}, next(steps))
        return bool(store.tags and store.files)

    until(both_sent_while_metrics_come, pause=0.001)
    assert (store.tags, store.files, store.end) == ({"a": "1"}, [("config.yaml", None)], None)
    assert sender.close("FINISHED")


def test_between_two_sends_metrics_stand_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dann_experiments.tracking.sender.SPILL_SECONDS", 0.01)
    monkeypatch.setattr("dann_experiments.tracking.sender.SEND_SECONDS", math.inf)
    store, spool = Refusing(), Spool(tmp_path / SPOOL)
    sender = Sender(store, "r", tmp_path)
    sender.put({"loss": 1.0}, 0)
    until(lambda: store.taken, pause=0.001)  # the first of a run go at once
    asked = len(store.requests)
    for step in (1, 2):
        sender.put({"loss": 1.0}, step)
        written = list(range(1, step + 1))
        until(lambda steps=written: [point.step for point in spool.waiting()] == steps, pause=0.001)
    assert len(store.requests) == asked
    for step in range(3, 1001):
        sender.put({"loss": 1.0}, step)
    until(lambda: len(store.taken) == 1001, pause=0.001)  # a full request waits for nobody
    assert len(store.requests) == asked + 1
    assert sender.close("FINISHED")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the file of a handle is read from /proc")
def test_persist_brings_to_the_disk_what_the_sending_thread_has_spilled_before(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    sender = Sender(Refusing(refusals=math.inf), "r", tmp_path)
    sender.put({"loss": 1.0}, 0)
    while not sender.refusal:  # then it stands in the file, and nothing waits in memory
        time.sleep(0.01)
    assert not synced
    sender.persist()
    assert synced == [str(tmp_path / SPOOL)]
    monkeypatch.setattr("dann_experiments.tracking.sender.CLOSE_SECONDS", 0.0)
    sender.close("FINISHED")


def test_many_threads_may_log_at_once(tmp_path):
    store = Refusing(refusals=1)
    sender = Sender(store, "r", tmp_path)

    def log_some(name: str) -> None:
        for step in range(500):
            sender.put({name: step}, step)
            if step % 50 == 0:
                sender.persist()

    threads = [threading.Thread(target=log_some, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sender.close("FINISHED")
    for name in "abcd":
        assert [step for key, _, step in store.taken if key == name] == list(range(500))


def test_what_was_persisted_outlives_a_process_that_is_killed_at_once(tmp_path):
    def killed() -> None:
        sender = Sender(Refusing(math.inf), "r", tmp_path)
        for step in range(3000):
            sender.put({"a": step}, step)
        sender.persist()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [point.step for point in Spool(tmp_path / SPOOL).next(5000)] == list(range(3000))


def test_a_resumed_sender_sends_what_the_killed_one_left_and_no_step_twice(tmp_path):
    Spool(tmp_path / SPOOL).append(points(5, 6))
    store = Refusing()
    sender = Sender(store, "r", tmp_path, already=[*points(3, 4), *points(9, name="c")])
    for step in range(4, 9):  # from its checkpoint on
        sender.put({"a": step, "b": step, "c": step}, step)
    assert sender.close("FINISHED")
    assert sorted(store.taken) == sorted(
        [("a", float(step), step) for step in (5, 6, 7, 8)] + [("b", float(step), step) for step in range(4, 9)]
    )


def test_values_beside_others_of_their_step_are_sent_unless_the_store_has_both(tmp_path):
    """The scores of the best weights stand beside those of the last; `a` was killed between the two, `b` behind them."""
    Spool(tmp_path / SPOOL).append([Point("b", 0.5, 2, 8)])
    store = Refusing()
    sender = Sender(store, "r", tmp_path, already=[Point("a", 0.0, 1, 8), Point("b", 0.0, 1, 8), Point("b", 0.5, 2, 8)])
    sender.put({"a": 0.0, "b": 0.0, "c": 0.0}, 8)
    sender.put({"a": 0.5, "b": 0.5, "c": 0.5}, 8, again=True)
    assert sender.close("FINISHED")
    assert sorted(store.taken) == [("a", 0.5, 8), ("b", 0.5, 8), ("c", 0.0, 8), ("c", 0.5, 8)]


def test_tags_wait_for_a_store_that_is_away_and_outlive_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("dann_experiments.tracking.sender.CLOSE_SECONDS", 0.0)
    away = Sender(Refusing(float("inf")), "r", tmp_path)
    away.put_tags({"a": "1", "b": "größe"})
    away.put_tags({"a": "2"})
    assert not away.close("FINISHED")
    monkeypatch.undo()
    store = Refusing(refusals=1)
    assert Sender(store, "r", tmp_path).close("FINISHED")
    assert (store.tags, store.end) == ({"a": "2", "b": "größe"}, "FINISHED")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[Store]:
    """One store for all, as a new one takes seconds; its folder is the current one."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kept")
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield open_store(None, "kept")


@pytest.fixture(autouse=True)
def _nothing_left(request) -> Iterator[None]:
    """Each test finds no folder of another."""
    yield
    if "store" in request.fixturenames:
        shutil.rmtree("outputs", ignore_errors=True)


def run_that_ends_while_the_store_is_away(store: Store, monkeypatch) -> None:
    with tracked_run(store, None, "kept", {"dann.job": "adapt"}, Path("outputs"), use_claimed=False) as run:
        for name in ("log_batch", "log_artifact", "set_terminated"):
            monkeypatch.setattr(store.client, name, Refusing(float("inf"))._answer)
        monkeypatch.setattr("dann_experiments.tracking.sender.CLOSE_SECONDS", 0.0)  # gives up at once
        run.log_metrics({"loss": 0.5}, step=3)
        RunLogger(run).set_tag("dann.forgotten", "true")
        run.set_tags({"dann.alignment": "seen"})
        (run.folder / "figures").mkdir()
        (run.folder / "figures" / "f.txt").write_text("seen")


def test_while_a_run_is_open_its_sender_gives_way_to_training_within_microseconds(store):
    before = sys.getswitchinterval()
    with tracked_run(store, None, "kept", {}, Path("outputs"), use_claimed=False):
        within = sys.getswitchinterval()
    assert (within, before) == (pytest.approx(1e-5), pytest.approx(sys.getswitchinterval()))
    assert within < before


def test_a_run_that_ends_while_the_store_is_away_is_whole_after_sync(store, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(NotStored, match="sync"):
        run_that_ends_while_the_store_is_away(store, patch)
    (run_id,) = (path.name for path in Path("outputs").iterdir())
    end = json.loads((Path("outputs") / run_id / END).read_text())
    assert store.client.get_run(run_id).info.status == "RUNNING"
    # of a process that lives, this one, its folder is left alone
    assert main(["sync"]) == 1
    assert "is being written" in capsys.readouterr().out
    machine, _, started = process_name().rsplit(":", 2)
    store.client.set_tag(run_id, "dann.process", f"{machine}:{2**22 + 1}:{started}")
    assert main(["sync", "--tracking.uri", store.uri]) == 0
    run = store.client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", end["end_time"])
    assert [(point.step, point.value) for point in store.client.get_metric_history(run_id, "loss")] == [(3, 0.5)]
    assert [item.path for item in store.client.list_artifacts(run_id)] == ["figures"]
    assert [item.path for item in store.client.list_artifacts(run_id, "figures")] == ["figures/f.txt"]
    assert (run.data.tags["dann.forgotten"], run.data.tags["dann.alignment"]) == ("true", "seen")
    assert not (Path("outputs") / run_id).exists()
    assert main(["sync"]) == 0
    assert "Nothing was left" in capsys.readouterr().out


def test_doctor_closes_the_run_of_a_killed_process_and_sync_sends_what_it_left(store, capsys):
    def killed() -> None:
        with tracked_run(open_store(None, "other"), None, "killed", {}, Path("outputs"), use_claimed=False) as run:
            run.log_metrics({"loss": 0.25}, step=1)
            run.persist()
            (run.folder / "notes.txt").write_text("seen")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (run_id,) = (path.name for path in Path("outputs").iterdir())
    assert store.client.get_run(run_id).info.status == "RUNNING"
    with tracked_run(store, None, "alive", {}, Path("outputs"), use_claimed=False) as run:
        assert main(["doctor"]) == 0
        told = capsys.readouterr().out
        assert f"{run_id}: its process is gone; closed as KILLED" in told
        assert "1 runs closed, 1 are really running" in told
        assert store.client.get_run(run.run_id).info.status == "RUNNING"
    assert store.client.get_run(run_id).info.status == "KILLED"
    assert main(["sync"]) == 0
    assert [point.value for point in store.client.get_metric_history(run_id, "loss")] == [0.25]
    assert [item.path for item in store.client.list_artifacts(run_id)] == ["notes.txt"]
    assert store.client.get_run(run_id).info.status == "KILLED"


def test_sync_names_a_folder_that_is_none_and_runs_of_another_store(store, capsys):
    assert main(["sync"]) == 2
    assert "tracking.folder is 'outputs'" in capsys.readouterr().err
    Path("outputs", "0" * 32).mkdir(parents=True)
    Path("outputs", "maps").mkdir()  # of somebody else
    assert main(["sync"]) == 1
    told = capsys.readouterr().out
    assert "is not a run of this store" in told
    assert "maps" not in told


def test_a_run_that_is_opened_again_is_the_same_run_and_the_claimed_one_says_so(store, monkeypatch):
    with (
        contextlib.suppress(ZeroDivisionError),
        tracked_run(store, None, "x", {}, Path("outputs"), use_claimed=False) as run,
    ):
        run.log_metrics({"loss": 1.0}, step=7)
        raise ZeroDivisionError
    claimed = store.client.create_run(store.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", claimed)
    again = open_store(None, "kept")
    with tracked_run(again, None, "x", {"seed": 1}, Path("outputs"), use_claimed=True, resume=run.run_id) as resumed:
        assert (resumed.run_id, resumed.resumed) == (run.run_id, True)
        assert store.client.get_run(run.run_id).info.status == "RUNNING"
        resumed.log_metrics({"loss": 2.0}, step=7)
        resumed.log_metrics({"loss": 3.0}, step=8)
    history = store.client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(7, 1.0), (8, 3.0)]
    assert store.client.get_run(run.run_id).info.status == "FINISHED"
    empty = store.client.get_run(claimed)
    assert (empty.info.status, empty.data.tags["dann.resumed_run_id"]) == ("FINISHED", run.run_id)


class Interrupted:
    """A file that a signal interrupts while torch writes to it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.writes = 0

    def write(self, data: bytes) -> int:
        self.writes += 1
        if self.writes == 2:
            os.kill(os.getpid(), self.signum)
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("signum", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_a_checkpoint_is_written_kills_the_run(store, signum, kind):
    """torch's writer, left by the signal, raises an error of its own in its place."""
    with (
        pytest.raises(kind) as ended,
        tracked_run(store, None, "x", {}, Path("outputs"), use_claimed=False) as run,
    ):
        torch.save({"weights": torch.zeros(1000)}, Interrupted(signum))  # pyright: ignore[reportArgumentType]
    assert kind is KeyboardInterrupt or ended.value.code == 143
    ended = store.client.get_run(run.run_id)
    assert (ended.info.status, ended.data.tags["dann.killed_by"]) == ("KILLED", signal.Signals(signum).name)
    assert not [item.path for item in store.client.list_artifacts(run.run_id)]
    with tracked_run(store, None, "x", {}, Path("outputs"), use_claimed=False, resume=run.run_id):
        assert "dann.killed_by" not in store.client.get_run(run.run_id).data.tags


def test_a_signal_while_a_failed_run_is_closed_leaves_it_failed(store, monkeypatch):
    close = Sender.close

    def interrupted(sender: Sender, *ending) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return close(sender, *ending)

    monkeypatch.setattr(Sender, "close", interrupted)
    with (
        pytest.raises(ZeroDivisionError),
        tracked_run(store, None, "x", {}, Path("outputs"), use_claimed=False) as run,
    ):
        raise ZeroDivisionError
    assert store.client.get_run(run.run_id).info.status == "FAILED"
    assert [item.path for item in store.client.list_artifacts(run.run_id)] == ["traceback.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_mlflow_run_ends_its_child_and_the_run_says_that_it_was_killed(workplace, signum):
    """A project whose command runs for ever in a tracked run, and says that it does."""
    project = workplace / "project"
    project.mkdir()
    (project / "MLproject").write_text("name: p\nentry_points: {main: {command: python work.py}}\n")
    (project / "work.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from dann_experiments.tracking.run import tracked_run\n"
        "from dann_experiments.tracking.store import open_store\n"
        "with tracked_run(open_store(None, 'x'), None, 'x', {}, Path('out'), use_claimed=True) as run:\n"
        "    print('works', os.getpid(), run.run_id, flush=True)\n"
        "    while True: time.sleep(0.1)\n"
    )
    command = [sys.executable, "-m", "mlflow", "run", str(project), "--env-manager", "local"]
    process = subprocess.Popen(
        command, env=clean_environment(workplace), cwd=workplace, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout is not None
    told = next(line for line in process.stdout if line.startswith("works")).split()
    process.send_signal(signum)
    process.stdout.read()  # to its end: the child holds it open as long as it lives
    process.wait()
    with contextlib.suppress(psutil.NoSuchProcess):  # after the end of what it writes, a moment passes
        child = psutil.Process(int(told[1]))
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
    run = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db").get_run(told[2])
    assert run.data.tags["dann.killed_by"] in ("SIGTERM", signum.name)
    assert run.info.status in ("KILLED", "FAILED")  # the latter where `mlflow run` has ended it once more
