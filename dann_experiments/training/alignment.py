"""Measures whether adaptation made the domain gap smaller, with fresh probes on held-out images of both domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments.data.image_sets import MOST_STANDING_IN, ImageSets
from dann_experiments.data.loaders import Loaders, eval_loader
from dann_experiments.models.taps import Tap, resolve_taps
from dann_experiments.names import DOMAINS, Metric, SetName
from dann_experiments.scores.domain_probe import FEWEST_IMAGES, Probe, mean_probe, probe
from dann_experiments.training.alignment_text import explain
from dann_experiments.training.pooled_features import pooled_features

ENCODER = "encoder"  # always probed, so that runs with different taps can be compared


@dataclass(frozen=True)
class Gap:
    """Results of the probes, before and after adaptation."""

    before: dict[str, float]
    """Metrics of the warm start."""
    after: dict[str, float]
    """Metrics of the adapted network."""
    text: str
    """Explanation of the results, in words."""
    layer: str
    """The layer of `features`."""
    features: dict[str, np.ndarray]
    """Pooled features (N, 2C) by `before/source`, `before/target`, `after/...`."""


def probe_loaders(loaders: Loaders) -> dict[str, DataLoader]:
    """Return one loader of the source and one of the target: of held-out images, or of training images if there are too few
    held-out ones to probe."""
    sets: ImageSets = loaders.sets
    found = {}
    for role in DOMAINS:
        held_out = {one: sets.held_out(one) for one in sets.domains if one.role == role}
        dataset = sets.joined({one: mine for one, mine in held_out.items() if mine is not None})
        trained_on = sets.get(SetName(role, "train"))
        if dataset is not None and trained_on is not None and len(dataset) < FEWEST_IMAGES:
            dataset = trained_on.as_evaluated(MOST_STANDING_IN)
        if dataset is not None:
            found[role] = eval_loader(dataset, loaders.eval_batch_size_of(role))
    return found


class Alignment:
    """Probes the tapped layers and the encoder of a network, before and after adaptation.

    `loaders`: held-out images by domain (see `probe_loaders`); None = probe nothing, only explain the run's own classifier.
    `adversary`: the network is trained against a domain classifier, of `domains` classes. The probes always ask for source or
    target, whose distance is in question.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Sequence[Tap],
        in_channels: int,
        loaders: Mapping[str, DataLoader] | None,
        seed: int,
        adversary: bool,
        domains: int = len(DOMAINS),
    ) -> None:
        self._domains = domains
        self._seed, self._adversary, self._loaders = seed, adversary, loaders
        self._tapped = [tap.name for tap in taps]
        encoder = [] if ENCODER in self._tapped else resolve_taps(network, [ENCODER], in_channels)
        self._taps = [*taps, *encoder]
        self._features: dict[str, dict[str, dict[str, np.ndarray]]] = {}

    def measure(self, when: str, network: nn.Module, device: torch.device) -> None:
        """Compute and keep the pooled features of `network` as it is now; `when`: `before` or `after`."""
        network.to(device)
        if self._loaders is None:
            return
        with torch.random.fork_rng(devices=[]):  # a loader draws a random number; training must not depend on the probe
            self._features[when] = {
                domain: pooled_features(network, self._taps, loader) for domain, loader in self._loaders.items()
            }

    def finish(self, domain_accuracy: float | None, harmed: bool, idle: bool = False) -> Gap:
        """Probe the features of both times. `domain_accuracy`: that of the run's classifier on held-out images, if any; `harmed`:
        see `explain`; `idle`: lambda was 0 in every step, so that there was no adversary."""
        layer = self._tapped[-1] if self._tapped else ENCODER
        found = {when: self._probes(when) for when in self._features}
        before, after = (found.get(when, {}) for when in ("before", "after"))
        features = {
            f"{when}/{domain}": np.ascontiguousarray(features[layer])
            for when, domains in self._features.items()
            for domain, features in domains.items()
            if len(features.get(layer, ()))
        }
        means = [mean_probe(self._judged(probes)) for probes in (before, after)]
        text = explain(
            domain_accuracy,
            means[0],
            means[1],
            self._adversary and not idle,
            self._loaders is not None,
            self._domains,
            harmed,
        )
        return Gap(self._metrics(before), self._metrics(after), text, layer, features)

    def _probes(self, when: str) -> dict[str, Probe]:
        features = self._features[when]
        if set(features) != set(DOMAINS):
            return {}
        found = {}
        for tap in self._taps:
            result = probe(features["source"][tap.name], features["target"][tap.name], self._seed)
            if result is not None:
                found[tap.name] = result
        return found

    def _metrics(self, probes: dict[str, Probe]) -> dict[str, float]:
        values = {}
        for layer, result in probes.items():
            if [layer] != self._tapped:
                values[f"da_layer/{layer}/probe_acc"] = result.accuracy
        mean = mean_probe(self._judged(probes))
        return (
            values
            if mean is None
            else {**values, Metric.PROBE_ACCURACY: mean.accuracy, Metric.A_DISTANCE: mean.a_distance}
        )

    def _judged(self, probes: dict[str, Probe]) -> list[Probe]:
        """Return the probes of the tapped layers; without any, that of the encoder."""
        return [probes[layer] for layer in self._tapped or [ENCODER] if layer in probes]
