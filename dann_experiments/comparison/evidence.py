"""Collects the pictures of a report: predictions of several arms on the same tiles, and features of both domains."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from dann_experiments.comparison.result import FeatureCloud, Panel
from dann_experiments.config import Config, InputError
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.reading import Normalization
from dann_experiments.jobs.build import find_data
from dann_experiments.jobs.load_model import load_model
from dann_experiments.jobs.pictures import Album
from dann_experiments.jobs.run_training import FEATURES_FILE
from dann_experiments.names import SOURCE_TRAIN, TARGET_TEST, TARGET_TRAIN, TARGET_VAL, OneDomain
from dann_experiments.tracking.store import Store, without_secrets

log = logging.getLogger(__name__)
TILES = 5


def panels(config: Config, store: Store, run_of_arm: Mapping[str, str]) -> list[Panel]:
    """Return the predictions of each arm on the same held-out target tiles, which are spread evenly over their set.

    `run_of_arm`: arm -> run id. The tiles are labeled test images if there are any, else validation images. Returns [] if data
    or models are not available.
    """
    try:
        sets = find_data(config, (SOURCE_TRAIN, TARGET_TRAIN, TARGET_VAL, TARGET_TEST)).read(ahead=False)
        labelled = (
            {one.one: dataset for one, dataset in sets.parts(name).items() if dataset.has_masks}
            for name in (TARGET_TEST, TARGET_VAL)
        )
        targets = [one for one in sets.domains if one.role == "target"]
        shown: dict[OneDomain, SegmentationDataset] = next(filter(None, labelled), {}) or {
            one: dataset for one in targets if (dataset := sets.held_out(one)) is not None
        }
        if not shown:
            return []
        albums: dict[str, Album] = {}
        for arm, run_id in run_of_arm.items():
            with torch.random.fork_rng(devices=[]):  # some encoders draw random numbers when they are built
                network, normalizations = model_of_run(run_id, list(shown), config, store)
            own = {
                one: dataset.with_normalization(normalizations[one] or dataset.normalization)
                for one, dataset in shown.items()
            }
            albums[arm] = Album(sets.joined(own), TILES)
            albums[arm].add(arm, network)
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError includes InputError: the files of runs from another machine are missing
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


def model_of_run(
    run_id: str, targets: Sequence[OneDomain], config: Config, store: Store
) -> tuple[nn.Module, dict[OneDomain, Normalization | None]]:
    """Return the network of a run and its normalization of the images of each target; None for a model trained only on the
    source."""
    where = f"runs:/{run_id}/model"
    try:
        models = {one: load_model(where, str(one), config, store) for one in targets}
        return models[targets[0]].network, {one: model.normalisation for one, model in models.items()}
    except InputError:  # other causes are raised again by the next line
        return _of_source(where, config, store), dict.fromkeys(targets)


def _of_source(where: str, config: Config, store: Store) -> nn.Module:
    """Return the network of a model that was trained on the source only."""
    sources = [one for one in config.data.domains if one.role == "source"]
    return load_model(where, str(sources[0]), config, store).network


def feature_clouds(store: Store, run_id: str) -> tuple[dict[str, FeatureCloud], str]:
    """Return the pooled features that a run stored before and after adaptation, and their layer; ({}, "") without any."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(store.client.download_artifacts(run_id, FEATURES_FILE, folder))
            with safe_open(str(path), "numpy") as file:
                layer = (file.metadata() or {}).get("layer", "")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        except Exception as error:  # the artifact store may raise anything; the report does without this figure
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
