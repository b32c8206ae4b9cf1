"""Warm-up, schedules, frozen parts, rates per part, averaged weights, accumulated gradients, early stopping."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_folder, small_settings
from safetensors.torch import load_file
from test_resume import Killed, Noise, assert_same, killed, settings
from torch import nn

from dann_experiments import DomainAdaptationMethod, InputError, MethodLoss, load_config
from dann_experiments.adaptation.method import Progress, StepOutputs
from dann_experiments.jobs import RunResult, adapt, pretrain
from dann_experiments.training.optimizers import LearningRates, build_scheduler
from dann_experiments.training.parts import param_groups
from dann_experiments.training.validated import Plateau, StopsEarly

PRETRAINED = "domain_adaptation.pretrained_checkpoint.path"


def rates_of(rates: LearningRates, steps: int) -> list[float]:
    """The learning rate of each of `steps` steps, from 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, rates, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


def test_polynomial_decay_is_one_minus_progress_to_the_power():
    """Chen et al. 2018 (DeepLab), section 4: (1 - iter / max_iter)^power, power 0.9."""
    found = rates_of(LearningRates("polynomial", power=0.9), 10)
    assert found == pytest.approx([(1 - step / 10) ** 0.9 for step in range(10)])


@pytest.mark.parametrize("schedule", ["constant", "annealed", "cosine", "polynomial"])
def test_a_warm_up_rises_linearly_to_the_schedule_and_then_is_the_schedule(schedule):
    plain, warm = rates_of(LearningRates(schedule), 20), rates_of(LearningRates(schedule, warmup_steps=4), 20)
    assert warm[:4] == pytest.approx([rate * share for rate, share in zip(plain, (0.2, 0.4, 0.6, 0.8), strict=False)])
    assert warm[4:] == pytest.approx(plain[4:])


