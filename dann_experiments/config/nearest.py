"""What a misspelled name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def meant(name: object, known: Iterable[str], least: float = 0.6) -> str:
    """Return "; did you mean 'x'?" with the known name that is nearest to `name`; "" if none is alike.

    `least`: likeness that a name must have, 0 (any) to 1 (equal), by `difflib`.
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=least)
    return f"; did you mean {near[0]!r}?" if near else ""
