"""The command line: `dann-sweep {run,resume,status,report,confirm}`.

Flags without dots are settings of the sweep (`--n_trials 20`) or short names of settings of `adapt` (`--max_epochs 5`);
other settings of `adapt` have dotted names (`--optimizer.lr 1e-3`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dann_experiments.command_line import (
    SHORT_NAMES,
    Command,
    Option,
    Program,
    Request,
    quiet_libraries,
)
from dann_experiments.config import InputError
from dann_experiments.config.imports import quick_imports
from dann_experiments.config.nearest import nearest
from dann_experiments.config.parsing import known_keys, load_settings
from dann_experiments.config.recipes import DEFAULT, load_or_default, report_default, settings_file
from dann_experiments.workers.processes import prepare_workers
from sweeps.errors import SweepFailed
from sweeps.settings import SweepConfig, storage_address

if TYPE_CHECKING:
    from sweeps.driver import SweepResult

SPACES = Path(__file__).parent
DEFAULT_SPACE = "dann"
WORKER = (
    "sweeps.worker"  # module that workers run; the fork server imports it once for all, while the driver imports too
)
log = logging.getLogger("sweeps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` defaults to those of the process."""
    return PROGRAM.main(arguments)


def _settings(request: Request) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the settings of the sweep, and those of `adapt` by dotted name."""
    keys = known_keys(SweepConfig)
    for key in request.settings:
        if "." not in key and key not in (*keys, *SHORT_NAMES, *known_keys()):
            near = nearest(key, [*keys, *SHORT_NAMES], least=0.55)
            raise InputError(f"unknown flag --{key}; " + (f"did you mean --{near}?" if near else "--help lists all."))
    return {key: value for key, value in request.settings.items() if key in keys}, request.overrides(but=keys)


def _run(request: Request) -> int:
    sweep_flags, settings = _settings(request)
    quiet_libraries()
    space = settings_file(request.options.get("space", DEFAULT_SPACE), "--space", SPACES)
    config_file = settings_file(request.options["config"], "--config") if "config" in request.options else None
    config = load_or_default(config_file, settings)
    report_default(log.info)
    named = "study" in sweep_flags or load_settings(SweepConfig, space, {}).study is not None
    defaults = {} if named else {"study": f"{space.stem}-{config_file.stem if config_file else DEFAULT}"}
    sweep = load_settings(SweepConfig, space, {**defaults, **sweep_flags})
    with _how_to_go_on(sweep.study, sweep.storage):
        if sweep.launcher == "processes":
            prepare_workers(WORKER)
        with quick_imports():
            from sweeps.driver import run_sweep

        return _finish(run_sweep(sweep, config))


def _study(request: Request) -> tuple[str, str | None, dict[str, Any], dict[str, Any]]:
    """Return name and storage of an existing study, the other settings of the sweep, and `tracking.*` of `adapt`."""
    sweep_flags, settings = _settings(request)
    quiet_libraries()
    name = sweep_flags.pop("study", None)
    if name is None:
        raise InputError(f"{request.command} needs --study NAME; `ls studies` shows those with a journal file.")
    unfit = [key for key in settings if not key.startswith("tracking.")]
    if unfit:
        raise InputError(
            f"--{unfit[0]} cannot be changed by {request.command}: a study keeps the settings it was made with."
        )
    return name, sweep_flags.pop("storage", None), sweep_flags, settings


def _resume(request: Request) -> int:
    name, storage, sweep_flags, settings = _study(request)
    if "space" in sweep_flags:
        space = settings_file(sweep_flags["space"], "--space", SPACES)
        sweep_flags["space"] = load_settings(SweepConfig, space, {}).space
    with _how_to_go_on(name, storage):
        prepare_workers(WORKER)
        with quick_imports():
            from sweeps.driver import resume_sweep

        return _finish(resume_sweep(name, storage, sweep_flags, settings))


@contextlib.contextmanager
def _how_to_go_on(study: str | None, storage: str | None) -> Iterator[None]:
    """Print after Ctrl-C which command runs the trials that are missing."""
    try:
        yield
    except KeyboardInterrupt:
        if storage is None and not Path(storage_address(None, str(study))).exists():
            print("Stopped before the first trial. Repeat the command to start again.", file=sys.stderr)
            raise
        place = " and the same --storage" if storage else ""  # whose address may hold a password
        print(f"Stopped. `{PROGRAM.called} resume --study {study}`{place} runs the missing trials.", file=sys.stderr)
        raise


def _finish(result: SweepResult) -> int:
    from dann_experiments.reports.terminal import ui_command
    from sweeps import show

    show.result(result, ui_command(result.tracking_uri))
    if result.settings.confirm_top:
        from sweeps.confirm import confirm

        allowed = {"allow_class_path": result.settings.allow_class_path}
        place = {"tracking.uri": result.tracking_uri, "tracking.experiment": result.experiment}
        show.confirmation(confirm(result.study, result.settings.storage, allowed, place))
    return 0


def _confirm(request: Request) -> int:
    name, storage, sweep_flags, settings = _study(request)
    try:
        prepare_workers(WORKER)
        with quick_imports():
            from sweeps import show
            from sweeps.confirm import confirm

        show.confirmation(confirm(name, storage, sweep_flags, settings))
    except KeyboardInterrupt:
        print("Stopped. Repeat the command: finished runs are reused.", file=sys.stderr)
        raise
    return 0


def _status(request: Request) -> int:
    name, storage, _ = _of_a_look(request)
    from sweeps import show

    show.status(name, storage)
    return 0


def _report(request: Request) -> int:
    name, storage, settings = _of_a_look(request)
    from sweeps import show

    show.report(name, storage, settings)
    return 0


def _of_a_look(request: Request) -> tuple[str, str | None, Mapping[str, Any]]:
    """Return name, storage and `tracking.*` for a command that only reads a study; refuse settings of the sweep."""
    name, storage, sweep_flags, settings = _study(request)
    if sweep_flags:
        raise InputError(f"--{next(iter(sweep_flags))} has no effect in {request.command}; give --study and --storage.")
    return name, storage, settings


OF_A_STUDY = "--study NAME [--storage ADDRESS] [--SETTING VALUE ...]"
SETTINGS = {"settings of the sweep (in the YAML file of the space, or as --key value)": SweepConfig}
COMMANDS = {
    "run": Command(
        _run,
        "search: a new study, or the missing trials of an existing one",
        usage="[--space FILE] [--config FILE] [--SETTING VALUE ...] [--DOTTED.KEY VALUE ...]",
        options={
            "space": Option("YAML file of the search, or a name: dann (default), wide", "FILE"),
            "config": Option("settings of adapt, or a recipe's name (default: digits)", "FILE"),
        },
        settings=SETTINGS,
    ),
    "resume": Command(
        _resume,
        "run the missing trials of a study, with the settings stored in it",
        usage=OF_A_STUDY,
        settings=SETTINGS,
        short_names=False,
    ),
    "status": Command(_status, "show the progress of a study", usage=OF_A_STUDY, short_names=False),
    "report": Command(_report, "write the report of a study again", usage=OF_A_STUDY, short_names=False),
    "confirm": Command(
        _confirm,
        "run the best trials again over new seeds; the best mean wins and is registered",
        usage=OF_A_STUDY,
        settings=SETTINGS,
        short_names=False,
    ),
}
PROGRAM = Program(
    "sweeps",
    "Search hyperparameters of domain adaptation with Optuna, every trial a run in MLflow.",
    COMMANDS,
    failures={SweepFailed: "The sweep was stopped"},
)
