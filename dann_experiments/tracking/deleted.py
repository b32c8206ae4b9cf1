"""Restores a run that was deleted in MLflow's pages while it was logging: MLflow accepts nothing for a deleted run."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)
DELETED = "deleted"
REFUSALS = ("INVALID_PARAMETER_VALUE", "INVALID_STATE")


def is_deleted(run: Any) -> bool:
    """Return whether a run of the store was deleted: it can be read, but not written."""
    return run.info.lifecycle_stage == DELETED


def restored(client: Any, run_id: str, refusal: Exception) -> bool:
    """Restore the run or its experiment if that was deleted, with a warning, and return whether that was the case.

    `refusal`: the error with which the store refused a request for the run. Raises the client's errors if the store does not
    answer or no longer has the run (`mlflow gc`)."""
    if getattr(refusal, "error_code", None) not in REFUSALS:  # do not ask a store that is away again
        return False
    run = client.get_run(run_id)
    if not is_deleted(run):
        return False
    experiment = client.get_experiment(run.info.experiment_id)
    if experiment.lifecycle_stage == DELETED:
        client.restore_experiment(experiment.experiment_id)
        log.warning(
            "Experiment %r was deleted while run %s was logging to it. The experiment and all its runs are restored, "
            "because nothing can be stored otherwise; delete it again when the run has ended (mlflow experiments delete "
            "--experiment-id %s).",
            experiment.name, run_id, experiment.experiment_id,
        )  # fmt: skip
    else:
        client.restore_run(run_id)
        log.warning(
            "Run %s was deleted while it was logging. It is restored and continues; to remove it, stop it (Ctrl-C), then delete "
            "it again.", run_id,
        )  # fmt: skip
    return True
