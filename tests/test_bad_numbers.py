"""Losses and gradients that are no numbers end the run, or are stepped over, and never change what is kept; memory that runs out
is told with the sizes."""

from __future__ import annotations

import gc
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import mlflow
import numpy as np
import pytest
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
import yaml
from conftest import small_settings
from test_jobs import nested
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dann_experiments import (
    DANNMethod,
    DomainAdaptationMethod,
    MethodLoss,
    SourceOnly,
    TrainingFailed,
    load_config,
    pretrain,
)
from dann_experiments.__main__ import main
from dann_experiments.checkpoints.saved_model import save_model
from dann_experiments.data.reading import Normalization, Reading, reading_facts
from dann_experiments.models.taps import resolve_taps
from dann_experiments.training.bad_numbers import BadNumbers, _Buffers
from dann_experiments.training.module import AdaptationModule


@pytest.fixture(autouse=True)
def nothing_left():
    """Each test keeps all states of a training in cycles of objects: hundreds of megabytes until Python looks for such."""
    yield
    gc.collect()


class Spoiled(DomainAdaptationMethod):
    """A method whose gradient is NaN at some steps although its loss is 0 (the root of 0 has no slope), with a buffer that
    follows its features, as running statistics do."""

    feature_layers = ("encoder",)

    def __init__(self, at: tuple[int, ...] = (2,), loss: float | None = None) -> None:
        super().__init__()
        self.at, self.bad_loss, self.scale = at, loss, nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()))

    def loss(self, outputs, progress) -> MethodLoss:
        features = outputs.source_features["encoder"].mean() * self.scale
        bad = progress.step in self.at
        self.mean = 0.9 * self.mean + features.detach() * (math.nan if bad else 1.0)
        value = (
            features * self.bad_loss if bad and self.bad_loss is not None else (features * float(not bad)).abs().sqrt()
        )
        return MethodLoss(value, value.detach(), 1.0)


class Remember(pl.Callback):
    """The module's state before each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.optimizer: list[dict] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        state = trainer.optimizers[0].state_dict()["state"]
        self.optimizer.append(
            {key: {k: v.clone() for k, v in of.items() if torch.is_tensor(v)} for key, of in state.items()}
        )


class Metrics(pl.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, float, int]] = []

    def log_metrics(self, metrics, step=None) -> None:  # pyright: ignore
        self.seen += [(name, float(value), step) for name, value in metrics.items()]


def batches(count: int = 6) -> DataLoader:
    """`count` batches of 2 + 2 noise images of 32 x 32, indices included."""
    generator = torch.Generator().manual_seed(0)
    side = lambda offset: {  # noqa: E731
        "image": torch.randn(3, 32, 32, generator=generator),
        "mask": torch.randint(0, 2, (32, 32), generator=generator),
        "index": torch.tensor(offset),
    }
    items = [{"source": side(number), "target": side(100 + number)} for number in range(2 * count)]
    return DataLoader(items, batch_size=2)  # pyright: ignore[reportArgumentType]


def fit(
    method: DomainAdaptationMethod,
    guard: BadNumbers,
    loader: DataLoader | None = None,
    fused: bool | None = None,
    **more,
) -> tuple[AdaptationModule, Remember, Metrics]:
    """A small network trained for a few steps; `more` goes to Lightning's trainer."""
    torch.manual_seed(0)
    network = smp.Unet("tu-test_resnet", encoder_weights=None, encoder_depth=3, decoder_channels=[16, 8, 8], classes=2)
    module = AdaptationModule(
        network, method, resolve_taps(network, method.feature_layers, 3),
        lambda groups: more.pop("optimizer", torch.optim.Adam)(groups, lr=1e-3, fused=fused),
    )  # fmt: skip
    remember, logger = Remember(), Metrics()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[remember, guard], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, **{k: v for k, v in more.items() if k != "optimizer"},
    )  # fmt: skip
    module.remember, module.metrics_seen = remember, logger  # pyright: ignore
    guard.module = module  # pyright: ignore[reportAttributeAccessIssue] # for tests in which fit raises
    trainer.fit(module, loader or batches())
    return module, remember, logger


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


