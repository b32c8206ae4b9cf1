"""The shared parts of the command lines of `dann_experiments` and `sweeps`: parsing, help, messages and exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dann_experiments.config import InputError
from dann_experiments.config.nearest import meant
from dann_experiments.config.recipes import forget_default, with_origin
from dann_experiments.environment import explain_missing
from dann_experiments.names import Key

SHORT_NAMES = {
    "source_checkpoint": Key.SOURCE_MODEL,
    "gamma": "domain_adaptation.method.lambda_schedule.gamma",
    "hidden_size": "domain_adaptation.method.hidden_size",
    "discriminator_lr": "domain_adaptation.method.discriminator_lr",
    "feature_layer": Key.FEATURE_LAYER,
    "max_epochs": "trainer.max_epochs",
    "seed": "seed",
}
SHELLS = ("bash", "sh", "dash", "zsh")  # `mlflow run` starts its command with one of these
SCRIPTS = ("dann", "dann-sweep")  # as pyproject.toml names them
EMPTY = ("", "None")  # values that MLflow passes for optional parameters that are not set
HELP = ("-h", "--help")


@dataclass(frozen=True)
class Request:
    """A parsed command line, without parameters that `mlflow run` left empty."""

    command: str
    options: Mapping[str, Any]
    """Option -> value for options of the command, such as `config`; a list if an option takes several values."""
    settings: Mapping[str, str]
    """Key -> value for every other `--key value`, with short or dotted names as written."""

    def overrides(self, but: Sequence[str] = ()) -> dict[str, Any]:
        """Return dotted name -> text for `load_config`, with short names resolved and without the keys in `but`."""
        named = self.settings.items()
        short: dict[str, Any] = {long_name(key, self.command): value for key, value in named if key in SHORT_NAMES}
        if SHORT_NAMES["feature_layer"] in short:  # the short name also resets the captured layers
            short[Key.FEATURE_LAYERS] = None
        return short | {key: value for key, value in named if key not in (*SHORT_NAMES, *but)}


@dataclass(frozen=True)
class Option:
    """An option of a command that is not a setting."""

    help: str
    metavar: str = ""
    """Name of its value in the help; empty if it takes no value."""
    many: bool = False
    """True if it takes several values and may be repeated."""

    def take(self, tokens: list[str]) -> list[str]:
        """Remove its values from the start of `tokens`, the words after the option, and return them."""
        taken: list[str] = []
        while (
            self.metavar
            and tokens
            and not tokens[0].startswith("-" if self.many else "--")
            and (self.many or not taken)
        ):
            taken.append(tokens.pop(0))
        return taken


@dataclass(frozen=True)
class Command:
    """A command of a program."""

    run: Callable[[Request], int]
    """Returns the exit code."""
    purpose: str
    usage: str = "[--config FILE] [--SHORT VALUE ...] [--DOTTED.KEY VALUE ...]"
    options: Mapping[str, Option] = field(default_factory=dict)
    settings: Mapping[str, type] = field(default_factory=dict)
    """Heading in the help -> class of settings listed under it."""
    short_names: bool = True
    """True if the help lists the short names of settings."""


@dataclass(frozen=True)
class Program:
    """A program with several commands."""

    name: str
    purpose: str
    commands: Mapping[str, Command]
    failures: Mapping[type[Exception], str]
    """Errors that end a command with exit code 1 -> text before their message."""

    @property
    def called(self) -> str:
        """The command that started the program: a console script, or `python -m` and the module."""
        script = Path(sys.argv[0]).name
        return script if script in SCRIPTS else f"python -m {self.name}"

    def main(self, words: Sequence[str] | None = None) -> int:
        """Run one command and return its exit code.

        0: success; 1: the job failed; 2: an error that the user can correct (both with one message); 130: Ctrl-C.
        """
        forget_default()
        leave_clone()
        words = sys.argv[1:] if words is None else words
        try:
            if not words or words[0] in HELP:
                print(self.help(), end="")
                return 0 if words else 2
            if set(words) & set(HELP):
                print(self.help_of(words[0]), end="")
                return 0
            request = self.parse(words)
            warn_of_stored_secrets({**request.options, **request.settings})
            return self.commands[request.command].run(request)
        except InputError as error:
            return report_input(error)
        except KeyboardInterrupt:
            return 130
        except ModuleNotFoundError as error:
            return explain_missing(error)
        except Exception as error:
            for kind, heading in self.failures.items():
                if isinstance(error, kind):
                    print(f"{heading}: {error}", file=sys.stderr)
                    return 1
            return report_failure(error)

    def parse(self, words: Sequence[str]) -> Request:
        """Parse a command line. Raises InputError for unknown commands and unexpected words."""
        options: dict[str, Any] = {}
        settings: dict[str, str] = {}
        known = self._command(words[0]).options
        tokens = list(words[1:])
        while tokens:
            token = tokens.pop(0)
            key, equals, value = token.removeprefix("--").partition("=")
            if not token.startswith("--"):
                raise InputError(f"unexpected argument {token!r}; give settings as --dotted.key value.")
            if not key:
                raise InputError(f"{token!r} names no setting; give settings as --dotted.key value.")
            option = known.get(key, Option("", "VALUE"))
            values = [value] if equals else option.take(tokens)
            if key not in known and not values and self._is_switch(words[0], key):
                values = ["true"]
            if values and not option.metavar:
                raise InputError(f"--{key} takes no value; leave {value!r} out.")
            if option.metavar and not values:
                raise InputError(f"--{key} has no value; give --{key} {option.metavar} (--help lists all options).")
            if key in known:
                kept = [value for value in values if value not in EMPTY]
                options[key] = [*options.get(key, []), *kept] if option.many else kept[0] if kept else not values
            elif "." in key or values[0] not in EMPTY:
                settings[key] = values[0]
        return Request(words[0], {key: value for key, value in options.items() if value}, settings)

    def help(self) -> str:
        """Return the help of the program, which lists its commands."""
        lines = [f"usage: {self.called} COMMAND ...", "", self.purpose, "", "commands:"]
        lines += _listed({name: command.purpose for name, command in self.commands.items()})
        about = [
            "COMMAND --help lists every setting.",
            "Give one as --dotted.key value, for example --trainer.max_epochs 5.",
        ]
        return "\n".join([*lines, "", *about, ""])

    def help_of(self, name: str) -> str:
        """Return the help of a command: its options, short names and all its settings."""
        from dann_experiments.config.description import help_text

        command = self._command(name)
        options = {f"--{key} {option.metavar}".rstrip(): option.help for key, option in command.options.items()}
        lines = [f"usage: {self.called} {name} {command.usage}", ""]
        lines += [f"{command.purpose[0].upper()}{command.purpose[1:]}.", "", "options:"]
        lines += _listed({**options, "--help": "show this help and every setting"})
        if command.short_names:
            short = {f"--{short}": f"--{long_name(short, name)}" for short in SHORT_NAMES if short != "seed"}
            lines += ["", "short names of settings:", *_listed(short)]
        for heading, kind in command.settings.items():
            lines += ["", f"{heading}:", "", help_text(kind)]
        return "\n".join([*lines, ""])

    def _is_switch(self, command: str, key: str) -> bool:
        """Return whether a setting is true or false, so that its flag alone means true."""
        from dann_experiments.config import Config
        from dann_experiments.config.limits import settings_of

        kinds = (*self.commands[command].settings.values(), Config)
        return any(
            field.name == key and field.type in (bool, bool | None) for kind in kinds for field in settings_of(kind)
        )

    def _command(self, name: str) -> Command:
        if name not in self.commands:
            near = meant(name, self.commands) or ";"
            raise InputError(f"unknown command {name!r}{near} give one of {', '.join(self.commands)}.")
        return self.commands[name]


def _listed(texts: Mapping[str, str]) -> list[str]:
    """Return the lines of a list of names and their meaning."""
    indent = max(map(len, texts)) + 4
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    return [
        line
        for name, text in texts.items()
        for line in textwrap.wrap(text, width, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
    ]


def long_name(short: str, command: str) -> str:
    """Return the dotted name for a short one; in `pretrain`, `max_epochs` means the epochs of pretraining."""
    return "pretraining.max_epochs" if (short, command) == ("max_epochs", "pretrain") else SHORT_NAMES[short]


class _WithoutSecrets(logging.Formatter):
    """Removes passwords from every message, including those of libraries."""

    def format(self, record: logging.LogRecord) -> str:
        from dann_experiments.tracking.store import without_secrets

        return without_secrets(super().format(record))


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of Python without passwords."""
    from dann_experiments.tracking.store import without_secrets

    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def report_input(error: InputError) -> int:
    """Print an error that the user can correct, without passwords; return the exit code."""
    from dann_experiments.tracking.store import without_secrets

    print(f"Error: {without_secrets(with_origin(str(error)))}", file=sys.stderr)
    return 2


