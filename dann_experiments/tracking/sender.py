"""Sends a run's metrics, tags, files and end to MLflow from a thread of its own: a training step only appends to a list.

What is sent stays here, or in the spool file beside the run, until the store has acknowledged it. When the store is away the
sender tries again with growing pauses; sending anything twice is harmless. What is left when the run closes stays in the
run's folder, from where `sync` sends it.
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
from dann_experiments.tracking.clock import Clock
from dann_experiments.tracking.deleted import restored
from dann_experiments.tracking.spool import Point, Spool
from dann_experiments.tracking.store import in_one_line

log = logging.getLogger(__name__)
SPOOL, TAGS = "unsent_metrics.jsonl", "unsent_tags.json"
BATCH = 1000  # metrics a request, MLflow's limit
MOST_IN_MEMORY = 20_000  # about 15 MB of tensors; beyond, they are written to the spool by whoever logs the next
SPILL_SECONDS = 1.0  # after which metrics stand in the file, where a killed process does not lose them
SEND_SECONDS = 5.0
"""Between two sends, unless a full request waits: each costs the store, and the training beside it, milliseconds."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 15.0
CLOSE_SECONDS = 60.0
"""The longest that closing waits for a store that takes nothing."""
UPLOAD_SECONDS = 600.0
"""The longest that closing waits for one file that is being uploaded."""
SWITCH_SECONDS = 1e-5
"""After which a thread that computes in Python gives way to one that waits; Python's own value is 5 ms."""


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """In the block, the sending thread hands Python over to training at each operator that training comes back from, rather
    than when it has had its milliseconds: it then works while operators compute (docs/log.md has the gain)."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Sender:
    """Queues (name, value, step), tags, files and the run's end, and sends them in this order. Values may be tensors: they are
    read by the sending thread. `folder`: the run's, with what an earlier process left unsent, if it did. `already`: the points
    that the store has, for a run that is resumed: up to the highest step of each metric, nothing is sent again. `clock`: gives
    metrics and the run's end their times."""

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
        """Metric -> its highest step, and the times at which it was logged there."""
        for point in () if already is None else (*already, *self._spool.waiting()):
            step, times = self._already.get(point.name, (-1, set()))
            if point.step >= step:
                self._already[point.name] = (point.step, {point.timestamp, *(times if point.step == step else ())})
        self._tags: dict[str, str] = _read_tags(folder / TAGS)
        self._memory: deque[tuple[str, Any, int, int]] = deque()
        self._files: dict[
            Path, None
        ] = {}  # a set that keeps its order: a file that is written anew meanwhile is sent once
        self._end: tuple[str, int] | None = None
        self.refusal = ""
        """Why the store did not take what was sent last; empty if it did."""
        self._spool_refused = False
        self._wake = threading.Condition()
        self._spilling = threading.Lock()  # whoever moves points to the spool does it alone: they keep their order
        self._keeping_tags = threading.Lock()
        self._closing = self._given_up = self._failing = self._uploading = False
        self._last_success = time.monotonic()
        self._send_from = 0.0  # the first metrics of a run go at once
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()

    def put(self, values: Mapping[str, Any], step: int, again: bool = False) -> None:
        """Queue metrics of one step; returns at once. `again`: they stand beside other values of that step, so that a store
        which has one of each has not got these. Raises ValueError for what MLflow would never take."""
        for name, value in values.items():
            if not is_key(name):
                raise ValueError(
                    f"metric {name!r}: MLflow takes letters, digits, and _ - . / : and blanks in a name, at most {LONGEST_KEY}, "
                    "and no empty part, . or .. between slashes"
                )
            if getattr(value, "shape", None) not in (None, ()) and value.shape.numel() != 1:
                raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; log one number")
        now = self.clock.now()
        with self._wake:
            self._memory.extend(
                (name, value, now, step) for name, value in values.items() if not self._is_known(name, step, again)
            )
            if len(self._memory) >= BATCH:
                self._wake.notify()
        # the store is away, or slower than training; a disk that took nothing is tried by the sending thread alone, every few
        # seconds: trying it at each step would cost a step more and more
        if len(self._memory) > MOST_IN_MEMORY and not self._spool_refused:
            self._spill()

    def put_tags(self, tags: Mapping[str, str]) -> None:
        """Queue tags; they lie in a file of the run's folder until the store has them."""
        with self._keeping_tags:
            self._tags.update(tags)
            self._keep_tags()

    def put_file(self, path: Path) -> None:
        """Queue a file of the run's folder: an artifact under its path there. It is read when its turn comes."""
        with self._wake:
            self._files[path] = None

    def persist(self) -> None:
        """When this returns, what was queued is in the store or in the spool file: a process killed now loses nothing of it,
        nor does a machine that loses its power. Raises NotWritten where the disk does not take it: it stays in memory."""
        problem = self._spill(durable=True)
        if problem is not None:
            raise problem

    def close(self, status: str, end_time: int | None = None) -> bool:
        """Send what is left and end the run; whether the store has all. Gives up CLOSE_SECONDS after the store took
        anything last; what is left stays in the folder. Never raises."""
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
            "The tracking store did not take %d metrics and %d files of run %s%s; they are kept in %s. Send them later: python "
            "-m dann_experiments sync --tracking.folder %s",
            self._spool.left + lost, len(self._files), self._run_id, because, self._folder, self._folder.parent,
        )  # fmt: skip
        if lost:
            log.error("%d of these metrics are lost: neither the store nor %s takes them.", lost, self._folder / SPOOL)
        return False

    def _spill(self, durable: bool = False) -> NotWritten | None:
        """Move points from memory to the spool; what keeps the disk from taking them."""
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
                else:  # the sending thread has spilled them, which a power failure may undo
                    self._spool.to_disk()
            except OSError as error:
                problem = NotWritten(f"{path} cannot be written: {reason(error, path)}.")
                if not self._spool_refused:
                    log.warning("%s Metrics wait in memory.", problem)
                self._spool_refused = True
                return problem
            self._spool_refused = False
            self._forget(waiting)
            return None

    def _forget(self, points: Sequence[tuple[str, Any, int, int]]) -> None:
        """These points, the oldest in memory, are in the spool or the store; another thread may have found so before."""
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
            except Exception as error:  # whatever it is, nothing is dropped and training goes on
                if self._is_restored(error):
                    continue
                self.refusal = in_one_line(error)
                if not self._failing:
                    log.warning("The tracking store does not take what is sent (%s); trying again.", self.refusal)
                self._failing = True
                with self._wake:
                    self._wake.wait(retry)
                retry = FIRST_RETRY_SECONDS if self._closing else min(2 * retry, LONGEST_RETRY_SECONDS)
                continue
            retry = FIRST_RETRY_SECONDS

    def _is_restored(self, refusal: Exception) -> bool:
        """Whether the store refused because somebody deleted the run, which is back now."""
        try:
            return restored(self._client, self._run_id, refusal)
        except Exception:  # the store is away, which is told of the request that found it so
            return False

    def _is_due(self) -> bool:
        waiting = self._spool.left + len(self._memory)
        return self._closing or self._failing or waiting >= BATCH or time.monotonic() >= self._send_from

    def _send_next(self) -> bool:
        """Send a batch of points; where it was the last, tags and a file too, and the end after all else. False if nothing is
        left."""
        points = self._send_points()
        if points < BATCH:  # else more may wait
            others = (self._send_tags(), self._send_file())
            if not points and not any(others):
                return self._send_end()
        self._send_from = time.monotonic() + SEND_SECONDS
        return True

    def _send_points(self) -> int:
        """The oldest points; how many they were."""
        points = self._spool.next(BATCH)
        if points:
            self._send(points)
            self._spool.acknowledge(len(points))
            return len(points)
        # what the spool did not take; no lock is held while it is sent, or training would wait for the store
        with self._wake:
            waiting = [self._memory[index] for index in range(min(BATCH, len(self._memory)))]
        if waiting:
            self._send([Point(name, float(value), timestamp, step) for name, value, timestamp, step in waiting])
            self._forget(waiting)
        return len(waiting)

    def _send_file(self) -> bool:
        with self._wake:
            path = next(iter(self._files), None)
            if path is None:
                return False
            del self._files[path]  # before it is read: written anew meanwhile, it is queued again
        self._upload(path)
        return True

    def _send_end(self) -> bool:
        if self._end is None:
            return False
        self._client.set_terminated(self._run_id, *self._end)
        self._end = None
        self._answered()
        return True

    def _answered(self) -> None:
        """The store has taken something."""
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
            self._tags = {
                key: value for key, value in self._tags.items() if tags.get(key) != value
            }  # those put meanwhile
            self._keep_tags()
        self._answered()
        return True

    def _keep_tags(self) -> None:
        """Make the file hold the tags that wait; where the disk takes nothing they wait in memory."""
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
            if path.exists():  # else it was removed meanwhile
                self._client.log_artifact(self._run_id, str(path), None if inside == "." else inside)
                self._answered()
        except Exception:
            with self._wake:
                self._files = {path: None, **self._files}
            raise
        finally:
            self._uploading = False


def _read_tags(path: Path) -> dict[str, str]:
    """The tags that an earlier process left unsent."""
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}
