"""Builds segmentation-models-pytorch networks and explains their errors."""

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
from dann_experiments.models.hub import Hub
from dann_experiments.names import Key

DRAWS = {
    Tensor.normal_, Tensor.uniform_, init.uniform_, init.normal_, init.trunc_normal_, init.xavier_uniform_,
    init.xavier_normal_, init.kaiming_uniform_, init.kaiming_normal_, init.orthogonal_,
}  # fmt: skip


class _Undrawn(TorchFunctionMode):
    """Skips random initialization: a VGG draws a hundred million numbers that its segmentation network never uses."""

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
    """Return `smp.create_model` with `arguments` for the network's constructor; its output is logits (N, classes, H, W).

    `drawn` False: leave weights uninitialized; load a complete checkpoint before use. Raises InputError for an encoder or an
    argument that this network does not accept, and for pretrained weights that cannot be loaded.
    """
    import segmentation_models_pytorch as smp

    constructor = smp.MODEL_ARCHITECTURES_MAPPING[arch.lower()]
    accepted = set(inspect.signature(constructor.__init__).parameters) - {"self", "kwargs"}
    for name, value in arguments.items():
        if name not in accepted:
            raise InputError(f"model.{name} is {value!r}, but {arch} takes no {name}; it takes {sorted(accepted)}.")
    hub = None if encoder_weights is None else Hub()
    # of timm's encoders the name says which weights; any text but True is answered by a warning
    weights: Any = True if encoder_weights == "imagenet" and encoder_name.startswith("tu-") else encoder_weights
    try:
        with hub or contextlib.nullcontext(), contextlib.nullcontext() if drawn else _Undrawn():
            return smp.create_model(
                arch,
                encoder_name,
                encoder_weights=weights,
                in_channels=in_channels,
                classes=classes,
                **arguments,
            )
    except KeyError as error:
        raise InputError(f"model: {error.args[0] if error.args else error}") from None
    except IndexError as error:  # timm looks up the stages by number
        raise InputError(
            f"model: encoder {encoder_name!r} seems to have fewer stages than {arch} asks for ({error}); set a smaller "
            "model.encoder_depth."
        ) from None
    except (ValueError, TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"model: {arch} with encoder {encoder_name!r} refuses these settings: {error}") from None
    except Exception as error:  # OSError, or a type of the hub's client
        if hub is None and not isinstance(error, OSError):
            raise
        reason = hub.unreachable if hub is not None and hub.unreachable is not None else _first_line(error)
        raise InputError(
            f"{Key.ENCODER_WEIGHTS} is {encoder_weights!r}, but these weights cannot be loaded ({reason}); give a file of "
            "weights, or null to start from random weights."
        ) from None


def output_stride(network: nn.Module) -> int:
    """Return the number that image sides must be divisible by; 1 if the network accepts any size."""
    if not getattr(network, "requires_divisible_input_shape", True):
        return 1
    return int(getattr(getattr(network, "encoder", None), "output_stride", 1))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def logits_of_any_size(network: nn.Module, images: Tensor) -> Tensor:
    """Return logits (N, K, H, W) for images (N, B, H, W) whose sides need not be divisible by the network's stride.

    Images are padded at the right and bottom by repeating the edge, and the logits are cropped back.
    """
    height, width = images.shape[-2:]
    padding = _padding(network, height, width)
    if any(padding):
        images = functional.pad(images, padding, mode="replicate")
    return network(images)[..., :height, :width]


def predicted_classes(logits: Tensor) -> Tensor:
    """Return (N, H, W) class ids of the largest logits (N, K, H, W); the lowest id in a tie."""
    if logits.device.type != "cpu":
        return logits.argmax(1)
    # On a CPU, argmax over a dimension other than the last takes up to thirty times as long. Comparing into bool and filling by a
    # mask are slow, too, so all tensors here have one type.
    logits = logits.detach()
    if logits.dtype.itemsize < 4:  # half precision cannot represent all class ids above 256
        logits = logits.float()
    best = logits[:, 0].clone()
    classes, higher = torch.zeros_like(best), torch.empty_like(best)
    for index in range(1, logits.shape[1]):
        torch.gt(logits[:, index], best, out=higher)  # 1 or 0
        torch.maximum(classes, higher.mul_(index), out=classes)
        torch.maximum(best, logits[:, index], out=best)
    return classes.long()


def keeps_channels_last(setting: bool | None, network: nn.Module, device: torch.device, precision: str) -> bool:
    """Return `setting` (`trainer.channels_last`) or, if None, True on a CPU for networks with depthwise convolutions and, with
    `precision` (`trainer.precision`) bf16-mixed, for all.

    With the channels-last memory format, a step of networks with depthwise convolutions took 0.89 to 0.98 of the time, one of
    others 0.93 to 1.25; in bfloat16, one of plain torch 0.85 to 0.97 (docs/performance.md, docs/log.md). The default does not
    depend on timing, so that runs stay reproducible.
    """
    if setting is not None:
        return setting
    if device.type == "cpu" and precision == "bf16-mixed":
        return True
    depthwise = (layer.groups == layer.in_channels > 1 for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return device.type == "cpu" and any(depthwise)


def valid_as_seen(network: nn.Module, valid: Tensor) -> Tensor:
    """Return `valid` (N, H, W) padded with 0 to the size that `logits_of_any_size` gives the network."""
    height, width = valid.shape[-2:]
    return functional.pad(valid, _padding(network, height, width))


def _padding(network: nn.Module, height: int, width: int) -> tuple[int, int, int, int]:
    stride = output_stride(network)
    return 0, -width % stride, 0, -height % stride
