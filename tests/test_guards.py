"""The guard of the target's map: speaks of implausible shares and of a collapse, stays silent otherwise, and can end a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import model_folder, small_settings
from pytorch_lightning.trainer.states import TrainerFn
from safetensors.torch import load_file
from test_resume import Killed, killed, settings
from torch import nn
from torch.nn import functional

from dann_experiments import InputError, load_config
from dann_experiments.adaptation.companions.self_training import SelfTraining
from dann_experiments.adaptation.method import Progress, StepOutputs
from dann_experiments.comparison.compare import _doubts
from dann_experiments.comparison.result import ArmRun
from dann_experiments.jobs import RunResult, adapt, pretrain
from dann_experiments.jobs.identity import run_digest
from dann_experiments.names import Job, Metric, Tag
from dann_experiments.scores.plausibility import diversity, outside, share_odds
from dann_experiments.training.guards import TargetGuard
from dann_experiments.training.scoring import SelectionScorer

NAMES = ["ground", "tree"]
SOURCE = np.array([0.75, 0.25])
COLLAPSING: dict[str, Any] = {
    "domain_adaptation__method__name": "lambda_zero",
    "domain_adaptation__companions": [{"name": "entropy", "weight": 30.0}],
    "optimizer__lr": 0.01,
    "trainer__max_epochs": 4,
    "monitor__probe": False,
}
"""Entropy minimization beyond all measure: everything becomes one class."""


def map_with(share: float, certain: float = 4.0) -> torch.Tensor:
    """Logits (1, 2, 20, 20) of a map of which the first pixels, this share, are trees."""
    trees = (torch.arange(400) < round(400 * share)).long().view(1, 20, 20)
    return certain * functional.one_hot(trees, 2).movedim(3, 1).float()


def validated(guard: TargetGuard, maps: Mapping[str, torch.Tensor]) -> None:
    """One validation with these logits per domain."""
    shares, scores = {}, {}
    for domain, logits in maps.items():
        guard.update(domain, logits, None)
        scorer = SelectionScorer()
        scorer.update(logits)
        scores[domain] = scorer.compute()
        shares[domain] = np.bincount(logits.argmax(1).flatten().numpy(), minlength=2) / logits[:, 0].numel()
    guard.finish(shares, scores)


def judged(before: float, now: float, expected: Any = None, last: bool = False, certain: float = 4.0) -> list[str]:
    guard = TargetGuard(NAMES, expected)
    validated(guard, {"target": map_with(before)})
    guard.start()
    validated(guard, {"target": map_with(now, certain)})
    guard.judge(SOURCE, last)
    return guard.findings


@pytest.mark.parametrize(
    ("before", "now", "speaks"),
    [
        (0.20, 0.34, False),  # Florida: the rule that is right (docs/guards.md)
        (0.20, 0.60, True),  # Soaproot: the rule that is wrong
        (0.20, 0.49, False),  # odds 0.96 to 0.33: 2.9 times
        (0.20, 0.51, True),  # odds 1.04 to 0.33: 3.1 times
        (0.20, 0.09, True),  # odds 0.10 to 0.33: a factor 3.4
        (0.70, 0.60, False),  # the source model was farther away: adaptation came nearer
        (0.05, 0.09, False),
        (0.001, 0.60, True),  # also far before, but on the other side: Soaproot's source model finds no tree at all
    ],
)
def test_shares_more_than_three_times_the_odds_of_the_source_are_implausible_unless_they_come_nearer(
    before, now, speaks
):
    assert bool(judged(before, now)) is speaks


def test_the_finding_names_the_class_its_shares_and_the_factor():
    assert judged(0.2, 0.6) == [
        "tree covers 60.0% of the predictions for the target, but 25.0% of the labeled source (4.5 times the odds, above 3; "
        "before adaptation 20.0%)"
    ]


def test_the_factor_of_the_odds_is_the_same_both_ways_and_rare_classes_are_not_judged():
    assert share_odds(np.array([0.5, 0.5]), np.array([0.2, 0.8])) == pytest.approx([4.0, 4.0])
    assert share_odds(np.array([0.2, 0.8]), np.array([0.5, 0.5])) == pytest.approx([4.0, 4.0])
    # a class of 0.1 % that becomes 5 %: fifty times the share, but nothing that a reader of maps would call implausible
    assert share_odds(np.array([0.949, 0.05, 0.001]), np.array([0.948, 0.001, 0.051])) == pytest.approx([1.0, 1.0, 1.0])
    assert np.isfinite(share_odds(np.array([1.0, 0.0]), np.array([0.5, 0.5]))).all()


def test_a_stated_range_replaces_the_own_rule_and_holds_without_exception_at_the_end():
    assert judged(0.2, 0.6, {"tree": [0.5, 0.7]}) == []
    assert judged(0.2, 0.4, {"tree": [0.5, 0.7]}) == []  # on its way
    assert judged(0.2, 0.4, {"tree": [0.5, 0.7]}, last=True) == [
        "tree covers 40.0% of the predictions for the target, outside of monitor.expected_shares (0.5 to 0.7; before adaptation "
        "20.0%)"
    ]
    assert judged(0.2, 0.1, {"tree": [0.5, 0.7]}) != []
    assert judged(0.6, 0.4, {"tree": [0.5, 0.7]}) != []
    assert judged(0.0, 0.75, {"tree": [0.5, 0.7]}) != []  # nearer, but on the other side
    assert outside(np.array([0.6, 0.4]), NAMES, {"tree": [0.5, 0.7]}) == pytest.approx([0.0, -0.1])


def test_one_implausible_validation_is_a_swing_two_in_a_row_are_not_and_the_last_one_counts_alone():
    guard = TargetGuard(NAMES)
    spoken = []
    for share in (0.2, 0.6, 0.2, 0.6, 0.6, 0.2):
        validated(guard, {"target": map_with(share)})
        spoken.append(bool(guard.judge(SOURCE)))
        if len(spoken) == 1:
            guard.start()
    assert spoken == [False, False, False, False, True, False]
    validated(guard, {"target": map_with(0.6)})
    assert guard.judge(SOURCE, last=True) != []


def test_a_collapse_is_spoken_of_even_with_a_stated_range_but_only_where_predictions_become_certain():
    anything = {"tree": [0.0, 1.0]}
    assert "collapse to ground" in judged(0.2, 0.01, anything)[0]
    assert judged(0.2, 0.2, anything) == []
    # less certain than before: not what minimizing the entropy does
    assert judged(0.2, 0.01, anything, certain=3.0) == []
    assert diversity(np.array([0.25, 0.25, 0.25, 0.25])) == pytest.approx(1.0)


def test_agreement_is_the_share_of_pixels_with_the_class_of_the_source_model_and_diversity_that_of_the_mean_prediction():
    guard = TargetGuard(NAMES)
    validated(guard, {"target": map_with(0.25, certain=40.0)})
    guard.start()
    guard.judge(SOURCE)
    assert guard.metrics()[Metric.GUARD_AGREEMENT] == 1.0
    validated(guard, {"target": map_with(0.5, certain=40.0)})
    assert guard.judge(np.array([0.7, 0.3])) == []
    # 256 of the 400 pixels, spread evenly, are compared: a quarter of them changed
    assert guard.metrics()[Metric.GUARD_AGREEMENT] == pytest.approx(0.75, abs=0.01)
    assert guard.metrics()[Metric.GUARD_DIVERSITY] == pytest.approx(1.0, abs=1e-6)
    assert guard.metrics()[Metric.GUARD_SHARE_ODDS] == pytest.approx(7 / 3)
    assert guard.metrics()[Metric.GUARD_IMPLAUSIBLE] == 0.0


def test_of_several_targets_one_that_is_destroyed_is_enough_and_is_named():
    guard = TargetGuard(NAMES)
    validated(guard, {"target.north": map_with(0.2), "target.south": map_with(0.2)})
    guard.start()
    validated(guard, {"target.north": map_with(0.2), "target.south": map_with(0.7)})
    (finding,) = guard.judge(SOURCE, last=True)
    assert "70.0% of the predictions for target.south" in finding
    assert guard.metrics()[Metric.GUARD_AGREEMENT] == pytest.approx(0.5, abs=0.01)  # the worst
    assert guard.metrics()[Metric.GUARD_SHARE_ODDS] == pytest.approx(7.0)


def test_a_guard_goes_on_from_its_state():
    guard, other = TargetGuard(NAMES), TargetGuard(NAMES)
    validated(guard, {"target": map_with(0.2)})
    guard.start()
    validated(guard, {"target": map_with(0.6)})
    assert guard.judge(SOURCE) == []  # the first of two in a row
    guard.spoken = True
    other.load_state_dict(guard.state_dict())
    for one in (guard, other):
        validated(one, {"target": map_with(0.6)})
    assert other.judge(SOURCE) == guard.judge(SOURCE) != []
    assert other.metrics() == guard.metrics()
    assert other.spoken


def test_without_data_or_a_source_nothing_is_said_and_nothing_is_nan():
    guard = TargetGuard(NAMES)
    for logits in (map_with(0.2), map_with(0.9)):
        guard.update("target", logits, torch.zeros(1, 20, 20))
        guard.finish({}, {"target": {"entropy": math.nan, "infomax": math.nan}})
        assert guard.judge(None) == []
    assert guard.metrics() == {Metric.GUARD_IMPLAUSIBLE: 0.0}


def test_a_set_whose_masks_ignore_every_pixel_has_no_shares_to_compare_with_the_stated_ones():
    guard = TargetGuard(NAMES, {"tree": [0.1, 0.2]})
    guard.update("target", map_with(0.2), None)
    guard.finish({"target": np.full(2, math.nan)}, {"target": {"entropy": 0.1, "infomax": 0.5}})
    guard.start()
    assert guard.judge(SOURCE, last=True) == []
    assert guard.metrics()[Metric.GUARD_OUTSIDE] == 0.0


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ("{tree: [0.5, 0.2]}", r"monitor\.expected_shares gives tree the range \[0\.5, 0\.2\]; give \[low, high\]"),
        ("{tree: [0.2]}", r"gives tree the range \[0\.2\]"),
        ("{tree: [-0.1, 0.2]}", r"gives tree the range"),
        ("{tree: [0.1, .nan]}", r"gives tree the range"),
        ("{tree: [0, 1.5]}", r"gives tree the range"),
        ("{wood: [0.1, 0.2]}", r"monitor\.expected_shares names 'wood'; the classes are ground, tree"),
        ("{ground: [0.6, 0.7], tree: [0.5, 0.7]}", "lower ends that add up to more than 1"),
        ("{ground: [0, 0.3], tree: [0, 0.5]}", "upper ends that add up to less than 1"),
        ("0.5", r"monitor\.expected_shares is 0\.5, but must be"),
    ],
)
def test_ranges_that_cannot_be_are_refused(expected, message):
    with pytest.raises(InputError, match=message):
        load_config(None, {"data.class_names": NAMES, "model.classes": 2, "monitor.expected_shares": expected})


def test_ranges_are_read_from_a_command_line_and_from_a_file(tmp_path):
    common = {"data.class_names": NAMES, "model.classes": 2}
    spoken = load_config(None, common | {"monitor.expected_shares": "{tree: [0.1, 0.5]}"})
    (tmp_path / "mine.yaml").write_text("monitor:\n  expected_shares: {tree: [0.1, 0.5]}\n")
    written = load_config(tmp_path / "mine.yaml", common)
    assert spoken.monitor.expected_shares == written.monitor.expected_shares == {"tree": [0.1, 0.5]}


def test_a_run_that_stops_is_another_run_than_one_that_only_warns():
    plain, stops = load_config(), load_config(None, {"monitor.on_guard": "stop"})
    digests = [run_digest(Job.ADAPT, config, {}, None) for config in (plain, stops)]
    assert digests[0] != digests[1]


@pytest.fixture
def place(pretrained_place: Path) -> Path:
    return pretrained_place


def adapted(squares: Path, **more: Any) -> RunResult:
    return adapt(load_config(None, small_settings(squares, **more)))


def tags_of(result: RunResult) -> Mapping[str, str]:
    return mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).data.tags


def series(result: RunResult, metric: str) -> list[float]:
    return result.history().query(f"metric == '{metric}'").sort_values("step")["value"].tolist()


def test_a_run_that_adapts_as_usual_logs_the_guard_at_each_validation_and_does_not_speak(squares, place, caplog):
    result = adapted(squares, monitor__probe=False, optimizer__lr=1e-5)
    assert "The guard speaks" not in caplog.text
    assert Tag.GUARD not in tags_of(result)
    assert series(result, Metric.GUARD_AGREEMENT)[0] == 1.0
    assert [
        len(series(result, name)) for name in (Metric.GUARD_AGREEMENT, Metric.GUARD_DIVERSITY, Metric.GUARD_SHARE_ODDS)
    ] == [3] * 3
    assert series(result, Metric.GUARD_IMPLAUSIBLE) == [0.0] * 3


def test_a_run_that_collapses_is_warned_of_once_with_the_way_out(squares, place, caplog):
    result = adapted(squares, **COLLAPSING)
    warnings = [record.getMessage() for record in caplog.records if "The guard speaks" in record.getMessage()]
    assert len(warnings) == 1
    assert "monitor.expected_shares" in warnings[0]
    assert "collapse to" in tags_of(result)[Tag.GUARD] or "covers" in tags_of(result)[Tag.GUARD]
    assert series(result, Metric.GUARD_IMPLAUSIBLE)[-1] == 1.0
    assert len(series(result, Metric.GUARD_IMPLAUSIBLE)) == 5  # it trained to its end


STOPPING: dict[str, Any] = {
    **COLLAPSING,
    "domain_adaptation__companions": [{"name": "entropy", "weight": 10.0}],
    "optimizer__lr": 0.004,
    "trainer__max_epochs": 6,
    "monitor__expected_shares": {"square": [0.01, 0.6]},
    "monitor__on_guard": "stop",
}
"""Squares vanish in the third epoch: 6.5 %, 3.8 %, 0.7 %, 0.2 % of the pixels."""


BEST = {
    "monitor__final_model": "best",
    "monitor__metric": "select/entropy",  # which is the better the more has collapsed
    "monitor__forgetting_threshold": 1.0,
}


class WeightsAfter(pl.Callback):
    """The weights at each validation, by step, as they are scored."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, torch.Tensor]] = {}

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.state.fn == TrainerFn.FITTING:
            state = pl_module.network.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
            self.of[trainer.global_step] = {name: value.clone() for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"trainer__ema_decay": 0.05}, BEST])
