"""Writes a model as an ONNX or torch.export file, runs such a file, and compares it with `predict`.

Letters: N images, B bands, K classes, h x w pixels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.config.errors import InputError
from dann_experiments.models.taps import evaluating
from dann_experiments.prediction.arrays import map_arrays
from dann_experiments.prediction.standalone import INPUT, OUTPUT, Standalone

OPSET = 18
"""Version of ONNX's operators, the lowest that torch's exporter writes directly; read by onnxruntime since 1.14."""
FACTS = "dann"
"""Name of the facts in an ONNX file's metadata; in a torch.export file, `dann.json` among its extra files."""
FARTHEST = 1e-4
"""Largest accepted difference between a probability of the file and that of `predict`. Seen: 1e-7 to 1e-5."""
MOST_POSITIONS = 1024
"""Largest size of images, in strides of the network, of a file for any size."""
Run = Callable[[np.ndarray], np.ndarray]
"""Maps stored values (N, B, h, w) float32 to probabilities (N, K, h, w) float32."""


class Difference(NamedTuple):
    """How far a file is from `predict` on the same images."""

    probability: float
    """Largest difference of a probability; NaN if the file returns NaN."""
    pixels: int
    """Pixels of another class; with a small difference, their two best classes are equally probable."""
    seen: int
    """Number of pixels compared."""


class Traced(NamedTuple):
    """The graph of a model."""

    program: torch.export.ExportedProgram
    shapes: Any
    """Which sides of the images are free, as `torch.export.export` takes it."""


def traced(standalone: Standalone, bands: int, tile_size: int | None, stride: int) -> Traced:
    """Return the graph of a model, for any number of images of `tile_size` pixels; None = of all multiples of `stride`.

    Raises InputError if the network cannot be traced so.
    """
    from torch.export import Dim

    sides: dict[int, Any] = {0: Dim("batch", min=1, max=4096)}
    if tile_size is None:
        for axis, name in ((2, "rows"), (3, "columns")):
            # 1 is left out: torch would make a separate graph for maps of one position
            sides[axis] = stride * Dim(name, min=2, max=MOST_POSITIONS)
    shapes = {INPUT: sides}
    height, width = (tile_size, tile_size) if tile_size is not None else (4 * stride, 6 * stride)
    example = torch.zeros(2, bands, height, width)  # a batch of 1 would be taken for a constant
    try:
        with torch.no_grad(), evaluating(standalone), _quiet():
            return Traced(torch.export.export(standalone, (example,), dynamic_shapes=shapes), shapes)
    except Exception as error:  # of many types, by what torch could not trace
        kept = "; set tile_size, such as 512, for images of one size" if tile_size is None else ""
        what = "images of any size" if tile_size is None else f"images of {tile_size} pixels"
        raise InputError(
            f"model: torch.export cannot trace this network for {what} ({first_line(error)}){kept}."
        ) from error


def write_onnx(graph: Traced, path: Path, facts: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write an ONNX file with `facts`, and `more` metadata, each value of which is written as JSON.

    Raises InputError if an operator of the network has no equivalent in ONNX.
    """
    import onnx

    try:
        with _quiet():
            made = torch.onnx.export(
                graph.program, dynamo=True, opset_version=OPSET, dynamic_shapes=graph.shapes,
                input_names=[INPUT], output_names=[OUTPUT],
                external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # of many types, by what torch could not translate
        raise InputError(
            f"model: this network cannot be written as ONNX ({first_line(error)}); set tile_size, if it is null, or write a .pt2 "
            "file."
        ) from error
    assert made is not None
    model = made.model_proto
    onnx.helper.set_model_props(model, {FACTS: json.dumps(facts)} | {key: json.dumps(more[key]) for key in more})
    onnx.save(model, path)


def write_pt2(graph: Traced, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a torch.export file with `facts` in it."""
    torch.export.save(graph.program, path, extra_files={f"{FACTS}.json": json.dumps(facts)})


def opened_onnx(path: Path) -> Run:
    """Return the function of an ONNX file, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: images})[0])


def opened_pt2(path: Path) -> Run:
    """Return the function of a torch.export file."""
    module = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run


def difference(run: Run, model: Model, images: Sequence[np.ndarray]) -> Difference:
    """Compare a file with `predict` on batches (N, B, h, w) of stored values as float32; `model` must be on the CPU."""
    farthest, pixels, seen = 0.0, 0, 0
    for batch in images:
        found = run(batch)
        expected = map_arrays(model, batch, tile_size=max(batch.shape[2:]), probabilities=True)
        farthest = float(np.maximum(farthest, np.abs(found - expected).max()))  # keeps NaN
        pixels += int((found.argmax(1) != expected.argmax(1)).sum())
        seen += expected[:, 0].size
    return Difference(farthest, pixels, seen)


def drawn_images(model: Model, sizes: Sequence[tuple[int, int, int]], patch: int) -> Iterator[np.ndarray]:
    """Yield a batch (N, B, h, w) per size (N, h, w), always the same: patches of even color, `patch` pixels wide, under noise.

    The values fill the range that the model maps to 0..1, and go a little beyond it.
    """
    rng = np.random.default_rng(0)
    low, high = (np.array(side)[:, None, None] for side in (model.normalisation.low, model.normalisation.high))
    for count, height, width in sizes:
        coarse = rng.random((count, model.in_channels, -(-height // patch), -(-width // patch)))
        values = coarse.repeat(patch, 2).repeat(patch, 3)[:, :, :height, :width]
        values = values + rng.normal(0, 0.1, values.shape)
        yield (low + values * (high - low)).astype(np.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporters, which report their own steps, deprecations and errors, which are raised as well."""
    names = ("torch.onnx", "torch.export", "torch._subclasses.fake_tensor", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 letters, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
