"""Saved views of MLflow's page: what is written, when, and that a store which refuses them stops no job."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import re
import shutil
import zlib
from pathlib import Path

import mlflow
import pytest
from conftest import small_settings

from dann_experiments import adapt, load_config
from dann_experiments.cli import _print_run
from dann_experiments.comparison.compare import _view
from dann_experiments.comparison.result import Arm, ArmRun, Comparison
from dann_experiments.names import Metric, Tag
from dann_experiments.reports.mlflow_views import view_of_comparison, view_of_sweep, views_of_adaptation
from dann_experiments.tracking import saved_views
from dann_experiments.tracking.saved_views import LONGEST_VIEW, TAG, Chart, View, encoded, write_views
from dann_experiments.tracking.store import Store, open_store

VIEW = View("a", "A view", [("One", [Chart("LINE", ["iou/target_val"])])], group_by=[Tag.ARM])
EACH = [
    *views_of_adaptation({"source": "mnist", "target": "mnist-m"}, 32 * "a"),
    view_of_comparison("mnist → mnist-m", 4, 2, [f"{number:032x}" for number in range(8)], by_arm=True),
    view_of_sweep("a study", "select/snd", True, ["cfg.optimizer.lr", "cfg.domain_adaptation.method.lambda_da"]),
]


def state_of(text: str) -> dict:
    """The state in a view's tag, decoded by hand."""
    kind, _, packed = json.loads(text)["state"].partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.fixture
def store(workplace: Path) -> Store:
    return open_store(None, "views")


def kept(store: Store) -> dict[str, str]:
    """Key of a view -> what the store has of it."""
    tags = store.client.get_experiment(store.experiment_id).tags
    return {key.removeprefix(TAG): text for key, text in tags.items() if key.startswith(TAG)}


def test_a_view_that_is_there_is_not_written_again(store, monkeypatch):
    monkeypatch.setattr(saved_views.time, "time", lambda: 1.0)
    page = f"#/experiments/{store.experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning&viewStateShareKey=a"
    assert write_views(store, [VIEW]) == {"A view": page}
    before = kept(store)
    assert json.loads(before["a"])["createdAt"] == 1000
    monkeypatch.setattr(saved_views.time, "time", lambda: 2.0)
    assert write_views(store, [VIEW]) == {"A view": page}
    assert kept(store) == before


def test_a_changed_view_replaces_its_former_self_and_leaves_others_alone(store, monkeypatch):
    monkeypatch.setattr(saved_views.time, "time", lambda: 1.0)
    store.client.set_experiment_tag(store.experiment_id, f"{TAG}of-a-person", "theirs")
    write_views(store, [VIEW])
    monkeypatch.setattr(saved_views.time, "time", lambda: 2.0)
    write_views(store, [dataclasses.replace(VIEW, order_by="iou/target_val")])
    found = kept(store)
    assert set(found) == {"a", "of-a-person"}
    assert found["of-a-person"] == "theirs"
    assert state_of(found["a"])["orderByKey"] == "metrics.`iou/target_val`"
    assert {key: json.loads(found["a"])[key] for key in ("createdAt", "updatedAt")} == {
        "createdAt": 1000,
        "updatedAt": 2000,
    }


@pytest.mark.parametrize("broken", ["", "no json", "[]", '{"name": 3}'])
def test_a_tag_that_cannot_be_read_is_written_anew(store, broken):
    store.client.set_experiment_tag(store.experiment_id, f"{TAG}a", broken)
    assert write_views(store, [VIEW])
    assert state_of(kept(store)["a"])["groupBy"] == {
        "aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "dann.arm"}],
    }  # fmt: skip


def test_a_store_that_refuses_a_view_loses_nothing_else(store, caplog):
    store.client.delete_experiment(store.experiment_id)  # MLflow refuses tags of deleted experiments
    with caplog.at_level(logging.INFO, "dann_experiments"):
        assert write_views(store, [VIEW]) == {}
    assert "could not be kept in the store" in caplog.text
    assert caplog.records[-1].levelno == logging.INFO


def test_a_view_that_is_too_long_for_a_tag_is_left_out(store, caplog):
    runs = [f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC834 % (1 << 128):032x}" for number in range(1000)]
    long = view_of_comparison("a → b", 5, 200, runs, by_arm=True)
    with caplog.at_level(logging.INFO, "dann_experiments"):
        assert list(write_views(store, [long, VIEW])) == ["A view"]
    assert "is not kept in MLflow" in caplog.text


def test_each_view_fits_into_a_tag_ten_times():
    assert {view.key: len(encoded(view)) < LONGEST_VIEW / 10 for view in EACH} == {view.key: True for view in EACH}


