"""What the command lines of `dann_experiments` and `sweeps` have in common."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from dann_experiments.config import InputError
from dann_experiments.config.recipes import with_origin

SHORT_NAMES = {
    "source_checkpoint": "domain_adaptation.pretrained_checkpoint.path",
    "gamma": "domain_adaptation.method.lambda_schedule.gamma",
    "hidden_size": "domain_adaptation.method.hidden_size",
    "discriminator_lr": "domain_adaptation.method.discriminator_lr",
    "feature_layer": "domain_adaptation.method.feature_layer",
    "max_epochs": "trainer.max_epochs",
    "seed": "seed",
}
NOT_GIVEN = ("", "None")  # how MLflow spells an optional parameter that was left out


class Parser(argparse.ArgumentParser):
    """Refuses by InputError, so that a wrong command is told as any other wrong input."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{message} (--help lists what there is).")


def dotted(rest: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as a mapping; raises InputError for anything else."""
    overrides: dict[str, str] = {}
    tokens = list(rest)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise InputError(f"{token!r} stands alone; give settings as --dotted.key value.")
        key, equals, value = token[2:].partition("=")
        if not key:
            raise InputError(f"{token!r} names no setting; give settings as --dotted.key value.")
        if not equals:
            if not tokens:
                raise InputError(f"--{key} has no value; give --{key} VALUE (--help lists all settings).")
            value = tokens.pop(0)
        overrides[key] = value
    return overrides


class _WithoutSecrets(logging.Formatter):
    """Leaves passwords out of whatever message, a library's too."""

    def format(self, record: logging.LogRecord) -> str:
        from dann_experiments.tracking.store import without_secrets

        return without_secrets(super().format(record))


def _tell_of_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own traceback, without passwords."""
    from dann_experiments.tracking.store import without_secrets

    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def tell_of_input(error: InputError) -> int:
    """Print what the user can mend, without passwords, and give the exit code."""
    from dann_experiments.tracking.store import without_secrets

    print(f"Error: {without_secrets(with_origin(str(error)))}", file=sys.stderr)
    return 2


def tell_of_failure(error: Exception) -> int:
    """Print what a disk or the tracking store answered, and give the exit code; any other error is raised again."""
    from dann_experiments.tracking.failures import explained

    found = explained(error)
    if found is None:
        raise error
    print(f"Error: {found}", file=sys.stderr)
    return 2


def leave_clone() -> None:
    """Change from the temporary clone that `mlflow run ADDRESS` fetches into the folder where it was started: nobody looks for
    their settings, data, outputs or `sqlite:///mlflow.db` in that clone.

    A project that `mlflow run` finds in a local folder is no clone: there, paths stay relative to the project.
    """
    here = Path.cwd()
    temporary = Path(tempfile.gettempdir()).resolve() / tempfile.gettempprefix()
    if "MLFLOW_RUN_ID" not in os.environ or not str(here).startswith(str(temporary)) or not Path("MLproject").exists():
        return
    import psutil

    from dann_experiments.tracking.processes import launcher

    parent = launcher()
    with contextlib.suppress(psutil.Error, OSError):
        os.chdir(here if parent is None else parent.cwd())
    if Path.cwd() != here:
        print(f"Relative paths are those of {Path.cwd()}, where `mlflow run` was started.", file=sys.stderr)


def warn_of_stored_secrets(given: Mapping[str, Any]) -> None:
    """`mlflow run` keeps all its parameters with its run before this program starts: say so where one holds a password."""
    from dann_experiments.tracking.store import without_secrets

    for key, value in given.items():
        if "MLFLOW_RUN_ID" in os.environ and without_secrets(str(value)) != str(value):
            print(
                f"Warning: `mlflow run` has stored the parameter `{key}`, password included, with its run; keep passwords in "
                "~/.pgpass, PGPASSWORD or MLFLOW_TRACKING_PASSWORD, and change this one.",
                file=sys.stderr,
            )


def quiet_libraries() -> None:
    """Our own messages in full, the libraries' only where they matter to the user, passwords in none."""
    from rich.logging import RichHandler

    sys.excepthook = _tell_of_error
    handler = RichHandler(show_path=False, show_time=False, markup=False)
    handler.setFormatter(_WithoutSecrets("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("dann_experiments", "sweeps"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning's own, which no user can mend
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


def ui_command(uri: str) -> str:
    """How to open the MLflow UI on a store: its own address if it is a server."""
    from dann_experiments.tracking.store import without_secrets

    uri = without_secrets(uri)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def where_to_look(uri: str) -> str:
    """As `ui_command`, with the way to the runs: MLflow 3.17 begins with its GenAI pages, where there are none."""
    return f"{ui_command(uri)} (there: Model training, at the top left)"
