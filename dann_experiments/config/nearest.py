"""What a misspelled name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str], least: float = 0.6) -> str | None:
    """Return the known name that is nearest to `name`; None if none is alike.

    `least`: likeness that a name must have, 0 (any) to 1 (equal), by `difflib`.
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=least)), None)


def meant(name: object, known: Iterable[str], least: float = 0.6) -> str:
    """Return "; did you mean 'x'?" with the `nearest` name; "" if none is alike."""
    near = nearest(name, known, least)
    return "" if near is None else f"; did you mean {near!r}?"