def test_the_page_of_the_installed_mlflow_knows_every_name_in_a_view():
    """The lists of names that MLflow's page takes from a view, as its script has them."""
    script = next(Path(mlflow.__path__[0]).glob("server/js/build/static/js/main.*.js")).read_text()
    names = re.search(r'\["selectedColumns"[^\]]*\]', script)
    assert names is not None
    scripts = Path(mlflow.__path__[0]).glob("server/js/build/static/js/*.js")
    facets = next(filter(None, (re.search(r'\["searchFilter"[^\]]*\]', path.read_text()) for path in scripts)))
    known = {*json.loads(names[0]), *json.loads(facets[0])}
    for view in EACH:
        assert set(state_of(json.dumps({"state": encoded(view)}))) <= known


def test_what_is_grouped_is_drawn_for_all_groups_and_sections_keep_their_order():
    for view in EACH:
        state = state_of(json.dumps({"state": encoded(view)}))
        assert state["isAccordionReordered"] is True
        assert [section["name"] for section in state["compareRunSections"]] == [title for title, _ in view.sections]
        assert bool(view.group_by) == (state["runsHiddenMode"] == "SHOW_ALL") == state["useGroupedValuesInCharts"]
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
        assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == len(state["compareRunCharts"])


def test_views_of_different_domains_runs_and_studies_do_not_replace_each_other():
    pairs = [
        ({"source": "a", "target": "b"}, "1"),
        ({"source": "b", "target": "a"}, "1"),
        ({"source": "a", "target": "b"}, "2"),
    ]
    views = [view for pair in pairs for view in views_of_adaptation(*pair)]
    views += [view_of_comparison("t", 1, 1, runs, True) for runs in (["1"], ["2"], ["1", "2"])]
    views += [view_of_sweep(study, "iou/target_val", True, []) for study in ("one", "two")]
    assert len({view.key for view in views}) == len(views)
    again = view_of_comparison("t", 1, 1, ["2", "1"], True)
    assert again.key == views[-3].key


@pytest.mark.parametrize(("tag", "group"), [("DANN", Tag.ARM), ("an earlier arm", Tag.METHOD), (None, Tag.METHOD)])
def test_a_comparison_is_grouped_by_arm_only_if_each_run_has_its_arm_as_a_tag(tag, group):
    tags = {} if tag is None else {Tag.ARM: tag}
    runs = [ArmRun("DANN", 0, "a", {}, tags={Tag.ARM: "DANN"}), ArmRun("DANN", 1, "b", {}, tags=tags)]
    view = _view(Comparison("a → b", [Arm("DANN", "adapted")], runs, [], 255, [], ""))
    assert view.group_by == [group]
    assert view.name == "Did adaptation help? a → b, 1 arm, 2 seeds"
    assert view.wanted == "attributes.run_id IN ('a', 'b')"


def test_a_name_that_no_filter_can_quote_is_left_out_of_it():
    (view, _) = views_of_adaptation({"source": """a'b"c""", "target": "d"}, "12")
    named = "tags.`dann.data_digest` = '12' and tags.`dann.target` = 'd'"
    assert view.wanted == f"tags.`dann.job` = 'adapt' and {named} and attributes.status = 'FINISHED'"


@pytest.mark.usefixtures("pretrained_place")
def test_adapt_keeps_two_views_of_its_domains_and_prints_where_they_open(squares, capsys):
    result = adapt(load_config(None, small_settings(squares)))
    store = open_store(None, None)
    scores, training = (state_of(text) for text in kept(store).values())
    assert [title.partition("?")[0] for title in result.views] == ["Did adaptation help", "Is DANN working"]
    assert scores["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "dann.method"}]
    assert scores["compareRunCharts"][0]["selectedMetricKeys"] == [Metric.TARGET_VAL_IOU]
    drawn = [chart["metricKey"] for chart in training["compareRunCharts"]]
    assert drawn[:3] == [Metric.DOMAIN_ACCURACY, Metric.DOMAIN_ACCURACY_VAL, Metric.LAMBDA]
    found = store.client.search_runs([store.experiment_id], scores["searchFilter"])
    assert [run.info.run_id for run in found] == [result.run_id]
    before = kept(store)
    _print_run(result)
    printed = capsys.readouterr().out
    for page in result.views.values():
        assert f"http://127.0.0.1:5000/{page}" in printed
    adapt(load_config(None, small_settings(squares, seed=1)))
    assert kept(store) == before
    other = Path(shutil.copytree(squares, "other"))  # the same names of folders, another image
    first, second = sorted((other / "target" / "images").iterdir())[:2]
    second.write_bytes(first.read_bytes())
    adapt(load_config(None, small_settings(other)))
    assert len(kept(store)) == 2 * len(before)


@pytest.mark.usefixtures("pretrained_place")
def test_a_run_of_a_sweep_or_a_comparison_writes_no_view_of_its_own(squares):
    assert adapt(load_config(None, small_settings(squares)), tags={"dann.study": "s"}).views == {}
    assert kept(open_store(None, None)) == {}


def test_the_address_on_a_server_has_no_password():
    address = saved_views.address("https://me:secret@host:5000/", "#/x")
    assert address == "https://host:5000/#/x"
