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
from dann_experiments.command_line import SHORT_NAMES, Command, long_name
from dann_experiments.config import Config
from dann_experiments.names import Job
from sweeps.cli import PROGRAM as SWEEPS

GENERATED = "This page is generated from the code by `python -m benchmarks.reference`."
METRICS_HEAD = f"""# Metrics of a run
{GENERATED}

The x axis is the number of optimizer steps done; step 0 is the model before adaptation. `loss/train_*`, `da/*`, `da_part/*` and
`lr/*` are logged each step, the rest each epoch. `loss/train_total` is `loss/train_seg` + lambda times `loss/train_da`. SET is
`source_val`, `target_val`, `source_test` or `target_test`; with [several domains](several-domains.md) also `target_val.NAME` and
the like. CLASS is one of `data.class_names`. [Reading a run](reading-a-run.md) says what to look at first.
"""
TAGS_HEAD = f"""# Tags of a run
{GENERATED}

Search runs by them in MLflow: `` tags.`dann.job` = 'adapt' ``. A tag that does not apply to a run is missing.
The seed is the tag `seed`.
"""
COMMANDS_HEAD = f"""# Commands
{GENERATED} The option `--help` of a command shows the same and every setting.

The program `dann` runs the module `dann_experiments`, `dann-sweep` the module `sweeps`. Each [setting](settings.md) can be
given as `--dotted.key value`; words in capitals stand for values of yours. The exit code is 0 if all went well, 1 if the job
failed, 2 if there is something for you to correct (one message says what), 130 after Ctrl-C.
"""
FILES_HEAD = f"""# Files of a run
{GENERATED}

The artifacts of a run, as its page in MLflow shows them under *Artifacts*. With a local store they are in
`mlruns/EXPERIMENT/RUN_ID/artifacts/`; a model is in `mlruns/EXPERIMENT/models/MODEL_ID/artifacts/` ([models.md](models.md)).
Words in capitals vary. A run that failed also has `traceback.txt`.
"""
_SETTINGS = {"config.yaml": "the settings, complete; `--config` reads it"}
_LOGS = {"logs/worker-PID.log": "what a worker process printed"}
_OF_TRAINING = {
    **_SETTINGS,
    "checkpoints/last.ckpt": "weights and optimizer after the last step, to resume ([resume.md](resume.md))",
    "checkpoints/best.ckpt": "weights of the best epoch by `monitor.metric`",
    "figures/curves.png": "IoU of both domains, domain accuracy and lambda over the steps",
    "figures/predictions_DOMAIN.png": "images with truth and prediction, before and after",
    "figures/confusion_SET.png": "confusion matrix of the final weights",
    "tables/class_iou.csv": "IoU of each class and set, before and after",
    "images/...": "pictures that MLflow shows with a slider over the steps ([tracking.md](tracking.md))",
}
_OF_ADAPTATION = {
    **_OF_TRAINING,
    "features.safetensors": "features of both domains before and after, which the probe read; comparisons draw them",
}
FILES: Mapping[str, Mapping[str, str]] = {
    Job.CHECK_DATA: {
        **_SETTINGS,
        "figures/domains.png": "class shares and band values of both domains",
        "tables/counts.csv": "images and pixels of each class, by set",
        "tables/bands.csv": "statistics of each band, by domain",
    },
    Job.PRETRAIN: _OF_TRAINING,
    Job.ADAPT: _OF_ADAPTATION,
    Job.EVALUATE: {
        **_SETTINGS,
        "tables/scores.csv": "IoU, precision, recall, F1 and average precision of each class and set",
        "tables/confusion_SET.csv": "numbers of pixels; rows are the truth",
        "tables/confusion_SET_normalised.csv": "the same as shares of each row",
        "figures/confusion_SET.png": "the shares as a picture",
    },
    Job.PREDICT: {
        **_SETTINGS,
        "figures/preview.png": "image and map, made small",
        "tables/class_shares.csv": "pixels of each class",
        "tables/scenes.csv": "each image, its map, and whether it is mapped; if not, why",
    },
    Job.WEAK_LABELS: {
        **_SETTINGS,
        "figures/masks.png": "images with their index and mask",
        "figures/histogram.png": "values of the index, with the threshold",
        "tables/class_shares.csv": "threshold and pixels of each class, by image",
    },
    Job.COMPARE: {
        **_SETTINGS,
        **_LOGS,
        "report.html": "the whole report in one file",
        "summary.png": "scores of all arms as a picture",
        "verdict.txt": "the verdicts in words",
        "tables/scores.csv": "mean, spread and paired differences of each arm and score",
        "tables/runs.csv": "the runs: arm, seed, id, scores",
        "tables/selection.csv": "how well scores without target labels choose among the epochs",
        "tables/choice.csv": "the arm to trust without target labels (from two seeds on)",
        "tables/parts.csv": "what the adversary and each companion add (with companions)",
        "tables/labels.csv": "scores by number of labeled target images (with `labelled`)",
        "figures/labels.png": "the same as a picture (with `labelled`)",
    },
    Job.SUGGEST_LABELS: {
        "figures/tiles.png": "the suggested tiles with the map of every arm",
        "tables/tiles.csv": "the suggested tiles: image, region, disagreement",
        "tables/choice.csv": "the arm to trust without target labels",
    },
    Job.SWEEP: {
        **_LOGS,
        "report.md": "the report",
        "trials.csv": "every trial with its settings and scores",
        "best_config.yaml": "the settings of the best trial; `--config` reads it",
        "confirm.csv": "the best trials over new seeds (after `confirm`)",
        "journal.log": "the Optuna study (unless it is in a database)",
        "figures/...": "history, importances and settings of the trials as pictures; `study.html` to explore",
    },
    Job.TRIAL: _OF_ADAPTATION,
}
"""Job -> files among the artifacts of its runs -> their meaning. The words in `VARIES` stand for any text."""
VARIES = ("DOMAIN", "SET", "PID", "...")
OTHER_FILES = {
    "mlflow.db": "the tracking store, if no other is set (`tracking.uri`, `MLFLOW_TRACKING_URI`)",
    "outputs/RUN_ID/": "what a run has not sent yet: checkpoints while it trains, metrics while the store is away "
    "(`tracking.folder`); `sync` sends what a killed run left",
    "studies/NAME/": "a sweep's study, report and logs ([sweeps.md](sweeps.md))",
    "the file or folder of `--output`": "maps of `predict`, masks of `weak-labels`, tiles of `suggest-labels`",
}
"""Other places -> what they hold."""


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
    return f"{METRICS_HEAD}\n{names.metric_table()}\n"


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
    for called, program in (("dann", cli.PROGRAM), ("dann-sweep", SWEEPS)):
        lines += [f"## {called}", "", program.purpose, ""]
        for name, command in program.commands.items():
            lines += _command(called, name, command)
    lines += [
        "## Short names",
        "",
        *_table(("option", "short for"), [(f"`--{one}`", f"`--{key}`") for one, key in SHORT_NAMES.items()]),
    ]
    return "\n".join(
        [*lines, "", f"In `pretrain`, `--max_epochs` is short for `--{long_name('max_epochs', 'pretrain')}`.", ""]
    )


