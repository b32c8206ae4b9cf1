"""Write docs/settings.md: every setting by meaning, out of the classes that hold them.

python -m benchmarks.settings    # less than a second
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping

from benchmarks.pages import DOCS
from dann_experiments.command_line import SHORT_NAMES
from dann_experiments.config import Config
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.description import Group, describe
from dann_experiments.config.export import ExportConfig
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.config.suggestions import SuggestLabelsConfig
from dann_experiments.config.weak_labels import WeakLabelsConfig
from sweeps.settings import SweepConfig

PAGE = DOCS / "settings.md"
HEAD = """# All settings

This page is generated from the code by `python -m benchmarks.settings`; `--help` of a command shows the same.

A setting of a run has one dotted name everywhere: in a YAML file (`optimizer: {lr: 1e-3}`), on the command line
(`--optimizer.lr 1e-3`), with `mlflow run` (`-P optimizer.lr=1e-3`), in the search space of a sweep, and in MLflow, where the
parameter is called `cfg.optimizer.lr`. `null` in a YAML file means that a setting is not set. [inputs.md](inputs.md) shows the
messages that wrong values get.
"""
CHAPTERS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "Data": (Config, ("data.",)),
    "Network": (Config, ("model.",)),
    "Training": (Config, ("trainer.", "optimizer.", "pretraining.", "monitor.", "")),
    "Adaptation": (Config, ("domain_adaptation.",)),
    "Tracking": (Config, ("tracking.",)),
    "Comparisons (`compare`)": (CompareConfig, ("",)),
    "Sweeps": (SweepConfig, ("",)),
    "Class maps (`predict`)": (PredictConfig, ("",)),
    "Model files for other programs (`export`)": (ExportConfig, ("",)),
    "Weak labels (`weak-labels`)": (WeakLabelsConfig, ("",)),
    "Label suggestions (`suggest-labels`)": (SuggestLabelsConfig, ("",)),
}
"""Title -> the class of its settings, and what the groups in it begin with; an empty text is the group of the class itself."""


def groups_of(cls: type, prefixes: tuple[str, ...]) -> dict[str, list[Group]]:
    """Return the groups of a chapter in the order of its prefixes; those with the same settings share an entry."""
    found: dict[str, list[Group]] = {}
    for prefix in prefixes:
        for group in describe(cls):
            if group.settings and (group.prefix.startswith(prefix) if prefix else not group.prefix):
                same = str([dataclasses.replace(one, key=one.key[len(group.prefix) :]) for one in group.settings])
                found.setdefault(same, []).append(group)
    return found


def table_of(groups: list[Group]) -> Iterator[str]:
    """Yield the lines of a table of settings, with its heading."""
    first, *others = groups
    if first.prefix:
        yield from (f"### {' and '.join(group.prefix.rstrip('.') for group in groups)}", "")
    yield " ".join(first.text.split())
    for other in others:
        yield f"The settings `{other.prefix}...` have the same names, ranges and defaults."
    yield from ("", "| setting | type | range | default | what it does |", "|---|---|---|---|---|")
    for setting in first.settings:
        cells = (f"`{setting.key}`", setting.type, setting.range, f"`{setting.default}`", setting.text)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def page() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for title, (cls, prefixes) in CHAPTERS.items():
        lines += [f"## {title}", ""]
        for groups in groups_of(cls, prefixes).values():
            lines += table_of(groups)
    short = [f"`{name}` for `{key}`" for name, key in SHORT_NAMES.items() if name != key]
    lines += ["## Short names", "", f"On the command line and with `mlflow run`: {', '.join(short)}; in `pretrain`,"]
    return "\n".join([*lines, "`max_epochs` is short for `pretraining.max_epochs`.", ""])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page())
