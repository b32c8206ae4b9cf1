"""Writes a run's final network as a model: weights, notes, MLflow's description of it, and a card for readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from dann_experiments.checkpoints.saved_model import save_model
from dann_experiments.config import Config
from dann_experiments.config.atomic_write import writing
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.jobs.build import model_arguments, model_facts
from dann_experiments.jobs.identity import domain_name
from dann_experiments.names import Metric, SetName, Tag
from dann_experiments.prediction.pyfunc_model import DEFAULTS
from dann_experiments.reports.model_card import ModelCard
from dann_experiments.tracking.logged_model import MODEL, Interface, ModelScore, write_facts, write_mlmodel
from dann_experiments.tracking.run import TrackedRun

EXAMPLE_SIDE = 32  # pixels of the input example, which is stored as text
CARD = "README.md"
TAGS = (Tag.JOB, Tag.METHOD, Tag.SOURCE, Tag.TARGET, Tag.DIGEST, Tag.SELECTED_WITH_TARGET_LABELS, Tag.TARGET_LABELS,
        Tag.WEAK_LABELS, Tag.ARM, Tag.COMPARISON,
        Tag.STUDY, "seed")  # fmt: skip
"""Tags of the run that its model gets as well, to be searched by."""


def write_model(
    run: TrackedRun, config: Config, network: nn.Module, sets: ImageSets, title: str, tags: Mapping[str, Any],
    scored: Sequence[SetName], step: int,
) -> None:  # fmt: skip
    """Write the model of a run into its folder, from where it is sent when the run closes.

    `title`: the run's name; `tags`: the run's; `scored`: the sets whose mean IoU was logged for the final weights, those of
    optimizer step `step`. Raises NotWritten if the disk is full."""
    folder = run.folder / MODEL
    facts = model_facts(config, sets)
    save_model(folder, network, config.model.arch, model_arguments(config), facts)
    interface = _interface(config, sets)
    points = {name: run.sender.last(Metric.iou(name)) for name in scored}
    scores = [
        ModelScore(point, f"{domain_name(config, name.domain, name.member)} {name.split}", sets.digests[str(name)])
        for name, point in points.items() if point is not None
    ]  # fmt: skip
    card = ModelCard(
        title, config.model.arch, config.model.encoder_name, config.class_names, config.model.in_channels, facts["reading"],
        interface.dtype, {name.words: point.value for name, point in points.items() if point is not None}, run.run_id, step,
        str(tags.get(Tag.SELECTED_WITH_TARGET_LABELS)) == "true", int(tags.get(Tag.TARGET_LABELS, 0)), Tag.WEAK_LABELS in tags,
    )  # fmt: skip
    with writing(folder):
        write_mlmodel(folder, run.run_id, interface)
        (folder / CARD).write_text(card.markdown(), encoding="utf-8")
        own = {key: str(tags[key]) for key in TAGS if key in tags}
        network_settings = {"arch": config.model.arch, "encoder_name": config.model.encoder_name}
        write_facts(run.folder, run.store.experiment_id, step, network_settings, own, scores)


def _interface(config: Config, sets: ImageSets) -> Interface:
    """Return what the model takes: the type holds the raw values of all domains; the example is a piece of a target image."""
    read = [dataset for one in config.data.domains if (dataset := sets.any_of(one)) is not None]
    pieces = [dataset.as_evaluated(1).read(0)[0][:, :EXAMPLE_SIDE, :EXAMPLE_SIDE] for dataset in read]
    dtype = np.result_type(*(values.dtype for values in pieces))
    example = np.ascontiguousarray(pieces[-1][None].astype(dtype))
    return Interface(config.model.in_channels, str(dtype), DEFAULTS, example)
