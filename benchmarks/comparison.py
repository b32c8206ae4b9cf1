"""Finished comparisons as tables of the documentation, and what they cost beyond their trainings.

    python benchmarks/comparison.py NAME=RUN_ID [NAME=RUN_ID ...] [--tracking_uri URI] [--write]

Reads runs of `compare` from the tracking store. Results: mean and standard deviation of an arm over seeds, paired difference
to the control with its confidence interval, the verdict. Time: what a comparison took before its first
training started (checks, digests, worker processes) and after its last one ended (tables, pictures, report), against the time
between, in which the trainings ran; goal: at most 10 %. Only runs that had to be made count there. `--write` puts results into
docs/results.md and docs/selection.md, the runs into docs/results_runs.csv and the time into docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pages import circumstances, put, put_runs

from dann_experiments.tracking.store import Store, open_store

SCORES = ("iou/source_val", "iou/target_val", "iou/target_test")


@dataclass(frozen=True)
class Compared:
    """A finished comparison, read back."""

    name: str
    run: Any
    scores: pd.DataFrame
    runs: pd.DataFrame
    selection: pd.DataFrame | None
    verdict: str


def read(store: Store, name: str, run_id: str) -> Compared:
    """Its tables."""
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(store.client.download_artifacts(run_id, "tables", folder))
        frames = {path.stem: pd.read_csv(path) for path in tables.glob("*.csv")}
        verdict = Path(store.client.download_artifacts(run_id, "verdict.txt", folder)).read_text().strip()
    run = store.client.get_run(run_id)
    return Compared(name, run, frames["scores"], frames["runs"], frames.get("selection"), verdict)


def results(compared: Compared) -> str:
    """The table of arms, and the verdict."""
    table = compared.scores
    scores = [name for name in SCORES if name in set(table["metric"])]
    judged = scores[-1]
    lines = [
        f"| | {' | '.join(f'`{name}`' for name in scores)} | over the control, 95 % interval |",
        "|" + "---|" * (len(scores) + 2),
    ]
    for arm, rows in table.groupby("arm", sort=False):
        by_metric = rows.set_index("metric")
        cells = [
            f"{100 * by_metric.at[name, 'mean']:.1f} ± {100 * by_metric.at[name, 'std']:.1f}"
            if name in by_metric.index
            else ""
            for name in scores
        ]
        difference = ""
        columns = [f"minus_control{part}" for part in ("", "_low", "_high")]
        if judged in by_metric.index and by_metric.loc[judged, columns].notna().all():
            mean, low, high = (100 * by_metric.at[judged, column] for column in columns)
            difference = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {arm} | {' | '.join(cells)} | {difference} |")
    seeds = compared.runs["seed"].nunique()
    lines += [
        "",
        f"{seeds} seeds, IoU points, mean ± standard deviation; the interval is of `{judged}`, paired by seed, for this one "
        f"difference.",
        "",
        *(f"> **Verdict.** {line}" for line in compared.verdict.splitlines()),
    ]
    return "\n".join(lines)


def run_rows(compared: Compared) -> list[dict[str, object]]:
    """The scores of each run and the judged differences, in IoU points, as rows of docs/results_runs.csv."""
    table = compared.scores
    scores = [name for name in SCORES if name in set(table["metric"])]
    rows: list[dict[str, object]] = [
        {"what": run["arm"], "seed": run["seed"], "metric": name, "value": f"{100 * run[name]:.1f}", "value_of": "run",
         "run_id": run["run_id"]}
        for run in compared.runs.to_dict("records") for name in scores if name in run and run[name] == run[name]
    ]  # fmt: skip
    judged = table.loc[(table["metric"] == scores[-1]) & table["minus_control"].notna()]
    rows += [
        {"what": f"{row['arm']} minus lambda = 0 control", "seed": "", "metric": scores[-1],
         "value": f"{100 * row['minus_control']:+.1f}", "value_of": f"mean of {compared.runs['seed'].nunique()} seeds",
         "run_id": compared.run.info.run_id}
        for row in judged.to_dict("records")
    ]  # fmt: skip
    return rows


def ranking(compared: Compared) -> str:
    """How well target-free scores chose epochs."""
    assert compared.selection is not None
    frame = compared.selection
    lines = [f"| {' | '.join(frame.columns)} |", "|" + "---|" * len(frame.columns)]
    for values in frame.itertuples(index=False):
        shown = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def seconds(store: Store, compared: Compared) -> str:
    """One line of the table of time."""
    made = compared.runs.loc[~compared.runs["reused"].astype(bool), "run_id"]
    infos = [store.client.get_run(run_id).info for run_id in made]
    start, end = compared.run.info.start_time, compared.run.info.end_time
    first, last = min(info.start_time for info in infos), max(info.end_time for info in infos)
    before, between, after = first - start, last - first, end - last
    alone = sum(info.end_time - info.start_time for info in infos)
    minutes = f"{alone / 60e3:.1f} | {between / 60e3:.1f}"
    beyond = f"{before / 1e3:.0f} | {after / 1e3:.0f} | {(before + after) / between:.1%}"
    return f"| {compared.name} | {len(infos)} | {minutes} | {beyond} |"


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", metavar="NAME=RUN_ID")
    parser.add_argument("--tracking_uri", default=None)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    store = open_store(given.tracking_uri, "dann")
    compared = [read(store, *text.split("=", 1)) for text in given.comparisons]
    time_table = "\n".join(
        [
            "| comparison | runs made | their minutes, summed | minutes in which they ran | seconds before | seconds after | "
            "beyond the trainings |",
            "|---|---|---|---|---|---|---|",
            *(seconds(store, one) for one in compared),
            "",
            circumstances("torch", "mlflow"),
        ]
    )
    pages = [("performance.md", "comparison", time_table)]
    for one in compared:
        pages.append(("results.md", f"compare {one.name}", results(one)))
        if one.selection is not None:
            pages.append(("selection.md", f"compare {one.name}", ranking(one)))
    for page, name, text in pages:
        print(f"{page}, {name}:\n{text}\n")
        if given.write:
            put(page, name, text)
    if given.write:
        for one in compared:
            put_runs("results.md", f"compare {one.name}", run_rows(one))


if __name__ == "__main__":
    main()
