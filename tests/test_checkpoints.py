"""Source checkpoints in every form people have; what does not fit, and what could run code, is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch

from dann_experiments import InputError
from dann_experiments.checkpoints.saved_model import save_model
from dann_experiments.checkpoints.weights import load_into, read_weights


def network(classes: int = 2, channels: tuple[int, ...] = (8, 8)) -> torch.nn.Module:
    torch.manual_seed(classes)
    return smp.Unet("resnet18", encoder_weights=None, encoder_depth=2, decoder_channels=channels, classes=classes)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def lightning(folder: Path, net: torch.nn.Module) -> Path:
    state = {f"network.{name}": value for name, value in net.state_dict().items()} | {"method.x": torch.zeros(1)}
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": state, "epoch": 3}, folder / "a.ckpt")
    return folder / "a.ckpt"


def lightning_with_model_prefix(folder: Path, net: torch.nn.Module) -> Path:
    state = {f"model.{name}": value for name, value in net.state_dict().items()}
    torch.save({"pytorch-lightning_version": "1.9.0", "state_dict": state}, folder / "b.ckpt")
    return folder / "b.ckpt"


def plain(folder: Path, net: torch.nn.Module) -> Path:
    torch.save(net.state_dict(), folder / "c.pt")
    return folder / "c.pt"


def smp_folder(folder: Path, net: torch.nn.Module) -> Path:
    net.save_pretrained(str(folder / "d"))
    return folder / "d"


def our_folder(folder: Path, net: torch.nn.Module) -> Path:
    save_model(folder / "e", net, "unet", {"encoder_name": "resnet18"}, {"class_names": ["a", "b"]})
    return folder / "e"


@pytest.mark.parametrize("form", [lightning, lightning_with_model_prefix, plain, smp_folder, our_folder])
def test_every_form_loads_strictly_to_the_same_weights(tmp_path, form):
    saved, fresh = network(), network(3)
    fresh = network()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    path = form(tmp_path, saved)
    assert load_into(fresh, read_weights(path), strict=True, where=str(path)) == []
    assert equal(fresh, saved)


def test_another_architecture_is_refused_with_the_names_that_do_not_fit(tmp_path):
    path = plain(tmp_path, network(classes=3))
    with pytest.raises(InputError) as error:
        load_into(network(), read_weights(path), strict=True, where="c.pt")
    assert "other shape: segmentation_head.0.weight is (3, 8, 3, 3), the network's (2, 8, 3, 3)" in str(error.value)
    assert "strict_loading" in str(error.value)


def test_without_strict_loading_the_rest_is_loaded_and_what_is_left_out_is_listed(tmp_path):
    donor, fresh = network(classes=3), network()
    left_out = load_into(fresh, donor.state_dict(), strict=False, where="x")
    assert sorted(line.split()[2] for line in left_out) == ["segmentation_head.0.bias", "segmentation_head.0.weight"]
    assert torch.equal(fresh.encoder.conv1.weight, donor.encoder.conv1.weight)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": x}])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(Evil()), "evil.ckpt")
    with pytest.raises(InputError, match="holds more than tensors"):
        read_weights("evil.ckpt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt"):
        read_weights(tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        read_weights(tmp_path / "x.safetensors")
