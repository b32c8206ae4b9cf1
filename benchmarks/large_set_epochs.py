"""Goes through the training loaders of a job, an epoch for each line it reads, and prints images per second (large_set.py)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from dann_experiments import load_config


def loaders_of(config):
    """The training loaders by domain, in this version or that of `earlier.BEFORE`."""
    try:
        from dann_experiments.jobs.build import find_data, make_loaders
    except ImportError:
        from dann_experiments.jobs.fit import train_loaders  # pyright: ignore[reportMissingImports]
        from dann_experiments.jobs.setup import load_data, settle  # pyright: ignore[reportMissingImports]

        data = load_data(config)
        settle(config, data)
        return train_loaders(config, data)
    return make_loaders(config, find_data(config).read()).training()


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads or 1)
    loaders = loaders_of(config)
    for _ in sys.stdin:
        images, began = 0, time.perf_counter()
        for batches in zip(*loaders.values(), strict=True):
            images += sum(len(batch["image"]) for batch in batches)
        print(images / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
