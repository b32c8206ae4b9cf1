"""Sends a run's metrics, tags, files and end to MLflow from a separate thread: a training step only appends to a list.

Data stay in memory, or in the spool file in the run's folder, until the store has acknowledged them. If the store is away, the
sender tries again with growing pauses; sending anything twice is harmless. What is left when the run closes stays in the run's
folder, from where `sync` sends it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dann_experiments.config.atomic_write import reason
from dann_experiments.config.errors import NotWritten
from dann_experiments.config.store_names import LONGEST_KEY, is_key
from dann_experiments.names import Metric
from dann_experiments.tracking.clock import Clock
from dann_experiments.tracking.deleted import restored
from dann_experiments.tracking.logged_model import send_model
from dann_experiments.tracking.spool import Point, Spool
from dann_experiments.tracking.store import in_one_line

log = logging.getLogger(__name__)
SPOOL, TAGS = "unsent_metrics.jsonl", "unsent_tags.json"
BATCH = 1000  # metrics per request, MLflow's limit
MOST_IN_MEMORY = 20_000  # about 15 MB of tensors; beyond, whichever thread logs next writes them to the spool
SPILL_SECONDS = 1.0  # after which metrics are written to the spool, where a killed process does not lose them
SEND_SECONDS = 5.0
"""Pause between two requests, unless a full request is waiting: each costs the store and the training process milliseconds."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 15.0
CLOSE_SECONDS = 60.0
"""How long closing waits at most for a store that accepts nothing."""
UPLOAD_SECONDS = 600.0
"""How long closing waits at most for one file that is being uploaded."""
SWITCH_SECONDS = 1e-5
"""Interval after which a thread that runs Python code yields to a waiting one; Python's default is 5 ms."""


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """Shorten the GIL switch interval from 5 ms to 10 us in the block, so that the sending thread yields to training almost
    immediately, and works only while torch operators compute (docs/log.md reports the gain)."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Sender:
    """Queues (name, value, step), tags, files and the run's end, and sends them in this order.

    Values may be tensors: the sending thread reads them. `folder`: the run's folder, with what an earlier process left unsent.
    `already`: for a resumed run, the points that the store has; up to the highest step of each metric, nothing is sent again.
    `clock`: the clock for the times of metrics and of the run's end."""

    def __init__(
        self,
        client: Any,
        run_id: str,
        folder: Path,
        already: Iterable[Point] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self._client = client
        self._run_id = run_id
        self._folder = folder
        self._spool = Spool(folder / SPOOL)
        self._already: dict[str, tuple[int, set[int]]] = {}
        """Metric -> its highest step, and the times at which it was logged for that step."""
        for point in () if already is None else (*already, *self._spool.waiting()):
            step, times = self._already.get(point.name, (-1, set()))
            if point.step >= step:
                self._already[point.name] = (point.step, {point.timestamp, *(times if point.step == step else ())})
        self._tags: dict[str, str] = _read_tags(folder / TAGS)
        self._memory: deque[tuple[str, Any, int, int]] = deque()
        self._files: dict[Path, None] = {}  # an ordered set: a file that is rewritten meanwhile is sent once
        self._model = False
        self._sent_files: dict[Path, tuple[int, int] | None] = {}
        self._end: tuple[str, int] | None = None
        self._last: dict[str, Point] = {}
        self.refusal = ""
        """Why the store did not accept the last request; empty if it did."""
        self._spool_refused = False
        self._wake = threading.Condition()
        self._spilling = threading.Lock()  # one thread at a time moves points to the spool, to keep their order
        self._keeping_tags = threading.Lock()
        self._closing = self._given_up = self._failing = self._uploading = False
        self._last_success = time.monotonic()
        self._send_from = 0.0  # the first metrics of a run are sent at once
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()

    def put(self, values: Mapping[str, Any], step: int, again: bool = False) -> None:
        """Queue metrics of one step; returns at once. `again`: they are logged in addition to other values of that step, so that
        a store with one value of each does not have these yet. Raises ValueError for what MLflow would never accept."""
        for name, value in values.items():
            if not is_key(name):
                raise ValueError(
                    f"metric {name!r}: MLflow allows letters, digits, blanks, and _ - . / : in a name, at most {LONGEST_KEY}, "
                    "and no empty part, . or .. between slashes"
                )
            if getattr(value, "shape", None) not in (None, ()) and value.shape.numel() != 1:
                raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; log one number")
        now = self.clock.now()
        for name, value in values.items():
            if name.startswith(Metric.IOU):
                time_of = now if not self._is_known(name, step, again) else max(self._already[name][1], default=now)
                self._last[name] = Point(name, float(value), time_of, step)
        with self._wake:
            self._memory.extend(
                (name, value, now, step) for name, value in values.items() if not self._is_known(name, step, again)
            )
            if len(self._memory) >= BATCH:
                self._wake.notify()
        # the store is away, or slower than training. After a failed write only the sending thread tries the disk again, every
        # few seconds: trying it in each step would make steps slower and slower
        if len(self._memory) > MOST_IN_MEMORY and not self._spool_refused:
            self._spill()

    def last_step(self, prefix: str) -> int:
        """Return the highest step that a resumed run had of a metric whose name begins with `prefix`; -1 if there was none."""
        return max((step for name, (step, _) in self._already.items() if name.startswith(prefix)), default=-1)

    def put_tags(self, tags: Mapping[str, str]) -> None:
        """Queue tags; they are kept in a file in the run's folder until the store has them."""
        with self._keeping_tags:
            self._tags.update(tags)
            self._keep_tags()

    def put_file(self, path: Path) -> None:
        """Queue a file in the run's folder, to become an artifact with the same relative path. It is read when it is sent. A file
        that has not changed since it was sent is left out."""
        with self._wake:
            if path not in self._sent_files or self._sent_files[path] != _version(path):
                self._files[path] = None

    def last(self, name: str) -> Point | None:
        """Return the last point that was logged of an IoU; None if there is none."""
        return self._last.get(name)

    def put_model(self) -> None:
        """Queue the model in the run's folder, to become the run's logged model when all else but the run's end is sent."""
        self._model = True

    def persist(self) -> None:
        """Write all queued metrics that the store does not have to the spool file, so that they survive a killed process and a
        power failure. Raises NotWritten if the disk refuses; the metrics then stay in memory."""
        problem = self._spill(durable=True)
        if problem is not None:
            raise problem

    def close(self, status: str, end_time: int | None = None) -> bool:
        """Send what is left, end the run, and return whether the store has everything. Gives up when the store has accepted
        nothing for CLOSE_SECONDS; the rest stays in the folder. Never raises."""
        with self._wake:
            self._end = (status, self.clock.now() if end_time is None else end_time)
            self._closing = True
            self._last_success = time.monotonic()
            self._wake.notify()
        while self._thread.is_alive():
            self._thread.join(0.2)
            longest = UPLOAD_SECONDS if self._uploading and not self._failing else CLOSE_SECONDS
            if self._thread.is_alive() and time.monotonic() - self._last_success > longest:
                break
        if not self._thread.is_alive() and self._end is None:
            return True
        with self._wake:
            self._given_up = True
            self._wake.notify()
        self._spill()
        lost = len(self._memory)
        because = f" ({self.refusal})" if self.refusal else ""
        log.warning(
            "The tracking store did not accept %d metrics and %d files of run %s%s; they are kept in %s. Send them later: python "
            "-m dann_experiments sync --tracking.folder %s",
            self._spool.left + lost, len(self._files) + self._model, self._run_id, because, self._folder, self._folder.parent,
        )  # fmt: skip
        if lost:
            log.error("%d of these metrics are lost: the store and %s refuse them.", lost, self._folder / SPOOL)
        return False

    def _spill(self, durable: bool = False) -> NotWritten | None:
        """Move points from memory to the spool; return the error if the disk refuses them, else None."""
        with self._spilling:
            with self._wake:
                waiting = list(self._memory)
            if not waiting and not durable:
                return None
            points = [Point(name, float(value), timestamp, step) for name, value, timestamp, step in waiting]
            path = self._folder / SPOOL
            try:
                if points:
                    self._spool.append(points, durable)
                else:  # the sending thread has written them, but a power failure could still lose them
                    self._spool.to_disk()
            except OSError as error:
                problem = NotWritten(f"{path} cannot be written: {reason(error, path)}.")
                if not self._spool_refused:
                    log.warning("%s Metrics are kept in memory.", problem)
                self._spool_refused = True
                return problem
            self._spool_refused = False
            self._forget(waiting)
            return None

    def _forget(self, points: Sequence[tuple[str, Any, int, int]]) -> None:
        """Remove these points, the oldest in memory: the spool or the store has them. Another thread may have done so before."""
        with self._wake:
            for point in points:
                if self._memory and self._memory[0] is point:
                    self._memory.popleft()

    def _work(self) -> None:
        retry = FIRST_RETRY_SECONDS
        while not self._given_up:
            with self._wake:
                if not self._closing and len(self._memory) < BATCH:
                    self._wake.wait(SPILL_SECONDS)
            try:
                self._spill()
                if self._is_due() and not self._send_next() and self._closing:
                    return
            except Exception as error:  # for any error: nothing is dropped, and training continues
                if self._is_restored(error):
                    continue
                self.refusal = in_one_line(error)
                if not self._failing:
                    log.warning("The tracking store does not accept what is sent (%s); trying again.", self.refusal)
                self._failing = True
                with self._wake:
                    self._wake.wait(retry)
                retry = FIRST_RETRY_SECONDS if self._closing else min(2 * retry, LONGEST_RETRY_SECONDS)
                continue
            retry = FIRST_RETRY_SECONDS

    def _is_restored(self, refusal: Exception) -> bool:
        """Return whether the store refused because the run had been deleted, and the run is restored now."""
        try:
            return restored(self._client, self._run_id, refusal)
        except Exception:  # the store is away, which is reported for the request that failed
            return False

    def _is_due(self) -> bool:
        waiting = self._spool.left + len(self._memory)
        return self._closing or self._failing or waiting >= BATCH or time.monotonic() >= self._send_from

    def _send_next(self) -> bool:
        """Send a batch of points; after the last batch also tags and files, and after all else the end. Return False if nothing
        is left."""
        points = self._send_points()
        if points < BATCH:  # else more points may be waiting
            others = (self._send_tags(), self._send_files())
            if not points and not any(others) and not self._send_model():
                return self._send_end()
        self._send_from = time.monotonic() + SEND_SECONDS
        return True

    def _send_points(self) -> int:
        """Send the oldest points and return their number."""
        points = self._spool.next(BATCH)
        if points:
            self._send(points)
            self._spool.acknowledge(len(points))
            return len(points)
        # points that the spool refused; no lock is held while they are sent, or training would wait for the store
        with self._wake:
            waiting = [self._memory[index] for index in range(min(BATCH, len(self._memory)))]
        if waiting:
            self._send([Point(name, float(value), timestamp, step) for name, value, timestamp, step in waiting])
            self._forget(waiting)
        return len(waiting)

    def _send_files(self) -> bool:
        """Send files for SPILL_SECONDS, after which metrics are to be written to the spool; return whether there were any."""
        until, sent = time.monotonic() + SPILL_SECONDS, False
        while self._send_file():
            sent = True
            if time.monotonic() >= until:
                break
        return sent

    def _send_file(self) -> bool:
        with self._wake:
            path = next(iter(self._files), None)
            if path is None:
                return False
            del self._files[path]  # before it is read: if it is rewritten meanwhile, it is queued again
        self._upload(path)
        return True

    def _send_model(self) -> bool:
        if not self._model:
            return False
        self._uploading = True
        try:
            send_model(self._client, self._run_id, self._folder)
        finally:
            self._uploading = False
        self._model = False
        self._answered()
        return True

    def _send_end(self) -> bool:
        if self._end is None:
            return False
        self._client.set_terminated(self._run_id, *self._end)
        self._end = None
        self._answered()
        return True

    def _answered(self) -> None:
        """Record that the store accepted something."""
        if self._failing:
            log.info("The tracking store answers again.")
        self._failing, self.refusal = False, ""
        self._last_success = time.monotonic()

    def _send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._run_id, metrics=[Metric(*point) for point in points])
        self._answered()

    def _send_tags(self) -> bool:
        from mlflow.entities import RunTag

        with self._keeping_tags:
            tags = dict(self._tags)
        if not tags:
            return False
        self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        with self._keeping_tags:
            # keep those added meanwhile
            self._tags = {key: value for key, value in self._tags.items() if tags.get(key) != value}
            self._keep_tags()
        self._answered()
        return True

    def _keep_tags(self) -> None:
        """Write the waiting tags to their file; if the disk refuses, they stay in memory only."""
        path, part = self._folder / TAGS, self._folder / f"{TAGS}.part"
        with contextlib.suppress(OSError):
            if not self._tags:
                path.unlink(missing_ok=True)
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._tags), encoding="utf-8")
            os.replace(part, path)

    def _is_known(self, name: str, step: int, again: bool) -> bool:
        highest, times = self._already.get(name, (-1, ()))
        return step < highest or (step == highest and len(times) > again)

    def _upload(self, path: Path) -> None:
        inside = path.relative_to(self._folder).parent.as_posix()
        self._uploading = True
        try:
            version = _version(path)
            if version is not None:  # else it was removed meanwhile
                self._client.log_artifact(self._run_id, str(path), None if inside == "." else inside)
                self._sent_files[path] = version
                self._answered()
        except Exception:
            with self._wake:
                self._files = {path: None, **self._files}
            raise
        finally:
            self._uploading = False


def _version(path: Path) -> tuple[int, int] | None:
    """Return a file's time of change and size, by which a later content is told apart; None if there is no such file."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_mtime_ns, facts.st_size


def _read_tags(path: Path) -> dict[str, str]:
    """Return the tags that an earlier process left unsent."""
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}
