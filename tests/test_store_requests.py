"""What the program may ask of its stores, counted in requests, statements and rows: the same on every machine."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_settings
from matplotlib.figure import Figure
from mlflow.entities import Metric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils import environment, requirements_utils
from sqlalchemy import Engine, event

from dann_experiments import adapt, load_config
from dann_experiments.comparison.arms import Cell
from dann_experiments.comparison.result import Arm
from dann_experiments.comparison.runner import find_cells
from dann_experiments.jobs.overview import SOURCE_PARAM, overview
from dann_experiments.tracking import sender as sender_module
from dann_experiments.tracking.run import RunLogger, tracked_run
from dann_experiments.tracking.sender import Sender
from dann_experiments.tracking.spool import Point
from dann_experiments.tracking.store import Store, found_runs, open_store, quoted

SIX = ("loss/train_seg", "loss/train_da", "loss/train_total", "da/domain_loss", "da/domain_acc", "da/lambda")


@contextmanager
def statements() -> Iterator[list[tuple[str, Any]]]:
    """The SQL statements, with their values, that MLflow sends to a database in this process while the block runs."""
    sent: list[tuple[str, Any]] = []

    def one(connection, cursor, statement, values, context, executemany):
        sent.append((statement, values))

    event.listen(Engine, "before_cursor_execute", one)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", one)


@contextmanager
def runs_fetched() -> Iterator[Counter[str]]:
    """How many runs MLflow reads from a database in this process while the block runs."""
    from mlflow.store.tracking.dbmodels.models import SqlRun

    counts: Counter[str] = Counter()

    def one(run, context):
        counts["runs"] += 1

    event.listen(SqlRun, "load", one)
    try:
        yield counts
    finally:
        event.remove(SqlRun, "load", one)


def add_runs(store: Store, count: int, **tags: str) -> None:
    """Finished runs with tags, a param and a data set of a run of `adapt`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = DatasetInput(Dataset("squares", "d1", "local", "{}"), [InputTag("mlflow.data.context", "source train")])
    for _ in range(count):
        run_id = store.client.create_run(
            store.experiment_id, tags={"dann.job": "adapt", "seed": "0", **tags}
        ).info.run_id
        store.client.log_param(run_id, SOURCE_PARAM, "runs:/it's/model")
        store.client.log_metric(run_id, "iou/target_val", 0.5)
        store.client.log_inputs(run_id, [source])
        store.client.set_terminated(run_id)


def logged_steps(uri: str, folder: Path, steps: int) -> None:
    """Six metrics a step by a run's own logger, as fast as it takes them; the store has all when this returns."""
    store = open_store(uri, "counted")
    with tracked_run(store, None, "counted", {}, folder, use_claimed=False) as run:
        logger, values = RunLogger(run), torch.rand(6)
        for step in range(steps):
            logger.log_metrics({name: values[index] * 2 for index, name in enumerate(SIX)}, step)
    for name in SIX:
        assert len(store.client.get_metric_history(run.run_id, name)) == steps


def test_a_hundred_training_steps_make_one_request_of_a_sqlite_store(workplace):
    with statements() as sent:
        logged_steps("sqlite:///mlflow.db", workplace / "runs", 3000)
    assert 0 < sum(statement.startswith("INSERT INTO metrics") for statement, _ in sent) <= 30


@pytest.mark.slow
def test_a_hundred_training_steps_make_one_request_of_a_server(running_server, workplace):
    before = len(running_server.log.read_text())
    logged_steps(running_server.url, workplace / "runs", 3000)
    requests = re.findall(r'"(GET|POST) \S*/(\S+) HTTP', running_server.log.read_text()[before:])
    made = [(method, what.partition("?")[0]) for method, what in requests if what.partition("?")[0] != "health"]
    assert 0 < sum(what != "get-history" for _, what in made) <= 30, Counter(made)


def test_a_disk_that_takes_nothing_is_not_tried_at_every_step(tmp_path, monkeypatch):
    """Neither disk nor store takes metrics: they wait in memory, and a step costs no more for it."""
    monkeypatch.setattr(sender_module, "MOST_IN_MEMORY", 100)
    (tmp_path / "file").write_text("no folder")

    class Away:
        def log_batch(self, run_id: str, metrics: object) -> None:
            raise ConnectionError("away")

    sender = Sender(Away(), "0" * 32, tmp_path / "file" / "run")
    tried, append = [], sender._spool.append

    def counted(points: Sequence[Point], durable: bool = False) -> None:
        tried.append(len(points))
        append(points, durable)

    monkeypatch.setattr(sender._spool, "append", counted)
    for step in range(2000):
        sender.put({"da/lambda": 0.5}, step)
    assert len(sender._memory) == 2000
    assert 1 <= len(tried) < 20
    sender._given_up = True


