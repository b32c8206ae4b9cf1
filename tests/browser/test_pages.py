"""What a person sees: pages of MLflow and our own reports in a real browser, over runs that the jobs made.

Needs the extra `browser` and a Chromium of the system; `make test-browser` runs it. With PICTURES=docs/images in the
environment, the views of MLflow are also saved there as pictures.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import mlflow_variables, small_settings

from dann_experiments.comparison.compare import compare
from dann_experiments.config import load_config
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.jobs import adapt
from dann_experiments.names import Job, Metric, Tag

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
PATIENCE = 60_000  # ms; only a failing test waits for so long
EXPERIMENT = "pages"
KEY = "optimizer.lr"


@dataclass(frozen=True)
class Filled:
    """A store with two seeds of a comparison, one more adaptation and a small sweep, and the MLflow server that shows it."""

    url: str
    client: Any
    experiment_id: str
    views: dict[str, str]
    """Title of a saved view -> its page."""
    report: Path
    """The page of the comparison."""
    study: Path
    """The page of the study."""

    def runs(self, job: str) -> list[Any]:
        """The runs of a job, the newest first."""
        return self.client.search_runs([self.experiment_id], f"tags.`{Tag.JOB}` = '{job}'")

    def view(self, start: str) -> str:
        """The address of the view whose title starts so."""
        (fragment,) = [page for title, page in self.views.items() if title.startswith(start)]
        return f"{self.url}/{fragment}"


@pytest.fixture(scope="module")
def filled(browser: Browser, squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    import mlflow

    from sweeps.driver import run_sweep
    from sweeps.settings import SweepConfig

    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        for name in mlflow_variables():
            patch.delenv(name)
        patch.chdir(folder)
        config = load_config(None, small_settings(squares, tracking__experiment=EXPERIMENT))
        compared = compare(config, CompareConfig(seeds=2, workers=1))
        adapted = adapt(load_config(None, small_settings(squares, seed=5, tracking__experiment=EXPERIMENT)))
        space = {KEY: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
        searched = run_sweep(
            SweepConfig(study="small", n_trials=3, workers=1, space=space), config
        )  # fmt: skip
        client = mlflow.MlflowClient(compared.tracking_uri)
        assert compared.artifacts is not None
        with _serving(folder) as url:
            yield Filled(
                url, client, adapted.experiment_id, {**compared.views, **adapted.views, **searched.links},
                Path(compared.artifacts) / "report.html", searched.folder.resolve() / "figures" / "study.html",
            )  # fmt: skip


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[str]:
    """A real `mlflow ui` on the store in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]  # fmt: skip
    environ = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "ui.log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, (folder / "ui.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                break
            time.sleep(0.1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a window of a new visitor, who has no settings of earlier visits."""
    contexts = []

    def visit(address: str, **window: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1500, "height": 1000}, **window})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()


def names_of(runs: list[Any]) -> list[str]:
    return [run.data.tags["mlflow.runName"] for run in runs]


def sections(page: Page) -> list[str]:
    """The titles of the sections of charts, from top to bottom, each with the number of its charts behind it."""
    page.get_by_text("Add section").wait_for()
    text = page.get_by_test_id("experiment-view-compare-runs-chart-area").inner_text()
    return re.findall(r"^(.+)\n+\(\d+\)$", text, re.MULTILINE)


def picture(page: Page, name: str) -> None:
    """Save a picture of a page, if pictures are wanted, without MLflow's assistant."""
    if os.environ.get("PICTURES"):
        page.get_by_role("button", name="Close").last.click()
        page.mouse.move(0, 0)
        page.screenshot(path=Path(__file__).parents[2] / os.environ["PICTURES"] / f"{name}.png")


def test_the_table_has_each_run_by_its_name(filled, opened):
    page = opened(f"{filled.url}/#/experiments/{filled.experiment_id}/runs?workflowType=machine_learning")
    for name in {*names_of(filled.runs(Job.ADAPT)), *names_of(filled.runs(Job.COMPARE))}:
        page.get_by_text(name, exact=True).first.wait_for()


def test_the_view_of_a_comparison_has_a_line_and_a_bar_for_each_arm(filled, opened):
    page = opened(filled.view("Did adaptation help? source → target,"))
    arms = {run.data.tags[Tag.ARM] for job in (Job.PRETRAIN, Job.ADAPT, Job.EVALUATE) for run in filled.runs(job)
            if Tag.ARM in run.data.tags}  # fmt: skip
    assert len(arms) >= 3
    for arm in arms:
        page.get_by_text(f"Group: {arm}", exact=True).first.wait_for()
        page.get_by_text(f"{arm} ({Metric.TARGET_VAL_IOU})", exact=True).first.wait_for()
    assert page.get_by_text("8 matching runs").count() == 1
    assert sections(page)[:5] == [
        "Target and source over training", "Final scores", "The domain classifier",
        "Can a new classifier distinguish the domains?", "Losses",
    ]  # fmt: skip
    page.locator(".bars").first.wait_for()
    picture(page, "view_comparison")


def test_the_view_of_an_adaptation_has_the_mean_of_each_method(filled, opened):
    (start,) = {title for title in filled.views if title.startswith("Did") and "seeds" not in title}
    page = opened(f"{filled.url}/{filled.views[start]}")
    for method in ("dann", "lambda_zero"):
        page.get_by_text(f"Group: {method}", exact=True).first.wait_for()
    page.get_by_text("5 matching runs").wait_for()
    assert sections(page)[0] == "Target and source over training"


def test_the_view_of_the_training_draws_the_domain_classifier_of_each_run(filled, opened):
    page = opened(filled.view("Is DANN working?"))
    for name in names_of(filled.runs(Job.ADAPT)):
        page.get_by_text(f"{name} ({Metric.DOMAIN_ACCURACY})", exact=True).first.wait_for()
    shown = sections(page)
    assert shown[:3] == ["The domain classifier", "Can a new classifier distinguish the domains?", "Losses"]
    assert "class_iou/target_val" in shown[4:]
    picture(page, "view_training")


def test_the_view_of_a_sweep_is_a_table_of_its_trials_the_best_first(filled, opened):
    page = opened(filled.view("Sweep small"))
    page.get_by_text("3 matching runs").wait_for()
    for column in (f"cfg.{KEY}", Metric.TARGET_VAL_IOU, Tag.ROLE):
        page.get_by_role("columnheader").get_by_text(column, exact=True).first.wait_for()
    trials = sorted(filled.runs(Job.TRIAL), key=lambda run: -run.data.metrics[Metric.TARGET_VAL_IOU])
    names = names_of(trials)
    text = page.locator(".ag-pinned-left-cols-container").first
    text.get_by_text(names[-1], exact=True).wait_for()
    rows = sorted(text.locator(".ag-row").all(), key=lambda row: int(row.get_attribute("row-index") or 0))
    links = [row.locator("a") for row in rows]
    assert [link.first.inner_text() for link in links if link.count()] == names
    picture(page, "view_sweep")


def test_a_view_is_in_mlflow_s_menu_by_its_title(filled, opened):
    page = opened(filled.view("Is DANN working?"))
    page.get_by_role("button", name=re.compile("Is DANN working")).first.click()
    for title in ("Did adaptation help? source → target", "Sweep small"):
        page.get_by_text(title, exact=True).first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1500, 420])
