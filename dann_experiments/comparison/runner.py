"""Runs the cells that are not there yet: processes that each do one run after another, source models before what needs them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dann_experiments.command_line import quiet_libraries
from dann_experiments.comparison.arms import PATH, Cell
from dann_experiments.config import Config, InputError, config_to_dict, replace
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.tracking.processes import available_cores, become_worker, default_workers, visible_gpus
from dann_experiments.tracking.store import Store, without_secrets

log = logging.getLogger(__name__)
ATTEMPTS = 2  # a run whose process died is tried once more
STOP_SECONDS = 90.0  # a run that is being closed may wait a minute for its store


@dataclass
class Done:
    """What became of the cells."""

    run_ids: dict[int, str] = field(default_factory=dict)
    """Index of the cell -> its run."""
    reused: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    """Index of the cell -> why there is no run of it."""


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    tracking: Mapping[str, Any],
    tags: Mapping[str, str],
    workers: int | None,
    logs: Path,
) -> Done:
    """Find the cells' finished runs in the store, run what is missing. `tracking`: the `tracking.*` settings of the runs;
    `tags` are added to theirs. A run that fails is noted and the others go on.

    On SIGINT and SIGTERM (RunKilled) the processes are stopped: each closes its run as KILLED first.
    """
    done = Done()
    for index, cell in enumerate(cells):
        run_id = finished_run(store, cell.digest)
        if run_id is not None:
            done.run_ids[index] = run_id
            done.reused.add(index)
    missing = [index for index in range(len(cells)) if index not in done.run_ids]
    log.info("%d runs: %d are there, %d to be made.", len(cells), len(done.reused), len(missing))
    if not missing:
        return done
    config = cells[0].config
    gpus = visible_gpus(config.trainer.accelerator)
    count = min(workers or default_workers(gpus), len(missing))
    share = max(1, available_cores() // count)
    log.info("%d at a time, %d threads each; what they print: %s", count, share, logs)
    shift = _Shift(cells, done, store, dict(tracking), tags, share)
    with _progress(config, len(missing)) as advance:
        attempts = 0
        while shift.waiting() and attempts < ATTEMPTS:
            attempts += 1
            with _pool(count, gpus, logs) as pool:
                try:
                    shift.work(pool, advance)
                except BrokenProcessPool:
                    log.warning(
                        "A process was killed (by the kernel, where memory runs out?): trying what is left again."
                    )
    for index in shift.waiting():
        done.failed.setdefault(index, "its process was killed, twice; fewer workers need less memory")
    return done


def finished_run(store: Store, digest: str) -> str | None:
    """The newest finished run with this digest, in any experiment of the store."""
    experiments = [experiment.experiment_id for experiment in store.client.search_experiments()]
    wanted = f"tags.`dann.digest` = '{digest}' and attributes.status = 'FINISHED'"
    runs = store.client.search_runs(experiments, wanted, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


class _Shift:
    """Hands cells to processes as soon as what they start from is there."""

    def __init__(
        self, cells: Sequence[Cell], done: Done, store: Store, tracking: dict[str, Any], tags: Mapping[str, str], threads: int
    ) -> None:  # fmt: skip
        self.cells, self.done, self.store, self.tags = cells, done, store, dict(tags)
        self.changes = {f"tracking.{key}": value for key, value in tracking.items()}
        self.threads = threads

    def waiting(self) -> list[int]:
        """The cells that are neither done nor failed."""
        return [i for i in range(len(self.cells)) if i not in self.done.run_ids and i not in self.done.failed]

    def work(self, pool: ProcessPoolExecutor, advance: Callable[[str], None]) -> None:
        """Until nothing waits. Raises BrokenProcessPool if a process was killed."""
        running: dict[Future[str], int] = {}
        while True:
            for index in self.waiting():
                if index not in running.values():
                    task = self._task(index)
                    if task is not None:
                        running[pool.submit(run_cell, *task)] = index
            if not running:
                return
            ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                index = running.pop(future)
                cell = self.cells[index]
                what = f"{cell.arm.name}, seed {cell.seed}"
                try:
                    self.done.run_ids[index] = future.result()
                    advance(f"{what}: done")
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    reason = without_secrets(" ".join(str(error).split()))[:300]
                    self.done.failed[index] = f"{type(error).__name__}: {reason}"
                    log.error("%s failed: %s", what, self.done.failed[index])
                    advance(f"{what}: failed")

    def _task(self, index: int) -> tuple[str, dict[str, Any], dict[str, str]] | None:
        """What a process must be told; None while the source model is not there."""
        cell = self.cells[index]
        changes = self.changes | {"threads": min(cell.config.threads or self.threads, self.threads)}
        if cell.needs_source:
            source = next(
                i for i, other in enumerate(self.cells) if other.arm.kind == "source_only" and other.seed == cell.seed
            )
            if source in self.done.failed:
                self.done.failed[index] = "its source model failed"
            if source not in self.done.run_ids:
                return None
            changes[PATH] = f"runs:/{self.done.run_ids[source]}/model"
        changes["tracking.run_name"] = f"{cell.arm.name} seed {cell.seed}"
        tags = self.tags | {"dann.arm": cell.arm.name, "dann.kind": cell.arm.kind, "dann.digest": cell.digest}
        return cell.job, config_to_dict(replace(cell.config, changes)), tags


def run_cell(job: str, settings: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """One run, in a worker; returns its id."""
    from dann_experiments.jobs.adapt import adapt
    from dann_experiments.jobs.evaluate import evaluate
    from dann_experiments.jobs.pretrain import pretrain

    config: Config = config_from_dict(settings)
    print(f"{job}: {tags['dann.arm']}, seed {config.seed}", flush=True)
    run = {"adapt": adapt, "evaluate": evaluate, "pretrain": pretrain}[job]
    try:
        return run(config, tags=tags).run_id
    except InputError as error:
        raise RuntimeError(str(error)) from None  # plain, so that it can be sent to the parent


def _start_worker(logs: str, gpus: Any) -> None:
    become_worker(str(Path(logs) / f"worker-{os.getpid()}.log"))
    if not gpus.empty():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    quiet_libraries()


@contextlib.contextmanager
def _pool(count: int, gpus: Sequence[str], logs: Path) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    for index in range(count if gpus else 0):
        queue.put(gpus[index % len(gpus)])
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, context, _start_worker, (str(logs.resolve()), queue))
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _progress(config: Config, total: int) -> Iterator[Callable[[str], None]]:
    """Tells how far it is: a bar on a terminal, else a line a run."""
    if not (config.trainer.enable_progress_bar and sys.stdout.isatty()):
        ended = 0

        def line(what: str) -> None:
            nonlocal ended
            ended += 1
            if config.trainer.enable_progress_bar:
                print(f"{ended}/{total} runs  {what}", flush=True)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bars:
        task = bars.add_task("comparing", total=total)
        yield lambda what: bars.update(task, advance=1, description=what)
