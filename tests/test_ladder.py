"""The ladder of arms, and the table that says which part made the gain."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import pytorch_lightning as pl
from conftest import small_settings

from dann_experiments import adapt, load_config
from dann_experiments.__main__ import main
from dann_experiments.comparison.arms import arms_of
from dann_experiments.comparison.parts import part_table
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.config import config_to_yaml
from dann_experiments.config.comparison import NAMED_ARMS, CompareConfig


def run_of(arm: str, seed: int, method: str, companions: str = "") -> ArmRun:
    tags = {"dann.method": method} | ({"dann.companions": companions} if companions else {})
    return ArmRun(arm, seed, f"{arm}{seed}", {}, {}, tags, False)


def test_each_part_is_an_arm_against_the_same_arm_without_it():
    arms = [
        Arm("source", "source_only"),
        Arm("control", "control"),
        Arm("DANN", "adapted"),
        Arm("self", "adapted", {"domain_adaptation.method.name": "lambda_zero"}),
        Arm("both", "adapted", {"domain_adaptation.companions": ["self_training"]}),
        Arm("wider", "adapted", {"domain_adaptation.companions": ["self_training"], "data.crop_size": 64}),
    ]
    kinds = {"control": ("lambda_zero", ""), "DANN": ("dann", ""), "self": ("lambda_zero", "self_training"),
             "both": ("dann", "self_training"), "wider": ("dann", "self_training")}  # fmt: skip
    runs = [run_of(name, seed, *kind) for name, kind in kinds.items() for seed in range(2)]
    values = {"source": 0.3, "control": 0.4, "DANN": 0.45, "self": 0.5, "both": 0.57, "wider": 0.9}
    scores = {name: {seed: value + 0.01 * seed for seed in range(2)} for name, value in values.items()}
    table = part_table(arms, runs, scores).set_index(["arm", "without"])
    assert dict(table["part"]) == {
        ("DANN", "control"): "adversary", ("self", "control"): "self_training",
        ("both", "DANN"): "self_training", ("both", "self"): "adversary",
    }  # fmt: skip
    assert table["mean"].round(6).to_dict() == {
        ("DANN", "control"): 0.05, ("self", "control"): 0.1, ("both", "DANN"): 0.12, ("both", "self"): 0.07
    }  # fmt: skip
    assert set(table["n"]) == {2}


def test_the_ladder_s_arms_differ_from_the_control_in_parts_alone_and_the_oracle_may_be_missing(squares):
    config = load_config(None, small_settings(squares))
    arms, notes = arms_of(CompareConfig(arms={name: dict(arm) for name, arm in NAMED_ARMS["ladder"].items()}), config)
    missing = {"oracle", "rule alone", "weak labels", "DANN + weak labels"}
    assert [arm.name for arm in arms] == [name for name in NAMED_ARMS["ladder"] if name not in missing]
    assert any(note.startswith("No oracle") for note in notes)
    for arm in arms:
        assert set(arm.overrides) <= {"domain_adaptation.method.name", "domain_adaptation.companions"}
    assert not any("differs from the control in more than" in note for note in notes)


@pytest.mark.slow
def test_the_ladder_is_one_command(squares, workplace, capsys, caplog):
    Path("mine.yaml").write_text(config_to_yaml(load_config(None, small_settings(squares, trainer__max_epochs=1))))
    assert main(["compare", "--config", "mine.yaml", "--arms", "ladder", "--seeds", "1", "--workers", "1"]) == 0
    assert caplog.text.count("lambda is 0 in the only epoch") == 1  # of all arms
    printed = capsys.readouterr().out
    assert "What each part adds" in printed
    assert "What else to try, and when to stop: docs/which-method.md" in printed  # one seed proves nothing
    (table,) = Path("mlruns").rglob("parts.csv")
    assert set(pd.read_csv(table)["part"]) == {
        "adversary",
        "entropy",
        "maximum_squares",
        "self_training",
        "style",
        "moments",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "companions", "passes"),
    [("dann", [], 2), ("lambda_zero", ["style"], 2), ("lambda_zero", ["self_training"], 4), ("source_only", [], 1)],
)
def test_the_logged_passes_are_those_that_encoders_take(
    squares, workplace, pretrained_place, method, companions, passes
):
    """Counted at the encoders of the network and of the teacher, during the first training step."""
    counted: list[int] = []

    class Counts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counted.clear()
            networks = [pl_module.network]
            for part in getattr(pl_module.method, "companions", ()):
                networks += [part.teacher.module] if hasattr(part, "teacher") else []
            for network in networks:
                network.encoder.register_forward_pre_hook(lambda _, given: counted.append(len(given[0])))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counted.append(-1)
            trainer.should_stop = True

    given = {"domain_adaptation.method.name": method, "domain_adaptation.companions": companions}
    config = load_config(
        None,
        small_settings(squares, trainer__max_epochs=1, data__source__batch_size=4, data__target__batch_size=4) | given,
    )
    result = adapt(config, [Counts()])
    taken = sum(counted[: counted.index(-1)]) / config.data.source.batch_size
    logged = result.history().query("metric == 'time/passes_per_step'")
    assert (taken, list(logged["value"]), list(logged["step"])) == (passes, [passes], [0])
