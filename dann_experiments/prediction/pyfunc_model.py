"""What MLflow loads and serves: a saved model as a `python_function`, over its folder of safetensors and JSON.

`mlflow.pyfunc.load_model` imports this module, which the model's MLmodel file names, and calls `_load_pyfunc`. The package must
therefore be installed where a model is loaded or served.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from dann_experiments.checkpoints.saved_model import default_domain, read_model_notes
from dann_experiments.checkpoints.trained_model import Model, noted_model
from dann_experiments.config.errors import InputError
from dann_experiments.models.symmetries import checked_tta
from dann_experiments.prediction.arrays import TILE_SIZE, map_arrays

CLASSES, PROBABILITIES = "classes", "probabilities"
DEFAULTS: Mapping[str, Any] = {"output": CLASSES, "domain": "", "tile_size": TILE_SIZE, "nodata": "", "tta": "none"}
"""Parameters of `predict`, with their defaults; an empty domain is the target, if the model was trained with one."""


class RefusedInput(InputError, MlflowException):
    """A parameter or an array that does not fit. As an error of MLflow's, so that a service answers its message with status 400
    instead of a stack trace."""

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


class SegmentationModel:
    """A saved model that predicts arrays of raw pixel values."""

    def __init__(self, folder: Path) -> None:
        notes = read_model_notes(folder)
        if notes is None:
            raise InputError(f"{folder} holds no saved model (config.json and dann.json).")
        self.folder, self.notes = folder, notes
        self._models: dict[str, Model] = {}

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Return the class map of each image; see `_predicted`. Raises RefusedInput, an InputError, for what does not fit."""
        try:
            return self._predicted(model_input, params)
        except InputError as error:
            raise RefusedInput(str(error)) from None

    def _predicted(self, model_input: Any, params: Mapping[str, Any] | None) -> np.ndarray:
        """Return the class map of each image, (N, h, w) uint8, 255 where there is no data.

        `model_input`: (N, B, h, w), values as an image file stores them, of any size. `params`: `output`, "classes" or
        "probabilities", (N, K, h, w) float32, 0 where there is no data; `domain`, source or target: which domain the images are
        like; `tile_size` in pixels; `nodata`: values that mean "no data", such as "0" or "0,255"; `tta`, none, mirror or d4: map
        the mean of the predictions for 1, 2 or 8 copies of each image. Raises InputError for parameters and arrays that do not
        fit.
        """
        given = {**DEFAULTS, **(params or {})}
        if unknown := given.keys() - DEFAULTS.keys():
            raise InputError(f"there is no parameter {sorted(unknown)[0]!r}; there are {', '.join(DEFAULTS)}.")
        if given["output"] not in (CLASSES, PROBABILITIES):
            raise InputError(f"output is {given['output']!r}; give {CLASSES} or {PROBABILITIES}.")
        model = self._model(given["domain"] or default_domain(self.notes))
        images = np.asarray(model_input)
        tile_size, nodata = int(given["tile_size"]), _numbers(str(given["nodata"]))
        tta = checked_tta(str(given["tta"]))
        return map_arrays(model, images, tile_size, nodata, probabilities=given["output"] == PROBABILITIES, tta=tta)

    def _model(self, domain: str) -> Model:
        if domain not in self._models:
            self._models[domain] = noted_model(self.folder, self.notes, str(self.folder), domain)
        return self._models[domain]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"nodata is {text!r}; give numbers, such as 0 or 0,255.") from None


def _load_pyfunc(path: str) -> SegmentationModel:
    """Return the model in the folder `path`; MLflow calls this by its name."""
    return SegmentationModel(Path(path))