class Trainer:
    """What the callbacks below use of a trainer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        from pytorch_lightning.trainer.states import TrainerFn

        self.optimizers, self.callback_metrics = [optimizer], {}
        self.sanity_checking, self.state = False, type("State", (), {"fn": TrainerFn.FITTING})


def test_plateau_multiplies_the_rates_after_more_than_patience_validations_and_goes_on_from_its_state():
    def run(values: list[float], state: Any = None, lr: float = 1.0) -> tuple[list[float], Any]:
        trainer: Any = Trainer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr))
        plateau = Plateau("iou/source_val", "max", 0.5, 1)
        if state is not None:
            plateau.load_state_dict(state)
        plateau.on_train_start(trainer, nn.Module())  # pyright: ignore[reportArgumentType]
        found = []
        for value in values:
            trainer.callback_metrics["iou/source_val"] = torch.tensor(value)
            plateau.on_validation_end(trainer, nn.Module())  # pyright: ignore[reportArgumentType]
            found.append(trainer.optimizers[0].param_groups[0]["lr"])
        return found, plateau.state_dict()

    whole, _ = run([0.5, 0.6, 0.6, 0.6, 0.59, 0.58, 0.7])
    assert whole == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    first, state = run([0.5, 0.6, 0.6])
    assert first + run([0.6, 0.59, 0.58, 0.7], state)[0] == whole


def test_groups_have_the_rates_of_their_innermost_part():
    network = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer2": nn.Linear(2, 2)}), "head": nn.Linear(2, 2)}
    )
    groups = param_groups(network, {"encoder": 0.1, "encoder.layer1": 0.01})
    assert [(group["name"], group.get("lr"), len(group["params"])) for group in groups] == [
        ("network", None, 2), ("network.encoder", 0.1, 2), ("network.encoder.layer1", 0.01, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"optimizer.warmup_steps": 5, "optimizer.schedule": "one_cycle"}, r"warmup_steps is 5, which the schedule one_cycle"),
        (
            {"pretraining.optimizer.warmup_steps": 5, "pretraining.optimizer.schedule": "plateau"},
            r"pretraining\.optimizer\.warmup_steps",
        ),
        ({"optimizer.freeze_epochs": 2}, r"optimizer\.freeze_epochs has no effect"),
        ({"optimizer.lr_factors": "{encoder: 0}"}, r"optimizer\.lr_factors is \{'encoder': 0\.0\}; give factors above 0"),
        ({"optimizer.schedule": "plateau", "monitor.metric": None}, r"schedule is plateau, but monitor\.metric is null"),
        ({"monitor.patience": 2, "monitor.metric": None}, r"monitor\.patience is 2, but monitor\.metric is null"),
        ({"trainer.ema_decay": 0.9, "trainer.devices": 2}, r"trainer\.ema_decay averages weights in one process"),
        ({"trainer.ema_decay": 1.5}, r"trainer\.ema_decay is 1\.5"),
        ({"trainer.accumulate_grad_batches": 0}, r"trainer\.accumulate_grad_batches is 0"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_told(given, told):
    with pytest.raises(InputError, match=told):
        load_config(overrides=given)


def test_an_average_of_statistics_that_are_replaced_is_told(squares, workplace):
    """Not by the settings themselves: the AdaBN arm of a comparison shares them, and is not trained."""
    more = {"trainer__ema_decay": 0.9, "domain_adaptation__batchnorm": "target_stats"}
    with pytest.raises(InputError, match=r"trainer\.ema_decay averages BatchNorm's statistics"):
        adapt(load_config(None, small_settings(squares, **more)))


@pytest.mark.parametrize("setting", ["freeze", "lr_factors"])
def test_an_unknown_part_is_told_with_the_parts_before_anything_is_trained(setting, squares, workplace):
    value = ["enc"] if setting == "freeze" else {"enc": 0.1}
    config = load_config(None, small_settings(squares) | {f"optimizer.{setting}": value})
    with pytest.raises(InputError, match=rf"optimizer\.{setting} names 'enc', .*encoder, decoder, segmentation_head"):
        adapt(config)


# --- runs ---


@pytest.fixture
def place(pretrained_place: Path) -> Path:
    return pretrained_place


def adapted(squares: Path, **more: object) -> RunResult:
    return adapt(load_config(None, small_settings(squares, **more)))


def final(result: RunResult) -> dict[str, torch.Tensor]:
    assert result.artifacts is not None
    return load_file(model_folder(result.artifacts) / "model.safetensors")


def start(result: RunResult) -> dict[str, torch.Tensor]:
    """The weights that a run started from."""
    import mlflow

    run = mlflow.MlflowClient(result.tracking_uri).get_run(str(result.source_run_id))
    return load_file(model_folder(run.info.artifact_uri) / "model.safetensors")


def test_a_frozen_part_keeps_weights_and_statistics_and_the_rest_learns(squares, place):
    result = adapted(squares, optimizer__freeze=["encoder"])
    before, after = start(result), final(result)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("encoder.")} <= same
    assert not any(name.startswith("decoder.") and name.endswith("weight") for name in same)


def test_a_part_that_is_frozen_for_some_epochs_learns_after_them(squares, place):
    from pytorch_lightning import Callback

    class Seen(Callback):
        found: list[tuple[bool, bool]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            encoder = pl_module.network.encoder
            norm = next(module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d))
            self.found.append((next(encoder.parameters()).requires_grad, norm.training))

    seen = Seen()
    settings = small_settings(squares, optimizer__freeze=["encoder"], optimizer__freeze_epochs=1, trainer__max_epochs=2)
    result = adapt(load_config(None, settings), [seen])
    half = len(seen.found) // 2
    assert seen.found == [(False, False)] * half + [(True, True)] * half
    before, after = start(result), final(result)
    encoder = [name for name in before if name.startswith("encoder.") and name.endswith("weight")]
    assert not any(torch.equal(before[name], after[name]) for name in encoder)


def test_the_rates_of_parts_are_used_and_logged(squares, place):
    result = adapted(squares, optimizer__lr=1e-3, optimizer__lr_factors={"encoder": 0.1})
    history = result.history()
    for name, rate in (("network", 1e-3), ("network.encoder", 1e-4)):
        assert history.query(f"metric == 'lr/{name}'")["value"].tolist() == pytest.approx([rate, rate])


def test_the_averaged_weights_are_validated_saved_and_the_model(squares, place):
    """The average computed beside training, step by step, is what the run ends with; its best weights too."""
    from pytorch_lightning import Callback

    class Beside(Callback):
        average: dict[str, torch.Tensor] | None = None
        scored: list[bool] = []
        seen_after: list[bool] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            now = {name: value.detach().clone() for name, value in pl_module.network.named_parameters()}
            old = self.average
            self.average = now if old is None else {name: old[name].lerp(value, 0.1) for name, value in now.items()}

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **more: Any) -> None:
            if not trainer.sanity_checking and self.average is not None:
                self.scored.append(self.has_average(pl_module))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking and trainer.state.fn == "fit":
                self.seen_after.append(self.has_average(pl_module))

        def has_average(self, pl_module: Any) -> bool:
            now, average = dict(pl_module.network.named_parameters()), self.average or {}
            return all(torch.allclose(now[name], one) for name, one in average.items())

    beside = Beside()
    settings = small_settings(squares, trainer__ema_decay=0.9, trainer__max_epochs=2, monitor__final_model="best")
    result = adapt(load_config(None, settings), [beside])
    assert beside.scored
    assert beside.seen_after == [True, True]  # as pictures by step see it
    assert all(beside.scored[: len(beside.scored) * 2 // 3])  # the last validation is that of the best weights
    checkpoints = Path(str(result.artifacts)) / "checkpoints"
    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)
    assert beside.average is not None
    for name, value in beside.average.items():
        assert torch.allclose(last["state_dict"][f"network.{name}"], value)
    weights = final(result)
    assert all(torch.equal(best["state_dict"][f"network.{name}"], weights[name]) for name in beside.average)
    assert not all(
        torch.equal(last["current_model_state"][f"network.{name}"], weights[name]) for name in beside.average
    )


def test_the_scores_of_a_run_with_averaged_weights_are_those_of_its_model(squares, place):
    from dann_experiments.jobs import evaluate

    more: dict[str, object] = {"trainer__ema_decay": 0.5, "trainer__max_epochs": 2, "monitor__final_model": "best"}
    result = adapted(squares, **more)
    again = evaluate(load_config(None, small_settings(squares) | {PRETRAINED: f"runs:/{result.run_id}"}))
    for name in ("iou/source_val", "iou/target_val", "iou/target_test"):
        assert again.metrics[name] == pytest.approx(result.metrics[name], abs=1e-6)


def test_accumulated_gradients_are_those_of_the_larger_batch():
    """Without BatchNorm: two batches of 2 in one step, and one of 4."""
    from pytorch_lightning import Trainer as Lightning
    from torch.utils.data import DataLoader

    from dann_experiments.adaptation.dann import SourceOnly
    from dann_experiments.training.module import AdaptationModule

    torch.manual_seed(0)
    network = nn.Conv2d(3, 2, 1)
    made = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 4, 4, generator=made), torch.randint(2, (8, 4, 4), generator=made)
    items = [{"source": {"image": image, "mask": mask}} for image, mask in zip(images, labels, strict=True)]
    ends = []
    for size, batches in ((4, 1), (2, 2)):
        module = AdaptationModule(
            copy.deepcopy(network), SourceOnly(), [],
            lambda groups: torch.optim.SGD(groups, lr=0.5),
        )  # fmt: skip
        trainer = Lightning(
            max_epochs=2, accumulate_grad_batches=batches, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, barebones=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(items, size))  # pyright: ignore[reportArgumentType]
        assert trainer.global_step == 4
        ends.append(next(module.network.parameters()).detach().clone())
    assert torch.allclose(*ends, atol=1e-6)


def test_steps_schedules_and_metrics_of_a_run_count_optimizer_steps(squares, place):
    more = {"optimizer__schedule": "cosine", "domain_adaptation__method__step_mode": "batch", "trainer__max_epochs": 2}
    result = adapted(squares, trainer__accumulate_grad_batches=2, **more)
    history = result.history()
    for name in ("loss/train_seg", "da/domain_acc", "da/lambda"):
        assert list(history.query(f"metric == '{name}'")["step"]) == [0, 1, 2, 3]
    assert history.query("metric == 'da/lambda'")["value"].iloc[2] == pytest.approx(2 / (1 + math.exp(-10 * 2 / 4)) - 1)
    assert history.query("metric == 'lr/network'")["value"].tolist()[1] == pytest.approx(5e-4, rel=1e-3)


def test_a_limit_of_steps_counts_optimizer_steps(squares, place):
    result = adapted(squares, trainer__accumulate_grad_batches=2, trainer__limit_train_batches=1)
    assert list(result.history().query("metric == 'loss/train_seg'")["step"]) == [0, 1]  # of two epochs


def test_training_ends_when_the_metric_has_not_improved_and_says_so(squares, place, caplog):
    """The learning rate is so small that nothing improves after the first validation."""
    caplog.set_level("INFO", "dann_experiments")
    result = adapted(
        squares, optimizer__lr=1e-12, trainer__max_epochs=9, monitor__patience=2, monitor__log_every_n_epochs=4,
        domain_adaptation__batchnorm="source_only", domain_adaptation__method__name="lambda_zero",
        monitor__metric="select/entropy", optimizer__freeze=["encoder", "decoder"],
    )  # fmt: skip
    validated = result.history().query("metric == 'iou/source_val'")["step"].unique()
    assert len(validated) <= 5
    assert "has not improved for 2 validations (monitor.patience)" in caplog.text
    assert result.metrics["iou/source_val"] == pytest.approx(result.baseline["iou/source_val"], abs=1e-3)


def test_an_infinitely_bad_score_is_no_improvement_and_no_reason_to_stop_at_once():
    stops = StopsEarly("select/entropy", "min", 2)
    trainer: Any = Trainer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    trainer.fast_dev_run, trainer.should_stop, trainer.current_epoch, trainer.max_epochs = False, False, 0, 9
    trainer.strategy = type("Strategy", (), {"reduce_boolean_decision": staticmethod(lambda value, all: value)})
    ended = []
    for value in (math.inf, 0.5, math.inf, math.inf):
        trainer.callback_metrics["select/entropy"] = torch.tensor(value)
        stops.on_validation_end(trainer, nn.Module())  # pyright: ignore[reportArgumentType]
        ended.append(trainer.should_stop)
    assert ended == [False, False, False, True]


RESUMED = {
    "plateau, frozen, rates, losses": (
        {
            "loss": ["cross_entropy", "dice"], "class_weights": "auto", "optimizer__schedule": "plateau",
            "optimizer__patience": 0,
            "optimizer__factor": 0.5, "optimizer__freeze": ["encoder"], "optimizer__freeze_epochs": 1,
            "optimizer__lr_factors": {"decoder": 0.5}, "monitor__metric": "iou/gap_source_minus_target",
            "trainer__max_epochs": 3,
        },
        9,
    ),
    "average, accumulated, warm-up": (
        {
            "trainer__ema_decay": 0.8, "trainer__accumulate_grad_batches": 2, "optimizer__schedule": "polynomial",
            "optimizer__warmup_steps": 2, "trainer__max_epochs": 3, "monitor__final_model": "best",
        },
        3,
    ),
    "average, killed behind the last step": ({"trainer__ema_decay": 0.8}, 8),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on_to_the_same_weights(name, workplace, squares):
    more, step = RESUMED[name]
    pretrained = pretrain(settings(squares, workplace / "pretrained"))
    assert pretrained.artifacts is not None
    more = more | {PRETRAINED.replace(".", "__"): str(model_folder(pretrained.artifacts))}
    uninterrupted = adapt(settings(squares, workplace / "whole", **more), [Noise()])
    config = settings(squares, workplace / "killed", **more, trainer__checkpoint_every_n_steps=1)
    killed("adapt", config, Noise(), Killed("on_train_end" if step == 8 else "on_train_batch_start", step))
    assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted, once="best" not in str(more))


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_end", "on_train_batch_start"])
def test_a_run_killed_when_it_had_stopped_early_ends_there(hook, workplace, squares):
    more = {
        "monitor__patience": 1, "trainer__max_epochs": 9, "monitor__metric": "iou/source_val", "optimizer__lr": 0.05,
        PRETRAINED.replace(".", "__"): str(model_folder(str(pretrain(settings(squares, workplace / "pretrained")).artifacts))),
    }  # fmt: skip
    uninterrupted = adapt(settings(squares, workplace / "whole", **more), [Noise()])
    steps = max(uninterrupted.history()["step"].tolist())
    assert steps < 9 * 4
    config = settings(squares, workplace / "killed", **more, trainer__checkpoint_every_n_steps=1)
    killed("adapt", config, Noise(), Killed(hook, steps if hook == "on_train_end" else 2))
    assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted)


class Late(DomainAdaptationMethod):
    """A method that creates a parameter after the average of the weights was made."""

    feature_layers = ("encoder",)

    def on_train_start(self, network: nn.Module) -> None:
        self.late = nn.ParameterList([torch.zeros(1)])

    def loss(self, outputs: StepOutputs, progress: Progress) -> MethodLoss:
        return MethodLoss(None, None, 0.0)


def test_weights_that_the_method_creates_too_late_are_not_averaged_under_wrong_names(squares, pretrained_place):
    more = {"domain_adaptation__method__class_path": f"{__name__}.Late", "trainer__max_epochs": 1}
    with pytest.raises(
        InputError, match=r"trainer\.ema_decay cannot average method\.late\.0, which the method created"
    ):
        adapt(load_config(None, small_settings(squares, **more, trainer__ema_decay=0.9)))
    adapt(load_config(None, small_settings(squares, **more)))


def test_no_checkpoint_is_saved_between_the_batches_of_a_step(squares, pretrained_place, monkeypatch):
    """It would lack the gradients of the batches so far; `make chaos` found one saved in the first step, step 0."""
    from dann_experiments.training.checkpointing import Checkpoints

    saved, save = [], Checkpoints.save

    def recorded(self, trainer):
        saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.processed))
        save(self, trainer)

    monkeypatch.setattr(Checkpoints, "save", recorded)
    more = {"trainer__accumulate_grad_batches": 2, "trainer__checkpoint_every_n_steps": 1, "trainer__max_epochs": 1}
    adapt(load_config(None, small_settings(squares, **more)))
    within = [(step, batches) for step, batches in saved if batches]
    assert within
    assert all(step > 0 and batches == 2 * step for step, batches in within[:-1])
