"""A clock for what is logged, which never goes back, even if the machine's clock is changed."""

from __future__ import annotations

import threading
import time


class Clock:
    """A clock in milliseconds since 1970. If the machine's clock is set back, this one continues from where it was; if it is set
    forward (a laptop that slept), this one follows. `not_before`: the earliest time to return, such as a run's start, in ms."""

    def __init__(self, not_before: int = 0) -> None:
        self._lock = threading.Lock()
        self._last = not_before / 1000
        self._asked = time.monotonic()

    def now(self) -> int:
        """Return the current time; never less than an earlier call returned."""
        with self._lock:
            asked = time.monotonic()
            self._last = max(time.time(), self._last + (asked - self._asked))
            self._asked = asked
            return int(self._last * 1000)
