"""The report of a comparison: one page that needs nothing else, and a PNG, drawn from plain data."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dann_experiments.comparison import report
from dann_experiments.comparison.choice import Choice
from dann_experiments.comparison.report import draw_summary, write_page
from dann_experiments.comparison.result import Arm, ArmRun, Comparison, FeatureCloud, Panel
from dann_experiments.comparison.verdict import judge
from dann_experiments.config.comparison import KIND_WORDS, KINDS
from dann_experiments.reports.colors import IGNORED_COLOR, TEAL, class_colors, paint
from dann_experiments.reports.images import tile_iou
from dann_experiments.reports.plots import features
from dann_experiments.reports.plots.arm_curves import arm_curves_figure
from dann_experiments.reports.plots.features import project
from dann_experiments.reports.plots.rows import Row, rows_figure
from dann_experiments.reports.plots.series import mean_curve, smoothed

COMMIT = "0f459710aa"


def example(
    seeds: int = 5,
    adapted: int = 1,
    classes: int = 2,
    tile: int = 64,
    panels: int = 4,
    gain: float = 0.08,
    statistics: bool = True,
    oracle: bool = True,
    names: tuple[str, ...] = (),
    title: str = "mnist -> mnist-m",
) -> Comparison:
    """A comparison as a run of it would give: drawn scores, curves, tiles and features."""
    rng = np.random.default_rng(0)
    class_names = [*("background", "digit")[:classes], *(f"class {i}" for i in range(2, classes))]
    arms = [Arm("source only", "source_only")]
    arms += [Arm("AdaBN", "statistics", {"domain_adaptation.batchnorm": "target_stats"})] if statistics else []
    arms += [Arm("control", "control", {"domain_adaptation.method.lambda_da": 0.0})]
    for number in range(adapted):
        name = names[number] if number < len(names) else "DANN" + f" {number}" * (number > 0)
        arms.append(
            Arm(name, "adapted", {"domain_adaptation.method.lambda_da": 0.3 + 0.1 * number, "trainer.max_epochs": 10})
        )
    arms += [Arm("oracle", "oracle", {"data.target.labels": True})] if oracle else []
    level = {"source_only": 0.52, "statistics": 0.53, "control": 0.56, "oracle": 0.83}
    runs = []
    for arm in arms:
        for seed in range(seeds):
            luck = rng.normal(0, 0.02)
            target = level.get(arm.kind, 0.56 + gain) + luck + rng.normal(0, 0.01)
            metrics = {"iou/source_val": 0.93 + luck / 5, "iou/target_val": target + 0.01, "iou/target_test": target}
            offsets = np.linspace(0.2, -0.2, classes)
            metrics |= {
                f"class_iou/target_test/{name}": float(np.clip(target + offset + rng.normal(0, 0.02), 0, 1))
                for name, offset in zip(class_names, offsets, strict=True)
            }
            probe = {"source_only": 0.97, "control": 0.9}.get(arm.kind, 0.68) + rng.normal(0, 0.01)
            metrics |= {"da/probe_acc": probe, "da/a_distance": 2 * (2 * probe - 1)}
            history, tags = {}, {"mlflow.source.git.commit": COMMIT + 30 * "0"}
            if arm.kind in ("control", "adapted", "oracle"):
                history = curves(rng, 0.52 + luck, target, arm.kind)
                if "da/domain_acc_val" in history:
                    metrics["da/domain_acc_val"] = history["da/domain_acc_val"][-1][1]
            if arm.kind == "adapted":
                tags["dann.alignment"] = (
                    "The classifier is confused (0.55) and a fresh probe finds little (0.68, was 0.97): aligned."
                )
            run_id = f"{len(runs):04x}" + "c0ffee" * 4 + "abcd"
            runs.append(ArmRun(arm.name, seed, run_id, metrics, history, tags, reused=arm.kind == "source_only"))
    comparison = Comparison(
        title, arms, runs, class_names, 255, (), "iou/target_test",
        panels=[panel(rng, arms, classes, tile) for _ in range(panels)],
        panel_seed=0,
        features={"before": cloud(rng, 3.0), "after": cloud(rng, 0.5)},
        feature_layer="decoder",
        selection=pd.DataFrame({
            "score": ["select/entropy", "select/infomax", "select/snd", "select/bnm"], "better": ["min", "max", "max", "max"],
            "groups": [20] * 4, "candidates": [200] * 4, "spearman": [-0.12, 0.61, 0.44, float("nan")],
            "regret": [0.062, 0.011, 0.024, float("nan")], "regret_kept": [0.05, 0.011, 0.02, float("nan")],
        }),
        notes=["Seed 4 of the oracle was run at another commit."],
    )  # fmt: skip
    return judged(comparison)


def judged(comparison: Comparison) -> Comparison:
    scores = {arm.name: report.seed_scores(comparison, arm.name, comparison.metric) for arm in comparison.arms}
    kinds = {arm.kind: arm.name for arm in comparison.arms}
    adapted = [arm.name for arm in comparison.arms if arm.kind == "adapted"]
    control, source = scores.get(kinds.get("control", ""), {}), scores.get(kinds.get("source_only", ""), {})
    verdicts = [judge(name, comparison.metric, scores[name], control, source, arms=len(adapted)) for name in adapted]
    return changed(comparison, verdicts=verdicts)


def changed(comparison: Comparison, **changes: object) -> Comparison:
    return Comparison(**{**vars(comparison), **changes})  # pyright: ignore[reportArgumentType]


def curves(rng: np.random.Generator, start: float, end: float, kind: str) -> dict[str, list[tuple[int, float]]]:
    epochs = np.arange(0, 1001, 100)
    rise = 1 - np.exp(-epochs / 250)
    steps = np.arange(1000)
    progress = steps / 1000
    found = {
        "iou/source_val": [
            (int(s), float(0.94 - 0.01 * r + rng.normal(0, 0.004))) for s, r in zip(epochs, rise, strict=True)
        ],
        "iou/target_val": [
            (int(s), float(start + (end - start) * r + rng.normal(0, 0.015 * (s > 0))))
            for s, r in zip(epochs, rise, strict=True)
        ],
    }
    if kind != "oracle":
        factor = 0.6 if kind == "adapted" else 0.0
        known = 0.95 - (0.38 if kind == "adapted" else 0.0) * progress
        found["da/lambda"] = [
            (int(s), float(factor * (2 / (1 + np.exp(-10 * p)) - 1))) for s, p in zip(steps, progress, strict=True)
        ]
        found["da/domain_acc"] = [
            (int(s), float(v)) for s, v in zip(steps, np.clip(known + rng.normal(0, 0.06, 1000), 0, 1), strict=True)
        ]
        found["da/domain_acc_val"] = [(int(s), float(known[min(s, 999)] - 0.02)) for s in epochs[1:]]
    return found


def panel(rng: np.random.Generator, arms: list[Arm], classes: int, size: int) -> Panel:
    """Squares of the classes on noise; the worse an arm, the more of its pixels are wrong."""
    truth = np.zeros((size, size), np.int64)
    for index in range(1, max(classes, 2)):
        top, left = rng.integers(0, size - size // 3, 2)
        truth[top : top + size // 3, left : left + size // 3] = index % classes
    image = np.clip(70 * truth[..., None] % 200 + rng.normal(60, 22, (size, size, 3)), 0, 255).astype(np.uint8)
    predictions = {}
    for arm in arms:
        rolled = np.roll(truth, rng.integers(1, 4), 1)
        share = {"source_only": 0.3, "statistics": 0.25, "control": 0.2, "oracle": 0.02}.get(arm.kind, 0.06)
        noise = np.kron(rng.random((size // 4, size // 4)) < share, np.ones((4, 4), bool))
        predictions[arm.name] = np.where(noise, rng.integers(0, classes, (size, size)), rolled)
    truth[:2] = 255
    return Panel(image, truth, predictions)


def cloud(rng: np.random.Generator, shift: float, count: int = 150, channels: int = 32) -> FeatureCloud:
    source, target = rng.normal(size=(2, count, channels))
    target[:, :3] += shift
    source[:, 5] *= 3
    target[:, 5] *= 3
    return FeatureCloud(source, target)


class Page(HTMLParser):
    """What a test asks of a page: balanced tags, its text, what it loads, its ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "input", "br", "hr", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def page_of(folder: Path, comparison: Comparison, links: dict[str, str] | None = None) -> Page:
    write_page(folder / "report" / "page.html", comparison, links or {})
    return Page(folder / "report" / "page.html")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return example()


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory) -> Page:
    return page_of(tmp_path_factory.mktemp("page"), comparison)


