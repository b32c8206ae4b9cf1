"""The command line: `python -m dann_experiments COMMAND`.

`--config recipes/x.yaml` gives the settings, `--any.dotted.key value` changes one. The undotted flags are short names of
the settings that are changed most; they are also the declared parameters of the MLproject file.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    warn_of_stored_secrets,
    where_to_look,
)
from dann_experiments.config import Config, InputError, TrainingFailed, config_to_yaml, load_config
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import help_text, known_keys, load_settings
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data import early
from dann_experiments.data.samples import PRETRAINING_SETS, SETS
from dann_experiments.workers.processes import prepare_workers

if TYPE_CHECKING:
    from dann_experiments.jobs.upkeep import Health
    from dann_experiments.tracking.sync import Leftover

COMMANDS = {
    "check-data": "read all data once: every problem by file name, then counts, class shares and band statistics",
    "pretrain": "train a source model on labelled source images",
    "adapt": "adapt a source model to the unlabelled target domain (pretrains first where needed)",
    "evaluate": "score a model on every labelled val and test set",
    "predict": "write the class map of a raster of any size, or of many images: files, folders, patterns",
    "compare": "did adaptation help? source only, control, DANN and oracle over several seeds; a verdict and a report",
    "runs": "show the newest runs of an experiment side by side",
    "sync": "send what runs left in tracking.folder because the store was away or their process was killed",
    "doctor": "close runs that are shown as running though their process is gone; list what `sync` would send",
    "layers": "list the layers whose features can be aligned",
    "config": "print the resolved settings as YAML",
}
RESUMABLE = ("pretrain", "adapt")
SETS_OF = {"pretrain": PRETRAINING_SETS, "adapt": SETS}
WITHOUT_EFFECT = {
    "pretrain": ("source_checkpoint", "gamma", "hidden_size", "discriminator_lr", "feature_layer"),
    "check-data": ("source_checkpoint", "gamma", "hidden_size", "discriminator_lr", "feature_layer", "max_epochs"),
    "evaluate": ("gamma", "hidden_size", "discriminator_lr", "feature_layer", "max_epochs"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 = done, 1 = training failed, 2 = something the user can mend, each told in one message."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _argument_parser()
    try:
        known, rest = parser.parse_known_args(arguments)
        if known.command is None:
            parser.print_help()
            return 2
        warn_of_stored_secrets({**vars(known), **dotted(rest)} if not known.help else {})
        if known.help:
            print(_command_help(parser, known.command))
            return 0
        if known.command == "predict":
            return _predict(known, rest)
        if known.command == "compare":
            return _compare(known, rest)
        return _run(known, _settings(known, rest))
    except InputError as error:
        return tell_of_input(error)
    except TrainingFailed as error:
        print(f"Training failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return tell_of_failure(error)


def _settings(known: argparse.Namespace, rest: Sequence[str]) -> Config:
    """What the command line says; of a run that is resumed, what that run says."""
    file = None if known.config in (None, *NOT_GIVEN) else known.config
    run_id = _resume(known)
    if run_id is None or run_id == "auto":
        return load_config(DEFAULT_CONFIG if file is None else file, _overrides(known, rest))
    quiet_libraries()
    from dann_experiments.jobs.resume import settings_to_resume

    return settings_to_resume(run_id, known.command, file, _overrides(known, rest))


def _resume(known: argparse.Namespace) -> str | None:
    return None if known.command not in RESUMABLE or known.resume in (None, *NOT_GIVEN) else known.resume


def _run(known: argparse.Namespace, config: Config) -> int:
    if known.command == "config":
        print(config_to_yaml(config), end="")
        return 0
    quiet_libraries()
    for short in WITHOUT_EFFECT.get(known.command, ()):
        if getattr(known, short) not in (None, *NOT_GIVEN):
            logging.getLogger("dann_experiments").warning("--%s has no effect in %s.", short, known.command)
    if known.command == "layers":
        _print_layers(config, known.all)
        return 0
    if known.command == "runs":
        _print_overview(config)
        return 0
    if known.command in SETS_OF:
        early.begin(config, SETS_OF[known.command])
    from dann_experiments import jobs

    if known.command == "sync":
        return _print_sync(jobs.sync_runs(config))
    if known.command == "doctor":
        return _print_health(jobs.doctor(config))
    if known.command == "check-data":
        return _print_data_report(jobs.check_data(config))
    if known.command == "evaluate":
        _print_result(jobs.evaluate(config))
    else:
        job = {"pretrain": jobs.pretrain, "adapt": jobs.adapt}[known.command]
        _print_result(job(config, resume=_resume(known)))
    return 0


def _argument_parser() -> Parser:
    parser = Parser(
        prog="python -m dann_experiments",
        description="Adapt segmentation networks to unlabelled domains with DANN, tracked in MLflow.",
        epilog="COMMAND --help lists every setting. Settings: any --dotted.key value, for example --trainer.max_epochs 5.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(
            name, help=purpose, description=purpose.capitalize() + ".", add_help=False, allow_abbrev=False,
            usage=f"python -m dann_experiments {name} [--config FILE] [--SHORT VALUE ...] [--DOTTED.KEY VALUE ...]",
        )  # fmt: skip
        command.add_argument("-h", "--help", action="store_true", help="show this and every setting")
        if name == "predict":
            command.usage = (
                "python -m dann_experiments predict --model MODEL --input FILE [FILE ...] --output FILE [--KEY VALUE]"
            )
            command.add_argument(
                "--input",
                metavar="FILE",
                nargs="*",
                action="append",
                help="image files, folders and patterns ('a/*.tif')",
            )
            command.add_argument(
                "--config", metavar="FILE", help="settings of the network, for a checkpoint without them"
            )
            continue
        command.add_argument("--config", metavar="FILE", help="YAML file of settings (default: recipes/digits.yaml)")
        for short in SHORT_NAMES:
            command.add_argument(f"--{short}", metavar="VALUE", help=f"short for --{_long_name(short, name)}")
        if name in RESUMABLE:
            command.add_argument(
                "--resume",
                metavar="RUN_ID",
                help="go on in this killed run; auto: in the newest of these settings, or a new one",
            )
        if name == "compare":
            command.add_argument(
                "--arms", metavar="FILE", help="YAML file of arms (and seeds); default: the usual five"
            )
            command.add_argument(
                "--runs", metavar="ID", nargs="*", help="compare these finished runs; nothing is trained"
            )
        if name == "layers":
            command.add_argument("--all", action="store_true", help="list every layer, not only the useful ones")
    return parser


def _command_help(parser: argparse.ArgumentParser, command: str) -> str:
    action = next(item for item in parser._actions if isinstance(item, argparse._SubParsersAction))
    settings = help_text(PredictConfig) if command == "predict" else help_text()
    if command == "compare":
        settings = f"{help_text(CompareConfig)}\nSettings of the runs:\n{settings}"
    return f"{action.choices[command].format_help()}\nSettings (in a YAML file, or as --dotted.key value):\n{settings}"


def _long_name(short: str, command: str) -> str:
    """`max_epochs` means the epochs of the job that is run."""
    return "pretraining.max_epochs" if short == "max_epochs" and command == "pretrain" else SHORT_NAMES[short]


def _overrides(known: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for short in SHORT_NAMES:
        value = getattr(known, short)
        if value is not None and value not in NOT_GIVEN:
            overrides[_long_name(short, known.command)] = value
    if SHORT_NAMES["feature_layer"] in overrides:  # the short name moves the tap, captured layers included
        overrides["domain_adaptation.feature_layers"] = None
    return overrides | dotted(rest)


def _predict(known: argparse.Namespace, rest: Sequence[str]) -> int:
    given: dict[str, Any] = {key: value for key, value in dotted(rest).items() if value not in NOT_GIVEN}
    if [] in (known.input or ()):
        raise InputError("--input has no value; give --input FILE, several files, a folder or a pattern.")
    inputs = [text for texts in known.input or () for text in texts if text not in NOT_GIVEN]
    settings = load_settings(PredictConfig, None, given | {"input": inputs} if inputs else given)
    if len(inputs) == 1:  # as it was written: a name may look like a list
        settings = dataclasses.replace(settings, input=inputs[0])
    config = None if known.config in (None, *NOT_GIVEN) else load_config(known.config)
    quiet_libraries()
    from dann_experiments import jobs

    result = jobs.predict(settings, config)
    for output in result.outputs:
        print(f"Written: {output}")
    total = sum(result.class_pixels.values())
    for name, pixels in result.class_pixels.items():
        print(f"  {name}: {pixels / max(total, 1):.1%} of the pixels with data")
    print(f"Preview and class shares: run {result.run_id}; {where_to_look(result.tracking_uri)}")
    return 0


def _compare(known: argparse.Namespace, rest: Sequence[str]) -> int:
    given = dotted(rest)
    keys = known_keys(CompareConfig)
    own: dict[str, Any] = {key: value for key, value in given.items() if key in keys and value not in NOT_GIVEN}
    runs = [run_id for text in known.runs or () for run_id in text.replace(",", " ").split() if run_id not in NOT_GIVEN]
    if known.runs == []:
        raise InputError("--runs has no value; give the ids of finished runs, or leave it out to run the arms.")
    if runs:
        own["runs"] = runs
    file = None if known.arms in (None, *NOT_GIVEN) else known.arms
    settings = load_settings(CompareConfig, file, own)
    overrides = _overrides(known, [])
    overrides |= {key: value for key, value in given.items() if key not in keys}
    config = load_config(DEFAULT_CONFIG if known.config in (None, *NOT_GIVEN) else known.config, overrides)
    quiet_libraries()
    if settings.runs:
        idle = [key for key in (*own, *overrides) if not key.startswith(("runs", "threads", "tracking."))]
        if idle:
            logging.getLogger("dann_experiments").warning("With runs, these have no effect: %s.", ", ".join(idle))
    if settings.launcher == "processes" and not settings.runs:
        prepare_workers("dann_experiments.comparison.runner")  # imported for all workers while this process imports
    from dann_experiments.comparison.compare import ComparisonFailed, compare

    try:
        result = compare(config, settings)
    except ComparisonFailed as error:
        print(f"The comparison failed: {error}", file=sys.stderr)
        return 1
    _print_comparison(result)
    return 0


def _print_comparison(result: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    scores = [name for name in result.table["metric"].unique() if name.startswith("iou/")]
    comparison, table = result.comparison, result.table.set_index(["arm", "metric"])
    shown = Table("", *scores, "seeds", title=f"{comparison.title}: IoU points, mean ± standard deviation")
    for arm in comparison.arms:
        cells, seeds = [], 0
        for name in scores:
            row = table.loc[(arm.name, name)] if (arm.name, name) in table.index else None
            seeds = seeds if row is None else max(seeds, int(row["n"]))
            spread = "" if row is None or row["std"] != row["std"] else f" ± {100 * row['std']:.1f}"
            cells.append("" if row is None else f"{100 * row['mean']:.1f}{spread}")
        shown.add_row(arm.name, *cells, str(seeds))
    Console().print(shown)
    for verdict in comparison.verdicts:
        Console().print(f"[bold]{escape(f'{verdict.arm}: {verdict.outcome}.')}[/bold] {escape(verdict.reason)}")
    if comparison.selection is not None:
        print("\nTarget-free choice of an epoch, against iou/target_val (docs/selection.md):")
        print(comparison.selection.round(3).to_string(index=False))
    for note in comparison.notes:
        print(f"Note: {note}")
    if result.artifacts:
        print(f"Report: {Path(result.artifacts) / 'report.html'}")
    print(f"Run {result.run_id}; {where_to_look(result.tracking_uri)}")


def _print_layers(config: Config, every: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from dann_experiments.jobs import setup
    from dann_experiments.models.taps import list_layers

    network = setup.make_network(config, with_weights=False)
    table = Table("layer", "channels", "stride", "useful", title=f"{config.model.arch}, {config.model.encoder_name}")
    for layer in list_layers(network, config.model.in_channels, setup.blank_size(config)):
        if layer.useful or every:
            table.add_row(layer.name, str(layer.channels), f"{layer.stride:g}", "yes" if layer.useful else "")
    Console().print(table)
    print("stride: input pixels a position. Give one or several as domain_adaptation.method.feature_layer.")


def _print_result(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [name for name in result.metrics if name.startswith("iou/")]
    table = Table("", *names, title=f"{result.job} run {result.run_id}")
    rows: Mapping[str, Mapping[str, float]] = {"before": result.baseline, "after": result.metrics}
    for label, metrics in rows.items():
        if metrics:
            table.add_row(label, *(f"{metrics[name]:.3f}" if name in metrics else "" for name in names))
    Console().print(table)
    if result.artifacts:
        print(f"Pictures, model, checkpoints: {result.artifacts}")
    print(f"Look at it: {where_to_look(result.tracking_uri)}")


def _print_data_report(report: Any) -> int:
    """The report on the terminal; exit code 2 if there are problems."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tables = (("sets (class shares of labelled pixels)", report.counts.T), ("bands, as stored", report.bands))
    for title, frame in tables:
        if not frame.size:
            continue
        table = Table(title=title)
        table.add_column("", overflow="fold")
        for name in frame.columns:
            table.add_column(str(name).replace("_", " "), justify="right")
        for label, row in zip(frame.index, frame.to_numpy(), strict=True):
            shown = " ".join(map(str, label)) if isinstance(label, tuple) else str(label)
            table.add_row(
                shown, *("" if value != value else f"{value:.4g}" if value % 1 else f"{value:.0f}" for value in row)
            )
        console.print(table)
    for line in report.grids:
        print(line)
    for remark in report.remarks:
        print(f"Look at this: {remark}")
    if report.problems:
        count = len(report.problems)
        print(f"Error: {count} problem{'s' * (count > 1)} with the data:", file=sys.stderr)
        for problem in report.problems:
            print(f"  - {problem}", file=sys.stderr)
        return 2
    count = len(report.remarks)
    verdict = (
        f"The data can be used, but {count} thing{'s' * (count > 1)} should be looked at (above)."
        if report.remarks
        else "Nothing is wrong with the data."
    )
    print(f"{verdict} Tables and figure: run {report.run_id}.")
    return 0


