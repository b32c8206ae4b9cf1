"""The newest runs side by side: the source model, the lambda = 0 control, and whatever adapted it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dann_experiments.config import Config, InputError
from dann_experiments.config.comparison import ARM_NAMES
from dann_experiments.tracking.store import local_artifact_folder, open_store

if TYPE_CHECKING:
    import pandas as pd

ROW_NAMES = {
    "source_only": ARM_NAMES["source_only"],
    "lambda_zero": ARM_NAMES["control"],
    "dann": ARM_NAMES["adapted"],
}
"""By the method's name, in the table's order."""


@dataclass(frozen=True)
class Overview:
    """A table of runs that share one source model, and where their files are."""

    table: pd.DataFrame
    """Index: arm; columns: run_id, seed and every `iou/...` value; order: source model, control, others."""
    artifacts: dict[str, str]
    """Arm -> folder of its run's files, for those on this machine."""
    experiment_id: str


def overview(config: Config) -> Overview:
    """The newest adaptation run, the newest run of every other method from the same source model, and that model's run."""
    import pandas as pd

    store = open_store(config.tracking.uri, config.tracking.experiment, to_write=False)
    wanted = "tags.`dann.job` = 'adapt' and attributes.status = 'FINISHED'"
    runs = store.client.search_runs([store.experiment_id], wanted, order_by=["attributes.start_time DESC"])
    if not runs:
        raise InputError(
            f"experiment {config.tracking.experiment!r} has no finished adaptation run; make one (`adapt`), or give "
            "--tracking.experiment."
        )
    arms = {}
    for run in runs:
        if _basis(run) == _basis(runs[0]):
            arms.setdefault(run.data.tags["dann.method"], run)
    source_run_id = runs[0].data.tags.get("dann.source_run_id")
    if source_run_id is not None and "source_only" not in arms:
        source = store.client.get_run(source_run_id)
        if source.data.tags.get("dann.job") == "pretrain":
            arms["source_only"] = source
    rows = {}
    order = [*[name for name in ROW_NAMES if name in arms], *[name for name in arms if name not in ROW_NAMES]]
    for method in order:
        run = arms[method]
        scores = {name: value for name, value in run.data.metrics.items() if _is_score(name)}
        rows[ROW_NAMES.get(method, method)] = {
            "run_id": run.info.run_id,
            "seed": run.data.tags.get("seed", ""),
            **scores,
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    scores_in_order = sorted((name for name in table.columns if _is_score(name)), key=_score_order)
    folders = {arm: local_artifact_folder(store, str(row["run_id"])) for arm, row in rows.items()}
    artifacts = {arm: str(folder) for arm, folder in folders.items() if folder is not None}
    return Overview(table.reindex(columns=["run_id", "seed", *scores_in_order]), artifacts, store.experiment_id)


def _basis(run: Any) -> tuple[str | None, frozenset[tuple[str, str]]]:
    """What runs must share to stand in one table: the source model and every data set."""
    sets = frozenset((item.tags[0].value, item.dataset.digest) for item in run.inputs.dataset_inputs)
    return run.data.params.get("cfg.domain_adaptation.pretrained_checkpoint.path"), sets


def _is_score(metric: str) -> bool:
    return metric.startswith("iou/") and metric.endswith(("_val", "_test"))


def _score_order(metric: str) -> tuple[bool, bool]:
    return metric.endswith("_test"), "target" in metric
