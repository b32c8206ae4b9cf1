"""Settings of the network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import between
from dann_experiments.config.paths import local_path
from dann_experiments.names import Key

Arch = Literal[
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet",
    "segformer", "dpt",
]  # fmt: skip
DROPOUT = between(0, 1)
SIZE = dataclasses.replace(between(-65535, 65535), text="")
"""Keeps absurd values from filling the memory, and is not shown in the help. The network checks its arguments itself."""
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # prefixes by which timm finds weights elsewhere


@dataclass(frozen=True)
class ModelConfig:
    """The network, with the argument names of `segmentation_models_pytorch.create_model`; null = the network's own default."""

    arch: Arch = "unet"
    """Architecture."""
    encoder_name: str = "resnet34"
    """Encoder: a name of segmentation-models-pytorch, or `tu-NAME` for one of timm."""
    encoder_weights: str | None = "imagenet"
    """Pretrained weights of the encoder: a name (imagenet), downloaded on first use, or a file (.safetensors, .pt, .pth, .bin,
    .ckpt) with weights of this encoder; null = random weights."""
    in_channels: Annotated[int, between(1, 65535)] = 3
    """Number of bands of the images."""
    classes: Annotated[int, between(2, 256)] = 2
    """Number of classes, background included."""
    encoder_depth: Annotated[int | None, SIZE] = None
    """Number of encoder stages."""
    encoder_output_stride: Annotated[int | None, SIZE] = None
    """Output stride of a dilated encoder (deeplabv3, deeplabv3plus, pan)."""
    encoder_output_indices: Annotated[list[int] | None, SIZE] = None
    """Indices of the encoder blocks whose features the decoder takes (dpt)."""
    decoder_channels: Annotated[int | list[int] | None, SIZE] = None
    """Channels of the decoder: one number, or one per decoder block."""
    decoder_use_norm: bool | str | dict[str, Any] | None = None
    """Normalization in the decoder: batchnorm, layernorm, instancenorm, inplace, identity."""
    decoder_attention_type: str | None = None
    """Attention in the decoder blocks (unet, unetplusplus): scse."""
    decoder_interpolation: str | None = None
    """Interpolation in the decoder: nearest, bilinear, bicubic, area."""
    decoder_pab_channels: Annotated[int | None, SIZE] = None
    """Channels of the position attention block (manet)."""
    decoder_pyramid_channels: Annotated[int | None, SIZE] = None
    """Channels of the feature pyramid (fpn)."""
    decoder_segmentation_channels: Annotated[int | None, SIZE] = None
    """Channels of the segmentation branches (fpn, segformer)."""
    decoder_merge_policy: str | None = None
    """How the pyramid levels are merged (fpn): add, cat."""
    decoder_dropout: Annotated[float | None, DROPOUT] = None
    """Dropout in the decoder (fpn)."""
    decoder_atrous_rates: Annotated[list[int] | None, SIZE] = None
    """Dilation rates of the ASPP module (deeplabv3, deeplabv3plus)."""
    decoder_aspp_separable: bool | None = None
    """Use separable convolutions in the ASPP module (deeplabv3, deeplabv3plus)."""
    decoder_aspp_dropout: Annotated[float | None, DROPOUT] = None
    """Dropout of the ASPP module (deeplabv3, deeplabv3plus)."""
    decoder_readout: str | None = None
    """Handling of the prefix tokens (dpt): ignore, add, cat."""
    decoder_intermediate_channels: Annotated[list[int] | None, SIZE] = None
    """Channels of the reassembled features (dpt)."""
    decoder_fusion_channels: Annotated[int | None, SIZE] = None
    """Channels of the fusion blocks (dpt)."""
    psp_out_channels: Annotated[int | None, SIZE] = None
    """Channels of the pyramid pooling module (pspnet)."""
    psp_dropout: Annotated[float | None, DROPOUT] = None
    """Dropout of the pyramid pooling module (pspnet)."""
    upsampling: Annotated[int | None, SIZE] = None
    """Factor by which the segmentation head enlarges its output."""

    def __post_init__(self) -> None:
        if self.encoder_weights is not None and self.encoder_weights.startswith(HUBS):
            raise InputError(
                f"{Key.ENCODER_WEIGHTS} is {self.encoder_weights!r}, an address of a model hub; download the file of the weights "
                "and give its path, or give imagenet."
            )
        _ = self.encoder_file  # refuses addresses

    @property
    def encoder_file(self) -> Path | None:
        """The file in `encoder_weights`; None for a name and for null. Raises InputError for an address."""
        text = self.encoder_weights
        if text is None or not ("/" in text or "\\" in text or PurePath(text).suffix.lower() in WEIGHT_FILES):
            return None
        return local_path(text, Key.ENCODER_WEIGHTS)

    def network_arguments(self) -> dict[str, Any]:
        """Return the constructor arguments that are set, without the five that all networks share."""
        common = {"arch", "encoder_name", "encoder_weights", "in_channels", "classes"}
        return {
            name: value for name, value in dataclasses.asdict(self).items() if name not in common and value is not None
        }
