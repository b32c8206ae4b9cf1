"""Checkpoints of other people's tools: wrappers inside names, state dicts inside mappings, several networks in one file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dann_experiments import InputError, evaluate, load_config
from dann_experiments.__main__ import main
from dann_experiments.checkpoints.weights import load_into, read_weights
from dann_experiments.comparison.arms import arms_of
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.jobs.identity import run_digest
from tests.conftest import small_settings

PREFIX = "domain_adaptation.pretrained_checkpoint.source_prefix"
PATH = "domain_adaptation.pretrained_checkpoint.path"


def network(seed: int = 0, encoder: str = "tu-test_resnet", classes: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    net = smp.Unet(encoder, encoder_weights=None, encoder_depth=2, decoder_channels=(8, 8), classes=classes)
    for name, buffer in net.named_buffers():  # as after training: every value tells the network
        if "num_batches" not in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return net


def state_of(seed: int = 0, prefix: str = "", **more: Any) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in network(seed, **more).state_dict().items()}


def loaded(path: Path, source_prefix: str | None = None, strict: bool = True) -> nn.Module:
    fresh = network(99)
    load_into(fresh, read_weights(path), strict, str(path), source_prefix)
    return fresh


def holds(net: nn.Module, truth: Mapping[str, Tensor]) -> bool:
    own = net.state_dict()
    return all(torch.equal(own[name], value.to(own[name].dtype)) for name, value in truth.items())


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): value for name, value in state_of().items()}


class Lit(pl.LightningModule):
    def __init__(self, attribute: str, compiled: bool) -> None:
        super().__init__()
        net = network()
        setattr(self, attribute, torch.compile(net) if compiled else net)
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(2))


def compiled_inside() -> Any:
    net: Any = network()
    net.encoder = torch.compile(net.encoder)
    return net.state_dict()


FORMS: dict[str, Callable[[], Any]] = {
    "compiled as a whole": lambda: torch.compile(network()).state_dict(),  # pyright: ignore
    "compiled encoder": compiled_inside,
    "DataParallel": lambda: nn.DataParallel(network()).state_dict(),
    "DataParallel of compiled": lambda: nn.DataParallel(torch.compile(network())).state_dict(),  # pyright: ignore
    "compiled DataParallel": lambda: torch.compile(nn.DataParallel(network())).state_dict(),  # pyright: ignore
    "wrapped thrice": lambda: renamed(lambda name: f"model._orig_mod.module.{name}"),
    "module in the middle": lambda: renamed(lambda name: name.replace("encoder.", "encoder.module.", 1)),
    "FSDP with checkpointing": lambda: renamed(
        lambda name: f"_fsdp_wrapped_module.{name.replace('encoder.', 'encoder._checkpoint_wrapped_module.', 1)}"
    ),
    "AveragedModel": lambda: AveragedModel(network()).state_dict(),
    **{
        f"under {key}": (lambda key=key: {"epoch": 1, key: state_of(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}})
        for key in ("net", "network", "model", "model_state", "model_state_dict", "state_dict", "weights", "ema", "params")
    },
    "nested": lambda: {"epoch": 1, "model": {"state_dict": state_of(), "arch": "unet"}},
    "nested twice": lambda: {"checkpoint": {"model": {"state_dict": state_of(prefix="module.")}}},
    "nested with optimizer by names": lambda: {
        "model": state_of(),
        "optimizer": {"state": {name: {"exp_avg": value} for name, value in state_of(5).items()}},
    },
    "Lightning net": lambda: {"pytorch-lightning_version": "2.6", "state_dict": Lit("net", False).state_dict()},
    "Lightning backbone": lambda: {"pytorch-lightning_version": "2.6", "state_dict": Lit("backbone", False).state_dict()},
    "Lightning compiled": lambda: {"pytorch-lightning_version": "2.6", "state_dict": Lit("model", True).state_dict()},
    "without counters": lambda: {name: value for name, value in state_of().items() if "num_batches" not in name},
    "half": lambda: {name: value.half() for name, value in state_of().items()},
    "bfloat16": lambda: {name: value.bfloat16() for name, value in state_of().items()},
    "double": lambda: {name: value.double() for name, value in state_of().items()},
    "parameters": lambda: {name: nn.Parameter(value, requires_grad=False) for name, value in state_of().items()},
    "one network under two keys": lambda: {"model": state_of(), "state_dict": state_of()},
    "registered twice": lambda: state_of(prefix="net.") | state_of(prefix="compiled._orig_mod."),
    "with a fragment": lambda: state_of(prefix="model.")
    | {name: value for name, value in state_of(1, "teacher.").items() if "segmentation_head" in name},
    "with another network": lambda: state_of(prefix="model.") | state_of(1, "teacher.", encoder="resnet50"),
    "with averaged parameters alone": lambda: {"state_dict": state_of(), "ema": dict(network(1).named_parameters())},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_file_with_one_network_loads_strictly_to_the_weights_that_were_saved(tmp_path, form):
    content = FORMS[form]()
    torch.save(content, tmp_path / "a.pt")
    net = loaded(tmp_path / "a.pt")
    truth = {name: value for name, value in state_of().items() if "num_batches" not in name}
    cast = {"half": torch.half, "bfloat16": torch.bfloat16}.get(form, torch.float32)
    assert holds(net, {name: value.to(cast) for name, value in truth.items()})
    counters = [value for name, value in net.state_dict().items() if "num_batches" in name]
    assert counters
    assert not any(counters)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model._orig_mod."])
def test_safetensors_and_smp_folders_may_have_prefixes(tmp_path, prefix):
    network().save_pretrained(str(tmp_path / "folder"))  # pyright: ignore[reportCallIssue]
    for path in (tmp_path / "a.safetensors", tmp_path / "folder" / "model.safetensors"):
        save_file(state_of(prefix=prefix), path)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        assert holds(loaded(path), state_of())


def two(folder: Path) -> Path:
    state = state_of(0, "model.") | state_of(1, "ema_model.")
    torch.save({"pytorch-lightning_version": "2.5.0", "epoch": 3, "state_dict": state}, folder / "two.ckpt")
    return folder / "two.ckpt"


SEVERAL: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "prefixes": (lambda: state_of(0, "model.") | state_of(1, "ema_model."), {"model": 0, "ema_model": 1, "model.": 0}),
    "containers": (lambda: {"model": state_of(0), "ema": state_of(1)}, {"model": 0, "ema": 1}),
    "root and prefix": (lambda: state_of(0) | state_of(1, "ema."), {".": 0, "": 0, "ema": 1}),
    "containers with prefixes": (
        lambda: {"state_dict": state_of(0, "module."), "model_ema": AveragedModel(network(1)).state_dict()},
        {"state_dict": 0, "state_dict.module": 0, "model_ema": 1, "model_ema.module": 1},
    ),
    "Lightning's average": (
        lambda: {"pytorch-lightning_version": "2.6", "state_dict": state_of(0, "model."),
                 "current_model_state": state_of(1, "model.")},
        {"state_dict.model": 0, "current_model_state": 1, "current_model_state.model": 1},
    ),
    "three": (
        lambda: {"model": {"state_dict": state_of(0)}, "ema": {"state_dict": state_of(1)}, "swa": state_of(2)},
        {"model.state_dict": 0, "ema.state_dict": 1, "swa": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SEVERAL)
def test_several_networks_are_refused_until_one_is_chosen(tmp_path, case):
    made, choices = SEVERAL[case]
    torch.save(made(), tmp_path / "a.pt")
    for strict in (True, False):
        with pytest.raises(InputError, match="several networks") as error:
            loaded(tmp_path / "a.pt", strict=strict)
        assert PREFIX in str(error.value)
    for prefix, seed in choices.items():
        assert holds(loaded(tmp_path / "a.pt", prefix), state_of(seed)), prefix


def test_a_prefix_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = two(tmp_path)
    with pytest.raises(InputError, match=rf"{PREFIX} is 'teacher'.*'ema_model' \(.*'model' \("):
        loaded(path, "teacher")
    with pytest.raises(InputError, match=f"{PREFIX} is 'odel'"):
        loaded(path, "odel")
    torch.save(state_of(), tmp_path / "plain.pt")
    with pytest.raises(InputError, match=rf"{PREFIX} is 'model'.*under '\.' "):
        loaded(tmp_path / "plain.pt", "model")


def test_a_prefix_that_may_mean_two_networks_is_refused(tmp_path):
    torch.save({"a": state_of(0, "model."), "b": state_of(1, "model.")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"may mean 'a\.model' .* 'b\.model' .*whole prefix"):
        loaded(tmp_path / "x.pt", "model")


def test_two_networks_with_other_classes_are_refused_without_strict_loading_too(tmp_path):
    torch.save(state_of(0, "model.", classes=5) | state_of(1, "ema.", classes=5), tmp_path / "x.pt")
    with pytest.raises(InputError, match="several networks"):
        loaded(tmp_path / "x.pt", strict=False)
    net = loaded(tmp_path / "x.pt", "ema", strict=False)
    first = "encoder.model.conv1.0.weight"
    assert torch.equal(net.state_dict()[first], state_of(1)[first])


def test_what_is_left_out_is_logged(tmp_path, caplog):
    torch.save(FORMS["with a fragment"](), tmp_path / "a.pt")
    with caplog.at_level("INFO"):
        loaded(tmp_path / "a.pt")
    assert "the weights under 'model' are loaded; left out: 'teacher' (2 of" in caplog.text


def test_strict_loading_still_refuses_what_is_too_much_or_too_little(tmp_path):
    torch.save(state_of(prefix="model.") | {"model.aux.weight": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(InputError, match=r"not in the network: aux\.weight"):
        loaded(tmp_path / "more.pt")
    less = state_of(prefix="model.")
    del less["model.encoder.model.bn1.running_mean"]
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(InputError, match=r"missing: encoder\.model\.bn1\.running_mean"):
        loaded(tmp_path / "less.pt")
    with pytest.raises(InputError, match=r"not in the network: encoder\.layer1\.2"):
        load_into(network(encoder="resnet18"), state_of(encoder="resnet34"), True, "deeper.pt", None)


@pytest.mark.slow
def test_the_hash_seed_of_python_decides_nothing(tmp_path):
    code = (
        f"import sys, torch; from torch import nn; from {load_into.__module__} import load_into, read_weights;"
        "net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1));"
        "load_into(net, read_weights(sys.argv[1]), True, '', None); torch.save(net.state_dict(), sys.argv[2])"
    )
    nets = [nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)).state_dict() for _ in range(2)]
    state = {f"model.{name}": value for name, value in nets[0].items()}
    state |= {f"ema.{name}": value for name, value in nets[1].items() if not name.startswith("2.")}
    torch.save(state, tmp_path / "a.pt")
    for seed in "01":
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.pt"), str(tmp_path / f"{seed}.pt")],
            cwd=Path(__file__).parents[1], env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."}, check=True,
        )  # fmt: skip
        found = torch.load(tmp_path / f"{seed}.pt")
        assert all(torch.equal(value, found[name]) for name, value in nets[0].items() if "num_batches" not in name)


def test_a_prefix_without_a_checkpoint_is_refused():
    with pytest.raises(InputError, match="source_prefix is 'model', but no checkpoint is set"):
        load_config(None, {PREFIX: "model"})


def test_the_prefix_counts_in_the_digest_of_a_run_only_when_it_is_set():
    plain, chosen = load_config(None, {PATH: "a.pt"}), load_config(None, {PATH: "a.pt", PREFIX: "model"})
    for job in ("adapt", "evaluate"):
        assert run_digest(job, plain, {}, "x") != run_digest(job, chosen, {}, "x")
    assert run_digest("pretrain", plain, {}) == run_digest("pretrain", chosen, {})
    assert run_digest("adapt", plain, {}, "x") == "e545cb36bd973e54f3ccb35b66fce079"


def test_the_oracle_of_a_comparison_is_trained_without_the_prefix_and_no_arm_has_one_of_its_own():
    with pytest.raises(InputError, match="all arms share it"):
        arms_of(CompareConfig(arms={"a": {PREFIX: "model"}}), load_config(None, {}))


@pytest.fixture
def full_size(squares, workplace) -> Path:
    """A checkpoint with two networks of the settings' own kind."""
    config = load_config(None, small_settings(squares))
    state = {}
    for seed, prefix in enumerate(("model.", "ema_model.")):
        torch.manual_seed(seed)
        from dann_experiments.jobs.build import make_network

        state |= {prefix + name: value for name, value in make_network(config, False).state_dict().items()}
    torch.save({"state_dict": state}, "two.ckpt")
    return Path("two.ckpt")


def test_evaluate_takes_the_network_that_is_chosen(full_size, squares):
    settings = {**small_settings(squares), PATH: str(full_size)}
    with pytest.raises(InputError, match="several networks"):
        evaluate(load_config(None, settings))
    values = {}
    for prefix in ("model", "ema_model"):
        result = evaluate(load_config(None, {**settings, PREFIX: prefix}))
        values[prefix] = dict(result.metrics)
    assert values["model"] != values["ema_model"]


def test_predict_names_its_own_setting(full_size, squares, capsys):
    from dann_experiments.config import config_to_yaml

    config = load_config(None, small_settings(squares))
    Path("mine.yaml").write_text(config_to_yaml(config))
    image = sorted((squares / "target_val" / "images").iterdir())[0]
    command = [
        "predict",
        "--config",
        "mine.yaml",
        "--model",
        str(full_size),
        "--input",
        str(image),
        "--output",
        "map.png",
    ]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "choose one by source_prefix" in said
    assert "pretrained_checkpoint" not in said
    maps = []
    for prefix in ("model", "ema_model"):
        assert main([*command, "--source_prefix", prefix, "--overwrite", "true"]) == 0
        maps.append(Path("map.png").read_bytes())
    assert maps[0] != maps[1]
