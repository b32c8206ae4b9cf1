"""What a sweep costs: pruned against unpruned, overhead a trial beside the bare `adapt`, and how it scales with workers.

    python benchmarks/sweep.py [--write]
    python benchmarks/sweep.py --only pruning --folder FOLDER --seconds 400     # in several calls, each of about that length

Real sweeps on the embedded digits, shortened, in a temporary folder with its own store; about 45 minutes on two idle cores.
`pruning` also writes the curves of the unpruned sweeps into docs/sweep_curves.csv and replays them under each pruner.
--write puts the tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pages import circumstances, put

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.replay import (  # noqa: E402
    Curve,
    best_of,
    curve_of,
    made_curves,
    rank_correlations,
    read_curves,
    replay,
    write_curves,
)
from dann_experiments import adapt, load_config  # noqa: E402
from dann_experiments.config import Config  # noqa: E402
from dann_experiments.config.parsing import load_settings  # noqa: E402
from sweeps import SweepConfig, run_sweep  # noqa: E402
from sweeps.driver import SweepResult, find_study  # noqa: E402
from sweeps.sampling import build_pruner, build_sampler  # noqa: E402
from sweeps.settings import storage_address  # noqa: E402
from sweeps.space import read_space  # noqa: E402
from sweeps.study import Slot, Sweep, open_storage  # noqa: E402

PARTS = ("overhead", "workers", "pruning", "growth")
CURVES = PROJECT / "docs" / "sweep_curves.csv"
WORKERS = 2
ORDERS = 20
LONGEST = 240.0  # seconds of a trial: none is begun when fewer are left
METHOD = "domain_adaptation.method"
DATA_SEED = 100  # none of those that docs/results.md reports
# the recipe's 786 steps but for two, in epochs that end where `halving` judges, so that every rule can be replayed
EIGHT: dict[str, Any] = {"trainer.max_epochs": 8, "trainer.limit_train_batches": 98, "trainer.precision": "auto"}
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


def resumed(settings: Config, pruner: str, seed: int, trials: int, until: float) -> Sweep | None:
    """Return one sweep of the comparison, after running what is missing of it; None if trials are missing at the time `until`."""
    name = f"{pruner}-{seed}"
    address = storage_address(None, name)
    if not complete(name, trials):
        left = until - time.monotonic()
        if left < LONGEST:
            return None
        space = load_settings(SweepConfig, PROJECT / "sweeps" / "dann.yaml", {}).space
        more = {"timeout": left - LONGEST} if math.isfinite(left) else {}
        sweep(name, settings, space=space, n_trials=trials, pruner=pruner, sampler_seed=seed, workers=WORKERS, **more)
    return find_study(name, address) if complete(name, trials) else None


def complete(name: str, trials: int) -> bool:
    """Return whether all trials of a sweep have ended well."""
    address = storage_address(None, name)
    if not Path(address).exists():
        return False
    counts = find_study(name, address).counts()
    return counts["complete"] + counts["pruned"] == trials


def pruning(trials: int, seeds: list[int], pruners: list[str], until: float) -> str | None:
    """The same sampler seeds and space, unpruned and by each pruner: share of the steps, and what the winner scores."""
    settings = config(**EIGHT)
    found: dict[tuple[int, str], Sweep] = {}
    for seed in seeds:
        for pruner in ("none", *pruners):
            study = resumed(settings, pruner, seed, trials, until)
            if study is None:
                print(f"{pruner}, sampler seed {seed}: not complete; call again with the same --folder", flush=True)
                return None
            found[seed, pruner] = study
    lines = [
        "| sampler seed | pruner | complete / pruned | share of steps | minutes of workers | best | its target val | "
        "its target test | test - unpruned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (seed, pruner), study in found.items():
        counted, counts = study.counted(), study.counts()
        share = sum(trial.user_attrs.get("share", 1.0) for trial in counted) / len(counted)
        minutes = sum(trial.user_attrs["seconds"] for trial in counted) / 60
        best, against = study.best(), found[seed, "none"].best()
        assert best is not None
        assert against is not None
        lines.append(
            f"| {seed} | {pruner} | {counts['complete']} / {counts['pruned']} | {share:.0%} | {minutes:.1f} | "
            f"trial {best.number} | {best.value:.3f} | {test_of(best):.3f} | {100 * (test_of(best) - test_of(against)):+.1f} |"
        )
    write_curves(CURVES, {str(seed): [curve_of(t) for t in found[seed, "none"].counted()] for seed in seeds})
    return "\n".join(lines) + (
        f"\n\nSeed noise: {100 * noise():.1f} points, the standard deviation of one setting's target test between seeds (within "
        f"a data seed of docs/results_digits.csv). {about(trials)}"
    )


def test_of(trial: FrozenTrial) -> float:
    return trial.user_attrs["scores"]["iou/target_test"]


def noise() -> float:
    """Standard deviation of the recipe's target test between seeds, pooled over the data seeds of docs/results_digits.csv."""
    with open(PROJECT / "docs" / "results_digits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {row["data_seed"] for row in rows}
    each = [[float(row["DANN test"]) / 100 for row in rows if row["data_seed"] == case] for case in cases]
    return math.sqrt(statistics.fmean(statistics.variance(values) for values in each))


def replays() -> str:
    """The recorded curves under each pruner, and how well the objective within a run ranks the trials."""
    recorded = read_curves(CURVES)
    lines = [
        f"| rank correlation with the end | {' | '.join(f'sweep {name}' for name in recorded)} |",
        "|---|" + "---|" * len(recorded),
    ]
    correlations = [rank_correlations(curves) for curves in recorded.values()]
    for epoch in range(len(correlations[0])):
        values = " | ".join(f"{one[epoch]:.2f}" for one in correlations)
        lines.append(f"| after {epoch + 1} of {EIGHT['trainer.max_epochs']} epochs | {values} |")
    lines += ["", "| replayed | share of epochs | points of target val lost | of target test |", "|---|---|---|---|"]
    for name in ("median", "halving", "hyperband"):
        shares, lost, tests = [], [], []
        for curves in recorded.values():
            done, best = replay(curves, rule(name)), curves[best_of(curves)]
            shares.append(f"{done.share:.0%}")
            lost.append(f"{100 * (best.reports[-1] - curves[done.best].reports[-1]):.1f}")
            tests.append(f"{100 * (best.test - curves[done.best].test):.1f}")
        lines.append(f"| {name} | {', '.join(shares)} | {', '.join(lost)} | {', '.join(tests)} |")
    return "\n".join(lines)


def growth(folder: Path) -> str:
    """By number of trials: share of the epochs, and the seconds that a trial costs besides its training.

    The curves are made and their ranks never change: the ends are evenly spaced, in `ORDERS` random orders.
    """
    lines = [
        "| pruner | trials | recipe in the best tenth: epochs | in the middle | in the worst tenth | never pruned | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, count in (("median", 16), ("halving", 8), ("halving", 16), ("halving", 32)):
        shares = []
        for place in (0.95, 0.5, 0.05):
            found = [replay(in_random_order(count, place, order), rule(name)).share for order in range(ORDERS)]
            shares.append(f"{statistics.fmean(found):.0%} ({min(found):.0%} to {max(found):.0%})")
        each = [
            beside(folder / f"{name}-{count}-{turn}.log", in_random_order(count, 0.5, turn), rule(name))
            for turn in range(3)
        ]
        lines.append(f"| {name} | {count} | {' | '.join(shares)} | {2 / count:.0%} | {statistics.median(each):.3f} |")
    note = (
        f"Made curves of {EIGHT['trainer.max_epochs']} epochs, ranks never change, {ORDERS} random orders, {WORKERS} workers: "
        'mean (least to most). "never pruned": the recipe and the control. "seconds": of journal, sampler and pruner, a trial.'
    )
    return "\n".join([*lines, "", note])


def in_random_order(count: int, place: float, order: int) -> list[Curve]:
    """Return made curves of a sweep whose recipe is at the quantile `place` of the search."""
    ends = [0.42 + 0.28 * (number + 0.5) / (count - 2) for number in range(count - 2)]
    random.Random(order).shuffle(ends)
    return made_curves([0.42 + 0.28 * place, 0.4, *ends])


def rule(name: str) -> Callable[[], optuna.pruners.BasePruner]:
    return functools.partial(build_pruner, name, EIGHT["trainer.max_epochs"])


def beside(journal: Path, curves: list[Curve], pruner: Callable[[], optuna.pruners.BasePruner]) -> float:
    """Seconds a trial, in one process: the journal, the sampler and the pruner, with recorded scores instead of a training."""
    space = read_space(load_settings(SweepConfig, PROJECT / "sweeps" / "dann.yaml", {}).space, config(**EIGHT))
    study = Sweep.create(open_storage(str(journal)), "beside", maximizes=True)
    study.add([Slot(one.role, {}, reference=one.role == "control") for one in curves])
    began = time.monotonic()
    for curve in curves:
        slot = study.claim("host:1:0", "t")
        assert slot is not None
        sampler = build_sampler(SweepConfig(), space.conditional, slot.number, len(curves))
        trial = optuna.Trial(study.for_sampling(sampler, pruner()), slot._trial_id)
        if curve.role != "control":
            space.suggest(trial)
        state, value = TrialState.COMPLETE, curve.reports[-1]
        for epoch, report in enumerate(curve.reports, 1):
            trial.report(report, epoch)
            if epoch < len(curve.reports) and trial.should_prune() and curve.role == "search":
                state, value = TrialState.PRUNED, None
                break
        trial.study.tell(trial, value, state)
    return (time.monotonic() - began) / len(curves)


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


def about(trials: int) -> str:
    steps = EIGHT["trainer.max_epochs"] * EIGHT["trainer.limit_train_batches"]
    return (
        f"Sweeps of {trials} trials of `sweeps/dann.yaml` over `recipes/digits.yaml` in {steps} steps of "
        f"{EIGHT['trainer.max_epochs']} epochs, `trainer.precision: auto`, {WORKERS} workers. "
        + circumstances("torch", "optuna", "mlflow")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--trials", type=int, default=16, help="trials of a pruned and an unpruned sweep")
    parser.add_argument("--sampler-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pruners", nargs="+", default=["halving"])
    parser.add_argument(
        "--folder", type=Path, help="keep the sweeps here, and go on with those that an earlier call began"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no trial of `pruning` after so long")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if not (folder / "trained").exists() and set(options.only) - {"growth"}:
            with silence():
                adapt(
                    config(**TINY, **{"pretraining.max_epochs": 3})
                )  # the source model of all, and everything imported
            (folder / "trained").touch()
        parts: dict[str, dict[str, str | None]] = {
            "sweep": {}, "sweep pruning": {}, "sweep growth": {},
        }  # fmt: skip
        if "overhead" in options.only:
            parts["sweep"]["Overhead a trial"] = overhead(5)
        if "workers" in options.only:
            parts["sweep"]["Workers"] = f"{scaling(6)}\n\n{circumstances('torch', 'optuna', 'mlflow')}"
        if "pruning" in options.only:
            table = pruning(options.trials, options.sampler_seeds, options.pruners, until)
            parts["sweep pruning"]["Pruned against unpruned"] = table
            if table is not None:
                parts["sweep pruning"]["The recorded curves under each pruner"] = replays()
        if "growth" in options.only:
            parts["sweep growth"]["Growth"] = f"{growth(Path(temporary))}\n\n{circumstances('optuna')}"
        os.chdir(PROJECT)
    for name, tables in parts.items():
        text = "\n\n".join(f"**{title}**\n\n{table}" for title, table in tables.items() if table is not None)
        print(text)
        if options.write and text:
            put("performance.md", name, text)


if __name__ == "__main__":
    main()
