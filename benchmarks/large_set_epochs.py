"""Goes through the training loaders of a job, an epoch for each line it reads, and prints images per second (large_set.py)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dann_experiments import load_config
from dann_experiments.jobs.build import find_data, make_loaders, seeded


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    with seeded(config):
        loaders = make_loaders(config, find_data(config).read()).training()
        for _ in sys.stdin:
            images, began = 0, time.perf_counter()
            for batches in zip(*loaders.values(), strict=True):
                images += sum(len(batch["index"]) for batch in batches)
            print(images / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
