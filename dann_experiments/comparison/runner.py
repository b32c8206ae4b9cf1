"""Runs the cells that are not there yet: processes that each do one run after another, source models before what needs them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dann_experiments.command_line import quiet_libraries
from dann_experiments.comparison.arms import PATH, Cell
from dann_experiments.config import Config, InputError, config_to_dict, replace
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.tracking.orphans import close_orphans
from dann_experiments.tracking.processes import (
    available_cores,
    become_worker,
    default_workers,
    how_it_ended,
    join_or_kill,
    prepare_workers,
    visible_gpus,
    worker_context,
)
from dann_experiments.tracking.store import Store, experiment_ids, newest_finished, without_secrets

log = logging.getLogger(__name__)
PRELOADED = "dann_experiments.comparison.preloaded"
ATTEMPTS = 2  # a run whose process died is tried once more


@dataclass
class Done:
    """What became of the cells."""

    run_ids: dict[int, str] = field(default_factory=dict)
    """Index of the cell -> its run."""
    reused: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    """Index of the cell -> why there is no run of it."""


def find_cells(cells: Sequence[Cell], store: Store) -> Done:
    """The cells' finished runs that the store has, whoever made them."""
    done = Done()
    experiments = experiment_ids(store)
    for index, cell in enumerate(cells):
        run_id = finished_run(store, cell.digest, experiments)
        if run_id is not None:
            done.run_ids[index] = run_id
            done.reused.add(index)
    return done


def run_cells(
    cells: Sequence[Cell],
    done: Done,
    store: Store,
    tracking: Mapping[str, Any],
    tags: Mapping[str, str],
    workers: int | None,
    logs: Path,
    decoded: Path | None = None,
) -> None:
    """Run what is missing and add it to `done`. `tracking`: the `tracking.*` settings of the runs; `tags` are added to theirs;
    in folder `decoded` they share decoded data. A run that fails is noted and the others go on; one whose process is killed is
    tried again.

    On SIGINT and SIGTERM (RunKilled) the processes are stopped: each closes its run as KILLED first.
    """
    missing = [index for index in range(len(cells)) if index not in done.run_ids]
    log.info("%d runs: %d are there, %d to be made.", len(cells), len(done.reused), len(missing))
    if not missing:
        return
    config = cells[0].config
    gpus = visible_gpus(config.trainer.accelerator)
    count = min(workers or default_workers(gpus), len(missing))
    share = max(1, available_cores() // count)
    log.info("%d at a time, %d threads each; what they print: %s", count, share, logs)
    with _progress(config, len(missing)) as advance, contextlib.closing(_Crew(count, gpus, logs, decoded)) as crew:
        _Shift(cells, done, store, dict(tracking), tags, share, advance).work(crew)


def finished_run(store: Store, digest: str, experiments: Sequence[str] | None = None) -> str | None:
    """The newest finished run with this digest, in any experiment of the store; `experiments`: their ids."""
    return newest_finished(store, {"dann.digest": digest}, experiments)


Task = tuple[str, dict[str, Any], dict[str, str]]  # job, settings, tags


class _Worker:
    """A process that does one run after another."""

    def __init__(self, gpu: str | None, logs: Path, decoded: Path | None) -> None:
        prepare_workers(PRELOADED)
        context: Any = worker_context()
        self.gpu = gpu
        self.cell: int | None = None
        """Index of what it is running."""
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, str(logs.resolve()), gpu, decoded, dict(os.environ)), name="comparison"
        )
        self.process.start()
        theirs.close()  # only the process holds it now, so that its death ends the connection


