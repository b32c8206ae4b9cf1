"""Try wrong values for every user input, in process, and write the answers into docs/inputs.md.

python -m benchmarks.inputs --write    # minutes: it imports torch and makes an MLflow store in a temporary folder

A case ends well ("taken") or with exit code 2 and one message; anything else is raised here, and tests/test_inputs.py runs the
same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.pages import DOCS, put
from dann_experiments.cli import PROGRAM as DANN
from dann_experiments.command_line import SCRIPTS, SHORT_NAMES, Command
from dann_experiments.config import Config, InputError, load_config
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.description import type_name
from dann_experiments.config.export import ExportConfig
from dann_experiments.config.limits import settings_of
from dann_experiments.config.parsing import known_keys, load_settings
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.config.suggestions import SuggestLabelsConfig
from dann_experiments.config.weak_labels import WeakLabelsConfig
from sweeps.cli import PROGRAM as SWEEPS
from sweeps.settings import SweepConfig

PROJECT = DOCS.parent
PAGE = "inputs.md"
TAKEN = "taken"
KINDS: Mapping[str, type] = {
    "settings": Config,
    "compare": CompareConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
    "weak-labels": WeakLabelsConfig,
    "suggest-labels": SuggestLabelsConfig,
    "sweep": SweepConfig,
}
NEEDED = {
    PredictConfig: {"model": "m", "input": "i.png", "output": "o.png"},
    ExportConfig: {"model": "m", "output": "o.onnx"},
    SuggestLabelsConfig: {"comparison": "c"},
    WeakLabelsConfig: {"rule": "band", "bands": [1], "input": "i.png", "output": "o.png"},
}
WRONG: Mapping[str, Any] = {
    "null": None, "empty text": "", "a word": "abc", "letters beyond ASCII": "Straße ☃", "10000 letters": "a" * 10_000,
    "a NUL": "a\0b", "bytes that are not UTF-8": "a\udcff", "no such path": "/no/such/path", "0": 0, "-1": -1, "1.5": 1.5,
    "10^18": 10**18, "10^30": 10**30, "NaN": float("nan"), "infinity": float("inf"), "true": True, "[]": [], "[a]": ["a"],
    "[[1]]": [[1]], "{}": {}, "{a: 1}": {"a": 1},
}  # fmt: skip
ENVIRONMENT = {
    "MLFLOW_TRACKING_URI": "the store, where tracking.uri is null; under `mlflow run` the one it uses",
    "MLFLOW_REGISTRY_URI": "MLflow's; read here for the password in it, which no message may show",
    "MLFLOW_RUN_ID": "the run that `mlflow run` made for this process; one that has ended or has a job is left alone",
    "MLFLOW_EXPERIMENT_NAME": "the experiment, where tracking.experiment is null",
    "MLFLOW_EXPERIMENT_ID": "the experiment, where tracking.experiment and MLFLOW_EXPERIMENT_NAME are not given",
    "XDG_CACHE_HOME": "where embedded data (data.embedded.folder null) and what is kept of files are; empty = ~/.cache",
    "CUDA_VISIBLE_DEVICES": "which GPUs there are, for torch and for sharing them among workers; none = the CPU",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "MLflow's, for a server; 5 where you give none",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "MLflow's, for a server; 1 where you give none",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "MLflow's, for a server, in seconds; 30 where you give none",
    "DANN_LAST_WORD": "not for you: the address of the store, told to the process that closes a killed run",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "MLflow's; true, or MLflow would print the store's address with its password",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "MLflow's; false where you give none",
}
"""What our code reads or sets."""
MLFLOWS_OWN = {
    "MLFLOW_TRACKING_USERNAME": "MLflow's login at a server; wrong: the server's refusal",
    "MLFLOW_TRACKING_PASSWORD": "MLflow's login at a server; wrong: the server's refusal",
    "MLFLOW_TRACKING_TOKEN": "MLflow's login at a server; wrong: the server's refusal",
    "HOME": "what ~ means",
    "TMPDIR": "where copies of models lie while they are read; a folder that is not there: the system's own",
    "OMP_NUM_THREADS": "torch's threads where `threads` is null",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One wrong input and how to give it."""

    page: str
    """Which table it stands in."""
    input: str
    """A key, a flag, a file or a variable."""
    wrong: str
    give: Callable[[], str]
    """Gives it; the message, or `TAKEN`. Raises AssertionError for a traceback, another exit code, or more than one message."""


