"""What workers of a sweep or comparison share: decoded data, a source model, GPUs, and the process they are forked from."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_sets, small_settings, write_domain, write_raster

from dann_experiments import adapt
from dann_experiments.config import Config, InputError, load_config
from dann_experiments.config.parsing import load_settings
from dann_experiments.data import dataset, shared_cache
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.pixels import read_pixels as reading
from dann_experiments.jobs import source_model
from dann_experiments.jobs.build import make_network
from dann_experiments.jobs.shared_data import OWNER, PLACE, shared_data
from dann_experiments.names import SOURCE_TRAIN
from dann_experiments.tracking import fetch_model
from dann_experiments.workers.pool import worker_count
from dann_experiments.workers.processes import become_worker, prepare_workers, worker_context
from sweeps.settings import SweepConfig

PROJECT = Path(__file__).parents[1]
IMAGES = 10 + 4 + 13 + 5 + 3  # of `squares`


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    shared_cache.share(None)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The image files that are decoded from now on."""
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []
    read = dataset.read_pixels

    def read_pixels(path: Path, *arguments: Any) -> Any:
        found.append(path)
        return read(path, *arguments)

    monkeypatch.setattr(dataset, "read_pixels", read_pixels)
    return found


def items(one: dataset.SegmentationDataset) -> list[dict[str, torch.Tensor]]:
    return [one[(index, 7)] for index in range(len(one))]


def same(one: ImageSets, other: ImageSets) -> bool:
    """Equal items bit for bit, equal pieces, equal headers, equal counts of classes."""
    assert list(one.sets) == list(other.sets)
    for name in one.sets:
        mine, its = one.sets[name], other.sets[name]
        assert (mine.pieces, mine.headers, mine.may_lack_data) == (its.pieces, its.headers, its.may_lack_data)
        assert np.array_equal(mine.class_pixels, its.class_pixels) if mine.class_pixels is not None else True
        assert (mine.class_pixels is None) == (its.class_pixels is None)
        for first, second in zip(items(mine), items(its), strict=True):
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
    return True


def lacking(root: Path) -> Path:
    """Rasters of 16 bit with nodata, of which one training window has none but that, a root as `squares`."""
    for name, masks in (("source", True), ("source_val", True), ("target", False), ("target_val", True)):
        write_domain(root / name, 3, seed=1, size=64, masks=masks)
        for image in sorted((root / name / "images").iterdir()):
            values = np.random.default_rng(len(name)).integers(1, 999, (3, 64, 64)).astype(np.uint16)
            values[:, :40, :40] = 0
            image.unlink()
            write_raster(image.with_suffix(".tif"), values, nodata=0)
    return root


def test_images_are_decoded_once_and_every_item_is_the_same(squares, tmp_path, reads):
    config = load_config(None, small_settings(squares))
    alone = read_sets(config)
    assert len(reads) == IMAGES
    with shared_data(tmp_path / "several" / "new" / "outputs"):
        first = read_sets(config)
        assert len(reads) == 2 * IMAGES
        second = read_sets(config)
        assert len(reads) == 2 * IMAGES
        assert same(alone, first)
        assert same(alone, second)
        assert second.sets[SOURCE_TRAIN].memory.bytes_left == alone.sets[SOURCE_TRAIN].memory.bytes_left
    assert same(first, second)  # the folder is gone, what is mapped is not
    assert not (tmp_path / "several").exists()


def test_without_a_folder_that_can_be_made_nothing_is_shared(tmp_path):
    with shared_data(tmp_path / ("long" * 100)) as folder:
        assert folder is None
        assert shared_cache.in_use() is None


def test_a_process_that_finds_small_files_decoded_opens_none_of_them(squares, tmp_path, monkeypatch):
    config = load_config(None, small_settings(squares))
    alone = read_sets(config).digests
    with shared_data(tmp_path / "outputs"):
        read_sets(config)
        opened, plain = [], open
        monkeypatch.setattr(
            "builtins.open", lambda path, *more, **named: opened.append(path) or plain(path, *more, **named)
        )
        assert read_sets(config).digests == alone
    assert not [path for path in opened if str(path).endswith(".png")]


