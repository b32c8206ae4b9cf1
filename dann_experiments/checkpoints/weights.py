"""Reads the weights of a checkpoint in common formats, without running code, and loads them into a network."""

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
DEEPEST = 4  # levels of nested mappings to search in a checkpoint


def read_weights(path: str | Path, source_format: SourceFormat = "auto") -> dict[str, Tensor]:
    """Return the tensors in a file or folder by name: Lightning `.ckpt`, state dict, SMP folder or safetensors.

    All state dicts in nested mappings (`net`, `model.state_dict`) are read; if there are several, names begin with their keys.
    Only tensors and plain values are read, never code (`safe_load`). Raises InputError for anything else.
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
            f"checkpoint {path} holds {type(content['state_dict']).__name__} as state_dict; it must map names to tensors."
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
    """Load `weights` into `network`, cast to its type, and return one line for each weight that does not fit.

    Uses the weights under `source_prefix`, or under the only prefix that holds a network (see `prefixes`). `where` names the
    checkpoint in messages. Raises InputError if nothing fits, for NaN or infinite weights and, with `strict`, for any misfit.
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
            f"checkpoint {where} does not fit the network of `model` ({listed(problems)}). Use the checkpoint's own model "
            "settings, or set domain_adaptation.pretrained_checkpoint.strict_loading to false to load what fits."
        )
    fitting = {name: tensor for name, tensor in found.items() if tensor.shape == wanted[name].shape}
    if not fitting:
        raise InputError(f"checkpoint {where} has no weights in common with the network of `model`.")
    for name, tensor in fitting.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"checkpoint {where} holds NaN or infinity in {name}: its training diverged. Use an earlier checkpoint."
            )
    network.load_state_dict(fitting, strict=False)
    return problems


def listed(problems: Sequence[str]) -> str:
    """Join up to eight problems of `load_into` for a message."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def _holds_values(tensor: Tensor) -> bool:
    """Return False for meta, sparse and quantized tensors, which do not hold one value per element."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield (keys that lead to it, mapping) for every mapping of names to tensors in `content`, including itself.

    If any has dotted names, as state dicts do, mappings without them, such as an optimizer's, are left out.
    """
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
        # a module's extra state is no weights of the network, though a mean teacher's is a network
        if isinstance(key, str) and isinstance(value, dict) and not key.endswith("_extra_state"):
            yield from _tensors_inside(value, (*keys, key), depth + 1)
