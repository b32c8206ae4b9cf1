"""The monitor, the probe and the choice of weights at work: in a user's own module under each logger, and in whole runs.

The first half trains networks of a handful of weights whose right answers are scripted; the second looks at seven whole runs
from one source model, made once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import model_folder, read_sets, small_settings, squares_in, write_domain
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from pytorch_lightning.utilities import CombinedLoader
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from dann_experiments import InputError, RunResult, adapt, evaluate, load_config, pretrain
from dann_experiments.adaptation.dann import DANNMethod, SourceOnly
from dann_experiments.adaptation.method import DomainAdaptationMethod, MethodLoss
from dann_experiments.config.run import MonitorConfig
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.models.batchnorm import statistics_loader, target_statistics
from dann_experiments.models.networks import build_network
from dann_experiments.models.passes import choose
from dann_experiments.models.taps import resolve_taps
from dann_experiments.names import SOURCE_VAL, TARGET_TRAIN, Metric, OneDomain, SetName, Tag
from dann_experiments.scores.domain_probe import probe
from dann_experiments.scores.selection import SCORES
from dann_experiments.tracking.notes import escaped
from dann_experiments.tracking.run import RunLogger, tracked_run
from dann_experiments.tracking.store import open_store
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback, TargetStatistics

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:.*does not have a.*dataloader"
)
Points = dict[str, list[tuple[int, float]]]
COLUMNS = 10


# A user's own module ---------------------------------------------------------------------------------------------------


class Scripted(pl.LightningModule):
    """A user's module that knows nothing of domains. An image is its label; in validation k (0 = before training) the columns
    `wrong[k]` of (source, target) are taken for the other class. A label map of two halves then has IoU (10 - w) / (10 + w)."""

    def __init__(self, wrong: Sequence[tuple[int, int]], sure: Sequence[float] = ()) -> None:
        super().__init__()
        self.wrong = list(wrong)
        self.sure = list(sure) or [3.0] * len(wrong)
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("validations", torch.tensor(0))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.weight * batch["image"].sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        shown = batch["image"].clone()
        columns = self.wrong[int(self.validations)][dataloader_idx]
        shown[..., :columns] = 1 - shown[..., :columns]
        sure = self.sure[int(self.validations)] * (1 if dataloader_idx else 2)  # of the source twice as sure
        logits = functional.one_hot(shown.long(), 2).movedim(-1, 1) * sure
        return {"logits": logits, "labels": batch["mask"]}

    def on_validation_epoch_end(self) -> None:
        self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def halves(count: int) -> dict[str, Tensor]:
    mask = torch.cat([torch.zeros(count, 2, COLUMNS), torch.ones(count, 2, COLUMNS)], 1).long()
    return {"image": mask.float(), "mask": mask}


def batches(*made: dict[str, Tensor]) -> DataLoader:
    return DataLoader(list(made), batch_size=None)  # pyright: ignore[reportArgumentType]


def trainer_of(folder: Path, epochs: int, *callbacks: pl.Callback, logger: Logger | bool | list[Logger] = False):
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=logger, callbacks=list(callbacks), num_sanity_val_steps=-1,
        enable_checkpointing=any(isinstance(item, ModelCheckpoint) for item in callbacks), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip


def watched(
    folder: Path,
    module: Scripted,
    logger: Logger | bool | list[Logger] = False,
    *callbacks: pl.Callback,
    **settings: Any,
) -> DomainAdaptationMonitorCallback:
    """Train `module`, two steps an epoch, with a validation after each; batches of unequal size."""
    monitor = DomainAdaptationMonitorCallback(2, ["ground", "square"], **settings)
    trainer = trainer_of(folder, len(module.wrong) - 1, monitor, *callbacks, logger=logger)
    both = [batches(halves(3), halves(1)), batches(halves(2))]
    trainer.fit(module, batches(halves(1), halves(1)), both)
    return monitor


def iou(wrong: int) -> float:
    return (COLUMNS - wrong) / (COLUMNS + wrong)


def points_of(store: mlflow.MlflowClient, run_id: str) -> Points:
    names = store.get_run(run_id).data.metrics
    return {
        name: [(point.step, point.value) for point in store.get_metric_history(run_id, name)] for name in sorted(names)
    }


def read_mlflow(logger: MLFlowLogger) -> Points:
    return points_of(logger.experiment, str(logger.run_id))


def read_csv(logger: CSVLogger) -> Points:
    table = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    return {
        str(name): [(int(step), float(value)) for step, value in table[["step", name]].dropna().to_numpy()]
        for name in table
    }


def read_tensorboard(logger: TensorBoardLogger) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


LOGGERS: Mapping[str, tuple[Callable[[Path, str], Logger], Callable[..., Points]]] = {
    "mlflow": (lambda folder, uri: MLFlowLogger("plain", tracking_uri=uri), read_mlflow),
    "csv": (lambda folder, uri: CSVLogger(folder), read_csv),
    "tensorboard": (lambda folder, uri: TensorBoardLogger(folder), read_tensorboard),
}
SCRIPT = [(0, 6), (1, 4), (0, 2)]  # by hand: source 1, 9/11, 1; target 4/16, 6/14, 8/12


@pytest.mark.parametrize("name", LOGGERS)
def test_a_user_s_own_module_is_watched_under_each_logger_of_lightning(place, tmp_path, monkeypatch, name):
    make, read = LOGGERS[name]
    monkeypatch.chdir(tmp_path)
    logger = make(tmp_path, place.uri)
    monitor = watched(tmp_path, Scripted(SCRIPT), logger, forgetting_threshold=0.5)
    logged = read(logger)
    expected = {
        "iou/source_val": [1.0, 9 / 11, 1.0],
        "iou/target_val": [1 / 4, 3 / 7, 2 / 3],
        "class_iou/target_val/square": [1 / 4, 3 / 7, 2 / 3],
        "class_iou/source_val/ground": [1.0, 9 / 11, 1.0],
        "iou/gap_source_minus_target": [3 / 4, 9 / 11 - 3 / 7, 1 / 3],
        "iou/source_drop_from_baseline": [0.0, 2 / 11, 0.0],
        Metric.SOURCE_KEPT: [1.0, 1.0, 1.0],
    }
    # each pixel is as sure as the others: softmax of (3, 0)
    share = 1 / (1 + np.exp(-3.0))
    loss = -np.log([share, 1 - share])
    expected["loss/val_target"] = [loss[0] + w / COLUMNS * (loss[1] - loss[0]) for _, w in SCRIPT]
    expected["select/entropy"] = [-(share * np.log(share) + (1 - share) * np.log(1 - share)) / np.log(2)] * 3
    for metric, values in expected.items():
        assert [step for step, _ in logged[metric]] == [0, 2, 4], metric
        assert [value for _, value in logged[metric]] == pytest.approx(values, abs=1e-6), metric
    assert set(SCORES) <= set(logged)
    assert not [metric for metric in logged if metric.startswith("da")]
    assert monitor.baseline["source"].iou == 1.0
    assert monitor.baseline["target"].iou == 1 / 4
    # an image counts once, however the batches are cut: 4 source images of 40 pixels
    assert monitor.latest["source"].confusion.sum() == 4 * 4 * COLUMNS


def test_without_a_logger_and_without_a_target_the_monitor_watches_all_the_same(tmp_path):
    monitor = watched(tmp_path, Scripted(SCRIPT))
    assert monitor.metrics()["iou/gap_source_minus_target"] == pytest.approx(1 / 3)
    alone = DomainAdaptationMonitorCallback(2)
    trainer = trainer_of(tmp_path, 2, alone)
    trainer.fit(Scripted(SCRIPT), batches(halves(1), halves(1)), batches(halves(3)))
    assert set(alone.metrics()) == {
        "iou/source_val", "floor/source_val", "map/source_val", "loss/val_source", "iou/source_drop_from_baseline",
        *(f"{kind}/source_val/class_{index}" for kind in ("class_iou", "ap", "share", "true_share") for index in (0, 1)),
    }  # fmt: skip


def test_only_every_so_many_epochs_and_the_last_are_logged_but_all_are_watched(tmp_path):
    logger = CSVLogger(tmp_path)
    script = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (1, 0)]
    seen: list[float] = []

    class Seen(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(float(trainer.callback_metrics["iou/source_val"]))

    watched(tmp_path, Scripted(script), logger, Seen(), log_every_n_epochs=2)
    assert [step for step, _ in read_csv(logger)["iou/source_val"]] == [0, 4, 8, 10]
    assert seen == pytest.approx([iou(w) for w, _ in script[1:]])


def forgetting(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "forgetting the source" in record.getMessage()]


def test_the_source_falling_below_the_threshold_twice_is_two_warnings_and_a_tag_in_mlflow(place, tmp_path, caplog):
    # source IoU 1, then 0.82 (falls), 0.67 (still down), 0.82 > 0.7 (back), 0.67 (falls again)
    script = [(0, 0), (2, 0), (2, 0), (1, 0), (2, 0)]
    loggers = [MLFlowLogger("plain", tracking_uri=place.uri), CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    with tracked_run(place.store, None, "ours", {}, tmp_path / "out", use_claimed=False) as run:
        watched(tmp_path, Scripted(script), [*loggers, RunLogger(run)], forgetting_threshold=0.3)
    told = forgetting(caplog)
    assert len(told) == 2
    assert "iou/source_val fell to 0.667, 0.333 below" in told[0]
    assert "forgetting_threshold is 0.300" in told[0]
    for run_id in (run.run_id, loggers[0].run_id):
        assert place.client.get_run(run_id).data.tags[Tag.FORGOT_SOURCE] == "true"
    assert [value for _, value in points_of(place.client, run.run_id)[Metric.SOURCE_KEPT]] == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_source_that_stays_within_the_threshold_gives_neither_warning_nor_tag(place, tmp_path, caplog):
    logger = MLFlowLogger("plain", tracking_uri=place.uri)
    # better than the warm start by more than the threshold, then back to it: no fall below the baseline
    watched(tmp_path, Scripted([(2, 0), (0, 0), (2, 0)]), logger, forgetting_threshold=0.3)
    assert not forgetting(caplog)
    assert Tag.FORGOT_SOURCE not in place.client.get_run(str(logger.run_id)).data.tags


def test_a_second_training_has_its_own_baseline_and_its_own_warnings(tmp_path, caplog):
    monitor = DomainAdaptationMonitorCallback(2, forgetting_threshold=0.1)
    for _ in range(2):
        trainer = trainer_of(tmp_path, 1, monitor)
        trainer.fit(Scripted([(0, 0), (5, 0)]), batches(halves(1)), batches(halves(3)))
        assert monitor.harmed
    assert len(forgetting(caplog)) == 2
    assert not DomainAdaptationMonitorCallback(2).harmed


@pytest.mark.parametrize(("steps", "said"), [(0, "no baseline"), (1, "a part of validation"), (-1, None)])
def test_a_baseline_that_is_none_or_of_a_part_of_validation_is_said(tmp_path, caplog, steps, said):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[DomainAdaptationMonitorCallback(2)], num_sanity_val_steps=steps, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Scripted([(0, 0), (0, 0)]), batches(halves(1)), batches(halves(3), halves(1)))
    told = [record.getMessage() for record in caplog.records if "num_sanity_val_steps" in record.getMessage()]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


# Which epoch is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "sure", "best_step"),
    [
        ([(0, 0)] * 4, [1.0, 2.0, 4.0, 3.0], 4),  # the surest
        ([(0, 0), (0, 0), (4, 0), (0, 0)], [1.0, 2.0, 4.0, 3.0], 6),  # the surest forgot: the next
        ([(0, 0), (4, 0), (4, 0), (4, 0)], [1.0, 2.0, 4.0, 3.0], 2),  # all forgot: there is none to prefer
    ],
)
def test_an_epoch_that_forgot_the_source_is_chosen_by_entropy_only_if_there_is_no_other(
    tmp_path, script, sure, best_step
):
    metric = "select/entropy"
    best = ModelCheckpoint(tmp_path, filename="best", monitor=metric, mode=MonitorConfig(metric=metric).direction)
    watched(tmp_path, Scripted(script, sure), False, best)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == best_step


@pytest.mark.parametrize("metric", SCORES)
def test_the_direction_in_the_settings_is_the_score_s_own(metric):
    assert MonitorConfig(metric=metric).direction == SCORES[metric].better
    assert not MonitorConfig(metric=metric).uses_target_labels


def test_scores_without_labels_do_not_look_at_the_target_s_labels(tmp_path):
    monitor = DomainAdaptationMonitorCallback(2)
    module = adapting("pixel")
    found = []
    for turned in (False, True):
        source, target = domain_batches(0), domain_batches(1)
        for batch in target if turned else []:
            batch["mask"] = 1 - batch["mask"].clamp_max(1)
        trainer_of(tmp_path, 1, monitor).validate(module, [batches(*source), batches(*target)], verbose=False)
        found.append((dict(monitor.target_scores), dict(monitor.domain_accuracy), monitor.latest["target"].iou))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 4
    assert found[0][1] == found[1][1]
    assert found[0][2] != found[1][2]


# The run's own classifier on held-out images -----------------------------------------------------------------------------


def adapting(
    kind: str = "pooled",
    layers: Sequence[str] = ("encoder",),
    method: DomainAdaptationMethod | None = None,
    batchnorm: str = "separate",
) -> AdaptationModule:
    """A network that takes sides divisible by 8 and whose BatchNorm statistics differ from any batch's, and a DANN whose
    classifiers are random."""
    torch.manual_seed(0)
    network = build_network("linknet", "resnet18", None, 3, 2, {"encoder_depth": 3})
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(4, 3, 32, 32))
    taps = resolve_taps(network, list(layers), 3)
    if method is None:
        method = DANNMethod(list(layers), [tap.channels for tap in taps], kind, 8, 1e-3)  # pyright: ignore[reportArgumentType]
    return AdaptationModule(network, method, taps, lambda groups: torch.optim.SGD(groups, 1e-3), batchnorm=batchnorm)


def domain_batches(domain: int) -> list[dict[str, Tensor]]:
    """Batches of unequal size, images of unequal size that 8 does not divide; ignored pixels (source), nodata (target)."""
    made = []
    for number, (count, height, width) in enumerate([(5, 30, 34), (1, 19, 21), (2, 32, 40)]):
        generator = torch.Generator().manual_seed(10 * number + domain)
        image = torch.randn(count, 3, height, width, generator=generator) * 0.5 + 0.4 * domain
        mask = torch.randint(0, 2, (count, height, width), generator=generator)
        batch = {"image": image, "mask": mask}
        counted = torch.ones(count, height, width)
        counted[:, :, : 5 + 6 * number] = 0
        counted[:, 11:] *= (torch.rand(count, height - 11, width, generator=generator) > 0.3).float()
        if count > 1:
            counted[1] = 0  # an image of which nothing counts
        if domain == 0:
            mask[counted == 0] = 255
        else:
            image *= counted[:, None]
            batch["valid"] = counted
        made.append(batch)
    return made


def accuracy_by_hand(module: AdaptationModule, kind: str, domain: int) -> float:
    """Right decisions over all, by the words of the docs: nothing of the method but its classifier's weights is used."""
    layers = copy.deepcopy(module.method.classifiers[0].layers)  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    network = copy.deepcopy(module.network).eval()
    right = total = 0.0
    for batch in domain_batches(domain):
        for position, image in enumerate(batch["image"]):  # one by one: no batch can play a part
            counted = batch["valid"][position] if domain == 1 else (batch["mask"][position] != 255).float()
            height, width = image.shape[1:]
            below, beside = -height % 8, -width % 8
            with torch.no_grad():
                seen = functional.pad(image[None], (0, beside, 0, below), mode="replicate")
                features = network.encoder(seen)[-1]  # pyright: ignore[reportCallIssue]
                rows, columns = features.shape[2:]
                shares = functional.pad(counted, (0, beside, 0, below)).reshape(rows, 8, columns, 8).mean((1, 3))
                if kind == "pooled":
                    if not counted.any():
                        continue
                    pooled = (features[0] * shares).sum((1, 2)) / shares.sum()
                    answers, weights = layers(pooled[None, :, None, None])[0].argmax(0), torch.ones(1, 1)
                elif kind == "pixel":
                    answers, weights = layers(features)[0].argmax(0), shares
                else:  # two strided convolutions leave one position of so small a map
                    enlarged = (0, max(4 - columns, 0), 0, max(4 - rows, 0))
                    answers = layers(functional.pad(features, enlarged, mode="replicate"))[0].argmax(0)
                    assert answers.shape == (1, 1)
                    weights = shares.mean()[None, None]
            right += float(((answers == domain) * weights).sum())
            total += float(weights.sum())
    return right / total


