"""Gives drawn and malicious inputs, through the tests that say how each must end, and counts what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
_MANY = "tests/test_fuzz_inputs.py::test_many_more_drawn_inputs_end_as_well"
DRAWN = [
    *(
        f"{_MANY}[test_{name}_taken_or_refused_with_one_message]"
        for name in (
            "a_drawn_settings_file_is",
            "scraps_of_yaml_are",
            "a_drawn_command_line_is",
            "a_drawn_file_in_the_target_spelling_is",
        )
    ),
    *(
        f"tests/test_fuzz_data.py::test_{name}"
        for name in (
            "a_damaged_file_is_refused_by_name",
            "a_file_that_is_something_else_is_refused_by_name",
            "a_damaged_manifest_is_refused_and_what_it_names_is_told",
            "a_harmful_settings_file_is_refused_and_runs_nothing",
        )
    ),
]
MALICIOUS = [
    "tests/test_security.py::test_no_malicious_checkpoint_runs_and_each_is_refused",
    "tests/test_security.py::test_no_malicious_file_runs_as_a_model_of_a_run_a_registry_or_a_folder",
    "tests/test_security.py::test_reading_settings_imports_nothing_that_they_name",
]


def count(folder: Path, name: str, tests: Sequence[str], seed: int, share: Fraction = Fraction(1)) -> Counter[str]:
    """Run a share of the cases of tests in a pytest of their own; return what `counting` counted there."""
    (folder / name).mkdir(parents=True)
    kept = folder / name / "counts.json"
    command = [
        sys.executable, "-m", "pytest", "-p", "benchmarks.chaos.counting", "-p", "no:cacheprovider", "-m", "slow or not slow",
        f"--hypothesis-seed={seed}", f"--basetemp={folder / name / 'pytest'}", *tests,
    ]  # fmt: skip
    environ = {
        **os.environ,
        "CHAOS_COUNTS": str(kept),
        "CHAOS_SHARE": str(share),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / name / "hypothesis"),
    }
    done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    return Counter(json.loads(kept.read_text())) if kept.exists() else Counter({"tests failed": 1})
