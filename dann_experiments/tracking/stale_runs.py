"""Closes stale runs: the store shows them as running, but the process that wrote them is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dann_experiments.names import Tag
from dann_experiments.tracking.clock import Clock
from dann_experiments.tracking.processes import is_gone
from dann_experiments.tracking.store import Store, found_runs

RUNNING = "attributes.status = 'RUNNING'"


def close_stale_runs(
    store: Store,
    closed_by: str,
    also: Callable[[Mapping[str, str]], bool] = lambda tags: False,
    experiments: Sequence[str] | None = None,
) -> list[str]:
    """Close as KILLED the open runs whose process on this machine is gone (SIGKILL, power failure), and return their ids.

    `closed_by` is recorded in the tag `dann.closed_by`. `also`: returns whether a run with these tags is stale, too.
    `experiments`: ids of the experiments to search; None = the store's own. Raises MlflowException if the store does not answer.
    """
    closed = []
    wanted = [store.experiment_id] if experiments is None else list(experiments)
    for run in list(found_runs(store, wanted, RUNNING)):  # list first: closing a run changes the next pages of results
        process = run.data.tags.get(Tag.PROCESS)
        if (process is not None and is_gone(process)) or also(run.data.tags):
            close_stale_run(store, run.info.run_id, closed_by)
            closed.append(run.info.run_id)
    return closed


def close_stale_run(store: Store, run_id: str, closed_by: str) -> None:
    """Close one run as KILLED."""
    store.client.set_tag(run_id, Tag.CLOSED_BY, f"{closed_by}: its process was gone")
    clock = Clock(store.client.get_run(run_id).info.start_time)  # the machine's clock may have been set back since
    store.client.set_terminated(run_id, "KILLED", clock.now())
