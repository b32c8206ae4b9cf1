"""What a recipe gains on the embedded digits: source only, lambda = 0 control and DANN over seeds and data seeds.

    python benchmarks/digits_gain.py --config recipes/digits.yaml --seeds 0 1 2 3 4 --data-seeds 0 1 2

Every arm is an ordinary run (pretrain, adapt, evaluate) in the MLflow store, last checkpoint, nothing chosen by target
labels. `target test`: other digits and other areas of the photographs that adaptation saw. `unseen`: photographs used
nowhere else. Writes the table between the markers of docs/results.md with --write, and all numbers with run ids as CSV beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from pages import put

PROJECT = Path(__file__).resolve().parents[1]
ARMS = ("source only", "control", "DANN")
SCORES = {"val": "iou/target_val", "test": "iou/target_test", "source": "iou/source_val"}


def run_case(recipe: str, seed: int, data_seed: int, uri: str) -> dict[str, object]:
    """All arms of one seed and data seed; a row of scores in IoU points and run ids."""
    from dann_experiments import adapt, evaluate, load_config, pretrain

    common = {"seed": seed, "data.embedded.seed": data_seed, "threads": 1, "trainer.enable_progress_bar": False,
              "tracking.uri": uri, "tracking.experiment": f"digits gain {Path(recipe).stem}"}  # fmt: skip
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        source = pretrain(load_config(recipe, common))
        start = {**common, "domain_adaptation.pretrained_checkpoint.path": source.model_uri}
        runs = {
            "source only": source,
            "control": adapt(load_config(recipe, {**start, "domain_adaptation.method.name": "lambda_zero"})),
            "DANN": adapt(load_config(recipe, start)),
        }
        row: dict[str, object] = {"data_seed": data_seed, "seed": seed}
        for arm, result in runs.items():
            for short, metric in SCORES.items():
                row[f"{arm} {short}"] = round(100 * result.metrics[metric], 2)
            unseen = {**common, "domain_adaptation.pretrained_checkpoint.path": result.model_uri,
                      "data.target.test": ["target/unseen.csv"], "data.target.val": [], "data.source.val": [],
                      "monitor.metric": None}  # fmt: skip
            row[f"{arm} unseen"] = round(100 * evaluate(load_config(recipe, unseen)).metrics["iou/target_test"], 2)
            row[f"{arm} run"] = result.run_id
    return row


def table(rows: list[dict], recipe: str) -> str:
    """A Markdown table a case, then medians, ranges and how often DANN gained."""
    lines = [
        "| data seed | seed | source only | control | DANN | gain over source only | over control | source val before → after "
        "| unseen photographs: source only / control / DANN |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[str, list[float]] = {"source only": [], "control": []}
    unseen: dict[str, list[float]] = {"source only": [], "control": []}
    for row in rows:
        for arm in gains:
            gains[arm].append(row["DANN test"] - row[f"{arm} test"])
            unseen[arm].append(row["DANN unseen"] - row[f"{arm} unseen"])
        lines.append(
            f"| {row['data_seed']} | {row['seed']} | {row['source only test']:.1f} | {row['control test']:.1f} | "
            f"{row['DANN test']:.1f} | {gains['source only'][-1]:+.1f} | {gains['control'][-1]:+.1f} | "
            f"{row['source only source']:.1f} → {row['DANN source']:.1f} | "
            f"{row['source only unseen']:.1f} / {row['control unseen']:.1f} / {row['DANN unseen']:.1f} |"
        )
    lines.append("")
    for arm in gains:
        lines.append(f"- Target test, DANN - {arm}: {_spread(gains[arm])}.")
    for arm in unseen:
        lines.append(f"- Unseen photographs, DANN - {arm}: {_spread(unseen[arm])}.")
    forgotten = max(row["source only source"] - row["DANN source"] for row in rows)
    lines.append(f"- Largest drop of source val: {forgotten:.1f} points.")
    return f"`{recipe}`, IoU points (macro mean of both classes), last checkpoint:\n\n" + "\n".join(lines)


def _spread(gains: list[float]) -> str:
    positive = sum(gain > 0 for gain in gains)
    return (
        f"median {statistics.median(gains):+.1f}, mean {statistics.fmean(gains):+.1f} ± "
        f"{statistics.stdev(gains) if len(gains) > 1 else 0.0:.1f} (standard deviation), from {min(gains):+.1f} to "
        f"{max(gains):+.1f}, above 0 in {positive} of {len(gains)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/digits.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    options = parser.parse_args()
    sys.path.insert(0, str(PROJECT))
    from dann_experiments.data.digits import build_digits
    from dann_experiments.data.domain_data import embedded_folder
    from dann_experiments.tracking.store import open_store

    uri = open_store(None, f"digits gain {Path(options.config).stem}").uri  # made once, before the workers open it
    for data_seed in options.data_seeds:
        build_digits(embedded_folder(None), data_seed)
    cases = [(seed, data_seed) for data_seed in options.data_seeds for seed in options.seeds]
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        waiting = [pool.submit(run_case, options.config, seed, data_seed, uri) for seed, data_seed in cases]
        for done in as_completed(waiting):
            rows.append(done.result())
            print(f"{len(rows)}/{len(cases)}", {k: v for k, v in rows[-1].items() if "run" not in k}, flush=True)
    rows.sort(key=lambda row: (row["data_seed"], row["seed"]))
    text = table(rows, options.config)
    print(text)
    name = Path(options.config).stem
    if options.write:
        with open(PROJECT / "docs" / f"results_{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        put("results.md", name, text)


if __name__ == "__main__":
    main()
