"""The command line: `python -m sweeps {run,resume,status,report,confirm}`.

Flags without dots are settings of the sweep (`--n_trials 20`) or short names of settings of `adapt` (`--max_epochs 5`);
any other setting of `adapt` is given by its dotted name (`--optimizer.lr 1e-3`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dann_experiments.command_line import (
    DEFAULT_CONFIG,
    NOT_GIVEN,
    SHORT_NAMES,
    Parser,
    dotted,
    quiet_libraries,
    tell_of_failure,
    tell_of_input,
    ui_command,
    warn_of_stored_secrets,
)
from dann_experiments.config import InputError, load_config
from dann_experiments.config.parsing import help_text, known_keys, load_settings
from dann_experiments.config.places import local_path
from dann_experiments.data import early
from dann_experiments.workers.processes import prepare_workers
from sweeps.errors import SweepFailed
from sweeps.settings import SweepConfig

if TYPE_CHECKING:
    from sweeps.driver import SweepResult

WORKER = "sweeps.worker"  # what workers run; it is imported for all of them while the driver imports
DEFAULT_SPACE = Path(__file__).with_name("dann.yaml")
COMMANDS = {
    "run": "search: a new study, or the missing trials of one that exists",
    "resume": "run the missing trials of a study, by what is stored with it",
    "status": "how far a study is",
    "report": "write the report of a study again",
    "confirm": "run the best trials again over new seeds; the best mean wins and is registered",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 = done, 1 = the sweep failed, 2 = something the user can mend, told in one message."""
    parser = _argument_parser()
    try:
        known, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
        if known.command is None:
            parser.print_help()
            return 2
        if known.help:
            print(_command_help(parser, known.command))
            return 0
        given = {key: value for key, value in dotted(rest).items() if value not in NOT_GIVEN}
        sweep_flags = {key: value for key, value in given.items() if key in known_keys(SweepConfig)}
        settings = {SHORT_NAMES.get(key, key): value for key, value in given.items() if key not in sweep_flags}
        _refuse_unknown_flags(settings)
        quiet_libraries()
        if known.command == "run":
            return _run(known, sweep_flags, settings)
        return _of_a_study(known.command, sweep_flags, settings)
    except InputError as error:
        return tell_of_input(error)
    except SweepFailed as error:
        print(f"The sweep was stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; `python -m sweeps resume --study NAME` runs what is missing.", file=sys.stderr)
        return 130
    except Exception as error:
        return tell_of_failure(error)


def _run(known: argparse.Namespace, sweep_flags: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    space = DEFAULT_SPACE if known.space in (None, *NOT_GIVEN) else local_path(known.space, "--space")
    config_file = DEFAULT_CONFIG if known.config in (None, *NOT_GIVEN) else local_path(known.config, "--config")
    if not os.path.exists(space):
        raise InputError(f"space file {space} does not exist; sweeps/ holds some to start from.")
    config = load_config(config_file, settings)
    defaults = {} if _names_a_study(space, sweep_flags) else {"study": f"{space.stem}-{config_file.stem}"}
    sweep = load_settings(SweepConfig, space, {**defaults, **sweep_flags})
    warn_of_stored_secrets({**settings, **sweep_flags})
    if sweep.launcher == "processes":
        prepare_workers(WORKER)
    early.begin(config)
    from sweeps.driver import run_sweep

    return _finish(run_sweep(sweep, config))


def _of_a_study(command: str, sweep_flags: dict[str, Any], settings: Mapping[str, Any]) -> int:
    name = sweep_flags.pop("study", None)
    if name is None:
        raise InputError(f"{command} needs --study NAME; `ls studies` shows those with a journal file.")
    unfit = [key for key in settings if not key.startswith("tracking.")]
    if unfit:
        raise InputError(f"--{unfit[0]} cannot be given to {command}: a study keeps the settings it was made with.")
    if command in ("resume", "confirm"):
        prepare_workers(WORKER)
    from sweeps import show
    from sweeps.driver import resume_sweep

    storage = sweep_flags.pop("storage", None)
    if command == "resume":
        if "space" in sweep_flags:
            sweep_flags["space"] = load_settings(SweepConfig, Path(sweep_flags["space"]), {}).space
        return _finish(resume_sweep(name, storage, sweep_flags, settings))
    if command == "confirm":
        from sweeps.confirm import confirm

        show.confirmation(confirm(name, storage, sweep_flags, settings))
        return 0
    if sweep_flags:
        raise InputError(f"--{next(iter(sweep_flags))} has no effect in {command}; give --study and --storage.")
    if command == "status":
        show.status(name, storage)
    else:
        show.report(name, storage, settings)
    return 0


def _finish(result: SweepResult) -> int:
    from sweeps import show

    show.result(result, ui_command(result.tracking_uri))
    if result.settings.confirm_top:
        from sweeps.confirm import confirm

        allowed = {"allow_class_path": result.settings.allow_class_path}
        place = {"tracking.uri": result.tracking_uri, "tracking.experiment": result.experiment}
        show.confirmation(confirm(result.study, result.settings.storage, allowed, place))
    return 0


def _names_a_study(space: Path, sweep_flags: Mapping[str, Any]) -> bool:
    return "study" in sweep_flags or load_settings(SweepConfig, space, {}).study is not None


def _refuse_unknown_flags(settings: Mapping[str, Any]) -> None:
    import difflib

    for key in settings:
        if "." not in key and key not in known_keys():
            nearest = difflib.get_close_matches(key, [*known_keys(SweepConfig), *SHORT_NAMES], n=1, cutoff=0.0)[0]
            raise InputError(f"unknown flag --{key}; did you mean --{nearest}?")


def _argument_parser() -> Parser:
    parser = Parser(
        prog="python -m sweeps",
        description="Search hyperparameters of domain adaptation with Optuna, every trial a run in MLflow.",
        epilog="COMMAND --help lists every setting.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        usage = "--study NAME [--storage ADDRESS] [--SETTING VALUE ...]"
        if name == "run":
            usage = "[--space FILE] [--config FILE] [--SETTING VALUE ...] [--DOTTED.KEY VALUE ...]"
        command = commands.add_parser(
            name, help=purpose, description=purpose.capitalize() + ".", add_help=False, allow_abbrev=False,
            usage=f"python -m sweeps {name} {usage}",
        )  # fmt: skip
        command.add_argument("-h", "--help", action="store_true", help="show this and every setting")
        if name == "run":
            command.add_argument("--space", metavar="FILE", help="YAML file of the search (default: sweeps/dann.yaml)")
            command.add_argument("--config", metavar="FILE", help="settings of adapt (default: recipes/digits.yaml)")
    return parser


def _command_help(parser: argparse.ArgumentParser, command: str) -> str:
    action = next(item for item in parser._actions if isinstance(item, argparse._SubParsersAction))
    text = action.choices[command].format_help()
    if command == "run":
        short = "\n".join(f"  --{name:<18} short for --{key}" for name, key in SHORT_NAMES.items())
        text += f"\nSettings of adapt by short names (`python -m dann_experiments adapt --help` has all):\n{short}\n"
    if command not in ("status", "report"):
        text += f"\nSettings of the sweep (in the space's YAML file, or as flags):\n{help_text(SweepConfig)}"
    return text


if __name__ == "__main__":
    sys.exit(main())
