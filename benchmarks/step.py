"""What does a step of DANN cost against the arithmetic that it needs?

    python benchmarks/step.py [--write]

`adapt` as users run it (its loaders, tracking, watch and checkpoints, on a real store) trains a network, and after each of its
steps the same is done in plain torch: the *floor* (full network on the source, encoder up to the tapped layer on the target, in
two passes, backward, optimizer) and a *source-only* step. Everything is timed in turn in one process, so that other work on the
machine meets all alike. Ratios are of one turn; medians over turns. The floor is measured in torch's own memory format and
channels last. `--device cuda` measures blocks of steps, the device waited for at their ends; `--precision bf16-mixed` gives floor
and source-only the same autocast, `--compile` the same compilation. `--write` puts the table into docs/performance.md; `--keep`
adds the rows to those that earlier commands left in that file, so that a long table can be measured in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pages import circumstances, put, spread
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dann_experiments import Config, adapt, load_config
from dann_experiments.checkpoints.saved_model import save_model
from dann_experiments.command_line import quiet_libraries
from dann_experiments.jobs import build, build_training
from dann_experiments.models.compiling import compile_parts
from dann_experiments.models.networks import keeps_channels_last
from dann_experiments.models.passes import forward_to_taps
from dann_experiments.models.taps import Tap, resolve_taps

ENCODERS = ("resnet18", "resnet34", "mobilenet_v2", "mit_b0")
TAPS = {"deepest": "encoder", "middle": "encoder.3"}
CLASSES = 5
SIZE = 128
WARM_UP = 3


class Turns(pl.Callback):
    """After each `block` of the run's steps: their time, then the same number of each of `others`, timed too."""

    def __init__(self, others: dict[str, Callable[[], Callable[[], object]]], block: int, device: torch.device) -> None:
        self._makers, self._block, self._device = others, block, device
        self._others: dict[str, Callable[[], object]] = {}
        self.seconds: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}
        self._begun = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._others = {name: make() for name, make in self._makers.items()}
        self._begun = self._now()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self._block:
            return
        self.seconds["ours"].append(self._now() - self._begun)
        for name, step in self._others.items():
            start = self._now()
            for _step in range(self._block):
                step()
            self.seconds[name].append(self._now() - start)
        self._begun = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        # of the training thread, which other work on the machine does not move much
        return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def plain_steps(config: Config, device: torch.device, tap: str) -> dict[str, Callable[[], Callable[[], object]]]:
    """Makers of the floor's step and of the source-only one, each with a network of its own."""
    side, classes = config.data.crop_size or 0, config.model.classes
    source, target = config.data.source.batch_size, config.data.target.batch_size

    def images(count: int) -> Tensor:
        return torch.randn(count, 3, side, side, device=device)

    def make(with_target: bool, channels_last: bool = False) -> Callable[[], object]:
        network = build.make_network(config, with_weights=False).to(device).train()
        order = torch.channels_last if channels_last else torch.contiguous_format
        network = network.to(memory_format=order)  # pyright: ignore[reportCallIssue]
        taps: list[Tap] = resolve_taps(network, [tap], 3)
        if config.trainer.compile:
            compile_parts(network, {one.module for one in taps})
        optimizer = build_training.optimizer_maker(config.optimizer, config.trainer.precision)(
            [{"params": list(network.parameters()), "name": "network"}]
        )
        labels = torch.randint(0, classes, (source, side, side), device=device)
        source_images, target_images = (images(count).to(memory_format=order) for count in (source, target))
        precise = config.trainer.precision == "32-true"

        def step() -> None:
            with contextlib.nullcontext() if precise else torch.autocast(device.type, torch.bfloat16):
                loss = functional.cross_entropy(network(source_images).float(), labels)
                if with_target:
                    features = forward_to_taps(network, target_images, taps)[tap]
                    loss = loss + 1e-3 * features.float().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return {
        "floor": lambda: make(True),
        "floor, channels last": lambda: make(True, True),
        "source only": lambda: make(False),
    }


def config_of(
    encoder: str,
    tap: str,
    root: Path,
    options: argparse.Namespace,
    side: int,
    classes: int = CLASSES,
    method: str = "dann",
) -> Config:
    """Settings of `adapt` on random images, from a network saved with random weights."""
    count = options.batch
    settings = {
        "model.arch": "unet",
        "model.encoder_name": encoder,
        "model.encoder_weights": None,
        "model.classes": classes,
        "data.root": str(root),
        "data.class_names": [f"class {index}" for index in range(classes)],
        "data.source.train": ["train"],
        "data.source.val": ["val"],
        "data.source.batch_size": count,
        "data.target.train": ["train"],
        "data.target.batch_size": count,
        "data.crop_size": side,
        "data.num_workers": options.workers,
        "domain_adaptation.method.name": method,
        # at lambda 0, where the schedule begins, DANN computes no gradient for the target
        "domain_adaptation.method.lambda_schedule.kind": "constant",
        "domain_adaptation.method.feature_layer": tap,
        "domain_adaptation.batchnorm": options.batchnorm,
        "domain_adaptation.pretrained_checkpoint.path": str(root / encoder),
        "trainer.max_epochs": 1,
        "trainer.accelerator": "gpu" if options.device == "cuda" else "cpu",
        "trainer.precision": options.precision,
        "trainer.channels_last": {"yes": True, "no": False}.get(options.channels_last),
        "trainer.compile": options.compile,
        "trainer.enable_progress_bar": False,
        "tracking.uri": f"sqlite:///{root}/mlflow.db",
        "tracking.folder": str(root / "runs"),
        "threads": options.threads,
    }
    config = load_config(None, settings)
    if not (root / encoder).exists():
        torch.manual_seed(0)
        save_model(
            root / encoder, build.make_network(config, with_weights=False), "unet", build.model_arguments(config), {}
        )
    return config


