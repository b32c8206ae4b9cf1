"""Parts of a network by name: learning rates of their own, and parts that are not trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn

from dann_experiments.config.errors import InputError

NETWORK = "network"


def check_parts(network: nn.Module, names: Collection[str], key: str) -> None:
    """Raise InputError for a name that is no module of the network with parameters. `key`: the setting, for the message."""
    known = dict(network.named_modules())
    for name in names:
        if not name or name not in known or not any(True for _ in known[name].parameters()):
            parts = [child for child, module in network.named_children() if any(True for _ in module.parameters())]
            raise InputError(
                f"{key} names {name!r}, which is no part of this network with weights; its parts are {', '.join(parts)}, and the "
                "modules within them, such as encoder.NAME (`layers` lists them)."
            )


def param_groups(network: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the network's parameters in groups for an optimizer: one named `network`, and one `network.PART` for each part with
    a learning rate of its own. A parameter belongs to the innermost of its parts; groups without parameters are left out."""
    groups: dict[str, list[nn.Parameter]] = {"": []} | {part: [] for part in rates}
    for name, parameter in network.named_parameters():
        inside = [part for part in rates if name.startswith(f"{part}.")]
        groups[max(inside, key=len, default="")].append(parameter)
    return [
        {"params": found, "name": f"{NETWORK}.{part}", "lr": rates[part]}
        if part
        else {"params": found, "name": NETWORK}
        for part, found in groups.items()
        if found
    ]


def is_of_network(group: Mapping[str, Any]) -> bool:
    """Return whether a group of an optimizer holds parameters of the network, not of a method."""
    name = str(group.get("name"))
    return name == NETWORK or name.startswith(f"{NETWORK}.")


class FrozenParts(pl.Callback):
    """Keeps parts of an AdaptationModule's network as they are for the first `epochs` epochs (None = all).

    Their weights get no gradient, and they are in evaluation mode in training steps, so that BatchNorm uses and keeps its running
    statistics and dropout is off. What has trained already keeps its optimizer state. A resumed run does the same, since all of
    it depends on the epoch alone.
    """

    def __init__(self, names: Sequence[str], epochs: int | None = None) -> None:
        super().__init__()
        self.names, self.epochs = list(names), epochs
        self._modules: list[nn.Module] = []
        self._trainable: list[nn.Parameter] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network: Any = pl_module.network
        self._modules = [network.get_submodule(name) for name in self.names]
        parameters = [parameter for module in self._modules for parameter in module.parameters()]
        self._trainable = [parameter for parameter in parameters if parameter.requires_grad]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # at each step: Lightning puts all modules back into training mode after a validation
        frozen = self.epochs is None or trainer.current_epoch < self.epochs
        for module in self._modules:
            if frozen and any(part.training for part in module.modules()):
                module.eval()
            elif not frozen and not module.training:
                module.train()
        if self._trainable and self._trainable[0].requires_grad == frozen:
            for parameter in self._trainable:
                parameter.requires_grad_(not frozen)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)