@pytest.mark.parametrize("kind", ["pooled", "pixel", "patch"])
def test_domain_accuracy_is_that_of_the_run_s_classifier_on_held_out_pixels_that_count_in_eval_mode(tmp_path, kind):
    module = adapting(kind)
    classifier = module.method.classifiers[0]  # pyright: ignore[reportIndexIssue]
    with torch.no_grad():  # so far it gives one answer throughout: part the features of the two domains at their middle
        last = classifier.layers[-1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        module.network.eval()
        margins = []
        last.register_forward_hook(lambda _, __, out: margins.append((out[:, 1] - out[:, 0]).flatten()))
        for batch in [*domain_batches(0), *domain_batches(1)]:
            module.validation_step(batch, 0, 0)
        last._forward_hooks.clear()
        last.bias[1] -= torch.cat(margins).median()
        module.network.train()
    monitor = DomainAdaptationMonitorCallback(2)
    loaders = [batches(*domain_batches(0)), batches(*domain_batches(1))]
    trainer_of(tmp_path, 1, monitor).validate(module, loaders, verbose=False)
    by_hand = [accuracy_by_hand(module, kind, domain) for domain in (0, 1)]
    assert 0 < by_hand[0] < 1 or 0 < by_hand[1] < 1
    assert monitor.domain_accuracy == {"da/domain_acc_val": pytest.approx(np.mean(by_hand), abs=1e-6)}


@pytest.mark.parametrize("kind", ["pooled", "pixel", "patch"])
@pytest.mark.parametrize("answer", [0, 1])
def test_a_classifier_that_always_gives_one_answer_has_a_domain_accuracy_of_one_half(tmp_path, kind, answer):
    module = adapting(kind)
    with torch.no_grad():
        last = module.method.classifiers[0].layers[-1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0 - answer, answer]))
    monitor = DomainAdaptationMonitorCallback(2)
    loaders = [batches(*domain_batches(0)), batches(*domain_batches(1)[:1])]
    trainer_of(tmp_path, 1, monitor).validate(module, loaders, verbose=False)
    assert monitor.domain_accuracy == {"da/domain_acc_val": 0.5}


