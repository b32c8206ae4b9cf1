"""Feature taps: lists layers, looks them up, and records their features in a forward pass.

A tap is the dotted name of a module. If a module returns several maps (an SMP `encoder`), the tap is its deepest non-empty map;
`NAME.K` picks map K, unless a module has that name. If a module runs several times in one forward pass (a shared ReLU), only its
first call counts. Letters: N images, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dann_experiments.config.errors import InputError
from dann_experiments.models.compiling import uncompiled


@dataclass(frozen=True)
class LayerInfo:
    """A layer that can be tapped."""

    name: str
    channels: int
    stride: float
    """Input pixels per position, along one side."""
    useful: bool
    """True for the encoder, its stages, the decoder and the head, where aligning features of both domains is useful."""


@dataclass(frozen=True)
class Tap:
    """A resolved layer name."""

    name: str
    module: str
    """Name of the module whose output (with `before`, input) holds the features."""
    map_index: int | None
    """Index of the map among several; None = the deepest non-empty one."""
    channels: int
    stride: float
    copy: bool
    """True if a later module overwrites the output in place, so that it must be copied."""
    before: bool = False
    """True if no module outputs exactly these features, and they are the first input of `module`."""

    def pick(self, output: Any) -> Tensor:
        """Return the features (N, C, H, W) in the module's output (with `before`, inputs)."""
        if self.before:
            return output[0]
        return output[self.map_index] if self.map_index is not None else deepest_map(output)

    def hook(self, network: nn.Module, see: Callable[[Any], Any]) -> RemovableHandle:
        """Call `see` with the module's output (or inputs) in each forward pass; its result, if not None, replaces it."""
        module = network.get_submodule(self.module)
        if self.before:
            return module.register_forward_pre_hook(lambda module, inputs: see(inputs))
        return module.register_forward_hook(lambda module, inputs, output: see(output))


JOINT_CUTS = ("encoder", "decoder", "segmentation_head")
"""Modules after which a joint forward pass can split the domains, in the order of the forward pass."""


class AllTapsReached(Exception):
    """Ends a forward pass once all taps are recorded."""


def deepest_map(output: Any) -> Tensor:
    """Return the last map (N, C, H, W) with channels in a module's output, which may be a list or, as that of a vision
    transformer, a list of maps beside a list of tokens. Raises TypeError if there is none."""
    if _is_map(output):
        return output
    for item in reversed(output) if isinstance(output, (list, tuple)) else ():
        with suppress(TypeError):
            return deepest_map(item)
    raise TypeError("no map of shape (N, C, H, W)")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """Set `network` to eval mode, without gradients and `uncompiled`; restore the mode of every module afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), uncompiled(network):
            yield network
    finally:
        for module, mode in modes.items():
            module.training = mode


def resolve_taps(network: nn.Module, layers: Sequence[str], in_channels: int, size: int = 64) -> list[Tap]:
    """Resolve layer names with one forward pass of a blank image (1, in_channels, size, size) in eval mode.

    Raises InputError that lists the useful layers if a layer does not exist or does not output a map.
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
    calls = _first_calls(network, in_channels, size)
    taps = []
    for name, (module, index) in wanted.items():
        try:
            output = calls[module].output
            features = output[index] if index is not None else deepest_map(output)
            if not _is_map(features):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise _no_such_layer(network, name, in_channels, size) from None
        given = features.shape[1], size / features.shape[2]
        sooner = None if index is None else _where_first(features, module, calls)
        if sooner is not None:  # record it there, so that later layers need not run
            taps.append(Tap(name, sooner[0], None, *given, copy=False, before=sooner[1]))
        else:
            version = calls[module].versions[-1 if index is None else index]
            taps.append(Tap(name, module, index, *given, copy=features._version != version))
    return taps


