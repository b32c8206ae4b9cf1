"""A plugin of pytest: counts the commands that tests of drawn inputs give and how they end, and what malicious files could run.

The counts are written as JSON into the file that the environment variable CHAOS_COUNTS names. CHAOS_SHARE, such as 1/3, is the
part of the damaged files and of the drawn examples that is tried.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import dann_experiments.__main__ as command_line
import dann_experiments.checkpoints.weights as weights
import dann_experiments.config as config
import dann_experiments.jobs.load_model as load_model

MARKS = ("executed", "pwned")
"""Names of the file that a malicious sample leaves once it runs."""
counts: Counter[str] = Counter()
_reading = 0


class _Both(io.StringIO):
    """Keeps what is written, and passes it on."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self._other = other

    def write(self, text: str) -> int:
        self._other.write(text)
        return super().write(text)


def counted(main: Callable[..., int]) -> Callable[..., int]:
    """A command line that counts what it is given and how it ends."""

    @functools.wraps(main)
    def counting(arguments: Any = None) -> int:
        out, err = _Both(sys.stdout), _Both(sys.stderr)
        words = list(arguments or [])
        kind = "data" if words[:1] != ["config"] else "settings" if words[1:2] == ["--config"] else "command lines"
        counts[f"given: {kind}"] += 1
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), reading():
                code = main(arguments)
        except BaseException:
            counts["ended: with a traceback"] += 1
            raise
        told = [line for line in err.getvalue().splitlines() if line.startswith("Error: ")]
        if "Traceback" in out.getvalue() + err.getvalue():
            end = "with a traceback"
        elif (code, len(told)) in ((0, 0), (2, 1)):
            end = "taken" if code == 0 else "refused with one message"
        else:
            end = "otherwise"
        counts[f"ended: {end}"] += 1
        return code

    return counting


def watched(reader: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A reader of files that counts what it reads for the tests of malicious files."""

    @functools.wraps(reader)
    def reads(*arguments: Any, **more: Any) -> Any:
        if not _reading and arguments and arguments[0] is not None:
            counts[f"samples: {name}"] += 1
        with reading():
            return reader(*arguments, **more)

    return reads


@contextlib.contextmanager
def reading():
    """What runs in this block was started by what is read."""
    global _reading
    _reading += 1
    try:
        yield
    finally:
        _reading -= 1


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells of each file that is opened and each program that is started: whether a sample did it."""
    if event == "open":
        does = str(arguments[0]).endswith(MARKS) and str(arguments[1] or "r") != "r"
    elif event in ("os.system", "subprocess.Popen", "os.posix_spawn"):
        does = any(mark in str(arguments) for mark in MARKS)
    else:
        return
    if does:
        counts["executed"] += bool(_reading)
        counts["executed on purpose"] += not _reading


def pytest_configure() -> None:
    """Stand before what the tests call, before they import it."""
    command_line.main = counted(command_line.main)
    config.load_config = watched(config.load_config, "settings")
    weights.read_weights = watched(weights.read_weights, "checkpoints")
    load_model.load_model = watched(load_model.load_model, "models in runs, registry and folders")
    sys.addaudithook(hear)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep CHAOS_SHARE of the damaged files, evenly; the slow tests draw fewer examples instead."""
    share = Fraction(os.environ["CHAOS_SHARE"])
    cases = [item for item in items if item.get_closest_marker("slow") is None]
    left_out = {case for number, case in enumerate(cases) if int((number + 1) * share) == int(number * share)}
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the tests, failed ones apart."""
    if report.failed or (report.when == "call" and report.passed):
        counts["tests failed" if report.failed else "tests passed"] += 1


def pytest_sessionfinish() -> None:
    """Write the counts."""
    Path(os.environ["CHAOS_COUNTS"]).write_text(json.dumps(counts))
