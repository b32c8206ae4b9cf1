"""The time of day for what is logged, which never goes back, whatever happens to the machine's clock."""

from __future__ import annotations

import threading
import time


class Clock:
    """Milliseconds since 1970. Where the machine's clock is put back, time goes on from where it was, as fast as it passes;
    where it is put forward (a laptop that slept), that is followed. `not_before`: a time that has been, such as a run's start."""

    def __init__(self, not_before: int = 0) -> None:
        self._lock = threading.Lock()
        self._last = not_before / 1000
        self._asked = time.monotonic()

    def now(self) -> int:
        """The time now; no call gives less than one before it."""
        with self._lock:
            asked = time.monotonic()
            self._last = max(time.time(), self._last + (asked - self._asked))
            self._asked = asked
            return int(self._last * 1000)
