"""What a job does before its first training step, and what it need not do."""

from __future__ import annotations

import contextlib
import gc
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import read_sets, small_settings, write_raster
from PIL import Image, PngImagePlugin

from dann_experiments import cli
from dann_experiments.config import InputError, load_config
from dann_experiments.config.imports import uncollected
from dann_experiments.data import digests, pixels, rasters
from dann_experiments.data.samples import files_of
from dann_experiments.jobs.build import find_data, make_network
from dann_experiments.names import SOURCE_TRAIN, SOURCE_VAL

PROJECT = Path(__file__).parents[1]
HEAVY = ("torch", "mlflow", "pytorch_lightning", "optuna", "numpy")


def imported_by(module: str, *arguments: str) -> set[str]:
    """Top-level names that `python -m MODULE ARGUMENTS` imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, *arguments], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in times}


@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["config"]], ids=" ".join)
def test_help_and_settings_of_the_jobs_import_nothing_heavy(arguments):
    found = imported_by("dann_experiments", *arguments)
    assert "yaml" in found
    assert ("jsonargparse" in found) == (arguments == ["config"])
    assert not found & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_of_the_sweeps_imports_nothing_heavy(arguments):
    assert not imported_by("sweeps", *arguments) & set(HEAVY)


def test_what_is_imported_without_collections_is_left_out_of_later_ones(monkeypatch):
    generations: list[int] = []
    count = lambda phase, info: generations.append(info["generation"])  # noqa: E731
    frozen = gc.get_freeze_count()
    gc.callbacks.append(count)
    try:
        with uncollected():
            made = [[number] for number in range(100_000)]
            monkeypatch.setitem(sys.modules, "imported_here", types.ModuleType("imported_here"))
        assert not generations
        frozen_now = gc.get_freeze_count()
        with uncollected():  # nothing is imported: a job's own objects stay within reach of later collections
            more = [[number] for number in range(1000)]
        assert gc.get_freeze_count() <= frozen_now
    finally:
        gc.callbacks.remove(count)
    assert gc.isenabled()
    assert frozen_now - frozen >= len(made)
    assert len(more) == 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "after", "loaded"),
    [
        ("import torchmetrics", "assert 'scipy.signal' not in sys.modules", False),
        ("import torchmetrics", "from scipy.signal import find_peaks; find_peaks([0, 1, 0])", True),
        ("import torchmetrics, scipy.signal; scipy.signal.find_peaks([0, 1, 0])", "import scipy.signal.windows", True),
        (
            "import torchmetrics; from scipy.signal import find_peaks",
            "import scipy.signal; scipy.signal.windows.hamming(3)",
            True,
        ),
    ],
)
def test_programs_import_scipy_signal_only_if_something_uses_it(block, after, loaded):
    code = f"""
import sys
from dann_experiments.config.imports import quick_imports
with quick_imports():
    {block}
{after}
assert ('scipy.signal._peak_finding' in sys.modules) == {loaded}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [("dann_experiments", "check-data", "--config", "digits"), ("sweeps", "run")])
def test_without_the_installed_packages_one_line_says_so(words):
    command = [sys.executable, "-S", "-m", *words]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 2
    assert "is not installed for" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_libraries_report_no_leaks_at_the_end_of_a_command():
    code = "from dann_experiments import cli; cli._imported(); import torch._dynamo"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commands_import_the_jobs_without_collections(monkeypatch):
    inside: list[bool] = []

    @contextlib.contextmanager
    def watched():
        inside.append(True)
        yield

    monkeypatch.setattr(cli, "quick_imports", watched)
    jobs, _ = cli._imported()
    assert inside == [True]
    assert jobs.adapt


def test_a_network_whose_weights_all_come_from_a_checkpoint_is_built_without_drawing_any(squares):
    config = load_config(None, small_settings(squares, model__encoder_name="vgg11_bn"))
    drawn = make_network(config, with_weights=False)
    before = torch.get_rng_state()
    undrawn = make_network(config, with_weights=False, initialize=False)
    assert torch.equal(torch.get_rng_state(), before)
    undrawn.load_state_dict(drawn.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(drawn.eval()(images), undrawn.eval()(images))


def test_the_header_of_an_image_is_read_once(squares, monkeypatch):
    asked, header_of = [], rasters.header_of
    for module in (rasters, pixels):
        monkeypatch.setattr(module, "header_of", lambda file: asked.append(file.name) or header_of(file))
    sets = read_sets(load_config(None, small_settings(squares)))
    samples = [sample for one in sets.sets.values() for sample in one.samples]
    assert sorted(name for name in asked if "/images/" in name) == sorted(str(sample.image) for sample in samples)


def test_each_file_is_opened_for_its_header_and_for_its_pixels_and_its_bytes_are_hashed_once(squares, monkeypatch):
    config = load_config(None, small_settings(squares))
    opened, reader = [], rasterio.io.DatasetReader
    monkeypatch.setattr(rasterio.io, "DatasetReader", lambda path: opened.append(path) or reader(path))
    hashed, file_digest = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path, *more: hashed.append(path) or file_digest(path, *more))
    sets = read_sets(config)
    assert sets.digests
    files = [path for one in sets.sets.values() for path in files_of(one.samples)]
    assert sorted(opened) == sorted(2 * [str(path) for path in files])
    assert sorted(hashed) == sorted(files)


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
    sets = read_sets(config).sets
    assert (len(sets[SOURCE_TRAIN]._kept), len(sets[SOURCE_VAL]._kept)) == (3, 1)


@pytest.mark.parametrize("broken", ["header", "pixels", "missing"])
def test_what_is_wrong_with_a_file_is_reported_with_its_name(squares, tmp_path, broken):
    root = tmp_path / "data"
    shutil.copytree(squares, root)
    file = root / "source" / "masks" / "3.png"
    if broken == "header":
        file.write_bytes(b"no image")
    elif broken == "missing":
        file.unlink()
    else:
        shutil.copy(root / "source" / "images" / "3.png", file)  # three bands
    with pytest.raises(InputError, match=r"3\.png"):
        read_sets(load_config(None, small_settings(root)))


@pytest.mark.parametrize("kind", ["exif", "text"])
def test_the_orientation_of_a_png_is_found_whatever_chunk_holds_it(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    more: dict[str, Any] = {"exif": exif}
    if kind == "text":
        more = {"pnginfo": PngImagePlugin.PngInfo()}
        more["pnginfo"].add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    image.save(tmp_path / "turned.png", **more)
    image.save(tmp_path / "upright.png")
    heights = [rasters.read_header(tmp_path / f"{name}.png").height for name in ("turned", "upright")]
    assert heights == [6, 4]


def test_gdal_is_set_up_once_a_set_not_once_a_file(squares, monkeypatch):
    made, real = [], rasterio.Env
    monkeypatch.setattr(rasterio, "Env", lambda **options: made.append(options) or real(**options))
    data = find_data(load_config(None, small_settings(squares)))
    assert len(made) == len(data.names)
