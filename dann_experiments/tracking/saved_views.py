"""Saved views of MLflow's run page: the charts, columns, groups and filters that a link opens, kept as a tag of the experiment.

MLflow has had such views since 3.15, but documents neither their tag nor its content. What is known of both is in this module
alone, and `tests/browser/` opens the views in the pinned version. A view is a convenience: if the store refuses one, the job
that wanted it goes on.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

from dann_experiments.tracking.store import TRAINING_PAGES, Store, in_one_line, without_secrets

log = logging.getLogger(__name__)
TAG = "mlflow.sharedViewState."  # the id of the view follows
LONGEST_VIEW = 20_000
"""Longest value of an experiment's tag that MLflow accepts. A view has about 1,000 characters."""


@dataclass(frozen=True)
class Chart:
    """One chart of a view; MLflow shows the names of its metrics above it."""

    kind: Literal["LINE", "BAR", "PARALLEL"]
    """LINE: the course over training steps; BAR: the last value of each run or group; PARALLEL: one line per run across axes."""
    metrics: Sequence[str]
    """A bar chart shows the first one only."""
    params: Sequence[str] = ()
    """Further axes of PARALLEL."""


@dataclass(frozen=True)
class View:
    """A page of runs in MLflow. Charts of all other metrics follow below those of `sections`; MLflow adds them."""

    key: str
    """Its id in the store: a later view with the same key replaces this one."""
    name: str
    """The title in MLflow's menu of views."""
    sections: Sequence[tuple[str, Sequence[Chart]]]
    """Titles and charts, in the order in which they are shown."""
    group_by: Sequence[str] = ()
    """Tags: charts show the mean over runs with equal values. Runs that lack one of the tags are then not drawn."""
    wanted: str = ""
    """MLflow's filter for the runs; empty for all."""
    order_by: str = ""
    """The metric by which runs are sorted; empty for the newest first."""
    ascending: bool = False
    metric_columns: Sequence[str] = ()
    param_columns: Sequence[str] = ()
    tag_columns: Sequence[str] = ()
    opens_as: Literal["CHART", "TABLE"] = field(default="CHART")
    """What its link shows first. MLflow has a switch between the two."""


def write_views(store: Store, views: Sequence[View]) -> dict[str, str]:
    """Write views to the store's experiment, except those that it has already. Return name -> page, as a fragment that starts
    with `#`, of those that the store has now. Other views are kept. Never raises an error: what went wrong is logged."""
    pages: dict[str, str] = {}
    try:
        known = store.client.get_experiment(store.experiment_id).tags
        for view in views:
            before, state = _read(known.get(TAG + view.key)), encoded(view)
            if (before.get("name"), before.get("state")) != (view.name, state):
                now = int(1000 * time.time())
                times = {"createdAt": before.get("createdAt", now), "updatedAt": now}
                text = json.dumps({"name": view.name, **times, "state": state}, separators=(",", ":"))
                if len(text) > LONGEST_VIEW:
                    log.info("The view %r is not kept in MLflow: it has %d characters.", view.name, len(text))
                    continue
                store.client.set_experiment_tag(store.experiment_id, TAG + view.key, text)
            pages[view.name] = page(store.experiment_id, view)
    except Exception as error:  # no job fails for want of a view, whatever the store or its plugin raises
        log.info("Views of MLflow's page could not be kept in the store (%s).", in_one_line(error))
    return pages


def page(experiment_id: str, view: View) -> str:
    """Return where MLflow's UI opens a view, as a fragment that starts with `#`."""
    mode = "compareRunsMode=CHART&" if view.opens_as == "CHART" else ""
    key = quote(view.key, safe="")
    return f"#/experiments/{experiment_id}/runs?{mode}{TRAINING_PAGES}&viewStateShareKey={key}"


def address(uri: str, fragment: str) -> str:
    """Return the address of a page. For a store without a server it is that of the `mlflow ui` that the user has to start."""
    place = without_secrets(uri).rstrip("/") if uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"
    return f"{place}/{fragment}"


def encoded(view: View) -> str:
    """Return a view's state as MLflow 3.17 keeps it: JSON, compressed, in base64. Equal views give equal texts.

    The names are those of MLflow's page, which ignores what it does not know and uses its defaults for what is missing."""
    sections, charts = [], []
    for number, (title, drawn) in enumerate(view.sections):
        section = f"dann-section-{number}"
        sections.append(
            {"uuid": section, "name": title, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        )  # fmt: skip
        charts += [
            _chart(chart, f"dann-chart-{number}-{place}", section, bool(view.group_by))
            for place, chart in enumerate(drawn)
        ]
    columns = [
        *(f"metrics.`{name}`" for name in view.metric_columns),
        *(f"params.`{name}`" for name in view.param_columns),
        *(f"tags.`{name}`" for name in view.tag_columns),
    ]
    groups = [{"mode": "tag", "groupByData": tag} for tag in view.group_by]
    state: dict[str, Any] = {
        "searchFilter": view.wanted,
        "selectedColumns": columns,
        "columnOrder": [],
        "runsHiddenMode": "SHOW_ALL" if groups else "FIRST_20_RUNS",
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else MLflow sorts the sections by name: class_iou/... first
        "groupBy": {"aggregateFunction": "average", "groupByKeys": groups} if groups else None,
        "useGroupedValuesInCharts": bool(groups),
        "hideEmptyCharts": True,
    }
    if view.order_by:
        state |= {"orderByKey": f"metrics.`{view.order_by}`", "orderByAsc": view.ascending}
    packed = zlib.compress(json.dumps(state, separators=(",", ":")).encode())
    return f"deflate;{base64.b64encode(packed).decode()}"


def _chart(chart: Chart, key: str, section: str, grouped: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "uuid": key,
        "type": chart.kind,
        "runsCountToCompare": 20,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }
    if chart.kind == "PARALLEL":
        return facts | {
            "selectedParams": list(chart.params), "selectedMetrics": list(chart.metrics), "showAllRuns": not grouped,
        }  # fmt: skip
    facts |= {"metricKey": chart.metrics[0]}
    if chart.kind == "LINE":
        facts |= {
            "selectedMetricKeys": list(chart.metrics), "xAxisKey": "step", "selectedXAxisMetricKey": "",
            "xAxisScaleType": "linear", "scaleType": "linear", "range": {}, "lineSmoothness": 0, "yAxisKey": "metric",
            "yAxisExpressions": [], "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
        }  # fmt: skip
    return facts


def _read(text: str | None) -> dict[str, Any]:
    """Return what the store has of a view; empty if it has none, or one that cannot be read."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
