"""Trials of several seeds: their value, their count, pruning between seeds, and what a crash leaves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
from conftest import small_settings

from dann_experiments import InputError, load_config
from dann_experiments.config import Config
from dann_experiments.config.parsing import load_settings
from dann_experiments.jobs import RunResult
from dann_experiments.names import Metric, SetName, Tag
from dann_experiments.scores.selection import SCORES
from dann_experiments.tracking.store import open_store
from sweeps import objective
from sweeps.confirm import confirm
from sweeps.dashboard import add_to_note
from sweeps.definition import describe, refuse_changes, stored_settings
from sweeps.driver import run_sweep
from sweeps.figures import importances_note
from sweeps.objective import run_trial
from sweeps.progress import StudyProgress, describe_end
from sweeps.report import comparison, write_report
from sweeps.seeds import seeds_done, trainings_counted
from sweeps.settings import QUESTION, SweepConfig
from sweeps.space import read_space
from sweeps.study import SETTINGS, Slot, Sweep, open_storage

LAMBDA = "domain_adaptation.method.lambda_da"
SPACE = {LAMBDA: {"type": "float", "low": 0.1, "high": 10.0}}
BASE = load_config(None, small_settings(Path("nowhere")))


def new_study(slots: int, **settings: Any) -> tuple[Sweep, SweepConfig]:
    sweep = load_settings(
        SweepConfig, None, {"space": SPACE, "study": "s", "n_trials": slots, "sampler": "random", **settings}
    )
    study = Sweep.create(open_storage("journal.log"), "s", maximizes=True)
    describe(study, sweep, read_space(SPACE, BASE), BASE, slots)
    study.add([Slot("search", {})] * slots)
    return study, sweep


class Trainings:
    """Stands in for `adapt`: the scores that each seed gets, in the order in which they are trained."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)
        self.seeds: list[int] = []
        self.names: list[str | None] = []

    def __call__(self, config: Config, callbacks: Any, tags: Any) -> RunResult:
        self.seeds.append(config.seed)
        self.names.append(config.tracking.run_name)
        score = next(self.scores)
        if score < 0:
            raise RuntimeError("this seed fails")
        metrics = {Metric.TARGET_VAL_IOU: score, Metric.SOURCE_VAL_IOU: 0.9 - score / 20}
        before = {Metric.SOURCE_VAL_IOU: 0.9}
        return RunResult("adapt", f"run{len(self.seeds)}", "0", "sqlite:///x", metrics, before)


def run_next(study: Sweep, sweep: SweepConfig) -> optuna.trial.FrozenTrial:
    slot = study.claim("host:1:0", "t")
    assert slot is not None
    run_trial(study, read_space(SPACE, BASE), sweep, BASE, slot, "run")
    return study.trials()[slot.number]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> type[Trainings]:
    class Patched(Trainings):
        def __init__(self, scores: list[float]) -> None:
            super().__init__(scores)
            monkeypatch.setattr(objective, "adapt", self)

    return Patched


@pytest.mark.slow
def test_a_trial_of_several_seeds_has_their_mean_each_score_and_the_spread(trainings):
    study, sweep = new_study(2, seeds_per_trial=3)
    made = trainings([0.5, 0.7, 0.3, 0.6, 0.6, 0.6])
    trial = run_next(study, sweep)
    assert made.seeds == [0, 1, 2]
    assert [str(name).rsplit(" ", 1)[1] for name in made.names] == ["0", "1", "2"]
    assert trial.value == pytest.approx(0.5)
    known = trial.user_attrs
    assert known["seed_scores"] == {"0": 0.5, "1": 0.7, "2": 0.3}
    assert known["spread"] == pytest.approx(statistics.stdev([0.5, 0.7, 0.3]))
    assert (known["run_id"], known["run_ids"]) == ("run1", ["run1", "run2", "run3"])
    assert known["scores"][Metric.SOURCE_DROP] == pytest.approx(0.025)  # 0.025, 0.035, 0.015
    assert trial.constraints == {"source_forgetting": pytest.approx(-0.025)}
    assert trial.intermediate_values == {0: 0.5, 1: 0.7, 2: 0.3}
    assert describe_end(trial) == "done, mean of 3 seeds: 0.5000"
    run_next(study, sweep)
    table = comparison(study, study.trials())
    assert table["sd over seeds"].tolist() == [pytest.approx(0.2), 0.0]
    assert table["seeds"].tolist() == [3, 3]
    assert "of one trial between its seeds 0.1)" in importances_note(study)


