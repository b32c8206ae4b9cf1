"""The command line: `python -m dann_experiments COMMAND`; `COMMANDS`, at the end, lists the commands.

`--config` takes a file of settings or the name of a recipe; `--any.dotted.key value` changes one setting. Flags without dots
are options of the commands, or short names of the most used settings (`command_line.SHORT_NAMES`).
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dann_experiments.command_line import Command, Option, Program, Request, quiet_libraries
from dann_experiments.config import Config, InputError, TrainingFailed, config_to_yaml, load_config
from dann_experiments.config.comparison import NAMED_ARMS, CompareConfig
from dann_experiments.config.export import ExportConfig
from dann_experiments.config.imports import quick_imports
from dann_experiments.config.parsing import known_keys, load_settings
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.config.recipes import load_or_default, report_default
from dann_experiments.config.suggestions import SuggestLabelsConfig
from dann_experiments.config.weak_labels import WeakLabelsConfig
from dann_experiments.names import RESUME_AUTO, Job
from dann_experiments.workers.processes import prepare_workers

log = logging.getLogger(__name__)
OF_ADAPTATION = ("source_checkpoint", "gamma", "hidden_size", "discriminator_lr", "feature_layer")
CONFIG = Option("YAML file of settings, or a recipe's name (default: digits)", "FILE")
RESUME = Option("resume this killed run; auto: the newest of these settings, else start a new run", "RUN_ID")
SETTINGS = {"settings (in a YAML file, or as --dotted.key value)": Config}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` defaults to those of the process."""
    return PROGRAM.main(arguments)


def _config(request: Request, without_effect: Sequence[str] = (), but: Sequence[str] = ()) -> Config:
    """Read the settings of a command and set up logging. `without_effect`: short names that cause a warning."""
    config = load_or_default(request.options.get("config"), request.overrides(but))
    quiet_libraries()
    if request.command not in ("runs", "sync", "doctor") and "runs" not in request.options:  # these need only the store
        report_default(log.info)
    _warn_of_idle(request, without_effect)
    return config


def _imported() -> tuple[Any, Any]:
    """Import the jobs and what prints their results."""
    with quick_imports():
        from dann_experiments import jobs
        from dann_experiments.reports import terminal
    return jobs, terminal


def _warn_of_idle(request: Request, without_effect: Sequence[str]) -> None:
    for short in without_effect:
        if short in request.settings:
            log.warning("--%s has no effect in %s.", short, request.command)


def _check_data(request: Request) -> int:
    config = _config(request, (*OF_ADAPTATION, "max_epochs"))
    jobs, terminal = _imported()
    return terminal.print_data_report(jobs.check_data(config))


def _pretrain(request: Request) -> int:
    config = _training_config(request, OF_ADAPTATION)
    jobs, _ = _imported()
    return _print_run(jobs.pretrain(config, resume=request.options.get("resume")))


def _adapt(request: Request) -> int:
    config = _training_config(request)
    jobs, _ = _imported()
    return _print_run(jobs.adapt(config, resume=request.options.get("resume")), request)


def _training_config(request: Request, without_effect: Sequence[str] = ()) -> Config:
    """Read the settings. Those of a resumed run come from that run."""
    run_id = request.options.get("resume")
    if run_id in (None, RESUME_AUTO):
        return _config(request, without_effect)
    quiet_libraries()
    from dann_experiments.jobs.resume import settings_to_resume

    config = settings_to_resume(run_id, request.command, request.options.get("config"), request.overrides())
    _warn_of_idle(request, without_effect)
    return config


def _evaluate(request: Request) -> int:
    config = _config(request, (*OF_ADAPTATION[1:], "max_epochs"))
    jobs, _ = _imported()
    return _print_run(jobs.evaluate(config))


def _print_run(result: Any, request: Request | None = None) -> int:
    from dann_experiments.reports import terminal

    title = f"{result.job} run {result.run_id}"
    terminal.print_scores(title, {"before": result.baseline, "after": result.metrics})
    if result.artifacts:
        print(f"Pictures, model, checkpoints: {result.artifacts}")
    print(f"Look at it: {terminal.where_to_look(result.tracking_uri)}")
    terminal.print_views(result.tracking_uri, result.views)
    if result.job == Job.ADAPT:
        print(f"Map images: dann predict --model runs:/{result.run_id} --input IMAGES --output MAPS")
        if result.source_run_id is not None:
            print(f"Its source model: runs:/{result.source_run_id}")
        given = None if request is None else request.options.get("config")
        if request is not None and request.options.get("resume") not in (None, RESUME_AUTO) and result.artifacts:
            given = Path(result.artifacts) / "config.yaml"  # the settings came from the run
        config = "" if given is None else f" --config {shlex.quote(str(given))}"
        others = ", and the other settings of this command" if request is not None and request.settings else ""
        print(f"Did it help? dann compare{config} --seeds 3{others}: source only, control and DANN, with a verdict")
    return 0


