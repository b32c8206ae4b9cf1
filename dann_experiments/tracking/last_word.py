"""Has the last word on a run that was killed under `mlflow run`: a process that outlives its parent by seconds.

`mlflow run` marks a run FAILED when its command ends with another exit code than 0, also where the run has ended as KILLED
already (it means to leave ended runs alone, but compares the name of a status with the numbers of statuses; seen in MLflow 3.17).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from dann_experiments.tracking.processes import launcher, live_process, process_name

WAIT_SECONDS = 60.0
LOOK_SECONDS = 0.2
_TOLD = "DANN_LAST_WORD"  # by the environment: an address with a password must not stand in a command line


def have_last_word(uri: str, run_id: str) -> None:
    """Start the process that makes the run, closed as KILLED, KILLED again after its `mlflow run` has ended."""
    parent = launcher()
    if parent is None:
        return
    told = {"uri": uri, "run_id": run_id, "launcher": process_name(parent)}
    environment = {**os.environ, _TOLD: json.dumps(told), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.Popen(
        [sys.executable, "-m", "dann_experiments.tracking.last_word"], env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _main() -> None:
    told = json.loads(os.environ.pop(_TOLD))
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=told["uri"])
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        is_gone = live_process(told["launcher"]) is None  # asked first: what it wrote is then seen below
        info = client.get_run(told["run_id"]).info
        if info.status == "FAILED":
            client.set_terminated(told["run_id"], "KILLED", info.end_time)
            return
        if is_gone:
            return
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    _main()