def test_everything_that_a_comparison_holds_is_in_its_page(comparison, page):
    for wanted in (
        "mnist → mnist-m", comparison.verdicts[0].reason, *comparison.class_names, *comparison.notes,
        *(run.run_id for run in comparison.runs), *(arm.name for arm in comparison.arms), COMMIT,
        *(key for arm in comparison.arms for key in arm.overrides), *comparison.selection["score"],
        comparison.feature_layer, "models of seed 0", "A-distance", comparison.runs[-6].tags["dann.alignment"], "+0.61", "6.2",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    pictures = [values for tag, values in page.tags if tag == "img" and values.get("class") != "right"]
    assert len(pictures) == 4 * (2 + 5)  # image and truth, then each arm
    labels = [values["aria-label"] for tag, values in page.tags if tag == "svg"]
    assert {"Score of each arm and seed", "Paired differences between arms", "Curves of control", "Curves of DANN",
            "IoU of each class and arm", "Features of both domains by PCA"} <= set(labels)  # fmt: skip


def test_the_page_comes_in_the_order_in_which_it_is_read(page):
    headings = re.findall(r"<h[12]>(.*?)</h[12]>", page.source)
    assert [re.sub("<.*?>", "", heading) for heading in headings] == [
        "mnist → mnist-m", "▲ Helped: DANN", "Scores", "During training", "Predictions", "Classes",
        "Is the domain gap smaller?", "Choosing an epoch without target labels", "Runs", "Settings in which the arms differ",
    ]  # fmt: skip


def test_the_table_holds_means_spreads_and_paired_differences_in_points(comparison, page):
    for metric in ("iou/source_val", "iou/target_val", "iou/target_test"):
        for arm in comparison.arms:
            scores = [100 * run.metrics[metric] for run in comparison.runs_of(arm.name)]
            assert f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}n 5" in page.text
    gain = comparison.verdicts[0].against_control
    assert f"+{100 * gain.mean:.1f}[+{100 * gain.low:.1f}, +{100 * gain.high:.1f}], n 5" in page.text