def test_a_trial_of_one_seed_is_stored_as_ever(trainings):
    study, sweep = new_study(1)
    trainings([0.123456789])
    trial = run_next(study, sweep)
    assert trial.value == 0.123456789
    assert not {"seed_scores", "spread", "run_ids"} & set(trial.user_attrs)
    assert trainings_counted(study) is None
    assert describe_end(trial) == "done: 0.1235"


@pytest.mark.slow
def test_a_trial_that_is_worse_with_each_of_four_seeds_is_pruned_and_its_trainings_are_counted(trainings):
    study, sweep = new_study(3, seeds_per_trial=6)
    assert sweep.pruner_used == "wilcoxon"
    good, bad = [0.8, 0.9, 0.7, 0.8, 0.9, 0.8], [0.5, 0.5, 0.5, 0.5]
    made = trainings(good + bad)
    assert run_next(study, sweep).state.name == "COMPLETE"
    trial = run_next(study, sweep)
    assert trial.state.name == "PRUNED"
    assert seeds_done(trial) == 4
    assert len(made.seeds) == 10
    assert describe_end(trial) == "pruned after 4 seeds"
    assert trainings_counted(study) == "10 of 18 trainings done (6 seeds per trial), 2 spared by pruning"
    progress = StudyProgress(study, 1, None)
    assert "10 of 18 trainings done" in progress._line()[0]
    (Path("report")).mkdir()
    write_report(study, open_store(None, "e"), Path("report"))
    report = Path("report/report.md").read_text()
    assert "10 of 18 trainings done (6 seeds per trial), 2 spared by pruning." in report
    assert "pruner wilcoxon" in report
    assert "the mean of the seeds 0, 1, 2, 3, 4, 5" in Path("report/best_config.yaml").read_text()


@pytest.mark.slow
def test_a_seed_that_fails_fails_its_trial_and_a_retried_trial_counts_once(trainings):
    study, sweep = new_study(2, seeds_per_trial=3)
    trainings([0.5, -1.0, 0.1, 0.2, 0.3])
    failed = run_next(study, sweep)
    assert failed.state.name == "FAIL"
    assert "this seed fails" in failed.user_attrs["error"]
    assert trainings_counted(study) == "1 of 6 trainings done (3 seeds per trial), 2 missing in failed trials"
    slot = study.claim("host:1:0", "t")  # and this one is killed after its first seed
    assert slot is not None
    study.note(slot, seed_scores={"0": 0.9}, scores={}, run_ids=["killed"])
    assert study.give_back(slot, "its worker died")
    study.put_in_again()
    again = run_next(study, sweep)
    assert again.user_attrs["retry_of"] == slot.number
    assert again.value == pytest.approx(0.2)
    assert trainings_counted(study) == (
        "4 of 6 trainings done (3 seeds per trial), 2 missing in failed trials, "
        "1 more by trials that were run again from their first seed"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruner": "wilcoxon"}, "compares seeds, but seeds_per_trial is 1"),
        ({"pruner": "halving", "seeds_per_trial": 3}, "judges epochs, but seeds_per_trial is 3"),
    ],
)
def test_a_pruner_that_does_not_fit_the_number_of_seeds_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load_settings(SweepConfig, None, settings)


def test_another_number_of_seeds_is_another_study_also_for_one_of_an_earlier_version(workplace):
    study, sweep = new_study(1)
    space = read_space(SPACE, BASE)
    refuse_changes(study, sweep, space, BASE)
    old = {key: value for key, value in study.attribute(SETTINGS).items() if key not in ("seeds_per_trial",)}
    study.set_attribute(SETTINGS, old)
    refuse_changes(study, stored_settings(study, {}), space, BASE)
    asked = load_settings(SweepConfig, None, {"space": SPACE, "study": "s", "sampler": "random", "seeds_per_trial": 5})
    with pytest.raises(InputError, match="seeds_per_trial: 1 in the study, now 5"):
        refuse_changes(study, asked, space, BASE)
    assert "seeds_per_trial" in QUESTION


def test_fewer_than_five_seeds_are_all_trained_and_that_is_said(caplog):
    for seeds, warned in ((4, True), (5, False)):
        sweep = load_settings(SweepConfig, None, {"space": SPACE, "seeds_per_trial": seeds})
        caplog.clear()
        objective.check_objective(sweep, BASE, [SetName("source", "val"), SetName("target", "val")])
        assert ("all seeds of each trial are trained" in caplog.text) is warned


