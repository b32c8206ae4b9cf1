"""How much do a few target labels give? One comparison per number of labeled target images, and a figure over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dann_experiments.comparison.compare import ComparisonResult, compare
from dann_experiments.config import Config, InputError, config_to_yaml, flatten, replace
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.jobs import identity
from dann_experiments.jobs.build import find_data
from dann_experiments.names import DOMAINS, TARGET_LABELLED, Job, Tag
from dann_experiments.reports.plots.labels import draw_label_curve
from dann_experiments.tracking.notes import description, link, run_page
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import local_artifact_folder, open_store

FIGURE, TABLE = "figures/labels.png", "tables/labels.csv"


@dataclass(frozen=True)
class LabelCurve:
    """The comparisons by number of labeled target images."""

    run_id: str
    """The run with the figure and the table."""
    tracking_uri: str
    results: Mapping[int, ComparisonResult]
    table: pd.DataFrame
    """One row per number of labels and arm: labels, arm, n, mean, std of the judged score, and the verdict of adapted arms."""
    artifacts: str | None
    """Folder of the figure and the table, if it is on this machine."""


def compare_labels(config: Config, settings: CompareConfig) -> LabelCurve:
    """Make one comparison for each number of target images in `settings.labelled`, then a figure over all of them.

    Each comparison has its own control with the same labels, its own verdict and report; arms that use no target labels are made
    once. Raises InputError, before anything is trained, for a number above that of the images in data.target.train_labelled, and
    the errors of `compare`.
    """
    counts = sorted(settings.labelled)
    if not config.data.entries(TARGET_LABELLED):
        raise InputError(
            f"labelled is {counts}, but data.target.train_labelled lists no images; name images with masks."
        )
    find_data(
        replace(config, {"data.target.labelled_count": counts[-1]}), [TARGET_LABELLED]
    )  # raises if there are fewer
    single = dataclasses.replace(settings, labelled=[])
    results = {count: compare(replace(config, {"data.target.labelled_count": count}), single) for count in counts}
    metrics = {result.comparison.metric for result in results.values()}
    if len(metrics) > 1 or not all(metrics):
        raise InputError(
            "the comparisons have no common score of the target; add target images with masks for testing."
        )
    table = _table(results, metrics.pop())
    store = open_store(config.tracking.uri, config.tracking.experiment)
    names = [identity.domain_name(config, domain) for domain in DOMAINS]
    title = f"Target labels {' → '.join(names)}"
    tags = {Tag.JOB: Job.COMPARE, Tag.SOURCE: names[0], Tag.TARGET: names[1], "seed": config.seed}
    with tracked_run(store, None, title, tags, Path(config.tracking.folder), use_claimed=False) as run:
        public = identity.public_settings(config, store.experiment)
        run.log_params(flatten(public))
        (run.folder / "config.yaml").write_text(config_to_yaml(public))
        (run.folder / "tables").mkdir()
        table.to_csv(run.folder / TABLE, index=False, float_format="%.6f")
        metric = next(iter(results.values())).comparison.metric
        draw_label_curve(run.folder / FIGURE, table, title, metric, bool(config.data.target.domains))
        pages = [link("figure", run_page(store.experiment_id, run.run_id, FIGURE))]
        pages += [
            link(f"{count} labels", run_page(store.experiment_id, result.run_id)) for count, result in results.items()
        ]
        run.set_tags({Tag.NOTE: description(title, _lines(results), pages)})
    artifacts = local_artifact_folder(store, run.run_id)
    return LabelCurve(run.run_id, store.uri, results, table, None if artifacts is None else str(artifacts))


def _table(results: Mapping[int, ComparisonResult], metric: str) -> pd.DataFrame:
    rows = []
    for count, result in results.items():
        verdicts = {verdict.arm: verdict.outcome for verdict in result.verdicts}
        kinds = {arm.name: arm.kind for arm in result.comparison.arms}
        of_metric = result.table.loc[result.table["metric"] == metric, :]
        rows += [
            {
                "labels": count, "arm": row["arm"], "kind": kinds[row["arm"]], "metric": metric, "n": row["n"],
                "mean": row["mean"], "std": row["std"], "verdict": verdicts.get(row["arm"], ""),
            }
            for row in of_metric.to_dict("records")
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _lines(results: Mapping[int, ComparisonResult]) -> Sequence[str]:
    return [
        f"{count} labels: " + "; ".join(f"{verdict.arm} {verdict.outcome}" for verdict in result.verdicts)
        for count, result in results.items()
    ]
