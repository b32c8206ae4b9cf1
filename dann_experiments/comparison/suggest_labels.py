"""Ranks the arms of a comparison without target labels, and names the target tiles whose labels would tell most."""

from __future__ import annotations

import csv
import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path

import numpy as np
import pandas as pd

from dann_experiments.comparison.choice import Choice, choose
from dann_experiments.comparison.collect import config_of, read_run
from dann_experiments.comparison.disagreement import disagreement_of, most_disputed
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.comparison.target_maps import TargetMaps, Tile, maps_of
from dann_experiments.config import Config, InputError
from dann_experiments.config.suggestions import SuggestLabelsConfig
from dann_experiments.data.virtual import shown
from dann_experiments.jobs.build import seeded
from dann_experiments.names import Job, Tag
from dann_experiments.prediction.rasters import write_window
from dann_experiments.reports.plots.suggestions import Disputed, draw_disputed
from dann_experiments.tracking.notes import description, link, run_page
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import Store, known_run, local_artifact_folder, open_store, whole_run_id

log = logging.getLogger(__name__)
RUNS_TABLE = "tables/runs.csv"
PICTURED = 8  # tiles in the picture
FIGURE = "figures/tiles.png"


@dataclass(frozen=True)
class Suggestion:
    """The choice among the arms of a comparison, and the tiles to label."""

    run_id: str
    tracking_uri: str = field(repr=False)
    choice: Choice
    tiles: Sequence[tuple[Tile, float]]
    """Tiles with their mean disagreement, 0..1, the most disputed first."""
    files: Sequence[Path]
    """Images of the tiles; empty without `output`."""
    artifacts: str | None
    """Folder of the tables and the picture, if it is on this machine."""


def suggest_labels(settings: SuggestLabelsConfig) -> Suggestion:
    """Ask all models of a comparison about the target's training images.

    Raises InputError for an id that is no finished comparison, and for images or models that are missing.
    """
    store = open_store(settings.tracking.uri, settings.tracking.experiment)
    settings = dataclasses.replace(settings, comparison=whole_run_id(store, settings.comparison))
    arms, runs, config = comparison_of(store, settings.comparison)
    folder = _new_folder(settings.output)
    tags = {Tag.JOB: Job.SUGGEST_LABELS, Tag.COMPARISON: settings.comparison}
    with (
        seeded(config),
        tempfile.TemporaryDirectory() as kept,
        tracked_run(
            store,
            settings.tracking.run_name,
            Job.SUGGEST_LABELS,
            tags,
            Path(settings.tracking.folder),
            use_claimed=True,
        ) as run,
    ):
        run.log_params({"comparison": settings.comparison, "count": settings.count})
        maps = maps_of(config, store, arms, runs, Path(kept))
        choice = choose(arms, runs, maps, config.class_names)
        tiles = most_disputed(maps, config.model.classes, maps.arms, settings.count)
        files = [] if folder is None else _write_images(tiles, folder)
        _write_tables(run.folder, choice, tiles, files)
        _draw(run.folder / FIGURE, maps, tiles, config)
        page = link("comparison", run_page(store.experiment_id, settings.comparison))
        run.set_tags(
            {Tag.NOTE: description("Label suggestions", [choice.line], [page]), Tag.CHOICE: choice.arm or "none"}
        )
    artifacts = local_artifact_folder(store, run.run_id)
    return Suggestion(run.run_id, store.uri, choice, tiles, files, None if artifacts is None else str(artifacts))


def comparison_of(store: Store, run_id: str) -> tuple[list[Arm], list[ArmRun], Config]:
    """Return arms, runs and settings of a finished comparison. Raises InputError if `run_id` is something else."""
    found = known_run(store, run_id)
    if found is None or found.data.tags.get(Tag.JOB) != Job.COMPARE:
        what = "which the tracking store does not have; see tracking.uri" if found is None else "a run of another job"
        raise InputError(f"comparison is {run_id!r}, {what}. Give the id of a run of compare.")
    if found.info.status != "FINISHED":
        raise InputError(f"comparison is {run_id!r}, whose status is {found.info.status}; give a finished one.")
    config = config_of(store, run_id)
    with tempfile.TemporaryDirectory() as folder:
        path = store.client.download_artifacts(run_id, RUNS_TABLE, folder)
        table = pd.read_csv(path, dtype=str, keep_default_na=False)  # an arm may be called NA
    if config is None or "kind" not in table.columns:
        raise InputError(
            f"comparison is {run_id!r}, made by an earlier version; run compare again: it reuses finished runs."
        )
    arms = {row["arm"]: Arm(row["arm"], row["kind"]) for row in table.to_dict("records")}
    runs = [
        # with the seed of the table: one source model may be the start of runs of several seeds
        replaced(read_run(store, row["run_id"], arms[row["arm"]], True), seed=int(row["seed"]))
        for row in table.to_dict("records")
    ]
    return list(arms.values()), runs, config


def _new_folder(output: str) -> Path | None:
    if not output:
        return None
    folder = Path(output).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"output is {output!r}, which is not an empty folder; give a new one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output is {output!r}, which cannot be made ({error.strerror}); choose another folder."
        ) from None
    return folder


def _write_images(tiles: Sequence[tuple[Tile, float]], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (tile, _) in enumerate(tiles, 1):
        files.append(folder / f"{number:03d}_{tile.image.stem}.tif")
        write_window(tile.image, tile.region, files[-1])
    return files


def _write_tables(folder: Path, choice: Choice, tiles: Sequence[tuple[Tile, float]], files: Sequence[Path]) -> None:
    tables = folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    choice.table.to_csv(tables / "choice.csv", index=False, float_format="%.6f")
    with open(tables / "tiles.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "left", "top", "right", "bottom", "disagreement", "file"])
        for number, (tile, value) in enumerate(tiles):
            writer.writerow([shown(tile.image), *tile.region, f"{value:.6f}", files[number] if files else ""])


def _draw(path: Path, maps: TargetMaps, tiles: Sequence[tuple[Tile, float]], config: Config) -> None:
    """Draw the first tiles, with the map of each arm's first seed."""
    shown = []
    for tile, value in tiles[:PICTURED]:
        predictions: Mapping[str, np.ndarray] = {
            arm: next(iter(maps.of(arm).values()))[tile.pixels].reshape(tile.size) for arm in maps.arms
        }
        disputed = disagreement_of(maps, tile, config.model.classes, maps.arms)
        shown.append(
            Disputed(f"{tile.image.name} {list(tile.region)}", maps.picture(tile), disputed, value, predictions)
        )
    if shown:
        draw_disputed(path, shown, config.class_names)
