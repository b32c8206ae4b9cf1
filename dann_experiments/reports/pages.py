"""Fills the templates of this folder: HTML pages that need no other file, and Markdown reports."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from xml.dom import minidom

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from dann_experiments.reports.colors import THEME, themed
from dann_experiments.reports.plots.style import MINUS, MISSING, drawing, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template of this folder; values become text of the page, never markup, in templates of HTML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_environment().get_template(template).render(values), encoding="utf-8")


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure as an `<svg>` element: text as text, colors as drawn (style.css replaces those of THEME).

    `name`: different for each figure of a page, since ids of the page derive from it. `label`: read by screen readers.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with drawing({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=160, metadata=metadata)
    svg = minidom.parseString(buffer.getvalue()).documentElement  # noqa: S318  (written by Matplotlib a line above)
    assert svg is not None
    svg.setAttribute("role", "img")
    svg.setAttribute("aria-label", label)
    for group in svg.getElementsByTagName("g"):  # numbered within a figure, and referred to by nothing
        if group.hasAttribute("id"):
            group.removeAttribute("id")
    return Markup(svg.toxml())  # noqa: S704


def safe_address(address: str) -> bool:
    """Return whether an address is safe to link to: not of a kind that could run something (`javascript:`, `data:`)."""
    return address.isprintable() and urlsplit(address.strip()).scheme.lower() in ("", "http", "https", "file")


def decimal(value: float, form: str, scale: float = 1) -> str:
    """Return a number times `scale` in a format with a true minus sign, which is as wide as a plus; a dash if it is not finite.

    >>> decimal(0.0312, "+.1f", 100)
    '+3.1'
    """
    return format(scale * value, form).replace("-", MINUS) if math.isfinite(value) else MISSING


def number(value: Any, digits: int = 4) -> str:
    """Return a table's cell: a fraction with so many significant digits, nothing for a missing value.

    >>> number(0.123456), number(None), number(7)
    ('0.1235', '', '7')
    """
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def markdown(table: pd.DataFrame) -> list[str]:
    """Return a table as lines of Markdown."""
    if not len(table):
        return ["none"]
    head = [str(name) for name in table.columns]
    rows = [head, ["---"] * len(head), *([number(cell) for cell in row] for row in table.values.tolist())]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


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
    environment.filters["markdown"] = lambda table: "\n".join(markdown(table))
    environment.globals |= {"THEME": THEME, "MISSING": MISSING}
    return environment
