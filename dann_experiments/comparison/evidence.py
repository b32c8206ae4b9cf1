"""What a report shows beside numbers: predictions of several arms on the same tiles, and the features of both domains."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from dann_experiments.comparison.result import FeatureCloud, Panel
from dann_experiments.config import Config, InputError
from dann_experiments.data.reading import Normalization
from dann_experiments.jobs.build import find_data
from dann_experiments.jobs.load_model import load_model
from dann_experiments.jobs.run_training import FEATURES_FILE, Album
from dann_experiments.names import SOURCE_TRAIN, TARGET_TEST, TARGET_TRAIN, TARGET_VAL
from dann_experiments.tracking.store import Store, without_secrets

log = logging.getLogger(__name__)
TILES = 5


def panels(config: Config, store: Store, run_of_arm: Mapping[str, str]) -> list[Panel]:
    """The same held-out target tiles, evenly spread over their set (nobody chose them), as each arm's model predicts them.

    Test images where there are any with masks, else validation images. [] where the data or the models are not at hand."""
    try:
        sets = find_data(config, (SOURCE_TRAIN, TARGET_TRAIN, TARGET_VAL, TARGET_TEST)).read(ahead=False)
        dataset = sets.labelled(TARGET_TEST) or sets.labelled(TARGET_VAL) or sets.held_out("target")
        if dataset is None:
            return []
        albums: dict[str, Album] = {}
        for arm, run_id in run_of_arm.items():
            with torch.random.fork_rng(devices=[]):  # a new network draws its weights
                network, normalization = _model_of(run_id, config, store)
            albums[arm] = Album(dataset.with_normalization(normalization or dataset.normalization), TILES)
            albums[arm].add(arm, network)
    except (OSError, ValueError) as error:  # InputError is one: files of runs from elsewhere
        log.warning("The report has no pictures of predictions: %s", error)
        return []
    first = next(iter(albums.values()))
    return [
        Panel(
            (np.clip(image, 0, 1) * 255).round().astype(np.uint8),
            first.truth[index] if first.truth else None,
            {arm: album.predictions[arm][index] for arm, album in albums.items()},
        )
        for index, image in enumerate(first.images)
    ]


def _model_of(run_id: str, config: Config, store: Store) -> tuple[nn.Module, Normalization | None]:
    """A run's network, and its normalization of target images; None for a source model that has never seen the target."""
    where = f"runs:/{run_id}/model"
    try:
        model = load_model(where, "target", config, store)
        return model.network, model.normalisation
    except InputError:  # also raised for other causes, which show again
        return load_model(where, "source", config, store).network, None


def feature_clouds(store: Store, run_id: str) -> tuple[dict[str, FeatureCloud], str]:
    """The pooled features that a run keeps, before and after it adapted, and the layer they are from; ({}, "") without."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(store.client.download_artifacts(run_id, FEATURES_FILE, folder))
            with safe_open(str(path), "numpy") as file:
                layer = (file.metadata() or {}).get("layer", "")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        except Exception as error:  # whatever the artifact store raises: a report without this figure is still one
            log.warning(
                "The report has no picture of the features: run %s keeps none (%s).",
                run_id,
                without_secrets(str(error)),
            )
            return {}, ""
    clouds = {}
    for when in ("before", "after"):
        if f"{when}/source" in found and f"{when}/target" in found:
            clouds[when] = FeatureCloud(found[f"{when}/source"], found[f"{when}/target"])
    return clouds, layer
