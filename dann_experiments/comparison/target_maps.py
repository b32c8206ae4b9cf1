"""Predicts unlabeled target images with the models of many runs, tile by tile, so that the maps can be compared.

Letters: P pixels of all tiles, one after the other; h x w pixels of a tile.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dann_experiments.comparison.evidence import model_of_run
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.config import Config, InputError, replace
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.reading import Normalization
from dann_experiments.jobs.build import find_data
from dann_experiments.models.batchnorm import statistics_loader, target_statistics
from dann_experiments.models.networks import logits_of_any_size, predicted_classes
from dann_experiments.models.taps import evaluating
from dann_experiments.names import SOURCE_TRAIN, TARGET_TRAIN, OneDomain
from dann_experiments.prediction.rasters import NODATA
from dann_experiments.reports.images import display_image
from dann_experiments.tracking.store import Store

log = logging.getLogger(__name__)
LEFT_OUT = ("oracle", "test_statistics", "masks")
"""Kinds of arms without maps: oracles know target labels, and test-time BN would be AdaBN, as the tiles are training images."""
MOST_TILES, MOST_PIXELS = 200, 4_000_000
"""Tiles that are compared, and their pixels, per target domain, spread evenly over its training images."""
BATCH = 8  # tiles


@dataclass(frozen=True)
class Tile:
    """One window of an unlabeled target image."""

    image: Path
    region: tuple[int, int, int, int]
    """Left, top, right and bottom, in pixels of the file."""
    size: tuple[int, int]
    """Height and width of its maps."""
    start: int
    """Index of its first pixel among those of all tiles."""
    domain: OneDomain
    number: int
    """Its index in the set of its domain."""

    @property
    def pixels(self) -> slice:
        """Its place among the pixels of all tiles."""
        return slice(self.start, self.start + self.size[0] * self.size[1])


@dataclass(frozen=True)
class TargetMaps:
    """The maps of several runs on the same tiles."""

    tiles: Sequence[Tile]
    ids: Mapping[tuple[str, int], np.ndarray]
    """(arm, seed) -> class ids (P,) uint8; 255 where the image has no data."""
    sets: Mapping[OneDomain, SegmentationDataset] = field(repr=False, default_factory=dict)

    @property
    def pixels(self) -> int:
        """Number of pixels of all tiles."""
        return sum(tile.size[0] * tile.size[1] for tile in self.tiles)

    @property
    def arms(self) -> list[str]:
        """The arms with maps, in their order."""
        return list(dict.fromkeys(arm for arm, _ in self.ids))

    def of(self, arm: str) -> dict[int, np.ndarray]:
        """Return the maps of an arm, by seed."""
        return {seed: ids for (name, seed), ids in self.ids.items() if name == arm}

    def picture(self, tile: Tile) -> np.ndarray:
        """Return a tile's image for display, (h, w, 3) in 0..1."""
        dataset = self.sets[tile.domain]
        stretch = dataset.headers[0].dtype != "uint8"
        return display_image(dataset.picture(dataset[tile.number]), stretch=stretch)


def maps_of(config: Config, store: Store, arms: Sequence[Arm], runs: Sequence[ArmRun], folder: Path) -> TargetMaps:
    """Predict tiles of data.target.train, whole and without augmentation, with the model of each run; maps are files in `folder`.

    The model of an arm of kind statistics is that of its source run, with BatchNorm statistics of data.target.train; other arms
    have a model of their own. Arms of the kinds in `LEFT_OUT` have no maps. Raises InputError for missing images or models.
    """
    kinds = {arm.name: arm.kind for arm in arms}
    # windows at random places would overlap
    grid = replace(config, {"data.windows": "grid", "data.window_count": None})
    read = find_data(grid, (SOURCE_TRAIN, TARGET_TRAIN)).read(ahead=False)
    sets = {name.one: one.as_evaluated(_most(one)) for name, one in read.parts(TARGET_TRAIN).items()}
    if not sets:
        raise InputError(
            "data.target.train lists no images, so there is nothing to compare; add target images (no masks needed)."
        )
    tiles = list(_tiles(sets))
    nodata = np.concatenate([_nodata(sets[tile.domain], tile) for tile in tiles])
    sources = {run.seed: run.run_id for run in runs if kinds[run.arm] == "source_only"}
    used = [run for run in runs if kinds[run.arm] not in LEFT_OUT]
    ids = {}
    for number, run in enumerate(used):
        with_statistics = kinds[run.arm] == "statistics"
        run_id = sources.get(run.seed) if with_statistics else run.run_id
        if run_id is None:
            log.warning("%s, seed %d, has no maps: the comparison has no source model of that seed.", run.arm, run.seed)
            continue
        with torch.random.fork_rng(devices=[]):  # some encoders draw random numbers when they are built
            network, normalizations = model_of_run(run_id, list(sets), config, store)
        if with_statistics:
            # of several target domains together, as `evaluate` has them
            images = read.joined({one: _normalized(dataset, normalizations[one]) for one, dataset in sets.items()})
            assert images is not None
            target_statistics(network, statistics_loader(images, config.data.target.batch_size))
        found = _predicted(network, sets, normalizations, tiles)
        found[nodata] = NODATA
        path = folder / str(number)
        found.tofile(path)
        ids[run.arm, run.seed] = np.memmap(path, np.uint8, "r")
        log.info("Maps of %s, seed %d [%d of %d runs].", run.arm, run.seed, number + 1, len(used))
    return TargetMaps(tiles, ids, sets)


def _most(dataset: SegmentationDataset) -> int:
    """Return how many tiles of a set are compared."""
    largest = max((piece.window.height * piece.window.width for piece in dataset.pieces), default=1)
    return max(min(MOST_TILES, MOST_PIXELS // largest), 1)


def _tiles(sets: Mapping[OneDomain, SegmentationDataset]):
    start = 0
    for one, dataset in sets.items():
        for number, piece in enumerate(dataset.pieces):
            sample, header = dataset.samples[piece.sample], dataset.headers[piece.sample]
            factor = dataset.reading.factor(header, sample.image)
            top, left, height, width = piece.window
            ends = min(round((left + width) * factor), header.width), min(round((top + height) * factor), header.height)
            region = (round(left * factor), round(top * factor), *ends)
            yield Tile(Path(sample.image), region, (height, width), start, one, number)
            start += height * width


def _nodata(dataset: SegmentationDataset, tile: Tile) -> np.ndarray:
    valid = dataset.read(tile.number)[2]
    return np.zeros(tile.size[0] * tile.size[1], bool) if valid is None else ~valid.ravel()


def _normalized(dataset: SegmentationDataset, normalization: Normalization | None) -> SegmentationDataset:
    return dataset.with_normalization(normalization or dataset.normalization)


def _predicted(
    network: nn.Module,
    sets: Mapping[OneDomain, SegmentationDataset],
    normalizations: Mapping[OneDomain, Normalization | None],
    tiles: Sequence[Tile],
) -> np.ndarray:
    read = {one: _normalized(dataset, normalizations[one]) for one, dataset in sets.items()}
    found: list[np.ndarray] = []
    device = next(network.parameters()).device
    with evaluating(network):
        for _, group in itertools.groupby(tiles, key=lambda tile: tile.size):
            alike = list(group)
            for some in (alike[start : start + BATCH] for start in range(0, len(alike), BATCH)):
                images = torch.stack([read[tile.domain][tile.number]["image"] for tile in some]).to(device)
                found.append(predicted_classes(logits_of_any_size(network, images)).cpu().numpy().ravel())
    return np.concatenate(found).astype(np.uint8)