def test_the_run_table_fetches_a_few_runs_however_many_there_are(workplace):
    config = load_config(None, {"tracking.experiment": "many", "data.source.train": ["s"], "data.target.train": ["t"]})
    store = open_store(None, "many")
    fetched = []
    add_runs(store, 1, **{"dann.method": "lambda_zero"})
    for count in (30, 60):
        add_runs(store, count, **{"dann.method": "dann"})
        with runs_fetched() as counts:
            found = overview(config)
        assert list(found.table.index) == ["lambda = 0 control", "DANN"]
        fetched.append(counts["runs"])
    assert fetched[0] == fetched[1] < 10


def test_the_run_table_finds_an_arm_behind_more_runs_than_mlflow_gives_at_once(workplace):
    config = load_config(None, {"tracking.experiment": "many", "data.source.train": ["s"], "data.target.train": ["t"]})
    store = open_store(None, "many")
    add_runs(store, 1, **{"dann.method": "lambda_zero"})
    add_runs(store, 25, **{"dann.method": "dann"})
    assert len(list(found_runs(store, [store.experiment_id], "", page=4))) == 26
    assert list(overview(config).table.index) == ["lambda = 0 control", "DANN"]


def test_a_comparison_asks_once_for_the_experiments_and_once_for_each_of_its_runs(workplace):
    store = open_store(None, "cells")
    add_runs(store, 1, **{"dann.digest": "d3"})
    (known,) = (run.info.run_id for run in found_runs(store, [store.experiment_id], ""))
    config = load_config(None, {"data.source.train": ["s"], "data.target.train": ["t"]})
    cells = [Cell(Arm("dann", "adapted"), seed, "adapt", config, f"d{seed}", True) for seed in range(6)]
    asked = []
    for some in (cells[3:4], cells):
        with statements() as sent:
            done = find_cells(some, store)
        assert list(done.run_ids.values()) == [known]
        asked.append(sum("FROM experiments" in statement and "LIMIT" in statement for statement, _ in sent))
        assert sum("FROM runs" in statement and "DISTINCT" in statement for statement, _ in sent) == len(some)
    assert asked[0] == asked[1]


def test_sqlite_looks_for_a_run_s_history_among_its_own_points(workplace):
    """Without having looked at the table, it takes the index that begins with the metric's name, over the points of all runs."""
    store = open_store(None, "points")
    run_ids = [store.client.create_run(store.experiment_id).info.run_id for _ in range(20)]
    for run_id in run_ids:
        store.client.log_batch(run_id, metrics=[Metric("da/lambda", 0.1, step, step) for step in range(50)])
    store = open_store(None, "points")  # as the next job does
    with statements() as sent:
        assert len(store.client.get_metric_history(run_ids[3], "da/lambda")) == 50
    ((statement, values),) = [(text, values) for text, values in sent if "FROM metrics" in text]
    with closing(sqlite3.connect("mlflow.db")) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", tuple(values))]
    assert "run_uuid=? AND key=?" in plan[0]


@pytest.mark.parametrize(("text", "said"), [("a b", "'a b'"), ("it's", '"it\'s"'), ('"it\'s"', None), ("C:\\", None)])
def test_texts_are_quoted_as_filters_take_them(text, said):
    assert quoted(text) == said


def test_a_small_run_asks_its_store_for_little_and_draws_each_figure_once(squares, pretrained_place, monkeypatch):
    """Two epochs with all artifacts. More requests, or a look at the whole environment, would be seconds of every run."""
    asked: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: asked.update([name]) or real(*args, **named))

    for name in ("get_run", "log_inputs", "log_batch", "create_run"):
        counted(SqlAlchemyStore, name)
    counted(Figure, "savefig")
    counted(requirements_utils, "_init_modules_to_packages_map")
    check = environment.warn_dependency_requirement_mismatches
    adapt(load_config(None, small_settings(squares)))
    assert asked.pop("log_batch") <= 12  # how often metrics are sent depends on the time
    # the source model's run for its digest, address, settings and choice; the own one for the sender, the model and the result
    assert asked == {"create_run": 1, "get_run": 7, "log_inputs": 1, "savefig": 6}
    assert environment.warn_dependency_requirement_mismatches is check
