"""Numbers and names as text: cells of tables in pages and reports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def short(name: str, length: int = 26) -> str:
    """Return the name, its middle left out where it is longer than `length`.

    >>> short("a rather long name", 10)
    'a rath…ame'
    """
    return name if len(name) <= length else f"{name[: length - length // 3 - 1]}…{name[-(length // 3) :]}"


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
