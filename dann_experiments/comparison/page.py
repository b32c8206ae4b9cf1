"""A comparison as one HTML page that needs nothing else: no script, font or picture from elsewhere; light, dark and printed.

Letters: K classes, H x W pixels, n seeds.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dann_experiments.comparison import figures
from dann_experiments.comparison.figures import MINUS, MISSING, points, seed_scores
from dann_experiments.comparison.result import Arm, ArmRun, Comparison, Panel
from dann_experiments.comparison.verdict import EXPLAINED_SHARE, MIN_SEEDS, SMALLEST_GAIN, Interval, Verdict, paired

KIND_WORDS = {
    "source_only": "the source model as it is",
    "statistics": "the source model with BatchNorm statistics of the target",
    "control": "target images forwarded, lambda = 0",
    "adapted": "adapted",
    "oracle": "trained with target labels",
}
COMMIT_TAG, ALIGNMENT_TAG = "mlflow.source.git.commit", "dann.alignment"
TILE_SIZE = 224
"""Longest side of a tile in pixels: a page of 12 tiles and 6 arms stays under 3 MB."""
SMALL = 96
"""Tiles up to this size are shown pixel by pixel; larger ones are smoothed by the browser."""

STYLES = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f8fa; --ink: #1f2328; --muted: #656d76; --grid: #d8dee4; --line: #d0d7de;
  --source: #2e4057; --target: #d1495b; --teal: #00798c; --purple: #a05195; --link: #0a5fb4;
  --helped: #00718c; --hurt: #b3261e; --none: #59636e; --explained: #945700; --warn: #fff8e5; --warn-line: #d9a514;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1c2229; --ink: #e6e9ed; --muted: #9aa4af; --grid: #333b44; --line: #39424c;
    --source: #8fb3dd; --target: #f0788a; --teal: #35b3c7; --purple: #cf84c4; --link: #6cb6ff;
    --helped: #4cc3dd; --hurt: #ff8078; --none: #a5afb9; --explained: #f0b04a; --warn: #2b2616; --warn-line: #a8842a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1100px; margin: 0 auto; padding: 2.2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; max-width: 76ch; overflow-wrap: anywhere; }
a { color: var(--link); }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .87em; overflow-wrap: anywhere; }
.over { text-transform: uppercase; letter-spacing: .07em; font-size: .78rem; color: var(--muted); margin: 0 0 .3rem; }
.lead, .read { color: var(--muted); }
.read { font-size: .9rem; margin: .3rem 0 .8rem; max-width: 92ch; }
.verdict {
  --tone: var(--none); margin: 1rem 0; padding: .9rem 1.1rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-left: 6px solid var(--tone); border-radius: 6px; break-inside: avoid;
}
.verdict.helped { --tone: var(--helped); } .verdict.hurt { --tone: var(--hurt); }
.verdict.explained { --tone: var(--explained); }
.verdict h2 { border: 0; margin: 0; padding: 0; font-size: 1.3rem; overflow-wrap: anywhere; }
.verdict h2 .outcome { color: var(--tone); }
.verdict p { margin: .35rem 0 0; max-width: none; }
.numbers { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; margin: .8rem 0 0; }
.numbers div { min-width: 9rem; }
.numbers dt { font-size: .8rem; color: var(--muted); }
.numbers dd { margin: 0; font-variant-numeric: tabular-nums; }
.numbers b { font-size: 1.15rem; }
.numbers small { display: block; color: var(--muted); }
.note {
  background: var(--warn); border: 1px solid var(--warn-line); border-radius: 6px; padding: .55rem .9rem; margin: .6rem 0;
  max-width: none; overflow-wrap: anywhere; break-inside: avoid;
}
.scroll { overflow-x: auto; margin: .6rem 0 .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; width: 100%; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top;
  white-space: nowrap; }
thead th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--line); }
th:first-child, td.text, th.text { text-align: left; }
tbody th { font-weight: 600; white-space: normal; min-width: 8rem; max-width: 20rem; overflow-wrap: anywhere; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
td small, th small { display: block; font-weight: 400; color: var(--muted); font-size: .8rem; }
.judged { background: var(--card); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; }
figure { margin: .8rem 0 0; break-inside: avoid; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem 1.6rem; }
.pair figure { max-width: 620px; } .level { align-items: end; }
.wide { overflow-x: auto; } .wide svg { min-width: 620px; }
.tiles { width: auto; } .tiles th, .tiles td { border: 0; padding: 0 .3rem .45rem 0; text-align: left; vertical-align: top; }
.tiles thead th {
  max-width: var(--side); font-size: .88rem; vertical-align: bottom; white-space: normal; overflow-wrap: anywhere;
}
.tile { position: relative; width: var(--side); }
.tile img { display: block; width: 100%; height: auto; border-radius: 3px; }
.tile.small img { image-rendering: pixelated; }
.tile .right { position: absolute; inset: 0; height: 100%; visibility: hidden; }
#fade:checked ~ .scroll .right { visibility: visible; }
.tiles small { font-size: .78rem; color: var(--muted); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .88rem; margin: .5rem 0; }
.legend .swatch { border: 1px solid var(--muted); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); }
label { font-size: .9rem; }
@media (max-width: 600px) {
  main { padding: 1.3rem .9rem 3rem; } h1 { font-size: 1.5rem; } th, td { padding: .36rem .5rem; }
}
@media print {
  :root {
    color-scheme: light; --paper: #ffffff; --card: #f6f8fa; --ink: #1f2328; --muted: #565d66; --grid: #d8dee4;
    --line: #d0d7de; --source: #2e4057; --target: #d1495b; --teal: #00798c; --purple: #a05195;
    --link: #1f2328; --helped: #00718c; --hurt: #b3261e;
    --none: #59636e; --explained: #945700; --warn: #fff8e5;
  }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } .scroll, .wide { overflow: visible; }
  .wide svg { min-width: 0; } table { font-size: .8rem; } thead code { font-size: .76em; } th, td { padding: .25rem .3rem; }
  thead th, td small { white-space: normal; } tbody th { min-width: 5rem; } h2, h3 { break-after: avoid; }
  .tile { --side: 2.6cm !important; } label, #fade { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def write_page(path: Path, comparison: Comparison, links: Mapping[str, str] = {}) -> None:
    """Write the page of a comparison.

    `links`: run id -> address of the run (`http`, `https`, `file` or relative; others are left out), and `rule` -> address of
    the page that explains the verdict.
    """
    sections = (
        _header, partial(_verdicts, links=links), _notes, _scores, _curves, _tiles, _classes, _gap, _selection,
        partial(_runs, links=links), _settings,
    )  # fmt: skip
    body = "\n".join(part for section in sections if (part := section(comparison)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(comparison.title)}: did adaptation help?</title>\n<style>{STYLES}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


# ---- sections, in the order of the page; each is empty where there is nothing to show


def _header(comparison: Comparison) -> str:
    seeds = sorted({run.seed for run in comparison.runs})
    told = f"{_count(comparison.arms, 'arm')}, {_count(comparison.runs, 'run')}, {_count(seeds, 'seed')}"
    return (
        '<header>\n<p class="over">Did adaptation help?</p>\n'
        f"<h1>{escape(comparison.title.replace('->', '→'))}</h1>\n"
        f'<p class="lead">{told}. Judged by <code>{escape(comparison.metric)}</code>; scores are in IoU points (0 to 100).</p>\n'
        "</header>"
    )


def _verdicts(comparison: Comparison, links: Mapping[str, str]) -> str:
    if not comparison.verdicts:
        return '<section class="verdict"><h2>No adapted arm to judge</h2></section>'
    banners = "\n".join(_banner(verdict) for verdict in comparison.verdicts)
    confidence = f"{comparison.verdicts[0].confidence * 100:.4g} %"
    smallest, share = f"{points(SMALLEST_GAIN):.1f} point", f"{points(EXPLAINED_SHARE):.0f} %"
    link = _link(links["rule"], "The rule in full, and how often it errs.") if "rule" in links else ""
    return (
        f"{banners}\n<details><summary>The rule behind the verdict</summary>\n"
        f"<p>Arms are compared seed by seed: a difference is the mean over seeds, with Student's interval at {confidence}. With "
        f"fewer than {MIN_SEEDS} seeds in common nothing is concluded. <b>Helped</b>: better than source only <em>and</em> "
        f"than the lambda = 0 control, both intervals above 0 and both means at least {smallest}. <b>Hurt</b>: worse than source "
        f"only, interval below 0, by at least {smallest}. <b>Explained by BatchNorm statistics</b>: better than source only, not "
        f"shown to be better than the control, while the control alone gains, interval above 0, at least {share} of it. "
        f"<b>No evidence</b>: everything else; it is not evidence that nothing changed. {link}</p>\n</details>"
    )


def _banner(verdict: Verdict) -> str:
    tones = {"helped": "helped", "hurt": "hurt", "explained by BatchNorm statistics": "explained"}
    numbers = "".join(
        f"<div><dt>{told}</dt><dd><b>{_signed(interval.mean)}</b> points <small>{_ends(interval, verdict.confidence)}</small>"
        "</dd></div>"
        for told, interval in (
            ("against source only", verdict.against_source),
            ("against the control", verdict.against_control),
            ("control against source only", verdict.control_against_source),
        )
        if interval.n
    )
    mark = figures.OUTCOME_MARKS.get(verdict.outcome, "")
    return (
        f'<section class="verdict {tones.get(verdict.outcome, "none")}">\n'
        f'<h2><span class="outcome"><span aria-hidden="true">{mark}</span> {escape(verdict.outcome.capitalize())}</span>: '
        f"{escape(verdict.arm)}</h2>\n<p>{escape(verdict.reason)}</p>\n"
        + (f'<dl class="numbers">{numbers}</dl>\n' if numbers else "")
        + "</section>"
    )


def _notes(comparison: Comparison) -> str:
    return "\n".join(f'<p class="note" role="note"><b>Note.</b> {escape(note)}</p>' for note in comparison.notes)


def _scores(comparison: Comparison) -> str:
    wanted = ("iou/source_val", "iou/target_val", "iou/source_test", "iou/target_test")
    there = {name for run in comparison.runs for name, value in run.metrics.items() if math.isfinite(value)}
    columns = [name for name in wanted if name in there or name in wanted[:2]]
    columns += [comparison.metric] if comparison.metric not in columns else []
    confidence = figures.confidence_of(comparison.verdicts)
    others = [(kind, figures.first_of_kind(comparison.arms, kind)) for kind in ("source_only", "control")]
    others = [(kind, arm) for kind, arm in others if arm is not None]
    head = ["<th>arm</th>"]
    for name in columns:
        judged = name == comparison.metric
        head.append(
            f'<th scope="col"{_judged(judged)}><code>{escape(name)}</code>{"<small>judged</small>" if judged else ""}</th>'
        )
    head += [
        f'<th scope="col">minus {escape(arm.name)}<small>paired, on the judged score</small></th>' for _, arm in others
    ]
    rows = []
    for arm in comparison.arms:
        cells = [_arm_cell(arm, comparison)]
        for name in columns:
            interval = figures.mean_of(seed_scores(comparison, arm.name, name), confidence)
            cells.append(f"<td{_judged(name == comparison.metric)}>{_mean_std(interval)}</td>")
        for _, other in others:
            cells.append(f"<td>{_difference(comparison, arm, other, confidence)}</td>")
        rows.append(cells)
    drawn = [_figure(partial(figures.scores_figure, comparison, confidence), "scores", "Score of each arm and seed",
                     "Dots: one seed each; grey lines join the same seed in neighbouring arms. Diamond and bar: the mean and its "
                     f"{confidence * 100:.4g} % interval.")]  # fmt: skip
    if figures.differences(comparison):
        caption = (
            "Dots: the difference within one seed. Diamond and bar: the mean and its interval. A bar that crosses 0 means that "
            "the seeds leave the sign open."
        )
        draw = partial(figures.differences_figure, comparison)
        drawn.append(_figure(draw, "differences", "Paired differences between arms", caption))
    return (
        f"<section>\n<h2>Scores</h2>\n{_table([''.join(head)], rows)}\n"
        f'<p class="read">Each field: mean ± standard deviation over n seeds, in IoU points. Differences: mean over the seeds '
        f"that both arms have, with its {confidence * 100:.4g} % confidence interval in brackets; an interval that holds 0 does "
        f'not show a difference.</p>\n<div class="pair">\n{chr(10).join(drawn)}\n</div>\n</section>'
    )


def _difference(comparison: Comparison, arm: Arm, other: Arm, confidence: float) -> str:
    if arm.name == other.name:
        return ""
    ours, theirs = (seed_scores(comparison, name, comparison.metric) for name in (arm.name, other.name))
    interval = paired(ours, theirs, confidence)
    if not interval.n:
        return MISSING
    ends = f"[{_signed(interval.low)}, {_signed(interval.high)}]" if math.isfinite(interval.low) else "no interval"
    return f"{_signed(interval.mean)}<small>{ends}, n&nbsp;{interval.n}</small>"


def _curves(comparison: Comparison) -> str:
    arms = [arm for arm in comparison.arms if any(_curved(run) for run in comparison.runs_of(arm.name))]
    arms = [arm for arm in arms if arm.kind in ("control", "adapted")]
    if not arms:
        return ""
    limits = figures.curve_limits(comparison, arms)
    drawn = "\n".join(
        f"<div><h3>{escape(arm.name)}</h3>\n"
        + _figure(partial(figures.curves_figure, comparison, arm, limits), f"curves{number}", f"Curves of {arm.name}")
        + "</div>"
        for number, arm in enumerate(arms)
    )
    return (
        '<section>\n<h2>While training</h2>\n<p class="read">Thick: mean over seeds; thin: each seed; dotted: the warm start '
        "(step 0), which is the source model. Good: the target rises above its dotted line while the source stays on its own. "
        "Domain accuracy of 0.5 (dashed) means that the run's own classifier cannot tell the domains apart, because they are "
        "aligned or because it is weak: the probe below tells which.</p>\n"
        f'<div class="pair level">\n{drawn}\n</div>\n</section>'
    )


def _curved(run: ArmRun) -> bool:
    return any(
        sum(math.isfinite(value) for _, value in run.history.get(f"iou/{domain}_val", ())) > 1
        for domain in ("source", "target")
    )


def _tiles(comparison: Comparison) -> str:
    panels = comparison.panels
    if not panels:
        return ""
    names, count = figures.shown_arms(comparison, panels), len(comparison.class_names)
    with_truth = any(panel.truth is not None for panel in panels)
    head = "".join(
        f'<th scope="col" title="{escape(name)}">{escape(figures.short(name, 36))}</th>'
        for name in ["image", *["truth"] * with_truth, *names]
    )
    rows = []
    for panel in panels:
        cells = [_tile(_picture(panel.image), panel, "image")]
        if with_truth:
            cells.append(
                _tile(_class_picture(panel.truth, count), panel, "truth") if panel.truth is not None else "<td></td>"
            )
        for name in names:
            ids = panel.predictions.get(name)
            cells.append("<td></td>" if ids is None else _predicted_tile(panel, ids, name, count))
        rows.append(cells)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    columns = 1 + with_truth + len(names)
    side = max(min(1060 / columns - 6, 190), 84)
    seed = "" if comparison.panel_seed is None else f", models of seed {comparison.panel_seed}"
    toggle = (
        '<input type="checkbox" id="fade"> <label for="fade">Fade the pixels that are right, so that errors stand out</label>\n'
        if with_truth
        else ""
    )
    ious = " Under each tile: its own mean IoU over the classes in it." if with_truth else ""
    return (
        f'<section>\n<h2>Predictions</h2>\n<p class="read">The same held-out target tiles for every arm{seed}.{ious} They '
        f"illustrate; the scores above count all images.</p>\n{_class_legend(comparison)}\n{toggle}"
        f'<div class="scroll" style="--side: {side:.0f}px"><table class="tiles"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n</section>"
    )


def _predicted_tile(panel: Panel, ids: np.ndarray, name: str, count: int) -> str:
    if panel.truth is None:
        return _tile(_class_picture(ids, count), panel, name)
    known = (panel.truth >= 0) & (panel.truth < count)
    fade = np.zeros((*ids.shape, 4), np.uint8)
    fade[..., :3], fade[..., 3] = 255, np.where((ids == panel.truth) | ~known, 215, 0)
    iou = figures.tile_iou(panel.truth, ids, count)
    return _tile(
        _class_picture(ids, count), panel, name, _png(_scaled(fade)), f"IoU {points(iou):.1f}" if known.any() else ""
    )


def _tile(source: str, panel: Panel, name: str, right: str = "", text: str = "") -> str:
    overlay = f'<img class="right" alt="" src="{right}">' if right else ""
    small = " small" if max(panel.image.shape[:2]) <= SMALL else ""
    told = f"<small>{text}</small>" if text else ""
    return f'<td><div class="tile{small}"><img alt="{escape(name)}" src="{source}">{overlay}</div>{told}</td>'


def _class_legend(comparison: Comparison) -> str:
    colours = figures.distinct_class_colours(len(comparison.class_names))
    entries = [
        _swatch("#" + "".join(f"{round(255 * part):02x}" for part in colour)) + escape(name)
        for colour, name in zip(colours, comparison.class_names, strict=True)
    ]
    if any(panel.truth is not None and (panel.truth == comparison.ignore_index).any() for panel in comparison.panels):
        entries.append(_swatch(figures.IGNORED_COLOUR) + "ignored")
    return f'<div class="legend">{"".join(f"<span>{entry}</span>" for entry in entries)}</div>'


def _classes(comparison: Comparison) -> str:
    if not any(
        len(figures.class_scores(comparison, arm.name, name))
        for arm in comparison.arms
        for name in comparison.class_names
    ):
        return ""
    confidence = figures.confidence_of(comparison.verdicts)
    head = "<th>class</th>" + "".join(f'<th scope="col">{escape(arm.name)}</th>' for arm in comparison.arms)
    rows = []
    for name in comparison.class_names:
        cells = [f'<th scope="row">{escape(name)}</th>']
        for arm in comparison.arms:
            scores = dict(enumerate(figures.class_scores(comparison, arm.name, name)))
            cells.append(f"<td>{_mean_std(figures.mean_of(scores, confidence))}</td>")
        rows.append(cells)
    drawn = _figure(
        partial(figures.classes_figure, comparison), "classes", "IoU of each class and arm",
        "A bar is the mean over seeds, its whisker the standard deviation over seeds, each circle one seed; a dash where a "
        "class has no score. A mean over classes can rise while a class that matters falls.", wide=True,
    )  # fmt: skip
    return (
        f'<section>\n<h2>Each class</h2>\n<p class="read">IoU on the judged set (<code>{escape(comparison.metric)}</code>).</p>\n'
        f"{drawn}\n<details><summary>The same as numbers</summary>{_table([head], rows)}</details>\n</section>"
    )


def _gap(comparison: Comparison) -> str:
    """Is the domain gap smaller? Probe, classifier, what the runs say of them, and the features themselves."""
    told = {
        "da/probe_acc": "a fresh probe's accuracy<small>0.5: cannot tell the domains apart</small>",
        "da/a_distance": "A-distance<small>0: none, 2: apart</small>",
        "da/domain_acc_val": "the run's classifier<small>accuracy, held-out images</small>",
    }
    parts = []
    columns = [name for name in told if any(seed_scores(comparison, arm.name, name) for arm in comparison.arms)]
    if columns:
        head = "<th>arm</th>" + "".join(f'<th scope="col"><code>{name}</code><br>{told[name]}</th>' for name in columns)
        rows = []
        for arm in comparison.arms:
            cells = [_arm_cell(arm, comparison)]
            for name in columns:
                interval = figures.mean_of(
                    seed_scores(comparison, arm.name, name), figures.confidence_of(comparison.verdicts)
                )
                cells.append(f"<td>{_mean_std(interval, scale=1, digits=2)}</td>")
            rows.append(cells)
        parts.append(
            _table([head], rows)
            + '<p class="read">The probe is a new classifier trained on the finished network\'s features, so a weak adversary '
            "cannot flatter it. A smaller gap is no proof of a better score.</p>"
        )
    parts += [
        f"<p><b>{escape(run.arm)}, seed {run.seed}:</b> {escape(run.tags[ALIGNMENT_TAG])}</p>"
        for run in comparison.runs
        if ALIGNMENT_TAG in run.tags and comparison.panel_seed in (None, run.seed)
    ]
    parts += [_feature_figure(comparison, how) for how in (("pca", "umap") if figures.has_umap() else ("pca",))]
    parts = [part for part in parts if part]
    return f"<section>\n<h2>Is the domain gap smaller?</h2>\n{chr(10).join(parts)}\n</section>" if parts else ""


def _feature_figure(comparison: Comparison, how: figures.Projection) -> str:
    if not comparison.features:
        return ""
    layer = f" at layer <code>{escape(comparison.feature_layer)}</code>" if comparison.feature_layer else ""
    seed = "" if comparison.panel_seed is None else f", seed {comparison.panel_seed}"
    method = {"pca": "their two principal components (PCA)", "umap": "UMAP's two dimensions"}[how]
    return f"<h3>Pooled features, {how.upper()}</h3>\n" + _figure(
        partial(figures.features_figure, comparison, how), how, f"Features of both domains by {how.upper()}",
        f"Held-out images of both domains as pooled features{layer}{seed}, by {method}. Each network is projected by itself, on "
        "both domains together, so compare how far the domains overlap, not places or distances between the two pictures; "
        "domains may still differ in directions that are not shown.", wide=len(comparison.features) > 1, safe=True,
    )  # fmt: skip


def _selection(comparison: Comparison) -> str:
    table = comparison.selection
    if table is None or not len(table):
        return ""
    head = (
        '<th>score</th><th class="text" scope="col">better</th><th scope="col">runs</th><th scope="col">choices</th>'
        '<th scope="col">Spearman</th><th scope="col">regret, IoU points</th><th scope="col">regret, source kept</th>'
    )
    rows = [
        [
            f'<th scope="row"><code>{escape(str(row["score"]))}</code></th>',
            f'<td class="text">{escape(str(row["better"]))}</td>',
            f"<td>{_number(row['groups'], '.0f')}</td>", f"<td>{_number(row['candidates'], '.0f')}</td>",
            f"<td>{_number(row['spearman'], '+.2f')}</td>", f"<td>{_number(points(row['regret']), '.1f')}</td>",
            f"<td>{_number(points(row['regret_kept']), '.1f')}</td>",
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    return (
        f"<section>\n<h2>Choosing without target labels</h2>\n{_table([head], rows)}\n"
        '<p class="read">How well each score that needs no target labels ranks checkpoints. Spearman: +1 ranks them as the '
        "target IoU does, 0 is chance. Regret: IoU points lost by choosing with the score and not with target labels; lower is "
        "better. Source kept: where only epochs count whose source IoU is within monitor.forgetting_threshold.</p>\n</section>"
    )


def _runs(comparison: Comparison, links: Mapping[str, str]) -> str:
    if not comparison.runs:
        return ""
    head = (
        f'<th>arm</th><th scope="col">seed</th><th scope="col"><code>{escape(comparison.metric)}</code></th>'
        '<th class="text" scope="col">run id</th><th class="text" scope="col">origin</th><th class="text" scope="col">commit</th>'
    )
    order = {arm.name: number for number, arm in enumerate(comparison.arms)}
    rows = []
    for run in sorted(comparison.runs, key=lambda run: (order.get(run.arm, len(order)), run.arm, run.seed)):
        text = f"<code>{escape(run.run_id)}</code>"
        commit = escape(run.tags.get(COMMIT_TAG, "")[:10])
        rows.append([
            f'<th scope="row">{escape(run.arm)}</th>', f"<td>{run.seed}</td>",
            f"<td>{_number(points(run.metrics.get(comparison.metric, math.nan)), '.1f')}</td>",
            f'<td class="text">{_link(links[run.run_id], text, is_html=True) if run.run_id in links else text}</td>',
            f'<td class="text">{"reused" if run.reused else "new"}</td>',
            f'<td class="text">{f"<code>{commit}</code>" if commit else MISSING}</td>',
        ])  # fmt: skip
    return (
        f"<section>\n<h2>Runs</h2>\n{_table([head], rows)}\n"
        '<p class="read">Every number above comes from these runs; reused: it had been there before this comparison.</p>\n'
        "</section>"
    )


def _settings(comparison: Comparison) -> str:
    keys = list(dict.fromkeys(key for arm in comparison.arms for key in arm.overrides))
    if not keys:
        return ""
    head = "<th>setting</th>" + "".join(
        f'<th class="text" scope="col">{escape(arm.name)}</th>' for arm in comparison.arms
    )
    rows = []
    for key in keys:
        cells = [f'<th scope="row"><code>{escape(key)}</code></th>']
        for arm in comparison.arms:
            value = f"<code>{escape(str(arm.overrides[key]))}</code>" if key in arm.overrides else "<small>base</small>"
            cells.append(f'<td class="text">{value}</td>')
        rows.append(cells)
    return (
        f"<section>\n<h2>Settings in which the arms differ</h2>\n{_table([head], rows)}\n"
        '<p class="read">base: the value of the base settings.</p>\n</section>'
    )


# ---- small pieces


def _figure(
    draw: Callable[[], Figure], name: str, label: str, caption: str = "", wide: bool = False, safe: bool = False
) -> str:
    """An SVG and the sentence that says how to read it. `safe`: the caption is HTML whose parts are escaped already."""
    told = caption if safe else escape(caption)
    return (
        f"<figure>\n<div{' class=wide' if wide else ''}>{figures.svg(draw, name, label)}</div>\n"
        + (f'<figcaption class="read">{told}</figcaption>\n' if told else "")
        + "</figure>"
    )


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<tr>{row}</tr>" for row in heads)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


def _arm_cell(arm: Arm, comparison: Comparison) -> str:
    swatch = _swatch(figures.themed(figures.arm_colours(comparison.arms)[arm.name]))
    return f'<th scope="row">{swatch}{escape(arm.name)}<small>{KIND_WORDS[arm.kind]}</small></th>'


def _swatch(colour: str) -> str:
    """`colour`: of CSS. That of an arm follows the theme (`figures.themed`); that of a class does not, nor do the tiles."""
    return f'<span class="swatch" style="background: {colour}"></span>'


def _judged(judged: bool) -> str:
    return ' class="judged"' if judged else ""


def _mean_std(interval: Interval, scale: float = 100, digits: int = 1) -> str:
    if not interval.n:
        return MISSING
    spread = f" ± {scale * interval.std:.{digits}f}" if math.isfinite(interval.std) else ""
    return f"{scale * interval.mean:.{digits}f}{spread}<small>n&nbsp;{interval.n}</small>"


def _ends(interval: Interval, confidence: float) -> str:
    if not math.isfinite(interval.low):
        return "one seed: no interval"
    return f"{confidence * 100:.4g} % interval {_signed(interval.low)} to {_signed(interval.high)}, n&nbsp;{interval.n}"


def _signed(value: float) -> str:
    """IoU points with their sign; a true minus, which is as wide as a plus."""
    return f"{points(value):+.1f}".replace("-", MINUS) if math.isfinite(value) else MISSING


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", MINUS) if math.isfinite(value) else MISSING


def _count(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _link(address: str, text: str, is_html: bool = False) -> str:
    """A link, or the text alone where the address is of a kind that could run something (javascript:, data:)."""
    shown = text if is_html else escape(text)
    # browsers ignore control characters before and in a scheme; so does urlsplit, but not in every Python 3.11
    if urlsplit(re.sub(r"[\x00-\x20]", "", address)).scheme.lower() not in ("", "http", "https", "file"):
        return shown
    return f'<a href="{escape(address)}">{shown}</a>'


# ---- pictures


def _scaled(pixels: np.ndarray, resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    image = Image.fromarray(pixels)
    factor = TILE_SIZE / max(image.size)
    if factor >= 1:
        return image
    return image.resize((max(round(image.width * factor), 1), max(round(image.height * factor), 1)), resample)


def _picture(pixels: np.ndarray) -> str:
    """An image (H, W, 3) as data: JPEG where it is large, exact where it is small."""
    image = _scaled(np.ascontiguousarray(pixels), Image.Resampling.LANCZOS)
    if max(image.size) <= SMALL:
        return _png(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return _data("image/jpeg", buffer.getvalue())


def _class_picture(ids: np.ndarray, count: int) -> str:
    return _png(_scaled(figures.painted(ids, count)))


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # few colours: a palette takes a third of the bytes
    (image if image.mode == "RGBA" else image.quantize(256)).save(buffer, "PNG", optimize=True)
    return _data("image/png", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
