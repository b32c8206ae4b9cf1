"""A trained model with everything needed to apply it to images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dann_experiments.data.reading import Normalization, Reading


@dataclass(frozen=True)
class Model:
    """A network with everything needed to apply it to images."""

    network: nn.Module
    class_names: Sequence[str]
    in_channels: int
    reading: Reading
    normalisation: Normalization
    digest: str
    """Digest of weights and class names (`model_digest`)."""
    run_id: str | None
    """MLflow run that trained it; None = unknown."""


def model_digest(network: nn.Module, class_names: Sequence[str]) -> str:
    """Return 32 hex digits that are equal for equal weights and class names; `network` must be on the CPU."""
    digest = hashlib.blake2b(json.dumps([type(network).__name__, list(class_names)]).encode(), digest_size=16)
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
