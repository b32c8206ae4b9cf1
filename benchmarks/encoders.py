"""Which encoders run, with which stages, and does each take weights from a file?

    python benchmarks/encoders.py [--write]

The smallest member of each family of segmentation-models-pytorch and of about forty families of timm, with random weights: a
forward and a backward pass of two small images, the layers that can be tapped and, for timm's, a file with the weights of timm's
whole model, classifier included, loaded by `model.encoder_weights`. Nothing is downloaded. `--write` puts the tables into
docs/encoders.md. Takes two minutes.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from pages import circumstances, put
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from dann_experiments.checkpoints.encoder_file import load_encoder
from dann_experiments.config.errors import InputError
from dann_experiments.models.networks import build_network
from dann_experiments.models.taps import evaluating, list_layers, resolve_taps

SMALL = 64  # pixels; encoders that refuse it get images of the size that they are made for
FEW = [32, 16, 8, 8, 8]  # channels of the decoder
LONGEST_REASON = 160
SMP = (
    "resnet18", "resnext50_32x4d", "se_resnet50", "timm-skresnet18", "timm-resnest14d", "timm-res2net50_26w_4s",
    "timm-regnetx_002", "timm-gernet_s", "densenet121", "dpn68", "vgg11", "vgg11_bn", "inceptionresnetv2", "inceptionv4",
    "xception", "efficientnet-b0", "timm-efficientnet-b0", "timm-tf_efficientnet_lite0", "timm-mobilenetv3_small_minimal_100",
    "mobilenet_v2", "mobileone_s0", "mit_b0",
)  # fmt: skip
TIMM = (
    "resnet18", "resnetv2_18", "resnest14d", "regnety_002", "vgg11_bn", "dla46_c", 
    "cs3darknet_s", "ese_vovnet19b_slim", "hrnet_w18_small", "xception41", "tresnet_m", 
    "efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", 
    "ghostnet_050", "rexnet_100", "hgnetv2_b0", "repvit_m0_9", "starnet_s050", "fasternet_t0", "convnext_atto",
    "convnextv2_atto", "inception_next_atto", "mambaout_femto", "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050",
    "fastvit_t8", "efficientformerv2_s0", "efficientvit_b0", "tiny_vit_5m_224", "pvt_v2_b0", "poolformer_s12", "caformer_s18",
    "coatnet_nano_rw_224", "swin_tiny_patch4_window7_224", "davit_tiny",
    "focalnet_tiny_srf", "mvitv2_tiny", "hiera_tiny_224", "nest_tiny",
    "vit_tiny_patch16_224", "mixer_s32_224",
)  # fmt: skip
VITS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224", "test_vit")


@dataclass(frozen=True)
class Result:
    """What one encoder did."""

    arch: str
    name: str
    size: int = 0
    """Side of the image in pixels."""
    millions: float = 0.0
    """Parameters of the encoder."""
    stages: Sequence[tuple[int, float]] = ()
    """Channels and stride of each map that the decoder gets."""
    layers: Sequence[str] = ()
    """Layers of the encoder that can be tapped."""
    file: str = ""
    """Whether timm's weights could be loaded from a file; empty if that was not tried."""
    reason: str = ""
    """Why it fails; empty if it runs."""


def run(arch: str, name: str) -> Result:
    """Build the network and pass images through it: small ones or, if refused, of the size that the encoder is made for."""
    try:
        torch.manual_seed(0)
        network = build_network(arch, name, None, 3, 2, {"decoder_channels": FEW} if arch == "unet" else {})
    except Exception as error:  # any is a result
        return Result(arch, name, reason=in_short(error))
    own = timm.get_pretrained_cfg(name[3:], allow_unregistered=True) if name.startswith("tu-") else None
    reason = ""
    for size in (SMALL, 224 if own is None else own.input_size[-1]):
        try:
            return at_size(arch, name, network, size)
        except Exception as error:
            reason = f"images of {size} x {size}: {in_short(error)}"
    return Result(arch, name, reason=reason)


def at_size(arch: str, name: str, network: nn.Module, size: int) -> Result:
    """Train on two images of `size` pixels a side, and look at the layers. Raises what the network raises."""
    images, encoder = torch.rand(2, 3, size, size), network.encoder
    assert isinstance(encoder, nn.Module)
    logits = network.train()(images)
    assert logits.shape == (2, 2, size, size), f"logits of shape {tuple(logits.shape)}"
    functional.cross_entropy(logits, torch.ones(2, size, size, dtype=torch.long)).backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert gradients, "no gradient reaches the encoder"
    assert all(gradient.isfinite().all() for gradient in gradients), "gradients are not finite"
    network.zero_grad(set_to_none=True)
    with evaluating(network):
        maps: Any = encoder(images)
    maps = maps[0] if isinstance(maps, tuple) and isinstance(maps[0], (list, tuple)) else maps
    stages = [(one.shape[1], size / one.shape[2]) for one in maps if one.shape[1] > 0 and one is not images]
    if stages[0] == (3, 1.0):  # the image itself
        stages = stages[1:]
    layers = [
        layer.name for layer in list_layers(network, 3, size) if layer.useful and layer.name.startswith("encoder")
    ]
    resolve_taps(network, layers, 3, size)
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    file = from_file(network, name.removeprefix("tu-")) if name.startswith("tu-") else ""
    return Result(arch, name, size, millions, stages, layers, file)


def from_file(network: nn.Module, name: str) -> str:
    """Load a file with the weights of timm's whole model; return yes, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        state = timm.create_model(name, pretrained=False).state_dict()
        save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
        try:
            load_encoder(network, file, 3)
        except InputError as error:
            return f"no: {in_short(error).replace(str(file), 'FILE')}"
    return "yes"


def in_short(error: Exception) -> str:
    """Return the error in one short line of a table."""
    text = re.sub(r"^model: (.* refuses these settings: )?", "", " ".join(str(error).split())) or type(error).__name__
    return (text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}...").replace("|", "/")


def tables(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of both tables: what runs, and what does not."""
    yield "| `arch` | `encoder_name` | parameters, M | channels by stage | strides | layers to tap | timm's file | images |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in results:
        if not one.reason:
            channels = ", ".join(str(channels) for channels, _ in one.stages)
            strides = ", ".join(f"{stride:g}" for _, stride in one.stages)
            layers = ", ".join(f"`{layer}`" for layer in one.layers)
            size = "" if one.size == SMALL else f"of {one.size} x {one.size}"
            yield f"| {one.arch} | `{one.name}` | {one.millions:.1f} | {channels} | {strides} | {layers} | {one.file} | {size} |"
    yield from ("", "These do not run:", "", "| `arch` | `encoder_name` | reason |", "|---|---|---|")
    for one in results:
        if one.reason:
            yield f"| {one.arch} | `{one.name}` | {one.reason} |"


def main() -> None:
    """Print the tables, and put them into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these encoders only, with Unet")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/encoders.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = [("unet", name) for name in (*SMP, *(f"tu-{name}" for name in TIMM))] + [
        ("dpt", f"tu-{name}") for name in VITS
    ]
    results = []
    for arch, name in [("unet", name) for name in options.only] if options.only else cases:
        results.append(run(arch, name))
        print(results[-1], flush=True)
    versions = circumstances("torch", "timm", "segmentation-models-pytorch")
    lines = [*tables(results), "", f"{sum(not one.reason for one in results)} of {len(results)} run. {versions}"]
    print("\n".join(lines))
    if options.write:
        put("encoders.md", "encoders", "\n".join(lines))


if __name__ == "__main__":
    main()
