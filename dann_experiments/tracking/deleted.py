"""Brings a run back that somebody deleted in the store's pages while it was logging: MLflow takes nothing for a deleted run."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)
DELETED = "deleted"
REFUSALS = ("INVALID_PARAMETER_VALUE", "INVALID_STATE")


def is_deleted(run: Any) -> bool:
    """Whether a run of the store was deleted: it can be looked at, but not written."""
    return run.info.lifecycle_stage == DELETED


def restored(client: Any, run_id: str, refusal: Exception) -> bool:
    """Restore the run, and its experiment, if they were deleted and `refusal` is what the store says then, with a warning;
    whether that was so. Raises what the client raises where the store does not answer, or has the run no longer (`mlflow gc`)."""
    if getattr(refusal, "error_code", None) not in REFUSALS:  # a store that is away is not asked again
        return False
    run = client.get_run(run_id)
    if not is_deleted(run):
        return False
    experiment = client.get_experiment(run.info.experiment_id)
    if experiment.lifecycle_stage == DELETED:
        client.restore_experiment(experiment.experiment_id)
        log.warning(
            "Experiment %r was deleted while run %s was logging to it. It is restored, and all its runs with it, as nothing can "
            "be kept otherwise; delete it again when the run has ended (mlflow experiments delete --experiment-id %s).",
            experiment.name, run_id, experiment.experiment_id,
        )  # fmt: skip
    else:
        client.restore_run(run_id)
        log.warning(
            "Run %s was deleted while it was logging. It is restored and goes on; to be rid of it, stop it (Ctrl-C), then delete "
            "it again.", run_id,
        )  # fmt: skip
    return True
