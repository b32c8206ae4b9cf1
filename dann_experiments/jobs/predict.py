"""Makes class maps of a raster of any size, or of many images, in a separate run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dann_experiments.checkpoints.trained_model import Model
from dann_experiments.config import Config, InputError
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.jobs.many_images import log_settings, show_progress
from dann_experiments.jobs.predict_workers import Task, map_in_pool, map_scene
from dann_experiments.jobs.prediction_model import device_of, options_of, prediction_model
from dann_experiments.models.batchnorm import NO_BATCHNORM, has_batchnorm
from dann_experiments.names import Job, Tag
from dann_experiments.prediction.find_images import asked_beside, find_work
from dann_experiments.prediction.manifest import Manifest
from dann_experiments.prediction.mapping import MapMaker, Outcome
from dann_experiments.prediction.rasters import (
    read_decimated,
)
from dann_experiments.prediction.scene import Scene
from dann_experiments.prediction.stac import times_of, times_of_text
from dann_experiments.prediction.vector_file import check_packages
from dann_experiments.reports.colors import class_colors
from dann_experiments.reports.images import display_image
from dann_experiments.reports.plots.preview import draw_preview
from dann_experiments.tracking.run import TrackedRun, tracked_run
from dann_experiments.tracking.store import Store, local_artifact_folder, open_store
from dann_experiments.workers.pool import Pool, open_pool, refuse_unshared

log = logging.getLogger(__name__)
PREVIEW_SIDE = 1000  # pixels
PREVIEWS = 3  # maps in the preview, at most


@dataclass(frozen=True)
class PredictResult:
    """A finished prediction."""

    run_id: str
    experiment_id: str
    tracking_uri: str = field(repr=False)
    """The store's address, including a password in it; not shown in repr."""
    outputs: tuple[Path, ...]
    """The maps, including those that were finished before."""
    class_pixels: Mapping[str, int]
    """Number of pixels with data per class, in the maps written by this run."""
    metrics: Mapping[str, float]
    source_run_id: str | None = None
    """The run that made the model."""
    artifacts: str | None = None
    """Folder of the run's files; None if it is not on this machine."""
    job: str = "predict"


def predict(settings: PredictConfig, config: Config | None = None) -> PredictResult:
    """Write the class map of `settings.input` to `settings.output`; for several images, or a folder, one map per image.

    `config`: the network's settings, for a checkpoint that is stored without them. Raises InputError for errors that the user can
    correct, if possible before a run is opened; bad files among several images are reported at the end.
    """
    from dann_experiments import __version__

    if settings.stac_datetime is not None:
        times_of_text(settings.stac_datetime, "stac_datetime")  # before anything is read
    work = find_work(settings.inputs, settings.output, asked_beside(settings), settings.overwrite, settings.vector)
    if settings.vector is not None:
        check_packages()
    device = device_of(settings.accelerator)
    store = open_store(settings.tracking.uri, settings.tracking.experiment)
    model = prediction_model(settings, config, store)
    options = options_of(settings)
    if settings.test_batchnorm == "images" and not has_batchnorm(model.network):
        raise InputError(NO_BATCHNORM)
    if len(work) == 1:
        Scene.open(*work[0], model, options)  # so that a bad file is reported before a run is opened
        if settings.stac:
            times_of(work[0][0], settings.stac_datetime)
    for folder in {output.parent for _, output in work}:
        folder.mkdir(parents=True, exist_ok=True)
    tags = {Tag.JOB: Job.PREDICT, **({} if model.run_id is None else {Tag.SOURCE_RUN_ID: model.run_id})}
    folder = Path(settings.tracking.folder)
    with (
        _pool_of(settings, store, len(work)) as pool,
        tracked_run(
            store, settings.tracking.run_name, "predict", tags, folder, use_claimed=True,
            system_metrics=settings.tracking.system_metrics,
        ) as run,
    ):  # fmt: skip
        log_settings(run, settings)
        written = {"model": settings.model, "software": f"dann_experiments {__version__}", "dann_run_id": run.run_id}
        outcome, problems = Outcome(np.zeros(len(model.class_names) + 1, np.int64)), []
        manifest = Manifest(run.folder / "tables" / "scenes.csv", work)
        start = time.perf_counter()
        with show_progress(len(work), settings.progress) as show:
            if pool is None:
                model.network.to(device)
                ends = MapMaker(model, options, device, class_colors(len(model.class_names)), written).map_all(
                    work, show
                )
            else:
                pool.logs = run.folder / "logs" if settings.launcher == "processes" else None
                log.info(
                    "%d at a time, threads of each: %d; output: %s", pool.count, pool.threads, pool.logs or "Ray's logs"
                )
                ends = map_in_pool(pool, _tasks(work, settings, config, store, written, model.digest), show)
            try:
                for end in ends:
                    manifest.add(end)
                    if end.outcome is None:
                        log.error("%s", end.problem)
                        problems.append(end.problem)
                    else:
                        outcome.add(end.outcome)
            finally:
                manifest.write()
        seconds = time.perf_counter() - start
        outcome.warn()
        _write_results(run, model, outcome)
        metrics = {"predict/maps": float(len(outcome.written)), "predict/pixels": float(outcome.pixels)}
        if settings.vector is not None:
            metrics["predict/polygons"] = float(outcome.polygons)
        if outcome.pixels:
            metrics["predict/pixels_per_second"] = outcome.pixels / seconds
        run.log_metrics(metrics, step=0)
        if problems:
            shown = "\n".join(problems[:20])
            raise InputError(
                f"{len(problems)} of {len(work)} images have no map; the others are done. Fix these and start again:\n{shown}"
            )
    artifacts = local_artifact_folder(store, run.run_id)
    return PredictResult(
        run.run_id, store.experiment_id, store.uri, tuple(output for _, output in work),
        dict(zip(model.class_names, outcome.counts[:-1].tolist(), strict=True)), metrics, model.run_id,
        None if artifacts is None else str(artifacts),
    )  # fmt: skip


