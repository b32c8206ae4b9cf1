"""Makes a run's network a model of MLflow's: an MLmodel file beside the weights, and an entry on MLflow's Models page.

The files lie once, with the logged model (`models/m-ID/artifacts` of the experiment); MLflow shows them in the run under `model`
as well, and `runs:/ID/model`, `models:/m-ID` and a registered model all lead there. Nothing in them is pickled.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dann_experiments.checkpoints.mlmodel import LOADER_MODULE, MLMODEL
from dann_experiments.tracking.spool import Point
from dann_experiments.tracking.store import Store, found_runs

log = logging.getLogger(__name__)
MODEL = "model"
"""Name of the logged model, and of its folder in the run's folder."""
FACTS = "logged_model.json"
"""What the store has to know of the model, in the run's folder until it is sent."""
MODEL_TYPE = "segmentation"
RUNS_ASKED = 100  # per request
CHECK = "warn_dependency_requirement_mismatches"
REQUIREMENTS = (
    "numpy",
    "pyyaml",
    "rasterio",
    "safetensors",
    "segmentation-models-pytorch",
    "timm",
    "torch",
    "torchvision",
)
"""Packages that loading a model needs besides this one, which has no public index to come from."""


@dataclass(frozen=True)
class Interface:
    """What the model takes and gives."""

    in_channels: int
    dtype: str
    """Type of the raw pixel values, such as uint8."""
    parameters: Mapping[str, Any]
    """Parameters of predict with their defaults."""
    example: np.ndarray
    """(1, B, h, w), raw values of `dtype`."""


@dataclass(frozen=True)
class ModelScore:
    """A final score of the model and the data set that it belongs to."""

    point: Point
    dataset: str
    digest: str


def write_mlmodel(folder: Path, run_id: str, interface: Interface) -> None:
    """Write MLmodel, requirements and the example into `folder`, which holds the saved network."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    kinds = {str: "string", int: "long"}
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(interface.dtype), (-1, interface.in_channels, -1, -1))]),
        Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1))]),
        ParamSchema([ParamSpec(key, kinds[type(value)], value) for key, value in interface.parameters.items()]),
    )
    installed = [f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS]
    with tempfile.TemporaryDirectory(dir=folder.parent) as made, _quiet():
        mlflow.pyfunc.save_model(
            f"{made}/m", loader_module=LOADER_MODULE, mlflow_model=Model(run_id=run_id), signature=signature,
            input_example=interface.example, pip_requirements=installed,
        )  # fmt: skip
        for file in Path(made, "m").iterdir():
            shutil.move(file, folder / file.name)
    description = Model.load(str(folder))
    description.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    description.save(str(folder / MLMODEL))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let MLflow say nothing in the block of steps that mean nothing to a user, and not check the requirements against what is
    installed: they are what is installed, and MLflow would look at every file of the environment for that."""
    from mlflow.utils import environment

    logger = logging.getLogger("mlflow.pyfunc")
    before, check = logger.level, getattr(environment, CHECK, None)
    logger.setLevel(logging.WARNING)
    if check is not None:  # else another version of MLflow, which may do without
        setattr(environment, CHECK, lambda requirements: None)
    try:
        yield
    finally:
        logger.setLevel(before)
        if check is not None:
            setattr(environment, CHECK, check)


def write_facts(
    folder: Path, experiment_id: str, step: int, params: Mapping[str, str], tags: Mapping[str, str],
    scores: Sequence[ModelScore],
) -> None:  # fmt: skip
    """Write what `send_model` needs into the run's folder. `step`: the step of the weights; `params` and `tags`: the model's."""
    facts = {
        "experiment_id": experiment_id, "step": step, "params": dict(params), "tags": dict(tags),
        "scores": [[*score.point, score.dataset, score.digest[:36]] for score in scores],
    }  # fmt: skip
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def send_model(client: Any, run_id: str, folder: Path) -> None:
    """Store the model in `folder`, a run's folder, as the run's logged model; on a server of MLflow 2, which has none, among the
    run's own files. Sending it again changes nothing."""
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    model = logged_model(client, facts["experiment_id"], run_id)
    if model is None:
        try:
            model = client.create_logged_model(
                facts["experiment_id"], MODEL, run_id, tags=facts["tags"], params=facts["params"], model_type=MODEL_TYPE
            )
        except MlflowException as error:
            if not knows_no_models(error):
                raise
            log.warning(
                "The server has no logged models (MLflow 2): the model is kept among the run's own files, model/."
            )
            client.log_artifacts(run_id, str(folder / MODEL), MODEL)
            return
    described = Model.load(str(folder / MODEL / MLMODEL))
    described.model_id = model.model_id
    described.save(str(folder / MODEL / MLMODEL))
    client.log_model_artifacts(model.model_id, str(folder / MODEL))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, facts["step"])])
    scores = [
        Metric(key, value, timestamp, step, model.model_id, dataset, digest, run_id)
        for key, value, timestamp, step, dataset, digest in facts["scores"]
    ]
    if scores:
        client.log_batch(run_id, metrics=scores)


def logged_model(client: Any, experiment_id: str, run_id: str) -> Any | None:
    """Return the logged model of a run; None if it has none, as runs of older versions."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", max_results=10)
    except MlflowException as error:
        if not knows_no_models(error):
            raise
        return None
    return next((model for model in found if model.name == MODEL), None)


def knows_no_models(error: BaseException) -> bool:
    """Return whether the error is the answer of a server of MLflow 2, which has runs but no logged models."""
    return "/mlflow/logged-models" in str(error) and "error code 404" in str(error)


def models_without_run(store: Store, experiments: Sequence[str]) -> list[str]:
    """Return the ids of our models in these experiments whose run was deleted, or is gone from the store."""
    from mlflow.exceptions import MlflowException

    models, token = {}, None
    while experiments:
        try:
            page = store.client.search_logged_models(list(experiments), f"name = '{MODEL}'", page_token=token)
        except MlflowException as error:
            if not knows_no_models(error):
                raise
            return []
        ours = (model for model in page if model.model_type == MODEL_TYPE and model.source_run_id)
        models |= {model.model_id: model.source_run_id for model in ours}
        token = page.token
        if not token:
            break
    wanted = sorted(set(models.values()))
    alive: set[str] = set()
    for start in range(0, len(wanted), RUNS_ASKED):
        listed = ", ".join(f"'{run_id}'" for run_id in wanted[start : start + RUNS_ASKED])
        alive |= {run.info.run_id for run in found_runs(store, experiments, f"attributes.run_id IN ({listed})")}
    return [model_id for model_id, run_id in models.items() if run_id not in alive]
