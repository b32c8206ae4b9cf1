"""What MkDocs does not do by itself to make the site of docs/ and a few files beside it; mkdocs.yml names this file as its hook.

- The README is the first page. Files of the repository that a page links to (recipes, code, notebooks) become pages too, so
  that every link works on the site and in the repository alike.
- Notebooks are shown with the tables and pictures that `make notebooks` kept, or say that these are missing.
- The pages of docs/decisions/ get their places in the nav.
- GitHub's Markdown needs no empty line before a list or a table; Python-Markdown does.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))  # `mkdocs` alone does not look into the current folder

from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402

from benchmarks import notebooks, reference  # noqa: E402
from benchmarks.notebooks import fenced  # noqa: E402

log = logging.getLogger("mkdocs.hooks.docs_site")
BESIDE = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md",
          "notebooks/01_first_run.ipynb", "notebooks/02_sweep.ipynb", "notebooks/03_did_it_help.ipynb")  # fmt: skip
"""Files outside of docs/ that the nav names."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)|(?<=src=\")(?![a-z]+:)([^\"#]+)")
"""The address in `[text](address#anchor)` and `src="address"`, unless it has a scheme or is an anchor alone."""
FENCE = re.compile(r" *(```+|~~~+)")
ITEM = re.compile(r"(?:[-*+]|\d+\.) +\S")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the decisions into the nav, and check the generated pages."""
    folder = PROJECT / "docs" / "decisions"
    pages = [f"decisions/{file.name}" for file in sorted(folder.glob("*.md"))]
    config.nav = _with_pages(config.nav, "decisions", pages)
    for name, text in reference.pages().items():
        if (PROJECT / "docs" / name).read_text() != text:
            log.warning("docs/%s is out of date; run python -m benchmarks.reference", name)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the page of the Python API, and each file outside of docs/ that a page links to."""
    files.append(File.generated(config, "api.md", content=reference.api_page()))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    waiting = [*BESIDE, *(path for uri, text in texts.items() for path in _linked(text, repository_path(uri)))]
    while waiting:
        path = waiting.pop()
        uri = site_path(path)
        if path.startswith("docs/") or files.get_file_from_path(uri) or not (PROJECT / path).is_file():
            continue
        text = as_page(path)
        files.append(File.generated(config, uri, content=text))
        if path.endswith(".md"):
            waiting += _linked(text, path)
        if path.endswith(".ipynb"):
            for name, picture in notebooks.page(PROJECT / path)[1].items():
                files.append(File.generated(config, f"repository/{posixpath.dirname(path)}/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page into links of the site, and add the empty lines that Python-Markdown needs."""
    path = repository_path(page.file.src_uri)
    return with_gaps("\n".join(_with_links(markdown, path, page.file.src_uri)))


def repository_path(uri: str) -> str:
    """Return the file of a page of the site: `decisions/x.md` -> `docs/decisions/x.md`."""
    if uri == "index.md":
        return "README.md"
    inside = uri.removeprefix("repository/")
    if inside == uri:
        return f"docs/{uri}"
    return inside if (PROJECT / inside).exists() else inside.removesuffix(".md")


def site_path(path: str) -> str:
    """Return the page of the site that shows a file of the repository: `recipes/x.yaml` -> `repository/recipes/x.yaml.md`."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def as_page(path: str) -> str:
    """Return the Markdown of a file of the repository: itself, a notebook's cells and outputs, or one block of code."""
    if path.endswith(".ipynb"):
        return f"{notebooks.page(PROJECT / path)[0]}\n\nThe file: `{path}`\n"
    text = (PROJECT / path).read_text()
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n{fenced(text, LANGUAGES.get(Path(path).suffix, 'text'))}\n"


def with_gaps(markdown: str) -> str:
    """Return the text with an empty line before each list and each table that follows a paragraph."""
    lines: list[str] = []
    for line, inside in _lines(markdown):
        before = lines[-1] if lines else ""
        if not inside and before.strip() and not before.startswith((" ", "#", "<!--")):
            starts_list = ITEM.match(line) and not ITEM.match(before) and not before.startswith("|")
            starts_table = line.startswith("|") and not before.startswith("|")
            ends_table = before.startswith("|") and not line.startswith("|") and line.strip()
            if starts_list or starts_table or ends_table:
                lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yield each line, and whether it belongs to a block of code."""
    fence = ""
    for line in markdown.split("\n"):
        found = FENCE.match(line)
        if found and not fence:
            fence = found[1]
            yield line, True
        elif fence:
            yield line, True
            fence = "" if line.strip() == fence else fence
        else:
            yield line, False


def _linked(markdown: str, path: str) -> list[str]:
    """Return the files of the repository that a page links to."""
    targets = (found[1] or found[2] for line, code in _lines(markdown) if not code for found in LINK.finditer(line))
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for target in targets]


def _with_links(markdown: str, path: str, uri: str) -> Iterator[str]:
    """Yield the lines of a page with links to pages and pictures of the site. Folders have no page: their links stay, and
    `mkdocs build --strict` refuses them."""

    def on_site(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[0]))
        if not (PROJECT / target).is_file():
            return found[0]
        return os.path.relpath(site_path(target), posixpath.dirname(uri) or ".")

    for line, code in _lines(markdown):
        yield line if code else LINK.sub(on_site, line)


def _with_pages(nav: Any, name: str, pages: list[str]) -> Any:
    """Return the nav with the entry `name` replaced by a list of pages."""
    if isinstance(nav, dict):
        return {title: _with_pages(inner, name, pages) for title, inner in nav.items()}
    if isinstance(nav, list):
        return [_with_pages(inner, name, pages) for inner in nav]
    return pages if nav == name else nav
