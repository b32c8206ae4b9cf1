"""What a sweep does about what went wrong: half-made studies, dead workers, open runs, failed confirmations. No training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from conftest import small_settings
from optuna.trial import TrialState

from dann_experiments import DomainAdaptationMethod, InputError, load_config
from dann_experiments.config import replace
from dann_experiments.config.parsing import load_settings
from dann_experiments.tracking.processes import process_name
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import open_store
from dann_experiments.workers.pool import Ended, Key, Pool, refuse_unshared
from sweeps.cleanup import close_runs
from sweeps.confirm import _Contest
from sweeps.definition import (
    describe,
    missing_slots,
    parts_of_run,
    refuse_changes,
    slots_of,
    stored_settings,
)
from sweeps.driver import only_driver
from sweeps.errors import SweepFailed
from sweeps.objective import _reason
from sweeps.sampling import PARTS
from sweeps.scheduler import run_trials
from sweeps.settings import SweepConfig
from sweeps.space import read_space
from sweeps.study import DEFINITION, SOURCE_ONLY, SWEEP_RUNS, Slot, Sweep, open_storage, superseded
from sweeps.worker import Task, work

METHOD = "domain_adaptation.method"
GAMMA = f"{METHOD}.lambda_schedule.gamma"
SPACE = {GAMMA: {"type": "float", "low": 1, "high": 20}}
BASE = load_config(None, small_settings(Path("nowhere")))


def new_study(n_trials: int = 5, **settings: object) -> tuple[Sweep, SweepConfig]:
    """A study as `run` makes it, in a journal file of the current folder."""
    sweep = load_settings(SweepConfig, None, {"space": SPACE, "study": "s", "n_trials": n_trials, **settings})
    space = read_space(sweep.space, BASE)
    study = Sweep.create(open_storage("journal.log"), "s", sweep.maximizes)
    slots = slots_of(sweep, space, BASE)
    describe(study, sweep, space, BASE, len(slots))
    study.add(slots)
    return study, sweep


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
@pytest.mark.parametrize(("present", "wanted"), [(0, 5), (1, 5), (5, 5), (5, 7), (7, 5)])
def test_what_is_missing_of_a_study_is_filled_from_its_beginning(sampler, present, wanted):
    entry = {GAMMA: {"type": "float", "low": 1, "high": 20, "step": 1.0}}
    sweep = load_settings(SweepConfig, None, {"space": entry, "study": "s", "n_trials": wanted, "sampler": sampler})
    slots = slots_of(sweep, read_space(entry, BASE), BASE)
    assert [slot.role for slot in slots] == ["recipe", "control", *["search"] * (wanted - 2)]
    assert missing_slots(sweep, slots, present, wanted) == slots[present:wanted]


def test_a_study_stored_and_read_back_asks_the_same(workplace):
    study, _ = new_study(pruner="halving", confirm_top=2)
    again = stored_settings(study, {})
    assert (again.confirm_top, again.n_trials, again.pruner) == (2, 5, "halving")
    refuse_changes(study, again, read_space(again.space, BASE), BASE)
    other = stored_settings(study, {"sampler_seed": 3})
    with pytest.raises(InputError, match="sampler_seed: 0 in the study, now 3"):
        refuse_changes(study, other, read_space(other.space, BASE), BASE)


def test_a_study_of_an_earlier_version_keeps_judging_by_epochs(workplace):
    study, _ = new_study(pruner="halving")
    assert parts_of_run(study) == PARTS
    definition = study.attribute(DEFINITION)
    del definition["parts"]
    study.set_attribute(DEFINITION, definition)
    assert parts_of_run(study) is None


def test_the_control_of_a_method_of_ones_own_is_the_lambda_zero_control():
    own = replace(BASE, {f"{METHOD}.class_path": "mine.Method", f"{METHOD}.init_args": {"weight": 1.0}})
    sweep = load_settings(SweepConfig, None, {"space": SPACE, "study": "s", "n_trials": 2})
    control = slots_of(sweep, read_space(SPACE, BASE), own)[1]
    changed = replace(own, dict(control.overrides)).domain_adaptation.method
    assert (changed.name, changed.class_path, changed.init_args) == ("lambda_zero", None, {})


class Dying(Pool):
    """Workers that are killed: after claiming a trial, or before."""

    def __init__(self, study: Sweep, claims: bool) -> None:
        super().__init__(work, count=4, threads=1)
        self.study, self.claims, self.tokens, self.started = study, claims, list[Key](), 0
        self.waited: list[tuple[int, float | None]] = []
        """Workers started by then, seconds to wait."""
        self.scorers: list[int] = []

    @property
    def running(self) -> list[Key]:
        return self.tokens

    def submit(self, key: Key, task: Task) -> None:
        self.started += 1
        self.tokens.append(key)
        self.scorers += [self.started] if task.scores_source else []
        if self.claims:
            self.study.claim(f"elsewhere:1:{self.started}", task.token)

    def wait(self, seconds: float | None = None) -> list[Ended]:
        self.waited.append((self.started, seconds))
        return super().wait(0.0)

    def _ended(self, seconds: float | None) -> list[Ended]:
        ended, self.tokens = self.tokens, []
        return [Ended(token, death="was killed by SIGKILL") for token in ended]

    def stop(self) -> list[Key]:
        return []


@pytest.mark.parametrize(
    ("claims", "cause"), [(False, "workers in a row ended before"), (True, "the last 6 trials failed")]
)
def test_workers_that_die_end_a_sweep_only_when_none_takes_a_trial_or_trials_fail(claims, cause, workplace):
    study, sweep = new_study(n_trials=12, max_failures=6)
    store = open_store(None, "x")
    pool = Dying(study, claims)
    with (
        tracked_run(store, None, "sweep", {}, workplace / "runs", use_claimed=False) as run,
        pytest.raises(SweepFailed, match=cause),
    ):
        run_trials(study, sweep, BASE, store, "journal.log", run, pool)
    assert [bool(seconds) for _, seconds in pool.waited] == [started > 0 for started, _ in pool.waited]
    # one at a time is to score the source model, and another where it died
    assert pool.scorers[:2] == [number for number in (1, 5) if number <= pool.started]
    failed = [trial for trial in study.counted() if trial.state == TrialState.FAIL]
    assert len(study.counted()) == 12
    assert not study.trials(TrialState.RUNNING)
    if claims:  # each of them was tried twice
        assert len(failed) >= 6
        assert all(trial.user_attrs["attempt"] == 2 for trial in failed)
        assert sum(superseded(trial) for trial in study.trials()) >= 6
    else:
        assert not failed
        assert pool.started <= 2 * 4


def test_open_runs_of_dead_processes_and_ended_trials_are_closed_and_no_others(workplace):
    study, _ = new_study()
    store = open_store(None, "x")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine, _, started = process_name().rsplit(":", 2)
    study.set_attribute(SWEEP_RUNS, ["mine"])
    study.storage.set_trial_state_values(study.trials()[0]._trial_id, TrialState.FAIL)

    def open_run(**tags: str) -> str:
        names = {name.replace("__", "."): value for name, value in tags.items()}
        return store.client.create_run(store.experiment_id, tags=names).info.run_id

    trial = {"dann__job": "trial", "dann__process": "elsewhere:1:0"}
    expected = {
        open_run(dann__job="pretrain", dann__process=f"{machine}:{dead.pid}:{started}"): "KILLED",
        open_run(dann__job="adapt", dann__process=process_name()): "RUNNING",
        open_run(dann__job="adapt", dann__process="elsewhere:1:0"): "RUNNING",
        open_run(dann__job="adapt"): "RUNNING",
        open_run(**trial, dann__sweep_run_id="mine", dann__trial="0"): "KILLED",
        open_run(**trial, dann__sweep_run_id="mine", dann__trial="1"): "RUNNING",
        open_run(**trial, dann__sweep_run_id="another study's", dann__trial="0"): "RUNNING",
    }
    close_runs(study, store)
    assert {run_id: store.client.get_run(run_id).info.status for run_id in expected} == expected


def test_two_drivers_of_one_study_exclude_each_other_and_other_studies_do_not_mind(workplace):
    with (
        only_driver("journal.log", "one"),
        only_driver("journal.log", "two"),
        pytest.raises(InputError, match="'one' is being run"),
        only_driver("journal.log", "one"),
    ):
        pass


def test_a_cluster_does_not_get_files_of_one_machine(workplace):
    sweep = load_settings(SweepConfig, None, {"study": "s", "launcher": "ray"})
    store = open_store(None, "x")
    with pytest.raises(InputError, match=r"storage is .*cannot share"):
        refuse_unshared(sweep, "storage", "journal.log")
    with pytest.raises(InputError, match=r"tracking\.uri is .*cannot share"):
        refuse_unshared(sweep, "tracking.uri", store.uri)
    refuse_unshared(sweep, "storage", "postgresql://host/db")
    refuse_unshared(sweep, "tracking.uri", "http://host:5000")


def test_a_reason_that_is_stored_holds_no_password():
    error = mlflow.exceptions.MlflowException("API request to http://me:hidden@host/api failed")
    assert "hidden" not in _reason(error)
    assert "host/api" in _reason(error)
    task = Task("postgresql://me:hidden@host/db", "s", {"uri": "http://me:hidden@host"}, "id", "token")
    assert "hidden" not in repr(task)


def contest(values: dict[int, list[float | None]], seeds: int) -> tuple[_Contest, Sweep]:
    """A parent with recipe (0), control (1) and two search trials (2, 3), and confirming runs; None: the run failed."""
    parent, _ = new_study(n_trials=4)
    for trial in parent.trials():
        parent.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        parent.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5 + trial.number / 10])
    parent.set_attribute(SOURCE_ONLY, None)
    candidates = [trial for trial in parent.trials() if trial.number in (2, 3)]
    found = _Contest(parent, candidates, range(1, seeds + 1))
    study = Sweep.create(parent.storage, "s-confirm", maximizes=True)
    study.add(found.slots())
    for trial in study.trials():
        number, seed = trial.user_attrs["candidate"], trial.user_attrs["overrides"]["seed"]
        value = values[number][seed - 1]
        study.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.storage.set_trial_state_values(trial._trial_id, state, None if value is None else [value])
    return found, study


@pytest.mark.parametrize(
    ("values", "winner", "beats"),
    [
        ({0: [0.6, 0.6], 1: [0.4, 0.4], 2: [0.5, 0.9], 3: [0.65, 0.65]}, 2, True),
        ({0: [0.6, 0.6], 1: [0.4, 0.4], 2: [None, 0.9], 3: [0.65, 0.65]}, 3, True),  # luck by one seed does not win
        ({0: [0.6, 0.6], 1: [0.8, 0.8], 2: [0.5, 0.5], 3: [0.5, 0.6]}, 0, False),  # the control is no candidate
        ({0: [0.6, None], 1: [0.8, 0.8], 2: [0.5, None], 3: [None, 0.6]}, None, None),
    ],
)
def test_the_best_mean_over_all_seeds_wins(values, winner, beats, workplace):
    found, study = contest(values, seeds=2)
    won = found.winner(study)
    assert (None if won is None else won.number) == winner
    table = found.table(study)
    assert found.beats_control(table, won) is beats
    assert table["iou/target_val mean"].tolist() == sorted(table["iou/target_val mean"], reverse=True)


def test_nobody_wins_while_runs_are_missing(workplace):
    found, study = contest({0: [0.6], 1: [0.4], 2: [0.5], 3: [0.65]}, seeds=1)
    study.add([Slot("confirm", {"seed": 1}, reference=True, candidate=2)])
    assert found.winner(study) is None


def test_the_points_that_settings_are_may_lack_an_argument_of_an_own_method():
    entries = {f"{METHOD}.init_args.weight": {"type": "float", "low": 0.1, "high": 1.0}}
    own = replace(BASE, {f"{METHOD}.class_path": f"{__name__}.Own", f"{METHOD}.init_args": {}})
    assert read_space(entries, own).values_of(own) is None


class Own(DomainAdaptationMethod):
    """A method with an argument that has a default."""

    feature_layers = ("encoder",)

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, outputs, progress):
        raise AssertionError("never reached")
