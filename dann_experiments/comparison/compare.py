"""Did adaptation help? Runs the arms over seeds, or reads existing runs, and writes table, verdict and report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from dann_experiments.comparison.arms import NO_CONTROL, arms_of, cells_of, check_arms, transductive, warn_of_idle
from dann_experiments.comparison.choice import choice_of
from dann_experiments.comparison.collect import PROBES, arms_of_runs, config_of, read_run, with_probe_of_the_start
from dann_experiments.comparison.evidence import feature_clouds, panels
from dann_experiments.comparison.floors import classes_of, floor_notes, floor_of
from dann_experiments.comparison.parts import part_table, rule_notes
from dann_experiments.comparison.report import draw_summary, write_page
from dann_experiments.comparison.result import Arm, ArmRun, Comparison
from dann_experiments.comparison.runner import Done, find_cells, run_cells, run_task
from dann_experiments.comparison.selection_quality import per_epoch_choices, score_quality
from dann_experiments.comparison.verdict import MIN_SEEDS, Verdict, difference_table, judge
from dann_experiments.config import Config, config_to_yaml, flatten
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.store_names import labels_in_store
from dann_experiments.jobs import identity
from dann_experiments.jobs.shared_data import shared_by
from dann_experiments.names import DOMAINS, Job, Metric, Tag
from dann_experiments.reports.mlflow_views import view_of_comparison
from dann_experiments.tracking.fetch_model import digest_of_model, fetched
from dann_experiments.tracking.notes import description, escaped, link, run_page
from dann_experiments.tracking.registry import register
from dann_experiments.tracking.run import TrackedRun, tracked_run
from dann_experiments.tracking.saved_views import View, write_views
from dann_experiments.tracking.stale_runs import close_stale_runs
from dann_experiments.tracking.store import TRAINING_PAGES, Store, local_artifact_folder, open_store, without_secrets
from dann_experiments.workers.pool import Pool, open_pool, refuse_unshared

log = logging.getLogger(__name__)
JUDGED = (Metric.TARGET_TEST_IOU, Metric.TARGET_VAL_IOU)  # the first one that all judged runs have is used
GAPS = (Metric.PROBE_ACCURACY, Metric.DOMAIN_ACCURACY_VAL)
TABLE_SCORES = (Metric.SOURCE_VAL_IOU, Metric.SOURCE_TEST_IOU, Metric.TARGET_VAL_IOU, Metric.TARGET_TEST_IOU)
BESIDE = (
    Metric.CLASS_IOU, Metric.FLOOR, Metric.MEAN_AVERAGE_PRECISION, Metric.AVERAGE_PRECISION, Metric.SHARE, Metric.TRUE_SHARE,
)  # fmt: skip
"""Prefixes of the metrics that the table of scores has beside the mean IoUs."""
SHOWN = (*TABLE_SCORES, *PROBES, *BESIDE)  # names, or prefixes of names, of the metrics in a report
PAGE, SUMMARY = "report.html", "summary.png"


class ComparisonFailed(RuntimeError):
    """Too many runs failed to judge anything. The message gives the causes."""


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison."""

    run_id: str
    tracking_uri: str = field(repr=False)
    comparison: Comparison
    table: pd.DataFrame
    """One row per arm and score: n, mean, std, paired differences (see `difference_table`)."""
    artifacts: str | None
    """Folder of report.html, summary.png and tables/, if it is on this machine."""
    views: Mapping[str, str] = field(default_factory=dict)
    """Saved view of the runs in MLflow: title -> page, as a fragment of an address that starts with `#`."""

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """One verdict per adapted arm; none without target labels."""
        return self.comparison.verdicts