AT_ONCE_AND_LATER = pytest.mark.parametrize(
    ("at_once", "fused"), [(True, None), (False, True)], ids=["at once", "later"]
)


@AT_ONCE_AND_LATER
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, "sgd"])
@pytest.mark.parametrize("loss", [None, math.nan, math.inf], ids=["gradient", "nan loss", "inf loss"])
def test_a_bad_step_changes_no_weight_no_buffer_and_no_optimizer_state(at_once, fused, optimizer, loss):
    def make(groups, lr, fused):
        if optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.1, fused=fused)
        return optimizer(groups, lr=lr, weight_decay=0.1, fused=fused)

    _, remember, metrics = fit(
        Spoiled((2, 4), loss), BadNumbers(2, at_once=at_once), fused=fused, optimizer=make, gradient_clip_val=1.0
    )
    states, optimizers = remember.states, remember.optimizer
    for step in (2, 4):
        assert same(states[step + 1], states[step])
        assert all(same(optimizers[step + 1][key], optimizers[step][key]) for key in optimizers[step])
    for step in (0, 1, 3):
        assert not same(states[step + 1], states[step])
    assert all(bool(torch.isfinite(value).all()) for value in states[-1].values())
    assert [seen for seen in metrics.seen if seen[0] == "bad_steps"] == [("bad_steps", 1.0, 2), ("bad_steps", 2.0, 4)]


def test_the_watch_changes_no_number_of_a_run_without_bad_steps():
    watched, _, _ = fit(Spoiled(()), BadNumbers())

    class Blind(BadNumbers):
        def on_before_optimizer_step(self, *_) -> None: ...

    free, _, _ = fit(Spoiled(()), Blind())
    assert same(watched.state_dict(), free.state_dict())


@AT_ONCE_AND_LATER
def test_the_first_bad_step_too_many_ends_training_with_everything_that_is_asked_afterwards(at_once, fused, tmp_path):
    names = {"source": lambda index: f"s{index}.png", "target": lambda index: f"t{index}.png"}
    guard = BadNumbers(1, lambda trainer: trainer.save_checkpoint(tmp_path / "x.ckpt"), names, at_once)
    with pytest.raises(TrainingFailed) as error:
        fit(Spoiled((1, 3), math.nan), guard, fused=fused)
    assert str(error.value).startswith("Step 3 (epoch 1): the domain loss of encoder nan (the segmentation loss 0.")
    assert "Learning rates: network 0.001, method 0.001; lambda 1. Source batch: s6.png, s7.png. " in str(error.value)
    assert "Target batch: t106.png, t107.png." in str(error.value)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert same(saved, guard.module.remember.states[3])  # pyright: ignore
    assert all(bool(torch.isfinite(value).all()) for value in saved.values())


def test_the_gradient_that_is_no_number_is_named_by_its_group():
    with pytest.raises(TrainingFailed, match=r"Step 2 .*: the norm of the gradient of network nan, .* of method nan"):
        fit(Spoiled((2,)), BadNumbers())


def test_the_layer_whose_domain_loss_is_no_number_is_named():
    method = DANNMethod(["encoder", "decoder"], [48, 8], hidden_size=8)
    with torch.no_grad():
        next(method.classifiers[1].parameters()).fill_(math.nan)
    with pytest.raises(
        TrainingFailed, match=r"Step 0 .*: the domain loss of decoder nan \(.*the domain loss of encoder 0"
    ):
        fit(method, BadNumbers())


def test_images_that_are_no_numbers_are_named_among_their_batch():
    loader = batches()
    loader.dataset[5]["target"]["image"][0, 3, 3] = math.nan
    guard = BadNumbers(0, names={"source": "s{}".format, "target": "t{}".format})
    with pytest.raises(
        TrainingFailed, match=r"Step 2 .*Source batch: s4, s5\. Target batch: t104, t105 \(not finite .* t105\)\."
    ):
        fit(DANNMethod("encoder", 48, hidden_size=8), guard, loader)