def test_a_guard_that_stops_ends_the_run_with_the_last_plausible_weights(more, squares, place, caplog):
    caplog.set_level("INFO", "dann_experiments")
    seen = WeightsAfter()
    result = adapt(load_config(None, small_settings(squares, **STOPPING, **more)), [seen])
    assert "Training ends after epoch 4: the guard has spoken (monitor.on_guard)." in caplog.text
    assert "kept: after step 8." in caplog.text
    assert list(seen.of) == [0, 4, 8, 12, 16]
    found = load_file(model_folder(result.artifacts) / "model.safetensors")
    for name, value in seen.of[8].items():
        assert torch.equal(found[name], value), name
    assert result.metrics["share/target_val/square"] > 0.01
    assert "square covers 0." in tags_of(result)[Tag.GUARD]


def test_a_run_that_ends_by_patience_is_judged_by_its_last_validation(squares, place, caplog):
    early = {
        "monitor__metric": "select/entropy",
        "monitor__patience": 1,
        "trainer__max_epochs": 20,
        "optimizer__lr": 1e-7,
    }
    guard = {"monitor__expected_shares": {"square": [0.99, 1.0]}, "monitor__on_guard": "stop", "monitor__probe": False}
    result = adapted(squares, domain_adaptation__method__name="lambda_zero", **early, **guard)
    assert len(series(result, Metric.GUARD_IMPLAUSIBLE)) < 21, "it ended early"
    assert Tag.GUARD in tags_of(result)


