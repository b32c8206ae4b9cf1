"""The worker pool, on this machine and on a real Ray cluster: what it reports of tasks that end, fail, die and are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dann_experiments.config import InputError
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import load_settings
from dann_experiments.workers.local import LocalPool
from dann_experiments.workers.pool import ATTEMPTS, Pool, open_pool

PROJECT = Path(__file__).parents[1]


def act(task: tuple[str, str]) -> Any:
    """What the workers of these tests do: the first word of the task, with the second as its argument."""
    what, argument = task
    if what == "say":
        return argument, os.getpid(), os.getcwd(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if what == "refuse":
        raise InputError(argument)
    if what == "fail":
        raise Unsendable(argument, "too bad")
    if what == "die once" and Path(argument).exists():
        return "lives"
    Path(argument).write_text(str(os.getpid()))
    if what == "sleep":
        time.sleep(100)
    if what == "die with a child":  # as data loading processes do, it holds the worker's connection open for a while
        Path(argument).write_text(str(os.fork() or time.sleep(20) or os._exit(0)))
    return os.kill(os.getpid(), signal.SIGKILL)


class Unsendable(Exception):
    """Cannot be unpickled, as many libraries' errors."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


@pytest.fixture(params=["processes", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.long])])
def pool(request: pytest.FixtureRequest, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A pool of two workers."""
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"workers": 2, "launcher": request.param}
        if request.param == "ray":
            pytest.importorskip("ray")
            from ray.cluster_utils import Cluster

            monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]))
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
            stack.callback(cluster.shutdown)
            settings["ray_address"] = cluster.address
        pool = stack.enter_context(open_pool(act, load_settings(CompareConfig, None, settings), "cpu"))
        pool.logs = workplace / "logs"
        yield pool


def until_written(path: Path) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if path.read_text():
                return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"nobody wrote {path}")


def test_tasks_end_with_a_result_an_error_in_one_line_or_a_death_and_those_that_died_can_run_again(pool, workplace):
    tasks = {
        1: ("say", "one"), 2: ("fail", "http://me:hidden-word@host/x"), 3: ("die once", str(workplace / "3")),
        4: ("die", str(workplace / "4")), 5: ("refuse", "mend this."),
    }  # fmt: skip
    ended: dict[Any, Any] = {}
    deaths: list[tuple[Any, int]] = []
    for one in pool.run(lambda: ((k, task) for k, task in tasks.items() if k not in ended and k not in pool.running)):
        assert len(pool.running) < pool.count
        if one.death is not None:
            deaths.append((one.key, one.deaths))
        if one.death is None or one.deaths == ATTEMPTS:
            ended[one.key] = one
    assert sorted(deaths) == [(3, 1), (4, 1), (4, 2)]
    said, process, folder, _ = ended[1].result
    assert (said, folder) == ("one", str(workplace))
    assert process != os.getpid()
    assert ended[2].error.startswith("Unsendable: http://")
    assert ended[2].error.endswith("host/x too bad")
    assert "hidden-word" not in ended[2].error
    assert ended[5].error == "mend this."
    assert ended[3].result == "lives"
    assert "SIGKILL" in ended[4].death or "died" in ended[4].death
    assert [ended[key].death for key in (1, 2, 3, 5)] == [None] * 4
    if isinstance(pool, LocalPool):
        printed = "".join(path.read_text() for path in (workplace / "logs").glob("worker-*.log"))
        assert "Unsendable" in printed
        assert "hidden-word" not in printed


def test_a_pool_that_is_stopped_ends_its_workers_and_names_the_tasks_that_were_running(pool, workplace):
    pool.submit("a", ("sleep", str(workplace / "a")))
    pool.submit("b", ("say", "b"))
    assert [ended.key for ended in pool.wait(120)] == ["b"]
    process = psutil.Process(int(until_written(workplace / "a")))
    assert pool.wait(0.0) == []
    assert pool.stop() == ["a"]
    assert pool.running == []
    if isinstance(pool, LocalPool):
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    else:  # Ray's process goes on to other tasks
        assert pool.wait(0.0) == []


def test_a_worker_that_is_killed_is_noticed_at_once_though_its_children_live(workplace):
    pool = LocalPool(act, 1, 1, [])
    with contextlib.closing(pool):
        pool.submit("a", ("die with a child", str(workplace / "a")))
        began = time.monotonic()
        assert [(ended.key, ended.death is not None) for ended in pool.run(list)] == [("a", True)]
        until_written(workplace / "a")
        assert time.monotonic() - began < 19


def test_workers_are_used_again_and_spread_over_the_gpus(workplace):
    pool = LocalPool(act, 4, 1, ["3", "5"])
    with contextlib.closing(pool):
        found = []
        for _ in range(2):
            for key in "abcd":
                pool.submit(key, ("say", key))
            found.append({ended.result[1]: ended.result[3] for ended in pool.run(list)})
        assert sorted(found[0].values()) == ["3", "3", "5", "5"]
        assert found[0] == found[1]


def test_a_gpu_of_a_worker_that_died_is_free_for_the_next(workplace):
    pool = LocalPool(act, 2, 1, ["3", "5"])
    with contextlib.closing(pool):
        pool.submit("a", ("die", str(workplace / "a")))
        pool.submit("b", ("sleep", str(workplace / "b")))
        assert [ended.key for ended in pool.wait()] == ["a"]
        pool.submit("c", ("say", "c"))
        assert [ended.result[3] for ended in pool.wait()] == ["3"]


DRIVER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_workers import act
from dann_experiments.workers.local import LocalPool
if __name__ == "__main__":
    pool = LocalPool(act, 1, 1, [])
    pool.submit("a", ("sleep", "a"))
    pool.wait()
"""


@pytest.mark.slow
def test_workers_end_when_their_driver_is_killed(workplace):
    (workplace / "driver.py").write_text(DRIVER.format(tests=str(PROJECT / "tests")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    driver = subprocess.Popen([sys.executable, "driver.py"], env=environment, cwd=workplace)
    worker = psutil.Process(int(until_written(workplace / "a")))
    driver.kill()
    driver.wait()
    worker.wait(60)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ray_address": "10.0.0.1:6379"}, "ray_address has no effect with launcher: processes"),
        ({"cpus_per_trial": 2}, "cpus_per_trial has no effect with launcher: processes"),
        ({"launcher": "ray", "cpus_per_trial": 0}, "cpus_per_trial is 0.0; give a number above 0"),
        ({"launcher": "ray", "gpus_per_trial": -1}, "gpus_per_trial is -1.0; give a number from 0"),
        ({"gpus_per_trial": 2}, "gpus_per_trial is 2.0 with launcher: processes"),
        ({"launcher": "slurm"}, "launcher"),
    ],
)
def test_settings_that_no_pool_can_have_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load_settings(CompareConfig, None, settings)
