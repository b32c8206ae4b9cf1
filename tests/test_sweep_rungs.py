"""Reports within an epoch: at which steps, with which scores, and that a trial which is not pruned stays the same bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import optuna
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import small_settings

from dann_experiments import InputError, RunResult, adapt, load_config
from dann_experiments.config.parsing import load_settings
from dann_experiments.names import Metric, Tag
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback
from dann_experiments.training.side_validation import score_now
from sweeps import pruning
from sweeps.progress import describe_end
from sweeps.pruning import Pruned, PruningCallback
from sweeps.sampling import PARTS, build_pruner, judges_by_parts
from sweeps.settings import SweepConfig


def new_trial(pruner: optuna.pruners.BasePruner | None = None) -> optuna.Trial:
    return optuna.create_study(direction="maximize", pruner=pruner or optuna.pruners.NopPruner()).ask()


def curves(result: RunResult) -> pd.DataFrame:
    """Everything that a run logged, except how long it took."""
    found = result.history()
    return found[~found["metric"].str.startswith("time/")].reset_index(drop=True)


def final_checkpoint(result: RunResult) -> dict[str, Any]:
    return torch.load(Path(str(result.artifacts)) / "checkpoints" / "last.ckpt", weights_only=True)


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


KINDS: list[dict[str, object]] = [
    {},
    {"domain_adaptation__batchnorm": "target_stats"},
    {"trainer__ema_decay": 0.7, "trainer__accumulate_grad_batches": 2},
]


@pytest.mark.slow
@pytest.mark.usefixtures("pretrained_place")
@pytest.mark.parametrize("changed", KINDS, ids=["plain", "target_stats", "averaged weights"])
def test_a_trial_that_is_not_pruned_is_the_same_bit_for_bit(squares, changed):
    settings = small_settings(squares, **changed, data__source__augmentation="light", monitor__final_model="best")
    plain = adapt(load_config(None, settings))
    trial = new_trial()
    reporting = adapt(load_config(None, settings), [PruningCallback(trial, Metric.TARGET_VAL_IOU, True, 0.05, 1)], {})
    reports = trial.study.trials[0].intermediate_values
    steps = 8 // int(str(changed.get("trainer__accumulate_grad_batches", 1)))
    assert sorted(reports) == list(range(1, steps + 1))  # two epochs of four batches
    pd.testing.assert_frame_equal(curves(reporting), curves(plain), check_exact=True)
    assert reporting.metrics == plain.metrics
    states = [final_checkpoint(result) for result in (plain, reporting)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(states[0][part], states[1][part]), part
    own = [state["callbacks"]["RandomStates"] for state in states]
    assert equal(*own)


class AtTheEndOfAnEpoch(pl.Callback):
    """Scores the network after the last step of each epoch, before validation does."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, float], dict[str, float]]] = []
        self._now: dict[str, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        modes = [module.training for module in pl_module.modules()]
        self._now = score_now(trainer, pl_module)
        assert equal(before, dict(pl_module.state_dict()))  # also BatchNorm's statistics, which "target_stats" replaces
        assert [module.training for module in pl_module.modules()] == modes

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            monitor = next(one for one in trainer.callbacks if isinstance(one, DomainAdaptationMonitorCallback))
            self.found.append((self._now, monitor.metrics()))


@pytest.mark.slow
@pytest.mark.usefixtures("pretrained_place")
@pytest.mark.parametrize("changed", KINDS, ids=["plain", "target_stats", "averaged weights"])
def test_the_scores_within_an_epoch_are_those_of_a_validation(squares, changed):
    scores = AtTheEndOfAnEpoch()
    adapt(load_config(None, small_settings(squares, **changed)), [scores], {})
    assert len(scores.found) == 2
    for now, validated in scores.found:
        assert Metric.SOURCE_DROP in now
        # the guard judges whole validations, one after the other
        assert now == {name: value for name, value in validated.items() if not name.startswith("guard/")}


class After(optuna.pruners.BasePruner):
    """Ends a trial at its report of a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.last_step == self.step


class Counted(optuna.pruners.BasePruner):
    """Would end every trial, and notes the steps at which it was asked."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        self.steps.append(trial.last_step)
        return True


@pytest.mark.usefixtures("pretrained_place")
def test_a_trial_is_pruned_within_its_first_epoch(squares):
    trial = new_trial(After(3))
    callback = PruningCallback(trial, Metric.TARGET_VAL_IOU, True, 0.05, 3)
    with pytest.raises(Pruned, match="after 3 steps"):
        adapt(load_config(None, small_settings(squares)), [callback], {})
    trial.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    found = trial.study.trials[0]
    assert list(found.intermediate_values) == [3]
    assert describe_end(found) == "pruned after 3 steps"
    assert "source_forgetting" in found.constraints
    run = mlflow.MlflowClient().get_run(found.user_attrs["run_id"])
    assert run.info.status == "FINISHED"
    assert (run.data.tags[Tag.PRUNED], run.data.tags[Tag.PRUNED_AFTER_EPOCHS]) == ("true", "0")


@pytest.mark.usefixtures("pretrained_place")
def test_reports_come_at_multiples_of_the_steps_and_after_each_epoch(squares, monkeypatch):
    trial, at = new_trial(), list[int]()

    def counted(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        at.append(trainer.global_step)
        return score_now(trainer, module)

    monkeypatch.setattr(pruning, "score_now", counted)
    callback = PruningCallback(trial, Metric.TARGET_VAL_IOU, True, 0.05, 2)
    adapt(load_config(None, small_settings(squares)), [callback], {})
    assert sorted(trial.study.trials[0].intermediate_values) == [2, 4, 6, 8]
    assert at == [2, 6]  # the validation of each epoch gives the others


@pytest.mark.usefixtures("pretrained_place")
@pytest.mark.parametrize(("parts", "within", "reported"), [
    (PARTS, [1, 3], [1, 3, 4, 8]),
    (6, [2], [1, 3, 6]),  # a study of the version that counted sixths: half of the run is the end of the first epoch
])  # fmt: skip
def test_in_a_run_of_few_epochs_halving_judges_after_an_eighth_and_three(squares, monkeypatch, parts, within, reported):
    """Two epochs of four steps."""
    trial, at = new_trial(build_pruner("halving", 2)), list[int]()

    def counted(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        at.append(trainer.global_step)
        return score_now(trainer, module)

    monkeypatch.setattr(pruning, "score_now", counted)
    callback = PruningCallback(trial, Metric.TARGET_VAL_IOU, parts=parts)
    adapt(load_config(None, small_settings(squares)), [callback], {})
    found = trial.study.trials[0]
    assert at == within
    assert sorted(found.intermediate_values) == reported
    assert {"completed_rung_0", "completed_rung_1"} <= set(found.system_attrs)


@pytest.mark.usefixtures("pretrained_place")
@pytest.mark.parametrize("may_prune", [True, False], ids=["search", "recipe"])
def test_a_trial_that_is_never_pruned_competes_too(squares, may_prune):
    asked = Counted()
    callback = PruningCallback(new_trial(asked), Metric.TARGET_VAL_IOU, may_prune)
    if may_prune:
        with pytest.raises(Pruned, match="after 1 epochs"):
            adapt(load_config(None, small_settings(squares)), [callback], {})
        assert callback.trial.study.trials[0].user_attrs["share"] == 0.5
    else:
        adapt(load_config(None, small_settings(squares)), [callback], {})
    assert asked.steps == [1]  # the last epoch is nobody's to judge


@pytest.mark.parametrize(("epochs", "parts", "by_parts", "first"), [
    (3, 8, True, 1), (7, 8, True, 1), (8, 8, False, 1), (15, 8, False, 1), (16, 8, False, 2),
    (3, 6, True, 1), (5, 6, True, 1), (6, 6, False, 1), (11, 6, False, 1), (12, 6, False, 2), (30, 6, False, 5),
    (3, None, False, 1), (30, None, False, 1),  # a study of an earlier version
])  # fmt: skip
def test_halving_first_judges_after_one_part_of_a_run(epochs, parts, by_parts, first):
    assert judges_by_parts("halving", epochs, None, parts) == by_parts
    study = optuna.create_study(direction="maximize", pruner=build_pruner("halving", epochs, None, parts))
    study.add_trial(optuna.create_trial(value=1.0, system_attrs={"completed_rung_0": 1.0}))
    trial, ended = study.ask(), []
    for step in range(1, first + 1):
        trial.report(0.0, step)
        ended.append(trial.should_prune())
    assert ended == [False] * (first - 1) + [True]


@pytest.mark.parametrize("name", ["median", "halving", "hyperband"])
def test_pruners_judge_by_steps(name):
    study = optuna.create_study(direction="maximize", pruner=build_pruner(name, 2, every_n_steps=50))
    pruned = 0
    for number in range(30):
        trial = study.ask()
        for step in range(50, 501, 50):
            trial.report((number * 7 % 10) / 10 + step / 1e4, step)
            if step < 500 and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                pruned += 1
                break
        else:
            study.tell(trial, (number * 7 % 10) / 10)
    assert pruned > 3


@pytest.mark.parametrize("settings", [{"pruner": "none"}, {"seeds_per_trial": 5}])
def test_steps_to_report_at_are_refused_where_nothing_judges_within_a_run(settings):
    with pytest.raises(InputError, match="does not judge within a run"):
        load_settings(SweepConfig, None, {"report_every_n_steps": 10, **settings})


@pytest.mark.usefixtures("pretrained_place")
def test_an_objective_that_validation_does_not_score_costs_one_side_validation_at_most(squares, monkeypatch):
    trial, at = new_trial(), list[int]()

    def counted(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        at.append(trainer.global_step)
        return score_now(trainer, module)

    monkeypatch.setattr(pruning, "score_now", counted)
    adapt(load_config(None, small_settings(squares)), [PruningCallback(trial, "da/mine", True, 0.05, 1)], {})
    assert at == [1]
    assert not trial.study.trials[0].intermediate_values
