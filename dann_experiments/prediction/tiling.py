"""Class maps of rasters of any size: overlapping tiles through the network, blended without seams, in bounded memory.

Letters: K classes, N tiles per batch, B bands, h x w pixels. The tiles of one row of tiles are forwarded left to right and
the rows from top to bottom. Where two neighbors overlap, the outer quarter of the overlap of each is thrown away (there
the network misses its surroundings) and in between the class probabilities pass smoothly from one to the other. Only
what a later tile still has to be blended with is kept as probabilities; all else becomes class ids at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dann_experiments.config.errors import InputError
from dann_experiments.data.rasters import Window
from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.models.taps import evaluating
from dann_experiments.prediction.rasters import NODATA, PROBABILITY_STEPS

Read = Callable[[Window], tuple[Tensor, np.ndarray | None]]
"""Normalized image (B, h, w) float32 of a window, and where it holds data (h, w) bool; None = everywhere."""


@dataclass(frozen=True)
class Axis:
    """The tiles along one side of the raster, and the pixels that each of them contributes."""

    length: int
    """Pixels of the raster."""
    tile: int
    """Pixels of a tile; the last one may reach beyond the raster, by less than the network's stride."""
    starts: tuple[int, ...]
    """First pixel of each tile."""
    half: int
    """Half the width of the ramp between neighbours."""

    @property
    def ramp(self) -> int:
        """Pixels in which a tile passes over to the next."""
        return 2 * self.half

    @property
    def last(self) -> int:
        """Index of the last tile."""
        return len(self.starts) - 1

    @property
    def step(self) -> int:
        """The largest distance from one tile's first pixel to the next one's."""
        return max((late - early for early, late in itertools.pairwise(self.starts)), default=self.tile)

    def inside(self, index: int) -> tuple[int, int]:
        """First and end pixel of the tile, as far as it is within the raster."""
        return self.starts[index], min(self.starts[index] + self.tile, self.length)

    def used(self, index: int) -> tuple[int, int]:
        """First and end pixel of what the tile contributes to, its ramps included."""
        start = 0 if index == 0 else self._middle(index - 1) - self.half
        end = self.length if index == self.last else self._middle(index) + self.half
        return start, end

    def finished(self, index: int) -> tuple[int, int]:
        """First and end pixel of what is complete with this tile and was not before."""
        start, end = self.used(index)
        return start, end if index == self.last else end - self.ramp

    def _middle(self, index: int) -> int:
        """Of the overlap of this tile and the next."""
        return (self.starts[index] + self.tile + self.starts[index + 1]) // 2


@dataclass(frozen=True)
class Plan:
    """The tiles of a raster."""

    rows: Axis
    columns: Axis

    def tile(self, row: int, column: int) -> Window:
        """What is read for a tile."""
        (top, bottom), (left, right) = self.rows.inside(row), self.columns.inside(column)
        return Window(top, left, bottom - top, right - left)

    def piece(self, row: int, column: int) -> Window:
        """What is complete with a tile; the pieces of all tiles cover the raster once."""
        (top, bottom), (left, right) = self.rows.finished(row), self.columns.finished(column)
        return Window(top, left, bottom - top, right - left)

    def pieces(self) -> Iterator[Window]:
        """Every piece, in the order in which they are completed."""
        for row, column in itertools.product(range(len(self.rows.starts)), range(len(self.columns.starts))):
            yield self.piece(row, column)


class Piece(NamedTuple):
    """A finished part of the map."""

    window: Window
    ids: np.ndarray
    """(h, w) uint8 class ids; NODATA where there is no data."""
    probabilities: np.ndarray | None
    """(K, h, w) uint8, 254 times the probability; NODATA where there is no data. None = not asked for."""


def plan_tiles(height: int, width: int, tile_size: int, overlap: int, stride: int) -> Plan:
    """Plan the tiles of a raster of height x width pixels, sharing `overlap` pixels or more, at most half of `tile_size`.

    Tiles begin at multiples of `stride` (see grid_stride): all lie on the grid of positions that the network would have on
    the whole raster. Where that takes it, tile and overlap are larger than asked for. A side that is no longer than a tile
    is one tile of its own length.
    """
    return Plan(*(plan_axis(length, tile_size, overlap, stride) for length in (height, width)))


