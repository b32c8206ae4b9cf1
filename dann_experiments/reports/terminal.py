"""Prints tables and results on the terminal, with rich."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import HEAVY_HEAD, SIMPLE, Box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dann_experiments.names import SOURCE_VAL, TARGET_VAL, Metric, SetName
from dann_experiments.tracking.notes import floor_beside, near_floors
from dann_experiments.tracking.saved_views import address
from dann_experiments.tracking.store import TRAINING_PAGES, without_secrets

if TYPE_CHECKING:
    import pandas as pd

Scores = Mapping[str, float]
"""Metric -> value."""


def ui_command(uri: str) -> str:
    """Return how to open the MLflow UI of a store: the address of a server, otherwise a command. Passwords are left out."""
    uri = without_secrets(uri)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def where_to_look(uri: str) -> str:
    """Return `ui_command` with a hint where the runs are: MLflow 3.17 opens its GenAI pages, which do not show them."""
    return f"{ui_command(uri)} (there: Model training, at the top left)"


def print_views(uri: str, views: Mapping[str, str]) -> None:
    """Print where MLflow shows saved views: title -> page (a fragment of an address)."""
    for title, page in views.items():
        print(f"{title} {address(uri, page)}")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], box: Box = HEAVY_HEAD) -> None:
    """Print a table: the first column aligned left, the others right."""
    table = Table(title=escape(title), box=box, padding=(0, 1, 0, 0) if box is SIMPLE else (0, 1))
    for place, name in enumerate(columns):
        label = place == 0
        table.add_column(
            escape(name), justify="left" if label else "right", no_wrap=label and box is SIMPLE, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def cell(value: float | None, form: str = ".3f", factor: float = 1) -> str:
    """Return a number as the text of a cell; empty for None and NaN."""
    return "" if value is None or value != value else f"{factor * value:{form}}"


MOST_COLUMNS = 5  # of scores in a table; more would be broken on a terminal of 80 characters


def print_scores(title: str, rows: Mapping[str, Scores]) -> None:
    """Print the IoUs of a run, one row per label, with their floors, then its classes; rows without metrics are left out.

    Says of a final score that is near its floor that it means nothing."""
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores if name.startswith(Metric.IOU)))
    table = [
        *([label, *(cell(scores.get(name)) for name in names)] for label, scores in rows.items() if scores),
        *_floor_rows({name: floor_beside(scores, name) for scores in rows.values() for name in names}),
    ]
    if len(names) <= MOST_COLUMNS:
        print_table(title, ["", *names], table)
    else:  # turned
        heads, *columns = ([row[number] for row in table] for number in range(len(names) + 1))
        print_table(title, ["", *heads], ([name, *cells] for name, cells in zip(names, columns, strict=True)))
    before, after = rows.get("before", {}), rows.get("after", {})
    for line in near_floors(after):
        print(line)
    if after:
        _print_classes(before, after)


def _floor_rows(floors: Scores, factor: float = 1, form: str = ".3f") -> list[list[str]]:
    """Return the row of the floors; none if they are not known."""
    cells = [cell(value, form, factor) for value in floors.values()]
    return [["floor", *cells]] if any(cells) else []


def _print_classes(before: Scores, after: Scores) -> None:
    """Print IoU, average precision and shares per class of each set of the target, else of each set of the source."""
    names = [name.removeprefix(Metric.IOU) for name in after if math.isfinite(floor_beside(after, name))]
    for name in [one for one in names if one.startswith("target")] or names:
        share = f"{Metric.SHARE}{name}/"
        labels = [metric.removeprefix(share) for metric in after if metric.startswith(share)]
        iou, ranked = Metric.class_iou(name, ""), f"{Metric.AVERAGE_PRECISION}{name}/"
        columns = {
            "IoU before": (before, iou), "IoU": (after, iou), "average precision": (after, ranked),
            "predicted share": (after, share), "true share": (after, f"{Metric.TRUE_SHARE}{name}/"),
        }  # fmt: skip
        shown = {title: of for title, of in columns.items() if any(of[1] + label in of[0] for label in labels)}
        print_table(
            f"classes of {name}",
            ["", *shown],
            ([label, *(cell(values.get(start + label)) for values, start in shown.values())] for label in labels),
        )
    unlabeled, known = f"{Metric.SHARE}{TARGET_VAL}/", f"{Metric.TRUE_SHARE}{SOURCE_VAL}/"
    labels = [metric.removeprefix(unlabeled) for metric in after if metric.startswith(unlabeled)]
    if labels and str(TARGET_VAL) not in names:
        print_table(
            "classes of the target, which has no labels: are its predicted shares plausible?",
            ["", "predicted share", "true share in the source"],
            ([label, cell(after.get(unlabeled + label)), cell(after.get(known + label))] for label in labels),
        )


def print_label_curve(curve: Any) -> None:
    """Print the scores of each arm by the number of labeled target images, and where the figure is."""
    rows = []
    for row in curve.table.to_dict("records"):
        spread = cell(row["std"], ".1f", 100)
        score = cell(row["mean"], ".1f", 100) + (f" ± {spread}" if spread else "")
        rows.append([str(row["labels"]), row["arm"], score, str(row["n"]), row["verdict"]])
    title = f"{curve.table['metric'].iloc[0]} in points by labeled target images, mean ± standard deviation"
    print_table(title, ["labels", "arm", "score", "seeds", "verdict"], rows)
    for count, result in curve.results.items():
        for verdict in result.verdicts:
            Console().print(
                f"{count} labels: [bold]{escape(f'{verdict.arm}: {verdict.outcome}.')}[/bold] {escape(verdict.reason)}"
            )
        if result.artifacts:
            print(f"Report of {count} labels: {Path(result.artifacts) / 'report.html'}")
    if curve.artifacts:
        print(f"Figure: {Path(curve.artifacts) / 'figures' / 'labels.png'}")
    print(f"Run {curve.run_id}; {where_to_look(curve.tracking_uri)}")


def print_comparison(comparison: Any, table: pd.DataFrame) -> None:
    """Print the arms of a comparison with their scores, the verdicts and the notes.

    `table`: one row per arm and metric, with the columns `mean`, `std` (fractions) and `n` (seeds).
    """
    scores = [name for name in table["metric"].unique() if name.startswith(Metric.IOU)]
    found = table.set_index(["arm", "metric"])

    def row(arm: str) -> list[str]:
        known = [found.loc[(arm, name)] if (arm, name) in found.index else None for name in scores]
        cells = []
        for one in known:
            spread = "" if one is None else cell(one["std"], ".1f", 100)
            cells.append("" if one is None else cell(one["mean"], ".1f", 100) + (f" ± {spread}" if spread else ""))
        return [arm, *cells, str(max((int(one["n"]) for one in known if one is not None), default=0))]

    title = f"{comparison.title}: IoU points, mean ± standard deviation"
    # a floor is the same in every arm
    records = table.to_dict("records")
    floor_by_name = {str(one["metric"]): float(one["mean"]) for one in records}
    floors = [
        [*one, ""] for one in _floor_rows({name: floor_beside(floor_by_name, name) for name in scores}, 100, ".1f")
    ]
    print_table(title, ["", *scores, "seeds"], [*(row(arm.name) for arm in comparison.arms), *floors])
    start = Metric.class_iou(comparison.metric.removeprefix(Metric.IOU), "")
    classes = [name for name in table["metric"].unique() if comparison.metric and name.startswith(start)]
    if classes:
        means = {(str(one["arm"]), str(one["metric"])): float(one["mean"]) for one in records}
        print_table(
            f"{comparison.metric} by class: IoU points, mean",
            ["", *(name.removeprefix(start) for name in classes)],
            (
                [
                    arm.name,
                    *(cell(means.get((arm.name, name)), ".1f", 100) for name in classes),
                ]
                for arm in comparison.arms
            ),
        )
    for verdict in comparison.verdicts:
        Console().print(f"[bold]{escape(f'{verdict.arm}: {verdict.outcome}.')}[/bold] {escape(verdict.reason)}")
    if comparison.parts is not None:
        print_parts(comparison.parts, comparison.metric)
    if comparison.selection is not None:
        print_table(
            "If the epoch were chosen by ... (docs/selection.md): points of iou/target_val below the best epoch, mean",
            ["", "below the best", "if the source is kept", "rank correlation", "runs"],
            [
                [str(row["score"]), *(cell(row[name], ".1f", 100) for name in ("regret", "regret_kept")),
                 cell(row["spearman"], ".2f"), str(row["groups"])]
                for row in comparison.selection.to_dict("records")
            ],
        )  # fmt: skip
    for note in comparison.notes:
        print(f"Note: {note}")


def print_parts(parts: pd.DataFrame, metric: str) -> None:
    """Print what each part adds: `parts` is the table of `comparison.parts.part_table`."""
    rows = [
        [row["part"], f"{row['arm']} - {row['without']}",
         f"{cell(row['mean'], '+.1f', 100)} ({cell(row['low'], '+.1f', 100)} to {cell(row['high'], '+.1f', 100)})", str(row["n"])]
        for row in parts.to_dict("records")
    ]  # fmt: skip
    print_table(
        f"What each part adds: points of {metric}, mean (95 % interval)", ["part", "arms", "adds", "seeds"], rows
    )


def print_overview(
    table: pd.DataFrame, experiment: str, experiment_id: str, folders: Mapping[str, str], lone_models: int = 0
) -> None:  # fmt: skip
    """Print the newest runs side by side. `table`: one row per arm, with `run_id` and metrics; `folders`: arm -> folder;
    `lone_models`: number of models without a run."""
    scores = [name for name in table.columns if name.startswith(Metric.IOU)]
    rows = [
        [str(arm), *(cell(float(row[name])) for name in scores), str(row["run_id"])[:8]]
        for arm, row in zip(table.index, table.to_dict("records"), strict=True)
    ]
    of_runs = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    known = {
        name: value
        for row in of_runs
        for name, value in row.items()
        if name.startswith(Metric.FLOOR) and value == value
    }
    rows += [[*one, ""] for one in _floor_rows({name: floor_beside(known, name) for name in scores})]
    print_table(f"experiment {experiment}", ["", *scores, "run"], rows)
    print("One seed each: differences of a few points can be chance; `compare` trains every arm with several seeds.")
    seeds = sorted({str(seed) for seed in table["seed"] if seed})
    if len(seeds) > 1:
        print(f"The seeds differ ({', '.join(seeds)}), so part of a difference may be the seed's.")
    for arm, folder in folders.items():
        print(f"Pictures, {arm}: {Path(folder) / 'figures'}")
    if lone_models:
        print(f"{lone_models} of our models in this experiment are left of deleted runs; `doctor` lists them.")
    print(
        f"MLflow UI: make ui, then http://127.0.0.1:5000/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&"
        + TRAINING_PAGES
    )


def print_data_report(report: Any) -> int:
    """Print the report of `check_data`. Return the exit code: 2 if there are problems, else 0."""
    sets = report.counts.T
    of_domains: dict[str, list[str]] = {}
    for name in sets.columns:  # a table for each domain, if one for all would be too wide
        of_domains.setdefault(SetName.parse(name).one.words if len(sets.columns) > MOST_COLUMNS + 1 else "", []).append(
            name
        )
    tables = [
        (f"sets{f' of {words}' * bool(words)} (class shares of labeled pixels)", sets[names].dropna(how="all"))
        for words, names in of_domains.items()
    ]
    for title, frame in [*tables, ("bands, as stored", report.bands)]:
        if frame.size:
            rows = [
                [_label(label), *(cell(value, ".4g" if value % 1 else ".0f") for value in row)]
                for label, row in zip(frame.index, frame.to_numpy(), strict=True)
            ]
            print_table(title, ["", *(str(name).replace("_", " ") for name in frame.columns)], rows)
    for line in (*report.grids, *report.polygons):
        print(line)
    for remark in report.remarks:
        print(f"Look at this: {remark}")
    if report.problems:
        count = len(report.problems)
        print(f"Error: {count} problem{'s' * (count > 1)} with the data:", file=sys.stderr)
        said: set[str] = set()
        for problem in report.problems:
            what, _, way_out = problem.partition("; ")  # a way out is printed once, not for each of many masks
            print(f"  - {what if way_out in said else problem}", file=sys.stderr)
            said.add(way_out)
        return 2
    count = len(report.remarks)
    verdict = (
        f"The data can be used, but {count} thing{'s' * (count > 1)} should be looked at (above)."
        if report.remarks
        else "Nothing is wrong with the data."
    )
    print(verdict)
    if report.artifacts is not None:
        print(f"Figure: {Path(report.artifacts) / 'figures' / 'domains.png'}")
        print(f"Tables: {Path(report.artifacts) / 'tables'}")
    print(f"Run {report.run_id}; {where_to_look(report.tracking_uri)}")
    return 0


def print_export(
    output: Path, tile_size: int | None, multiple_of: int, difference: float, pixels: int, seen: int
) -> None:
    """Print an exported file, the images that it takes, and how far it is from predict: the largest difference of a probability,
    the number of pixels of another class, and that of all pixels compared."""
    print(f"Written: {output}")
    side = (
        f"{tile_size} pixels"
        if tile_size is not None
        else f"any multiple of {multiple_of} pixels, at least {2 * multiple_of}"
    )
    print(
        f"It takes batches of images, bands first, whose sides are {side}: float32, the values as an image file stores them."
    )
    print("It returns the probabilities of the classes. The file's metadata say the rest.")
    print(
        f"Compared with predict on {seen} pixels of drawn images: probabilities differ by up to {difference:.1g}, "
        f"{pixels} pixels have another class."
    )


def print_weak_labels(result: Any, class_names: Sequence[str], by_otsu: bool) -> None:
    """Print the masks that a rule made, their shares, where to look at them, and how to train on them.

    `result`: a `WeakLabelsResult`; `by_otsu`: True if Otsu's method found the threshold.
    """
    for output in result.outputs:
        print(f"Written: {output}")
    found = sorted(set(result.thresholds))
    shown = f"{found[0]:.6g}" if len(found) == 1 else f"{len(found)} of them, {found[0]:.6g} to {found[-1]:.6g}"
    print(f"Threshold: {shown}{' (Otsu)' if by_otsu else ''}")
    labeled = sum(result.class_pixels.values())
    for name, pixels in result.class_pixels.items():
        print(f"  {name}: {pixels / max(labeled, 1):.1%} of the labeled pixels")
    total = max(labeled + sum(result.ignored_pixels.values()), 1)
    for reason, pixels in result.ignored_pixels.items():
        if pixels:
            print(f"  ignored, {reason}: {pixels / total:.1%} of all pixels")
    otsu = ", and Otsu's method finds a threshold even where there is one class only" if by_otsu else ""
    print(
        f"A rule is not the truth: it labels what its index shows, which need not be what the class means{otsu}. Look at the "
        "masks before you train on them:"
    )
    if result.artifacts:
        print(f"  {Path(result.artifacts) / 'figures'}: masks.png, histogram.png")
    print(f"  run {result.run_id}; {where_to_look(result.tracking_uri)}")
    images, masks = (_named_together(paths) for paths in (result.images, result.outputs))
    print(
        f"To train on them, set data.class_names to [{', '.join(class_names)}], have the images in data.target.train, and add:\n"
        f'  --data.target.weak_labels "[{{images: {images}, masks: {masks}}}]" --domain_adaptation.companions "[weak_labels]"'
    )


def _named_together(paths: Sequence[Path]) -> str:
    """Return how a setting names these files: a file, their folder, or a pattern for several folders."""
    paths = [path.absolute() for path in paths]  # else they would be relative to the domain's root
    if len(paths) == 1:
        return str(paths[0])
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    below = {path.relative_to(folder).parent for path in paths}
    return str(folder) if below == {Path()} else str(folder / "**" / f"*{paths[0].suffix}")


def print_sync(found: Iterable[Any]) -> int:
    """Print one line per folder of a run as it is sent. Return the exit code: 1 if something could not be sent, else 0."""
    left, count = 0, 0
    for count, leftover in enumerate(found, 1):  # noqa: B007  (the count is needed after the loop)
        print(f"{leftover.run_id}: {leftover.outcome}", flush=True)
        left += leftover.is_left
    print(f"{count} runs had left something; {left} are left." if count else "Nothing was left to send.")
    return 1 if left else 0


def print_health(
    closed: Sequence[str],
    running: int,
    elsewhere: Sequence[str],
    leftovers: Sequence[Path],
    lone_models: Sequence[str] = (),
) -> None:
    """Print the runs that `doctor` closed, those that it cannot check, the remaining folders of runs, and the models whose
    run was deleted."""
    for run_id in closed:
        print(f"{run_id}: its process is gone; closed as KILLED")
    for run_id in elsewhere:
        print(
            f"{run_id}: RUNNING on another machine, or written by something that does not name its process: ask there"
        )
    for path in leftovers:
        whose = "this run, which the store" if path.name in closed else "a run that is running, or that the store"
        print(f"{path}: files of {whose} does not have yet")
    print(f"{len(closed)} runs closed, {running} are really running, {len(leftovers)} folders left.")
    if leftovers:
        print(f"Send them: dann sync --tracking.folder {leftovers[0].parent}")
    for model_id in lone_models:
        print(f"models:/{model_id}: its run was deleted, its files were not")
    if lone_models:
        print("Delete such a model on MLflow's Models page, or keep it: it still loads and predicts.")


def _label(label: Any) -> str:
    return " ".join(map(str, label)) if isinstance(label, tuple) else str(label)
