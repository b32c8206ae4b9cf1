"""Infinity and NaN come back from the store as they were logged, and no score is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import small_settings

from dann_experiments import DomainAdaptationMethod, compare, load_config
from dann_experiments.adaptation.method import MethodLoss
from dann_experiments.comparison.collect import read_run, with_probe_of_the_start
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.jobs.result import RunResult
from dann_experiments.tracking.store import Store, open_store
from dann_experiments.tracking.values import as_logged, last_values, logged_points
from sweeps.definition import describe
from sweeps.objective import _objective_value, run_trial
from sweeps.settings import SweepConfig
from sweeps.space import read_space
from sweeps.study import Slot, Sweep, open_storage

INF, NAN = math.inf, math.nan
METHOD = "domain_adaptation.method"


def logged(store: Store, values: list[float], name: str = "da/loss", tags: Mapping[str, str] | None = None) -> str:
    run_id = store.client.create_run(store.experiment_id, tags=dict(tags or {})).info.run_id
    for step, value in enumerate(values):
        store.client.log_metric(run_id, name, value, step=step, timestamp=1000 - step)
    return run_id


def result_of(store: Store, run_id: str) -> RunResult:
    return RunResult("adapt", run_id, store.experiment_id, store.uri, {})


VALUES = [0.5, INF, -INF, NAN, 1e300, 2.0]


def check(store: Store) -> None:
    run_id = logged(store, VALUES)
    for found in (
        [point.value for point in logged_points(store.client, run_id, "da/loss")],
        result_of(store, run_id).history()["value"].tolist(),
    ):
        assert str(found) == str(VALUES)
    for value in (INF, -INF, NAN):
        run = store.client.get_run(logged(store, [value]))
        assert str(last_values(run)) == str({"da/loss": value})


def test_a_sqlite_store_gives_infinity_and_nan_back_as_they_were_logged(workplace):
    check(open_store(None, "e"))


def test_a_server_gives_infinity_and_nan_back_as_they_were_logged(server):
    check(open_store(server, "e"))


@pytest.mark.parametrize(("stored", "value"), [(1.7976931348623157e308, INF), (-1.7976931348623157e308, -INF), (1e308, INF),
                                              (9e307, 9e307), (-3.0, -3.0), (0.0, 0.0)])  # fmt: skip
def test_only_the_largest_floats_stand_for_infinity(stored, value):
    assert as_logged(stored) == value


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_an_objective_with_one_value_that_is_no_finite_number_fails_its_trial(workplace, bad):
    store = open_store(None, "e")
    good = [1.0] * 20
    assert _objective_value(result_of(store, logged(store, [bad, *good])), "da/loss") == 1.0  # not in the window
    with pytest.raises(FloatingPointError, match=rf"da/loss is {bad} at step 20, among the last tenth"):
        _objective_value(result_of(store, logged(store, [*good, bad])), "da/loss")


class OnceInfinite(DomainAdaptationMethod):
    """Logs a metric of its own that is infinite at the last steps but one."""

    def loss(self, outputs, progress):
        value = INF if progress.step > 5 else 1.0
        return MethodLoss(None, None, 0.0, {"da/mine": value})


@pytest.mark.usefixtures("pretrained_place")
def test_a_trial_whose_objective_was_infinite_once_fails_and_says_why(workplace, squares):
    settings = small_settings(squares, domain_adaptation__method__class_path=f"{__name__}.OnceInfinite")
    config = load_config(None, settings)
    sweep = SweepConfig(
        space={"optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-3}}, study="s", n_trials=1,
        objective="da/mine", direction="minimize", pruner="none", allow_class_path=f"{__name__}.OnceInfinite",
    )  # fmt: skip
    space = read_space(sweep.space, config)
    study = Sweep.create(open_storage("journal.log"), "s", maximizes=False)
    describe(study, sweep, space, config, 1)
    study.add([Slot("search", {})])
    slot = study.claim("host:1:0", "t")
    assert slot is not None
    run_trial(study, space, sweep, config, slot, "run")
    trial = study.trials()[0]
    assert trial.state.name == "FAIL"
    assert "FloatingPointError: da/mine is inf at step" in trial.user_attrs["error"]


def comparison_runs(store: Store, bad: float) -> list[str]:
    """Three seeds of source model, control and DANN; one score of DANN is `bad`."""
    ids = []
    for seed in range(3):
        tags = {"seed": str(seed), "mlflow.user": "me"}
        source = logged(store, [0.50 + seed / 100], "iou/target_test", {**tags, "dann.job": "pretrain"})
        for method, score in (("lambda_zero", 0.55), ("dann", 0.7)):
            own = {**tags, "dann.job": "adapt", "dann.method": method, "dann.source_run_id": source}
            value = bad if (method, seed) == ("dann", 1) else score + seed / 70
            run_id = logged(store, [value], "iou/target_test", own)
            for step, probe in enumerate((bad, 0.9)):
                store.client.log_metric(run_id, "da/probe_acc", probe, step=step)
            store.client.log_metric(run_id, "iou/target_val", 0.1, step=1)
            ids.append(run_id)
        ids.append(source)
    for run_id in ids:
        store.client.set_terminated(run_id)
    return ids


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_a_comparison_leaves_such_a_score_out_and_says_so(workplace, squares, bad):
    config = load_config(None, small_settings(squares))
    store = open_store(None, config.tracking.experiment)
    ids = comparison_runs(store, bad)
    result = compare(config, CompareConfig(runs=ids))
    assert result.comparison.metric == "iou/target_test"
    verdict = result.verdicts[0]
    assert verdict.against_source.n == 2
    assert "lacks a score in some arm" in verdict.reason
    notes = [note for note in result.comparison.notes if "no finite number" in note]
    assert len(notes) == 1
    assert notes[0].startswith("DANN, seed 1: iou/target_test of run ")
    row = result.table.query("arm == 'DANN' and metric == 'iou/target_test'").iloc[0]
    assert (row["n"], math.isfinite(row["mean"])) == (2, True)
    assert result.artifacts is not None
    for name in ("report.html", "tables/runs.csv", "tables/scores.csv"):
        text = (Path(result.artifacts) / name).read_text()
        assert "e+308" not in text
        assert "1797693" not in text
        assert ",inf" not in text
        assert "nan," not in text or name != "tables/runs.csv"


def test_the_probe_of_the_start_is_that_of_step_0_or_none():
    def runs(points: list[tuple[int, float]]) -> list[ArmRun]:
        adapted = ArmRun("DANN", 0, "r", {}, {"da/probe_acc": points, "iou/target_val": [(0, 0.5)]})
        return [ArmRun("source only", 0, "s", {}), adapted]

    arms = [Arm("source only", "source_only"), Arm("DANN", "adapted")]
    for points, found in (([(0, 0.9), (8, 0.6)], {"da/probe_acc": 0.9}), ([(8, 0.6)], {}), ([], {})):
        assert with_probe_of_the_start(runs(points), arms)[0].metrics == found


def test_a_run_is_read_with_its_infinite_values_as_such(workplace):
    store = open_store(None, "e")
    run_id = logged(store, [1.0, INF], "iou/target_val", {"seed": "0", "dann.job": "adapt"})
    run = read_run(store, run_id, Arm("DANN", "adapted"), reused=True)
    assert run.metrics == {"iou/target_val": INF}
    assert run.history == {"iou/target_val": [(0, 1.0)]}
