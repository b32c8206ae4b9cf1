"""Reads a job's run and experiment from MLflow's own environment variables."""

from __future__ import annotations

import logging
import os
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.names import Tag
from dann_experiments.tracking.deleted import is_deleted

log = logging.getLogger(__name__)
RUN_ID, EXPERIMENT_NAME, EXPERIMENT_ID = "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
DEFAULT_EXPERIMENT = "dann"
_told: set[str] = set()


def given_run(client: Any, run_id: str) -> Any | None:
    """Return the run that MLFLOW_RUN_ID names, if it waits for a job, as one created by `mlflow run` does. Return None, with a
    warning, for any other: the variable was then left over from something else, and its run must not be changed."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        why = "which the tracking store does not have"
    else:
        job = run.data.tags.get(Tag.JOB)
        if is_deleted(run):
            why = "a run that was deleted"
        elif run.info.status != "RUNNING":
            why = f"a run that is already {run.info.status}"
        elif job is not None:
            why = f"a run that already has a job ({job})"
        else:
            return run
    if run_id not in _told:
        _told.add(run_id)
        log.warning(
            "%s is %r, %s: it is ignored, and a new run is created. Remove the variable: unset %s",
            RUN_ID, run_id, why, RUN_ID,
        )  # fmt: skip
    return None


def wanted_experiment(client: Any, given: str | None) -> tuple[str, Any | None, str]:
    """Return the name of the experiment for new runs, the experiment (None if it does not exist), and the setting that named it:
    `given` (tracking.experiment), else MLFLOW_EXPERIMENT_NAME, else MLFLOW_EXPERIMENT_ID, else the default `dann`. Raises
    InputError for variables that contradict each other or the store."""
    from mlflow.exceptions import MlflowException

    name, number = (os.environ.get(variable, "").strip() for variable in (EXPERIMENT_NAME, EXPERIMENT_ID))
    if given is not None:
        return given, client.get_experiment_by_name(given), "tracking.experiment"
    if name:
        known = client.get_experiment_by_name(name)
        if number and known is not None and known.experiment_id != number:
            raise InputError(
                f"{EXPERIMENT_NAME} is {name!r}, whose id is {known.experiment_id}, but {EXPERIMENT_ID} is {number!r}; unset one "
                "of them, or set tracking.experiment."
            )
        return name, known, EXPERIMENT_NAME
    if number:
        try:
            known = client.get_experiment(number)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise InputError(
                f"{EXPERIMENT_ID} is {number!r}, which the tracking store does not have; unset it, or set tracking.experiment."
            ) from None
        return known.name, known, EXPERIMENT_ID
    return DEFAULT_EXPERIMENT, client.get_experiment_by_name(DEFAULT_EXPERIMENT), "tracking.experiment"
