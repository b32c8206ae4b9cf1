"""What does a validation cost against a bare loop of forwards?

    python benchmarks/validation.py [--write]

`adapt` as users run it; after each of its validations the same images go through the same network once more, in a loop that
loads and forwards them and does nothing else. The difference is what scores, losses, the domain classifier's accuracy, the
scores without labels and Lightning cost. One thread; ratios of each pair, medians. `--write` puts the table into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pages import circumstances, put, spread
from step import config_of, quiet, write_images

from dann_experiments import adapt
from dann_experiments.config import replace
from dann_experiments.models.taps import evaluating


class Pairs(pl.Callback):
    """Seconds of each validation, and of the bare loop behind it."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._start = 0.0

    def on_validation_start(self, *_: Any) -> None:
        self._start = time.thread_time()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ours, start = time.thread_time() - self._start, time.thread_time()
        network: Any = pl_module.network
        with evaluating(network):
            for loader in trainer.val_dataloaders or []:
                for batch in loader:
                    network(batch["image"].to(pl_module.device))
        self.seconds.append((ours, time.thread_time() - start))


def row(encoder: str, side: int, classes: int, options: argparse.Namespace) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        root = Path(folder)
        write_images(root, side, options.batch, options.images)
        config = replace(
            config_of(encoder, "encoder", root, options, side, classes),
            {"trainer.max_epochs": options.pairs, "data.target.val": ["val"], "data.eval_batch_size": options.batch},
        )
        pairs = Pairs()
        adapt(config, callbacks=[pairs])
    ours, bare = np.array(pairs.seconds[1:]).T
    return (
        f"| {encoder} | {classes} | {side} x {side} | {np.median(bare):.2f} | {np.median(ours):.2f} "
        f"| {spread(ours / bare)} |"
    )


def main() -> None:
    """Print the table, and put it into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="validations of each line")
    parser.add_argument("--images", type=int, default=48, help="images of each domain")
    parser.add_argument("--batch", type=int, default=8, help="images a batch; 8 is what runs take by default")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    options.device, options.precision, options.batchnorm, options.threads = "cpu", "32-true", "separate", 1
    options.channels_last, options.compile, options.workers = "as by default", False, 0
    lines = [
        "| encoder of the Unet | classes | images | bare loop, s | validation, s | ratio, median (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    for case in (("resnet18", 128, 5), ("resnet34", 256, 5), ("resnet34", 256, 19)):
        lines.append(row(*case, options))
        print(lines[-1], flush=True)
    lines += ["", f"{options.pairs} pairs a line, {options.images} images of each domain, batches of {options.batch}. "
              f"{circumstances('torch', 'segmentation-models-pytorch', 'pytorch-lightning')}"]  # fmt: skip
    if options.write:
        put("performance.md", "validation", "\n".join(lines))


if __name__ == "__main__":
    main()
