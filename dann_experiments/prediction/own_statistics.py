"""BatchNorm statistics of the image that is mapped: one pass over tiles from all over it, before the first prediction.

All tiles of the map then have the same statistics, so that none differs from its neighbors by them. Statistics of each tile or
batch of tiles by itself would show as seams. Letters: B bands, h x w pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dann_experiments.models.batchnorm import MOST_IMAGES, Origin, spread_batches, statistics_of
from dann_experiments.prediction.tiling import Plan, Read, filled_up

MOST_BYTES = 128 * 2**20
"""Memory for the tiles of the pass; with three bands, 42 tiles of 512 x 512 pixels."""
GOLDEN = (5**0.5 - 1) / 2
LEAST_DATA = 0.5
"""Share of a tile's pixels with data, from which the tile is preferred to emptier ones."""


@contextlib.contextmanager
def statistics_of_image(
    network: nn.Module, plan: Plan, read: Read, channels: int, batch_size: int, name: str
) -> Iterator[None]:
    """Let every BatchNorm of `network` have the statistics of the image that `read` cuts tiles out of, in the block.

    They are taken as `models.batchnorm.target_statistics` does, in batches of up to `batch_size` tiles from all over the image.
    If the tiles (of `channels` bands) need more than MOST_BYTES, only some of them are read, evenly spaced, so that memory and
    time are bounded. Tiles with data in less than half of their pixels are left out, unless all are like that; for an image
    without any data, nothing is done. The same plan gives the same statistics, also in a process that resumes the map. Raises
    InputError, with the `name` of the image, if its only tile is too small for the network's BatchNorm.
    """
    bytes_of_tile = 4 * channels * plan.rows.tile * plan.columns.tile
    most = min(max(MOST_BYTES // bytes_of_tile, batch_size), MOST_IMAGES)
    total = len(plan.rows.starts) * len(plan.columns.starts)
    # all tiles only if the evenly spaced ones have no data
    tiles = _with_data(plan, read, _evenly_spaced(total, most), most) or _with_data(plan, read, range(total), most)
    if not tiles:
        yield
        return
    origin = Origin(
        name, "choose a smaller tile_size, so that the image has two tiles, or set test_batchnorm to running"
    )
    loader = ({"image": torch.stack(batch)} for batch in spread_batches(tiles, batch_size))
    with statistics_of(network, loader, origin):
        del tiles  # the batches have been used up
        yield


def _with_data(plan: Plan, read: Read, numbers: Iterable[int], most: int) -> list[Tensor]:
    """Return the tiles (B, h, w) of these numbers, up to `most`: those with enough data, else those with any."""
    found: list[tuple[float, Tensor]] = []
    for number in numbers:
        image, valid = read(plan.tile(*divmod(number, len(plan.columns.starts))))
        share = 1.0 if valid is None else float(np.mean(valid))
        if share > 0:
            found.append((share, filled_up(image, plan.rows.tile, plan.columns.tile)))
        if len(found) == most:
            break
    return [tile for share, tile in found if share >= LEAST_DATA] or [tile for _, tile in found]


def _evenly_spaced(total: int, most: int) -> list[int]:
    """Return up to `most` of the numbers 0 ... total - 1, ascending: one from each of `most` equal parts. Its place in the part
    differs from part to part, since equal steps could meet the same column of the image again and again."""
    if total <= most:
        return list(range(total))
    step = total / most
    return [int((part + part * GOLDEN % 1) * step) for part in range(most)]
