"""The smallest data and settings with which every job runs for real, in seconds: for benchmarks, `make chaos` and the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_domain(
    folder: Path, count: int, seed: int, inverted: bool = False, size: int = 32, masks: bool = True
) -> Path:
    """A folder pair images/ + masks/: bright squares on dark noise (or, inverted, dark on bright)."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    if masks:
        (folder / "masks").mkdir()
    for number in range(count):
        image = rng.integers(0, 60, (size, size, 3)).astype(np.uint8)
        mask = np.zeros((size, size), np.uint8)
        side = size // 2 - 2
        top, left = rng.integers(0, size - side, 2)
        image[top : top + side, left : left + side] += 180
        mask[top : top + side, left : left + side] = 1
        Image.fromarray(255 - image if inverted else image).save(folder / "images" / f"{number}.png")
        if masks:
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def small_settings(root: Path) -> dict[str, Any]:
    """Dotted settings of a run of seconds on the folders source, source_val, target, target_val, target_test of `root`."""
    return {
        "model.arch": "unet",
        "model.encoder_name": "resnet18",
        "model.encoder_weights": None,
        "model.encoder_depth": 3,
        "model.decoder_channels": [16, 8, 8],
        "data.root": str(root),
        "data.class_names": ["ground", "square"],
        "data.source.train": ["source"],
        "data.source.val": ["source_val"],
        "data.source.batch_size": 4,
        "data.target.train": ["target"],
        "data.target.val": ["target_val"],
        "data.target.test": ["target_test"],
        "data.target.batch_size": 3,
        "domain_adaptation.method.hidden_size": 16,
        "pretraining.max_epochs": 1,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "threads": 1,
    }


def model_folder(artifacts: Path | str | None) -> Path:
    """Return the folder of the model of the run whose own files lie in `artifacts`: it lies beside the runs of its experiment.
    Raises StopIteration if there is none."""
    of_the_run = Path(str(artifacts))
    described = of_the_run.parents[1].glob("models/*/artifacts/MLmodel")
    return next(file.parent for file in described if f"run_id: {of_the_run.parent.name}" in file.read_text())
