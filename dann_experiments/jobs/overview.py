"""Compares the newest runs: the source model, the lambda = 0 control, and all adaptations of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dann_experiments.config import Config, InputError
from dann_experiments.jobs.identity import METHOD_WORDS
from dann_experiments.names import Job, Key, Metric, Tag
from dann_experiments.tracking.logged_model import models_without_run
from dann_experiments.tracking.run import PARAM_PREFIX
from dann_experiments.tracking.store import Store, found_runs, local_folder, open_store, quoted, without_secrets
from dann_experiments.tracking.values import context_of, last_values

if TYPE_CHECKING:
    import pandas as pd

ADAPTED = "tags.`dann.job` = 'adapt' and attributes.status = 'FINISHED'"
SOURCE_PARAM = f"{PARAM_PREFIX}{Key.SOURCE_MODEL}"
PREFIX_PARAM = f"{PARAM_PREFIX}{Key.SOURCE_PREFIX}"  # older runs, from before this setting existed, lack it


@dataclass(frozen=True)
class Overview:
    """A table of runs that share one source model, and the folders of their files."""

    table: pd.DataFrame
    """Index: arm, in the order source model, control, others; columns: run_id, seed and every `iou/...` value, then its
    `floor/...`."""
    artifacts: dict[str, str]
    """Arm -> folder of its run's files, if that is on this machine and there."""
    experiment_id: str
    experiment: str
    """Name of the experiment."""
    models_without_run: int = 0
    """Number of our models in the experiment whose run was deleted; `doctor` lists them."""


def overview(config: Config) -> Overview:
    """Return the newest run of each method from the source model of the newest adaptation run, and that model's run. Raises
    InputError if the experiment has no finished adaptation run."""
    import pandas as pd

    store = open_store(config.tracking.uri, config.tracking.experiment, for_runs=False, to_write=False)
    experiments = [store.experiment_id] if store.experiment_id else []
    newest = next(found_runs(store, experiments, ADAPTED, page=1), None) if experiments else None
    if newest is None:
        names = _with_adaptations(store)
        elsewhere = f" ({', '.join(names)} {'has' if len(names) == 1 else 'have'} some)" if names else ""
        raise InputError(
            f"experiment {store.experiment!r} of {without_secrets(store.uri)} has no finished adaptation run; make one "
            f"(`adapt`), or set --tracking.experiment{elsewhere}."
        )
    arms = _newest_of_each_method(store, newest)
    source_run_id = newest.data.tags.get(Tag.SOURCE_RUN_ID)
    if source_run_id is not None and "source_only" not in arms:
        source = store.client.get_run(source_run_id)
        if source.data.tags.get(Tag.JOB) == Job.PRETRAIN:
            arms["source_only"] = source
    rows = {}
    order = [*[name for name in METHOD_WORDS if name in arms], *[name for name in arms if name not in METHOD_WORDS]]
    weak = {method: " (uses weak target labels)" * (Tag.WEAK_LABELS in arms[method].data.tags) for method in order}
    called = {method: METHOD_WORDS.get(method, method) + weak[method] for method in order}
    for method in order:
        run = arms[method]
        scores = {name: value for name, value in last_values(run).items() if _is_score(name)}
        rows[called[method]] = {
            "run_id": run.info.run_id,
            "seed": run.data.tags.get("seed", ""),
            **scores,
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    scores_in_order = sorted((name for name in table.columns if _is_score(name)), key=_score_order)
    folders = {called[method]: local_folder(arms[method].info.artifact_uri) for method in order}
    artifacts = {arm: str(folder) for arm, folder in folders.items() if folder is not None and folder.is_dir()}
    columns = ["run_id", "seed", *scores_in_order]
    lone = len(models_without_run(store, experiments))
    return Overview(table.reindex(columns=columns), artifacts, store.experiment_id, store.experiment, lone)


def _with_adaptations(store: Store) -> list[str]:
    """Return the experiments that have finished adaptation runs; `mlflow run` without --experiment-name uses `Default`."""
    known = store.client.search_experiments()
    return [one.name for one in known if any(True for _ in found_runs(store, [one.experiment_id], ADAPTED, page=1))]


def _newest_of_each_method(store: Store, newest: Any) -> dict[str, Any]:
    """Return method -> its newest run with the same basis as run `newest`, newest first. The store searches for one after the
    other, so that only a few runs are fetched, however many it has."""
    basis = _basis(newest)
    source, _, sets = basis
    wanted = [ADAPTED, *(f"dataset.digest = '{digest}'" for digest in sorted({digest for _, digest in sets}))]
    said = None if source is None else quoted(source)
    if said is not None:
        wanted.append(f"params.`{SOURCE_PARAM}` = {said}")
    arms: dict[str, Any] = {}
    found = newest
    while found is not None:
        method = found.data.tags[Tag.METHOD]
        arms[method] = found
        said = quoted(method)
        if said is not None:
            wanted.append(f"tags.`dann.method` != {said}")
        others = found_runs(store, [store.experiment_id], " and ".join(wanted), page=10)
        # checked again here: a filter cannot express all conditions
        fitting = (run for run in others if _basis(run) == basis and run.data.tags[Tag.METHOD] not in arms)
        found = next(fitting, None)
    return arms


def _basis(run: Any) -> tuple[str | None, str, frozenset[tuple[str, str]]]:
    """Return what runs in one table must share: the source model, which network of its file, and every data set."""
    sets = frozenset((context_of(item), item.dataset.digest) for item in run.inputs.dataset_inputs)
    params = run.data.params
    return params.get(SOURCE_PARAM), params.get(PREFIX_PARAM, "None"), sets


def _is_score(metric: str) -> bool:
    return metric.startswith((Metric.IOU, Metric.FLOOR)) and metric.endswith(("_val", "_test"))


def _score_order(metric: str) -> tuple[bool, bool, bool]:
    return metric.startswith(Metric.FLOOR), metric.endswith("_test"), "target" in metric
