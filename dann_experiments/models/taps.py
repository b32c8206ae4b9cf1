"""Feature taps: which layers there are, what they give, and forwards that record or stop at them.

A tap is the dotted name of a module. A module that returns several maps (an SMP `encoder`) means its deepest non-empty
one; `NAME.K` picks map K of such a module where no module has that name. Of a module that runs several times in one
forward (a shared ReLU) the first call counts, everywhere. N images, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dann_experiments.config.errors import InputError


@dataclass(frozen=True)
class LayerInfo:
    """One layer that can be tapped."""

    name: str
    channels: int
    stride: float
    """Input pixels a position, along one side."""
    useful: bool
    """Whole encoder, one of its stages, decoder or head: where features of both domains are worth aligning."""


@dataclass(frozen=True)
class Tap:
    """A resolved layer name."""

    name: str
    module: str
    """Name of the module whose output holds the features."""
    map_index: int | None
    """Which of several maps; None = the deepest non-empty one."""
    channels: int
    stride: float
    copy: bool
    """The following module overwrites this output in place, so recording must copy it."""

    def pick(self, output: Any) -> Tensor:
        """The features (N, C, H, W) in the module's output."""
        return output[self.map_index] if self.map_index is not None else deepest_map(output)


JOINT_CUTS = ("encoder", "decoder", "segmentation_head")
"""Where a joint forward can part the domains, in the order of the forward pass."""


class _AllTapsReached(Exception):
    """Ends a forward that nobody needs any further."""


def deepest_map(output: Any) -> Tensor:
    """The last map (N, C, H, W) with channels in a module's output; raises TypeError where there is none."""
    if isinstance(output, (list, tuple)):
        for item in reversed(output):
            if _is_map(item):
                return item
    elif _is_map(output):
        return output
    raise TypeError("no map of shape (N, C, H, W)")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """`network` in eval mode and without gradients; every module's own mode is given back as found."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        for module, mode in modes.items():
            module.training = mode


def resolve_taps(network: nn.Module, layers: Sequence[str], in_channels: int, size: int = 64) -> list[Tap]:
    """Look up each layer by one forward of a blank (1, in_channels, size, size) image in eval mode.

    Raises InputError with the list of useful layers for a name that is not there or gives no map.
    """
    modules = dict(network.named_modules())
    wanted: dict[str, tuple[str, int | None]] = {}
    for layer in layers:
        parent, _, last = layer.rpartition(".")
        if layer in modules and layer:
            wanted[layer] = (layer, None)
        elif parent in modules and last.isdigit() and int(last) > 0:  # map 0 of an encoder is the image itself
            wanted[layer] = (parent, int(last))
        else:
            raise _no_such_layer(network, layer, in_channels, size)
    outputs: dict[str, Any] = {}
    versions: dict[str, int] = {}

    def record(name: str, index: int | None):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in outputs:
                return
            outputs[name] = output
            with suppress(TypeError, IndexError):
                versions[name] = (output[index] if index is not None else deepest_map(output))._version

        return hook

    handles = [modules[module].register_forward_hook(record(name, index)) for name, (module, index) in wanted.items()]
    try:
        _blank_forward(network, in_channels, size)
    finally:
        for handle in handles:
            handle.remove()
    taps = []
    for name, (module, index) in wanted.items():
        try:
            features = outputs[name][index] if index is not None else deepest_map(outputs[name])
            if not _is_map(features):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise _no_such_layer(network, name, in_channels, size) from None
        overwritten = features._version != versions[name]
        taps.append(Tap(name, module, index, features.shape[1], size / features.shape[2], overwritten))
    return taps


def list_layers(network: nn.Module, in_channels: int, size: int = 64) -> list[LayerInfo]:
    """Every layer that can be tapped, in the order of the forward pass; `size` is the side of the blank image used."""
    maps: list[tuple[str, Tensor]] = []
    encoder_maps: list[Tensor] = []
    seen: set[str] = set()

    def record(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in seen:
                return
            seen.add(name)
            if name == "encoder" and isinstance(output, (list, tuple)):
                encoder_maps.extend(output)
            with suppress(TypeError):
                maps.append((name, deepest_map(output)))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in network.named_modules() if name]
    try:
        _blank_forward(network, in_channels, size)
    finally:
        for handle in handles:
            handle.remove()
    stages = {id(item): index for index, item in enumerate(encoder_maps) if _is_map(item) and index > 0}
    named: dict[int, str] = {}  # the outermost module that gives exactly a stage's map stands for the stage
    for name, features in maps:
        outermost = name.count(".") <= named.get(id(features), name).count(".")
        if id(features) in stages and name.startswith("encoder.") and outermost:
            named[id(features)] = name
    useful = {*JOINT_CUTS, *named.values()}
    layers = [LayerInfo(name, features.shape[1], size / features.shape[2], name in useful) for name, features in maps]
    unnamed = [
        LayerInfo(f"encoder.{index}", features.shape[1], size / features.shape[2], True)
        for index, features in enumerate(encoder_maps)
        if index > 0 and _is_map(features) and id(features) not in named
    ]
    position = next((i for i, layer in enumerate(layers) if layer.name == "encoder"), len(layers))
    return layers[:position] + unnamed + layers[position:]


def forward_with_taps(network: nn.Module, images: Tensor, taps: Sequence[Tap]) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole forward; returns the logits and each tap's features."""
    with recording(network, taps) as features:
        logits = network(images)
    return logits, features


