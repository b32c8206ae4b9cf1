"""`trainer.precision: auto`: what it chooses, and that a run, a sweep and a comparison record the choice."""

import mlflow
import pytest
import torch
from conftest import small_settings

from dann_experiments import InputError, adapt, load_config
from dann_experiments.comparison.arms import arms_of, cells_of
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.jobs import precision
from dann_experiments.jobs.precision import with_precision
from dann_experiments.jobs.resume import _agreed
from sweeps import driver, run_sweep
from sweeps.settings import SweepConfig


@pytest.fixture
def on(monkeypatch):
    """Pretends a machine: its GPUs, whether these compute in bfloat16, and the processor's instructions."""

    def pretend(gpus=(), bf16=False, instructions=()):
        monkeypatch.setattr(precision, "visible_gpus", lambda accelerator: list(gpus))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True) | {"amx_tile": False}
        )

    return pretend


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"gpus": ["0"], "bf16": True}, "bf16-mixed"),
        ({"gpus": ["0"], "bf16": False, "instructions": ["amx_bf16"]}, "32-true"),
        ({"instructions": ["amx_bf16", "avx512_bf16"]}, "bf16-mixed"),
        ({"instructions": ["avx512_bf16"]}, "bf16-mixed"),
        ({"instructions": ["avx512_f"]}, "32-true"),
    ],
)
def test_auto_is_half_precision_where_the_machine_computes_in_it(on, machine, expected):
    on(**machine)
    assert with_precision(load_config(None, {"trainer.precision": "auto"})).trainer.precision == expected
    assert with_precision(load_config(None, {"trainer.precision": "16-mixed"})).trainer.precision == "16-mixed"


def test_the_default_stays_single_precision(on):
    on(gpus=["0"], bf16=True)
    assert with_precision(load_config()).trainer.precision == "32-true"


def test_a_run_records_what_auto_chose(on, squares, pretrained_place):
    on(instructions=["avx512_bf16"])
    more = {"trainer__max_epochs": 1, "trainer__limit_train_batches": 1, "pretraining__max_epochs": 1}
    result = adapt(load_config(None, small_settings(squares, trainer__precision="auto", **more)))
    params = mlflow.get_run(result.run_id).data.params
    assert params["cfg.trainer.precision"] == "bf16-mixed"


def test_the_runs_of_a_comparison_are_looked_for_by_what_auto_chose(on, squares):
    on(instructions=["avx512_bf16"])
    digests = []
    for given in ("auto", "bf16-mixed"):
        config = load_config(None, small_settings(squares, trainer__precision=given))
        arms, _ = arms_of(CompareConfig(), config)
        cells = cells_of(arms, [0], config, None)
        assert {cell.config.trainer.precision for cell in cells} == {"bf16-mixed"}
        digests.append([cell.digest for cell in cells])
    assert digests[0] == digests[1]


def test_a_sweep_decides_for_all_its_trials(on, squares, monkeypatch):
    on(instructions=["avx512_bf16"])
    seen = []

    def stop(space, config):
        seen.append(config.trainer.precision)
        raise KeyError

    monkeypatch.setattr(driver, "read_space", stop)
    with pytest.raises(KeyError):
        run_sweep(SweepConfig(study="one"), load_config(None, small_settings(squares, trainer__precision="auto")))
    assert seen == ["bf16-mixed"]


def test_a_run_that_chose_its_precision_resumes_with_the_same_settings():
    asked = load_config(None, {"trainer.precision": "auto"})
    for chosen in ("bf16-mixed", "32-true"):
        recorded = load_config(None, {"trainer.precision": chosen})
        assert _agreed("adapt", recorded, asked).trainer.precision == chosen
    with pytest.raises(InputError, match=r"trainer\.precision is '16-mixed', but '32-true'"):
        _agreed("adapt", recorded, load_config(None, {"trainer.precision": "16-mixed"}))
