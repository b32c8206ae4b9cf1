"""Makes the imports of programs quicker: no garbage collections, and no signal processing that nobody asks for.

For programs alone: both change the whole process, which in a notebook is the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
import types
from collections.abc import Iterator
from typing import Any

SCIPY_SIGNAL = "scipy.signal"


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import modules in the block without collections of garbage, and `scipy.signal` only if one of them uses it."""
    with _scipy_signal_on_demand(), uncollected():
        yield


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
            atexit.register(gc.unfreeze)  # else libraries report at the end, in many lines, what is then left
        if collected:
            gc.enable()


class _ScipySignal(types.ModuleType):
    """Stands for scipy.signal, and imports it when asked for what it does not hold itself."""

    hamming = None  # what torchmetrics looks for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # of libraries that look through all modules
            raise AttributeError(name)
        if sys.modules.get(SCIPY_SIGNAL) is self:
            del sys.modules[SCIPY_SIGNAL]
        import scipy.signal as real

        return getattr(real, name)


@contextlib.contextmanager
def _scipy_signal_on_demand() -> Iterator[None]:
    """Import scipy.signal in the block only if something of it is used.

    Torchmetrics, which Lightning needs, imports it to put a window function back that SciPy has renamed. No code here calls it,
    and its 450 modules take an eighth of all imports (docs/log.md).
    """
    if SCIPY_SIGNAL in sys.modules:
        yield
        return
    stand_in = _ScipySignal(SCIPY_SIGNAL)
    sys.modules[SCIPY_SIGNAL] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(SCIPY_SIGNAL) is stand_in:
            del sys.modules[SCIPY_SIGNAL]
