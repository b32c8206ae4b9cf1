"""Keeps Python's garbage collector away from the objects of imported modules: almost a million, and none of them garbage."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block, which imports modules, and leave all objects made until its end out of later collections,
    if it did import some.

    Otherwise each full collection looks at all of them again, during the imports and while the job runs: a tenth of the imports
    and a fifth of a small run (docs/performance.md). For programs: in a notebook it would keep the user's own garbage as well."""
    collected, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collected:
            gc.enable()