def setting_cases() -> Iterator[Case]:
    """Each key of each kind of settings with each wrong value."""
    for page, cls in KINDS.items():
        for key in known_keys(cls):
            for wrong, value in WRONG.items():
                yield Case(page, key, wrong, lambda cls=cls, key=key, value=value: answer_to(cls, key, value))


def answer_to(cls: type, key: str, value: Any) -> str:
    """The message about a setting's value, or `TAKEN`."""
    given = {**NEEDED.get(cls, {}), key: value}
    try:
        load_config(None, given) if cls is Config else load_settings(cls, None, given)
    except InputError as error:
        return str(error)
    return TAKEN


def answer(program: Callable[[Sequence[str]], int], *words: str) -> str:
    """The message of a command. Nothing but 'Error: ...' and exit code 2 will do."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(words)
    told = err.getvalue()
    assert "Traceback" not in told + out.getvalue(), told
    if code == 0:
        return TAKEN
    assert code == 2, (code, told)
    assert told.startswith("Error: "), told
    assert told.count("Error: ") == 1, told
    return told.removeprefix("Error: ").strip()


def flags_of(command: Command) -> list[str]:
    """Return the flags of a command: its own options and the short names of settings."""
    return [f"--{name}" for name in ("help", *command.options, *(SHORT_NAMES if command.short_names else ()))]


def command_cases() -> Iterator[Case]:
    """Wrong words on the command lines, with every command and every flag."""
    for program in (DANN, SWEEPS):
        run = program.main
        yield Case("commands", program.name, "no such command", lambda run=run: answer(run, "nonsense"))
        for name, command in program.commands.items():
            shown = f"{program.name} {name}"
            for wrong, words in {
                "a word alone": ["stray"], "a flag without a name": ["--=1"], "no such flag": ["--no_such.flag", "1"],
                "a key without value": ["--no_such.flag"], "one dash": ["-x", "1"],
            }.items():  # fmt: skip
                yield Case("commands", shown, wrong, lambda run=run, c=name, w=words: answer(run, c, *w))
            for flag in flags_of(command):
                if flag not in ("--help", "--all"):
                    yield Case(
                        "flags", f"{shown} {flag}", "no value", lambda run=run, c=name, f=flag: answer(run, c, f)
                    )


def files(folder: Path) -> dict[str, Path]:
    """Files that are no good for anything, made in `folder`."""
    found = {
        "no such file": folder / "none", "a folder": folder / "folder", "below a file": folder / "empty" / "x",
        "a name of 5000 letters": Path("a" * 5000), "the home of nobody": Path("~nobody_at_all/x"),
    }  # fmt: skip
    (folder / "folder").mkdir()
    for name, content in {
        "empty": b"", "not UTF-8": b"seed: \xff\xfe", "binary": bytes(range(256)), "a list": b"- 1\n", "a word": b"word\n",
        "no YAML": b"a: [1,\n", "a tab": b"data:\n\troot: x\n", "a key twice": b"seed: 1\nseed: 2\n",
        "an unknown key": b"sed: 1\n", "a Python object": b"seed: !!python/object/apply:os.getpid []\n",
        "a tag that does not fit": b"seed: !!bool perhaps\n", "an unknown tag": b"seed: !mine 3\n",
        "holding itself": b"data: &a {root: *a}\n", "a date": b"seed: 2020-01-01\n",
        "a merge of a list": b"<<: [1, 2]\n", "two documents": b"seed: 1\n---\nseed: 2\n",
    }.items():  # fmt: skip
        found[name] = folder / name.replace(" ", "_")
        found[name].write_bytes(content)
    return found


def file_cases(folder: Path) -> Iterator[Case]:
    """Files of settings: none of them is good for anything but `empty`, which is all defaults."""
    kinds = {
        "config file (--config)": (DANN.main, "config", "--config"),
        "arms file (compare --arms)": (DANN.main, "compare", "--seeds", "0", "--arms"),
        "space file (sweeps run --space)": (SWEEPS.main, "run", "--n_trials", "0", "--space"),
        "config file of predict (--config)": (
            DANN.main, "predict", "--model", "m", "--input", "none.png", "--output", "o.png", "--config",
        ),
    }  # fmt: skip
    for kind, (program, *words) in kinds.items():
        for wrong, path in files_once(folder).items():
            yield Case("files", kind, wrong, lambda p=program, w=words, f=str(path): answer(p, *w, f))


def files_once(folder: Path) -> dict[str, Path]:
    """`files`, made new."""
    target = Path(tempfile.mkdtemp(dir=folder))
    return files(target)


def environment_cases() -> Iterator[Case]:
    """Variables with values that mean nothing; `runs` opens the store and does nothing else."""
    wrong = {
        "MLFLOW_TRACKING_URI": [
            "nonsense",
            "ftp://example.org",
            "http://127.0.0.1:9",
            "sqlite:////no/such/folder/a.db",
        ],
        "MLFLOW_HTTP_REQUEST_TIMEOUT": ["soon"],
        "XDG_CACHE_HOME": ["/dev/null"],
    }
    for name, values in wrong.items():
        words = ("runs",) if name.startswith("MLFLOW") else ("check-data",)
        for value in values:
            yield Case("environment", name, f"`{value}`", lambda n=name, v=value, w=words: with_variable(n, v, *w))


def with_variable(name: str, value: str, *words: str) -> str:
    """`answer` of dann_experiments, with an environment variable."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        return answer(DANN.main, *words)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


