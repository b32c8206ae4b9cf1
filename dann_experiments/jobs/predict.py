"""Makes class maps: of a raster of any size, or of many images, in a run of its own."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from dann_experiments.config import Config, InputError, config_to_dict, flatten
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Header, Window, read_header
from dann_experiments.data.reading import Normalization, Reading, check_type, chosen_bands, for_file, plain_reading
from dann_experiments.data.writing import (
    NODATA,
    PARTIAL_SUFFIX,
    SIGNATURE_TAG,
    TIFF_SUFFIXES,
    Grid,
    Legend,
    PartialMap,
    read_decimated,
    read_grid,
    read_tags,
    write_map,
    write_probabilities,
)
from dann_experiments.jobs.ready_model import Model, load_model
from dann_experiments.jobs.scenes import find_work, probabilities_path
from dann_experiments.models.tiling import Axis, Plan, Tiler, grid_stride, plan_tiles
from dann_experiments.tracking.figures import class_colours, display_image
from dann_experiments.tracking.run import RunKilled, TrackedRun, tracked_run
from dann_experiments.tracking.store import local_artifact_folder, open_store, without_secrets
from dann_experiments.training.memory import explain_out_of_memory

log = logging.getLogger(__name__)
STRIP_BYTES = 32 * 2**20  # of the image that are read at a time
PREVIEW_SIDE = 1000  # pixels
# mean of 0..1: reflectances in 16 bit, and 12 bit in 16, lie below it, pictures that use their type far above
DARK = 0.05
PREVIEWS = 3  # at most so many maps are shown


@dataclass(frozen=True)
class PredictResult:
    """A finished prediction."""

    run_id: str
    experiment_id: str
    tracking_uri: str = field(repr=False)
    """The store's address, a password in it included; not shown in repr."""
    outputs: tuple[Path, ...]
    """The maps, those found finished included."""
    class_pixels: Mapping[str, int]
    """Pixels a class, in the maps written by this run; those without data are not in it."""
    metrics: Mapping[str, float]
    source_run_id: str | None = None
    """The run that made the model."""
    artifacts: str | None = None
    """Folder of the run's files, if it is on this machine."""
    job: str = "predict"


class _Unreadable(InputError):
    """The image turned out broken while it was read: what is done of its map is of no use."""


def predict(settings: PredictConfig, config: Config | None = None) -> PredictResult:
    """Write the class map of `settings.input` to `settings.output`; of several images, or a folder, a map of each.

    `config` brings the network's settings for a checkpoint that has none beside it. Raises InputError for what the user
    can mend, before a run is opened where it can be seen by then; of several images the bad ones are named at the end.
    """
    work = find_work(settings)
    device = _device(settings.accelerator)
    store = open_store(settings.tracking.uri, settings.tracking.experiment)
    model = load_model(settings.model, settings.domain, config, store, settings.source_prefix)
    model = _with_own_reading(model, settings)
    if len(work) == 1:
        _Scene.open(*work[0], model, settings)  # so that a bad file is told before a run is opened
    model.network.to(device)
    for folder in {output.parent for _, output in work}:
        folder.mkdir(parents=True, exist_ok=True)
    tags = {"dann.job": "predict", **({} if model.run_id is None else {"dann.source_run_id": model.run_id})}
    folder = Path(settings.tracking.folder)
    with tracked_run(store, settings.tracking.run_name, "predict", tags, folder, use_claimed=True) as run:
        _describe(run, settings)
        outcome = _predict_all(work, model, settings, device, run.run_id)
        _warn(outcome)
        _write_results(run, model, outcome)
        metrics = {"predict/maps": float(len(outcome.written)), "predict/pixels": float(outcome.pixels)}
        if outcome.pixels:
            metrics["predict/pixels_per_second"] = outcome.pixels / outcome.seconds
        run.log_metrics(metrics, step=0)
        if outcome.problems:
            shown = "\n".join(outcome.problems[:20])
            raise InputError(
                f"{len(outcome.problems)} of {len(work)} images have no map; the others are done. Mend these and start "
                f"again:\n{shown}"
            )
    artifacts = local_artifact_folder(store, run.run_id)
    return PredictResult(
        run.run_id, store.experiment_id, store.uri, tuple(output for _, output in work),
        dict(zip(model.class_names, outcome.counts[:-1].tolist(), strict=True)), metrics, model.run_id,
        None if artifacts is None else str(artifacts),
    )  # fmt: skip