@pytest.mark.parametrize("kind", ["report", "study"])
def test_our_own_pages_have_no_error_and_fit_the_window(filled, browser, kind, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"{request.url} failed"))
    page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    path: Path = getattr(filled, kind)
    page.goto(path.as_uri())
    page.locator("h1").first.wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128
    assert light == (scheme == "light"), background
    assert errors == []
    context.close()


def test_the_page_of_models_lists_each_model_with_its_score(filled, opened):
    window = {"width": 3200, "height": 1000}  # MLflow draws only the columns that are in sight
    address = f"{filled.url}/#/experiments/{filled.experiment_id}/models?workflowType=machine_learning"
    page = opened(address, viewport=window)
    header = page.get_by_role("columnheader").get_by_text(Metric.TARGET_VAL_IOU, exact=True).first
    header.wait_for()
    models = filled.client.search_logged_models([filled.experiment_id])
    assert page.get_by_role("link", name="model", exact=True).count() == len(models)
    scores = [metric.value for model in models for metric in model.metrics or () if metric.key == Metric.TARGET_VAL_IOU]
    for score in scores:
        page.get_by_text(f"{score:.3f}"[:4]).first.wait_for()
    picture(page, "models")


def test_a_run_shows_its_predictions_with_a_slider_of_steps(filled, opened):
    run_id = filled.runs(Job.ADAPT)[0].info.run_id
    page = opened(
        f"{filled.url}/#/experiments/{filled.experiment_id}/runs/{run_id}/model-metrics?workflowType=machine_learning"
    )
    section = page.get_by_text("images", exact=True).first
    section.wait_for()
    section.scroll_into_view_if_needed()
    page.get_by_role("slider").first.wait_for()
    page.locator("img[src*='predictions']").first.wait_for()
