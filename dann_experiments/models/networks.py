"""Builds segmentation-models-pytorch networks and turns their refusals into readable errors."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

from dann_experiments.config.errors import InputError

DRAWS = {
    Tensor.normal_, Tensor.uniform_, init.uniform_, init.normal_, init.trunc_normal_, init.xavier_uniform_,
    init.xavier_normal_, init.kaiming_uniform_, init.kaiming_normal_, init.orthogonal_,
}  # fmt: skip


class _Undrawn(TorchFunctionMode):
    """Leaves weights as the memory is: a VGG draws a hundred million numbers that its segmentation network never uses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_network(
    arch: str,
    encoder_name: str,
    encoder_weights: str | None,
    in_channels: int,
    classes: int,
    arguments: Mapping[str, Any],
    drawn: bool = True,
) -> nn.Module:
    """`smp.create_model` with `arguments` for the network's own constructor; the output is logits (N, classes, H, W).
    `drawn` False: weights are no random numbers but anything, for a network whose weights will all be replaced.

    Raises InputError for an encoder or an argument that this network does not take.
    """
    import segmentation_models_pytorch as smp

    constructor = smp.MODEL_ARCHITECTURES_MAPPING[arch.lower()]
    accepted = set(inspect.signature(constructor.__init__).parameters) - {"self", "kwargs"}
    for name, value in arguments.items():
        if name not in accepted:
            raise InputError(f"model.{name} is {value!r}, but {arch} takes no {name}; it takes {sorted(accepted)}.")
    try:
        with contextlib.nullcontext() if drawn else _Undrawn():
            return smp.create_model(
                arch,
                encoder_name,
                encoder_weights=encoder_weights,
                in_channels=in_channels,
                classes=classes,
                **arguments,
            )
    except KeyError as error:
        raise InputError(f"model: {error.args[0] if error.args else error}") from None
    except (ValueError, TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"model: {arch} with encoder {encoder_name!r} refuses these settings: {error}") from None
    except OSError as error:
        raise InputError(
            f"model.encoder_weights is {encoder_weights!r}, but these weights cannot be loaded ({_first_line(error)}); "
            "give null to start from random weights."
        ) from None
    except Exception as error:  # the hub clients raise classes of their own when there is no network
        if encoder_weights is None:
            raise
        raise InputError(
            f"model.encoder_weights is {encoder_weights!r}, but these weights cannot be loaded ({_first_line(error)}); "
            "give null to start from random weights."
        ) from None


def output_stride(network: nn.Module) -> int:
    """The number that image sides must be divisible by (1 where the network takes any size)."""
    if not getattr(network, "requires_divisible_input_shape", True):
        return 1
    return int(getattr(getattr(network, "encoder", None), "output_stride", 1))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def logits_of_any_size(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, K, H, W) of images (N, B, H, W) whose sides need not be divisible by the network's stride.

    Such images are enlarged at the right and lower edge by repeating the edge, and the logits cut back.
    """
    height, width = images.shape[-2:]
    padding = _padding(network, height, width)
    if any(padding):
        images = functional.pad(images, padding, mode="replicate")
    return network(images)[..., :height, :width]


def predicted_classes(logits: Tensor) -> Tensor:
    """(N, H, W) class ids of the greatest logits (N, K, H, W); the first of equal ones."""
    if logits.device.type != "cpu":
        return logits.argmax(1)
    # On a CPU argmax over a dimension that is not the last takes up to thirty times as long; slow are comparing into bool and
    # filling by a mask as well, so all here is of one type.
    logits = logits.detach()
    if logits.dtype.itemsize < 4:  # half precision, which does not count beyond 256 classes
        logits = logits.float()
    best = logits[:, 0].clone()
    classes, higher = torch.zeros_like(best), torch.empty_like(best)
    for index in range(1, logits.shape[1]):
        torch.gt(logits[:, index], best, out=higher)  # 1 or 0
        torch.maximum(classes, higher.mul_(index), out=classes)
        torch.maximum(best, logits[:, index], out=best)
    return classes.long()


def keeps_channels_last(setting: bool | None, network: nn.Module, device: torch.device) -> bool:
    """Whether training keeps maps with their channels last in memory: as `trainer.channels_last` says; None = where a step is
    known to take less time, on a CPU with depthwise convolutions (0.89 to 0.98 of six networks tried; without them 0.93 to 1.25,
    docs/log.md). By the layers, not by a clock: a run gives the same digits each time."""
    if setting is not None:
        return setting
    depthwise = (layer.groups == layer.in_channels > 1 for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return device.type == "cpu" and any(depthwise)


def valid_as_seen(network: nn.Module, valid: Tensor) -> Tensor:
    """`valid` (N, H, W) at the size that `logits_of_any_size` gives the network: what it adds at the edges counts nowhere."""
    height, width = valid.shape[-2:]
    return functional.pad(valid, _padding(network, height, width))


def _padding(network: nn.Module, height: int, width: int) -> tuple[int, int, int, int]:
    stride = output_stride(network)
    return 0, -width % stride, 0, -height % stride
