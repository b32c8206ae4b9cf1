"""The model of `predict` and its options, for the job and for its workers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.config import Config, InputError
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.jobs.load_model import load_model
from dann_experiments.prediction.scene import Options
from dann_experiments.prediction.vector_file import VectorOptions
from dann_experiments.tracking.store import Store


def prediction_model(settings: PredictConfig, config: Config | None, store: Store) -> Model:
    """Load the model that the settings name, with the reading options that they override; `config`: see `predict`."""
    model = load_model(settings.model, settings.domain, config, store, settings.source_prefix)
    return _with_own_reading(model, settings)


def options_of(settings: PredictConfig) -> Options:
    """Return the options for making maps."""
    return Options(
        settings.side, settings.shared, settings.tiles_at_a_time, settings.probabilities, settings.overwrite,
        settings.tta, settings.test_batchnorm, settings.confidence, settings.stac, settings.stac_datetime, settings.vector,
        VectorOptions(settings.min_area, settings.simplify), own_bands=settings.bands is not None,
        most_pixels=settings.most_pixels,
    )  # fmt: skip


def device_of(accelerator: str) -> torch.device:
    """Return the device to compute on. Raises InputError for a GPU that is not there."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("accelerator is 'gpu', but torch finds no GPU on this machine; use auto or cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _with_own_reading(model: Model, settings: PredictConfig) -> Model:
    """Return the model with the reading options that the settings override."""
    changes: dict[str, Any] = {}
    if settings.bands is not None:
        if len(settings.bands) != model.in_channels:
            raise InputError(f"bands is {settings.bands}, but the model needs {model.in_channels}; name as many.")
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
