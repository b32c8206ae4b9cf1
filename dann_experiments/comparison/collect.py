"""Reads finished runs back from the tracking store: their scores, their curves, and which arm of a comparison they are."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.config import Config, InputError, load_config
from dann_experiments.config.comparison import KINDS, Kind
from dann_experiments.config.errors import StoreAway
from dann_experiments.tracking.run import PARAM_PREFIX
from dann_experiments.tracking.store import Store, known_run
from dann_experiments.training.selection import PREFIX

log = logging.getLogger(__name__)
CURVES = ("iou/source_val", "iou/target_val", "da/lambda", "da/domain_acc", "da/domain_acc_val")
NOT_THE_ARM = ("seed", "threads", "tracking.", "domain_adaptation.pretrained_checkpoint.path")
"""Settings in which runs of one arm may differ."""
NAMES: Mapping[str, str] = {"source_only": "source only", "statistics": "AdaBN", "control": "lambda = 0 control"}


def read_run(store: Store, run_id: str, arm: Arm, reused: bool) -> ArmRun:
    """A run's final values and curves."""
    run = store.client.get_run(run_id)
    metrics = dict(run.data.metrics)
    if arm.kind == "oracle":  # what its own settings call the source is the target
        metrics = {name: value for name, value in metrics.items() if "source" not in name and "gap" not in name}
    wanted = [name for name in metrics if name in CURVES or name.startswith(PREFIX)]
    history = {name: _history(store, run_id, name) for name in wanted} if arm.kind in ("control", "adapted") else {}
    return ArmRun(arm.name, int(run.data.tags["seed"]), run_id, metrics, history, dict(run.data.tags), reused)


def arms_of_runs(store: Store, run_ids: Sequence[str]) -> tuple[list[Arm], list[ArmRun]]:
    """The arms that finished runs make: by their job and method, and by the settings in which they differ. The runs of their
    source models are added. Raises InputError for an id that is no finished run of adapt, pretrain or evaluate."""
    runs = {run_id: _finished(store, run_id) for run_id in run_ids}
    for run in list(runs.values()):
        source = run.data.tags.get("dann.source_run_id")
        if source is not None and source not in runs and _kind(run) != "source_only":
            runs[source] = _finished(store, source)
    kinds: dict[str, Kind] = {run_id: _kind(run) for run_id, run in runs.items()}
    if "adapted" not in kinds.values():
        raise InputError("runs names no adaptation run, so there is nothing to judge; add one (`runs` lists some).")
    groups: dict[tuple[Kind, str, tuple], list[str]] = {}
    for run_id, run in runs.items():
        settings = _settings(run)
        groups.setdefault((kinds[run_id], _method(run), tuple(sorted(settings.items()))), []).append(run_id)
    arms, found = [], []
    for (kind, method, settings), members in sorted(groups.items(), key=lambda group: _order(group[0][0])):
        alike = [dict(other[2]) for other in groups if other[:2] == (kind, method) and other[2] != settings]
        differing = {key: value for key, value in settings if any(one.get(key) != value for one in alike)}
        name = NAMES.get(kind) or {"dann": "DANN"}.get(method, method)
        if differing:
            name += ": " + ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in differing.items())
        seeds = [runs[run_id].data.tags["seed"] for run_id in members]
        if len(set(seeds)) < len(seeds) and kind != "source_only":
            raise InputError(
                f"runs holds two runs of one arm ({name}) with one seed: {members}, seeds {seeds}; keep one a seed."
            )
        arm = Arm(name, kind, differing)
        arms.append(arm)
        if kind == "source_only":  # one model may be the start of several seeds
            found += [replaced(read_run(store, run_id, arm, True), seed=seed) for seed, run_id in _starts(runs).items()]
        else:
            found += [read_run(store, run_id, arm, reused=True) for run_id in members]
    for kind in ("source_only", "control"):
        names = [arm.name for arm in arms if arm.kind == kind]
        if len(names) > 1:
            raise InputError(
                f"runs holds {len(names)} different {NAMES[kind]}s ({names}); compare runs of one source model's settings."
            )
    return arms, found


def config_of(store: Store, run_id: str) -> Config | None:
    """The settings that a run keeps as `config.yaml`; None where they cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return load_config(Path(store.client.download_artifacts(run_id, "config.yaml", folder)))
        except StoreAway:
            raise
        except Exception as error:  # whatever the artifact store raises
            log.warning("run %s gives no config.yaml (%s).", run_id, error)
            return None


def _finished(store: Store, run_id: str) -> Any:
    run = known_run(store, run_id)
    if run is None:
        raise InputError(f"runs names {run_id!r}, which the tracking store does not have; see tracking.uri.")
    job = run.data.tags.get("dann.job")
    if job not in ("adapt", "trial", "pretrain", "evaluate") or "seed" not in run.data.tags:
        raise InputError(f"runs names {run_id}, a run of {job or 'something else'}; give runs of adapt (and evaluate).")
    if run.info.status != "FINISHED":
        raise InputError(f"runs names {run_id}, whose status is {run.info.status}; give finished runs.")
    return run


def _starts(runs: Mapping[str, Any]) -> dict[int, str]:
    """Seed of an adaptation run -> the run of the model that it started from."""
    starts: dict[int, str] = {}
    for run in runs.values():
        source = run.data.tags.get("dann.source_run_id")
        if _kind(run) in ("control", "adapted") and source is not None:
            seed = int(run.data.tags["seed"])
            if starts.setdefault(seed, source) != source:
                raise InputError(
                    f"runs of seed {seed} start from different source models ({starts[seed]}, {source}); compare runs that "
                    "start from one."
                )
    return starts


def _kind(run: Any) -> Kind:
    tags = run.data.tags
    if tags.get("dann.kind") in KINDS:  # a run that `compare` made
        return tags["dann.kind"]
    if tags["dann.job"] == "pretrain":
        return "source_only"
    if tags["dann.job"] == "evaluate":
        return "statistics" if tags.get("dann.batchnorm") == "target_stats" else "source_only"
    return "control" if tags.get("dann.method") == "lambda_zero" else "adapted"


def _method(run: Any) -> str:
    return run.data.tags.get("dann.method", "")


def _settings(run: Any) -> dict[str, str]:
    """The settings that tell arms apart; of what is not adapted, none."""
    if _kind(run) in ("source_only", "statistics"):
        return {}
    params = {
        key.removeprefix(PARAM_PREFIX): value for key, value in run.data.params.items() if key.startswith(PARAM_PREFIX)
    }
    return {key: value for key, value in params.items() if not key.startswith(NOT_THE_ARM)}


def _order(kind: str) -> int:
    return KINDS.index(kind)


def _history(store: Store, run_id: str, name: str) -> list[tuple[int, float]]:
    points = store.client.get_metric_history(run_id, name)
    points = sorted(points, key=lambda point: (point.step, point.timestamp))
    return [(point.step, point.value) for point in points if math.isfinite(point.value)]
