"""The study: trials are claimed once, counted once, put in again when a worker dies, and hidden from samplers if they are
references. Real storages: a journal file and sqlite."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from dann_experiments.config.parsing import load_settings
from dann_experiments.tracking.processes import live_process, process_name
from sweeps.sampling import build_pruner, build_sampler
from sweeps.settings import SweepConfig
from sweeps.space import Space, read_stored
from sweeps.study import AGAIN, Slot, Sweep, open_storage

SPACE: Space = read_stored(
    {
        "x": {"type": "float", "low": 0.0, "high": 1.0, "log": False, "step": None},
        "kind": {"type": "categorical", "choices": ["a", "b"]},
        "n": {"type": "int", "low": 1, "high": 64, "log": True, "step": 1},
    }
)


@pytest.fixture(params=["journal.log", "sqlite:///study.db"])
def address(request, workplace):
    return request.param


def new_study(address: str, slots: list[Slot]) -> Sweep:
    study = Sweep.create(open_storage(address), "s", maximizes=True)
    study.add(slots)
    return study


def claim_all(address: str, name: str, found) -> None:
    study, numbers = Sweep(open_storage(address), "s"), []
    while (trial := study.claim(name, name)) is not None:
        numbers.append(trial.number)
    found.put(numbers)


def test_each_trial_is_claimed_by_one_of_several_processes(address):
    new_study(address, [Slot("search", {})] * 20)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=claim_all, args=(address, f"w{n}", found)) for n in range(3)]
    for process in processes:
        process.start()
    numbers = [number for _ in processes for number in found.get(timeout=120)]
    for process in processes:
        process.join()
    assert sorted(numbers) == list(range(20))


def test_a_trial_whose_worker_died_is_run_once_more_with_its_values_and_counts_once(address):
    study = new_study(address, [Slot("search", {"trainer.max_epochs": 3})])
    first = study.claim("host:1:0", "t1")
    assert first is not None
    trial = optuna.Trial(study.for_sampling(optuna.samplers.RandomSampler(), build_pruner("none", 3)), first._trial_id)
    x = trial.suggest_float("x", 0, 1)
    assert study.give_back(first, "its worker died")
    assert not study.give_back(first, "found dead by another")
    study.put_in_again()
    assert [t.number for t in study.counted()] == [1]
    again = study.claim("host:2:0", "t2")
    assert again is not None
    assert again.system_attrs["fixed_params"] == {"x": x}
    assert (again.user_attrs["overrides"], again.user_attrs["retry_of"]) == ({"trainer.max_epochs": 3}, 0)
    assert study.give_back(again, "its worker died again")
    study.put_in_again()
    assert [(t.number, t.state) for t in study.counted()] == [(1, TrialState.FAIL)]
    assert not study.trials(TrialState.RUNNING, TrialState.WAITING)


def test_a_trial_that_was_stopped_is_always_put_in_again(address):
    study = new_study(address, [Slot("control", {}, reference=True)])
    for _ in range(4):
        trial = study.claim("host:1:0", "t")
        assert trial is not None
        study.give_back(trial, "stopped", stopped=True)
        study.put_in_again()
    assert [t.state for t in study.counted()] == [TrialState.WAITING]
    assert study.counted()[0].user_attrs["reference"] is True


def test_what_a_dead_process_did_not_put_in_again_is_put_in_once(address):
    study = new_study(address, [Slot("search", {})])
    trial = study.claim("host:1:0", "t")
    assert trial is not None
    assert study.give_back(trial, "its worker died")  # and here that process died as well
    assert [t.number for t in study.counted()] == [0]
    assert study.counts() == {"waiting": 1}
    for _ in range(2):
        study.put_in_again()
        assert [(t.number, t.user_attrs["attempt"]) for t in study.counted()] == [(1, 2)]


def test_a_trial_that_ends_while_it_is_given_back_counts_as_it_ended(address):
    study = new_study(address, [Slot("search", {})])
    trial = study.claim("host:1:0", "t")
    assert trial is not None
    study.note(trial, **{AGAIN: 2})  # another process is about to end it ...
    study.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5])  # ... but its worker is quicker
    assert not study.give_back(trial, "its heartbeat stopped")
    assert study.put_in_again() == 0
    assert [t.state for t in study.counted()] == [TrialState.COMPLETE]


def finish(study: Sweep, sampler, value: float | None = None) -> dict:
    slot = study.claim("host:1:0", "t")
    assert slot is not None
    trial = optuna.Trial(study.for_sampling(sampler, build_pruner("none", 3)), slot._trial_id)
    if slot.user_attrs["reference"]:
        trial.study.tell(trial, 0.9)
        return {}
    point = SPACE.suggest(trial)
    trial.study.tell(trial, point["x"] if value is None else value)
    return point


def sampler_for(name: str, number: int, seed: int = 0):
    return build_sampler(load_settings(SweepConfig, None, {"sampler": name, "sampler_seed": seed}), False, number, 12)


@pytest.mark.parametrize("name", ["tpe", "gp", "qmc", "random"])
def test_proposals_depend_on_seed_and_history_alone_not_on_references_or_the_process(name, workplace):
    pytest.importorskip("scipy")
    histories = {}
    for case, with_control in (("plain", False), ("with control", True), ("other seed", False)):
        # the first is a known point too, so that the numbers of the others agree
        slots = [
            Slot("control", {}, reference=True) if with_control else Slot("search", {}, {"x": 0.5, "kind": "a", "n": 8})
        ]
        study = new_study(f"{case}.log", slots + [Slot("search", {}) for _ in range(8)])
        points = [finish(study, sampler_for(name, number, 7 if case == "other seed" else 0)) for number in range(9)]
        histories[case] = points[1:]
    again = new_study("again.log", [Slot("control", {}, reference=True)] + [Slot("search", {}) for _ in range(8)])
    repeated = [finish(again, sampler_for(name, number)) for number in range(9)][1:]
    assert repeated == histories["with control"]
    assert len({tuple(point.items()) for point in repeated}) > 4
    assert histories["other seed"] != histories["plain"]


def test_samplers_never_see_a_reference(workplace):
    study = new_study("s.log", [Slot("control", {}, reference=True), Slot("search", {}), Slot("search", {})])
    for number in range(3):
        finish(study, sampler_for("tpe", number))
    seen = study.for_sampling(sampler_for("tpe", 0), build_pruner("median", 3))
    assert [trial.number for trial in seen.trials] == [1, 2]
    assert len(study.trials()) == 3
    best = study.best()
    assert best is not None
    assert best.number != 0  # though its value is the highest


def test_a_trial_that_runs_again_does_not_compete_with_itself(workplace):
    study = new_study("s.log", [Slot("recipe", {}), Slot("search", {})])
    finish(study, sampler_for("random", 0))
    slot = study.claim("host:1:0", "t")
    assert slot is not None
    assert study.give_back(slot, "killed")
    study.put_in_again()
    assert study.claim("host:1:0", "t") is not None
    seen = study.for_sampling(sampler_for("random", 2), build_pruner("halving", 6))
    assert [trial.number for trial in seen.trials] == [0, 2]


@pytest.mark.parametrize("name", ["median", "halving", "hyperband", "none"])
def test_pruners_judge_by_epochs(name, workplace):
    study = new_study("s.log", [Slot("search", {}) for _ in range(30)])
    pruned = 0
    for number in range(30):
        slot = study.claim("host:1:0", "t")
        assert slot is not None
        optuna_study = study.for_sampling(sampler_for("random", number), build_pruner(name, 9))
        trial = optuna.Trial(optuna_study, slot._trial_id)
        quality, epoch = (number * 7 % 10) / 10, 0
        for epoch in range(1, 10):
            trial.report(quality + epoch / 100, epoch)
            if epoch < 9 and trial.should_prune():
                optuna_study.tell(trial, state=TrialState.PRUNED)
                pruned += 1
                break
        else:
            optuna_study.tell(trial, quality)
    assert (pruned == 0) == (name == "none")


def test_a_process_is_known_by_its_start_too():
    assert live_process(process_name()) is not None
    host, pid, started = process_name().rsplit(":", 2)
    assert live_process(f"{host}:{pid}:{started}0") is None  # an earlier process of the same number
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    assert live_process(f"{host}:{ended.pid}:{started}") is None
    assert live_process(f"elsewhere:{os.getpid()}:{started}") is None
