"""What a job does before its first training step, and what it need not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
import torch
from conftest import small_settings

from dann_experiments.config import load_config
from dann_experiments.data import reading
from dann_experiments.jobs import setup

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


def test_a_network_whose_weights_all_come_from_a_checkpoint_is_built_without_drawing_any(squares):
    config = load_config(None, small_settings(squares, model__encoder_name="vgg11_bn"))
    drawn = setup.make_network(config, with_weights=False)
    before = torch.get_rng_state()
    undrawn = setup.make_network(config, with_weights=False, drawn=False)
    assert torch.equal(torch.get_rng_state(), before)
    undrawn.load_state_dict(drawn.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(drawn.eval()(images), undrawn.eval()(images))


def test_what_a_file_says_of_itself_is_asked_of_an_image_once(squares, monkeypatch):
    config = load_config(None, small_settings(squares))
    asked = []
    header = reading._header
    monkeypatch.setattr(reading, "_header", lambda file, *known: asked.append(file.name) or header(file, *known))
    data = setup.load_data(config)
    setup.check_data(config, data, setup.make_network(config, with_weights=False))
    samples = [sample for one in data.sets.values() for sample in one.samples]
    assert sorted(name for name in asked if "/images/" in name) == sorted(str(sample.image) for sample in samples)


def test_a_small_file_is_opened_once_for_its_header_and_its_pixels_and_once_for_its_bytes(squares, monkeypatch):
    config = load_config(None, small_settings(squares))
    opened, reader = [], rasterio.io.DatasetReader
    monkeypatch.setattr(rasterio.io, "DatasetReader", lambda path: opened.append(path) or reader(path))
    read, plain = [], open
    monkeypatch.setattr("builtins.open", lambda path, *more, **named: read.append(path) or plain(path, *more, **named))
    data = setup.load_data(config)
    setup.check_data(config, data, setup.make_network(config, with_weights=False))
    assert data.digests
    files = [
        str(path)
        for one in data.sets.values()
        for sample in one.samples
        for path in (sample.image, sample.mask)
        if path is not None
    ]
    assert sorted(opened) == sorted(files)
    assert sorted(str(path) for path in read if str(path).endswith(".png")) == sorted(files)


def test_gdal_is_set_up_once_a_set_not_once_a_file(squares, monkeypatch):
    made, real = [], rasterio.Env
    monkeypatch.setattr(rasterio, "Env", lambda **options: made.append(options) or real(**options))
    data = setup.load_data(load_config(None, small_settings(squares)))
    assert len(made) == len(data.sets)