def plan_axis(length: int, tile_size: int, overlap: int, stride: int) -> Axis:
    """Place as few evenly spaced tiles as there can be; see `plan_tiles`."""
    # in units of the stride; an even number, so that half a tile is an overlap
    whole, tile, shared = _divide_up(length, stride), 2 * _divide_up(tile_size, 2 * stride), _divide_up(overlap, stride)
    assert shared <= tile // 2
    if whole <= tile:
        return Axis(length, length, (0,), 0)
    gaps = _divide_up(whole - tile, tile - shared)
    starts = tuple((2 * index * (whole - tile) + gaps) // (2 * gaps) * stride for index in range(gaps + 1))
    return Axis(length, tile * stride, starts, shared * stride // 4)


def grid_stride(network: nn.Module) -> int:
    """Return image pixels per position of the network's deepest map, also for networks that take images of any size."""
    return int(getattr(getattr(network, "encoder", None), "output_stride", 1))


def ramp_weights(width: int) -> Tensor:
    """Return the share of the later tile, a raised cosine from 0 to 1, (width,) float32; the earlier one has the rest."""
    position = (torch.arange(width, dtype=torch.float64) + 0.5) / max(width, 1)
    return (0.5 - 0.5 * torch.cos(torch.pi * position)).float()


class Tiler:
    """Forwards the tiles of a plan and blends them. `carry` and the next row's index are all that is needed to resume."""

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        classes: int,
        batch_size: int,
        device: torch.device,
        with_probabilities: bool = False,
    ) -> None:
        """`network` (on `device`) gives logits (N, classes, h, w) of images (N, B, h, w)."""
        self.network = network
        self.plan = plan
        self.classes = classes
        self.batch_size = batch_size
        self.device = device
        self.with_probabilities = with_probabilities
        self.carry = torch.zeros(classes, plan.rows.ramp, plan.columns.length, device=device)
        """(K, ramp, width): the lowest rows of the last row of tiles, to be blended with the next."""
        self._held = torch.empty(0)  # (K, h, ramp): the same of the last tile, for the next to its right
        self._row_weights = ramp_weights(plan.rows.ramp).to(device)[:, None]  # (ramp, 1)
        self._column_weights = ramp_weights(plan.columns.ramp).to(device)  # (ramp,)

    def row(self, index: int, read: Read) -> Iterator[Piece]:
        """Yield the pieces that are complete with this row of tiles, left to right; rows must be requested in order.

        Batches are filled within the row, so the numbers do not depend on the row that a process began with.
        """
        columns = range(len(self.plan.columns.starts))
        for start in range(0, len(columns), self.batch_size):
            batch = columns[start : start + self.batch_size]
            windows = [self.plan.tile(index, column) for column in batch]
            images, valids = zip(*(read(window) for window in windows), strict=True)
            probabilities = self._forward(images, valids)
            for number, column in enumerate(batch):
                yield self._blend(index, column, probabilities[number], valids[number])

    @torch.inference_mode()
    def _forward(self, images: tuple[Tensor, ...], valids: tuple[np.ndarray | None, ...]) -> Tensor:
        """Return class probabilities (N, K, h, w) of tiles; 0 for tiles without a pixel of data, which are not used."""
        rows, columns = self.plan.rows.tile, self.plan.columns.tile
        seen = [number for number, valid in enumerate(valids) if valid is None or valid.any()]
        if not seen:
            return torch.zeros(len(images), self.classes, rows, columns, device=self.device)
        stack = torch.stack([_filled_up(images[number], rows, columns) for number in seen])
        with evaluating(self.network):
            logits = logits_of_any_size(self.network, stack.to(self.device, non_blocking=True))
        wanted = (len(seen), self.classes, rows, columns)
        if tuple(logits.shape) != wanted:
            raise InputError(f"the model gives logits of shape {tuple(logits.shape)}; its settings say {wanted}.")
        probabilities = logits.float().softmax(1)
        if len(seen) == len(images):
            return probabilities
        result = torch.zeros(len(images), self.classes, rows, columns, device=self.device)
        result[seen] = probabilities
        return result

    @torch.inference_mode()
    def _blend(self, row: int, column: int, tile: Tensor, valid: np.ndarray | None) -> Piece:
        """Blend a tile's probabilities (K, h, w) with its upper and left neighbors'; keep what later tiles need."""
        rows, columns = self.plan.rows, self.plan.columns
        (top, bottom), (left, right) = rows.used(row), columns.used(column)
        part = tile[:, top - rows.starts[row] : bottom - rows.starts[row], :]
        part = part[:, :, left - columns.starts[column] : right - columns.starts[column]]
        if column > 0:  # lerp: where both neighbors agree, so does the blend, to the last bit
            part[:, :, : columns.ramp].copy_(torch.lerp(self._held, part[:, :, : columns.ramp], self._column_weights))
        left, right = columns.finished(column)
        self._held = part[:, :, right - left :].clone()
        part = part[:, :, : right - left]
        if row > 0:
            part[:, : rows.ramp].copy_(
                torch.lerp(self.carry[:, :, left:right], part[:, : rows.ramp], self._row_weights)
            )
        top, bottom = rows.finished(row)
        if row < rows.last:
            self.carry[:, :, left:right] = part[:, bottom - top :]
        return self._reduced(Window(top, left, bottom - top, right - left), part[:, : bottom - top], row, column, valid)

    def _reduced(self, window: Window, part: Tensor, row: int, column: int, valid: np.ndarray | None) -> Piece:
        ids = part.max(0).indices.to(torch.uint8).cpu().numpy()  # on a CPU many times as fast as argmax
        stored = None
        if self.with_probabilities:
            stored = (part * PROBABILITY_STEPS).round_().to(torch.uint8).cpu().numpy()
        if valid is not None:
            tile = self.plan.tile(row, column)
            top, left = window.top - tile.top, window.left - tile.left
            missing = ~valid[top : top + window.height, left : left + window.width]
            ids[missing] = NODATA
            if stored is not None:
                stored[:, missing] = NODATA
        return Piece(window, ids, stored)


def _filled_up(image: Tensor, height: int, width: int) -> Tensor:
    """Return the image with its last row and column repeated up to this size."""
    down, right = height - image.shape[1], width - image.shape[2]
    if down == right == 0:
        return image
    return nn.functional.pad(image[None], (0, right, 0, down), mode="replicate")[0]


def _divide_up(amount: int, unit: int) -> int:
    return -(-amount // unit)
