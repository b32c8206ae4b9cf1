"""What the command lines of `dann_experiments` and `sweeps` share: words in, one message and an exit code out."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from dann_experiments.config import InputError

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "recipes" / "digits.yaml"
SHORT_NAMES = {
    "source_checkpoint": "domain_adaptation.pretrained_checkpoint.path",
    "gamma": "domain_adaptation.method.lambda_schedule.gamma",
    "hidden_size": "domain_adaptation.method.hidden_size",
    "discriminator_lr": "domain_adaptation.method.discriminator_lr",
    "feature_layer": "domain_adaptation.method.feature_layer",
    "max_epochs": "trainer.max_epochs",
    "seed": "seed",
}
EMPTY = ("", "None")  # how MLflow spells an optional parameter that was left out


@dataclass(frozen=True)
class Request:
    """A command line, taken apart. Parameters that `mlflow run` left empty are dropped already."""

    command: str
    options: Mapping[str, Any]
    """The command's own options that have a value, such as `config`; a list for one that takes several words."""
    settings: Mapping[str, str]
    """Every other `--key value`, by the key as written: short names, and dotted names of settings."""

    def overrides(self, but: Sequence[str] = ()) -> dict[str, Any]:
        """Return dotted name -> text for `load_config`: short names spelled out, `but` left out."""
        named = self.settings.items()
        short: dict[str, Any] = {long_name(key, self.command): value for key, value in named if key in SHORT_NAMES}
        if SHORT_NAMES["feature_layer"] in short:  # the short name moves the tap, captured layers included
            short["domain_adaptation.feature_layers"] = None
        return short | {key: value for key, value in named if key not in (*SHORT_NAMES, *but)}


@dataclass(frozen=True)
class Command:
    """A command of a program."""

    run: Callable[[Request], int]
    """Returns the exit code."""
    purpose: str
    usage: str = "[--config FILE] [--SHORT VALUE ...] [--DOTTED.KEY VALUE ...]"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Its own options: name -> keywords of `ArgumentParser.add_argument`."""
    settings: Mapping[str, type] = field(default_factory=dict)
    """Heading -> settings that the help lists under it."""
    short_names: bool = True
    """Whether the help lists the short names of settings."""


@dataclass(frozen=True)
class Program:
    """A program of several commands."""

    name: str
    description: str
    commands: Mapping[str, Command]
    failures: Mapping[type[Exception], str]
    """Errors that end a command with exit code 1, and what is printed before their message."""
    interrupted: str | None = None
    """Printed after Ctrl-C."""

    def main(self, words: Sequence[str] | None = None) -> int:
        """Run one command. Return 0 if it is done, 1 if what it ran failed, 2 for something that the user can mend (each
        with one message), 130 after Ctrl-C."""
        try:
            request = self.parse(sys.argv[1:] if words is None else words)
            if request.command == "":
                print(self._parser().format_help(), end="")
                return 2
            if "help" in request.options:
                print(self.help(request.command))
                return 0
            warn_of_stored_secrets({**request.options, **request.settings})
            return self.commands[request.command].run(request)
        except InputError as error:
            return report_input(error)
        except KeyboardInterrupt:
            if self.interrupted is not None:
                print(self.interrupted, file=sys.stderr)
            return 130
        except Exception as error:
            for kind, heading in self.failures.items():
                if isinstance(error, kind):
                    print(f"{heading}: {error}", file=sys.stderr)
                    return 1
            return report_failure(error)

    def parse(self, words: Sequence[str]) -> Request:
        """Take a command line apart. The command is empty if there is none; with `--help` nothing else is looked at. Raises
        InputError for words that make no sense."""
        known, rest = self._parser().parse_known_args(list(words))
        given = {name: value for name, value in vars(known).items() if value not in (None, False)}
        command = given.pop("command", "")
        if not command or "help" in given:
            return Request(command, given, {})
        settings = dotted(rest)
        options = {name: _words(name, value) if isinstance(value, list) else value for name, value in given.items()}
        return Request(
            command,
            {name: value for name, value in options.items() if value not in (*EMPTY, [])},
            {key: value for key, value in settings.items() if "." in key or value not in EMPTY},
        )

    def help(self, command: str) -> str:
        """Return the help of a command: its options, short names and all its settings."""
        from dann_experiments.config.description import help_text

        about = self.commands[command]
        parts = [self._parsers()[1][command].format_help()]
        if about.short_names:
            short = [
                f"  --{name:<20}  short for --{long_name(name, command)}"
                for name, key in SHORT_NAMES.items()
                if name != key
            ]
            parts.append("\n".join(["short names of settings:", *short, ""]))
        parts += [f"{heading}:\n\n{help_text(kind)}" for heading, kind in about.settings.items()]
        return "\n".join(parts)

    def _parser(self) -> _Parser:
        return self._parsers()[0]

    def _parsers(self) -> tuple[_Parser, Mapping[str, _Parser]]:
        """The parser of the program, and that of each command."""
        parser = _Parser(
            prog=f"python -m {self.name}",
            description=self.description,
            epilog="COMMAND --help lists every setting. Give one as --dotted.key value, for example --trainer.max_epochs 5.",
            allow_abbrev=False,
        )
        adding = parser.add_subparsers(dest="command", metavar="COMMAND")
        parsers = {}
        for name, command in self.commands.items():
            parsers[name] = adding.add_parser(
                name, help=command.purpose, description=command.purpose[0].upper() + command.purpose[1:] + ".",
                add_help=False, allow_abbrev=False, usage=f"python -m {self.name} {name} {command.usage}",
            )  # fmt: skip
            parsers[name].add_argument("-h", "--help", action="store_true", help="show this help and every setting")
            for option, keywords in command.options.items():
                parsers[name].add_argument(f"--{option}", **keywords)
        return parser, parsers


class _Parser(argparse.ArgumentParser):
    """Raises InputError, so that a wrong command is reported like any other wrong input."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message} (--help lists what there is).")