def test_weights_that_an_update_made_infinite_are_not_kept(tmp_path):
    def make(groups, lr, fused):
        return torch.optim.SGD(groups, lr=1e38, weight_decay=1e5)

    guard = BadNumbers(0, lambda trainer: trainer.save_checkpoint(tmp_path / "x.ckpt"))
    with pytest.raises(TrainingFailed, match="were not finite either"):
        fit(SourceOnly(), guard, optimizer=make)
    with pytest.raises(TrainingFailed, match=r"After step 0 .* the last update was too large"):
        fit(SourceOnly(), guard, batches(1), optimizer=make)
    assert not (tmp_path / "x.ckpt").exists()


def test_under_a_scaler_gradients_may_overflow_but_losses_may_not():
    """As with 16-mixed on a GPU: the scaler finds a scale by skipping steps, which is no bad step."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # pyright: ignore[reportPrivateImportUsage]
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    guard = BadNumbers(1)
    module, _, _ = fit(Spoiled((3,), math.nan), guard, batches(4), plugins=[plugin])
    assert scaler.get_scale() < 2.0**126  # it has skipped steps
    assert guard.bad_steps == 1
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())


def failed_run(folder: Path) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiments = [item.experiment_id for item in client.search_experiments()]
    return client.search_runs(experiments, "attributes.status = 'FAILED'")[0]


def artifact(run: mlflow.entities.Run, path: str) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://")) / path


@pytest.mark.usefixtures("pretrained_place")
def test_a_bad_step_fails_the_run_on_the_terminal_with_the_files_of_its_batch(workplace, squares, capfd):
    settings = small_settings(squares, monitor__metric=None, trainer__skip_bad_steps=1)
    del settings["domain_adaptation.method.hidden_size"]
    (workplace / "c.yaml").write_text(
        yaml.safe_dump(nested(settings | {"domain_adaptation.feature_layers": ["encoder"]}))
    )
    method = ["--feature_layer", "encoder", "--domain_adaptation.method.class_path", "test_bad_numbers.Spoiled"]
    method += ["--domain_adaptation.method.init_args", "{at: [1, 2], loss: .nan}"]
    assert main(["adapt", "--config", "c.yaml", *method]) == 1
    told = capfd.readouterr().err
    assert "Training failed: Step 2 (epoch 1): the domain loss of encoder nan (the segmentation loss 0." in told
    last = told.partition("Training failed")[2]
    assert len(re.findall(rf"{squares}/source/images/\d+\.png", last.partition("Target batch")[0])) == 4
    assert len(re.findall(rf"{squares}/target/images/\d+\.png", last.partition("Target batch")[2])) == 3
    assert "Traceback" not in told
    run = failed_run(workplace)
    assert run.data.metrics["bad_steps"] == 2
    assert "TrainingFailed: Step 2 (epoch 1)" in artifact(run, "traceback.txt").read_text()
    kept = torch.load(artifact(run, "checkpoints/last.ckpt"), weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())


def test_a_learning_rate_that_diverges_ends_the_run_with_the_last_good_weights(workplace, squares):
    settings = small_settings(squares) | {
        "pretraining.optimizer.lr": 1e30,
        "pretraining.optimizer.schedule": "constant",
    }
    with pytest.raises(TrainingFailed, match=r"Step 1 \(epoch 1\): the .* loss .*Learning rates: network 1e\+30"):
        pretrain(load_config(None, settings))
    kept = torch.load(artifact(failed_run(workplace), "checkpoints/last.ckpt"), weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())


OUT_OF_MEMORY = """
import gc, json, os, resource, sys
import torch, mlflow, sqlalchemy, pytorch_lightning, segmentation_models_pytorch
from dann_experiments.__main__ import main
from dann_experiments import jobs
import dann_experiments.jobs.run_training
for folder, words in json.loads(sys.argv[1]):
    os.chdir(folder)
    gc.collect()
    used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 1_200_000_000, resource.RLIM_INFINITY))
    code = main(words)
    print(f"ended with {code}\\n--next--", file=sys.stderr, flush=True)
