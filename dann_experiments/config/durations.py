"""Says how long something takes."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a number of seconds (0 or more) as people say it.

    >>> duration(45), duration(600), duration(9000)
    ('45 s', '10 min', '2.5 h')
    """
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
