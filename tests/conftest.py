"""What several tests need: small data sets on disk, small settings, a store of their own, runs that all share."""

from __future__ import annotations

import os

# pytest-xdist starts one worker per core; more threads, here and in child processes, would only wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read once, when NumPy and SciPy are imported
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read once, when torch is imported: its threads in child processes wait idly

import dataclasses
import gc
import json
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rasterio
import torch
from filelock import FileLock
from rasterio.errors import NotGeoreferencedWarning

from benchmarks.squares import model_folder as model_folder
from benchmarks.squares import small_settings as squares_settings
from benchmarks.squares import write_domain
from dann_experiments.config import Config
from dann_experiments.data import domain_data, remembered
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.jobs.build import find_data, make_network
from dann_experiments.jobs.checks import checked_sets

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from dann_experiments import RunResult

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-sync",
]

torch.set_num_threads(1)
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


def pytest_collection_finish() -> None:
    """Leave out of each garbage collection the million objects of the modules imported by now: they took a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries report what is left at the end as leaks


def write_raster(path: Path, values: np.ndarray, **profile: object) -> Path:
    """A GeoTIFF of bands (B, H, W); `profile` are rasterio's own words (crs, transform, nodata, ...)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    settings = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype, **profile}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        options = {"photometric": "MINISBLACK"} if settings["driver"] == "GTiff" else {}
        with rasterio.open(path, "w", **options, **settings) as file:
            file.write(values)
    return path


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name` that all workers of pytest-xdist share; the first to ask fills it with `make`."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with source/, source_val/, target/ (no masks), target_val/, target_test/ of 32 px squares; read-only."""
    return made_once(tmp_path_factory, "squares", squares_in)


def squares_in(root: Path) -> Path:
    """The folders of `squares`, made in `root`."""
    write_domain(root / "source", 10, seed=1)
    write_domain(root / "source_val", 4, seed=2)
    write_domain(root / "target", 13, seed=3, inverted=True, masks=False)
    write_domain(root / "target_val", 5, seed=4, inverted=True)
    write_domain(root / "target_test", 3, seed=5, inverted=True)
    return root


def small_settings(root: Path, **more: object) -> dict[str, object]:
    """Dotted settings of a run of seconds on `squares`; `more` uses __ for the dots.

    The network is timm's own for tests: 82,000 parameters, where resnet18 has 11 million to draw, save and hash.
    """
    return (
        squares_settings(root)
        | {"model.encoder_name": "tu-test_resnet"}
        | {key.replace("__", "."): value for key, value in more.items()}
    )


def read_sets(config: Config) -> ImageSets:
    """The sets of a job, found, checked and read as `adapt` does."""
    return checked_sets(config, find_data(config), make_network(config, with_weights=False))


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts a new MLflow store, mlflow.db, into a folder: a copy of one that MLflow made here, as its dozens of migrations take
    a second or two, which most tests need not see again."""
    import mlflow

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()

    made = made_once(tmp_path_factory, "store", make)
    return lambda folder: copy_store(made / "mlflow.db", folder)


def copy_store(store: Path, folder: Path) -> None:
    """Copy a store to `folder`/mlflow.db: its runs keep their files where they are, new ones put theirs into `folder`."""
    with closing(sqlite3.connect(store)) as source, closing(sqlite3.connect(folder / "mlflow.db")) as copy, copy:
        source.backup(copy)
        copy.execute("UPDATE experiments SET artifact_location = ? || '/mlruns/' || experiment_id", (str(folder),))


@dataclass(frozen=True)
class SharedRuns:
    """A pretraining and an adaptation with `small_settings(squares)`, shared by all tests and workers; read-only."""

    folder: Path

    def result(self, job: str) -> RunResult:
        """Return what `pretrain` or `adapt` returned."""
        from dann_experiments import RunResult

        return RunResult(**json.loads((self.folder / f"{job}.json").read_text()))


@pytest.fixture(scope="session")
def shared_runs(
    squares: Path, new_store: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> SharedRuns:
    from dann_experiments import adapt, load_config, pretrain

    def make(folder: Path) -> None:
        new_store(folder)
        with pytest.MonkeyPatch.context() as patch:
            for name in mlflow_variables():
                patch.delenv(name)
            patch.chdir(folder)
            config = load_config(None, small_settings(squares))
            for job in (pretrain, adapt):
                result = job(config)
                (folder / f"{result.job}.json").write_text(json.dumps(dataclasses.asdict(result)))
                (folder / f"after_{result.job}").mkdir()
                copy_store(folder / "mlflow.db", folder / f"after_{result.job}")

    return SharedRuns(made_once(tmp_path_factory, "shared_runs", make))


@pytest.fixture(autouse=True)
def nothing_remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of this process know nothing of files from earlier ones; tests of what is remembered ask for `remembering`."""
    if "remembering" not in request.fixturenames:
        monkeypatch.setattr(domain_data, "place", lambda: None)


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache of a test, in which facts on files are kept at once, however new the files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "DOUBT_NS", 0)
    return tmp_path / "cache" / "dann_experiments"


@pytest.fixture
def pretrained_place(workplace: Path, shared_runs: SharedRuns) -> Path:
    """`workplace` with a store that holds the pretraining of `shared_runs`, from which an adaptation on `squares` starts."""
    copy_store(shared_runs.folder / "after_pretrain" / "mlflow.db", workplace)
    return workplace


@dataclass(frozen=True)
class Server:
    """A real MLflow server on loopback with a store of its own, which serves its artifacts."""

    url: str
    log: Path


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for each worker of pytest-xdist, as starting one takes seconds: tests use experiments of their own."""
    from test_sweep_cluster import free_port, start_server, stop_server

    folder, port = tmp_path_factory.mktemp("server"), free_port()
    process = start_server(folder, port)
    yield Server(f"http://127.0.0.1:{port}", folder / "server.log")
    stop_server(process)


@pytest.fixture
def server(running_server: Server) -> str:
    """The address of `running_server`."""
    return running_server.url


@pytest.fixture
def workplace(empty_place: Path, new_store: Callable[[Path], None]) -> Path:
    """A current folder with a new sqlite store; no MLflow variables from outside."""
    new_store(empty_place)
    return empty_place


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where a job makes its own sqlite store; no MLflow variables, and no store of the process, from
    outside."""
    for name in mlflow_variables():
        monkeypatch.delenv(name)
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mlflow_variables() -> list[str]:
    """Names of the environment's MLflow variables, but for the one set above."""
    return [name for name in os.environ if name.startswith("MLFLOW_") and name != "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The Chromium of the system; tests that use it are skipped where there is none, or no playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"this system has none of {', '.join(CHROMIUM)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
