"""Writes a model's card: README.md beside the weights, in the form that model hubs read (Markdown with a YAML header)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from dann_experiments.tracking.notes import escaped


@dataclass(frozen=True)
class ModelCard:
    """Everything that a card says."""

    title: str
    """What the model is, in a few words: method, source and target."""
    arch: str
    encoder: str
    class_names: Sequence[str]
    in_channels: int
    readings: Mapping[str, Mapping[str, Any]]
    """Domain -> how its images are read, as in `dann.json`."""
    dtype: str
    """Type of the raw pixel values."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Set, in words -> mean IoU of the final weights."""
    run_id: str = ""
    step: int = 0
    used_target_labels: bool = False
    """True if target labels chose the weights."""
    target_labels: int = 0
    """Number of labeled target images that it was trained on."""
    weak_labels: bool = False
    """True if it was trained on weak target labels."""

    def markdown(self) -> str:
        """Return the card's text."""
        header = {
            "library_name": "segmentation-models-pytorch", "pipeline_tag": "image-segmentation",
            "tags": ["segmentation-models-pytorch", "semantic-segmentation", "domain-adaptation"],
        }  # fmt: skip
        return "\n".join([
            "---", yaml.safe_dump(header, sort_keys=False).strip(), "---",
            f"# {escaped(self.title)}",
            f"{self.arch} with the encoder {self.encoder}, trained for {self.step} steps in run `{self.run_id}`. "
            + self._labels(),
            "",
            "## Scores",
            *self._scores(),
            "## Input",
            f"{self.in_channels} band{'s' * (self.in_channels != 1)}, raw values of type {self.dtype}, any height and width.",
            *(line for domain, reading in self.readings.items() for line in self._reading(domain, reading)),
            "",
            "## Classes",
            *(f"{number}. {escaped(name)}" for number, name in enumerate(self.class_names)),
            "",
            "Ids count from 0; 255 marks pixels without data.",
            "",
            "## Use",
            "`dann predict --model FOLDER --input IMAGE.tif --output MAP.tif` reads images by these rules. In Python:",
            "",
            "```python",
            "import mlflow",
            'model = mlflow.pyfunc.load_model("runs:/' + self.run_id + '/model")  # needs dann-experiments installed',
            "classes = model.predict(images)  # (N, bands, height, width), values as the file stores them",
            "```",
            "",
            "`segmentation_models_pytorch.from_pretrained(FOLDER)` loads the bare network, which takes normalized images and "
            "returns logits; `dann.json` has the numbers of the normalization. Nothing in this folder is pickled.",
            "",
        ])  # fmt: skip

    def _labels(self) -> str:
        """Return sentences on the target labels behind these weights."""
        said = []
        if self.target_labels:
            said.append(f"It was trained on the labels of {self.target_labels} target images.")
        if self.weak_labels:
            said.append("It was trained on weak target labels: masks that are not truth, whose errors it learned.")
        if self.used_target_labels:
            said.append("Target labels chose these weights, so the target's scores are those of a supervised choice.")
        elif said:
            said.append("No target labels were used to choose its weights.")
        else:
            said.append("No target labels were used to train it or to choose its weights.")
        return " ".join(said)

    def _scores(self) -> list[str]:
        if not self.scores:
            return ["No set had labels to score the model with.", ""]
        rows = [f"| {name} | {value:.4f} |" for name, value in self.scores.items()]
        return ["| set | mean IoU |", "|---|---|", *rows, ""]

    def _reading(self, domain: str, reading: Mapping[str, Any]) -> list[str]:
        ground = "" if reading.get("pixel_size") is None else f", on pixels of {reading['pixel_size']:g}"
        unit = f" {reading['unit']}" if ground and reading.get("unit") else ""
        low, high = (", ".join(f"{value:g}" for value in reading[key]) for key in ("low", "high"))
        return [f"- {domain}: values from {low} to {high} become 0 to 1, then mean and std are removed{ground}{unit}"]
