"""`model.encoder_weights: FILE`: files as timm, torchvision and training tools write them, and what is wrong with others."""

from __future__ import annotations

import hashlib
import logging
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from dann_experiments import InputError, adapt, evaluate, load_config, pretrain
from dann_experiments.__main__ import main
from dann_experiments.checkpoints.encoder_file import encoder_weights, load_encoder
from dann_experiments.config import Config, config_to_yaml
from dann_experiments.jobs.build import make_network
from dann_experiments.jobs.identity import run_digest, source_digest
from dann_experiments.models.networks import build_network
from dann_experiments.models.taps import evaluating
from dann_experiments.names import Job, Tag
from dann_experiments.tracking.store import open_store
from tests.conftest import small_settings

WEIGHTS = "model.encoder_weights"
DATA = {"source_train": "0" * 32}


def small_timm(name: str = "test_resnet", seed: int = 1, **more: Any) -> nn.Module:
    """One of timm's models with its classifier, and statistics as after training."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, **more)
    for key, buffer in model.named_buffers():
        if "running" in key:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def state_of(prefix: str = "", **more: Any) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in small_timm(**more).state_dict().items()}


def written(state: Mapping[str, Tensor], name: str = "weights.safetensors") -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, name)
    return Path(name)


def unet(encoder: str, bands: int = 3, depth: int = 5) -> nn.Module:
    torch.manual_seed(99)
    channels = [16, 8, 8, 8, 8][-depth:]
    return build_network("unet", encoder, None, bands, 2, {"encoder_depth": depth, "decoder_channels": channels})


def deepest(network: Any, images: Tensor) -> Tensor:
    with evaluating(network):
        return network.encoder(images)[-1]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


TIMM = [
    "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "test_nfnet", "test_mambaout", "hrnet_w18_small",
    "mobilevit_xxs",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_the_encoder_gives_the_features_that_timm_makes_with_the_file(name, empty_place, images):
    file, network = written(small_timm(name).state_dict()), unet(f"tu-{name}")
    before = deepest(network, images)
    load_encoder(network, file, 3)
    after = deepest(network, images)
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, features_only=True
    ).eval()
    with torch.no_grad():
        expected = theirs(images)[-1]
    if getattr(theirs, "output_fmt", None) == "NHWC":
        expected = expected.permute(0, 3, 1, 2)
    assert torch.allclose(after, expected, atol=1e-6)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_a_vision_transformer_takes_its_weights_with_or_without_classifier_and_last_norm(empty_place):
    model: Any = small_timm("test_vit").eval()
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)[-1]
    state = model.state_dict()
    bare = {name: value for name, value in state.items() if not name.startswith(("head.", "norm.", "fc_norm."))}
    assert len(bare) < len(state)
    arguments = {"encoder_depth": 4, "decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8}
    for number, weights in enumerate(
        (state, bare, state | {"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)})
    ):
        network: Any = build_network("dpt", "tu-test_vit", None, 3, 2, arguments)
        load_encoder(network, written(weights, f"{number}.safetensors"), 3)
        with evaluating(network):
            assert torch.allclose(network.encoder(images)[0][-1], expected, atol=1e-6)


def test_an_encoder_of_segmentation_models_takes_torchvisions_file(empty_place, images, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(1)
    model = torchvision.models.resnet18(weights=None).eval()
    torch.save(model.state_dict(), "resnet18.pth")
    network = unet("resnet18")
    load_encoder(network, Path("resnet18.pth"), 3)
    said = [
        record.getMessage() for record in caplog.records
    ]  # nothing of blocks, each of which has a conv1, as the network has
    assert said == ["resnet18.pth: left out, as the encoder has no place for them: fc.bias, fc.weight."]
    with torch.no_grad():
        expected = nn.Sequential(*list(model.children())[:-2])(images)
    assert torch.allclose(deepest(network, images), expected, atol=1e-6)


@pytest.mark.parametrize(
    "prefix", ["encoder.", "backbone.", "model.", "module.", "module.encoder_q.", "student._orig_mod.backbone."]
)
def test_prefixes_of_training_tools_are_taken_off(prefix, empty_place):
    truth = state_of()
    file = written(state_of(prefix) | {"projector.0.weight": torch.ones(3, 3), prefix + "fc.weight": torch.ones(7, 5)})
    network: Any = unet("tu-test_resnet")
    load_encoder(network, file, 3)
    own = network.encoder.model.state_dict()
    assert all(torch.equal(own[name], truth[name]) for name in own)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("a.pt", lambda state: state),
        ("a.pth", lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}),
        ("a.bin", lambda state: state),
        ("a.ckpt", lambda state: {"pytorch-lightning_version": "2.0", "state_dict": {f"net.{k}": v for k, v in state.items()}}),
    ],
)  # fmt: skip
def test_files_of_torch_are_read(name, wrap, empty_place):
    truth = state_of()
    torch.save(wrap(truth), name)
    found = encoder_weights(unet("tu-test_resnet"), Path(name), 3)
    assert all(torch.equal(value, truth[own.removeprefix("model.")]) for own, value in found.items())
    assert len(found) > 60


def test_a_network_of_ours_gives_its_encoder(empty_place, images):
    """Its names are those that timm gives to the parts of an encoder for features: stages_0."""
    whole = unet("tu-test_convnext")
    nn.init.uniform_(next(whole.parameters()))
    load_encoder(network := unet("tu-test_convnext"), written(whole.state_dict()), 3)
    assert torch.equal(deepest(network, images), deepest(whole, images))


def test_classifiers_and_later_stages_are_left_out_with_a_remark(empty_place, caplog):
    caplog.set_level(logging.INFO)
    load_encoder(unet("tu-test_convnext", depth=3), written(state_of(name="test_convnext")), 3)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 1
    assert "head.fc.bias" in said[0]
    assert "weights.safetensors" in said[0]


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_of().items() if key != name}


def not_finite() -> dict[str, Tensor]:
    state = state_of()
    state["bn1.weight"][0] = torch.nan
    return state


def deeper() -> dict[str, Tensor]:
    """A larger encoder of the same widths: all weights of the smaller one are in it, with the same shapes."""
    state = state_of()
    return state | {
        name.replace("layer2.0", "layer2.1"): value for name, value in state.items() if "layer2.0.conv2" in name
    }


REFUSED: dict[str, tuple[Callable[[], Mapping[str, Tensor]], str]] = {
    "a weight is missing": (lambda: without("layer1.0.conv1.weight"), r"lacks 1 of the \d+ weights.*layer1\.0\.conv1\.weight"),
    "another shape": (
        lambda: state_of() | {"layer1.0.conv2.weight": torch.ones(5, 5, 3, 3)},
        r"layer1\.0\.conv2\.weight is \(5, 5, 3, 3\), the encoder's \(",
    ),
    "other bands": (lambda: state_of(in_chans=13), "reads 13 bands, but model.in_channels is 3"),
    "NaN": (not_finite, "NaN or infinity in bn1.weight"),
    "a larger encoder": (deeper, r"more weights than this encoder: layer2\.1\.conv2\.weight"),
    "another encoder": (lambda: state_of(name="test_convnext"), r"has none of the \d+ weights"),
    "query and key": (
        lambda: state_of("encoder_q.") | state_of("encoder_k.", seed=2),
        "several networks that may be meant, under 'encoder_k'.*'encoder_q'.*in a file of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(case, empty_place):
    make, message = REFUSED[case]
    file, network = written(make()), unet("tu-test_resnet")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_encoder(network, file, 3)
    assert WEIGHTS in str(caught.value)
    assert "weights.safetensors" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_file_for_the_bands_of_the_settings_is_taken(empty_place):
    file = written(state_of(in_chans=13))
    load_encoder(network := unet("tu-test_resnet", bands=13), file, 13)
    assert torch.equal(network.state_dict()["encoder.model.conv1.0.weight"], state_of(in_chans=13)["conv1.0.weight"])


class RunsCode:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("code_ran"),)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
@pytest.mark.parametrize("content", [b"no weights", b"", pickle.dumps(RunsCode())], ids=["text", "empty", "code"])
def test_files_that_hold_no_weights_are_refused_and_run_nothing(name, content, empty_place):
    Path(name).write_bytes(content)
    with pytest.raises(InputError, match=f"{WEIGHTS}: checkpoint {name}"):
        encoder_weights(unet("tu-test_resnet"), Path(name), 3)
    assert not Path("code_ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("absent.safetensors", "does not exist"),
        ("./folder", "is a folder"),
        ("https://example.org/a.pth", "an address"),
        ("hf-hub:timm/resnet18", "address of a model hub"),
        ("s3://bucket/a.safetensors", "an address"),
    ],
)
@pytest.mark.parametrize("job", ["pretrain", "adapt", "compare"])
def test_what_is_no_file_is_refused_before_anything_is_made(value, message, job, squares, empty_place, capsys):
    Path("folder").mkdir()
    Path("mine.yaml").write_text(config_to_yaml(load_config(None, small_settings(squares))))
    assert main([job, "--config", "mine.yaml", f"--{WEIGHTS}", value]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert WEIGHTS in said
    assert message in said
    made = {path.name for path in Path.cwd().iterdir()} - {"folder", "mine.yaml"}
    assert made <= ({"mlflow.db", "mlflow.db.lock"} if job == "compare" else set())


@pytest.mark.parametrize("job", [pretrain, adapt])
def test_a_file_of_another_encoder_is_refused_before_a_store_is_made(job, squares, empty_place):
    file = written(state_of(name="test_convnext"))
    with pytest.raises(InputError, match="has none of the"):
        job(settings(squares, file))
    assert [path.name for path in Path.cwd().iterdir()] == [file.name]


def settings(squares: Path, file: Path | None, **more: Any) -> Config:
    value = None if file is None else str(file)
    return load_config(None, small_settings(squares, model__encoder_weights=value, **more))


def test_the_network_of_a_run_has_the_weights_of_the_file(squares, empty_place):
    config = settings(squares, written(state_of()))
    own = make_network(config).state_dict()
    assert torch.equal(own["encoder.model.conv1.0.weight"], state_of()["conv1.0.weight"])
    without_file = make_network(config, with_weights=False).state_dict()
    assert not torch.equal(without_file["encoder.model.conv1.0.weight"], state_of()["conv1.0.weight"])


def test_runs_are_known_by_the_bytes_of_the_file(squares, empty_place):
    file = written(state_of())
    other = written(state_of(seed=2), "other.safetensors")
    copy = shutil.copy(file, "copy.safetensors")
    digests = {
        path: (run_digest(Job.PRETRAIN, settings(squares, path), DATA), source_digest(settings(squares, path), DATA))
        for path in (file, other, Path(copy), None)
    }
    assert digests[file] == digests[Path(copy)]
    for number in (0, 1):
        assert len({digest[number] for digest in digests.values()}) == 3
    # adaptation gets all weights from the source model, whose digest counts
    adapted = {run_digest(Job.ADAPT, settings(squares, path), DATA, "x") for path in (file, Path("gone.pt"), None)}
    assert len(adapted) == 1


def test_a_file_that_is_gone_matters_only_to_jobs_that_would_train_with_it(squares, empty_place):
    with pytest.raises(InputError, match=r"gone\.pt', which does not exist"):
        source_digest(settings(squares, Path("gone.pt")), DATA)
    source_digest(settings(squares, Path("gone.pt")), DATA, read_encoder=False)


@pytest.mark.slow
def test_a_trained_model_needs_the_file_no_more(squares, workplace):
    file = written(state_of())
    config = settings(squares, file, trainer__max_epochs=1)
    source = pretrain(config)
    store = open_store(config.tracking.uri, config.tracking.experiment)
    tags = store.client.get_run(source.run_id).data.tags
    assert tags[Tag.ENCODER_DIGEST] == hashlib.blake2b(file.read_bytes()).hexdigest()
    moved = shutil.move(file, "moved.safetensors")
    adapted = adapt(settings(squares, Path(moved), trainer__max_epochs=1))  # finds it by the bytes
    assert store.client.get_run(adapted.run_id).data.tags[Tag.SOURCE_RUN_ID] == source.run_id
    Path(moved).unlink()
    model = {"domain_adaptation__pretrained_checkpoint__path": f"runs:/{source.run_id}/model"}
    again = adapt(settings(squares, file, trainer__max_epochs=1, **model))
    assert again.metrics == adapted.metrics
    evaluate(settings(squares, file, domain_adaptation__pretrained_checkpoint__path=f"runs:/{adapted.run_id}/model"))


@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_resnet"])
def test_a_hub_that_does_not_answer_is_asked_once(encoder, empty_place, monkeypatch, caplog, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(empty_place))
    with pytest.raises(InputError, match=r"imagenet.*http://127\.0\.0\.1:9 does not answer") as caught:
        build_network("unet", encoder, "imagenet", 3, 2, {})
    assert "\n" not in str(caught.value)
    assert "Retry" not in caplog.text + "".join(capfd.readouterr())
    assert constants.HF_HUB_OFFLINE is False
