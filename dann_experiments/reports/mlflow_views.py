"""What the saved views of this project show in MLflow: did adaptation help, is DANN working, and the trials of a sweep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from dann_experiments.names import Domain, Job, Metric, Tag
from dann_experiments.tracking.saved_views import Chart, View
from dann_experiments.tracking.store import quoted

ADAPTATION, TRAINING = "Did adaptation help?", "Is DANN working?"
ADAPTED = f"tags.`{Tag.JOB}` = '{Job.ADAPT}'"
FINISHED = (
    "attributes.status = 'FINISHED'"  # a killed run has scores of some epoch, which would move the mean of its method
)
TARGET_FIRST = (Metric.TARGET_VAL_IOU, Metric.TARGET_TEST_IOU, Metric.SOURCE_VAL_IOU, Metric.SOURCE_TEST_IOU)
SCORES = (
    (
        "Target and source over training",
        [Chart("LINE", [Metric.TARGET_VAL_IOU]), Chart("LINE", [Metric.SOURCE_VAL_IOU])],
    ),
    ("Final scores", [Chart("BAR", [name]) for name in (*TARGET_FIRST, Metric.GAP)]),
)
GAME = (
    ("The domain classifier", [
        Chart("LINE", [name])
        for name in (Metric.DOMAIN_ACCURACY, Metric.DOMAIN_ACCURACY_VAL, Metric.LAMBDA, Metric.DOMAIN_LOSS)
    ]),
    ("Can a new classifier distinguish the domains?", [
        Chart("LINE", [name]) for name in (Metric.PROBE_ACCURACY, Metric.A_DISTANCE)
    ]),
    ("Losses", [
        Chart("LINE", [name])
        for name in (
            Metric.SEGMENTATION_LOSS, Metric.ADAPTATION_LOSS, Metric.val_loss("target"), Metric.val_loss("source")
        )
    ]),
)  # fmt: skip
OF_SCORES, OF_GAME = SCORES[0], GAME[0]


def views_of_adaptation(domains: Mapping[Domain, str], data: str) -> list[View]:
    """Return the views of an experiment with adaptation runs from one source to one target: their scores, averaged over the seeds
    of each method, and what the domain classifier does in each run. `domains`: the names of both; `data`: the runs' tag
    `dann.data_digest`, since other data may have the same names, such as those of the folders source and target."""
    wanted = [ADAPTED, f"tags.`{Tag.DATA_DIGEST}` = '{data}'"]
    for tag, domain in ((Tag.SOURCE, domains["source"]), (Tag.TARGET, domains["target"])):
        name = quoted(domain)
        wanted += [] if name is None else [f"tags.`{tag}` = {name}"]
    pair = f"{domains['source']} → {domains['target']}"
    key = _digest([domains["source"], domains["target"], data])
    return [
        View(
            key=f"dann-adaptation-{key}",
            name=f"{ADAPTATION} {pair}",
            sections=[*SCORES, OF_GAME],
            group_by=[Tag.METHOD],
            wanted=" and ".join([*wanted, FINISHED]),
            metric_columns=TARGET_FIRST,
        ),
        View(
            key=f"dann-training-{key}",
            name=f"{TRAINING} {pair}",
            sections=[*GAME, OF_SCORES],
            wanted=" and ".join(wanted),
            metric_columns=[Metric.TARGET_VAL_IOU, Metric.DOMAIN_ACCURACY_VAL, Metric.PROBE_ACCURACY],
            tag_columns=[Tag.METHOD, "seed"],
        ),
    ]


def view_of_comparison(title: str, arms: int, seeds: int, runs: Sequence[str], by_arm: bool) -> View:
    """Return the view of a comparison, with one line and one bar per arm: the mean over its seeds.

    `title`: source and target; `runs`: ids of the compared runs; `by_arm`: whether each run has its arm as a tag, which runs that
    other jobs made lack. They are then grouped by their method, without the source model."""
    listed = ", ".join(f"'{run_id}'" for run_id in runs)
    return View(
        key=f"dann-compare-{_digest(sorted(runs))}",
        name=f"{ADAPTATION} {title}, {arms} arm{'s' * (arms != 1)}, {seeds} seed{'s' * (seeds != 1)}",
        sections=[*SCORES, *GAME],
        group_by=[Tag.ARM if by_arm else Tag.METHOD],
        wanted=f"attributes.run_id IN ({listed})",
        metric_columns=TARGET_FIRST,
        tag_columns=[Tag.ARM, "seed"],
    )


def view_of_sweep(study: str, objective: str, maximizes: bool, params: Sequence[str]) -> View:
    """Return the view of a sweep: a table of its trials, the best first, with the searched settings as columns.

    `params`: the names of these settings in runs. Trials are found by the name of the study, as a sweep that was resumed has
    several runs of its own."""
    name = quoted(study)
    return View(
        key=f"dann-sweep-{_digest([study])}",
        name=f"Sweep {study}",
        sections=[
            ("The search", [Chart("PARALLEL", [objective], params), Chart("BAR", [objective])]),
            *SCORES,
            *GAME,
        ],
        wanted=f"tags.`{Tag.JOB}` = '{Job.TRIAL}'" + ("" if name is None else f" and tags.`{Tag.STUDY}` = {name}"),
        order_by=objective,
        ascending=not maximizes,
        metric_columns=list(dict.fromkeys([objective, *TARGET_FIRST, Metric.SOURCE_DROP])),
        param_columns=params,
        tag_columns=[Tag.ROLE, Tag.PRUNED],
        opens_as="TABLE",
    )  # fmt: skip


def _digest(names: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(names).encode(), digest_size=4).hexdigest()
