"""What does drawing each figure cost?

    python benchmarks/figures.py [--write]

Milliseconds of the thread that draws, median of `--turns` after a first one. `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pages import circumstances, put

from dann_experiments.comparison import report
from dann_experiments.reports.plots.confusion import draw_confusion
from dann_experiments.reports.plots.domains import draw_domains
from dann_experiments.reports.plots.predictions import draw_predictions
from dann_experiments.reports.plots.run_curves import draw_curves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_comparison_page import example  # pyright: ignore[reportMissingImports]


def figures(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name each figure and how it is drawn, from random numbers of a small run's size."""
    rng, names = np.random.default_rng(0), ["background", "digit", "other"]
    images, ids = list(rng.random((6, 64, 64, 3))), list(rng.integers(0, 3, (6, 64, 64)))
    history: dict[str, list[tuple[int, float]]] = {
        name: [(100 * i, 0.5 + i / 30) for i in range(11)] for name in ("iou/source_val", "iou/target_val")
    }
    history |= {name: list(enumerate(rng.random(1000))) for name in ("da/domain_acc", "da/lambda")}
    pixels = {name: np.array([5, 1, 2]) for name in ("source_train", "source_val", "target_val", "target_test")}
    values = {domain: rng.normal(90, 30, (3, 5000)) for domain in ("source", "target")}
    maps, comparison = {"before": ids, "after": ids}, example()
    yield "predictions, 6 images", lambda: draw_predictions(folder / "p.png", images, ids, maps, names, "target images")
    for count in (3, 19):
        classes, counts = [f"class {i}" for i in range(count)], rng.integers(0, 9999, (count, count))
        path = folder / f"{count}.png"
        yield f"confusion, {count} classes", lambda c=counts, n=classes, p=path: draw_confusion(p, c, n, "target val")
    yield "curves, 1,000 steps", lambda: draw_curves(folder / "curves.png", history, "run")
    yield "domains (check-data)", lambda: draw_domains(folder / "domains.png", pixels, names, values)
    yield "page of a comparison, 5 arms x 5 seeds", lambda: report.write_page(folder / "page.html", comparison)
    yield "its summary", lambda: report.draw_summary(folder / "summary.png", comparison)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = ["| figure | ms |", "|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in figures(Path(folder)):
            seconds = []
            for _ in range(options.turns + 1):
                start = time.thread_time()
                draw()
                seconds.append(time.thread_time() - start)
            rows.append(f"| {name} | {1000 * np.median(seconds[1:]):.0f} |")
    text = "\n".join([*rows, "", circumstances("matplotlib")])
    print(text)
    if options.write:
        put("performance.md", "figures", text)


if __name__ == "__main__":
    main()
