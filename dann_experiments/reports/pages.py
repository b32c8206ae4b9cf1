"""Fills the templates in this folder: self-contained HTML pages, and Markdown reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from dann_experiments.reports.colors import THEME, themed
from dann_experiments.reports.tables import MISSING, decimal, markdown, short


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template in this folder. In HTML templates values are escaped, so they cannot become markup."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_environment().get_template(template).render(values), encoding="utf-8")


def safe_address(address: str) -> bool:
    """Return whether an address is safe to link to: its scheme cannot run code (as `javascript:` and `data:` can)."""
    return address.isprintable() and urlsplit(address.strip()).scheme.lower() in ("", "http", "https", "file")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"decimal": decimal, "short": short, "themed": themed, "finite": math.isfinite}
    environment.tests["finite"] = math.isfinite
    environment.filters["markdown"] = lambda table: "\n".join(markdown(table))
    environment.globals |= {"THEME": THEME, "MISSING": MISSING}
    return environment
