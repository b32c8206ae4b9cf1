"""Files are looked at while the process of a job still imports: nothing is read twice, and whatever fails is told as ever."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_settings, write_raster

from dann_experiments.config import InputError, load_config
from dann_experiments.data import early
from dann_experiments.data.samples import SETS
from dann_experiments.jobs import setup

PROJECT = Path(__file__).parents[1]
JOB = """
import json, os, signal, sys, time
from dann_experiments.config import load_config
from dann_experiments.data import early
early.os.sched_getaffinity = lambda pid: {0, 1}
config = load_config(None, json.loads(sys.argv[1]))
early.begin(config)
begun = early._begun
assert "torch" not in sys.modules and "rasterio" not in sys.modules
if sys.argv[2] == "killed":
    os.kill(begun[2].pid, signal.SIGKILL)
if sys.argv[2] == "other":
    config = load_config(None, {**json.loads(sys.argv[1]), "data.ignore_index": 7})
import rasterio.io
from dann_experiments.config import InputError
from dann_experiments.jobs import setup
opened, reader = [], rasterio.io.DatasetReader
rasterio.io.DatasetReader = lambda path: opened.append(path) or reader(path)
told = ""
try:
    data = setup.load_data(config)
    setup.check_data(config, data, setup.make_network(config, with_weights=False))
    data.digests
except InputError as error:
    told = str(error)
print(json.dumps({"begun": begun is not None, "opened": len(opened), "left": begun[2].is_alive(), "told": told}))
"""


def job(settings: dict[str, object], how: str = "") -> dict:
    """What a process did that began to look early."""
    command = [sys.executable, "-W", "ignore", "-c", JOB, json.dumps(settings), how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def test_the_job_opens_no_small_file_that_was_looked_at_early(squares):
    assert job(small_settings(squares)) == {"begun": True, "opened": 0, "left": False, "told": ""}


@pytest.mark.parametrize("how", ["killed", "other"])
def test_without_an_answer_for_these_settings_the_job_reads_for_itself(squares, how):
    config = load_config(None, small_settings(squares))
    data = setup.load_data(config)
    files = [path for one in data.sets.values() for sample in one.samples for path in (sample.image, sample.mask)]
    found = job(small_settings(squares), how)
    assert found == {
        "begun": True,
        "opened": len([path for path in files if path is not None]),
        "left": False,
        "told": "",
    }


@pytest.mark.parametrize("broken", ["header", "pixels", "missing"])
def test_what_is_wrong_is_told_as_without(squares, tmp_path, broken):
    root = tmp_path / "data"
    shutil.copytree(squares, root)
    file = root / "source" / "masks" / "3.png"
    if broken == "header":
        file.write_bytes(b"no image")
    elif broken == "missing":
        file.unlink()
    else:
        shutil.copy(root / "source" / "images" / "3.png", file)  # three bands
    config = load_config(None, small_settings(root))
    with pytest.raises(InputError) as error:
        setup.check_data(config, setup.load_data(config), setup.make_network(config, with_weights=False))
    found = job(small_settings(root))
    assert found["told"] == str(error.value)
    assert "3.png" in found["told"]
    assert not found["left"]


def test_nothing_is_begun_where_torch_is_imported_already(squares):
    assert "torch" in sys.modules
    early.begin(load_config(None, small_settings(squares)))
    assert early._begun is None


@pytest.mark.parametrize("memory_gb", [2.0, 3e-5, 0.0])
def test_what_was_looked_at_early_gives_the_same_sets(squares, monkeypatch, memory_gb):
    config = load_config(None, small_settings(squares, data__memory_gb=memory_gb))
    found = early._found(config, SETS)
    network = setup.make_network(config, with_weights=False)
    alone = setup.load_data(config)
    monkeypatch.setattr(early, "taken", lambda *_: found)
    handed = setup.load_data(config)
    for data in (alone, handed):
        setup.check_data(config, data, network)
    assert handed.digests == alone.digests
    for name, mine in alone.sets.items():
        its = handed.sets[name]
        assert (its.headers, its.pieces, list(its._kept)) == (mine.headers, mine.pieces, list(mine._kept))
        assert its.memory.bytes_left == mine.memory.bytes_left
        assert (its.class_pixels is None) == (mine.class_pixels is None)
        assert its.class_pixels is None or np.array_equal(its.class_pixels, mine.class_pixels)
        for index in range(len(mine)):
            assert all(torch.equal(mine[index][key], its[index][key]) for key in mine[index])


@pytest.mark.parametrize("size", [64, 200])
def test_memory_goes_to_images_in_their_order_whether_small_or_large(tmp_path, size):
    for name, side in (("source", size), ("source_val", size), ("target", 64), ("target_val", 64)):
        for number in range(3):
            values = np.full((3, side, side), number, np.uint8)
            values[:, 0, 0] = number + 1
            write_raster(tmp_path / name / "images" / f"{number}.tif", values)
            if name != "target":
                write_raster(tmp_path / name / "masks" / f"{number}.tif", values[:1] % 2)
    one = 4 * size * size
    config = load_config(
        None, small_settings(tmp_path, data__target__test=[], data__memory_gb=4.5 * one / 1e9, data__crop_size=32)
    )
    data = setup.load_data(config)
    setup.check_data(config, data, setup.make_network(config, with_weights=False))
    kept = {name: len(dataset._kept) for name, dataset in data.sets.items()}
    assert (kept["source_train"], kept["source_val"]) == (3, 1)
