"""Reads finished runs from the tracking store: their scores, their curves, and the arm that each belongs to."""

from __future__ import annotations

import ast
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.config import Config, InputError, flatten, load_config
from dann_experiments.config.comparison import ARM_NAMES, KINDS, Kind
from dann_experiments.config.errors import StoreAway
from dann_experiments.config.store_names import LONGEST_PARAM
from dann_experiments.config.untrusted import without_code
from dann_experiments.names import CURVES, Job, Metric, Tag
from dann_experiments.tracking.run import PARAM_PREFIX
from dann_experiments.tracking.store import Store, known_run, whole_run_id, without_secrets
from dann_experiments.tracking.values import context_of, last_values, logged_points

log = logging.getLogger(__name__)
PROBES = (
    Metric.PROBE_ACCURACY,
    Metric.A_DISTANCE,
)  # logged at step 0 for the warm start, at the last step for the adapted network
METHOD = "domain_adaptation.method."  # config_of leaves out classes of the user
NOT_THE_ARM = (
    "seed", "threads", "tracking.", "domain_adaptation.pretrained_checkpoint.", "trainer.enable_progress_bar",
    "data.memory_gb", "data.disk_cache_gb", "data.num_workers", "data.root", "data.embedded.", "data.oracle", "monitor.probe",
)  # fmt: skip
"""Settings in which runs of one arm may differ: they change no result, or (the source model) are compared separately."""


def read_run(store: Store, run_id: str, arm: Arm, reused: bool) -> ArmRun:
    """Return a run with its final values and curves."""
    run = store.client.get_run(run_id)
    metrics = last_values(run)
    if arm.kind == "oracle":  # in the settings of this run, the target is called source
        metrics = {name: value for name, value in metrics.items() if "source" not in name and "gap" not in name}
    wanted = [name for name in metrics if name in (*CURVES, *PROBES) or name.startswith(Metric.SELECT)]
    history = {name: _history(store, run_id, name) for name in wanted} if arm.kind in ("control", "adapted") else {}
    return ArmRun(arm.name, int(run.data.tags["seed"]), run_id, metrics, history, dict(run.data.tags), reused)


def arms_of_runs(store: Store, run_ids: Sequence[str]) -> tuple[list[Arm], list[ArmRun], list[str]]:
    """Group finished runs into arms by job, method and differing settings. Return arms, runs and notes.

    The runs of their source models are added. Raises InputError for an id that is no finished run of adapt, pretrain or
    evaluate, and for runs that cannot be compared: two with the same arm and seed, runs from different source models, or runs
    scored on different images.
    """
    runs = {run.info.run_id: run for run in (_finished(store, run_id) for run_id in run_ids)}
    kinds: dict[str, Kind] = {run_id: _kind(run) for run_id, run in runs.items()}
    if "adapted" not in kinds.values():
        raise InputError("runs names no adaptation run, so there is nothing to judge; add one (`runs` lists some).")
    sources, notes = _sources(store, runs, kinds)
    _refuse_other_images([run for run_id, run in runs.items() if kinds[run_id] != "oracle"] + list(sources.values()))
    groups: dict[tuple[Kind, str, tuple], list[str]] = {}
    for run_id, run in runs.items():
        if kinds[run_id] != "source_only":
            settings = _settings(store, run, kinds[run_id])
            groups.setdefault((kinds[run_id], _method(run), tuple(sorted(settings.items()))), []).append(run_id)
    arms, found = [], []
    if sources:
        arm = Arm(_given_name(sources.values()) or ARM_NAMES["source_only"], "source_only")
        arms.append(arm)
        # with the seed of the runs that start from it: one model may be the start of several
        found += [replaced(read_run(store, run.info.run_id, arm, True), seed=seed) for seed, run in sources.items()]
    given = Counter(_given_name(runs[run_id] for run_id in members) for members in groups.values())
    for (kind, method, settings), members in sorted(groups.items(), key=lambda group: KINDS.index(group[0][0])):
        alike = [dict(other[2]) for other in groups if other[:2] == (kind, method) and other[2] != settings]
        differing = {key: value for key, value in settings if any(one.get(key) != value for one in alike)}
        name = _given_name(runs[run_id] for run_id in members)
        if name is None or given[name] > 1:
            name = ARM_NAMES[kind] if kind != "adapted" or method == "dann" else method
            if differing:
                name += ": " + ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in differing.items())
        while any(arm.name == name for arm in arms):
            name += " *"
        seeds = [runs[run_id].data.tags["seed"] for run_id in members]
        if len(set(seeds)) < len(seeds):
            raise InputError(
                f"runs holds two runs of one arm ({name}) with one seed: {members}, seeds {seeds}; keep one per seed."
            )
        arm = Arm(name, kind, differing)
        arms.append(arm)
        found += [read_run(store, run_id, arm, reused=True) for run_id in members]
    controls = [arm.name for arm in arms if arm.kind == "control"]
    if len(controls) > 1:
        raise InputError(f"runs holds {len(controls)} different controls ({controls}); keep the runs of one.")
    return arms, found, notes


