"""The parts that `predict` and `weak-labels` share: progress over images, and the settings of their run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import yaml

from dann_experiments.config import config_to_dict, flatten
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.config.weak_labels import WeakLabelsConfig
from dann_experiments.tracking.run import TrackedRun
from dann_experiments.tracking.store import without_secrets

log = logging.getLogger(__name__)
Settings = PredictConfig | WeakLabelsConfig


@contextlib.contextmanager
def show_progress(count: int, shown: bool) -> Iterator[Callable[[float, str], None]]:
    """Provide a function that shows progress, with arguments: images done (a float, up to `count`), name of the current image."""
    if shown and sys.stdout.isatty():
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with bar:
            task = bar.add_task("", total=count)
            yield lambda done, name: bar.update(task, completed=done, description=name)
        return
    reported = 0

    def report(done: float, name: str) -> None:
        nonlocal reported
        tenths = int(10 * done / count + 1e-6)
        if shown and tenths > reported:
            reported = tenths
            log.info("%d %% (%s)", 10 * tenths, name)

    yield report


def log_settings(run: TrackedRun, settings: Settings) -> None:
    """Log params and `config.yaml`, without a password in the tracking store's address."""
    uri = settings.tracking.uri
    uri = None if uri is None else without_secrets(uri)
    tracking = dataclasses.replace(settings.tracking, uri=uri, experiment=run.store.experiment)
    settings = dataclasses.replace(settings, tracking=tracking)
    run.log_params(flatten(cast(Any, settings)))
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(settings), sort_keys=False, width=120))