def test_the_page_has_the_floor_of_each_score_and_the_classes_in_numbers(comparison, tmp_path):
    beside = {"floor/target_test": 0.623, "ap/target_test/digit": 0.345, "share/target_test/digit": 0.111,
              "true_share/target_test/digit": 0.222}  # fmt: skip
    runs = [dataclasses.replace(run, metrics={**run.metrics, **beside}) for run in comparison.runs]
    scores = [{run.seed: run.metrics["iou/target_test"] for run in comparison.runs_of(arm)}
              for arm in ("DANN", "control", "source only")]  # fmt: skip
    verdict = judge("DANN", "iou/target_test", *scores, floor=0.623)
    assert verdict.outcome == "at the floor"
    page = page_of(tmp_path, changed(comparison, runs=runs, verdicts=[verdict], floor=0.623))
    assert "At the floor: DANN" in page.text
    assert '<section class="verdict floor">' in page.source
    row = page.text.split("floora map that is one class everywhere")[1]
    assert row.split("Each cell")[0].strip().endswith("62.3")  # known of the judged score alone
    assert "above the floor" in page.text
    for number in ("34.5 ± 0.0", "11.1 ± 0.0", "22.2 ± 0.0"):
        assert number in page.text
    assert "True share of the pixels" in page.text
    report.draw_summary(tmp_path / "summary.png", changed(comparison, verdicts=[verdict]))