def _pool_of(settings: PredictConfig, store: Store, images: int) -> contextlib.AbstractContextManager[Pool | None]:
    """Open the pool of the settings; None where this process maps the images itself."""
    pool = settings.pool
    if pool.launcher == "processes" and (images == 1 or pool.workers in (None, 1)):
        if pool.workers is not None and pool.workers > 1:
            log.warning("workers has no effect: there is one image.")
        return contextlib.nullcontext()
    refuse_unshared(pool, "tracking.uri", store.uri)
    return open_pool(map_scene, pool, settings.accelerator, images)


def _tasks(
    work: Sequence[tuple[Path, Path]], settings: PredictConfig, config: Config | None, store: Store, written: dict[str, str],
    digest: str,
) -> list[Task]:  # fmt: skip
    tracking = dataclasses.replace(settings.tracking, uri=store.uri, experiment=store.experiment)
    settings = dataclasses.replace(settings, tracking=tracking)
    return [Task(*pair, settings, config, written, digest) for pair in work]


def _write_results(run: TrackedRun, model: Model, outcome: Outcome) -> None:
    """Write the table of classes and the preview to the run's folder."""
    path = run.folder / "tables" / "class_shares.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = max(int(outcome.counts[:-1].sum()), 1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "pixels", "share"])
        for name, pixels in zip(model.class_names, outcome.counts.tolist(), strict=False):
            writer.writerow([name, pixels, f"{pixels / seen:.6f}"])
        writer.writerow(["(no data)", int(outcome.counts[-1]), ""])
    if outcome.written:
        _draw_preview(run.folder / "figures" / "preview.png", outcome.written[:PREVIEWS], model)


def _draw_preview(path: Path, scenes: Sequence[Scene], model: Model) -> None:
    """Draw maps next to their images, both reduced to at most PREVIEW_SIDE pixels."""
    images = [(scene.input.name, _display(scene)) for scene in scenes]
    maps = [(scene.output.name, read_decimated(scene.output, [1], PREVIEW_SIDE)[0]) for scene in scenes]
    draw_preview(path, images, maps, model.class_names)


def _display(scene: Scene) -> np.ndarray:
    """Return the reduced image for display: (h, w, 3), 0..1."""
    values = read_decimated(scene.input, scene.bands, PREVIEW_SIDE)
    if len(values) < len(scene.normalisation.low):  # one gray band among color images
        values = values.repeat(len(scene.normalisation.low), axis=0)
    scaled = np.nan_to_num(scene.normalisation.scaled(values))
    return display_image(scaled, stretch=scene.header.dtype != "uint8")