class OwnMethod(DomainAdaptationMethod):
    """A user's, which has no classifier and says nothing of one."""

    feature_layers = ("encoder",)

    def loss(self, outputs, progress) -> MethodLoss:
        return MethodLoss(None, None, 0.0)


@pytest.mark.parametrize("method", [SourceOnly(), OwnMethod()], ids=["source_only", "own"])
def test_methods_without_a_domain_classifier_log_no_domain_accuracy(tmp_path, method):
    monitor = DomainAdaptationMonitorCallback(2)
    loaders = [batches(*domain_batches(0)), batches(*domain_batches(1))]
    trainer_of(tmp_path, 1, monitor).validate(adapting(method=method), loaders, verbose=False)
    assert not [name for name in monitor.metrics() if name.startswith("da")]
    assert set(SCORES) <= set(monitor.metrics())


def test_each_image_is_forwarded_once_a_validation_and_every_module_gets_its_mode_back(tmp_path):
    module = adapting("pixel", ["encoder", "decoder"], batchnorm="target_stats")
    frozen = [module.network.encoder.bn1, module.network.encoder.layer1[0].bn2]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    for layer in frozen:
        layer.eval()
    counts: Counter[str] = Counter()
    stage = "training"

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts[stage] += len(inputs[0])

    class Watch(pl.Callback):
        """Behind the monitor: what happens between its start and its end is validation."""

        modes: dict[str, bool] = {}
        changed: list[str] = []

        def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            nonlocal stage
            assert not [name for name, part in pl_module.named_modules() if part.training]
            stage = f"validation at {trainer.global_step}{' (sanity)' if trainer.sanity_checking else ''}"

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            nonlocal stage
            stage = "training"

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
            self.modes = {name: part.training for name, part in pl_module.named_modules()}

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.changed += [name for name, part in pl_module.named_modules() if part.training != self.modes[name]]

    module.passes = choose(module.network, module.taps, "target_stats", 3)
    module.network.encoder.register_forward_pre_hook(count)  # pyright: ignore[reportAttributeAccessIssue]
    train = {
        "source": DataLoader([batch_of(2, 1)], batch_size=None),  # pyright: ignore[reportArgumentType]
        "target": DataLoader([batch_of(3, 2), batch_of(3, 3)], batch_size=None),  # pyright: ignore[reportArgumentType]
    }
    watch = Watch()
    watch.changed = []
    monitor, adapted = DomainAdaptationMonitorCallback(2), TargetStatistics(batches(batch_of(4, 4)))
    before = {name: part.training for name, part in module.named_modules()}
    trainer = trainer_of(tmp_path, 2, monitor, adapted, watch)
    loaders = [batches(*domain_batches(0)), batches(*domain_batches(1)[:2])]
    trainer.fit(module, CombinedLoader(train, "max_size_cycle"), loaders)
    images = 8 + 6
    training = (
        2 * (2 * 2 + 2 * 3) + 2 * 4
    )  # two epochs of two steps, and the statistics of 4 images before each validation
    assert counts == {
        "training": training, "validation at 0 (sanity)": images, "validation at 2": images, "validation at 4": images
    }  # fmt: skip
    assert set(monitor.domain_accuracy) == {
        "da/domain_acc_val", "da_layer/encoder/domain_acc_val", "da_layer/decoder/domain_acc_val"
    }  # fmt: skip
    assert len(monitor.target_scores) == 4
    assert watch.modes == before
    assert not watch.changed
    assert not any(layer.training for layer in frozen)


