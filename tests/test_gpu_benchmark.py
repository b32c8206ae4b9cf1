"""benchmarks/gpu.py, which measures on a GPU what nobody has measured yet: that all of it runs, and says what it left out."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(PROJECT / "benchmarks" / "gpu.py")]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    return importlib.import_module("gpu")


def fails():
    raise ValueError("not here")


def runs_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def test_what_fails_is_named_with_the_reason_and_the_rest_is_measured(gpu, tmp_path):
    part = {"fails": fails, "large": runs_out, "fine": lambda: {"mb": 1.0}, "ends": lambda: os._exit(3), "last": dict}
    assert list(gpu.measured(part, 600.0)) == [
        ("fails", None, "ValueError: not here"),
        ("large", None, "out of memory"),
        ("fine", {"mb": 1.0}, None),
        ("ends", None, "its process ended with code 3"),
        ("last", None, "its process ended with code 3"),
    ]


def test_what_there_is_no_time_for_is_named(gpu):
    assert list(gpu.measured({"one": dict, "two": dict}, 0.0)) == [
        (name, None, "no time left (its part had 0 s)") for name in ("one", "two")
    ]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses():
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no GPU that torch can use here" in done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_every_part_runs_on_a_cpu(tmp_path):
    file = tmp_path / "gpu.json"
    small = ["--device", "cpu", "--small", "--seconds", "3000", "--output", str(file)]
    subprocess.run([*COMMAND, *small], check=True, cwd=tmp_path, capture_output=True)
    found = json.loads(file.read_text())
    assert found["left out"] == []
    counts = {part: len(results) for part, results in found["parts"].items()}
    assert counts == {"waits": 1, "loaders": 1, "memory": 2, "resume": 1, "trials": 1, "predict": 1, "steps": 3}
    assert found["parts"]["resume"]["killed and resumed"]["largest_difference"] == 0
    assert sorted(found["goals"]) == [
        "steps, tu-test_resnet, bf16", "steps, tu-test_resnet, bf16, channels last, compiled",
        "steps, tu-test_resnet, fp32", "waits, tu-test_resnet, bf16",
    ]  # fmt: skip
