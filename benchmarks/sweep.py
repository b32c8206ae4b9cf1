"""What a sweep costs: pruned against unpruned, overhead a trial beside the bare `adapt`, and how it scales with workers.

    python benchmarks/sweep.py [--write]

Real sweeps on the embedded digits, shortened, in a temporary folder with its own store; about 12 minutes on two idle cores.
--write puts the tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import circumstances, put

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from dann_experiments import adapt, load_config  # noqa: E402
from dann_experiments.config import Config  # noqa: E402
from dann_experiments.config.parsing import load_settings  # noqa: E402
from sweeps import SweepConfig, run_sweep  # noqa: E402
from sweeps.driver import SweepResult  # noqa: E402

METHOD = "domain_adaptation.method"
DATA_SEED = 100  # none of those that docs/results.md reports
SHORT = {"trainer.max_epochs": 6, "trainer.limit_train_batches": 30}  # 180 of the recipe's 786 steps
TINY = {"trainer.max_epochs": 2, "trainer.limit_train_batches": 15}
# every point costs the same time
SAME_COST = {f"{METHOD}.lambda_schedule.gamma": {"type": "float", "low": 1, "high": 20}}


def config(**changed: Any) -> Config:
    common = {"data.embedded.seed": DATA_SEED, "threads": 1, "trainer.enable_progress_bar": False}
    return load_config(PROJECT / "recipes" / "digits.yaml", {**common, **changed})


def sweep(name: str, settings: Config, **changed: Any) -> SweepResult:
    with silence():
        return run_sweep(load_settings(SweepConfig, None, {"study": name, **changed}), settings)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def pruning(n_trials: int, sampler_seeds: list[int]) -> str:
    """The same seeds and space by each pruner: epochs trained, best value, time."""
    space = load_settings(SweepConfig, PROJECT / "sweeps" / "dann.yaml", {}).space
    settings = config(**SHORT)
    lines = [
        "| pruner | sampler seed | trials complete / pruned | share of epochs | best target val | its target test | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in sampler_seeds:
        for pruner in ("none", "median", "halving"):
            began = time.monotonic()
            result = sweep(
                f"{pruner}-{seed}", settings, space=space, n_trials=n_trials, pruner=pruner, sampler_seed=seed
            )
            minutes = (time.monotonic() - began) / 60
            counts, trials, best = result.sweep.counts(), result.sweep.counted(), result.best
            assert best is not None
            share = sum(t.user_attrs["epochs"] for t in trials) / (len(trials) * settings.trainer.max_epochs)
            lines.append(
                f"| {pruner} | {seed} | {counts['complete']} / {counts['pruned']} | {share:.0%} | {best.value:.3f} | "
                f"{best.user_attrs['scores']['iou/target_test']:.3f} | {minutes:.1f} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def overhead(n_trials: int) -> str:
    """One worker's time a trial beside bare `adapt` calls with the same settings, in this process."""
    settings = config(**TINY)
    bare = []
    for _ in range(n_trials + 1):
        began = time.monotonic()
        with silence():
            adapt(settings)
        bare.append(time.monotonic() - began)
    began = time.time()
    result = sweep("one", settings, space=SAME_COST, n_trials=n_trials + 1, pruner="none", sampler="random", workers=1)
    trials = result.sweep.trials()
    assert all(trial.datetime_start and trial.datetime_complete for trial in trials)
    ends = [trial.datetime_complete.timestamp() for trial in trials]  # pyright: ignore[reportOptionalMemberAccess]
    each = [later - earlier for earlier, later in itertools.pairwise(ends)]
    first = trials[0].datetime_start.timestamp() - began  # pyright: ignore[reportOptionalMemberAccess]
    alone, within = statistics.median(bare[1:]), statistics.median(each)  # the first of both warms up
    return (
        f"| bare `adapt`, median of {n_trials} | {alone:.2f} s |\n|---|---|\n"
        f"| a trial of a sweep by one worker, median of {n_trials} | {within:.2f} s |\n"
        f"| overhead a trial | {within - alone:+.2f} s ({(within - alone) / alone:+.1%}) |\n"
        f"| from the call of `run_sweep` to the first trial (checks, source model scored, worker started) | {first:.1f} s |"
    )


def scaling(n_trials: int) -> str:
    """Trials a minute by 1, 2, ... workers of one thread each, from the first start to the last end."""
    lines = ["| workers | trials a minute | against one |", "|---|---|---|"]
    one = None
    cores = len(os.sched_getaffinity(0))
    for workers in sorted({1, 2, min(4, cores)}):
        if workers > cores:
            continue
        result = sweep(
            f"w{workers}", config(**TINY), space=SAME_COST, n_trials=n_trials, pruner="none", sampler="random",
            workers=workers,
        )  # fmt: skip
        trials = result.sweep.trials()
        starts = [trial.datetime_start for trial in trials if trial.datetime_start]
        ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
        rate = 60 * len(trials) / (max(ends) - min(starts)).total_seconds()
        one = one or rate
        lines.append(f"| {workers} | {rate:.1f} | {rate / one:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="trials of a pruned and an unpruned sweep")
    parser.add_argument("--sampler-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        with silence():
            adapt(config(**TINY, **{"pretraining.max_epochs": 3}))  # the source model of all, and everything imported
        parts = {
            "Overhead a trial": overhead(5),
            "Workers": scaling(6),
            "Pruned against unpruned": pruning(options.trials, options.sampler_seeds),
        }
        os.chdir(PROJECT)
    steps = SHORT["trainer.max_epochs"] * SHORT["trainer.limit_train_batches"]
    text = "\n\n".join(f"**{title}**\n\n{table}" for title, table in parts.items())
    text += (
        f"\n\nSweeps of {options.trials} trials of `sweeps/dann.yaml` over `recipes/digits.yaml` shortened to {steps} steps in "
        f"{SHORT['trainer.max_epochs']} epochs. {circumstances('torch', 'optuna', 'mlflow')}"
    )
    print(text)
    if options.write:
        put("performance.md", "sweep", text)


if __name__ == "__main__":
    main()
