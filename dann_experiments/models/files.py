"""Networks in files: saved as safetensors and JSON, loaded from the formats that people have. Nothing is unpickled.

A saved model is a folder in segmentation-models-pytorch's own `save_pretrained` format (`config.json`,
`model.safetensors`), so that `smp.from_pretrained(folder)` reads it, with `dann.json` beside it: class names, ids that are
ignored, and the normalisation its images need.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dann_experiments.config.errors import InputError

SourceFormat = Literal["auto", "pytorch_lightning", "pytorch", "smp"]
WEIGHTS_NAME = "model.safetensors"


def save_model(
    folder: str | Path, network: nn.Module, arch: str, arguments: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write `network` into `folder`; `arguments` are those of `smp.create_model`, `facts` what else a user needs."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    config = {"_model_class": type(network).__name__, **arguments, "encoder_weights": None}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "dann.json").write_text(json.dumps({"arch": arch, **facts}, indent=1) + "\n")


def read_weights(path: str | Path, source_format: SourceFormat = "auto") -> dict[str, Tensor]:
    """The network's state dict in a file or folder: Lightning `.ckpt`, plain state dict, SMP folder, safetensors.

    Only tensors and plain values are read (`weights_only`), never code. Raises InputError for anything else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"domain_adaptation.pretrained_checkpoint.path is {path}, which does not exist.")
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise InputError(f"checkpoint folder {path} holds no {WEIGHTS_NAME}; give an SMP save_pretrained folder.")
        return read_weights(path / WEIGHTS_NAME)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint {path} cannot be read: {error}") from None
    if source_format == "smp":
        raise InputError(f"checkpoint {path} is a file, but source_format is 'smp'; give the save_pretrained folder.")
    content = _load_tensors(path)
    if source_format == "auto":
        source_format = "pytorch_lightning" if "pytorch-lightning_version" in content else "pytorch"
    state = content.get("state_dict", content) if source_format == "pytorch_lightning" else _plain_state(content)
    if not isinstance(state, dict):
        raise InputError(
            f"checkpoint {path} holds {type(state).__name__} as state_dict; give one of names and tensors."
        )
    weights = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"checkpoint {path} holds no tensors under {sorted(map(str, content))[:8]}.")
    return weights


def load_into(network: nn.Module, weights: Mapping[str, Tensor], strict: bool, where: str) -> list[str]:
    """Load `weights` into `network`, after dropping a common prefix such as `model.` or `network.` they may carry.

    Returns what did not fit, one line each; with `strict` raises InputError listing it by name instead.
    """
    wanted = network.state_dict()
    found = _without_prefix(weights, wanted)
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"not in the network: {name}" for name in found if name not in wanted]
    problems += [
        f"other shape: {name} is {tuple(found[name].shape)}, the network's {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems and strict:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InputError(
            f"checkpoint {where} does not fit the network of `model` ({shown}). Give the checkpoint's own model settings, "
            "or set domain_adaptation.pretrained_checkpoint.strict_loading to false to load what fits."
        )
    fitting = {name: found[name] for name in wanted if name in found and found[name].shape == wanted[name].shape}
    if not fitting:
        raise InputError(f"checkpoint {where} has no weight in common with the network of `model`.")
    network.load_state_dict(fitting, strict=False)
    return problems


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; each means: not a file of tensors
        if zipfile.is_zipfile(path):
            raise InputError(
                f"checkpoint {path} holds more than tensors and plain values; it was not loaded, as that could run foreign "
                "code. Save its state_dict alone."
            ) from None
        raise InputError(f"checkpoint {path} is no checkpoint that torch can read ({type(error).__name__}).") from None
    if not isinstance(content, dict):
        raise InputError(
            f"checkpoint {path} holds {type(content).__name__}; give a state dict or a Lightning checkpoint."
        )
    return content


def _plain_state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), dict):
            return content[key]
    return content


def _without_prefix(weights: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Checkpoints of training wrappers name the network's weights `network.encoder...`; take those, drop the prefix."""
    candidates: Sequence[str] = [
        "",
        *{name[: name.index(key)] for name in weights for key in [_first_part(wanted)] if key in name},
    ]
    best = max(
        candidates,
        key=lambda prefix: sum(name.startswith(prefix) and name[len(prefix) :] in wanted for name in weights),
    )
    return {name[len(best) :]: tensor for name, tensor in weights.items() if name.startswith(best)}


def _first_part(wanted: Mapping[str, Any]) -> str:
    return next(iter(wanted)).split(".")[0] + "."
