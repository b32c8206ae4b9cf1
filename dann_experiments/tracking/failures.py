"""Messages for errors that neither the user nor this package has caused: a full disk, a store that does not answer."""

from __future__ import annotations

from dann_experiments.config.atomic_write import explained_disk_error
from dann_experiments.config.errors import InputError, NotWritten, StoreAway
from dann_experiments.names import Job
from dann_experiments.tracking.store import in_one_line

_RESUMABLE = (Job.ADAPT, Job.PRETRAIN)  # jobs whose runs continue with --resume


def explained(error: BaseException) -> InputError | None:
    """Return a message for an error of a disk or of the tracking store; None for any other error."""
    answer = explained_disk_error(error)
    if answer is not None or not of_the_store(error):
        return answer
    return StoreAway(f"the tracking store does not answer a request: {in_one_line(error)}.")


def explained_in_run(error: BaseException, run_id: str, job: str | None) -> InputError | None:
    """Return `explained` for an error that ended a run, with how to continue; None if the error itself explains enough."""
    if isinstance(error, InputError) and not isinstance(error, (NotWritten, StoreAway)):
        return None
    found = explained(error)
    if found is None:
        return None
    return type(found)(f"{found} When that is fixed (free some space, make it writable), {way_on(run_id, job)}")


def way_on(run_id: str, job: str | None) -> str:
    """Return how to go on with a job whose run `run_id` was ended."""
    if job == Job.SWEEP:
        return "resume its study (`dann-sweep resume`)"
    return f"resume: dann {job} --resume {run_id}" if job in _RESUMABLE else f"run {job} again"


def of_the_store(error: BaseException) -> bool:
    """Return whether the store could not be reached or its database refused, as opposed to a wrong request."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return error.error_code == "TEMPORARILY_UNAVAILABLE" or str(error).startswith("API request to")
    return isinstance(error, OperationalError)
