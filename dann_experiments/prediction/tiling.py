"""Runs a network on overlapping tiles of a raster of any size and blends them without seams, in bounded memory.

Letters: K classes, N tiles per batch, B bands, h x w pixels. Rows of tiles are processed from top to bottom, the tiles in a
row from left to right. Where two neighbors overlap, the outer quarter of each tile's overlap is discarded, because the network
lacks context there; in between, the class probabilities change smoothly from one tile to the other. Only probabilities that
a later tile has to be blended with are kept; all others become class ids at once.
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
from dann_experiments.models.symmetries import mean_probabilities
from dann_experiments.models.taps import evaluating
from dann_experiments.names import Confidence, Tta
from dann_experiments.prediction.confidence import NO_CONFIDENCE, confidence_of
from dann_experiments.prediction.rasters import NODATA, PROBABILITY_STEPS

Read = Callable[[Window], tuple[Tensor, np.ndarray | None]]
"""Reads the normalized image (B, h, w) float32 of a window, and where it has data (h, w) bool; None = everywhere."""

CPU_PIXELS = 512**2
"""Pixels of the tiles of one forward pass on a CPU, at most, unless one tile has more."""


@dataclass(frozen=True)
class Axis:
    """The tiles along one side of the raster, and the pixels that each of them contributes."""

    length: int
    """Pixels of the raster."""
    tile: int
    """Pixels of a tile; the last one may extend beyond the raster, by less than the network's stride."""
    starts: tuple[int, ...]
    """First pixel of each tile."""
    half: int
    """Half the width of the ramp between neighbors."""

    @property
    def ramp(self) -> int:
        """Number of pixels in which a tile is blended with the next."""
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
        """Return first and end pixel of the part of a tile within the raster."""
        return self.starts[index], min(self.starts[index] + self.tile, self.length)

    def used(self, index: int) -> tuple[int, int]:
        """Return first and end pixel of the part that a tile contributes to, including its ramps."""
        start = 0 if index == 0 else self._middle(index - 1) - self.half
        end = self.length if index == self.last else self._middle(index) + self.half
        return start, end

    def finished(self, index: int) -> tuple[int, int]:
        """Return first and end pixel of the part that a tile completes."""
        start, end = self.used(index)
        return start, end if index == self.last else end - self.ramp

    def _middle(self, index: int) -> int:
        """Return the middle of the overlap of a tile and the next one."""
        return (self.starts[index] + self.tile + self.starts[index + 1]) // 2


@dataclass(frozen=True)
class Plan:
    """The tiles of a raster."""

    rows: Axis
    columns: Axis

    def tile(self, row: int, column: int) -> Window:
        """Return the window that is read for a tile."""
        (top, bottom), (left, right) = self.rows.inside(row), self.columns.inside(column)
        return Window(top, left, bottom - top, right - left)

    def piece(self, row: int, column: int) -> Window:
        """Return the window that a tile completes. The pieces of all tiles cover the raster exactly once."""
        (top, bottom), (left, right) = self.rows.finished(row), self.columns.finished(column)
        return Window(top, left, bottom - top, right - left)

    def pieces(self) -> Iterator[Window]:
        """Yield every piece in the order of completion."""
        for row, column in itertools.product(range(len(self.rows.starts)), range(len(self.columns.starts))):
            yield self.piece(row, column)


class Piece(NamedTuple):
    """A finished part of the map."""

    window: Window
    ids: np.ndarray
    """(h, w) uint8 class ids; NODATA where there is no data."""
    probabilities: np.ndarray | None
    """(K, h, w) uint8, 254 times the probability (float32, the probability itself, if not rounded); NODATA where there is no
    data. None = not requested."""
    confidence: np.ndarray | None = None
    """(h, w) float32 in 0..1; NaN where there is no data. None = not requested."""

    @property
    def arrays(self) -> list[np.ndarray]:
        """The values that were requested, in the order above, without the window."""
        return [values for values in self[1:] if values is not None]


def plan_tiles(height: int, width: int, tile_size: int, overlap: int, stride: int) -> Plan:
    """Plan the tiles of a raster of height x width pixels, which share at least `overlap` pixels (at most half of `tile_size`).

    Tiles start at multiples of `stride` (see grid_stride), so that they match the grid of positions that the network would have
    on the whole raster. For this, tile and overlap may be larger than requested. A side that is no longer than a tile is one
    tile of its own length.
    """
    return Plan(*(plan_axis(length, tile_size, overlap, stride) for length in (height, width)))


def plan_axis(length: int, tile_size: int, overlap: int, stride: int) -> Axis:
    """Place the smallest possible number of evenly spaced tiles; see `plan_tiles`."""
    # in units of the stride; the tile is even, so that half of it can be the overlap
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
    """Return the weight of the later tile, a raised cosine from 0 to 1, (width,) float32. The earlier tile has the rest."""
    position = (torch.arange(width, dtype=torch.float64) + 0.5) / max(width, 1)
    return (0.5 - 0.5 * torch.cos(torch.pi * position)).float()