def _print_sync(found: Iterable[Leftover]) -> int:
    """A line a run; exit code 1 if something is left."""
    left, count = 0, 0
    for count, leftover in enumerate(found, 1):  # noqa: B007  (the count is needed after the loop)
        print(f"{leftover.run_id}: {leftover.outcome}", flush=True)
        left += leftover.is_left
    print(f"{count} runs had left something; {left} are left." if count else "Nothing was left to send.")
    return 1 if left else 0


def _print_health(health: Health) -> int:
    for run_id in health.closed:
        print(f"{run_id}: its process is gone; closed as KILLED")
    for run_id in health.elsewhere:
        print(f"{run_id}: RUNNING, written on another machine or by something that does not say: ask there")
    for path in health.leftovers:
        print(f"{path}: files of a run that the store does not have yet, or of one that is running")
    print(
        f"{len(health.closed)} runs closed, {health.running} are really running, {len(health.leftovers)} folders left."
    )
    if health.leftovers:
        print(f"Send them: python -m dann_experiments sync --tracking.folder {health.leftovers[0].parent}")
    return 0


def _print_overview(config: Config) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dann_experiments.jobs.overview import overview
    from dann_experiments.tracking.store import TRAINING_PAGES

    found = overview(config)
    scores = [name for name in found.table.columns if name.startswith("iou/")]
    table = Table("", *scores, "run", title=f"experiment {escape(found.experiment)}")
    for arm in found.table.index:
        values = [float(found.table.at[arm, name]) for name in scores]  # pyright: ignore[reportArgumentType]
        table.add_row(
            str(arm), *("" if v != v else f"{v:.3f}" for v in values), str(found.table.at[arm, "run_id"])[:8]
        )  # NaN: no such set
    Console().print(table)
    print("One seed each: differences of a few points can be chance; the README shows several seeds.")
    for arm, folder in found.artifacts.items():
        print(f"Pictures, {arm}: {Path(folder) / 'figures'}")
    print(
        "MLflow UI: make ui, then http://127.0.0.1:5000/#/experiments/"
        + f"{found.experiment_id}/runs?compareRunsMode=CHART&{TRAINING_PAGES}"
    )


if __name__ == "__main__":
    sys.exit(main())
