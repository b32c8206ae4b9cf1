"""Maps one image after the other: resumes, predicts, writes, and collects problems."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.config.errors import InputError
from dann_experiments.models.folding import Pair, channels_last, foldable, folded
from dann_experiments.prediction.find_images import CONFIDENCE, PROBABILITIES, STAC, path_beside, vector_path
from dann_experiments.prediction.own_statistics import statistics_of_image
from dann_experiments.prediction.partial_map import CONFIDENCE as CONFIDENCE_LAYER
from dann_experiments.prediction.partial_map import PartialMap, probabilities_layer
from dann_experiments.prediction.qgis_style import write_style
from dann_experiments.prediction.rasters import (
    SIGNATURE_TAG,
    TIFF_SUFFIXES,
    Legend,
    read_tags,
    write_confidence,
    write_map,
    write_probabilities,
)
from dann_experiments.prediction.scene import Options, Scene, Strips, UnreadableImage
from dann_experiments.prediction.stac import Times, times_of, write_item
from dann_experiments.prediction.tiling import Tiler
from dann_experiments.prediction.vector_file import is_placed, read_signature, write_polygons
from dann_experiments.tracking.run import RunKilled
from dann_experiments.training.memory import explain_out_of_memory

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """The results of one image, or of several together."""

    counts: np.ndarray
    """Pixels per class (K + 1,), those without data last."""
    written: list[Scene] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    """Images without data."""
    dark: list[Path] = field(default_factory=list)
    """16 bit images that use only a small part of their range."""
    unplaced: list[Path] = field(default_factory=list)
    """Images without a transform to a CRS, whose polygons are in pixel coordinates."""
    polygons: int = 0
    """Polygons that were written."""
    pixels: int = 0
    """Pixels of the working grids that were predicted."""

    def add(self, other: Outcome) -> None:
        """Add the results of other images."""
        self.counts += other.counts
        self.written += other.written
        self.empty += other.empty
        self.dark += other.dark
        self.unplaced += other.unplaced
        self.polygons += other.polygons
        self.pixels += other.pixels

    def warn(self) -> None:
        """Warn about finished maps that may be wrong."""
        for images, what in (
            (self.empty, "holds no data: every pixel is nodata, and so is every pixel of its map."),
            (
                self.dark,
                "uses little of the range of 16 bit and is darker than the training images: the model sees it nearly black. "
                "Convert it to the range of the training images.",
            ),
            (
                self.unplaced,
                "has no transform to a CRS (control points do not count), so its polygons are in pixels of the map, y down.",
            ),
        ):
            if images:
                more = f" The same holds for {len(images) - 1} more." if len(images) > 1 else ""
                log.warning("%s %s%s", images[0], what, more)


class Ended(NamedTuple):
    """An image that was mapped, was found mapped, or could not be."""

    number: int
    """Its place in the work."""
    outcome: Outcome | None = None
    """None = it could not be mapped."""
    seconds: float = 0.0
    problem: str = ""
    """Why it could not be mapped."""


class MapMaker:
    """Maps images with one model, which is on `device`.

    `colors` (K, 3) in 0..1 and `tags` are written into the color tables and metadata of the maps.
    """

    def __init__(
        self,
        model: Model,
        options: Options,
        device: torch.device,
        colors: np.ndarray,
        tags: Mapping[str, str],
    ) -> None:
        self.model, self.options, self.device = model, options, device
        self._colors, self._tags = colors, tags

    def map_all(self, work: Sequence[tuple[Path, Path]], show: Callable[[float, str], None]) -> Iterator[Ended]:
        """Map each pair of image and map path; `show` gets the number of images done, with a fraction, and the current file name.

        Raises InputError if the only image cannot be mapped; with several images, `problem` says why one cannot.
        """
        for number, (source, output) in enumerate(work):
            start = time.perf_counter()
            try:
                outcome = self.map_one(
                    source, output, lambda share, number=number: show(number + share, work[number][0].name)
                )
            except InputError as error:
                if len(work) == 1:
                    raise
                yield Ended(number, None, time.perf_counter() - start, str(error))
            else:
                yield Ended(number, outcome, time.perf_counter() - start)
            show(number + 1, source.name)

    def map_one(self, source: Path, output: Path, show: Callable[[float], None] = lambda share: None) -> Outcome:
        """Write the map of an image, and what belongs to it, as far as it is missing; `show` gets the finished share, 0..1."""
        outcome = Outcome(np.zeros(len(self.model.class_names) + 1, np.int64))
        scene = Scene.open(source, output, self.model, self.options)
        times = times_of(source, self.options.stac_datetime) if self.options.stac else None
        polygons = self._missing_polygons(scene)
        is_finished = self._is_finished(scene)
        if is_finished:
            log.info("%s is already finished.", output)
        else:
            with explain_out_of_memory(InputError, functools.partial(self._smaller, scene)):
                for share in self._predicted(scene, outcome):
                    show(share)
            outcome.written.append(scene)
        if polygons is not None:
            self._write_polygons(scene, polygons, outcome)
        if times is not None:
            self._write_item(scene, times, replace=not is_finished or polygons is not None)
        return outcome

    def _is_finished(self, scene: Scene) -> bool:
        """Return whether the map exists and was made with the same settings. Raises InputError if it was made with others."""
        if self.options.overwrite or not scene.output.exists():
            return False
        if read_tags(scene.output).get(SIGNATURE_TAG) != scene.signature:
            raise InputError(
                f"{scene.output} exists, but was made with other settings; remove it, or set overwrite to true."
            )
        return True

    def _write_item(self, scene: Scene, times: Times, replace: bool) -> None:
        """Write the STAC item of a finished map; `replace`: also if there is one."""
        if replace or not path_beside(scene.output, STAC).exists():
            options = self.options
            write_item(
                scene.output, scene.input, times, self.model.class_names, self._colors, options.probabilities,
                options.confidence, None if options.vector is None else vector_path(scene.output, options.vector),
            )  # fmt: skip

    def _missing_polygons(self, scene: Scene) -> Path | None:
        """Return the file of polygons to write; None if it exists, or none is wanted. Raises InputError if it was made with other
        settings."""
        if self.options.vector is None:
            return None
        path = vector_path(scene.output, self.options.vector)
        if self.options.overwrite or not path.exists():
            return path
        if read_signature(path) != self.options.polygons.signature(scene.signature):
            raise InputError(f"{path} exists, but was made with other settings; remove it, or set overwrite to true.")
        return None

    def _write_polygons(self, scene: Scene, path: Path, outcome: Outcome) -> None:
        """Write the polygons of a finished map."""
        options = self.options.polygons
        sure = path_beside(scene.output, CONFIDENCE) if self.options.confidence is not None else None
        outcome.polygons += write_polygons(path, scene.output, sure, scene.grid, self._legend(scene), options)
        if not is_placed(scene.grid):
            outcome.unplaced.append(scene.input)

    def _smaller(self, scene: Scene) -> str:
        """Return advice for when memory runs out."""
        return (
            f"batch_size is {self.options.batch_size}, with tiles of {scene.plan.rows.tile} x {scene.plan.columns.tile} pixels. "
            "Use a smaller batch_size, then a smaller tile_size, or accelerator cpu if this was a GPU."
        )

    def _predicted(self, scene: Scene, outcome: Outcome) -> Iterator[float]:
        """Predict the rest of an image, then write its map; yield the finished share of the image, 0..1."""
        name, rows, options = scene.input.name, len(scene.plan.rows.starts), self.options
        tiler = Tiler(
            self.model.network, scene.plan, len(self.model.class_names), options.batch_size, self.device,
            options.probabilities, tta=options.tta, confidence=options.confidence,
        )  # fmt: skip
        layers = [probabilities_layer(tiler.classes)] if options.probabilities else []
        layers += [CONFIDENCE_LAYER] if options.confidence is not None else []
        with (
            self._statistics(scene),
            self._quicker(),
            PartialMap(scene.partial_folder, scene.facts, layers) as partial,
        ):
            done, carry, reason = partial.start()
            if reason is not None:
                log.info("%s: starting anew, as %s: %s.", name, partial.folder, reason)
            if carry is not None:
                log.info("%s: resuming after %d of %d rows of tiles.", name, done, rows)
                tiler.carry.copy_(torch.from_numpy(carry))
            read = Strips(scene, self.model.in_channels)
            try:
                for row in range(done, rows):
                    yield row / rows
                    for piece in tiler.row(row, read):
                        partial.add(*piece.arrays)
                        outcome.pixels += piece.window.height * piece.window.width
                    partial.checkpoint(row + 1, tiler.carry.cpu().numpy())
            except (RunKilled, KeyboardInterrupt):
                log.warning("The finished part is kept in %s; the same command resumes from there.", partial.folder)
                raise
            except UnreadableImage:
                partial.remove()
                raise
            counts = self._write(scene, partial)
            outcome.counts += counts
            partial.remove()
        if not counts[:-1].any():
            outcome.empty.append(scene.input)
        elif read.is_dark():
            outcome.dark.append(scene.input)

    @functools.cached_property
    def _foldable(self) -> list[Pair]:
        return foldable(self.model.network, self.model.in_channels)

    @contextlib.contextmanager
    def _quicker(self) -> Iterator[None]:
        """Let the network predict quicker in the block, only on a CPU, where this was measured (docs/performance.md)."""
        if self.device.type != "cpu":
            yield
            return
        with folded(self._foldable), channels_last(self.model.network):
            yield

    def _statistics(self, scene: Scene) -> contextlib.AbstractContextManager[None]:
        """Let the network have the BatchNorm statistics of the options in the block."""
        if self.options.test_batchnorm == "running":
            return contextlib.nullcontext()
        # reads by itself, so that the check of the range counts each pixel once
        channels = self.model.in_channels
        read = Strips(scene, channels)
        return statistics_of_image(
            self.model.network, scene.plan, read, channels, self.options.batch_size, str(scene.input)
        )

    def _write(self, scene: Scene, partial: PartialMap) -> np.ndarray:
        """Write the finished map; return pixels per class, (K + 1,)."""
        legend = self._legend(scene)
        windows = list(scene.plan.pieces())
        if self.options.probabilities:  # the class map is written last: if it exists, everything does
            path = path_beside(scene.output, PROBABILITIES)
            write_probabilities(path, partial, windows, scene.size, scene.grid, scene.factor, legend)
        if (kind := self.options.confidence) is not None:
            path = path_beside(scene.output, CONFIDENCE)
            write_confidence(path, partial, windows, scene.size, scene.grid, scene.factor, legend, kind)
        if scene.output.suffix.lower() in TIFF_SUFFIXES:
            write_style(scene.output, legend.class_names, legend.colors)
        elif scene.grid.crs is not None:
            log.warning("%s is no GeoTIFF, so it does not have the georeference of the image.", scene.output)
        return write_map(scene.output, partial, windows, scene.size, scene.grid, scene.factor, legend)

    def _legend(self, scene: Scene) -> Legend:
        return Legend(self.model.class_names, self._colors, {**self._tags, SIGNATURE_TAG: scene.signature})
