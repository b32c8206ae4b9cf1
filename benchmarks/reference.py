"""Write the pages of docs/ that are made from the code: commands, metrics, tags and files of a run.

python -m benchmarks.reference    # seconds

`benchmarks.settings` writes the page of settings. The page of the Python API is made when the site is built.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator, Mapping

import dann_experiments
import sweeps
from benchmarks.pages import DOCS
from benchmarks.settings import CHAPTERS
from dann_experiments import cli, names
from dann_experiments.command_line import SHORT_NAMES, Command, Program, long_name
from dann_experiments.config import Config
from sweeps.__main__ import PROGRAM as SWEEPS

GENERATED = "This page is generated from the code by `python -m benchmarks.reference`."
METRICS_HEAD = f"""# Metrics of a run
{GENERATED}

The x axis is the number of optimizer steps done. `loss/train_*`, `da/*`, `da_part/*` and `lr/*` are logged each step, the rest each epoch;
step 0 is the model before adaptation. `loss/train_total` is `loss/train_seg` + lambda times `loss/train_da`. SET is `source_val`,
`target_val`, `source_test` or `target_test`, with `.NAME` behind it if there are [several domains](several-domains.md); CLASS is one of
`data.class_names`. [Reading a run](reading-a-run.md) says what to look at first.
"""
TAGS_HEAD = f"""# Tags of a run
{GENERATED}

Search runs by them in MLflow: `` tags.`dann.job` = 'adapt' ``. A tag that does not apply to a run is missing. The seed is the tag `seed`.
"""
COMMANDS_HEAD = f"""# Commands
{GENERATED} `COMMAND --help` shows the same and every setting.

`dann` is short for `python -m dann_experiments`, `dann-sweep` for `python -m sweeps`. Each setting can be given as
`--dotted.key value` ([all settings](settings.md)); words in capitals stand for values of yours. A command ends with exit code 0 if all went well,
1 if the job failed, 2 if there is something for you to correct (one message says what), 130 after Ctrl-C.
"""
FILES_HEAD = f"""# Files of a run
{GENERATED}

The artifacts of a run, as its page in MLflow shows them under *Artifacts*. With a local store they are in `mlruns/EXPERIMENT/RUN_ID/artifacts/`;
a model is in `mlruns/EXPERIMENT/models/MODEL_ID/artifacts/` ([models.md](models.md)). Words in capitals vary.
"""
FILES: Mapping[str, Mapping[str, str]] = {}
"""Job -> pattern of a file -> its meaning."""
OTHER_FILES: Mapping[str, str] = {}
"""Places outside of the run's artifacts -> their meaning."""


def pages() -> dict[str, str]:
    """Return the text of each generated page by its name in docs/."""
    return {
        "commands.md": commands_page(),
        "metrics.md": metrics_page(),
        "tags.md": tags_page(),
        "files.md": files_page(),
    }


def metrics_page() -> str:
    """Return the table of metrics."""
    return f"{METRICS_HEAD}\n{names.metric_table().replace('](docs/', '](')}\n"


def tags_page() -> str:
    """Return the table of tags."""
    return "\n".join([TAGS_HEAD, *_table(("tag", "meaning"), [(f"`{tag}`", text) for tag, text in tag_meanings()]), ""])


def tag_meanings() -> Iterator[tuple[str, str]]:
    """Yield each tag with its meaning: the comment behind it. Raises ValueError if a tag has none."""
    source = inspect.getsource(names.Tag)
    lines = source.splitlines()
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            _, found, meaning = lines[node.lineno - 1].partition("  # ")
            if not found:
                raise ValueError(f"names.Tag: {node.value.value} has no comment that says what it means")
            yield str(node.value.value), meaning


def commands_page() -> str:
    """Return the commands of both programs with their options."""
    lines = [COMMANDS_HEAD]
    for called, module, program in (("dann", "dann_experiments", cli.PROGRAM), ("dann-sweep", "sweeps", SWEEPS)):
        lines += [f"## {called}", "", f"{program.purpose} Or: `python -m {module}`.", ""]
        for name, command in program.commands.items():
            lines += _command(called, name, command, program)
    return "\n".join(lines)


def _command(called: str, name: str, command: Command, program: Program) -> Iterator[str]:
    yield from (f"### {called} {name}", "", f"{command.purpose[0].upper()}{command.purpose[1:]}.", "")
    yield from ("```text", f"{called} {name} {command.usage}", "```", "")
    options = [(f"`--{key} {one.metavar}`".replace(" `", "`"), one.help) for key, one in command.options.items()]
    if command.short_names:
        short = [one for one in SHORT_NAMES if one != "seed"]
        options += [(f"`--{one}`", f"short for `--{long_name(one, name)}`") for one in short]
    if options:
        yield from (*_table(("option", "meaning"), options), "")
    titles = [title for kind in command.settings.values() for title, (cls, _) in CHAPTERS.items() if cls is kind]
    if Config in command.settings.values():
        titles = [title for title in titles if CHAPTERS[title][0] is not Config]
        titles = [*titles, "of a run"]
    if titles:
        yield from (f"Settings: {', '.join(map(_link, titles))}.", "")


def _link(title: str) -> str:
    """Return a link to a chapter of the page of settings."""
    if title == "of a run":
        return "[of a run](settings.md)"
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    return f"[{title}](settings.md#{anchor})"


def files_page() -> str:
    """Return the files of each job's runs."""
    lines = [FILES_HEAD]
    for job, files in FILES.items():
        lines += [f"## {job}", "", *_table(("file", "holds"), [(f"`{file}`", text) for file, text in files.items()]), ""]
    lines += ["## Outside of the run", ""]
    return "\n".join([*lines, *_table(("path", "holds"), [(f"`{at}`", text) for at, text in OTHER_FILES.items()]), ""])


def api_page() -> str:
    """Return the page of the Python API for mkdocstrings: the public names, in the groups of their modules."""
    lines = [
        "# Python API", "",
        "The names that `dann_experiments` and `sweeps` export, from their docstrings. A notebook needs few of them: "
        "`load_config`, one of the jobs, and what it returns ([a first run](../notebooks/01_first_run.ipynb)).", "",
    ]  # fmt: skip
    for package in (dann_experiments, sweeps):
        lines += [f"## {package.__name__}", ""]
        lines += [f"::: {package.__name__}.{name}\n" for name in sorted(package.__all__, key=_functions_first)]
    return "\n".join(lines)


def _functions_first(name: str) -> tuple[bool, str]:
    return name[0].isupper(), name


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def main() -> None:
    """Write all pages."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, text in pages().items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