@pytest.mark.parametrize("windows", ["grid", "random"])
def test_windows_without_data_are_shared_as_they_are(tmp_path, windows, reads):
    root = lacking(tmp_path / "data")
    more = {"data__window_size": 32, "data__windows": windows, "data__target__test": [], "data__crop_size": 16}
    more |= {f"data__{domain}__scale": [0, 1000] for domain in ("source", "target")}
    config = load_config(None, small_settings(root, **more))
    alone = read_sets(config)
    with shared_data(tmp_path / "outputs"):
        read_sets(config)
        before = len(reads)
        assert same(alone, read_sets(config))
        assert len(reads) == before
        other = load_config(None, small_settings(root, **more, seed=5))
        assert same(read_sets(other), setup_alone(other))
        assert (len(reads) > before) == (windows == "random")  # the seed decides where random windows lie


def setup_alone(config: Config) -> ImageSets:
    """Without the others, and without a trace in `reads`."""
    sharing, shared_cache._in_use = shared_cache._in_use, None
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "read_pixels", reading)
            return read_sets(config)
    finally:
        shared_cache._in_use = sharing


def test_processes_that_start_together_decode_each_image_once(squares, tmp_path):
    config = load_config(None, small_settings(squares))
    context = multiprocessing.get_context("fork")
    answers, barrier = context.Queue(), context.Barrier(3)

    def read() -> None:
        with pytest.MonkeyPatch.context() as patch:
            found = counted(patch)
            shared_cache.share(tmp_path)
            barrier.wait(60)
            read_sets(config)
            answers.put(len(found))

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    assert sum(answers.get(timeout=120) for _ in processes) == IMAGES
    for process in processes:
        process.join()


def test_a_file_that_is_written_anew_is_read_anew(squares, tmp_path, reads):
    root = tmp_path / "data"
    subprocess.run(["cp", "-r", squares, root], check=True)
    config = load_config(None, small_settings(root))
    with shared_data(tmp_path / "outputs"):
        read_sets(config)
        before = len(reads)
        os.utime(root / "source_val" / "images" / "0.png", ns=(1, 1))
        read_sets(config)
        assert len(reads) == before + 4


def test_a_job_with_less_memory_than_the_one_that_wrote_reads_for_itself(squares, tmp_path, reads):
    enough = load_config(None, small_settings(squares))
    little = load_config(None, small_settings(squares, data__memory_gb=1e-5))
    alone = read_sets(little)
    with shared_data(tmp_path / "outputs"):
        read_sets(enough)
        before = len(reads)
        data = read_sets(little)
        assert len(reads) > before
        assert data.sets[SOURCE_TRAIN].memory.bytes_left >= 0
        for name, one in alone.sets.items():
            assert all(
                torch.equal(a["image"], b["image"]) for a, b in zip(items(one), items(data.sets[name]), strict=True)
            )


@pytest.mark.parametrize("why", ["memory", "disk", "folder"])
def test_where_it_does_not_fit_each_process_reads_for_itself(squares, tmp_path, reads, monkeypatch, why):
    config = load_config(None, small_settings(squares, data__memory_gb=2e-5 if why == "memory" else 2))
    alone = read_sets(config)
    expected = len(reads)
    if why == "disk":
        monkeypatch.setattr(shared_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    if why == "folder":
        (tmp_path / "outputs").write_text("a file")
    with shared_data(tmp_path / "outputs") as folder:
        assert (folder is None) == (why == "folder")
        for _ in range(2):
            before = len(reads)
            assert same(alone, read_sets(config)) or why == "memory"
            if why != "memory":
                assert len(reads) - before == expected
            elif folder is not None:
                assert len(list(folder.glob("*.bin"))) < len(alone.sets)


def test_a_bad_file_is_told_as_ever(squares, tmp_path):
    root = tmp_path / "data"
    subprocess.run(["cp", "-r", squares, root], check=True)
    (root / "source" / "images" / "3.png").write_bytes(b"no image")
    (root / "target" / "images" / "5.png").write_bytes(b"no image either")
    config = load_config(None, small_settings(root))
    told = []
    for _ in range(2):
        with pytest.raises(InputError) as error:
            read_sets(config)
        told.append(str(error.value))
        shared_cache.share(tmp_path)
    assert told[0] == told[1]
    assert "3.png" in told[0]
    assert "5.png" in told[0]


def test_what_processes_left_that_are_gone_is_removed(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", "from dann_experiments.tracking.processes import process_name; print(process_name())"],
        capture_output=True, text=True, check=True, cwd=PROJECT,
    )  # fmt: skip
    left = tmp_path / PLACE / "left"
    left.mkdir(parents=True)
    (left / OWNER).write_text(process.stdout.strip())
    with shared_data(tmp_path) as mine, shared_data(tmp_path):
        assert not left.exists()
        assert mine is not None


def test_runs_that_share_have_the_numbers_of_runs_alone_and_ask_for_the_source_model_once(
    squares, pretrained_place, monkeypatch
):
    config = load_config(None, small_settings(squares, trainer__max_epochs=1))
    alone = adapt(config)
    asked = []
    fetch = fetch_model.fetch

    def count(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments[0])
        return fetch(*arguments, **named)

    monkeypatch.setattr(fetch_model, "fetch", count)
    monkeypatch.setattr(source_model, "_kept", {})
    with shared_data(pretrained_place / "outputs"):
        results = [adapt(config) for _ in range(2)]
    assert len(asked) == 1
    for result in results:
        assert result.metrics == alone.metrics
        assert result.baseline == alone.baseline
        assert result.source_run_id == alone.source_run_id


def test_a_source_model_that_is_written_anew_is_loaded_anew(squares, workplace, monkeypatch):
    monkeypatch.setattr(source_model, "_kept", {})
    config = load_config(None, small_settings(squares))
    store: Any = SimpleNamespace(uri="")
    network, file = make_network(config), workplace / "model.pt"
    for value in (1.0, 2.0):
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, value)
        torch.save(network.state_dict(), file)
        os.utime(file, ns=(int(value), int(value)))
        for _ in range(2):
            fresh = make_network(config)
            source_model.load_source_model(config, fresh, str(file), store)
            assert all(bool((parameter == value).all()) for parameter in fresh.parameters())
            for parameter in fresh.parameters():  # a training changes its own copy
                torch.nn.init.constant_(parameter, 9.0)