class _Crew:
    """Up to `count` workers, started when there is work for them; with GPUs, each has one."""

    def __init__(self, count: int, gpus: Sequence[str], logs: Path, decoded: Path | None) -> None:
        self._logs, self._decoded = logs, decoded
        self._free: list[str | None] = [gpus[index % len(gpus)] if gpus else None for index in range(count)]
        """The GPUs (None: no GPU) of the workers that may yet be started."""
        self.workers: list[_Worker] = []

    @property
    def has_room(self) -> bool:
        """Whether somebody can take a task."""
        return bool(self._free) or any(worker.cell is None for worker in self.workers)

    def give(self, index: int, task: Task) -> None:
        """Hand the task of a cell to an idle worker, or to a new one."""
        worker = next((worker for worker in self.workers if worker.cell is None), None)
        if worker is None:
            worker = _Worker(self._free.pop(0), self._logs, self._decoded)
            self.workers.append(worker)
        worker.cell = index
        with contextlib.suppress(BrokenPipeError):  # it died while idle: `next_ended` finds that
            worker.connection.send(task)

    def next_ended(self) -> list[tuple[int, tuple[str | None, str | None], str | None]]:
        """Wait for workers; cell, (run id, why it failed) and what ended the process, of those that are done with a cell."""
        ended = []
        busy = [worker for worker in self.workers if worker.cell is not None]
        ready = wait([worker.connection for worker in busy])
        for worker in busy:
            if worker.connection in ready:
                index, outcome, death = worker.cell, (None, None), None
                assert index is not None
                try:
                    outcome = worker.connection.recv()
                    worker.cell = None
                except (EOFError, OSError):
                    worker.process.join()
                    death = how_it_ended(worker.process.exitcode or 0)
                    self.workers.remove(worker)
                    self._free.append(worker.gpu)
                ended.append((index, outcome, death))
        return ended

    def close(self) -> None:
        """End all workers; those in the middle of a run close it as KILLED first."""
        for worker in self.workers:
            worker.connection.close()  # an idle one ends by that
            if worker.cell is not None:
                worker.process.terminate()
        join_or_kill(worker.process for worker in self.workers)
        self.workers.clear()


class _Shift:
    """Hands cells to workers as soon as what they start from is there."""

    def __init__(
        self, cells: Sequence[Cell], done: Done, store: Store, tracking: dict[str, Any], tags: Mapping[str, str], threads: int,
        advance: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.cells, self.done, self.store, self.tags = cells, done, store, dict(tags)
        self.changes = {f"tracking.{key}": value for key, value in tracking.items()}
        self.threads, self.advance = threads, advance
        self.running: set[int] = set()
        self.deaths: Counter[int] = Counter()

    def work(self, crew: _Crew) -> None:
        """Until nothing waits."""
        while True:
            for index in range(len(self.cells)):
                if crew.has_room and self._waits(index):
                    task = self._task(index)
                    if task is not None:
                        crew.give(index, task)
                        self.running.add(index)
            if not self.running:
                return
            for index, (run_id, reason), death in crew.next_ended():
                self.running.remove(index)
                if death is not None:
                    self._died(index, death)
                elif run_id is not None:
                    self.done.run_ids[index] = run_id
                    self.advance(f"{self._name(index)}: done")
                else:
                    self._failed(index, str(reason))

    def _waits(self, index: int) -> bool:
        return index not in self.running and index not in self.done.run_ids and index not in self.done.failed

    def _name(self, index: int) -> str:
        return f"{self.cells[index].arm.name}, seed {self.cells[index].seed}"

    def _died(self, index: int, how: str) -> None:
        self.deaths[index] += 1
        with contextlib.suppress(Exception):  # a store that does not answer: the next comparison closes it
            close_orphans(self.store, "compare")
        if self.deaths[index] < ATTEMPTS:
            log.warning("%s: its process %s; trying it again.", self._name(index), how)
        else:
            self._failed(index, f"its process {how}, {ATTEMPTS} times; fewer workers need less memory")

    def _failed(self, index: int, reason: str) -> None:
        self.done.failed[index] = reason
        log.error("%s failed: %s", self._name(index), reason)
        self.advance(f"{self._name(index)}: failed")

    def _task(self, index: int) -> Task | None:
        """What a process must be told; None while the source model is not there."""
        cell = self.cells[index]
        changes = self.changes | {"threads": min(cell.config.threads or self.threads, self.threads)}
        if cell.needs_source:
            source = next(
                i for i, other in enumerate(self.cells) if other.arm.kind == "source_only" and other.seed == cell.seed
            )
            if source in self.done.failed:
                self._failed(index, "its source model failed")
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
    return {"adapt": adapt, "evaluate": evaluate, "pretrain": pretrain}[job](config, tags=tags).run_id


def _work(
    connection: Connection, logs: str, gpu: str | None, decoded: Path | None, environment: dict[str, str]
) -> None:
    """The worker's side: runs until the parent closes the connection."""
    become_worker(str(Path(logs) / f"worker-{os.getpid()}.log"), environment)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    quiet_libraries()
    from dann_experiments.data.shared_cache import share
    from dann_experiments.jobs.source_model import keep_source_models

    share(decoded)
    keep_source_models()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task: Task = connection.recv()
            outcome: tuple[str | None, str | None]
            try:
                outcome = run_cell(*task), None
            except Exception as error:  # told as text: not every exception can be sent
                print(without_secrets(traceback.format_exc()), flush=True)
                reason = without_secrets(" ".join(str(error).split()))[:300]
                outcome = None, reason if isinstance(error, InputError) else f"{type(error).__name__}: {reason}"
            connection.send(outcome)


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
