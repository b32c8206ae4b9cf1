"""What several tests need: small data sets on disk, small settings, a store of their own."""

from __future__ import annotations

import os
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.errors import NotGeoreferencedWarning

from benchmarks.squares import small_settings as squares_settings
from benchmarks.squares import write_domain
from dann_experiments.config import Config
from dann_experiments.data.domain_data import ImageSets
from dann_experiments.jobs.build import find_data, make_network
from dann_experiments.jobs.checks import checked_sets

# Each worker of pytest-xdist is one process a core: more threads would only fight for them.
torch.set_num_threads(1)
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


def write_raster(path: Path, values: np.ndarray, **profile: object) -> Path:
    """A GeoTIFF of bands (B, H, W); `profile` are rasterio's own words (crs, transform, nodata, ...)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    settings = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype, **profile}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", photometric="MINISBLACK", **settings) as file:
            file.write(values)
    return path


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with source/, source_val/, target/ (no masks), target_val/, target_test/ of 32 px squares."""
    return squares_in(tmp_path_factory.mktemp("squares"))


def squares_in(root: Path) -> Path:
    """The folders of `squares`, made in `root`."""
    write_domain(root / "source", 10, seed=1)
    write_domain(root / "source_val", 4, seed=2)
    write_domain(root / "target", 13, seed=3, inverted=True, masks=False)
    write_domain(root / "target_val", 5, seed=4, inverted=True)
    write_domain(root / "target_test", 3, seed=5, inverted=True)
    return root


def small_settings(root: Path, **more: object) -> dict[str, object]:
    """Dotted settings of a run of seconds on `squares`; `more` uses __ for the dots."""
    return squares_settings(root) | {key.replace("__", "."): value for key, value in more.items()}


def read_sets(config: Config) -> ImageSets:
    """The sets of a job, found, checked and read as `adapt` does."""
    return checked_sets(config, find_data(config), make_network(config, with_weights=False))


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts a new MLflow store, mlflow.db, into a folder: a copy of one that MLflow made here, as its dozens of migrations take
    a second or two, which most tests need not see again."""
    import mlflow

    made = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        mlflow.MlflowClient(f"sqlite:///{made}/mlflow.db").search_experiments()

    def put(folder: Path) -> None:
        shutil.copy(made / "mlflow.db", folder / "mlflow.db")
        with closing(sqlite3.connect(folder / "mlflow.db")) as copy, copy:  # of experiment 0, the one that is there
            copy.execute("UPDATE experiments SET artifact_location = ?", (f"{folder}/mlruns/0",))

    return put


@pytest.fixture
def workplace(empty_place: Path, new_store: Callable[[Path], None]) -> Path:
    """A current folder with a new sqlite store; no MLflow variables from outside."""
    new_store(empty_place)
    return empty_place


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where a job makes its own sqlite store; no MLflow variables from outside."""
    for name in [
        name for name in os.environ if name.startswith("MLFLOW_") and name != "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