@pytest.mark.parametrize(
    ("part", "gpus", "workers"), [(None, 2, 2), (1, 2, 2), (0.5, 2, 4), (0.25, 1, 4), (0.4, 1, 2), (1 / 3, 1, 3)]
)
def test_a_part_of_a_gpu_a_trial_is_so_many_workers_a_gpu(part, gpus, workers):
    sweep = load_settings(SweepConfig, None, {"gpus_per_trial": part})
    assert worker_count(sweep, [str(number) for number in range(gpus)]) == workers
    assert worker_count(load_settings(SweepConfig, None, {"gpus_per_trial": part, "workers": 3}), ["0"]) == 3


@pytest.mark.parametrize("part", [0, 0.001, 1.5, 2, -1])
def test_a_trial_of_a_process_has_one_gpu_at_most(part):
    with pytest.raises(InputError, match="gpus_per_trial"):
        load_settings(SweepConfig, None, {"gpus_per_trial": part})


@pytest.mark.slow
def test_the_process_that_workers_are_forked_from_has_all_imported_one_thread_and_asks_no_gpu():
    code = """
import sys, threading, torch
asked = []
for name in ("is_available", "device_count", "init", "current_device"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 0)
torch._C._cuda_getDeviceCount = lambda: asked.append("count") or 0
from dann_experiments.workers import preloaded
for module in preloaded.MODULES:
    assert module in sys.modules, module
import sweeps.worker, dann_experiments.comparison.runner
assert not asked, asked
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1, threading.enumerate()
before = set(sys.modules)
from dann_experiments.jobs import adapt, evaluate, pretrain
import mlflow, pytorch_lightning, segmentation_models_pytorch, optuna, rasterio
assert set(sys.modules) == before
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_process_that_workers_are_forked_from_stands_in_no_folder_that_may_go(tmp_path):
    code = "import os, dann_experiments.workers.preloaded; assert os.getcwd() == '/', os.getcwd()"
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, check=True)


def tell(connection: Any, environment: dict[str, str]) -> None:
    """What a worker of the test answers: three variables."""
    become_worker(None, environment)
    connection.send((os.environ.get("FIRST"), os.environ.get("SECOND"), os.environ.get("MLFLOW_RUN_ID")))
    connection.close()


def test_a_worker_has_the_environment_of_the_moment_it_is_started(monkeypatch):
    monkeypatch.setenv("FIRST", "1")
    prepare_workers(__name__)
    monkeypatch.delenv("FIRST")
    monkeypatch.setenv("SECOND", "2")
    monkeypatch.setenv("MLFLOW_RUN_ID", "parents")
    context: Any = worker_context()
    mine, its = context.Pipe()
    process = context.Process(target=tell, args=(its, dict(os.environ)))
    process.start()
    its.close()
    assert mine.recv() == (None, "2", None)
    process.join()