def with_probe_of_the_start(runs: Sequence[ArmRun], arms: Sequence[Arm]) -> list[ArmRun]:
    """Return the runs, those of the source model with the probe that runs starting from it measured at step 0."""
    sources = {arm.name for arm in arms if arm.kind == "source_only"}
    starts = {
        run.seed: {name: value for name in PROBES for step, value in run.history.get(name, ())[:1] if step == 0}
        for run in runs
        if run.history
    }
    return [
        replaced(run, metrics={**starts.get(run.seed, {}), **run.metrics}) if run.arm in sources else run
        for run in runs
    ]


def config_of(store: Store, run_id: str) -> Config | None:
    """Return the settings in a run's `config.yaml`, without a `class_path`; None if they cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return without_code(load_config(Path(store.client.download_artifacts(run_id, "config.yaml", folder))))
        except StoreAway:
            raise
        except Exception as error:  # the artifact store may raise anything
            log.warning("run %s gives no config.yaml (%s).", run_id, without_secrets(str(error)))
            return None


def _finished(store: Store, run_id: str, what: str = "") -> Any:
    where = f"runs needs {run_id}, {what}" if what else f"runs names {run_id}"
    run = known_run(store, whole_run_id(store, run_id))
    if run is None:
        raise InputError(f"{where}, which the tracking store does not have; see tracking.uri.")
    job = run.data.tags.get(Tag.JOB)
    if job not in (Job.ADAPT, Job.TRIAL, Job.PRETRAIN, Job.EVALUATE) or "seed" not in run.data.tags:
        raise InputError(f"{where}, a run of {job or 'something else'}; give runs of adapt (and evaluate).")
    if run.info.status != "FINISHED":
        raise InputError(f"{where}, whose status is {run.info.status}; give finished runs.")
    if Tag.TTA in run.data.tags:
        raise InputError(
            f"{where}, which scores the mean of several predictions (tta {run.data.tags[Tag.TTA]}), as runs of adapt do not; "
            "evaluate its model with tta none."
        )
    return run


def _sources(store: Store, runs: Mapping[str, Any], kinds: Mapping[str, Kind]) -> tuple[dict[int, Any], list[str]]:
    """Return seed -> the run with the scores of the source model that adaptation started from, and notes about unused runs.

    It is the run of `evaluate` if `runs` has one, else the run that trained the model.
    """
    starts: dict[int, str] = {}
    for run_id, run in runs.items():
        source = run.data.tags.get(Tag.SOURCE_RUN_ID)
        if kinds[run_id] in ("statistics", "test_statistics", "control", "adapted") and source is not None:
            seed = _seed(run)
            if starts.setdefault(seed, source) != source:
                raise InputError(
                    f"runs of seed {seed} start from different source models ({starts[seed]}, {source}); compare runs that "
                    "start from one."
                )
    sources: dict[int, Any] = {}
    unused = []
    for run_id, run in runs.items():
        if kinds[run_id] != "source_only":
            continue
        if run.data.tags[Tag.JOB] != Job.EVALUATE:
            if run_id not in starts.values():
                unused.append(run_id)
            continue
        seed, source = _seed(run), run.data.tags.get(Tag.SOURCE_RUN_ID)
        if seed in sources:
            raise InputError(
                f"runs holds two evaluations of a source model with seed {seed} ({sources[seed].info.run_id}, {run_id}); "
                "keep one per seed."
            )
        if starts.get(seed, source) != source:
            raise InputError(
                f"runs names {run_id}, which scores the model of run {source}, but the runs of its seed {seed} start from "
                f"{starts[seed]}; leave it out."
            )
        sources[seed] = run
    for seed, source in starts.items():
        if seed not in sources:
            sources[seed] = runs.get(source) or _finished(store, source, f"the source model of the runs of seed {seed}")
    notes = [f"Run {run_id} is the source model of none of these runs and is left out." for run_id in unused]
    return dict(sorted(sources.items())), notes


def _refuse_other_images(runs: Sequence[Any]) -> None:
    """Raise InputError if two runs were scored on different target images."""
    first: dict[str, tuple[str, str]] = {}
    for run in runs:
        for item in run.inputs.dataset_inputs:
            context = context_of(item)
            if context in ("target val", "target test"):
                digest, other = first.setdefault(context, (item.dataset.digest, run.info.run_id))
                if digest != item.dataset.digest:
                    raise InputError(
                        f"runs {other} and {run.info.run_id} were scored on different images ({context}: digests {digest}, "
                        f"{item.dataset.digest}), so their scores cannot be compared; score one's model on the other's images "
                        "with evaluate."
                    )


def _given_name(runs: Iterable[Any]) -> str | None:
    """Return the arm name that an earlier comparison gave to these runs; None if there is none, or more than one."""
    names = {run.data.tags[Tag.ARM] for run in runs if Tag.ARM in run.data.tags}
    return next(iter(names)) if len(names) == 1 else None


def _seed(run: Any) -> int:
    return int(run.data.tags["seed"])


def _kind(run: Any) -> Kind:
    tags = run.data.tags
    if tags.get(Tag.KIND) in KINDS:  # a run that `compare` made
        return tags[Tag.KIND]
    if tags[Tag.JOB] == Job.PRETRAIN:
        return "source_only"
    if tags[Tag.JOB] == Job.EVALUATE and Tag.TEST_BATCHNORM in tags:
        return "test_statistics"
    if tags[Tag.JOB] == Job.EVALUATE:
        return "statistics" if tags.get(Tag.BATCHNORM) == "target_stats" else "source_only"
    return "control" if tags.get(Tag.METHOD) == "lambda_zero" else "adapted"


def _method(run: Any) -> str:
    return run.data.tags.get(Tag.METHOD, "")


def _settings(store: Store, run: Any, kind: Kind) -> dict[str, str]:
    """Return the settings that distinguish arms; none for an arm that is not trained."""
    if kind in ("statistics", "test_statistics"):
        return {}
    if kind == "masks":
        return {key: value for key, value in run.data.params.items() if "weak_labels" in key}
    unused = (*NOT_THE_ARM, "pretraining.") if run.data.tags[Tag.JOB] != Job.PRETRAIN else NOT_THE_ARM
    params = {
        key.removeprefix(PARAM_PREFIX): value for key, value in run.data.params.items() if key.startswith(PARAM_PREFIX)
    }
    return {key: value for key, value in _as_any_version(store, run, params).items() if not key.startswith(unused)}


def _as_any_version(store: Store, run: Any, params: Mapping[str, str]) -> dict[str, str]:
    """Return the params of a run in one form for all versions of this program.

    Earlier versions store a mapping as `...value_map.0` and so on, later ones as one value; a run that was resumed by a later
    version has both. A setting that did not exist yet has its default. A value that was cut is read from `config.yaml`.
    """
    values: dict[str, Any] = {
        key: (_read_mapping(text) or text) if text.startswith("{") else text for key, text in params.items()
    }
    cut = [key for key, text in params.items() if len(text) >= LONGEST_PARAM and not key.startswith(METHOD)]
    known = config_of(store, run.info.run_id) if cut else None
    if known is not None:
        whole = flatten(known)
        values |= {key: whole[key] for key in cut if key in whole}
    for key, value in flatten(Config()).items():
        if key not in values and not any(other.startswith(f"{key}.") for other in params):
            values[key] = value
    return dict(_leaves(values))


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _read_mapping(text: str) -> dict[Any, Any] | None:
    """Parse a mapping of plain values; None if the text is no mapping, for example because it was cut."""
    try:
        tree = ast.parse(text, mode="eval")
        for node in [node for node in ast.walk(tree) if isinstance(node, (ast.Dict, ast.List, ast.UnaryOp))]:
            for name, inner in ast.iter_fields(node):
                read = [_number(item) for item in inner] if isinstance(inner, list) else _number(inner)
                setattr(node, name, read)
        found = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number(node: Any) -> Any:
    """Return the names nan and inf as numbers, other nodes unchanged."""
    return ast.Constant(float(node.id)) if isinstance(node, ast.Name) and node.id in ("nan", "inf") else node


def _history(store: Store, run_id: str, name: str) -> list[tuple[int, float]]:
    points = logged_points(store.client, run_id, name)
    return [(point.step, point.value) for point in points if math.isfinite(point.value)]
