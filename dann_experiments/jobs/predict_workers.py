"""Maps many images with the workers of a pool: one task per image."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dann_experiments.config import Config, InputError
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.jobs.prediction_model import device_of, options_of, prediction_model
from dann_experiments.prediction.mapping import Ended, MapMaker, Outcome
from dann_experiments.prediction.partial_map import wait_for
from dann_experiments.prediction.scene import partial_folder
from dann_experiments.reports.colors import class_colors
from dann_experiments.tracking.store import open_store
from dann_experiments.workers.pool import ATTEMPTS, Pool
from dann_experiments.workers.processes import STOP_SECONDS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One image to map, with what a worker needs for it."""

    source: Path
    output: Path
    settings: PredictConfig
    config: Config | None
    tags: Mapping[str, str]
    """Written into the metadata of the map."""
    digest: str
    """Digest of the model that the driver loaded."""
    is_resumed: bool = False
    """True if a worker died while it mapped the image."""
    threads: int | None = None
    """torch threads of the worker; None = as they are."""


def map_in_pool(pool: Pool, tasks: Sequence[Task], show: Callable[[float, str], None]) -> Iterator[Ended]:
    """Map the images of `tasks`; yield each as it ends. `show`: see `MapMaker.map_all`.

    An image whose worker died is given to another, which resumes from its finished rows of tiles; after the second death it
    counts as one that cannot be mapped.
    """
    waiting, resumed = deque(range(len(tasks))), set[int]()

    def ready() -> Iterator[tuple[int, Task]]:
        while waiting:
            number = waiting.popleft()
            yield number, replace(tasks[number], threads=pool.threads, is_resumed=number in resumed)

    done = 0
    for one in pool.run(ready):
        number = int(one.key)
        source = tasks[number].source
        if one.death is not None and one.deaths < ATTEMPTS:
            log.warning("The worker that mapped %s %s; another one resumes it.", source, one.death)
            waiting.appendleft(number)
            resumed.add(number)
            continue
        if one.death is not None:
            yield Ended(number, problem=f"{source}: the worker that mapped it {one.death}, {one.deaths} times.")
        elif one.error is not None:
            yield Ended(number, problem=one.error)
        else:
            outcome, seconds = one.result
            yield Ended(number, outcome, seconds)
        done += 1
        show(done, source.name)


def map_scene(task: Task) -> tuple[Outcome, float]:
    """Map one image, in a worker; return its results and the seconds that it took.

    Raises InputError if it cannot be mapped, or if the model changed since the driver loaded it.
    """
    start = time.perf_counter()
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    maker = _maker(task)
    if maker.model.digest != task.digest:
        raise InputError(f"model {task.settings.model} was replaced while images were mapped; start again.")
    if task.is_resumed:  # processes of a Ray machine that is gone may live on for some seconds
        wait_for(partial_folder(task.output), STOP_SECONDS)
    return maker.map_one(task.source, task.output), time.perf_counter() - start


_makers: dict[str, MapMaker] = {}
"""The maker of the latest prediction, by the text of its settings, so that a worker loads a model once."""


def _maker(task: Task) -> MapMaker:
    key = repr((task.settings, task.config, sorted(task.tags.items())))
    if key not in _makers:
        _makers.clear()
        device = device_of(task.settings.accelerator)
        store = open_store(task.settings.tracking.uri, task.settings.tracking.experiment, for_runs=False)
        model = prediction_model(task.settings, task.config, store)
        model.network.to(device)
        colors = class_colors(len(model.class_names))
        _makers[key] = MapMaker(model, options_of(task.settings), device, colors, task.tags)
    return _makers[key]
