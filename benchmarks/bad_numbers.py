"""What does watching for numbers that are not finite add to a training step?

    python benchmarks/bad_numbers.py [--write]

Steps of DANN on random images, by one thread on the CPU, with the watch of every run (`training/bad_numbers.py`): seconds of the
processor, which other work on the machine hardly moves, spent in the watch against those of the rest of its step (goal: below
1 %, median over steps). `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pages import circumstances, put, spread
from torch.utils.data import DataLoader

from dann_experiments import Config, load_config
from dann_experiments.adaptation.dann import DANNMethod
from dann_experiments.jobs import build, build_training
from dann_experiments.training.bad_numbers import BadNumbers
from dann_experiments.training.module import AdaptationModule

WARM_UP = 2  # steps in which caches fill and the optimizer makes its state


class Timed(BadNumbers):
    """The watch with a clock: seconds in its hooks, and of the whole step, for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[float] = []
        self.whole: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._start = time.process_time()
        super().on_train_batch_start(*arguments)
        self.own.append(time.process_time() - self._start)

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        start = time.process_time()
        super().on_before_optimizer_step(*arguments)
        self.own[-1] += time.process_time() - start

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.whole.append(time.process_time() - self._start)


def row(name: str, config: Config, side: int, count: int, steps: int) -> str:
    """A line of the table: `count` source and as many target images a step."""
    network = build.make_network(config, with_weights=False)
    taps = build.make_taps(config, network)
    method = build.make_method(config, taps)
    assert isinstance(method, DANNMethod)
    module = AdaptationModule(
        network, method, taps, build_training.optimizer_maker(config.optimizer, "32-true"),
        batchnorm=config.domain_adaptation.batchnorm,
    )  # fmt: skip
    item = {
        "image": torch.randn(config.model.in_channels, side, side),
        "mask": torch.randint(0, config.model.classes, (side, side)),
        "index": torch.tensor(0),
    }
    loader = DataLoader([{"source": item, "target": item}] * (count * (steps + WARM_UP)), batch_size=count)  # pyright: ignore[reportArgumentType]
    watch = Timed()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[watch], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    own, whole = np.array(watch.own[WARM_UP:]), np.array(watch.whole[WARM_UP:])
    share = own / (whole - own)
    return f"| {name} | {1e3 * np.median(whole - own):.0f} | {1e3 * np.median(own):.2f} | {spread(share, '.2%')} |"


def main() -> None:
    """Print the table, and put it into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each network")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_config("digits")
    unet = load_config(
        None,
        {
            "model.arch": "unet",
            "model.encoder_name": "resnet34",
            "model.encoder_weights": None,
            "model.classes": 5,
            "data.class_names": ["a", "b", "c", "d", "e"],
            "data.source.train": ["none"],
            "data.target.train": ["none"],
        },
    )
    batch = digits.data.source.batch_size
    text = "\n".join(
        [
            "| network | rest of the step, ms | the watch, ms | share, median (quartiles) |",
            "|---|---|---|---|",
            row(f"recipes/digits.yaml, {batch} + {batch} images of 32 x 32", digits, 32, batch, arguments.steps),
            row("Unet resnet34, 4 + 4 images of 128 x 128", unet, 128, 4, arguments.steps),
            "",
            f"{arguments.steps} steps a line. {circumstances('torch', 'segmentation-models-pytorch', 'pytorch-lightning')}",
        ]
    )
    print(text)
    if arguments.write:
        put("performance.md", "bad_numbers", text)


if __name__ == "__main__":
    main()
