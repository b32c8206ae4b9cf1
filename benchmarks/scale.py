"""How do step time and memory grow with the size of images, of batches and of the domain classifier?

    python benchmarks/scale.py [--write]

Each line is a process of its own that runs `adapt` (Unet resnet18, tap at the encoder) and tells the median time of a step on
the training thread (one thread) and the peak of its memory. `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pages import circumstances, put
from step import config_of, quiet, write_images

from dann_experiments import adapt
from dann_experiments.config import replace

STEPS, WARM_UP = 8, 2
BASE = {"size": 128, "batch": 4, "hidden_size": 1024}
LINES = [
    ("size of the images, pixels", "size", (64, 128, 256, 512)),
    ("images of each domain", "batch", (1, 2, 4, 8, 16)),
    ("hidden_size of the classifier", "hidden_size", (64, 256, 1024, 4096)),
]


class Clock(pl.Callback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.thread_time()
        if self._begun is not None:
            self.seconds.append(now - self._begun)
        self._begun = time.thread_time()


def one(size: int, batch: int, hidden_size: int) -> None:
    """Train, and print what was measured as JSON."""
    options = argparse.Namespace(
        device="cpu", precision="32-true", batchnorm="separate", threads=1, channels_last="as by default", compile=False,
        workers=0, batch=batch,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, quiet():
        root = Path(folder)
        write_images(root, size, batch * (STEPS + WARM_UP), held_out=2)
        config = config_of("resnet18", "encoder", root, options, size)
        clock = Clock()
        adapt(replace(config, {"domain_adaptation.method.hidden_size": hidden_size}), callbacks=[clock])
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": float(np.median(clock.seconds[WARM_UP:])), "megabytes": int(peak.split()[1]) / 1024}))


def measured(**changed: int) -> dict[str, float]:
    """What a new process tells."""
    given = [str(value) for value in {**BASE, **changed}.values()]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *given], capture_output=True, text=True, check=True
    )  # the last line is the measurement
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> Iterator[str]:
    """Lines of the table, while they are measured."""
    yield "| what grows | value | step, ms | against the line before | peak memory, MB |"
    yield "|---|---|---|---|---|"
    for title, key, values in LINES:
        before: tuple[int, float] | None = None
        for value in values:
            found = measured(**{key: value})
            against = "-"
            if before is not None:
                against = f"x {found['seconds'] / before[1]:.2f} for x {value / before[0]:g}"
            before = value, found["seconds"]
            yield f"| {title} | {value} | {1e3 * found['seconds']:.0f} | {against} | {found['megabytes']:.0f} |"


def main() -> None:
    """Print the table, and put it into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, nargs=3, metavar=tuple(BASE), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    base = ", ".join(f"{key} {value}" for key, value in BASE.items())
    lines += ["", f"Where nothing else is said: {base}. {STEPS} steps a line. "
              f"{circumstances('torch', 'segmentation-models-pytorch', 'pytorch-lightning')}"]  # fmt: skip
    if options.write:
        put("performance.md", "scale", "\n".join(lines))


if __name__ == "__main__":
    main()
