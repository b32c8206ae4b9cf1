"""Formats numbers and names for the tables of pages and reports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def short(name: str, length: int = 26) -> str:
    """Return the name, with an ellipsis in the middle if it is longer than `length`.

    >>> short("a rather long name", 10)
    'a rath…ame'
    """
    return name if len(name) <= length else f"{name[: length - length // 3 - 1]}…{name[-(length // 3) :]}"


def decimal(value: float, form: str, scale: float = 1) -> str:
    """Format a number times `scale` with a true minus sign, which is as wide as a plus; a dash if it is not finite.

    >>> decimal(0.0312, "+.1f", 100)
    '+3.1'
    """
    return format(scale * value, form).replace("-", MINUS) if math.isfinite(value) else MISSING


def number(value: Any, digits: int = 4) -> str:
    """Return the text of a table cell: floats with so many significant digits, an empty text for a missing value.

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