def long_name(short: str, command: str) -> str:
    """Return the dotted name of a short one; in `pretrain`, `max_epochs` are those of pretraining."""
    return "pretraining.max_epochs" if (short, command) == ("max_epochs", "pretrain") else SHORT_NAMES[short]


def dotted(words: Sequence[str]) -> dict[str, str]:
    """Return `--key value` and `--key=value` as a mapping. Raises InputError for anything else."""
    overrides: dict[str, str] = {}
    tokens = list(words)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise InputError(f"unexpected argument {token!r}; give settings as --dotted.key value.")
        key, equals, value = token[2:].partition("=")
        if not key:
            raise InputError(f"{token!r} names no setting; give settings as --dotted.key value.")
        if not equals:
            if not tokens:
                raise InputError(f"--{key} has no value; give --{key} VALUE (--help lists all settings).")
            value = tokens.pop(0)
        overrides[key] = value
    return overrides


def _words(option: str, given: Sequence[Any]) -> list[str]:
    """Return the words of an option that takes several and may be repeated, without empty ones."""
    if not given or [] in given:
        raise InputError(f"--{option} has no value; give it one or several, or leave it out.")
    return [word for part in given for word in ([part] if isinstance(part, str) else part) if word not in EMPTY]


class _WithoutSecrets(logging.Formatter):
    """Leaves passwords out of every message, also those of libraries."""

    def format(self, record: logging.LogRecord) -> str:
        from dann_experiments.tracking.store import without_secrets

        return without_secrets(super().format(record))


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print Python's own traceback, without passwords."""
    from dann_experiments.tracking.store import without_secrets

    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def report_input(error: InputError) -> int:
    """Print an error that the user can mend, without passwords; return the exit code."""
    from dann_experiments.tracking.store import without_secrets

    print(f"Error: {without_secrets(str(error))}", file=sys.stderr)
    return 2


def report_failure(error: Exception) -> int:
    """Print the answer of a disk or of the tracking store; return the exit code. Any other error is raised again."""
    from dann_experiments.tracking.failures import explained

    found = explained(error)
    if found is None:
        raise error
    print(f"Error: {found}", file=sys.stderr)
    return 2


def warn_of_stored_secrets(given: Mapping[str, Any]) -> None:
    """Warn if a parameter of `mlflow run` holds a password: MLflow has stored it with the run before this program starts."""
    from dann_experiments.tracking.store import without_secrets

    for key, value in given.items():
        if "MLFLOW_RUN_ID" in os.environ and without_secrets(str(value)) != str(value):
            print(
                f"Warning: `mlflow run` has stored the parameter `{key}`, password included, with its run; keep passwords in "
                "~/.pgpass, PGPASSWORD or MLFLOW_TRACKING_PASSWORD, and change this one.",
                file=sys.stderr,
            )


def quiet_libraries() -> None:
    """Show our own messages in full, those of libraries only from warnings on, and passwords in none."""
    from rich.logging import RichHandler

    sys.excepthook = _print_error
    handler = RichHandler(show_path=False, show_time=False, markup=False)
    handler.setFormatter(_WithoutSecrets("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("dann_experiments", "sweeps"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning's own, which no user can change
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