def _device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("accelerator is 'gpu', but torch finds none here; give auto or cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _as_signed(reading: Reading) -> dict[str, Any]:
    """A reading in the signature of a map: what it says as before there was the choice is left out, so that maps of before are
    known as finished."""
    as_before = {"nodata_bands": "all", "unit": None}
    return {name: value for name, value in plain_reading(reading).items() if as_before.get(name, ...) != value}


def _with_own_reading(model: Model, settings: PredictConfig) -> Model:
    """The model, which reads images as the settings say where they say it."""
    changes: dict[str, Any] = {}
    if settings.bands is not None:
        if len(settings.bands) != model.in_channels:
            raise InputError(f"bands is {settings.bands}, but the model takes {model.in_channels}; name as many.")
        changes["bands"] = tuple(settings.bands)
    if settings.nodata_values is not None:
        changes["nodata"] = settings.nodata_values
    if settings.file_pixel_size is not None:
        if model.reading.pixel_size is None:
            raise InputError(
                f"file_pixel_size is {settings.file_pixel_size:g}, but the model was trained on pixels of any size, so it has no "
                "effect; leave it out."
            )
        changes["file_pixel_size"] = settings.file_pixel_size
    return dataclasses.replace(model, reading=dataclasses.replace(model.reading, **changes))


@dataclass(frozen=True)
class _Scene:
    """One image that is to be mapped: all that its header tells."""

    input: Path
    output: Path
    header: Header
    reading: Reading
    bands: list[int]
    grid: Grid
    factor: float
    """File pixels a pixel of the working grid."""
    size: tuple[int, int]
    """(height, width) of the working grid."""
    plan: Plan
    normalisation: Normalization
    facts: Mapping[str, Any]
    """All that its map depends on."""

    @classmethod
    def open(cls, source: Path, output: Path, model: Model, settings: PredictConfig) -> _Scene:
        """Raises InputError for an image that the model cannot take."""
        header = read_header(source)
        reading = model.reading
        # grey, or a palette, which has no fewer colours
        if header.bands == 1 and settings.bands is None and reading.bands == (1, 2, 3):
            reading = dataclasses.replace(reading, bands=None)
        bands = chosen_bands(source, header, reading, model.in_channels)
        check_type(source, header, reading)
        height, width = reading.grid_size(header, source)
        plan = plan_tiles(height, width, settings.tile_size, settings.shared, grid_stride(model.network))
        status = source.stat()
        # not the device: an interrupted map may be finished on another
        facts = {
            "model": model.digest, "input": str(source.resolve()), "input size": status.st_size,
            "input time": status.st_mtime_ns, "reading": _as_signed(reading),
            "normalisation": dataclasses.asdict(model.normalisation), "tile_size": settings.tile_size,
            "overlap": settings.shared, "batch_size": settings.batch_size, "probabilities": settings.probabilities,
        }  # fmt: skip
        return cls(
            source, output, header, reading, bands, read_grid(source), reading.factor(header, source), (height, width), plan,
            for_file(model.normalisation, reading, header), json.loads(json.dumps(facts)),
        )  # fmt: skip

    @property
    def signature(self) -> str:
        """32 hex digits of the facts."""
        return hashlib.blake2b(json.dumps(self.facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def partial_folder(self) -> Path:
        """Where what is done is kept until the map is whole."""
        return self.output.with_name(self.output.name + PARTIAL_SUFFIX)


@dataclass
class _Outcome:
    """What all images together gave."""

    counts: np.ndarray
    """(K + 1,) pixels a class, those without data last."""
    written: list[_Scene] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    """Images without data."""
    dark: list[Path] = field(default_factory=list)
    """Images of 16 bit that use little of them."""
    pixels: int = 0
    """Of the working grids, forwarded in this process."""
    seconds: float = 0.0


def _predict_all(
    work: Sequence[tuple[Path, Path]], model: Model, settings: PredictConfig, device: torch.device, run_id: str
) -> _Outcome:
    outcome = _Outcome(np.zeros(len(model.class_names) + 1, np.int64))
    start = time.perf_counter()
    with _progress(len(work), settings.progress) as show:
        for number, (source, output) in enumerate(work):
            try:
                scene = _Scene.open(source, output, model, settings)
                if _is_finished(scene, settings):
                    log.info("%s is finished already.", output)
                else:
                    with explain_out_of_memory(InputError, lambda plan=scene.plan: _smaller(plan, settings)):
                        for share in _predict_one(scene, model, settings, device, run_id, outcome):
                            show(number + share, source.name)
                    outcome.written.append(scene)
            except InputError as error:
                if len(work) == 1:
                    raise
                log.error("%s", error)
                outcome.problems.append(str(error))
            show(number + 1, source.name)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _smaller(plan: Plan, settings: PredictConfig) -> str:
    """What to do where memory runs out."""
    return (
        f"batch_size is {settings.batch_size}, with tiles of {plan.rows.tile} x {plan.columns.tile} pixels. Take a smaller "
        "batch_size, then a smaller tile_size, or accelerator cpu if this was a GPU."
    )


def _is_finished(scene: _Scene, settings: PredictConfig) -> bool:
    """Whether the map is there and made as it would be made now; one made otherwise is not touched."""
    if settings.overwrite or not scene.output.exists():
        return False
    if read_tags(scene.output).get(SIGNATURE_TAG) != scene.signature:
        raise InputError(
            f"{scene.output} exists and is not what these settings would give; remove it, or set overwrite to true."
        )
    return True


def _predict_one(
    scene: _Scene, model: Model, settings: PredictConfig, device: torch.device, run_id: str, outcome: _Outcome
) -> Iterator[float]:
    """Forward what is not done yet, then write the map; yields the share of the image that is done."""
    name, rows = scene.input.name, len(scene.plan.rows.starts)
    tiler = Tiler(
        model.network, scene.plan, len(model.class_names), settings.batch_size, device, settings.probabilities
    )
    with PartialMap(scene.partial_folder, scene.facts, settings.probabilities) as partial:
        done, carry, reason = partial.start()
        if reason is not None:
            log.info("%s: starting anew, as %s: %s.", name, partial.folder, reason)
        if carry is not None:
            log.info("%s: going on after %d of %d rows of tiles.", name, done, rows)
            tiler.carry.copy_(torch.from_numpy(carry))
        read = _Strips(scene, model)
        try:
            for row in range(done, rows):
                yield row / rows
                for piece in tiler.row(row, read):
                    partial.add(piece.ids, piece.probabilities)
                    outcome.pixels += piece.window.height * piece.window.width
                partial.checkpoint(row + 1, tiler.carry.cpu().numpy())
        except (RunKilled, KeyboardInterrupt):
            log.warning("What is done is kept in %s; the same command goes on from there.", partial.folder)
            raise
        except _Unreadable:
            partial.remove()
            raise
        counts = _write(scene, model, settings, partial, run_id)
        outcome.counts += counts
        partial.remove()
    if not counts[:-1].any():
        outcome.empty.append(scene.input)
    elif scene.header.dtype == "uint16" and read.mean() < DARK < np.mean(scene.normalisation.mean):
        outcome.dark.append(scene.input)


def _warn(outcome: _Outcome) -> None:
    """Say what may be wrong with maps that could be made."""
    for images, what in (
        (outcome.empty, "holds no data: every pixel is nodata, and so is every pixel of its map."),
        (
            outcome.dark,
            "uses little of the range of 16 bit, so the model sees it nearly black, unless it was trained on such images. If it "
            "was not, convert it to what the training images were.",
        ),
    ):
        if images:
            more = f" So it is with {len(images) - 1} more." if len(images) > 1 else ""
            log.warning("%s %s%s", images[0], what, more)


def _write(scene: _Scene, model: Model, settings: PredictConfig, partial: PartialMap, run_id: str) -> np.ndarray:
    """Pixels a class, (K + 1,)."""
    from dann_experiments import __version__

    tags = {
        "model": settings.model, "software": f"dann_experiments {__version__}", "dann_run_id": run_id,
        SIGNATURE_TAG: scene.signature,
    }  # fmt: skip
    names = model.class_names
    legend = Legend(names, class_colours(len(names)), tags)
    windows = list(scene.plan.pieces())
    if settings.probabilities:  # the class map is the last: where it is, all is
        path = probabilities_path(scene.output)
        write_probabilities(path, partial, windows, scene.size, scene.grid, scene.factor, legend)
    if scene.grid.crs is not None and scene.output.suffix.lower() not in TIFF_SUFFIXES:
        log.warning("%s is no GeoTIFF: where the image lies is not in it.", scene.output)
    return write_map(scene.output, partial, windows, scene.size, scene.grid, scene.factor, legend)


class _Strips:
    """Gives tiles out of larger parts of the image, each read once: of as many rows as fit, or of part of a row of tiles.

    The parts are the same for every process, so a resumed map is made of the same numbers even where reading resamples.
    """

    def __init__(self, scene: _Scene, model: Model) -> None:
        self.scene = scene
        self.model = model
        rows, columns = scene.plan.rows, scene.plan.columns
        pixel = model.in_channels * np.dtype(scene.header.dtype).itemsize
        self._rows_a_part = self._fitting(rows, columns.length * pixel)
        self._columns_a_part = len(columns.starts) if self._rows_a_part else self._fitting(columns, rows.tile * pixel)
        self._part: tuple[Window, np.ndarray, np.ndarray | None] | None = None
        self._sum, self._count = 0.0, 0

    def __call__(self, window: Window) -> tuple[Tensor, np.ndarray | None]:
        """Normalised image (B, h, w) of a tile, and where it holds data."""
        part, values, valid = self._holding(window)
        top, left = window.top - part.top, window.left - part.left
        box = (slice(top, top + window.height), slice(left, left + window.width))
        inside = None if valid is None else valid[box]
        return torch.from_numpy(self.scene.normalisation(values[:, *box], inside)), inside

    def mean(self) -> float:
        """Of the values with data so far, in 0..1 of the type's range, where `_add` counts them; NaN where it does not."""
        return self._sum / self._count / self.scene.normalisation.high[0] if self._count else float("nan")

    def _add(self, values: np.ndarray) -> None:
        if self.scene.header.dtype == "uint16" and self.scene.reading.scale == "type":
            self._sum += float(values.sum(dtype=np.float64))
            self._count += values.size

    @staticmethod
    def _fitting(axis: Axis, line: int) -> int:
        """How many tiles of the axis make a part; `line`: bytes of one row (or column) of pixels."""
        return max((STRIP_BYTES // line - axis.tile) // axis.step + 1, 0)

    def _holding(self, window: Window) -> tuple[Window, np.ndarray, np.ndarray | None]:
        plan = self.scene.plan
        rows = self._span(plan.rows, window.top, max(self._rows_a_part, 1))
        columns = self._span(plan.columns, window.left, max(self._columns_a_part, 1))
        part = Window(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])
        if self._part is None or self._part[0] != part:
            self._part = None  # the old part's memory is needed for the new one
            try:
                values, valid = read_pixels(self.scene.input, self.model.in_channels, self.scene.reading, part)
            except InputError as error:
                raise _Unreadable(str(error)) from None
            self._add(values if valid is None else values[:, valid])
            self._part = (part, values, valid)
        return self._part

    @staticmethod
    def _span(axis: Axis, start: int, count: int) -> tuple[int, int]:
        first = axis.starts.index(start) // count * count
        return axis.starts[first], axis.inside(min(first + count - 1, axis.last))[1]


@contextlib.contextmanager
def _progress(count: int, shown: bool) -> Iterator[Callable[[float, str], None]]:
    """A function (images done, the last one in part; name of the one in work) that shows how far all `count` are."""
    if shown and sys.stdout.isatty():
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with bar:
            task = bar.add_task("", total=count)
            yield lambda done, name: bar.update(task, completed=done, description=name)
        return
    told = 0

    def tell(done: float, name: str) -> None:
        nonlocal told
        tenths = int(10 * done / count + 1e-6)
        if shown and tenths > told:
            told = tenths
            log.info("%d %% (%s)", 10 * tenths, name)

    yield tell


def _describe(run: TrackedRun, settings: PredictConfig) -> None:
    """Params and `config.yaml`, without a password in the tracking store's address."""
    uri = settings.tracking.uri
    uri = None if uri is None else without_secrets(uri)
    tracking = dataclasses.replace(settings.tracking, uri=uri, experiment=run.store.experiment)
    settings = dataclasses.replace(settings, tracking=tracking)
    plain: Any = settings
    run.log_params(flatten(plain))
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(settings), sort_keys=False, width=120))


def _write_results(run: TrackedRun, model: Model, outcome: _Outcome) -> None:
    """The table of classes and the preview, into the run's folder."""
    path = run.folder / "tables" / "class_shares.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = max(int(outcome.counts[:-1].sum()), 1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "pixels", "share"])
        for name, pixels in zip(model.class_names, outcome.counts.tolist(), strict=False):
            writer.writerow([name, pixels, f"{pixels / seen:.6f}"])
        writer.writerow(["(no data)", int(outcome.counts[-1]), ""])
    if outcome.written:
        _draw_preview(run.folder / "figures" / "preview.png", outcome.written[:PREVIEWS], model)


def _draw_preview(path: Path, scenes: Sequence[_Scene], model: Model) -> None:
    """A row a map: the image beside it, both reduced to at most PREVIEW_SIDE pixels, and the legend."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = np.concatenate([class_colours(len(model.class_names)), np.zeros((1, 3))])  # no data in black
    figure = Figure(figsize=(12, 6 * len(scenes) + 0.8), layout="constrained")
    axes = figure.subplots(len(scenes), 2, squeeze=False)
    present: set[int] = set()
    for row, scene in zip(axes, scenes, strict=True):
        ids = read_decimated(scene.output, [1], PREVIEW_SIDE)[0]
        present |= set(np.unique(ids).tolist()) - {NODATA}
        row[0].imshow(_display(scene))
        row[0].set_title(scene.input.name, fontsize=10)
        row[1].imshow(colours[np.minimum(ids, len(model.class_names))], interpolation="nearest")
        row[1].set_title(scene.output.name, fontsize=10)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    handles = [
        Patch(facecolor=colours[index], edgecolor="#555555", label=model.class_names[index])
        for index in sorted(present)[:24]
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 8) or 1, fontsize=9, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _display(scene: _Scene) -> np.ndarray:
    """(h, w, 3) in 0..1 of the reduced image."""
    values = read_decimated(scene.input, scene.bands, PREVIEW_SIDE)
    if len(values) < len(scene.normalisation.low):  # one grey band among colour images
        values = values.repeat(len(scene.normalisation.low), axis=0)
    scaled = np.nan_to_num(scene.normalisation.scaled(values))
    return display_image(scaled, stretch=scene.header.dtype != "uint8")
