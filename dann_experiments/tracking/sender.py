"""Sends metrics to MLflow from a thread of its own, in batches: a training step only appends to a list.

A batch stays in the buffer until the store has acknowledged it. When the store is away the sender tries again with growing
pauses; sending a batch twice is harmless. What is left when the run ends goes to a JSONL file beside the run.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dann_experiments.tracking.store import without_secrets

log = logging.getLogger(__name__)
BATCH = 1000  # metrics a request, MLflow's limit
VALID_NAME = re.compile(r"[\w\-. :/]+")
PAUSE_SECONDS = 1.0  # between two sends while metrics keep coming
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 15.0


class MetricSender:
    """Buffers (name, value, step) and sends them in order. Values may be tensors: they are read by the sending thread."""

    def __init__(self, client: Any, run_id: str, spool: Path) -> None:
        self._client = client
        self._run_id = run_id
        self._spool = spool
        self._pending: deque[tuple[str, Any, int, int]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._send_all, name="mlflow-sender", daemon=True)
        self._thread.start()

    def put(self, values: Mapping[str, Any], step: int) -> None:
        """Queue metrics of one step; returns at once. Raises ValueError for what MLflow would never take."""
        for name, value in values.items():
            if not VALID_NAME.fullmatch(name):
                raise ValueError(f"metric {name!r}: MLflow takes letters, digits, and _ - . / : and blanks in a name")
            if getattr(value, "shape", None) not in (None, ()) and value.shape.numel() != 1:
                raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; log one number")
        now = int(time.time() * 1000)
        with self._wake:
            self._pending.extend((name, value, now, step) for name, value in values.items())
            if len(self._pending) >= BATCH:
                self._wake.notify()

    def close(self, timeout: float = 60.0) -> int:
        """Send what is left, for at most `timeout` seconds; returns how many metrics went to the spool file instead."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        with self._wake:
            left = list(self._pending)
            self._pending.clear()
        if left:
            self._spool.parent.mkdir(parents=True, exist_ok=True)
            with open(self._spool, "a", encoding="utf-8") as file:
                for name, value, timestamp, step in left:
                    line = {
                        "run_id": self._run_id,
                        "key": name,
                        "value": float(value),
                        "timestamp": timestamp,
                        "step": step,
                    }
                    file.write(json.dumps(line) + "\n")
            log.warning("The tracking store did not take %d metrics; they are kept in %s.", len(left), self._spool)
        return len(left)

    def _send_all(self) -> None:
        from mlflow.entities import Metric

        retry = FIRST_RETRY_SECONDS
        while True:
            with self._wake:
                if not self._closing and len(self._pending) < BATCH:
                    self._wake.wait(PAUSE_SECONDS)
                batch = [self._pending[index] for index in range(min(BATCH, len(self._pending)))]
                if not batch:
                    if self._closing:
                        return
                    continue
            try:
                self._client.log_batch(self._run_id, metrics=[Metric(n, float(v), t, s) for n, v, t, s in batch])
            except Exception as error:  # whatever it is, the metrics stay in the buffer and training goes on
                if retry == FIRST_RETRY_SECONDS:
                    log.warning("The tracking store does not take metrics (%s); trying again.", _first_line(error))
                with self._wake:
                    self._wake.wait(retry)
                retry = min(2 * retry, LONGEST_RETRY_SECONDS)
                continue
            retry = FIRST_RETRY_SECONDS
            with self._wake:
                for _ in range(min(len(batch), len(self._pending))):  # close() may have emptied it meanwhile
                    self._pending.popleft()


def _first_line(error: BaseException) -> str:
    return without_secrets((str(error).splitlines() or [type(error).__name__])[0])[:200]
