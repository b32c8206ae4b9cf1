"""Writes a trained model as one file that runs without this project, and checks it."""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.config import Config, InputError
from dann_experiments.config.atomic_write import writing
from dann_experiments.config.export import ONNX, ExportConfig
from dann_experiments.config.extras import install_command
from dann_experiments.config.paths import local_path
from dann_experiments.jobs.load_model import load_model
from dann_experiments.prediction import standalone_files as files
from dann_experiments.prediction.standalone import Standalone, centimeters, deepness_facts, facts_of, stride_of
from dann_experiments.prediction.standalone_files import first_line
from dann_experiments.tracking.store import open_store

log = logging.getLogger(__name__)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the extra `export` installs."""


@dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    output: Path
    tile_size: int | None
    """Side of the images that it takes, in pixels; None = any multiple of `multiple_of`."""
    multiple_of: int
    difference: files.Difference
    """How far the file is from `predict` on drawn images."""
    job: str = "export"


def export(settings: ExportConfig, config: Config | None = None) -> ExportResult:
    """Write the model of `settings` to `settings.output`, run the file once, and compare it with `predict`.

    `config`: the network's settings, for a checkpoint that is stored without them. No run is made. Raises InputError for errors
    that the user can correct, for a network that cannot be exported, and for a file that differs from `predict`, which is then
    removed.
    """
    from dann_experiments import __version__

    output = _checked_output(settings)
    if settings.suffix == ONNX:
        _check_packages()
    # neither a run nor an experiment: nothing but the model is read
    store = open_store(settings.tracking.uri, settings.tracking.experiment, for_runs=False, to_write=False)
    model = load_model(settings.model, settings.domain, config, store, settings.source_prefix)
    stride, tile = stride_of(model), settings.tile_size
    if tile is not None and tile % stride:
        nearest = math.ceil(tile / stride) * stride
        raise InputError(f"tile_size is {tile}, but this network needs a multiple of {stride}, such as {nearest}.")
    graph = files.traced(Standalone(model, tile is None), model.in_channels, tile, stride)
    facts = facts_of(model, settings.domain, tile, f"dann_experiments {__version__}")
    part = output.with_name(f"{output.stem}.partial{output.suffix}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output, part):
        if settings.suffix == ONNX:
            more = deepness_facts(facts, settings.resolution or centimeters(model))
            files.write_onnx(graph, part, facts | {"opset": files.OPSET}, more)
        else:
            files.write_pt2(graph, part, facts)
        found = _compared(part, model, tile, stride)
        part.replace(output)
    return ExportResult(output, tile, stride, found)


def _compared(path: Path, model: Model, tile: int | None, stride: int) -> files.Difference:
    """Return how far the file is from `predict`. Raises InputError if it is too far."""
    sizes = [(1, tile, tile)] if tile is not None else [(1, 2 * stride, 7 * stride), (3, 5 * stride, 3 * stride)]
    images = list(files.drawn_images(model, sizes, stride))
    try:
        run = (files.opened_onnx if path.suffix.lower() == ONNX else files.opened_pt2)(path)
        found = files.difference(run, model, images)
    except Exception as error:  # of many types, by what the runtime lacks
        sides = ", ".join(f"{height} x {width}" for _, height, width in sizes)
        kept = "set tile_size, such as 512, for images of one size, or " if tile is None else ""
        raise InputError(
            f"the exported file was removed, as it fails on images of {sides} pixels ({first_line(error)}); {kept}try the other "
            "format."
        ) from error
    if not found.probability <= files.FARTHEST:  # also for NaN
        raise InputError(
            f"the exported file was removed, as its probabilities differ from those of predict by up to {found.probability:.2g} "
            f"(accepted: {files.FARTHEST:g}), and the class of {found.pixels} of {found.seen} pixels. Try the other format, or "
            "another version of torch and onnxruntime."
        )
    return found


def _checked_output(settings: ExportConfig) -> Path:
    output = local_path(settings.output, "output")
    if output.is_dir():
        raise InputError(f"output is {output}, which is a folder; give a file.")
    if output.exists() and not settings.overwrite:
        raise InputError(f"output {output} exists; name another, or set overwrite to true.")
    return output


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"output is an ONNX file, which needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            f"{install_command('export')}, or name a .pt2 file as output."
        )
