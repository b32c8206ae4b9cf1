"""Is the domain gap smaller? A fresh probe on held-out images of both domains, before and after adaptation."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from dann_experiments.config import Config
from dann_experiments.config.atomic_write import writing
from dann_experiments.data.dataset import eval_loader
from dann_experiments.jobs.setup import MOST_STANDING_IN, Data
from dann_experiments.models.taps import Tap, resolve_taps
from dann_experiments.tracking.run import TrackedRun
from dann_experiments.training.monitor import DOMAINS
from dann_experiments.training.probe import FEWEST_IMAGES, Probe, explain, mean_probe, pooled_features, probe

log = logging.getLogger(__name__)
ENCODER = "encoder"  # always probed: the one layer that runs with different taps have in common
FEATURES_FILE = "features.safetensors"
"""Artifact with the pooled features at `layer` (its metadata): `before/source`, `before/target`, `after/...`, (N, 2C)."""


class Alignment:
    """Probes the tapped layers, and the encoder, of one network at two times."""

    def __init__(self, config: Config, data: Data, network: nn.Module, taps: Sequence[Tap]) -> None:
        self._seed = config.seed
        self._adversary = config.domain_adaptation.method.name != "lambda_zero"
        self._tapped = [tap.name for tap in taps]
        known = set(self._tapped)
        encoder = [] if ENCODER in known else resolve_taps(network, [ENCODER], config.model.in_channels)
        self._taps = [*taps, *encoder]
        self._loaders = {}
        for domain in DOMAINS:
            dataset, trained_on = data.held_out(domain), data.get(f"{domain}_train")
            if dataset is not None and trained_on is not None and len(dataset) < FEWEST_IMAGES:
                dataset = trained_on.as_evaluated(MOST_STANDING_IN)
            if dataset is not None:
                batch_size = config.data.eval_batch_size or getattr(config.data, domain).batch_size
                self._loaders[domain] = eval_loader(dataset, batch_size)
        self._features: dict[str, dict[str, dict[str, np.ndarray]]] = {}

    def measure(self, when: str, network: nn.Module, device: torch.device) -> None:
        """Keep the pooled features of `network` as it is now; `when`: before or after."""
        network.to(device)
        with torch.random.fork_rng(devices=[]):  # a loader draws a number: training must not depend on the probe
            self._features[when] = {
                domain: pooled_features(network, self._taps, loader) for domain, loader in self._loaders.items()
            }

    def finish(self, run: TrackedRun, domain_accuracy: float | None, final_step: int) -> dict[str, float]:
        """Probe both times: metrics at step 0 and `final_step`, the features as a file, and in words what it means as the
        run's description. Returns the final metrics."""
        layer = self._tapped[-1] if self._tapped else ENCODER
        found = {when: self._probes(when) for when in self._features}
        metrics = {when: self._metrics(probes) for when, probes in found.items()}
        run.log_metrics(metrics["before"], step=0)
        run.log_metrics(metrics["after"], step=final_step)
        means = {when: mean_probe(self._judged(probes)) for when, probes in found.items()}
        text = explain(domain_accuracy, means["before"], means["after"], self._adversary)
        log.info("%s", text)
        run.set_tags({"dann.alignment": text, "mlflow.note.content": text})
        tensors = {
            f"{when}/{domain}": np.ascontiguousarray(features[layer])
            for when, domains in self._features.items()
            for domain, features in domains.items()
            if len(features.get(layer, ()))
        }
        with writing(run.folder / FEATURES_FILE):
            save_file(tensors, run.folder / FEATURES_FILE, metadata={"layer": layer})
        return metrics["after"]

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
        return values if mean is None else {**values, "da/probe_acc": mean.accuracy, "da/a_distance": mean.a_distance}

    def _judged(self, probes: dict[str, Probe]) -> list[Probe]:
        """Of the tapped layers, else of the encoder."""
        return [probes[layer] for layer in self._tapped or [ENCODER] if layer in probes]
