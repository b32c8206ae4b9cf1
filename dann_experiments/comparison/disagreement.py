"""Finds the target tiles on which the arms of a comparison disagree most: those whose labels would tell most.

Letters: K classes, P pixels of all tiles, h x w pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dann_experiments.comparison.target_maps import TargetMaps, Tile
from dann_experiments.prediction.rasters import NODATA
from dann_experiments.scores.agreement import vote_entropy

CHUNK = 2**18  # pixels whose votes are counted at once, to bound memory


def votes_on(maps: TargetMaps, pixels: slice, num_classes: int, arms: Sequence[str]) -> np.ndarray:
    """Return the votes (K, p) for each class on some pixels: one vote per arm, which its seeds share equally."""
    votes = np.zeros((num_classes, pixels.stop - pixels.start))
    for arm in arms:
        of_seeds = maps.of(arm)
        for ids in of_seeds.values():
            part = ids[pixels]
            for index in range(num_classes):
                votes[index] += (part == index) / len(of_seeds)
    return votes


def disagreement_of(maps: TargetMaps, tile: Tile, num_classes: int, arms: Sequence[str]) -> np.ndarray:
    """Return how much the arms disagree on each pixel of a tile, (h, w) in 0..1 (`vote_entropy`); NaN where it has no data."""
    first, end = tile.pixels.start, tile.pixels.stop
    parts = [slice(start, min(start + CHUNK, end)) for start in range(first, end, CHUNK)]
    found = np.concatenate([vote_entropy(votes_on(maps, part, num_classes, arms)) for part in parts])
    known = next(iter(maps.ids.values()))[tile.pixels] != NODATA
    return np.where(known, found, np.nan).reshape(tile.size)


def most_disputed(maps: TargetMaps, num_classes: int, arms: Sequence[str], count: int) -> list[tuple[Tile, float]]:
    """Return at most `count` tiles with their mean disagreement over pixels with data (0..1), the most disputed first.

    Tiles without data are left out; of equal tiles the first come first.
    """
    ranked = []
    for tile in maps.tiles:
        found = disagreement_of(maps, tile, num_classes, arms)
        if not np.isnan(found).all():
            ranked.append((tile, float(np.nanmean(found))))
    ranked.sort(key=lambda one: -one[1])
    return ranked[:count]