def forward_to_taps(network: nn.Module, images: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
    """Each tap's features; no layer behind the last of them runs."""
    with recording(network, taps, stop=True) as features, suppress(_AllTapsReached):
        network(images)
    return features


def forward_joint(
    network: nn.Module, source_images: Tensor, target_images: Tensor, taps: Sequence[Tap]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One forward of both domains up to the last tap, the source alone from there on (S + T images, then S).

    Taps must be `encoder`, inside it, the whole `decoder` or the `segmentation_head`: elsewhere skip connections would
    meet with S + T and S images (`check_joint` refuses that beforehand). Returns source logits, source features, target features.
    """
    count = len(source_images)
    total = count + len(target_images)

    def source_part(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, (list, tuple)):
            return type(output)(item[:count] if len(item) == total else item for item in output)
        return output[:count]

    with recording(network, taps) as features:
        # registered after the recording hooks, so these see the same full output and cut it behind them
        tapped = {tap.module for tap in taps}
        last = max((cut for cut in JOINT_CUTS if cut in tapped), key=JOINT_CUTS.index, default="encoder")
        handle = network.get_submodule(last).register_forward_hook(source_part)
        try:
            logits = network(torch.cat([source_images, target_images]))
        finally:
            handle.remove()
    source = {name: both[:count] for name, both in features.items()}
    target = {name: both[count:] for name, both in features.items()}
    return logits, source, target


def check_joint(taps: Sequence[Tap]) -> None:
    """Refuse taps at which a joint forward cannot part the domains."""
    for tap in taps:
        if tap.module not in JOINT_CUTS and not tap.module.startswith("encoder."):
            raise InputError(
                "domain_adaptation.batchnorm is 'joint', which works with layers of the encoder, with the whole 'decoder' and "
                f"with 'segmentation_head', not with {tap.name!r}; tap one of those or set batchnorm to 'separate'."
            )


@contextmanager
def recording(network: nn.Module, taps: Sequence[Tap], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """The dictionary given holds each tap's features after a forward in the block; `stop` ends that forward at the last."""
    features: dict[str, Tensor] = {}

    def hook_for(tap: Tap):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if tap.name in features:
                return
            picked = tap.pick(output)
            features[tap.name] = picked.clone() if tap.copy else picked
            if stop and len(features) == len(taps):
                raise _AllTapsReached

        return hook

    handles = [network.get_submodule(tap.module).register_forward_hook(hook_for(tap)) for tap in taps]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _is_map(item: Any) -> bool:
    return isinstance(item, Tensor) and item.ndim == 4 and item.shape[1] > 0


def _blank_forward(network: nn.Module, in_channels: int, size: int) -> None:
    parameter = next(network.parameters())
    with evaluating(network):
        try:
            network(torch.zeros(1, in_channels, size, size, device=parameter.device, dtype=parameter.dtype))
        except RuntimeError as error:  # memory, or a size that this network does not take
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"model: the network does not take a blank image of {size} x {size} pixels: {reason}"
            ) from None


def _no_such_layer(network: nn.Module, layer: str, in_channels: int, size: int) -> InputError:
    names = [info.name for info in list_layers(network, in_channels, size) if info.useful]
    return InputError(
        f"domain_adaptation.method.feature_layer names {layer!r}, which this network does not have or which gives no "
        f"map; layers that do: {names} (`python -m dann_experiments layers` lists all)."
    )