def test_the_page_loads_nothing_from_anywhere_and_runs_nothing(page):
    for tag, values in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "image", "foreignobject"), tag
        assert not any(name.startswith("on") for name in values)
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert values.get(name, "#").startswith(("#", "data:image/")), values
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert len(page.source) < 1_000_000


def test_no_id_occurs_twice_and_every_reference_finds_one(page):
    assert len(page.ids) == len(set(page.ids))
    wanted = set(re.findall(r"url\(#([^)]*)\)", page.source))
    wanted |= {values["xlink:href"][1:] for _, values in page.tags if "xlink:href" in values}
    assert wanted
    assert wanted <= set(page.ids)


def test_names_are_text_and_never_markup(tmp_path):
    evil = '<script>alert("x")</script> & $x_1$'
    base = example(seeds=2, names=(evil,), panels=1, title=evil)
    selection = base.selection.assign(score=evil, better=evil)
    base = changed(base, class_names=["background", evil], notes=[evil], feature_layer=evil, selection=selection)
    tags = {"mlflow.source.git.commit": "<i>abcdefgh", "dann.alignment": evil}
    runs = [ArmRun(run.arm, run.seed, evil + run.run_id, run.metrics, run.history, tags) for run in base.runs]
    arms = [Arm(arm.name, arm.kind, {evil: evil}) for arm in base.arms]
    evil_links = {
        runs[0].run_id: "java\nscript:alert(1)",
        runs[1].run_id: 'https://example.org/"><script>',
        "rule": "docs/verdict.md",
    }
    found = page_of(tmp_path, changed(base, runs=runs, arms=arms), evil_links)
    assert not {tag for tag, _ in found.tags} & {"script", "i"}
    assert found.text.count(evil) > 20
    assert escape(evil) in found.source
    assert [values["href"] for tag, values in found.tags if tag == "a"] == [
        "docs/verdict.md",
        evil_links[runs[1].run_id],
    ]
    draw_summary(tmp_path / "summary.png", changed(base, runs=runs, arms=arms))


def test_dollars_in_names_are_no_formula(tmp_path):
    found = page_of(tmp_path, example(seeds=2, names=("$x_1$",)))
    assert len(re.findall(r"<text[^>]*>\$x_1\$</text>", found.source)) == 2  # scores and the legend of the classes


@pytest.mark.parametrize("seeds", [2, 3])
def test_two_seeds_have_no_interval_in_a_verdict(tmp_path, seeds):
    """Student's interval of two values can be wider than all possible scores."""
    boxes = page_of(tmp_path, example(seeds=seeds)).source.partition("<h2>Scores")[0]
    assert ("2 seeds: too few for an interval" in boxes) is (seeds == 2)
    assert bool(re.search(r"% interval .\d+\.\d to", boxes)) is (seeds == 3)


def test_an_arm_without_a_probe_is_said_to_be_not_measured(comparison, tmp_path):
    gone = ("da/probe_acc", "da/a_distance")
    without = [replace(run, metrics={k: v for k, v in run.metrics.items() if k not in gone}) for run in comparison.runs]
    last = comparison.runs[-1].arm
    some = [bare if bare.arm == last else run for bare, run in zip(without, comparison.runs, strict=True)]
    said = page_of(tmp_path, changed(comparison, runs=some)).text.count("not measured")
    assert said == page_of(tmp_path, comparison).text.count("not measured") + len(gone)
    assert "Probe accuracy and A-distance: not measured." in page_of(tmp_path, changed(comparison, runs=without)).text


def test_runs_link_to_their_addresses(comparison, tmp_path):
    links = {run.run_id: f"http://127.0.0.1:5000/#/experiments/1/runs/{run.run_id}" for run in comparison.runs}
    found = page_of(tmp_path, comparison, links)
    assert {values["href"] for tag, values in found.tags if tag == "a"} == set(links.values())


