"""Makes the missing runs of a comparison, source models before the runs that start from them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dann_experiments.command_line import quiet_libraries
from dann_experiments.comparison.arms import Cell
from dann_experiments.config import Config, config_to_dict, replace
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.data.shared_cache import share
from dann_experiments.jobs.adapt import adapt
from dann_experiments.jobs.evaluate import evaluate
from dann_experiments.jobs.evaluate_weak_labels import evaluate_weak_labels
from dann_experiments.jobs.identity import run_name
from dann_experiments.jobs.pretrain import pretrain
from dann_experiments.jobs.source_model import keep_source_models
from dann_experiments.names import Job, Key, Tag
from dann_experiments.tracking.stale_runs import close_stale_runs
from dann_experiments.tracking.store import Store, experiment_ids, newest_finished
from dann_experiments.workers.pool import ATTEMPTS, Ended, Pool
from dann_experiments.workers.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class Done:
    """The results of the cells."""

    run_ids: dict[int, str] = field(default_factory=dict)
    """Index of the cell -> id of its run."""
    reused: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    """Index of the cell -> reason why it has no run."""


@dataclass(frozen=True)
class Task:
    """A run to make, as sent to a worker."""

    job: str
    settings: Mapping[str, Any] = field(repr=False)  # the store's address may hold a password
    tags: Mapping[str, str]
    decoded: Path | None
    """Folder in which the workers share their decoded data; None = each has its own."""


def find_cells(cells: Sequence[Cell], store: Store) -> Done:
    """Find the finished runs of the cells in the store, made by this or any other comparison."""
    done = Done()
    experiments = experiment_ids(store)
    for index, cell in enumerate(cells):
        run_id = finished_run(store, cell.digest, experiments)
        if run_id is not None:
            done.run_ids[index] = run_id
            done.reused.add(index)
    return done


def finished_run(store: Store, digest: str, experiments: Sequence[str] | None = None) -> str | None:
    """Return the newest finished run with this digest; `experiments`: ids to search, None = all of the store."""
    return newest_finished(store, {Tag.DIGEST: digest}, experiments)


def run_cells(
    cells: Sequence[Cell],
    done: Done,
    store: Store,
    tracking: Mapping[str, Any],
    tags: Mapping[str, str],
    pool: Pool,
    decoded: Path | None = None,
) -> None:
    """Make the missing runs and add them to `done`.

    `tracking`: the `tracking.*` settings of the runs; `tags`: additional tags of the runs; `decoded`: folder in which workers
    share decoded data. A failed run is recorded and the others continue; a run whose process was killed is made once more. On
    SIGINT and SIGTERM the workers close their runs as KILLED and stop.
    """
    missing = len(cells) - len(done.run_ids)
    threads = min(cells[0].config.threads or pool.threads, pool.threads)
    place = f"{pool.logs}, later in the run's logs" if pool.logs else "Ray's logs"
    log.info("%d at a time, threads of each: %d; their output: %s", pool.count, threads, place)
    try:
        with Progress("comparing", missing, cells[0].config.trainer.enable_progress_bar) as progress:
            _Scheduler(cells, done, store, tracking, tags, pool, decoded, progress).work()
    finally:
        pool.stop()


class _Scheduler:
    """Gives cells to the pool as soon as the source model that they start from exists."""

    def __init__(
        self, cells: Sequence[Cell], done: Done, store: Store, tracking: Mapping[str, Any], tags: Mapping[str, str], pool: Pool,
        decoded: Path | None, progress: Progress,
    ) -> None:  # fmt: skip
        self.cells, self.done, self.store, self.tags = cells, done, store, dict(tags)
        self.pool, self.decoded, self.progress = pool, decoded, progress
        self.changes = {f"tracking.{key}": value for key, value in tracking.items()}
        self.missing, self.ended = len(cells) - len(done.run_ids), 0

    def work(self) -> None:
        """Run until nothing is left to do."""
        for ended in self.pool.run(self._ready):
            index = int(ended.key)
            if ended.death is not None:
                self._died(index, ended)
            elif ended.error is not None:
                self._failed(index, ended.error)
            else:
                self.done.run_ids[index] = ended.result
                self._show(index, "done")

    def _ready(self) -> Iterator[tuple[int, Task]]:
        """Yield the cells that can start now, each with its task."""
        for index, cell in enumerate(self.cells):
            if index in self.pool.running or index in self.done.run_ids or index in self.done.failed:
                continue
            changes: dict[str, Any] = {}
            if cell.needs_source:
                source = self._source_of(cell)
                if source in self.done.failed:
                    self._failed(index, "its source model failed")
                if source not in self.done.run_ids:
                    continue
                changes[Key.SOURCE_MODEL] = f"runs:/{self.done.run_ids[source]}/model"
            yield index, self._task(cell, changes)

    def _source_of(self, cell: Cell) -> int:
        sources = ((index, one) for index, one in enumerate(self.cells) if one.arm.kind == "source_only")
        return next(index for index, one in sources if one.seed == cell.seed)

    def _task(self, cell: Cell, changes: dict[str, Any]) -> Task:
        threads = min(cell.config.threads or self.pool.threads, self.pool.threads)
        name = run_name(cell.job, cell.config, cell.arm.name)
        changes |= self.changes | {"threads": threads, "tracking.run_name": name}
        return Task(cell.job, config_to_dict(replace(cell.config, changes)), self._tags(cell), self.decoded)

    def _tags(self, cell: Cell) -> dict[str, str]:
        return self.tags | {Tag.ARM: cell.arm.name, Tag.KIND: cell.arm.kind, Tag.DIGEST: cell.digest}

    def _died(self, index: int, ended: Ended) -> None:
        tags = self._tags(self.cells[index])

        def is_its_run(found: Mapping[str, str]) -> bool:  # by tags: its worker may have been on another machine
            return tags.items() <= found.items()

        with contextlib.suppress(Exception):  # if the store does not answer, the next comparison closes the run
            close_stale_runs(self.store, "compare", is_its_run)
        if ended.deaths < ATTEMPTS:
            log.warning("%s: its process %s; trying it again.", self._name(index), ended.death)
        else:
            self._failed(
                index, f"its process {ended.death}, {ATTEMPTS} times; try fewer workers, which need less memory"
            )

    def _failed(self, index: int, reason: str) -> None:
        self.done.failed[index] = reason
        log.error("%s failed: %s", self._name(index), reason)
        self._show(index, "failed")

    def _show(self, index: int, outcome: str) -> None:
        self.ended += 1
        state = f"{self.ended} of {self.missing} runs"
        self.progress.ended(f"{self._name(index)}: {outcome}", state)
        self.progress.update(self.ended, state)

    def _name(self, index: int) -> str:
        return f"{self.cells[index].arm.name}, seed {self.cells[index].seed}"


def run_task(task: Task) -> str:
    """Make one run, in a worker, and return its id."""
    _prepare(task.decoded)
    config: Config = config_from_dict(task.settings)
    print(f"{task.job}: {task.tags['dann.arm']}, seed {config.seed}", flush=True)
    jobs = {Job.ADAPT: adapt, Job.EVALUATE: evaluate, Job.PRETRAIN: pretrain}
    job = evaluate_weak_labels if task.tags[Tag.KIND] == "masks" else jobs[task.job]
    return job(config, tags=task.tags).run_id


@functools.cache  # once per worker
def _prepare(decoded: Path | None) -> None:
    quiet_libraries()

    share(decoded)
    keep_source_models()