def _command(called: str, name: str, command: Command) -> Iterator[str]:
    yield from (f"### {called} {name}", "", f"{command.purpose[0].upper()}{command.purpose[1:]}.", "")
    yield from ("```", f"{called} {name} {command.usage}", "```", "")
    options = [(f"`{f'--{key} {one.metavar}'.rstrip()}`", one.help) for key, one in command.options.items()]
    if options:
        yield from (*_table(("option", "meaning"), options), "")
    kinds = command.settings.values()
    links = [_link(title) for title, (cls, _) in CHAPTERS.items() if cls in kinds and cls is not Config]
    links += ["[settings of a run](settings.md)"] * (Config in kinds) + [
        "[short names](#short-names)"
    ] * command.short_names
    if links:
        yield from (f"It also takes: {', '.join(links)}.", "")


def _link(title: str) -> str:
    """Return a link to a chapter of the page of settings."""
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    return f"[{title}](settings.md#{anchor})"


def files_page() -> str:
    """Return the files of each job's runs."""
    lines = [FILES_HEAD]
    for job, files in FILES.items():
        lines += [
            f"## {job}",
            "",
            *_table(("file", "holds"), [(f"`{file}`", text) for file, text in files.items()]),
            "",
        ]
    lines += ["## Other places", ""]
    other = [(at if "`" in at else f"`{at}`", text) for at, text in OTHER_FILES.items()]
    return "\n".join([*lines, *_table(("path", "holds"), other), ""])


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