def stripped(comparison: Comparison, metric: float | None = None) -> Comparison:
    """Without curves and tags; `metric`: the value of everything, None leaves every metric out."""
    runs = [
        ArmRun(run.arm, run.seed, run.run_id, {} if metric is None else dict.fromkeys(run.metrics, metric))
        for run in comparison.runs
    ]
    return changed(comparison, runs=runs, panels=(), features={}, selection=None, notes=())


def odd_histories(comparison: Comparison) -> Comparison:
    """Histories with NaN, with one point, with other steps in each seed."""
    runs = []
    for run in comparison.runs:
        history = {name: [(step + run.seed, value) for step, value in points] for name, points in run.history.items()}
        if run.seed == 0:
            history = {name: [(step, float("nan")) for step, _ in points] for name, points in history.items()}
        elif run.seed == 1:
            history = {name: points[:1] for name, points in history.items()}
        runs.append(ArmRun(run.arm, run.seed, run.run_id, run.metrics, history))
    return changed(comparison, runs=runs)


def odd_panels(comparison: Comparison) -> Comparison:
    first = comparison.panels[0]
    without = Panel(first.image, None, dict(list(first.predictions.items())[:2]))
    ignored = Panel(first.image, np.full_like(first.truth, 255), first.predictions)
    return changed(comparison, panels=[without, ignored])


def few_features(comparison: Comparison) -> Comparison:
    one = FeatureCloud(np.zeros((1, 4)), np.full((2, 4), np.nan))
    return changed(comparison, features={"before": one, "after": FeatureCloud(np.ones((5, 1)), np.ones((0, 1)))})


ODD = {
    "one seed": lambda: example(seeds=1),
    "two seeds": lambda: example(seeds=2),
    "20 classes, 6 adapted arms": lambda: example(seeds=2, adapted=6, classes=20, tile=300, panels=2),
    "no metrics": lambda: judged(stripped(example(seeds=2))),
    "every metric NaN": lambda: judged(stripped(example(seeds=3), float("nan"))),
    "every metric equal": lambda: judged(stripped(example(seeds=3), 0.5)),
    "no runs": lambda: changed(stripped(example(seeds=2)), runs=(), verdicts=()),
    "no arms": lambda: changed(stripped(example(seeds=2)), runs=(), verdicts=(), arms=()),
    "no control": lambda: judged(changed(example(), arms=[arm for arm in example().arms if arm.kind != "control"])),
    "source only alone": lambda: changed(example(), arms=example().arms[:1], verdicts=()),
    "histories with gaps": lambda: odd_histories(example(seeds=3)),
    "tiles without truth": lambda: odd_panels(example(seeds=2)),
    "hardly any features": lambda: few_features(example(seeds=2)),
    "judged by validation": lambda: judged(changed(example(), metric="iou/target_val")),
    "long names": lambda: example(names=("a very long name " * 12,), title="a long title " * 20),
    "names beyond the font": lambda: changed(example(names=("适应",)), title="都市 -> 农村"),
}


@pytest.mark.parametrize("last", [786, 9_900, 99_000])
def test_no_number_below_the_training_curves_is_cut(last):
    histories = {name: [[(0, 0.4), (last, 0.7)]] for name in ("iou/source_val", "iou/target_val", "da/lambda")}
    figure = arm_curves_figure(histories, (40, 95, last), 1.0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the last number stands at the right end of the axis
    drawn = figure.get_tightbbox(canvas.get_renderer())
    assert 0 <= drawn.x0 < drawn.x1 <= figure.get_figwidth()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD)