def _predict(request: Request) -> int:
    inputs = request.options.get("input", [])
    settings = load_settings(PredictConfig, None, {**request.settings, **({"input": inputs} if inputs else {})})
    if len(inputs) == 1:  # unchanged: a file name may look like a list
        settings = dataclasses.replace(settings, input=inputs[0])
    config = load_config(request.options["config"]) if "config" in request.options else None
    quiet_libraries()
    jobs, terminal = _imported()
    from dann_experiments.prediction.find_images import files_of_map  # imports torch, so after the others

    result = jobs.predict(settings, config)
    for output in result.outputs:
        print(f"Written: {', '.join(map(str, files_of_map(output, settings)))}")
    total = sum(result.class_pixels.values())
    for name, pixels in result.class_pixels.items():
        print(f"  {name}: {pixels / max(total, 1):.1%} of the pixels with data")
    print(f"Preview and class shares: run {result.run_id}; {terminal.where_to_look(result.tracking_uri)}")
    return 0


def _export(request: Request) -> int:
    settings = load_settings(ExportConfig, None, request.settings)
    config = load_config(request.options["config"]) if "config" in request.options else None
    quiet_libraries()
    jobs, terminal = _imported()
    result = jobs.export(settings, config)
    terminal.print_export(result.output, result.tile_size, result.multiple_of, *result.difference)
    return 0


def _weak_labels(request: Request) -> int:
    own = {key: request.options[key] for key in ("input", "before") if key in request.options}
    settings = load_settings(WeakLabelsConfig, None, {**request.settings, **own})
    single = {
        key: given[0] for key, given in own.items() if len(given) == 1
    }  # unchanged: a file name may look like a list
    settings = dataclasses.replace(settings, **single)
    quiet_libraries()
    jobs, terminal = _imported()
    terminal.print_weak_labels(jobs.weak_labels(settings), settings.class_names, settings.threshold == "otsu")
    return 0


def _compare(request: Request) -> int:
    keys = known_keys(CompareConfig)
    own: dict[str, Any] = {key: value for key, value in request.settings.items() if key in keys}
    if "runs" in request.options:
        own["runs"] = [run_id for word in request.options["runs"] for run_id in word.replace(",", " ").split()]
        if not own["runs"]:  # else the whole comparison would be trained
            raise InputError(
                f"--runs is {' '.join(request.options['runs'])!r}, without an id; give ids of finished runs."
            )
    file = request.options.get("arms")
    if file is not None and file in NAMED_ARMS:
        own["arms"], file = {name: dict(arm) for name, arm in NAMED_ARMS[file].items()}, None
    settings = load_settings(CompareConfig, file, own)
    config = _config(request, but=keys)
    if settings.runs:
        idle = [key for key in (*own, *request.overrides(keys)) if not key.startswith(("runs", "threads", "tracking."))]
        if idle:
            log.warning("With runs, these have no effect: %s.", ", ".join(idle))
    if settings.launcher == "processes" and not settings.runs:
        prepare_workers(
            "dann_experiments.comparison.runner"
        )  # imported once for all workers, in parallel to this process
    with quick_imports():
        from dann_experiments.comparison.compare import ComparisonFailed, compare
        from dann_experiments.comparison.label_curve import compare_labels
        from dann_experiments.reports import terminal
        from dann_experiments.reports.choices import print_choice, print_way_to_labels

    try:
        if settings.labelled:
            terminal.print_label_curve(compare_labels(config, settings))
            return 0
        result = compare(config, settings)
    except ComparisonFailed as error:
        print(f"The comparison failed: {error}", file=sys.stderr)
        return 1
    terminal.print_comparison(result.comparison, result.table)
    if result.comparison.choice is not None:
        print_choice(result.comparison.choice.table, result.comparison.choice.line)
        print_way_to_labels(result.run_id)
    if result.artifacts:
        print(f"Report: {Path(result.artifacts) / 'report.html'}")
    print(f"Run {result.run_id}; {terminal.where_to_look(result.tracking_uri)}")
    terminal.print_views(result.tracking_uri, result.views)
    if all(verdict.outcome != "helped" for verdict in result.comparison.verdicts):
        print("What else to try, and when to stop: docs/which-method.md")
    return 0


def _suggest_labels(request: Request) -> int:
    settings = load_settings(SuggestLabelsConfig, None, request.settings)
    quiet_libraries()
    from dann_experiments.comparison.suggest_labels import suggest_labels
    from dann_experiments.reports.choices import print_suggestion

    print_suggestion(suggest_labels(settings))
    return 0


def _runs(request: Request) -> int:
    config = _config(request)
    from dann_experiments.jobs.overview import overview
    from dann_experiments.reports import terminal

    found = overview(config)
    terminal.print_overview(
        found.table, found.experiment, found.experiment_id, found.artifacts, found.models_without_run
    )
    return 0


def _sync(request: Request) -> int:
    config = _config(request)
    jobs, terminal = _imported()
    return terminal.print_sync(jobs.sync_runs(config))