def test_the_warm_start_of_a_run_of_one_epoch_is_not_its_last_validation(squares, place):
    never = {"monitor__expected_shares": {"square": [0.99, 1.0]}, "monitor__on_guard": "stop"}
    result = adapted(squares, monitor__probe=False, trainer__max_epochs=1, **never)
    assert len(series(result, Metric.SEGMENTATION_LOSS)) > 0


def test_the_same_run_that_only_warns_trains_to_its_end(squares, place):
    result = adapted(squares, **STOPPING | {"monitor__on_guard": "warn"})
    assert series(result, Metric.GUARD_IMPLAUSIBLE) == [0, 0, 0, 1, 1, 1, 1]
    assert result.metrics["share/target_val/square"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("step", [10, 14, 16])
def test_a_run_that_is_killed_before_or_after_the_guard_spoke_ends_with_the_same_weights(step, squares, workplace):
    """Killed in the third epoch, whose weights are not the last plausible ones, in the fourth, and after the guard spoke."""
    more: dict[str, Any] = STOPPING | {
        "optimizer__schedule": "constant",
        "optimizer__name": "adam",
        "data__crop_size": None,
    }
    config = settings(squares, workplace / "whole", **more)
    pretrain(config)
    whole = adapt(config)
    other = settings(squares, workplace / "killed", workplace / "whole" / "mlflow.db", **more)
    killed("adapt", other, Killed("on_train_end" if step == 16 else "on_train_batch_start", step))
    resumed = adapt(other, resume="auto")
    assert resumed.run_id != whole.run_id
    mine, theirs = (load_file(model_folder(one.artifacts) / "model.safetensors") for one in (resumed, whole))
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    assert Tag.GUARD in tags_of(resumed)
    for metric in (Metric.GUARD_AGREEMENT, Metric.GUARD_IMPLAUSIBLE):
        assert series(resumed, metric) == series(whole, metric)


def test_the_agreement_with_the_teacher_is_1_while_it_is_the_network_itself_and_0_when_every_class_is_exchanged():
    network = nn.Conv2d(3, 2, 1)
    companion = SelfTraining(seed=3)
    companion.on_train_start(network)
    source, target = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).unbind()
    labels = (source[:, 0] > 0).long()
    outputs = StepOutputs(
        torch.zeros(2, 2, 8, 8),
        labels,
        torch.ones(2, 8, 8),
        {},
        {},
        given_images=(source, target),
        given_forward=network,
    )
    first = Progress(0, 1, 0, 10)
    assert companion.loss(outputs, first)[1][Metric.GUARD_TEACHER] == 1.0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.neg_()
    assert (
        companion.loss(outputs, first)[1][Metric.GUARD_TEACHER] == 0.0
    )  # in the same step: the teacher has not followed


def test_a_comparison_has_one_note_per_arm_in_which_it_spoke_the_control_included():
    spoken = {("control", 1), ("DANN", 2), ("DANN", 0)}
    runs = [
        ArmRun(arm, seed, f"{arm}{seed}", {}, {}, {Tag.GUARD: f"{arm} {seed}"} if (arm, seed) in spoken else {}, False)
        for arm in ("control", "DANN", "style") for seed in (2, 1, 0)
    ]  # fmt: skip
    assert list(_doubts(runs, ["DANN", "style"])) == [
        "The guard warned in control, seed 1: control 1 (docs/guards.md).",
        "The guard warned in DANN, seeds 0, 2; in seed 0: DANN 0 (docs/guards.md).",
    ]