"""
TOO_LARGE = (
    (
        "pretrain --config c.yaml", 1,
        ("Training failed: out of memory", "data.source.batch_size is 4, with images or windows of 2048 x 2048 pixels "
        "(data.crop_size is null)"),
    ),
    (
        "evaluate --config c.yaml --source_checkpoint ../model", 2,
        ("Error: out of memory", "A batch is 4 images or windows of 2048 x 2048 pixels. Use a smaller data.eval_batch_size"),
    ),
    (
        "evaluate --config c.yaml --source_checkpoint ../model --domain_adaptation.batchnorm target_stats "
        "--data.target.train [{large}]", 2,
        ("Error: out of memory", "A batch is 3 images or windows of 2048 x 2048 pixels. Use a smaller "
        "data.target.batch_size"),
    ),
    (
        "predict --model ../model --input ../wide.png --output map.png --tile_size 2048", 2,
        ("Error: out of memory", "batch_size is 4, with tiles of 2048 x 2048 pixels. Use a smaller batch_size"),
    ),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the address space is read from /proc")
def test_memory_that_runs_out_is_told_with_the_sizes_and_what_helps(workplace, squares, new_store):
    from PIL import Image

    large = workplace / "large"
    for folder in ("images", "masks"):
        (large / folder).mkdir(parents=True)
    for number in range(4):
        values = np.zeros((2048, 2048), np.uint8)
        values[:1024] = 1
        Image.fromarray(values).save(large / "masks" / f"{number}.png")
        Image.fromarray(np.stack([values * 200] * 3, 2)).save(large / "images" / f"{number}.png")
    Image.fromarray(np.zeros((2048, 8192, 3), np.uint8)).save(workplace / "wide.png")
    arguments = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8], "in_channels": 3}
    network = smp.create_model("unet", encoder_weights=None, classes=2, **arguments)
    facts = reading_facts(Reading(), Normalization((0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.25,) * 3))
    notes = {"class_names": ["ground", "square"], "reading": {"source": facts, "target": facts}}
    save_model(workplace / "model", network, "unet", arguments | {"classes": 2}, notes)
    commands = []
    for number, (command, _, _) in enumerate(TOO_LARGE):
        folder = workplace / str(number)
        folder.mkdir()
        new_store(folder)
        settings = small_settings(squares) | {"data.source.train": [str(large)], "data.source.batch_size": 4}
        if not command.startswith("pretrain"):
            settings |= {"data.source.val": [str(large)], "data.target.train": [str(large)]}
        (folder / "c.yaml").write_text(yaml.safe_dump(nested(settings)))
        commands.append((str(folder), command.format(large=large).split()))
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = done.stderr.split("\n--next--\n")[:-1]
    for number, (output, (command, code, told)) in enumerate(zip(outputs, TOO_LARGE, strict=True)):
        assert output.endswith(f"ended with {code}"), output
        for text in told:
            assert text in output
        assert "Traceback" not in output
        if "target_stats" not in command:  # those are taken before a run is opened
            traceback = artifact(failed_run(workplace / str(number)), "traceback.txt").read_text()
            assert "can't allocate memory" in traceback


@pytest.mark.parametrize("sizes", [[()], [(3,)], [(), (2, 3), (0,), (4,)]])
@pytest.mark.parametrize("where", [None, True, False])
def test_buffers_are_put_back_as_they_were_kept(sizes, where):
    module = nn.Module()
    for number, size in enumerate(sizes):
        module.register_buffer(f"buffer_{number}", torch.randn(size))
        module.register_buffer(f"count_{number}", torch.zeros(size, dtype=torch.int64))
    buffers = _Buffers(module)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    buffers.keep()
    for buffer in module.buffers():
        buffer += 1
    module.buffer_0 = module.buffer_0.clone()  # another tensor in its place
    moved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    buffers.put_back(None if where is None else torch.tensor(where))
    expected = moved if where is False else before
    assert all(torch.equal(buffer, expected[name]) for name, buffer in module.named_buffers())
