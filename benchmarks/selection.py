"""What do the target-free scores add to validation?

    python benchmarks/selection.py [--write]

Validating a target set with the scores of labels alone, and with every `select/` score beside them: loading and forwards
included, in turn, the ratio of each pair in one process (goal: at most 1.15 in the median). One thread, and seconds of the
processor, which other work on the machine hardly moves; the ratio of elapsed seconds is given, too. On the network and the target
validation of recipes/digits.yaml, and on a Unet resnet18 with 19 classes over drawn images of 160 x 160 pixels, with and without
a map of valid pixels. `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pages import circumstances, put, spread
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments import load_config
from dann_experiments.data.loaders import eval_loader
from dann_experiments.jobs import build
from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.models.taps import evaluating
from dann_experiments.names import TARGET_VAL
from dann_experiments.training.scoring import Scorer, SelectionScorer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
IGNORED = 255
IMAGES, BATCH, SIDE, CLASSES = 48, 8, 160, 19


def validate(network: nn.Module, loader: DataLoader, num_classes: int, with_selection: bool) -> tuple[float, float]:
    """Seconds of the processor, and elapsed, of one pass over a set; results are computed, too."""
    processor, elapsed = time.process_time(), time.perf_counter()
    scorer, selection = Scorer(num_classes, IGNORED), SelectionScorer()
    with evaluating(network):
        for batch in loader:
            logits = logits_of_any_size(network, batch["image"])
            scorer.update(logits, batch["mask"])
            if with_selection:
                selection.update(logits, batch.get("valid"))
    scorer.compute()
    if with_selection:
        selection.compute()
    return time.process_time() - processor, time.perf_counter() - elapsed


def row(name: str, network: nn.Module, loader: DataLoader, num_classes: int, repeats: int) -> str:
    """A line of the table; which of a pair goes first changes from pair to pair."""
    for with_selection in (False, True):
        validate(network, loader, num_classes, with_selection)  # first passes fill caches
    pairs = []
    for number in range(repeats):
        order = (False, True) if number % 2 == 0 else (True, False)
        seconds = {kind: validate(network, loader, num_classes, kind) for kind in order}
        pairs.append((seconds[False], seconds[True]))
    plain, both = np.array(pairs).swapaxes(0, 1)  # (pairs, 2) each: processor, elapsed
    ratios = both / plain
    return (
        f"| {name} | {np.median(plain[:, 0]):.2f} | {np.median(both[:, 0]):.2f} | {spread(ratios[:, 0])} "
        f"| {np.median(ratios[:, 1]):.3f} |"
    )


def drawn(with_valid: bool) -> Sequence[dict[str, torch.Tensor]]:
    """Noise images with noise labels; a quarter of each lacks data where `with_valid`."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(IMAGES):
        item = {
            "image": torch.randn(3, SIDE, SIDE, generator=generator),
            "mask": torch.randint(0, CLASSES, (SIDE, SIDE), generator=generator),
        }
        if with_valid:
            item["valid"] = torch.ones(SIDE, SIDE)
            item["valid"][: SIDE // 4] = 0
        items.append(item)
    return items


def main() -> None:
    """Measure and print, or write into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="pairs of validations")
    parser.add_argument("--write", action="store_true")
    known = parser.parse_args()
    lines = [
        "| target set | labels alone, s | with all scores, s | ratio, median (quartiles) | elapsed, ratio |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    config = load_config(RECIPES / "digits.yaml", {"threads": 1})
    with build.seeded(config):
        data = build.find_data(config, (TARGET_VAL,))
        network = build.make_network(config, with_weights=False)
        dataset = data.read(ahead=False).sets[TARGET_VAL]
        batch_size = config.data.eval_batch_size or config.data.target.batch_size
        name = f"recipes/digits.yaml, {len(dataset)} images of 32 x 32, {config.model.classes} classes"
        loader = eval_loader(dataset, batch_size)
        lines.append(row(name, network, loader, config.model.classes, known.repeats))
        print(lines[-1], flush=True)
    config = load_config(
        None,
        {"model.encoder_name": "resnet18", "model.encoder_weights": None, "model.classes": CLASSES, "threads": 1},
    )
    with build.seeded(config):
        network = build.make_network(config)
        for with_valid in (False, True):
            loader = DataLoader(drawn(with_valid), BATCH)  # pyright: ignore[reportArgumentType]
            name = f"Unet resnet18, {IMAGES} images of {SIDE} x {SIDE}, {CLASSES} classes"
            name += ", a quarter without data" if with_valid else ""
            lines.append(row(name, network, loader, CLASSES, known.repeats))
            print(lines[-1], flush=True)
    lines += ["", f"{known.repeats} pairs a line. {circumstances('torch', 'segmentation-models-pytorch')}"]
    print(lines[-1])
    if known.write:
        put("performance.md", "selection", "\n".join(lines))


if __name__ == "__main__":
    main()