@dataclass
class _Call:
    """The first call of a module in a forward pass."""

    output: Any = None
    versions: Sequence[int] = ()
    """torch's version counters (in-place changes) of the maps in `output` when returned; last, that of the deepest map."""
    given: Tensor | None = None
    """The first input, if it is a map."""
    given_version: int = -1


def _first_calls(network: nn.Module, in_channels: int, size: int) -> dict[str, _Call]:
    """Return the first calls by module name, in the order they end. All maps are kept alive, so that identities are unique."""
    begun: dict[str, _Call] = {}
    calls: dict[str, _Call] = {}

    def begin(name: str):
        def hook(module: nn.Module, inputs: Any) -> None:
            if name not in begun:
                first = inputs[0] if inputs and _is_map(inputs[0]) else None
                begun[name] = _Call(given=first, given_version=-1 if first is None else first._version)

        return hook

    def end(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in calls:
                return
            maps = list(output) if isinstance(output, (list, tuple)) else [output]
            versions = [item._version if isinstance(item, Tensor) else -1 for item in maps]
            with suppress(TypeError):
                versions.append(deepest_map(output)._version)
            calls[name] = begun[name]
            calls[name].output, calls[name].versions = output, versions

        return hook

    handles = []
    for name, module in network.named_modules():
        if name:
            handles += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end(name))]
    try:
        _blank_forward(network, in_channels, size)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _where_first(features: Tensor, parent: str, calls: Mapping[str, _Call]) -> tuple[str, bool] | None:
    """Return (name, False) of the outermost module in `parent` that outputs exactly this map, else (name, True) of one whose
    first input it is; None if there is neither."""
    inside = {name: call for name, call in calls.items() if name.startswith(f"{parent}.")}
    giving = [
        name
        for name, call in inside.items()
        if call.output is features and call.versions[-1] == features._version  # not changed in place by a later layer
    ]
    if giving:
        return min(giving, key=lambda name: name.count(".")), False
    taking = [
        name for name, call in inside.items() if call.given is features and call.given_version == features._version
    ]
    return (min(taking, key=lambda name: name.count(".")), True) if taking else None


def list_layers(network: nn.Module, in_channels: int, size: int = 64) -> list[LayerInfo]:
    """Return every layer that can be tapped, in forward order; `size`: side in pixels of the blank image passed through."""
    calls = _first_calls(network, in_channels, size)
    maps: list[tuple[str, Tensor]] = []
    for name, call in calls.items():
        with suppress(TypeError):
            maps.append((name, deepest_map(call.output)))
    whole = calls["encoder"].output if "encoder" in calls else None
    encoder_maps = list(whole) if isinstance(whole, (list, tuple)) else []
    stages = {id(item): index for index, item in enumerate(encoder_maps) if _is_map(item) and index > 0}
    named: dict[int, str] = {}  # the outermost module that outputs exactly a stage's map names the stage
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


@contextmanager
def recording(network: nn.Module, taps: Sequence[Tap], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that a forward pass in the block fills with features (N, C, H, W) by tap name.

    `stop`: raise AllTapsReached once all are recorded, so that later layers do not run.
    """
    features: dict[str, Tensor] = {}

    def recorder(tap: Tap) -> Callable[[Any], None]:
        def see(output: Any) -> None:
            if tap.name in features:
                return
            picked = tap.pick(output)
            features[tap.name] = picked.clone() if tap.copy else picked
            if stop and len(features) == len(taps):
                raise AllTapsReached

        return see

    handles = [tap.hook(network, recorder(tap)) for tap in taps]
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
        except RuntimeError as error:  # out of memory, or an unsupported size
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"model: the network does not take a blank image of {size} x {size} pixels: {reason}"
            ) from None


def _no_such_layer(network: nn.Module, layer: str, in_channels: int, size: int) -> InputError:
    names = [info.name for info in list_layers(network, in_channels, size) if info.useful]
    return InputError(
        f"domain_adaptation.method.feature_layer names {layer!r}, which this network does not have or which gives no "
        f"map; layers that do: {names} (`dann layers` lists all)."
    )
