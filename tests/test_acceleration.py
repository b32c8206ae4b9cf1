"""Switches that make training faster: memory format, compilation, loading processes. None of them changes what is computed."""

import pytest
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
import torch._inductor.config as inductor
from mlflow import MlflowClient
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments import SourceOnly, adapt, load_config
from dann_experiments.config import InputError
from dann_experiments.jobs import build
from dann_experiments.models.compiling import uncompiled
from dann_experiments.models.networks import keeps_channels_last
from dann_experiments.training.module import AdaptationModule
from tests.conftest import small_settings

ONE = {"trainer__max_epochs": 1}


class Losses(pl.Callback):
    """Of each training step, and what the network looks like then."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.channels_last: set[bool] = set()
        self.compiled: set[bool] = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))
        convolutions = [part for part in pl_module.network.modules() if isinstance(part, nn.Conv2d)]
        self.channels_last = {
            part.weight.is_contiguous(memory_format=torch.channels_last)
            for part in convolutions
            if part.kernel_size != (1, 1) and part.weight.shape[1] > 1  # else both orders are the same
        }
        self.compiled = {part._compiled_call_impl is not None for part in pl_module.network.decoder.modules()}


@pytest.fixture
def losses(pretrained_place, squares):
    """Trains for an epoch; all start from the same source model."""

    def run(**more):
        seen = Losses()
        result = adapt(load_config(None, small_settings(squares, **ONE, **more)), callbacks=[seen])
        return seen, result

    return run


@pytest.mark.slow
def test_channels_last_changes_no_more_than_last_digits(losses):
    plain, _ = losses()
    other, result = losses(trainer__channels_last=True)
    assert plain.channels_last == {False}
    assert other.channels_last == {True}
    assert other.values == pytest.approx(plain.values, rel=1e-3)
    source = {"domain_adaptation__pretrained_checkpoint__path": f"runs:/{result.run_id}"}  # a warm start like any other
    _, again = losses(**source)
    assert again.baseline["iou/source_val"] == pytest.approx(result.metrics["iou/source_val"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "given", "expected"),
    [("mobilenet_v2", None, {True}), ("mobilenet_v2", False, {False}), ("resnet18", None, {False})],
)
def test_depthwise_convolutions_are_computed_channels_last_on_a_cpu(losses, encoder, given, expected):
    network = {"model__arch": "unet", "model__encoder_name": encoder, "model__encoder_weights": None}
    few = {"trainer__limit_train_batches": 1, "pretraining__max_epochs": 1}
    seen, result = losses(
        **network, **few, trainer__channels_last=given, domain_adaptation__method__feature_layer="encoder"
    )
    assert seen.channels_last == expected
    tag = MlflowClient(result.tracking_uri).get_run(result.run_id).data.tags["dann.memory_format"]
    assert tag == ("channels_last" if expected == {True} else "contiguous")


@pytest.mark.parametrize("then", [False, True])
def test_a_checkpoint_goes_on_in_another_memory_format(tmp_path, then):
    """As of a run that a GPU began and a CPU goes on with: torch's fused Adam is wrong where its state has another order."""

    def fitted(epochs, channels_last, checkpoint=None):
        torch.manual_seed(0)
        network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=[16, 8, 8], classes=2)
        module = AdaptationModule(
            network, SourceOnly(), [], lambda groups: torch.optim.Adam(groups, lr=1e-3, fused=True),
            channels_last=channels_last,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        items = [
            {"source": {"image": torch.randn(3, 32, 32, generator=generator), "mask": torch.zeros(32, 32).long()}}
            for _ in range(4)
        ]
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(items, batch_size=2), ckpt_path=checkpoint, weights_only=True)  # pyright: ignore[reportArgumentType]
        return trainer, module

    trainer, _ = fitted(1, not then)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, went_on = fitted(2, then, tmp_path / "one.ckpt")
    _, whole = fitted(2, not then)
    for (name, one), other in zip(went_on.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3, check_stride=False, msg=name)


def test_nothing_is_assumed_of_other_devices():
    depthwise, other = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert keeps_channels_last(None, depthwise, cpu, "32-true")
    assert not keeps_channels_last(None, depthwise, gpu, "32-true")
    assert keeps_channels_last(True, depthwise, gpu, "32-true")
    assert not keeps_channels_last(None, other, cpu, "32-true")


def test_half_precision_on_a_processor_keeps_channels_last():
    network = nn.Conv2d(4, 4, 3)
    assert keeps_channels_last(None, network, torch.device("cpu"), "bf16-mixed")
    assert not keeps_channels_last(False, network, torch.device("cpu"), "bf16-mixed")
    assert not keeps_channels_last(None, network, torch.device("cuda"), "bf16-mixed")


@pytest.mark.slow
@pytest.mark.long
def test_a_compiled_network_learns_the_same(losses):
    layer = {"domain_adaptation__method__feature_layer": "encoder.layer2", "model__encoder_name": "resnet18"}
    plain, before = losses(**layer)
    other, after = losses(**layer, trainer__compile=True)
    assert plain.compiled == {False}
    assert True in other.compiled
    assert other.values == pytest.approx(plain.values, rel=1e-3)
    assert after.metrics["iou/source_val"] == pytest.approx(before.metrics["iou/source_val"], abs=0.01)


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_here_is_told(losses, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # monkeypatch would delete the setting at its end, for this process's later compilations too
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(InputError, match=r"trainer\.compile is true, but .*; set it to false"),
    ):
        losses(trainer__compile=True)


def test_evaluation_runs_uncompiled():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for layer in network:
        layer.compile(backend=backend)
    with uncompiled(network):
        network(torch.zeros(1, 2))
    assert graphs == []
    network(torch.zeros(1, 2))
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("gpus", "cores", "given", "expected"),
    [
        ([], 16, None, (0, False)),
        (["0"], 16, None, (4, True)),
        (["0"], 8, None, (2, True)),
        (["0"], 2, None, (0, True)),
        (["0"], 16, 1, (1, True)),
        ([], 16, 3, (3, False)),
    ],
)
def test_loading_processes_are_chosen_from_the_machine(monkeypatch, squares, gpus, cores, given, expected):
    monkeypatch.setattr(build, "visible_gpus", lambda accelerator: gpus)
    monkeypatch.setattr(build, "available_cores", lambda: cores)
    config = load_config(None, small_settings(squares, data__num_workers=given))
    loaders = build.make_loaders(config, build.find_data(config).read(ahead=False))
    assert (loaders.num_workers, loaders.pin_memory) == expected