def test_a_note_of_optuna_dashboard_gets_the_address_of_each_run_and_keeps_what_a_user_wrote(workplace):
    study, _ = new_study(1)
    slot = study.claim("host:1:0", "t")
    assert slot is not None
    trial = optuna.Trial(
        study.for_sampling(optuna.samplers.RandomSampler(), optuna.pruners.NopPruner()), slot._trial_id
    )
    add_to_note(trial, "first")
    key = f"dashboard:{slot._trial_id}:"
    study.storage.set_study_system_attr(study.study_id, f"{key}note_str:0", "mine")
    add_to_note(trial, "second")
    found = study.storage.get_study_system_attrs(study.study_id)
    assert found[f"{key}note_str:0"] == "mine\n\nsecond"
    assert found[f"{key}note_ver"] == 2
    study.storage.set_study_system_attr(study.study_id, f"{key}note_str:1", "a long note")
    add_to_note(trial, "third")
    assert study.storage.get_study_system_attrs(study.study_id)[f"{key}note_str:0"] == "mine\n\nsecond"


@pytest.mark.slow
@pytest.mark.usefixtures("pretrained_place")
def test_each_seed_is_a_run_with_the_tags_of_its_trial_and_confirm_takes_other_seeds(squares):
    config = load_config(None, small_settings(squares))
    result = run_sweep(SweepConfig(space=SPACE, study="s", n_trials=3, seeds_per_trial=2, workers=1), config)
    client = mlflow.MlflowClient(result.tracking_uri)
    runs = client.search_runs(
        [client.get_experiment_by_name(result.experiment).experiment_id], "tags.`dann.job` = 'trial'"
    )
    found = {(run.data.tags[Tag.TRIAL], run.data.tags["seed"]): run for run in runs}
    assert sorted(found) == [(str(number), str(seed)) for number in range(3) for seed in range(2)]
    assert len(runs) == 6
    system = result.sweep.storage.get_study_system_attrs(result.sweep.study_id)
    for trial in result.sweep.trials():
        own = [found[str(trial.number), str(seed)] for seed in range(2)]
        assert trial.user_attrs["run_ids"] == [run.info.run_id for run in own]
        scores = [run.data.metrics[Metric.TARGET_VAL_IOU] for run in own]
        assert trial.value == pytest.approx(statistics.fmean(scores))
        assert list(trial.user_attrs["seed_scores"].values()) == pytest.approx(scores)
        assert trial.user_attrs["epochs"] == 2 * config.trainer.max_epochs
        assert {run.data.tags[Tag.SWEEP_RUN_ID] for run in own} == {result.run_id}
        note = system[f"dashboard:{trial._trial_id}:note_str:0"]
        assert all(f"/runs/{run.info.run_id}?" in note for run in own)
        assert system[f"dashboard:{trial._trial_id}:note_ver"] == 2
    report = (result.folder / "report.md").read_text()
    assert "6 of 6 trainings done (2 seeds per trial)." in report
    assert "would have trained unpruned, 100% were trained" in report
    assert "means over 2 seeds each" in report or "no better than the lambda = 0 control" in report
    confirm("s", None, {"confirm_top": 1, "confirm_seeds": 1, "workers": 1})
    again = Sweep(result.sweep.storage, "s-confirm")
    assert {trial.user_attrs["seed"] for trial in again.trials()} == {2}
    assert all("seed_scores" not in trial.user_attrs for trial in again.trials())


def test_an_objective_without_labels_follows_both_rules(monkeypatch, workplace):
    """A network that forgot the source has the worst score, as an epoch would have, and the trial has the constraint."""
    study, sweep = new_study(2, objective=Metric.SELECT_SND)
    results = iter([(0.9, 0.2, 0.0), (0.1, 0.0, 1.0)])

    def trained(config: Config, callbacks: Any, tags: Any) -> RunResult:
        score, drop, kept = next(results)
        metrics = {Metric.SELECT_SND: score, Metric.SOURCE_KEPT: kept, Metric.SOURCE_VAL_IOU: 0.9 - drop}
        return RunResult("adapt", "run", "0", "sqlite:///x", metrics, {Metric.SOURCE_VAL_IOU: 0.9})

    monkeypatch.setattr(objective, "adapt", trained)
    forgetful, faithful = run_next(study, sweep), run_next(study, sweep)
    assert (forgetful.value, faithful.value) == (SCORES[Metric.SELECT_SND].worst, 0.1)
    assert forgetful.constraints["source_forgetting"] == pytest.approx(0.15)
    assert faithful.constraints["source_forgetting"] == -0.05
    assert [trial.number for trial in study.ranked()] == [1, 0]
