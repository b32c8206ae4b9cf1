"""Logs the use of CPU, memory, disk, network and GPUs during a run, measured by MLflow's own collectors.

MLflow's monitor itself asks the store each time and gives up when it is away; here the samples go the way of all metrics, through
the run's sender. Names and steps are those of MLflow: `system/cpu_utilization_percentage`, and the number of the sample.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dann_experiments.tracking.store import in_one_line

log = logging.getLogger(__name__)
SYSTEM = "system/"
"""Prefix of the names, by which MLflow shows the metrics in a tab of their own."""
INTERVAL_SECONDS = 10.0  # MLflow's default
STOP_SECONDS = 5.0
"""How long the end of a run waits at most for a collector that does not answer."""


@contextlib.contextmanager
def sampled(
    log_metrics: Callable[[Mapping[str, float], int], object], first_step: int, wanted: bool | None
) -> Iterator[None]:
    """Sample the use of the machine while the block runs, from a separate thread; log the last sample before it ends if there was
    none before. Does nothing if `wanted` is False; for None, MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING decides.

    `log_metrics` gets values by name, and the step, which counts up from `first_step`. A problem is logged once and ends neither
    the block nor, if only one collector has it, the others."""
    sampler = None
    try:
        if _is_on() if wanted is None else wanted:
            sampler = Sampler(log_metrics, first_step)
    except Exception as error:  # for any error: a run must not fail for what only observes it
        log.warning("There are no system metrics: %s.", in_one_line(error))
    try:
        yield
    finally:
        if sampler is not None:
            sampler.stop()


class Sampler:
    """A thread that logs a sample every INTERVAL_SECONDS, or as MLflow's variables MLFLOW_SYSTEM_METRICS_* set it: the seconds
    between two measurements, how many of them make a sample, and a name for this machine."""

    def __init__(self, log_metrics: Callable[[Mapping[str, float], int], object], first_step: int) -> None:
        from mlflow import environment_variables as variables

        self._interval = variables.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL_SECONDS
        self._measurements = variables.MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
        node = variables.MLFLOW_SYSTEM_METRICS_NODE_ID.get()
        self._prefix = f"{SYSTEM}{node}/" if node else SYSTEM
        self._log_metrics = log_metrics
        self._first_step = self._step = first_step
        self._collectors = _collectors()
        self._waiting = 0  # measurements since the last sample
        self._stopping = threading.Event()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and log a sample if there is none yet or measurements are left. Waits at most STOP_SECONDS."""
        self._stopping.set()
        self._thread.join(STOP_SECONDS)
        self._given_up = True  # what a collector still returns later is not logged: the run is being closed

    def _work(self) -> None:
        while not self._stopping.wait(self._interval):
            self._measure()
            if self._waiting >= self._measurements:
                self._log()
        if self._step == self._first_step and not self._waiting:
            self._measure()
        if self._waiting:
            self._log()

    def _measure(self) -> None:
        self._each(lambda collector: collector.collect_metrics())
        self._waiting += 1

    def _log(self) -> None:
        values: dict[str, float] = {}
        self._each(lambda collector: values.update(collector.aggregate_metrics()))
        self._each(lambda collector: collector.clear_metrics())
        self._waiting = 0
        if values and not self._given_up:
            try:
                self._log_metrics({self._prefix + name: value for name, value in values.items()}, self._step)
            except ValueError as error:  # a node id that no name of a metric may contain
                self._given_up = True
                log.warning("There are no more system metrics: %s.", in_one_line(error))
            self._step += 1

    def _each(self, do: Callable[[Any], object]) -> None:
        """Call `do` for each collector, and leave those out from then on that raise."""
        for collector in list(self._collectors):
            try:
                do(collector)
            except Exception as error:  # for any error, such as a driver that was unloaded
                self._collectors.remove(collector)
                log.warning("There are no more system metrics of %s: %s.", type(collector).__name__, in_one_line(error))


def _is_on() -> bool:
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    return bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())


def _collectors() -> list[Any]:
    """Return MLflow's collectors that work here. One that does not is logged, except GPUs' on a machine without them."""
    import psutil
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    psutil.cpu_percent()  # it measures since its last call: the first value would be 0
    found = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor):
        try:
            found.append(kind())
        except Exception as error:  # for any error of the machine
            log.warning("There are no system metrics of %s: %s.", kind.__name__, in_one_line(error))
    return found + _gpu_collectors()


def _gpu_collectors() -> list[Any]:
    import torch
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    problems = []
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            return [kind()]
        except Exception as error:  # no GPU of this maker, or no package that reads it
            problems.append(in_one_line(error))
    if torch.cuda.is_available():
        log.warning("There are no system metrics of the GPU: %s.", problems[0 if torch.version.hip is None else 1])
    return []
