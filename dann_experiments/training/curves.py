"""Collects the series of the curves figure while they are logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from dann_experiments.names import CURVES


class Curves(pl.Callback):
    """Collects metric -> [(step, value)] for the metrics in CURVES; a callback, so that checkpoints include them."""

    def __init__(self) -> None:
        self.series: dict[str, list[tuple[int, Any]]] = {}

    def add(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add the metrics of a step that the figure shows; values may be tensors."""
        for name in CURVES:
            if name in metrics:
                self.series.setdefault(name, []).append((step, metrics[name]))

    def numbers(self) -> dict[str, list[tuple[int, float]]]:
        """Return all series as plain numbers."""
        for name, points in self.series.items():
            self.series[name] = [(step, float(value)) for step, value in points]
        return self.series

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {
                "steps": torch.tensor([step for step, _ in points]),
                "values": torch.tensor([value for _, value in points], dtype=torch.float64),
            }
            for name, points in self.numbers().items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.series = {
            name: list(zip(kept["steps"].tolist(), kept["values"].tolist(), strict=True))
            for name, kept in state_dict.items()
        }
