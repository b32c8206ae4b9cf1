"""The site of the documentation in a real browser: no request leaves, pages fit the window, the search finds.

`make test-browser` runs it. With PICTURES=FOLDER in the environment, pictures of the pages are saved there.
"""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import notebooks

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.browser
PROJECT = Path(__file__).parents[2]
PAGES = ("index", "dann", "first-run", "settings", "commands", "api", "ladder", "verdict", "decisions/0007-trials-are-slots",
         "repository/notebooks/01_first_run.ipynb", "repository/notebooks/02_sweep.ipynb",
         "repository/notebooks/03_did_it_help.ipynb")  # fmt: skip


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=PROJECT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Visit:
    """A page that may ask nobody but its own server."""

    def __init__(self, browser: Browser, own: str, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.own = own
        self.context.route("**/*", self._only_own)
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def _only_own(self, route: Route) -> None:
        if route.request.url.startswith((self.own, "data:", "blob:")):
            route.continue_()
        else:
            self.problems.append(f"asked for {route.request.url}")
            route.abort()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_no_other_host_and_fits_the_window(browser, address, name, width, scheme):
    visit = Visit(browser, address, width, scheme)
    page = visit.page
    page.goto(f"{address}/{name}.html")
    page.wait_for_load_state("networkidle")
    page.locator("article h1").first.wait_for()
    assert visit.problems == []
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    if os.environ.get("PICTURES"):
        folder = Path(os.environ["PICTURES"]).absolute()
        page.screenshot(path=folder / f"{name.replace('/', '_')}_{width}_{scheme}.png", full_page=True)
    visit.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_variant_of_the_figure_is_seen_and_it_loads(browser, address, scheme):
    visit = Visit(browser, address, scheme=scheme)
    visit.page.goto(f"{address}/dann.html")
    seen = [image for image in visit.page.locator("article img").all() if image.is_visible()]
    (source,) = [image.get_attribute("src") for image in seen]
    assert source is not None
    assert f"dann_{scheme}.svg" in source
    assert seen[0].evaluate("image => image.naturalWidth") > 0
    visit.context.close()


@pytest.mark.parametrize("name", [file.name for file in notebooks.NOTEBOOKS])
def test_a_notebook_shows_tables_and_pictures_or_says_that_they_are_missing(browser, address, name):
    """CI runs the notebooks before this test."""
    visit = Visit(browser, address)
    visit.page.goto(f"{address}/repository/notebooks/{name}.html")
    visit.page.wait_for_load_state("networkidle")
    pictures, tables = visit.page.locator("article img").all(), visit.page.locator("article table").count()
    if notebooks.executed(name) is None:
        assert visit.page.get_by_text("make notebooks").is_visible()
        assert (len(pictures), tables) == (0, 0)
    else:
        assert visit.page.get_by_text("make notebooks").count() == 0
        assert tables > 0
        assert pictures
        assert all(picture.evaluate("image => image.naturalWidth") > 200 for picture in pictures)
    visit.context.close()


@pytest.mark.parametrize("kind", ["server", "file"])
def test_the_search_finds_without_a_network(browser, site, address, kind):
    own = address if kind == "server" else site.as_uri()
    visit = Visit(browser, own)
    page = visit.page
    page.goto(f"{own}/decisions/0007-trials-are-slots.html")
    page.get_by_placeholder("Search").first.click()
    page.keyboard.type("gradient reversal")
    page.locator(".md-search-result__link[href*='dann.html']").first.click()
    page.get_by_role("heading", name="DANN on one page").first.wait_for()
    assert visit.problems == []
    visit.context.close()