def compare(config: Config, settings: CompareConfig | None = None) -> ComparisonResult:
    """Run every arm of `settings` over its seeds, or read `settings.runs`, and judge by the rule in docs/verdict.md.

    Finished runs are reused. report.html, summary.png and the tables are stored in a separate run.

    Raises InputError for input that the user can correct, if possible before anything is run; ComparisonFailed if no run of an
    adapted arm was finished.
    """
    settings = settings or CompareConfig()
    arms, notes = ([], []) if settings.runs else arms_of(settings, config)
    store = open_store(config.tracking.uri, config.tracking.experiment)
    found, cells, done = [], [], Done()
    close_stale_runs(store, "compare")
    if settings.runs:
        arms, found, notes = arms_of_runs(store, settings.runs)
        notes = [*notes, *_missing(arms), *transductive(arms)]
        config = _config_of_runs(config, store, found, arms)
    else:
        refuse_unshared(settings, "tracking.uri", store.uri)
        seeds = settings.seed_list(config.seed)
        if len(seeds) < MIN_SEEDS:
            log.warning(
                "The verdict needs at least %d seeds; finished runs are reused when you ask for more.", MIN_SEEDS
            )
        log.info("Looking at the settings and the data of %d runs ...", len(arms) * len(seeds))
        cells = cells_of(arms, seeds, config, _given_source(config, store))
        done = find_cells(cells, store)
        warn_of_idle(cells)
    names = [identity.domain_name(config, domain) for domain in DOMAINS]
    tags = {Tag.JOB: Job.COMPARE, Tag.SOURCE: names[0], Tag.TARGET: names[1], "seed": config.seed}
    name, folder = identity.run_name(Job.COMPARE, config), Path(config.tracking.folder)
    missing = [cell for index, cell in enumerate(cells) if index not in done.run_ids]
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as sharing:
        # the workers map what is read for the checks
        decoded = sharing.enter_context(shared_by(settings.launcher, folder)) if missing else None
        check_arms(missing)
        pool = opened.enter_context(_pool_of(settings, config, len(missing)))
        run = opened.enter_context(tracked_run(store, config.tracking.run_name, name, tags, folder, use_claimed=True))
        public = identity.public_settings(config, store.experiment)
        run.log_params(flatten(public))
        (run.folder / "config.yaml").write_text(config_to_yaml(public))
        if cells:
            log.info("%d runs: %d exist, %d to make.", len(cells), len(done.reused), len(missing))
        if pool is not None:
            tracking = {**asdict(config.tracking), "uri": store.uri, "experiment": store.experiment}
            tracking["registered_model_name"] = None  # of all arms, only the best one's model is registered
            tags_of_runs = {Tag.COMPARISON: run.run_id}
            if settings.launcher == "processes":
                pool.logs = run.folder / "logs"
            run_cells(cells, done, store, tracking, tags_of_runs, pool, decoded)
        sharing.close()  # pictures need a few tiles only; a process that shares reads whole sets
        if cells:
            for index, cell in enumerate(cells):
                if index in done.run_ids:
                    found.append(read_run(store, done.run_ids[index], cell.arm, index in done.reused))
                else:
                    notes.append(f"{cell.arm.name}, seed {cell.seed}: no run ({done.failed[index]}).")
            if not any(arm.kind == "adapted" and any(one.arm == arm.name for one in found) for arm in arms):
                raise ComparisonFailed("no run of an adapted arm was finished. " + " ".join(notes))
        comparison = _judged(config, store, arms, with_probe_of_the_start(found, arms), notes)
        table = _table(comparison)
        _write(run, comparison, table, _links(store, comparison))
    if config.tracking.registered_model_name is not None:
        _register(store, config.tracking.registered_model_name, comparison, run.run_id)
    artifacts = local_artifact_folder(store, run.run_id)
    return ComparisonResult(
        run.run_id, store.uri, comparison, table, None if artifacts is None else str(artifacts),
        write_views(store, [_view(comparison)]),
    )  # fmt: skip