def _doctor(request: Request) -> int:
    config = _config(request)
    jobs, terminal = _imported()
    health = jobs.doctor(config)
    terminal.print_health(health.closed, health.running, health.elsewhere, health.leftovers, health.models_without_run)
    return 0


def _layers(request: Request) -> int:
    config = _config(request)
    from dann_experiments.jobs import build
    from dann_experiments.models.taps import list_layers
    from dann_experiments.reports import terminal

    network = build.make_network(config, with_weights=False, initialize=False)
    found = list_layers(network, config.model.in_channels, build.blank_size(config))
    terminal.print_table(
        f"{config.model.arch}, {config.model.encoder_name}",
        ["layer", "channels", "stride", "useful"],
        [
            [layer.name, str(layer.channels), f"{layer.stride:g}", "yes" if layer.useful else ""]
            for layer in found
            if layer.useful or "all" in request.options
        ],
    )
    print("stride: input pixels per position. Give one or several as domain_adaptation.method.feature_layer.")
    return 0


def _show_config(request: Request) -> int:
    print(config_to_yaml(load_or_default(request.options.get("config"), request.overrides())), end="")
    report_default(lambda text: print(text, file=sys.stderr))
    return 0


def _command(run: Callable[[Request], int], purpose: str, **options: Option) -> Command:
    """Describe a command that takes all settings of a run."""
    return Command(run, purpose, options={"config": CONFIG, **options}, settings=SETTINGS)


COMMANDS = {
    "check-data": _command(
        _check_data,
        "read all data once; print every problem with its file name, then counts, class shares and band statistics",
    ),
    "pretrain": _command(_pretrain, "train a source model on labeled source images", resume=RESUME),
    "adapt": _command(
        _adapt, "adapt a source model to the unlabeled target domain (pretrains first if needed)", resume=RESUME
    ),
    "evaluate": _command(_evaluate, "score a model on every labeled val and test set"),
    "predict": Command(
        _predict,
        "write the class map of a raster of any size, or of many images: files, folders, patterns",
        usage="--model MODEL --input FILE [FILE ...] --output FILE [--KEY VALUE]",
        options={
            "input": Option("image files, folders and patterns ('a/*.tif')", "FILE", many=True),
            "config": Option("settings of the network, for a checkpoint without them", "FILE"),
        },
        settings={"settings (as --key value)": PredictConfig},
        short_names=False,
    ),
    "export": Command(
        _export,
        "write a model as an ONNX or torch.export file, which runs without this program, and compare it with predict",
        usage="--model MODEL --output FILE.onnx|FILE.pt2 [--KEY VALUE]",
        options={"config": Option("settings of the network, for a checkpoint without them", "FILE")},
        settings={"settings (as --key value)": ExportConfig},
        short_names=False,
    ),
    "weak-labels": Command(
        _weak_labels,
        "write masks that a rule makes (an index of the bands and a threshold), as weak labels, with pictures to look at first",
        usage="--rule RULE --input FILE [FILE ...] --output FILE [--KEY VALUE]",
        options={
            "input": Option("image files, folders and patterns ('a/*.tif')", "FILE", many=True),
            "before": Option("images of the earlier date, for the rule change_vector", "FILE", many=True),
        },
        settings={"settings (as --key value)": WeakLabelsConfig},
        short_names=False,
    ),
    "compare": Command(
        _compare,
        "did adaptation help? source only, control, DANN and oracle over several seeds; a verdict and a report",
        options={
            "config": CONFIG,
            "arms": Option("YAML file of arms (and seeds), or ladder; default: the usual five", "FILE"),
            "runs": Option("compare these finished runs, without training anything", "ID", many=True),
        },
        settings={"settings of the comparison (in the file of arms, or as --key value)": CompareConfig, **SETTINGS},
    ),
    "suggest-labels": Command(
        _suggest_labels,
        "which arm of a comparison to trust without target labels, and which target tiles to label",
        usage="--comparison ID [--count N] [--output FOLDER] [--KEY VALUE]",
        settings={"settings (as --key value)": SuggestLabelsConfig},
        short_names=False,
    ),
    "runs": _command(_runs, "show the newest runs of an experiment side by side"),
    "sync": _command(
        _sync, "send files that runs left in tracking.folder because the store was away or their process was killed"
    ),
    "doctor": _command(
        _doctor,
        "close runs that are shown as running although their process is gone; list the files that `sync` would send, and models "
        "whose run was deleted",
    ),
    "layers": _command(
        _layers,
        "list the layers whose features can be aligned",
        all=Option("list every layer, not only the useful ones"),
    ),
    "config": _command(_show_config, "print the resolved settings as YAML"),
}
PROGRAM = Program(
    "dann_experiments",
    "Adapt segmentation networks to unlabeled domains with DANN, tracked in MLflow.",
    COMMANDS,
    failures={TrainingFailed: "Training failed"},
)
