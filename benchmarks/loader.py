"""Do the loaders keep up with training, and does memory stay bounded on large rasters?

    python benchmarks/loader.py --neon_trees FOLDER [--write]

Images a second that both loaders give together, divided by what training steps consume (goal: at least 2), for the demo and
for recipes/neon_trees.yaml; peak memory of a training on two rasters of 10,000 x 10,000 pixels against two of 2,500 x 2,500.
`--write` puts the tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import circumstances, put
from pytorch_lightning.utilities import move_data_to_device

from dann_experiments import load_config
from dann_experiments.config import Config, config_to_yaml
from dann_experiments.jobs import build, build_training
from dann_experiments.jobs.checks import checked_sets
from dann_experiments.training.loop import together
from dann_experiments.training.losses import segmentation_loss
from dann_experiments.training.module import AdaptationModule

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ROUNDS = 5
STEPS = 12
SIDES = (2500, 10000)


def rates(config: Config, device: str = "cpu") -> tuple[float, float]:
    """Images a second: of the loaders, and of the training step (median of some rounds, loaders and steps in turn)."""
    with build.seeded(config):
        data = build.find_data(config)
        network = build.make_network(config, with_weights=False)
        sets = checked_sets(config, data, network)
        taps = build.make_taps(config, network)
        method = build.make_method(config, taps)
        make_optimizer = build_training.optimizer_maker(config.optimizer, config.trainer.precision)
        module = AdaptationModule(
            network, method, taps, make_optimizer, None, config.data.ignore_index,
            config.domain_adaptation.batchnorm,
        ).to(device)  # fmt: skip
        groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "name": "network"}]
        optimizer = make_optimizer(groups + method.param_groups())
        loader = together(build.make_loaders(config, sets).training())
        batches = endless(loader)
        images = config.data.source.batch_size + config.data.target.batch_size
        loading, training = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            kept = [next(batches) for _ in range(STEPS)]
            loading.append(images * STEPS / (time.perf_counter() - start))
            start = time.perf_counter()
            for batch in kept:
                step(module, optimizer, batch, device, config.trainer.precision == "bf16-mixed")
            if device == "cuda":
                torch.cuda.synchronize()
            training.append(images * STEPS / (time.perf_counter() - start))
    return float(np.median(loading)), float(np.median(training))


def endless(loader: Any):
    """Batches, epoch after epoch."""
    while True:
        for batch, _, _ in loader:
            yield batch


def step(module: AdaptationModule, optimizer: torch.optim.Optimizer, batch: Any, device: str, half: bool) -> None:
    """What a training step computes, without Lightning around it."""
    from dann_experiments.adaptation.method import Progress

    batch = move_data_to_device(batch, torch.device(device))
    with torch.autocast(device, torch.bfloat16, enabled=half):
        outputs = module.step_outputs(batch)
        loss = segmentation_loss(outputs.source_logits, outputs.source_labels, module.ignore_index)
        share = module.method.loss(outputs, Progress(0, 1, 5, 10)).differentiated
    optimizer.zero_grad()
    (loss if share is None else loss + share).backward()
    optimizer.step()


def peak_memory(folder: Path, side: int) -> tuple[float, float]:
    """Peak memory (MB) and seconds of a process that trains on two rasters of `side` pixels square."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    rng = np.random.default_rng(0)
    profile = {"driver": "GTiff", "height": side, "width": side, "tiled": True, "blockxsize": 512, "blockysize": 512,
               "dtype": "uint8", "crs": "EPSG:32617", "transform": from_origin(4e5, 3e6, 0.1, 0.1)}  # fmt: skip
    for name, count in (("source", 3), ("source_mask", 1), ("target", 3)):
        with rasterio.open(folder / f"{name}_{side}.tif", "w", count=count, **profile) as file:
            for top in range(0, side, 500):
                rows = min(500, side - top)
                block = rng.integers(0, 2 if count == 1 else 255, (count, rows, side), dtype=np.uint8)
                file.write(block, window=Window(0, top, side, rows))  # pyright: ignore[reportCallIssue]
    config = load_config(None, {
        "model.encoder_name": "resnet18", "model.encoder_weights": None, "data.root": str(folder), "data.window_size": 256,
        "data.crop_size": 128, "data.memory_gb": 0.2, "data.source.batch_size": 4, "data.target.batch_size": 4,
        "data.source.train": [{"images": f"source_{side}.tif", "masks": f"source_mask_{side}.tif"}],
        "data.target.train": [f"target_{side}.tif"], "domain_adaptation.method.hidden_size": 64, "monitor.metric": None,
        "pretraining.max_epochs": 1, "trainer.max_epochs": 1, "trainer.limit_train_batches": 40, "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False, "tracking.uri": f"sqlite:///{folder}/mlflow_{side}.db",
    })  # fmt: skip
    (folder / f"{side}.yaml").write_text(config_to_yaml(config))
    start = time.perf_counter()
    command = [sys.executable, "-m", "dann_experiments", "adapt", "--config", f"{side}.yaml"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    """Measure and print, or write into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neon_trees", help="folder of the NEON tiles (see the recipe)")
    parser.add_argument("--write", action="store_true")
    known = parser.parse_args()
    memory = ["| two rasters of | peak memory | seconds |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:  # first: a child's peak starts at what its parent holds
        for side in SIDES:
            peak, seconds = peak_memory(Path(folder), side)
            memory.append(f"| {side:,} x {side:,} pixels | {peak:,.0f} MB | {seconds:.0f} |")
            print(memory[-1], flush=True)
    lines = ["| settings | loaders, images/s | training step, images/s | ratio |", "|---|---|---|---|"]
    for name, overrides in (("digits", {}), ("neon_trees", {"data.root": known.neon_trees})):
        if name == "neon_trees" and known.neon_trees is None:
            continue
        loading, training = rates(load_config(RECIPES / f"{name}.yaml", overrides))
        lines.append(f"| recipes/{name}.yaml | {loading:.0f} | {training:.0f} | {loading / training:.1f} |")
        print(lines[-1], flush=True)
    lines += ["", *memory]
    lines += ["", circumstances("torch", "rasterio")]
    if known.write:
        put("performance.md", "loader", "\n".join(lines))


if __name__ == "__main__":
    main()
