"""A trained model with everything needed to apply it to images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dann_experiments.checkpoints.saved_model import ModelNotes, chosen_domain
from dann_experiments.checkpoints.weights import listed, load_into, read_weights
from dann_experiments.config.errors import InputError
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


def noted_model(
    local: Path, notes: ModelNotes, where: str, domain: str, source_prefix: str | None = None, run_id: str | None = None
) -> Model:
    """Return the saved model in `local` (its folder or weights file), set to read images like those of `domain`.

    `notes`: what `read_model_notes` found; `where`: the model's address, for messages; `source_prefix` chooses one of several
    networks in the weights; `run_id`: the run that trained it. Raises InputError if the notes have no class names or do not
    know the domain, or if the weights do not fit the network.
    """
    if notes.class_names is None:
        raise InputError(f"model {where} does not say what its classes are called; give a model as it was saved.")
    reading, normalization = chosen_domain(domain, notes.readings, f"model {where}")
    network = notes.build()
    fill(network, read_weights(local), where, source_prefix)
    digest = model_digest(network, notes.class_names)
    return Model(network, notes.class_names, notes.in_channels, reading, normalization, digest, run_id)


def fill(network: nn.Module, weights: Mapping[str, Tensor], where: str, source_prefix: str | None = None) -> None:
    """Load all of a finished model's weights into its network. Raises InputError if they do not fit."""
    # load_into would suggest strict_loading, which makes no sense for a finished model
    problems = load_into(network, weights, False, where, source_prefix, "source_prefix")
    if problems:
        raise InputError(
            f"model is {where!r}, whose weights do not fit its network ({listed(problems)}); use its own settings."
        )


def model_digest(network: nn.Module, class_names: Sequence[str]) -> str:
    """Return 32 hex digits that are equal for equal weights and class names; `network` must be on the CPU."""
    digest = hashlib.blake2b(json.dumps([type(network).__name__, list(class_names)]).encode(), digest_size=16)
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