class Tiler:
    """Runs the network on the tiles of a plan and blends them. To resume, `carry` and the next row's index are enough."""

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        classes: int,
        batch_size: int,
        device: torch.device,
        with_probabilities: bool = False,
        rounded: bool = True,
        tta: Tta = "none",
        confidence: Confidence | None = None,
    ) -> None:
        """`network` (on `device`) maps images (N, B, h, w) to logits (N, classes, h, w). `rounded`: whether probabilities are
        rounded to whole numbers, as files store them. `tta`: the copies of each tile whose predictions are averaged;
        `confidence`: the kind of confidence to add to the pieces."""
        self.network = network
        self.plan = plan
        self.classes = classes
        self.batch_size = batch_size
        self.device = device
        self.with_probabilities = with_probabilities
        self.rounded = rounded
        self.tta: Tta = tta
        self.confidence: Confidence | None = confidence
        self.carry = torch.zeros(classes, plan.rows.ramp, plan.columns.length, device=device)
        """Lower ramp (K, ramp, width) of the last row of tiles, to blend with the next row."""
        self._held = torch.empty(0)  # (K, h, ramp): right ramp of the last tile, to blend with the next tile
        self._row_weights = ramp_weights(plan.rows.ramp).to(device)[:, None]  # (ramp, 1)
        self._column_weights = ramp_weights(plan.columns.ramp).to(device)  # (ramp,)

    def row(self, index: int, read: Read) -> Iterator[Piece]:
        """Yield the pieces that a row of tiles completes, left to right; rows must be requested in order.

        A batch never spans two rows, so the results do not depend on the row at which a process started.
        """
        columns = range(len(self.plan.columns.starts))
        for start in range(0, len(columns), self.batch_size):
            batch = columns[start : start + self.batch_size]
            windows = [self.plan.tile(index, column) for column in batch]
            images, valids = zip(*(read(window) for window in windows), strict=True)
            probabilities = self._forward(images, valids)
            for number, column in enumerate(batch):
                yield self._blend(index, column, probabilities[number], valids[number])

    @property
    def _at_a_time(self) -> int:
        """Tiles per forward pass. A CPU is quicker with few pixels at a time (docs/performance.md)."""
        if self.device.type != "cpu":
            return self.batch_size
        return min(self.batch_size, max(CPU_PIXELS // (self.plan.rows.tile * self.plan.columns.tile), 1))

    @torch.inference_mode()
    def _forward(self, images: tuple[Tensor, ...], valids: tuple[np.ndarray | None, ...]) -> Tensor:
        """Return class probabilities (N, K, h, w) of tiles; 0 for tiles without any data, which skip the network."""
        rows, columns = self.plan.rows.tile, self.plan.columns.tile
        seen = [number for number, valid in enumerate(valids) if valid is None or valid.any()]
        if not seen:
            return torch.zeros(len(images), self.classes, rows, columns, device=self.device)
        stack = torch.stack([filled_up(images[number], rows, columns) for number in seen])
        with evaluating(self.network):
            stack = stack.to(self.device, non_blocking=True)
            parts = [mean_probabilities(self._logits, part, self.tta) for part in stack.split(self._at_a_time)]
            probabilities = torch.cat(parts) if len(parts) > 1 else parts[0]
        if len(seen) == len(images):
            return probabilities
        result = torch.zeros(len(images), self.classes, rows, columns, device=self.device)
        result[seen] = probabilities
        return result

    def _logits(self, images: Tensor) -> Tensor:
        logits = logits_of_any_size(self.network, images).contiguous()  # a network may have the channels last
        wanted = (len(images), self.classes, *images.shape[2:])
        if tuple(logits.shape) != wanted:
            raise InputError(f"the model returns logits of shape {tuple(logits.shape)}; its settings imply {wanted}.")
        return logits

    @torch.inference_mode()
    def _blend(self, row: int, column: int, tile: Tensor, valid: np.ndarray | None) -> Piece:
        """Blend a tile's probabilities (K, h, w) with those of its upper and left neighbors; keep those that later tiles need."""
        rows, columns = self.plan.rows, self.plan.columns
        (top, bottom), (left, right) = rows.used(row), columns.used(column)
        part = tile[:, top - rows.starts[row] : bottom - rows.starts[row], :]
        part = part[:, :, left - columns.starts[column] : right - columns.starts[column]]
        if column > 0:  # lerp: if both neighbors are equal, the blend is equal to the last bit
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
        ids = part.max(0).indices.to(torch.uint8).cpu().numpy()  # many times as fast as argmax on a CPU
        sure = None if self.confidence is None else confidence_of(part, self.confidence).cpu().numpy()
        stored = None
        if self.with_probabilities and self.rounded:
            stored = (part * PROBABILITY_STEPS).round_().to(torch.uint8).cpu().numpy()
        elif self.with_probabilities:
            stored = part.cpu().numpy()
        if valid is not None:
            tile = self.plan.tile(row, column)
            top, left = window.top - tile.top, window.left - tile.left
            missing = ~valid[top : top + window.height, left : left + window.width]
            ids[missing] = NODATA
            if stored is not None:
                stored[:, missing] = NODATA
            if sure is not None:
                sure[missing] = NO_CONFIDENCE
        return Piece(window, ids, stored, sure)


def filled_up(image: Tensor, height: int, width: int) -> Tensor:
    """Pad the image to this size by repeating its last row and column."""
    down, right = height - image.shape[1], width - image.shape[2]
    if down == right == 0:
        return image
    return nn.functional.pad(image[None], (0, right, 0, down), mode="replicate")[0]


def _divide_up(amount: int, unit: int) -> int:
    return -(-amount // unit)