def write_images(root: Path, side: int, count: int, held_out: int = 4) -> None:
    """Random images with masks: `count` for training, `held_out` for validation."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", held_out)):
        for kind, shape, high in (("images", (side, side, 3), 256), ("masks", (side, side), CLASSES)):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for index in range(number):
                image = Image.fromarray(rng.integers(0, high, shape).astype(np.uint8))
                image.save(folder / f"{index}.png", compress_level=0)


def measured(
    config: Config, tap: str, options: argparse.Namespace, kinds: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Seconds a step of ours and of every kind of `plain_steps` (None: of all), one value a turn."""
    device = torch.device(options.device)
    others = plain_steps(config, device, tap)
    turns = Turns({kind: others[kind] for kind in kinds or others}, options.block, device)
    adapt(config, callbacks=[turns])
    return {name: np.array(values[WARM_UP:]) / options.block for name, values in turns.seconds.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The runs say nothing; that training images are both domains' is meant."""
    quiet_libraries()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


HEAD = (
    "| encoder of the Unet | tap | source only, ms | floor, ms | floor channels last, ms | ours, ms | kept channels last by ours "
    "| ours / floor, median (quartiles) | ours / floor channels last | ours / source only |\n|" + "---|" * 10
)


def rows(options: argparse.Namespace) -> Iterator[str]:
    """Lines of the table, while they are measured."""
    for encoder in options.encoders:
        for place in options.taps:
            with tempfile.TemporaryDirectory() as folder, quiet():
                root = Path(folder)
                write_images(root, options.size, options.batch * options.block * (options.turns + WARM_UP))
                config = config_of(encoder, TAPS[place], root, options, options.size, method=options.method)
                found = measured(config, TAPS[place], options)
                kept = keeps_channels_last(
                    config.trainer.channels_last,
                    build.make_network(config, with_weights=False),
                    torch.device(options.device),
                    options.precision,
                )
            kinds = ("source only", "floor", "floor, channels last", "ours")
            times = " | ".join(f"{1e3 * np.median(found[name]):.1f}" for name in kinds)
            ratios = " | ".join(spread(found["ours"] / found[name]) for name in kinds[1:3])
            over = np.median(found["ours"] / found["source only"])
            yield f"| {encoder} | {place} | {times} | {'yes' if kept else 'no'} | {ratios} | {over:.3f} |"


def main() -> None:
    """Print the table, and put it into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS))
    parser.add_argument("--taps", nargs="+", default=list(TAPS), choices=list(TAPS))
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images, pixels; 256 has a table of its own")
    parser.add_argument("--batch", type=int, default=4, help="images of each domain a step")
    parser.add_argument("--turns", type=int, default=21, help="measured turns of each line")
    parser.add_argument("--block", type=int, help="steps a turn; default: 1 on the CPU, 10 on a GPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--channels_last", choices=["as by default", "yes", "no"], default="as by default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batchnorm", default="separate")
    parser.add_argument(
        "--method", default="dann", choices=["dann", "lambda_zero"], help="ours; it has a table of its own"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers")
    parser.add_argument("--keep", type=Path, help="file to which the rows are added, below those of earlier commands")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    options.block = options.block or (10 if options.device == "cuda" else 1)
    lines = options.keep.read_text().splitlines() if options.keep is not None and options.keep.exists() else []
    print("\n".join([HEAD, *lines]), flush=True)
    for line in rows(options):
        print(line, flush=True)
        lines.append(line)
        if options.keep is not None:
            options.keep.write_text("\n".join(lines))
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} thread(s)"
    lines += ["", f"{options.batch} + {options.batch} images of {options.size} x {options.size}, {options.precision}, batchnorm "
              f"{options.batchnorm}, {place}, {options.turns} turns of {options.block}. "
              f"{circumstances('torch', 'segmentation-models-pytorch', 'pytorch-lightning', 'mlflow')}"]  # fmt: skip
    print("\n".join(lines[-2:]))
    if options.write:
        size = "" if options.size == SIZE else f"_{options.size}"
        half = "" if options.precision == "32-true" else "_half"
        control = "" if options.method == "dann" else "_control"
        put("performance.md", f"step_{options.device}{size}{half}{control}", "\n".join([HEAD, *lines]))


if __name__ == "__main__":
    main()