def test_any_comparison_can_be_drawn(kind, tmp_path, recwarn):
    odd = ODD[kind]()
    found = page_of(tmp_path, odd)
    draw_summary(tmp_path / "deep" / "summary.png", odd)
    with Image.open(tmp_path / "deep" / "summary.png") as picture:
        more = max(len(odd.arms) - 8, 0)  # further arms have rows of their own
        assert picture.size == (1600, 1000 + 72 * more)
    assert not re.search(r">[^<]*\bnan\b", found.source.lower())
    assert all(arm.name.strip() in found.text for arm in odd.arms)
    assert all(run.run_id in found.text for run in odd.runs)
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.slow
def test_a_page_of_many_large_tiles_stays_below_3_megabytes(tmp_path):
    found = page_of(tmp_path, example(seeds=2, adapted=3, classes=8, tile=512, panels=6))
    assert len(found.source) < 3_000_000


def test_the_summary_shows_verdict_scores_and_tiles(comparison, tmp_path):
    full, without = tmp_path / "full.png", tmp_path / "without.png"
    draw_summary(full, comparison)
    draw_summary(without, changed(comparison, panels=()))
    pixels = {path: np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (full, without)}
    helped = tuple(int(report.OUTCOME_COLORS["helped"][i : i + 2], 16) for i in (1, 3, 5))
    assert (np.abs(pixels[full][:220] - helped).sum(-1) < 12).sum() > 300  # the verdict in its colour
    digit = 255 * class_colors(2)[1]
    tiles = {path: (np.abs(found - digit).sum(-1) < 6).sum() for path, found in pixels.items()}
    assert tiles[full] > 10_000 > tiles[without]


def test_an_interval_far_wider_than_its_values_does_not_stretch_the_axis():
    """Two seeds: Student's t with one degree of freedom gave an axis from -100 to 213 points."""
    rows = [
        Row("source only", TEAL, {0: 41.0, 1: 42.0}, 41.5, 35.1, 47.9),
        Row("DANN", TEAL, {0: 50, 1: 62}, 56, -20.2, 132.2),
    ]
    for differences, low, high in ((False, 15, 90), (True, -65, 130)):
        axis = rows_figure(rows, "iou/target_test", differences).axes[0]
        first, last = axis.get_xlim()
        assert low < first < 41
        assert 62 < last < high
        arrows = [line.get_marker() for line in axis.lines if line.get_marker() in ("<", ">")]
        assert arrows == ["<"] * (not differences) + [">"]
    short_interval = [Row("DANN", TEAL, {0: 50, 1: 52, 2: 54}, 52, 47.0, 57.0)]
    assert [line.get_marker() for line in rows_figure(short_interval, "").axes[0].lines] == ["None", "D"]


def test_pixels_without_a_label_have_a_legend_entry(tmp_path, monkeypatch):
    from dann_experiments.reports.plots import predictions

    legends = []
    monkeypatch.setattr(predictions, "save", lambda figure, path: legends.append(figure.legends[0]))
    image, ids = np.zeros((4, 4, 3)), np.zeros((4, 4), int)
    for truth in ([ids], [np.where(np.eye(4), 255, ids)], []):
        predictions.draw_predictions(tmp_path / "p.png", [image], truth, {"after": [ids]}, ["a", "b"], "")
    words = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    assert words == [["a", "b"], ["a", "b", "not labeled"], ["a", "b"]]


def test_drawing_leaves_nothing_behind(comparison, tmp_path):
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    write_page(tmp_path / "page.html", comparison)
    draw_summary(tmp_path / "summary.png", comparison)
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_the_same_comparison_gives_the_same_page(comparison, page, tmp_path):
    assert page_of(tmp_path, comparison).source == page.source


def test_a_mean_curve_counts_each_seed_only_where_it_was_measured():
    steps, mean, std = mean_curve([[(0, 0.0), (10, 1.0)], [(0, 0.5), (5, 0.5)], [(3, float("nan"))], []])
    assert steps.tolist() == [0, 5, 10]
    assert mean == pytest.approx([0.25, 0.5, 1.0])
    assert std[:2] == pytest.approx([0.5 / 2**0.5, 0.0])
    assert std[2] == 0