def _register(store: Store, name: str, comparison: Comparison, run_id: str) -> None:
    """Register the model of the adapted arm with the best mean among those that helped: that of its run with the median score."""
    helped = {verdict.arm: verdict for verdict in comparison.verdicts if verdict.outcome == "helped"}
    if not helped:
        log.info("No model is registered as %s: no adapted arm helped.", name)
        return
    metric = comparison.metric
    runs = {
        arm: sorted(
            (run for run in comparison.runs_of(arm) if metric in run.metrics), key=lambda run: run.metrics[metric]
        )
        for arm in helped
    }
    best = max(runs, key=lambda arm: statistics.fmean(run.metrics[metric] for run in runs[arm]))
    typical = runs[best][(len(runs[best]) - 1) // 2]
    page = link("Comparison", run_page(store.client.get_run(run_id).info.experiment_id, run_id))
    about = f"{escaped(helped[best].line)} The run with the median {metric} of {len(runs[best])}. {page}"
    register(store, name, typical.run_id, about, {Tag.VERDICT: helped[best].outcome, Tag.COMPARISON: run_id})


def _view(comparison: Comparison) -> View:
    runs = comparison.runs
    by_arm = all(run.tags.get(Tag.ARM) == run.arm for run in runs)
    arms, seeds = len({run.arm for run in runs}), len({run.seed for run in runs})
    return view_of_comparison(comparison.title, arms, seeds, [run.run_id for run in runs], by_arm)


def _pool_of(settings: CompareConfig, config: Config, missing: int) -> contextlib.AbstractContextManager[Pool | None]:
    """Open the pool for `missing` runs; None if there are none."""
    if not missing:
        return contextlib.nullcontext()
    return open_pool(run_task, settings, config.trainer.accelerator, missing)


def _given_source(config: Config, store: Store) -> str | None:
    """Return the digest of the source model that the settings name; None if it is trained here, once per seed."""
    path = config.domain_adaptation.pretrained_checkpoint.path
    if path is None:
        return None
    with fetched(path, store) as (local, run_id):
        return digest_of_model(store, path, local, run_id)


def _config_of_runs(config: Config, store: Store, found: Sequence[ArmRun], arms: Sequence[Arm]) -> Config:
    """Return the settings of the first adapted run with tracking and threads of `config`; `config` if it has none."""
    adapted = {arm.name for arm in arms if arm.kind == "adapted"}
    known = config_of(store, next(run.run_id for run in found if run.arm in adapted))
    if known is None:
        return config
    return dataclasses.replace(known, tracking=config.tracking, threads=config.threads)


def _missing(arms: Sequence[Arm]) -> Iterator[str]:
    """Yield notes about arms that are missing among existing runs."""
    kinds = {arm.kind for arm in arms}
    if "source_only" not in kinds:
        yield (
            "There is no source model among the runs of the store, without which nothing can be judged; score it with evaluate, "
            "once per seed, and add these runs."
        )
    if "control" not in kinds:
        yield NO_CONTROL


def _judged(config: Config, store: Store, arms: Sequence[Arm], runs: Sequence[ArmRun], notes: list[str]) -> Comparison:
    adapted = [arm.name for arm in arms if arm.kind == "adapted"]
    metric = next((name for name in JUDGED if all(name in run.metrics for run in runs if run.arm in adapted)), "")
    scores = {arm.name: {run.seed: run.metrics[metric] for run in runs if run.arm == arm.name and _has(run, metric)}
              for arm in arms}  # fmt: skip
    source, control = (next((arm.name for arm in arms if arm.kind == kind), "") for kind in ("source_only", "control"))
    verdicts, floor = [], math.nan
    if metric:
        floor = floor_of(runs, metric)
        verdicts = [
            judge(
                name, metric, scores[name], scores.get(control, {}), scores.get(source, {}), arms=len(adapted), floor=floor,
                classes=classes_of(runs, metric, config.class_names, (name, control, source)),
            )
            for name in adapted
        ]  # fmt: skip
        notes = [*notes, *floor_notes(arms, scores, metric, floor), *rule_notes(arms, runs, scores)]
    else:
        notes = [*notes, "No target labels: nothing can be judged."]
    notes = [*notes, *_doubts(runs, adapted), *_not_judged(config, metric, runs)]
    parts = part_table(arms, runs, scores) if metric else None
    if parts is not None and len(set(parts["part"])) < 2:  # one part is what the verdicts speak of
        parts = None
    pictured = _median_seed(scores, adapted, runs)
    shown = [arm for arm in arms if arm.kind in ("source_only", "control", "adapted")]
    run_of_arm = {arm.name: run.run_id for arm in shown for run in runs if (run.arm, run.seed) == (arm.name, pictured)}
    features, layer = {}, ""
    if adapted[0] in run_of_arm and config.monitor.probe:
        features, layer = feature_clouds(store, run_of_arm[adapted[0]])
    names = [identity.domain_name(config, domain) for domain in DOMAINS]
    return Comparison(
        title=" → ".join(names), arms=arms, runs=runs, class_names=config.class_names,
        ignore_index=config.data.ignore_index, verdicts=verdicts, metric=metric, floor=floor,
        panels=panels(config, store, run_of_arm), panel_seed=pictured, features=features, feature_layer=layer,
        selection=_selection(runs, adapted), domains=len(config.data.domains), notes=notes,
        parts=parts, choice=choice_of(config, store, arms, runs) if len(adapted) > 1 or not metric else None,
    )  # fmt: skip


def _not_judged(config: Config, metric: str, runs: Sequence[ArmRun]) -> Iterator[str]:
    """Yield a note about target domains that the judged score does not cover."""
    names = [one.name for one in config.data.of_role("target") if one.name is not None]
    missing = [name for name in names if not any(_has(run, f"{metric}.{name}") for run in runs)]
    if metric and missing:
        yield (
            f"{metric} is the mean over {len(names) - len(missing)} of {len(names)} target domains: {' and '.join(missing)} "
            f"{'has' if len(missing) == 1 else 'have'} no such images, so the verdict does not speak of "
            f"{'it' if len(missing) == 1 else 'them'}."
        )


def _has(run: ArmRun, metric: str) -> bool:
    return math.isfinite(run.metrics.get(metric, math.nan))


def _median_seed(scores: Mapping[str, Mapping[int, float]], adapted: Sequence[str], runs: Sequence[ArmRun]) -> int:
    """Return the seed with the median score of the first adapted arm: pictures of the best seed would be too optimistic."""
    of_first = scores[adapted[0]]
    if not of_first:
        return min(run.seed for run in runs if run.arm in adapted)
    middle = statistics.median_low(of_first.values())
    return min(seed for seed, score in of_first.items() if score == middle)


def _selection(runs: Sequence[ArmRun], adapted: Sequence[str]) -> pd.DataFrame | None:
    """Return how well each label-free score ranks the epochs of the adapted runs, and the IoU lost by choosing with it."""
    choices = [per_epoch_choices(run.history, run.run_id) for run in runs if run.arm in adapted]
    choices = [one.loc[one["step"] > 0, :] for one in choices if len(one)]  # the warm start has no checkpoint to choose
    choices = [one for one in choices if len(one) > 1]
    return score_quality(pd.concat(choices, ignore_index=True), Metric.TARGET_VAL_IOU) if choices else None


def _doubts(runs: Sequence[ArmRun], adapted: Sequence[str]) -> Iterator[str]:
    """Yield notes that a reader of the report needs."""
    for run in runs:
        bad = [name for name in run.metrics if name.startswith(SHOWN) and not _has(run, name)]
        if bad:
            yield f"{run.arm}, seed {run.seed}: {', '.join(sorted(bad))} of run {run.run_id} is no finite number and is left out."
    if any(run.tags.get(Tag.SELECTED_WITH_TARGET_LABELS) == "true" for run in runs if run.arm in adapted):
        yield "Checkpoints or settings of these runs were chosen by target labels: scores on the same labels are too optimistic."
    weak = list(dict.fromkeys(run.arm for run in runs if Tag.WEAK_LABELS in run.tags and run.arm in adapted))
    if weak:
        yield (
            f"{' and '.join(weak)} use{'s' * (len(weak) == 1)} weak target labels, masks that are not truth: they learn these, "
            "right or wrong. Compare them with the masks themselves, and look at the pictures."
        )
    commits = {run.tags.get("mlflow.source.git.commit", "")[:9] for run in runs} - {""}
    if len(commits) > 1:
        yield f"The runs were made with {len(commits)} versions of the code: {', '.join(sorted(commits))}."
    fell = [run for run in runs if run.tags.get(Tag.FORGOT_SOURCE) == "true" and run.arm in adapted]
    for came_back, what in (
        (False, "forgot the source: iou/source_val fell by more than"),
        (True, "lost much of the source in between, but not at the end: iou/source_val once fell by more than"),
    ):
        arms = dict.fromkeys(run.arm for run in fell if (run.metrics.get(Metric.SOURCE_KEPT) == 1) == came_back)
        if arms:
            yield f"Runs of {', '.join(arms)} {what} monitor.forgetting_threshold."
    warned = [run for run in runs if Tag.GUARD in run.tags]
    for arm in dict.fromkeys(run.arm for run in warned):  # the control's as well
        texts = {run.seed: run.tags[Tag.GUARD] for run in sorted(warned, key=lambda run: run.seed) if run.arm == arm}
        seeds, text = ", ".join(map(str, texts)), next(iter(texts.values()))
        several = f"s {seeds}; in seed {next(iter(texts))}" if len(texts) > 1 else f" {seeds}"
        yield f"The guard warned in {arm}, seed{several}: {text} (docs/guards.md)."


def _table(comparison: Comparison) -> pd.DataFrame:
    frame = pd.DataFrame(
        [
            {"arm": run.arm, "seed": run.seed, "metric": name, "value": value}
            for arm in comparison.arms
            for run in comparison.runs_of(arm.name)
            for name, value in sorted(run.metrics.items(), key=_order)
            if name in TABLE_SCORES or name.startswith(BESIDE)
        ],
        columns=["arm", "seed", "metric", "value"],
    )
    kinds = {arm.kind: arm.name for arm in comparison.arms if arm.name in set(frame["arm"])}
    table = difference_table(frame, kinds.get("source_only"), kinds.get("control"))
    return table if len(table) else pd.DataFrame(columns=["arm", "metric", "n", "mean", "std"])  # no labels at all


def _order(item: tuple[str, float]) -> tuple[int, str]:
    name = item[0]
    return (TABLE_SCORES.index(name) if name in TABLE_SCORES else len(TABLE_SCORES), name)


def _links(store: Store, comparison: Comparison) -> dict[str, str]:
    """Return run id -> address of the run on a tracking server; empty for other stores."""
    if not store.uri.startswith(("http://", "https://")):
        return {}
    server = without_secrets(store.uri).rstrip("/")
    return {run.run_id: f"{server}/{run_page(store.experiment_id, run.run_id)}" for run in comparison.runs}


def _write(run: TrackedRun, comparison: Comparison, table: pd.DataFrame, links: Mapping[str, str]) -> None:
    """Write report and tables, and log metrics and tags of the comparison's run."""
    tables = run.folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    table.to_csv(tables / "scores.csv", index=False, float_format="%.6f")
    if comparison.parts is not None:
        comparison.parts.to_csv(tables / "parts.csv", index=False, float_format="%.6f")
    kinds = {arm.name: arm.kind for arm in comparison.arms}
    if comparison.choice is not None:
        comparison.choice.table.to_csv(tables / "choice.csv", index=False, float_format="%.6f")
        run.set_tags({Tag.CHOICE: comparison.choice.arm or "none"})
    rows = [
        {"arm": one.arm, "kind": kinds[one.arm], "seed": one.seed, "run_id": one.run_id, "reused": one.reused,
         **{name: one.metrics[name] for name in (*TABLE_SCORES, *GAPS) if _has(one, name)}}
        for one in comparison.runs
    ]  # fmt: skip
    pd.DataFrame(rows).dropna(axis="columns", how="all").to_csv(tables / "runs.csv", index=False, float_format="%.6f")
    if comparison.selection is not None:
        comparison.selection.to_csv(tables / "selection.csv", index=False, float_format="%.6f")
    metrics = {}
    called = labels_in_store([arm.name for arm in comparison.arms])
    for row in table.to_dict("records"):
        if row["metric"] in TABLE_SCORES:
            name = f"compare/{row['metric'].removeprefix('iou/')}/{called[row['arm']]}"
            metrics |= {f"{name}/mean": row["mean"], f"{name}/std": row["std"]}
    metrics |= {Metric.floor(name.removeprefix(Metric.IOU)): floor_of(comparison.runs, name) for name in TABLE_SCORES}
    run.log_metrics({name: value for name, value in metrics.items() if value == value}, step=0)
    lines = [verdict.line for verdict in comparison.verdicts] or list(comparison.notes)
    (run.folder / "verdict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    outcomes = "; ".join(f"{verdict.arm}: {verdict.outcome}" for verdict in comparison.verdicts)
    made = f"#/experiments/{run.store.experiment_id}/runs?searchFilter=" + quote(
        f"tags.`{Tag.COMPARISON}` = '{run.run_id}'", safe=""
    )
    pages = {
        "report": run_page(run.store.experiment_id, run.run_id, PAGE),
        "runs made for it": f"{made}&{TRAINING_PAGES}",
    }
    pages |= {"summary": run_page(run.store.experiment_id, run.run_id, SUMMARY)}
    said = description(
        f"Comparison {comparison.title}", [outcomes or "no target labels"], [link(*page) for page in pages.items()]
    )
    run.set_tags(
        {
            Tag.VERDICT: outcomes or "no target labels",
            Tag.NOTE: "\n\n".join([said, *(escaped(line) for line in lines)]),
        }
    )
    write_page(run.folder / PAGE, comparison, links)
    draw_summary(run.folder / SUMMARY, comparison)
