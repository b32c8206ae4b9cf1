"""Which trial of a sweep is best: one that kept the source, then the best value, then the lowest number, in every storage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pandas as pd
import pytest
from conftest import small_settings

from dann_experiments import InputError, load_config
from dann_experiments.config.parsing import load_settings
from dann_experiments.names import Metric
from dann_experiments.tracking.store import open_store
from sweeps import show
from sweeps.confirm import _Contest, confirm
from sweeps.definition import describe
from sweeps.driver import run_sweep
from sweeps.figures import _short_names
from sweeps.progress import describe_end
from sweeps.ranking import FORGETTING, set_forgetting
from sweeps.report import forgetting_note, passed_over_note, sweep_note, top_trials, write_report
from sweeps.sampling import build_pruner, build_sampler
from sweeps.settings import SweepConfig
from sweeps.space import read_space
from sweeps.study import Slot, Sweep, open_storage

LAMBDA = "domain_adaptation.method.lambda_da"
SPACE = {LAMBDA: {"type": "float", "low": 0.1, "high": 20.0}}
BASE = load_config(None, small_settings(Path("nowhere")))


def study_with(
    storage: optuna.storages.BaseStorage, results: Mapping[int, tuple[float, float | None]], maximizes: bool = True,
    ends: list[int] | None = None,
) -> Sweep:  # fmt: skip
    """A study whose trials, number -> (value, drop of the source), ended in the order of `ends`; trial 1 is the control."""
    sweep = SweepConfig(space=SPACE, study="s", direction="maximize" if maximizes else "minimize")
    study = Sweep.create(storage, "s", maximizes)
    describe(study, sweep, read_space(SPACE, BASE), BASE, len(results))
    control = Slot("control", {"domain_adaptation.method.name": "lambda_zero"}, reference=True)
    study.add([control if number == 1 else Slot("search", {}, {LAMBDA: 0.1 + number}) for number in sorted(results)])
    slots = {}
    while (slot := study.claim("host:1:0", "t")) is not None:
        slots[slot.number] = slot
    for number in ends or sorted(results):
        value, drop = results[number]
        seen = study.for_sampling(optuna.samplers.RandomSampler(), build_pruner("none", 3))
        trial = optuna.Trial(seen, slots[number]._trial_id)
        if number != 1:
            study.note(slots[number], point={LAMBDA: trial.suggest_float(LAMBDA, 0.1, 20.0)})
        study.note(slots[number], scores={} if drop is None else {Metric.SOURCE_DROP: drop})
        set_forgetting(trial, drop, BASE.monitor.forgetting_threshold)
        seen.tell(trial, value)
    return study


@pytest.fixture(params=["memory", "journal.log", "sqlite:///study.db"])
def storage(request: pytest.FixtureRequest, workplace: Path) -> optuna.storages.BaseStorage:
    return optuna.storages.InMemoryStorage() if request.param == "memory" else open_storage(request.param)


@pytest.mark.parametrize("maximizes", [True, False])
def test_of_equal_trials_the_one_with_the_lowest_number_is_best_whichever_ended_first(storage, maximizes):
    worse = 0.1 if maximizes else 0.9
    results = {0: (worse, None), 1: (0.5, None), 2: (0.5, None), 3: (0.5, None), 4: (worse, None)}
    study = study_with(storage, results, maximizes, ends=[3, 4, 1, 2, 0])
    best = study.best()
    assert best is not None
    assert best.number == 2
    assert [trial.number for trial in top_trials(study)] == [2, 3, 0, 4]
    seen = study.for_sampling(optuna.samplers.RandomSampler(), build_pruner("none", 3))
    assert seen.best_trial.number == 2  # what a pruner compares with


FORGETS_MOST = {0: (0.5, 0.01), 1: (0.4, 0.0), 2: (0.9, 0.3), 3: (0.6, 0.05), 4: (0.8, 0.051)}
ALL_FORGET = {0: (0.5, 0.2), 1: (0.4, 0.0), 2: (0.9, 0.3)}


def test_a_trial_that_forgot_the_source_is_best_only_if_all_did(storage):
    study = study_with(storage, FORGETS_MOST)
    assert [trial.number for trial in top_trials(study)] == [3, 0, 2, 4]  # a drop of the threshold itself is allowed
    seen = study.for_sampling(optuna.samplers.RandomSampler(), build_pruner("none", 3))
    assert seen.best_trial.number == 3
    study.storage.delete_study(study.study_id)
    assert [trial.number for trial in top_trials(study_with(storage, ALL_FORGET))] == [2, 0]


def written(study: Sweep, folder: Path) -> tuple[str, str]:
    """The report and the header of best_config.yaml."""
    folder.mkdir()
    write_report(study, open_store(None, "e"), folder)
    lines = (folder / "best_config.yaml").read_text().splitlines()
    return (folder / "report.md").read_text(), "\n".join(line for line in lines if line.startswith("#"))


def test_the_report_shows_the_trial_that_lost_by_forgetting_beside_the_winner(workplace, capsys):
    study = study_with(open_storage("journal.log"), FORGETS_MOST)
    report, header = written(study, workplace / "report")
    assert "Best: **trial 3**, `iou/target_val` 0.6000" in report
    passed = (
        "Trial 2 has the best iou/target_val, 0.9000, but does not count: its source IoU fell by 0.3, more than 0.05"
    )
    assert passed in report
    assert "# Trial 3 of study s" in header
    assert "Every" not in report + header
    table = pd.read_csv(workplace / "report" / "trials.csv").set_index("trial")
    assert table["source_kept"].to_dict() == {0: "yes", 1: "yes", 2: "NO", 3: "yes", 4: "NO"}
    assert table[Metric.SOURCE_DROP].to_dict() == {0: 0.01, 1: 0.0, 2: 0.3, 3: 0.05, 4: 0.051}
    assert _short_names(study).best_trial.number == 3  # what the figures draw as the best
    show.print_study(study)
    assert passed in capsys.readouterr().out
    note = sweep_note(study, open_store(None, "e"), "run", study.best())
    assert "best trial 3 with iou/target\\_val 0.6" in note.replace("iou/target_val", "iou/target\\_val")
    assert "does not count" in note
    ends = {trial.number: describe_end(trial) for trial in study.trials()}
    assert ends[2] == "done: 0.9000, but forgot the source (its IoU fell by 0.300)"
    assert ends[3] == "done: 0.6000"


def test_where_all_trials_forgot_the_source_every_place_says_so(workplace, capsys):
    study = study_with(open_storage("journal.log"), ALL_FORGET)
    words = "Every complete trial except the control forgot the source by more than 0.05"
    report, header = written(study, workplace / "report")
    assert words in report
    assert "Best of those that forgot the source: **trial 2**" in report
    assert words in header
    show.print_study(study)
    assert words in capsys.readouterr().out
    assert words in sweep_note(study, open_store(None, "e"), "run", study.best())
    assert passed_over_note(study) is None


def test_studies_of_earlier_versions_have_no_constraint_and_rank_by_value_alone(workplace):
    study = study_with(open_storage("journal.log"), {0: (0.5, None), 1: (0.4, None), 2: (0.9, None)})
    report, _ = written(study, workplace / "report")
    assert "Best: **trial 2**" in report
    assert "source kept" not in report
    assert forgetting_note(study) is None


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_samplers_take_a_study_some_of_whose_trials_are_of_an_earlier_version(name, workplace):
    pytest.importorskip("scipy")
    known = {number: (0.1 * number, None if number % 2 else 0.02 * number) for number in range(12)}
    study = study_with(open_storage("journal.log"), known)
    study.add([Slot("search", {})])
    slot = study.claim("host:1:0", "t")
    assert slot is not None
    sampler = build_sampler(load_settings(SweepConfig, None, {"sampler": name}), False, slot.number, 12)
    trial = optuna.Trial(study.for_sampling(sampler, build_pruner("none", 3)), slot._trial_id)
    assert 0.1 <= trial.suggest_float(LAMBDA, 0.1, 20.0) <= 20.0
    assert all(
        FORGETTING not in old.constraints for old in study.trials() if old.number % 2
    )  # the storage is as it was


def sample(name: str, drops: bool) -> list[float]:
    """Values that a sampler proposes after 30 trials that score the higher the larger lambda is, and forget above 3."""
    known = {n: (n / 30, (0.3 if 0.1 + n / 3 > 3 else 0.0) if drops else None) for n in range(30)}
    study = Sweep.create(optuna.storages.InMemoryStorage(), "s", maximizes=True)
    study.add([Slot("search", {}, {LAMBDA: 0.1 + n / 3}) for n in known] + [Slot("search", {})] * 8)
    found = []
    while (slot := study.claim("host:1:0", "t")) is not None:
        sampler = build_sampler(load_settings(SweepConfig, None, {"sampler": name}), False, slot.number, 30)
        seen = study.for_sampling(sampler, build_pruner("none", 3))
        trial = optuna.Trial(seen, slot._trial_id)
        value = trial.suggest_float(LAMBDA, 0.1, 10.0)
        if slot.number >= 30:
            found.append(value)
        drop = (0.3 if value > 3 else 0.0) if drops else None
        set_forgetting(trial, drop, 0.05)
        seen.tell(trial, value / 10)
    return found


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_samplers_learn_where_the_source_is_forgotten(name):
    pytest.importorskip("scipy")
    free, constrained = sample(name, drops=False), sample(name, drops=True)
    assert sum(value > 3 for value in free) >= 6
    assert sum(value > 3 for value in constrained) <= 4


def contest(drops: Mapping[int, list[float]], values: Mapping[int, list[float]]) -> tuple[_Contest, Sweep]:
    """Candidates 2 and 3 with confirming runs over two seeds, and the control."""
    parent = study_with(open_storage("journal.log"), {0: (0.1, 0.0), 1: (0.2, 0.0), 2: (0.5, 0.0), 3: (0.6, 0.0)})
    found = _Contest(parent, top_trials(parent, 2), [1, 2])
    study = Sweep.create(parent.storage, "s-confirm", maximizes=True)
    study.add(found.slots())
    while (slot := study.claim("host:1:0", "t")) is not None:
        number, seed = slot.user_attrs["candidate"], slot.user_attrs["overrides"]["seed"]
        seen = study.for_sampling(optuna.samplers.RandomSampler(), build_pruner("none", 3))
        trial = optuna.Trial(seen, slot._trial_id)
        set_forgetting(trial, drops.get(number, [0.0, 0.0])[seed - 1], 0.05)
        seen.tell(trial, values.get(number, [0.1, 0.1])[seed - 1])
    return found, study


@pytest.mark.parametrize(
    ("drops", "winner", "all_forgot"),
    [
        ({3: [0.2, 0.0]}, 2, False),  # 0.1 in the mean
        ({3: [0.09, 0.0]}, 3, False),  # 0.045
        ({2: [0.2, 0.2], 3: [0.2, 0.2]}, 3, True),
    ],
)
def test_confirm_chooses_among_those_that_kept_the_source_in_the_mean(drops, winner, all_forgot, workplace):
    found, study = contest(drops, {2: [0.6, 0.6], 3: [0.9, 0.9]})
    won = found.winner(study)
    assert won is not None
    assert won.number == winner
    assert found.winner_forgot(study) is all_forgot
    table = found.table(study).set_index("trial")
    kept = [number for number in table.index if table["source kept"][number] == "yes"]
    assert list(table.index)[: len(kept)] == kept
    assert ("NO" in table["source kept"].tolist()) is (len(kept) < len(table))


def test_equal_means_are_won_by_the_lower_number(workplace):
    found, study = contest({}, {2: [0.7, 0.8], 3: [0.8, 0.7]})
    won = found.winner(study)
    assert won is not None
    assert won.number == 2


def test_the_threshold_of_forgetting_cannot_be_searched():
    space: dict[str, Any] = {"monitor.forgetting_threshold": {"type": "float", "low": 0.0, "high": 1.0}}
    with pytest.raises(InputError, match="it decides which trials may win"):
        read_space(space, BASE)


@pytest.mark.slow
def test_a_sweep_whose_best_score_forgets_the_source_is_won_by_one_that_keeps_it(workplace, squares, capsys):
    """Small squares: a lambda of 300 scores better on the target than 0.1, at the price of a sixth of the source's IoU."""
    config = load_config(
        None,
        small_settings(
            squares, pretraining__max_epochs=40, trainer__max_epochs=4, optimizer__lr=3e-3, monitor__probe=False,
            domain_adaptation__method__lambda_da=0.1, domain_adaptation__method__lambda_schedule__gamma=20,
        ),
    )  # fmt: skip
    space = {LAMBDA: {"type": "categorical", "choices": [0.1, 300.0]}}
    result = run_sweep(SweepConfig(space=space, study="s", sampler="grid", workers=1), config)
    kept, control, forgetful = result.sweep.trials()
    assert forgetful.value is not None
    assert forgetful.value > (kept.value or 0) + 0.02  # 0.110 and 0.065
    drops = [trial.user_attrs["scores"][Metric.SOURCE_DROP] for trial in (kept, control, forgetful)]
    assert max(drops[:2]) < 0.05 < drops[2]  # 0.03 and 0.16
    assert forgetful.constraints[FORGETTING] == drops[2] - 0.05
    client = mlflow.MlflowClient(result.tracking_uri)
    run = client.get_run(forgetful.user_attrs["run_id"])
    assert run.data.metrics[Metric.SOURCE_DROP] == pytest.approx(drops[2], abs=1e-6)
    assert result.best is not None
    assert result.best.number == 0
    report = (result.folder / "report.md").read_text()
    assert "Best: **trial 0 (recipe)**" in report
    assert f"Trial 2 has the best iou/target_val, {forgetful.value:.4f}, but does not count" in report
    rows = [line for line in report.splitlines() if line.startswith(("| trial 0", "| trial 2"))]
    assert [" NO " in row for row in rows] == [False, True]  # one table, which has all trials
    assert "lambda_da: 0.1" in (result.folder / "best_config.yaml").read_text()
    assert client.get_run(result.run_id).data.metrics["sweep/best"] == pytest.approx(kept.value)
    found = confirm("s", None, {"confirm_top": 1, "confirm_seeds": 1, "workers": 1})
    assert sorted(found.table["trial"]) == [0, 1]  # the one that forgot is no candidate
    assert found.winner == 0