# --- the page ---


def cell(text: str) -> str:
    """Text of a Markdown table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str, most: int = 230) -> str:
    """Text as code in a cell."""
    text = re.sub(r"[\x00-\x1f\ud800-\udfff]", "?", text.replace("`", "'"))
    return f"`{cell(text if len(text) <= most else text[:most] + ' ...')}`"


def is_generic(message: str) -> bool:
    """Whether a message is one of those that all keys share."""
    return any(re.search(pattern, message) for pattern in GENERIC.values())


GENERIC = {
    "a value of another kind": r" is .*, but must be ",
    "null where a value must be": r" is null, but needs a value",
    "an integer of more than 63 bits": r" holds an integer of more than 63 bits",
    "a NUL, or bytes that are not UTF-8, in a text": r"; tracking stores keep neither NUL",
}


def generic_table(answers: Mapping[tuple[str, str, str], str]) -> list[str]:
    """What all keys of a type share, with an example."""
    lines = ["| wrong value | message, for example |", "|---|---|"]
    for name, pattern in GENERIC.items():
        found = next(text for text in answers.values() if re.search(pattern, text))
        lines.append(f"| {name} | {code(found)} |")
    return lines


def settings_table(answers: Mapping[tuple[str, str, str], str], page: str, cls: type) -> list[str]:
    """Key, type, what is said beside the generic answers, and which of the wrong values are taken; of the keys asked."""
    lines = ["| key | type | its own answers | taken here |", "|---|---|---|---|"]
    types = {setting.name: type_name(setting.type) for setting in settings_of(cls)}
    for key in dict.fromkeys(key for at, key, _ in answers if at == page):
        own: dict[str, list[str]] = {}
        taken = []
        for wrong in WRONG:
            message = answers[page, key, wrong]
            if message == TAKEN:
                taken.append(wrong)
            elif not is_generic(message):
                own.setdefault(re.sub(r" is [^;,]*(?=[;,])", " is VALUE", message, count=1), []).append(wrong)
        shown = "<br>".join(f"{', '.join(wrongs)}: {code(text)}" for text, wrongs in own.items())
        lines.append(f"| `{key}` | {code(types[key], 400)} | {shown} | {cell(', '.join(taken))} |")
    return lines


def plain_table(answers: Mapping[tuple[str, str, str], str], page: str, heads: str) -> list[str]:
    """Input, what is wrong, message; inputs with the same answer share a line."""
    shared: dict[tuple[str, str], list[str]] = {}
    everything = dict.fromkeys(name for at, name, _ in answers if at == page)
    for (at, name, wrong), message in answers.items():
        if at == page:
            told = message.replace(name.split()[-1], "FLAG") if page == "flags" else message
            shared.setdefault((wrong, told), []).append(name)
    lines = []
    for (wrong, message), names in shared.items():
        told = TAKEN if message == TAKEN else code(message)
        lines.append(f"| {listed(names, list(everything))} | {cell(wrong)} | {told} |")
    return [heads, "|---|---|---|", *sorted(lines, key=lambda line: [part.strip() for part in line.split("|")][2])]


def listed(names: Sequence[str], everything: Sequence[str]) -> str:
    """Names, or those that are not among them if these are fewer."""
    others = [name for name in everything if name not in names]
    few = names if len(names) <= len(others) + 1 else others
    shown = ", ".join(f"`{name}`" for name in few)
    return shown if few is names else f"all but {shown}" if others else "all"


def commands_table() -> list[str]:
    """Every command with its flags and the settings it takes."""
    lines = ["| command | flags | settings |", "|---|---|---|"]
    kinds = {kind: name for name, kind in KINDS.items()}
    for script, program in zip(SCRIPTS, (DANN, SWEEPS), strict=True):
        for name, command in program.commands.items():
            settings = ", ".join(kinds[kind] for kind in command.settings.values()) or "study, storage"
            flags = ", ".join(f"`{flag}`" for flag in flags_of(command))
            lines.append(f"| `{script} {name}` | {flags} | {settings} |")
    return lines


def entry_points_table() -> list[str]:
    """Every entry point with its parameters, and the flag or setting each is."""
    lines = ["| entry point | parameters (-P NAME=VALUE) |", "|---|---|"]
    for name, entry in yaml.safe_load((PROJECT / "MLproject").read_text())["entry_points"].items():
        shown = []
        for parameter in entry["parameters"]:
            key = SHORT_NAMES.get(parameter, parameter)
            shown.append(f"`{parameter}`" + (f" (= `{key}`)" if key != parameter else ""))
        lines.append(f"| `{name}` | {', '.join(shown)} |")
    return lines


def variables_table() -> list[str]:
    """Every environment variable."""
    lines = ["| variable | what it is |", "|---|---|"]
    return lines + [f"| `{name}` | {text} |" for name, text in (ENVIRONMENT | MLFLOWS_OWN).items()]


def tables(answers: Mapping[tuple[str, str, str], str]) -> dict[str, list[str]]:
    """All tables of the page, by their markers."""
    found = {"generic": generic_table(answers)}
    for page, cls in KINDS.items():
        found[page] = settings_table(answers, page, cls)
    heads = "| input | wrong | message |"
    found |= {page: plain_table(answers, page, heads) for page in ("commands", "flags", "files", "environment")}
    return found | {
        "all commands": commands_table(), "entry points": entry_points_table(), "variables": variables_table(),
    }  # fmt: skip


def main() -> None:
    """Ask everything, print, and write into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        cases = [*setting_cases(), *command_cases(), *file_cases(Path(folder)), *environment_cases()]
        answers = {}
        for case in cases:
            message = re.sub(rf"{re.escape(folder)}/\w+/?", "", case.give())
            answers[case.page, case.input, case.wrong] = message.replace(str(PROJECT), ".")
    for name, lines in tables(answers).items():
        print(f"\n{name}\n" + "\n".join(lines))
        if known.write:
            put(PAGE, name, "\n".join(lines))
    print(f"\n{len(cases)} cases, each taken or refused with one message and exit code 2.", file=sys.stderr)


if __name__ == "__main__":
    main()