def test_smoothing_keeps_the_mean_and_the_order_and_bounds_the_points():
    curve = [(step, float(step)) for step in range(1000)]
    shorter = smoothed(curve, most=100)
    assert len(shorter) == 100
    assert np.mean([value for _, value in shorter]) == pytest.approx(499.5)
    assert [step for step, _ in shorter] == sorted(step for step, _ in shorter)
    assert smoothed(curve[:50], most=100) == curve[:50]


def test_pca_finds_the_direction_in_which_the_domains_differ():
    rng = np.random.default_rng(0)
    source, target = rng.normal(0, 0.1, (2, 40, 6))
    target[:, 2] += 5
    source[0, 0] = np.inf
    flat_source, flat_target = project(source, target, "pca")
    assert (flat_source.shape, flat_target.shape) == ((39, 2), (40, 2))
    assert abs(flat_source[:, 0].mean() - flat_target[:, 0].mean()) == pytest.approx(5, abs=0.1)
    with pytest.raises(ValueError, match="at least 3 images"):
        project(source[:1], target[:1], "pca")


def test_umap_stands_beside_pca_where_it_is_installed(comparison, tmp_path, monkeypatch):
    import sys
    from types import ModuleType

    class Umap:
        def __init__(self, **settings):
            assert settings["n_neighbors"] == 15

        def fit_transform(self, both):
            return both[:, :2]

    module = ModuleType("umap")
    module.UMAP = Umap  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "umap", module)
    monkeypatch.setattr(features, "has_umap", lambda: True)
    found = page_of(tmp_path, comparison)
    assert "Pooled features, PCA" in found.text
    assert "Pooled features, UMAP" in found.text


def test_the_iou_of_a_tile_leaves_out_ignored_pixels_and_absent_classes():
    truth = np.array([[0, 0, 1, 255]])
    assert tile_iou(truth, np.array([[0, 1, 1, 2]]), 3) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert np.isnan(tile_iou(np.full((2, 2), 255), np.zeros((2, 2), int), 3))


def test_twenty_classes_have_twenty_colors_far_from_each_other_and_from_ignored():
    colors = np.concatenate([class_colors(20), [[0, 0, 0]]])
    distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 9 * np.eye(21)
    assert distance.min() > 0.15


def test_the_legend_shows_the_colors_of_the_tiles_in_any_theme(tmp_path):
    found = page_of(tmp_path, example(seeds=2, classes=8, panels=1))
    legend = re.search(r'<div class="legend">(.*?)</div>', found.source)[1]
    shown = re.findall(r"background: ([^\"]*)", legend)
    wanted = ["#" + bytes(color).hex() for color in paint(np.arange(8)[None], 8)[0]]
    assert shown == [*wanted, IGNORED_COLOR]


def test_every_kind_of_arm_has_its_words_and_color(tmp_path):
    arms = [Arm(kind, kind) for kind in KINDS]
    write_page(tmp_path / "report.html", changed(example(seeds=1), arms=arms))
    page = (tmp_path / "report.html").read_text()
    assert set(KIND_WORDS) == set(KINDS)
    assert all(str(escape(words)) in page for words in KIND_WORDS.values())
    assert set(report.KIND_COLORS) == set(KINDS) - {"adapted"}


def test_the_choice_without_labels_is_on_the_page(tmp_path):
    row = {
        "arm": "DANN",
        "source_kept": 1.0,
        "guard": 0.0,
        "seed_agreement": 0.5,
        "consensus": 0.25,
        "share_distance": 0.1,
    }
    choice = Choice(pd.DataFrame([row]), "DANN", "It agrees best.")
    write_page(tmp_path / "report.html", changed(example(seeds=1), choice=choice))
    page = (tmp_path / "report.html").read_text()
    assert page.index("Chosen without labels: DANN") < page.index("It agrees best.") < page.index("<h2>Scores")


def test_without_target_labels_the_page_does_not_speak_of_a_judged_score(tmp_path):
    write_page(tmp_path / "report.html", changed(example(seeds=1), metric="", verdicts=[]))
    page = (tmp_path / "report.html").read_text()
    assert "No target labels, no verdict" in page
    assert "Judged by" not in page
