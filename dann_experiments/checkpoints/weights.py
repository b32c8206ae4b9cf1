"""Reads the weights of a checkpoint, from the formats that people have, and loads them into a network. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dann_experiments.checkpoints.prefixes import find_weights, is_counter
from dann_experiments.checkpoints.safe_load import load_tensors
from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import user_path
from dann_experiments.names import Key

SourceFormat = Literal["auto", "pytorch_lightning", "pytorch", "smp"]
WEIGHTS_NAME = "model.safetensors"
DEEPEST = 4  # mappings inside mappings of a checkpoint that are looked into


def read_weights(path: str | Path, source_format: SourceFormat = "auto") -> dict[str, Tensor]:
    """Read the tensors in a file or folder by name: Lightning `.ckpt`, state dict, SMP folder, safetensors.

    State dicts inside mappings (`net`, `model.state_dict`) are all read; where there are several, their names begin with the
    keys that lead to them. Only tensors and plain values are read, never code (`safe_load`). Raises InputError for anything else.
    """
    path = user_path(path)
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist.")
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
        raise InputError(
            f"checkpoint {path} is a file, but domain_adaptation.pretrained_checkpoint.source_format is 'smp'; give the "
            "save_pretrained folder, or auto."
        )
    content = load_tensors(path)
    is_lightning = source_format == "pytorch_lightning" or "pytorch-lightning_version" in content
    if is_lightning and not isinstance(content.get("state_dict", content), dict):
        raise InputError(
            f"checkpoint {path} holds {type(content['state_dict']).__name__} as state_dict; give one of names and tensors."
        )
    only = content.get("state_dict", content) if source_format == "pytorch_lightning" else content
    found = dict(_state_dicts(only))
    weights = {
        ".".join([*keys, name] if len(found) > 1 else [name]): tensor
        for keys, state in found.items()
        for name, tensor in state.items()
    }
    if not weights:
        raise InputError(f"checkpoint {path} holds no tensors under {sorted(map(str, content))[:8]}.")
    return weights


def load_into(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    strict: bool,
    where: str,
    source_prefix: str | None = None,
    prefix_key: str = Key.SOURCE_PREFIX,
) -> list[str]:
    """Load `weights` into `network`: those under `source_prefix`, or under the one prefix, such as `model.`, that brings a
    network (`prefixes`). Their values are cast to the network's type.

    Returns what did not fit, one line each; with `strict` raises InputError listing it by name instead.
    """
    wanted = network.state_dict()
    found, surplus = find_weights(weights, wanted, where, source_prefix, prefix_key)
    problems = [f"missing: {name}" for name in wanted if name not in found and not is_counter(name)]
    problems += [f"not in the network: {name}" for name in surplus]
    problems += [
        f"other shape: {name} is {tuple(found[name].shape)}, the network's {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape and not is_counter(name)
    ]
    if problems and strict:
        raise InputError(
            f"checkpoint {where} does not fit the network of `model` ({listed(problems)}). Give the checkpoint's own model "
            "settings, or set domain_adaptation.pretrained_checkpoint.strict_loading to false to load what fits."
        )
    fitting = {name: tensor for name, tensor in found.items() if tensor.shape == wanted[name].shape}
    if not fitting:
        raise InputError(f"checkpoint {where} has no weight in common with the network that is built for it.")
    for name, tensor in fitting.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"checkpoint {where} holds NaN or infinity in {name}: the training that wrote it diverged. Give an earlier one."
            )
    network.load_state_dict(fitting, strict=False)
    return problems


def listed(problems: Sequence[str]) -> str:
    """Return the problems that `load_into` found, in a sentence's length."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def _holds_values(tensor: Tensor) -> bool:
    """Return False for tensors that claim a size without holding values: meta, sparse and quantized ones."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every mapping of names to tensors in `content`, itself included, with the keys that lead to it. State dicts have
    dotted names: where there are some, mappings without dots, such as an optimizer's, are left out."""
    found = list(_tensors_inside(content, (), 0))
    dotted = [(keys, state) for keys, state in found if any("." in name for name in state)]
    yield from dotted or found


def _tensors_inside(
    content: Mapping[Any, Any], keys: tuple[str, ...], depth: int
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor) and _holds_values(value)}
    if state:
        yield keys, state
    for key, value in content.items() if depth < DEEPEST else ():
        if isinstance(key, str) and isinstance(value, dict):
            yield from _tensors_inside(value, (*keys, key), depth + 1)