def report_failure(error: Exception) -> int:
    """Print an error of the disk or the tracking store; return the exit code. Any other error is raised again."""
    from dann_experiments.tracking.failures import explained

    found = explained(error)
    if found is None:
        raise error
    print(f"Error: {found}", file=sys.stderr)
    return 2


def leave_clone() -> None:
    """Change from the temporary clone of `mlflow run ADDRESS` to the folder where it was started.

    Users do not expect settings, data, outputs or `sqlite:///mlflow.db` in that clone. A project in a local folder is no clone:
    there, paths stay relative to the project.
    """
    here = Path.cwd()
    temporary = Path(tempfile.gettempdir()).resolve() / tempfile.gettempprefix()
    if "MLFLOW_RUN_ID" not in os.environ or not str(here).startswith(str(temporary)) or not Path("MLproject").exists():
        return
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        mlflow = next((one for one in psutil.Process().parents() if one.name() not in SHELLS), None)
        os.chdir(here if mlflow is None else mlflow.cwd())
    if Path.cwd() != here:
        print(f"Relative paths are those of {Path.cwd()}, where `mlflow run` was started.", file=sys.stderr)


def warn_of_stored_secrets(given: Mapping[str, Any]) -> None:
    """Warn if a parameter of `mlflow run` contains a password: MLflow has already stored it with the run."""
    from dann_experiments.tracking.store import without_secrets

    for key, value in given.items():
        if "MLFLOW_RUN_ID" in os.environ and without_secrets(str(value)) != str(value):
            print(
                f"Warning: `mlflow run` has stored the parameter `{key}`, password included, with its run; keep passwords in "
                "~/.pgpass, PGPASSWORD or MLFLOW_TRACKING_PASSWORD, and change this one.",
                file=sys.stderr,
            )


def quiet_libraries() -> None:
    """Show all our own messages, only warnings and errors of libraries, and no passwords."""
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
    # a warning of Lightning that users cannot act on
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