def batch_of(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 32, 32, generator=generator)
    return {"image": image, "mask": torch.randint(0, 2, (count, 32, 32), generator=generator)}


# Whole runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """One store, one source model, and the runs that start from it."""

    root: Path
    uri: str
    runs: dict[str, RunResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = open_store(self.uri, "monitor")
        self.client = self.store.client

    def settings(self, **more: object) -> dict[str, object]:
        """Of a network with dropout, so that whoever draws a random number more or less changes the training."""
        common: dict[str, object] = {
            "model.arch": "pspnet",
            "model.encoder_depth": 3,
            "model.decoder_channels": None,
            "model.psp_out_channels": 16,
            "model.psp_dropout": 0.3,
            "pretraining.max_epochs": 8,
            "trainer.max_epochs": 3,
            "domain_adaptation.method.classifier": "pixel",
            "domain_adaptation.method.lambda_schedule.kind": "constant",
            "domain_adaptation.method.discriminator_lr": 1e-2,
            "optimizer.lr": 1e-3,
            "monitor.forgetting_threshold": 0.2,
            "data.target.test": [],
            "tracking.uri": self.uri,
        }
        return small_settings(self.root) | common | {key.replace("__", "."): value for key, value in more.items()}

    def history(self, name: str) -> Points:
        return points_of(self.client, self.runs[name].run_id)

    def tags(self, name: str) -> dict[str, str]:
        return self.client.get_run(self.runs[name].run_id).data.tags

    def weights(self, name: str, which: str = "last") -> dict[str, Tensor]:
        return torch.load(self.folder(name) / "checkpoints" / f"{which}.ckpt", weights_only=True)["state_dict"]

    def folder(self, name: str) -> Path:
        return Path(str(self.runs[name].artifacts))

    def network(self, name: str) -> nn.Module:
        """The run's final model."""
        import segmentation_models_pytorch as smp

        return smp.from_pretrained(str(model_folder(self.folder(name)))).eval()

    def data(self, **more: object) -> ImageSets:
        """As a run reads it."""
        return read_sets(load_config(None, self.settings(**more)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("monitor")
    root = squares_in(folder / "data")
    (root / "target_val_bare").mkdir()
    (root / "target_val_bare" / "images").symlink_to(root / "target_val" / "images")
    write_domain(root / "few", 3, seed=6, inverted=True, masks=False)
    with chdir(folder):  # where MLflow puts the artifacts of a new store's experiments
        return Place(root, f"sqlite:///{folder}/mlflow.db")


class Turned(pl.Callback):
    """In the second of three epochs the head's weights are 50 times what they were, and of the other sign: sure and wrong."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        factor = {1: -50.0, 2: -1 / 50}.get(trainer.current_epoch)
        if factor is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            with torch.no_grad():
                for weight in pl_module.network.segmentation_head.parameters():  # pyright: ignore[reportAttributeAccessIssue]
                    weight *= factor


# what differs from the shared settings; all from the source model "pretrained"
RUNS: dict[str, dict[str, object]] = {
    "separate": {"monitor__metric": "select/infomax", "monitor__final_model": "best"},
    "source_only": {"monitor__metric": "select/bnm", "domain_adaptation__batchnorm": "source_only"},
    "target_stats": {
        "monitor__metric": "select/snd",
        "monitor__final_model": "best",
        "domain_adaptation__batchnorm": "target_stats",
    },
    "joint": {
        "monitor__metric": None,
        "domain_adaptation__batchnorm": "joint",
        "domain_adaptation__method__feature_layer": ["encoder", "decoder"],
    },
    "bare": {  # as "separate", without the target's masks
        "monitor__metric": "select/infomax",
        "monitor__final_model": "best",
        "data__target__val": ["target_val_bare"],
    },
    "unprobed": {"monitor__metric": "select/infomax", "monitor__final_model": "best", "monitor__probe": False},
    "turned": {
        "monitor__metric": "select/entropy",
        "monitor__final_model": "best",
        "domain_adaptation__method__feature_layer": "decoder",
        "optimizer__lr": 1e-6,
    },
}


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory) -> Iterator[Place]:
    with chdir(tmp_path_factory.mktemp("runs")):
        place.runs["pretrained"] = pretrain(load_config(None, place.settings(monitor__metric="select/entropy")))
        source = {"domain_adaptation__pretrained_checkpoint__path": place.runs["pretrained"].model_uri}
        for name, settings in RUNS.items():
            callbacks = [Turned()] if name == "turned" else []
            place.runs[name] = adapt(load_config(None, place.settings(**settings, **source)), callbacks)
        # no held-out target images, and too few of any kind for a probe; a pretraining of its own that reads no target at all
        place.runs["few"] = adapt(
            load_config(
                None,
                place.settings(
                    monitor__metric="select/bnm", data__target__train=["few"], data__target__val=[], seed=1,
                    trainer__max_epochs=1, model__psp_out_channels=8, pretraining__max_epochs=1,
                ),
            )
        )  # fmt: skip
        yield place


STEPS = 4  # 13 target images in batches of 3
EPOCHS = 3
VALIDATIONS = [0, 4, 8, 12]


@pytest.mark.parametrize("name", ["separate", "source_only", "target_stats", "joint", "bare", "turned"])
def test_scores_without_labels_stand_at_the_warm_start_and_at_each_validation(runs, name):
    history = runs.history(name)
    for metric in [*SCORES, Metric.SOURCE_KEPT, "da/domain_acc_val"]:
        # `final_model: best` closes each series with the chosen weights' value
        assert sorted({step for step, _ in history[metric]}) == VALIDATIONS, metric
        assert all(0 <= value <= 1 for _, value in history[metric])


def test_at_step_0_all_runs_show_the_scores_of_their_common_warm_start(runs):
    for metric in SCORES:
        first = {runs.history(name)[metric][0] for name in ("separate", "source_only", "target_stats", "joint", "bare")}
        assert len(first) == 1, metric


def test_a_target_without_masks_gives_the_same_training_the_same_scores_and_the_same_choice(runs):
    bare, labelled = runs.history("bare"), runs.history("separate")
    found = {name for name in bare if "target_val" in name or "val_target" in name or "gap" in name}
    assert found == {"share/target_val/ground", "share/target_val/square"}
    # every pixel of the labelled set has a label, so both count the same pixels
    np.testing.assert_allclose(bare["share/target_val/square"], labelled["share/target_val/square"], atol=1e-9)
    assert "true_share/source_val/square" in bare
    for metric in [
        *SCORES,
        Metric.SOURCE_KEPT,
        "da/domain_acc_val",
        "iou/source_val",
        "loss/train_total",
        "da/probe_acc",
    ]:
        assert bare[metric] == labelled[metric], metric
    for which in ("last", "best"):
        ours, theirs = runs.weights("bare", which), runs.weights("separate", which)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def closing_and_history(runs: Place, name: str, metric: str) -> tuple[float, dict[int, float]]:
    """The value that closes the series, and the values of the epochs."""
    points = [(step, value) for step, value in runs.history(name)[metric] if step > 0]
    closing = float(runs.runs[name].metrics[metric])
    if RUNS[name].get("monitor__final_model") == "best":
        points.remove((STEPS * EPOCHS, closing))
    return closing, dict(points)


@pytest.mark.parametrize("name", ["separate", "source_only", "target_stats", "turned"])
def test_the_best_checkpoint_is_that_of_the_best_score_among_epochs_that_kept_the_source(runs, name):
    metric = str(RUNS[name]["monitor__metric"])
    closing, values = closing_and_history(runs, name, metric)
    kept = closing_and_history(runs, name, Metric.SOURCE_KEPT)[1]
    assert list(values) == VALIDATIONS[1:]
    assert len(set(values.values())) == EPOCHS, "epochs that score the same tell nothing"
    candidates = {step: value for step, value in values.items() if kept[step]} or {STEPS: values[STEPS]}
    best = (max if SCORES[metric].better == "max" else min)(candidates, key=candidates.__getitem__)
    checkpoint = torch.load(runs.folder(name) / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == best
    assert runs.tags(name)["dann.selected_with_target_labels"] == "false"
    if RUNS[name].get("monitor__final_model") == "best":
        assert closing == values[best]
        assert runs.runs[name].metrics["iou/target_val"] == pytest.approx(
            dict(runs.history(name)["iou/target_val"][:4])[best], abs=1e-9
        )
    which = str(RUNS[name].get("monitor__final_model", "last"))
    model, chosen = runs.network(name).state_dict(), runs.weights(name, which)
    assert all(torch.equal(value, chosen[f"network.{key}"]) for key, value in model.items())


def test_the_epoch_that_is_sure_and_forgot_the_source_is_not_chosen(runs):
    _, values = closing_and_history(runs, "turned", "select/entropy")
    _, kept = closing_and_history(runs, "turned", Metric.SOURCE_KEPT)
    assert min(values, key=values.__getitem__) == 8
    assert kept == {4: 1.0, 8: 0.0, 12: 1.0}
    assert runs.tags("turned")[Tag.FORGOT_SOURCE] == "true"
    assert Tag.FORGOT_SOURCE not in runs.tags("pretrained")
    assert runs.runs["turned"].metrics[Metric.SOURCE_KEPT] == 1.0


def test_pretraining_chooses_by_a_score_of_the_target_where_it_reads_target_images_else_by_the_source(runs):
    assert runs.tags("pretrained")["dann.selected_with_target_labels"] == "false"
    assert [step for step, _ in runs.history("pretrained")["select/entropy"]] == list(range(0, 17, 2))
    monitored = {}
    for name, run_id in (("pretrained", runs.runs["pretrained"].run_id), ("few", runs.runs["few"].source_run_id)):
        run = runs.client.get_run(run_id)
        monitored[name] = run.data.params["cfg.monitor.metric"], bool(set(SCORES) & set(run.data.metrics))
        artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
        assert (artifacts / "checkpoints" / "best.ckpt").is_file()
    assert monitored == {"pretrained": ("select/entropy", True), "few": ("iou/source_val", False)}


def test_without_held_out_target_images_training_images_are_scored_but_no_iou_is_given(runs):
    history = runs.history("few")
    for metric in [*SCORES, "da/domain_acc_val", "iou/source_val"]:
        assert [step for step, _ in history[metric]] == [0, 2], metric  # 10 source images in batches of 4
    found = {name for name in history if "target_val" in name or "val_target" in name}
    assert found == {"share/target_val/ground", "share/target_val/square"}


def test_the_training_images_that_stand_in_are_as_many_as_the_source_validates_on_and_as_they_are(place):
    data = place.data(data__target__val=[], data__target__augmentation="strong", data__crop_size=16)
    plain = place.data(data__target__val=[])
    stand_in = data.held_out(OneDomain("target"))
    assert stand_in is not None
    assert len(stand_in) == len(data.sets[SOURCE_VAL]) == 4
    chosen = [0, 4, 8, 12]  # spread over the 13
    for item, index in zip((stand_in[i] for i in range(4)), chosen, strict=True):
        assert torch.equal(item["image"], plain.sets[TARGET_TRAIN][index]["image"])
        assert set(item) == {"image", "index"}
    assert data.sets[TARGET_TRAIN].training


# The probe in a run ------------------------------------------------------------------------------------------------------


def features_of(runs: Place, name: str) -> tuple[str, dict[str, np.ndarray]]:
    with safe_open(runs.folder(name) / "features.safetensors", "np") as file:
        return file.metadata()["layer"], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", ["separate", "turned", "joint"])
def test_the_probe_s_features_are_those_of_the_held_out_images_before_and_after(runs, name):
    layer, features = features_of(runs, name)
    assert layer == {"separate": "encoder", "turned": "decoder", "joint": "decoder"}[name]
    assert set(features) == {"before/source", "before/target", "after/source", "after/target"}
    data = runs.data()
    for when, network in (("before", runs.network("pretrained")), ("after", runs.network(name))):
        for domain, count in (("source", 4), ("target", 5)):
            images = torch.stack(
                [item["image"] for item in (data.sets[SetName(domain, "val")][i] for i in range(count))]
            )
            with torch.no_grad():
                maps = network.encoder(images)  # pyright: ignore[reportCallIssue]
                made = maps[-1] if layer == "encoder" else network.decoder(maps)  # pyright: ignore[reportCallIssue]
            by_hand = torch.cat([made.mean((2, 3)), made.std((2, 3), correction=0)], 1).numpy()
            np.testing.assert_allclose(features[f"{when}/{domain}"], by_hand, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "metric"), [("separate", "da/probe_acc"), ("turned", "da/probe_acc"),
                                              ("joint", "da_layer/decoder/probe_acc")])  # fmt: skip
def test_the_probe_is_logged_before_and_after_as_its_features_say(runs, name, metric):
    _, features = features_of(runs, name)
    before, after = (probe(features[f"{when}/source"], features[f"{when}/target"], 0) for when in ("before", "after"))
    assert before is not None
    assert after is not None
    history = runs.history(name)
    assert history[metric] == [(0, before.accuracy), (12, after.accuracy)]
    if metric == "da/probe_acc":
        assert history["da/a_distance"] == [(0, before.a_distance), (12, after.a_distance)]
    assert [step for step, _ in history["da/a_distance"]] == [0, 12]
    assert runs.runs[name].metrics["da/probe_acc"] == history["da/probe_acc"][1][1]


def test_the_encoder_is_probed_whatever_is_tapped_and_the_plain_name_is_the_mean_over_the_taps(runs):
    alone, behind, two = runs.history("separate"), runs.history("turned"), runs.history("joint")
    assert not [name for name in alone if name.startswith("da_layer/")]  # the encoder is the tap: da/probe_acc
    assert behind["da_layer/encoder/probe_acc"][0] == alone["da/probe_acc"][0]  # one warm start
    assert "da_layer/decoder/probe_acc" not in behind
    for index in (0, 1):
        both = [two[f"da_layer/{layer}/probe_acc"][index][1] for layer in ("encoder", "decoder")]
        assert two["da/probe_acc"][index][1] == pytest.approx(np.mean(both))


def test_two_taps_show_each_layer_s_domain_accuracy_and_the_mean_over_them(runs):
    history = runs.history("joint")
    both = [history[f"da_layer/{layer}/domain_acc_val"] for layer in ("encoder", "decoder")]
    assert [step for step, _ in both[0]] == VALIDATIONS
    for (_, mean), (_, one), (_, other) in zip(history["da/domain_acc_val"], *both, strict=True):
        assert mean == pytest.approx((one + other) / 2)
    assert not [name for name in runs.history("separate") if name.startswith("da_layer")]


def test_the_run_says_in_words_what_classifier_and_probe_say(runs):
    for name in ("separate", "joint", "few"):
        tags, metrics = runs.tags(name), runs.runs[name].metrics
        assert tags["mlflow.note.content"].endswith(escaped(tags["dann.alignment"]))
        assert f"balanced accuracy {metrics['da/domain_acc_val']:.2f}" in tags["dann.alignment"]
        said = "fewer than 4 images" if name == "few" else f"-> {metrics['da/probe_acc']:.2f}"
        assert said in tags["dann.alignment"]
    assert "dann.alignment" not in runs.tags("pretrained")


def test_a_first_training_has_nothing_to_forget(tmp_path, caplog):
    monitor = DomainAdaptationMonitorCallback(2, forgetting_threshold=0.1, can_forget=False)
    trainer_of(tmp_path, 1, monitor).fit(Scripted([(0, 0), (5, 0)]), batches(halves(1)), batches(halves(3)))
    assert monitor.metrics()[Metric.SOURCE_DROP] > 0.1
    assert not forgetting(caplog)


class AllOfOneClass(pl.Callback):
    """The network calls everything background at the start, and squares later, which is the worse guess."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            bias = pl_module.network.segmentation_head[0].bias  # pyright: ignore
            bias.copy_(torch.tensor([1e4, 0.0] if trainer.sanity_checking else [0.0, 1e4]))


def test_pretraining_that_begins_with_a_fall_neither_warns_nor_is_tagged(place, tmp_path, caplog):
    with chdir(tmp_path):
        fallen = pretrain(load_config(None, place.settings(pretraining__max_epochs=1, seed=3)), [AllOfOneClass()])
    assert fallen.metrics["iou/source_val"] < fallen.baseline["iou/source_val"] - 0.2
    assert not forgetting(caplog)
    assert Tag.FORGOT_SOURCE not in place.client.get_run(fallen.run_id).data.tags


def test_too_few_images_give_no_probe_and_no_crash(runs):
    history = runs.history("few")
    assert not [name for name in history if "probe" in name or "a_distance" in name]
    _, features = features_of(runs, "few")
    assert {key: len(value) for key, value in features.items()} == {
        "before/source": 4, "before/target": 3, "after/source": 4, "after/target": 3
    }  # fmt: skip


def test_a_run_that_is_probed_trains_as_one_that_is_not(runs):
    for which in ("last", "best"):
        with_probe, without = runs.weights("separate", which), runs.weights("unprobed", which)
        assert with_probe.keys() == without.keys()
        assert all(torch.equal(with_probe[key], without[key]) for key in without)
    probed, plain = runs.history("separate"), runs.history("unprobed")
    assert set(probed) - set(plain) == {"da/probe_acc", "da/a_distance"}
    assert all(probed[name] == plain[name] for name in plain if not name.startswith("time/"))
    said = runs.tags("unprobed")[Tag.ALIGNMENT]
    assert f"balanced accuracy {plain['da/domain_acc_val'][-1][1]:.2f}" in said
    assert "not measured: monitor.probe is false" in said
    assert not (runs.folder("unprobed") / "features.safetensors").exists()
    assert runs.tags("unprobed")["dann.digest"] != runs.tags("separate")["dann.digest"]


# BatchNorm in a run ------------------------------------------------------------------------------------------------------


def counted(runs: Place, name: str) -> dict[str, set[int]]:
    """Batches that moved the statistics during adaptation, by part of the network: the final model against the source model."""
    before, after = (runs.network(which).state_dict() for which in ("pretrained", name))
    found: dict[str, set[int]] = {}
    for key, value in after.items():
        if key.endswith("num_batches_tracked") and int(before[key]):  # 0: a stage that no forward passes
            found.setdefault(key.split(".")[0], set()).add(int(value - before[key]))
    return found


def steps_of_final_model(runs: Place, name: str) -> int:
    which = str(RUNS[name].get("monitor__final_model", "last"))
    return torch.load(runs.folder(name) / "checkpoints" / f"{which}.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("separate", 2, 1),  # source and target; behind the tap the source alone
        ("source_only", 1, 1),
        ("joint", 1, 1),  # one forward of both
        ("target_stats", 2, 1),  # validation replaces the statistics and counts nothing
        ("turned", 2, 2),  # tapped behind the decoder
    ],
)
def test_a_run_s_model_has_counted_so_many_batches_a_step(runs, name, encoder, decoder):
    steps = steps_of_final_model(runs, name)
    assert counted(runs, name) == {"encoder": {encoder * steps}, "decoder": {decoder * steps}}


def test_whether_the_target_moves_running_statistics_changes_no_trained_weight(runs):
    separate, source_only = runs.weights("separate"), runs.weights("source_only")
    differing = {key for key in separate if not torch.equal(separate[key], source_only[key])}
    assert differing
    assert all(key.endswith(("running_mean", "running_var", "num_batches_tracked")) for key in differing)
    assert all(key.startswith("network.encoder.") for key in differing)  # the target goes no further


def test_the_kept_model_of_target_stats_has_the_statistics_of_the_target_s_images_under_its_weights(runs):
    network, data = runs.network("target_stats"), runs.data()
    images = [item["image"] for item in (data.sets[TARGET_TRAIN][i] for i in range(13))]
    norms = (found for found in network.named_modules() if isinstance(found[1], torch.nn.BatchNorm2d))
    name, first = next(norms)
    seen = []
    with torch.no_grad():  # the first BatchNorm by hand: what comes into it
        hook = first.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        network(torch.stack(images))
        hook.remove()
    values = seen[0].double()
    assert first.running_mean is not None
    assert first.running_var is not None
    assert torch.allclose(first.running_mean.double(), values.mean((0, 2, 3)), atol=1e-5)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert torch.allclose(first.running_var.double(), values.var((0, 2, 3)), rtol=1e-4)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    again = copy.deepcopy(network)
    target_statistics(again, statistics_loader(data.sets[TARGET_TRAIN], batch_size=3))
    for (key, kept), made in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.allclose(kept, made, rtol=1e-4, atol=1e-6), key
    # all of them, not the first alone, differ from what training left (which validation then replaced)
    trained = runs.weights("separate")
    assert not torch.allclose(first.running_mean, trained[f"network.{name}.running_mean"], rtol=0.05)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["target_stats", "source_only"])
def test_the_scores_of_a_run_are_those_of_the_model_that_it_kept(runs, workplace, name):
    path = runs.runs[name].model_uri
    result = evaluate(load_config(None, runs.settings(domain_adaptation__pretrained_checkpoint__path=path)))
    for metric in ("iou/source_val", "iou/target_val", "class_iou/target_val/square"):
        assert result.metrics[metric] == runs.runs[name].metrics[metric], metric


@pytest.mark.parametrize("method", ["dann", "source_only"])
@pytest.mark.parametrize("batchnorm", ["source_only", "target_stats"])
def test_a_choice_about_batchnorm_is_refused_where_the_network_has_none(place, workplace, batchnorm, method):
    settings = place.settings(
        domain_adaptation__method__name=method,
        model__arch="unet", model__encoder_name="vgg11", model__psp_out_channels=None, model__psp_dropout=None,
        model__decoder_channels=[16, 8, 8], model__decoder_use_norm=False, domain_adaptation__batchnorm=batchnorm,
    )  # fmt: skip
    with pytest.raises(InputError, match="network has no BatchNorm"):
        adapt(load_config(None, settings))
