"""The report of a comparison: one page that needs nothing else, and a PNG, drawn from plain data."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dann_experiments.comparison import figures
from dann_experiments.comparison.figures import draw_summary, mean_curve, project, smoothed, tile_iou
from dann_experiments.comparison.page import write_page
from dann_experiments.comparison.result import Arm, ArmRun, Comparison, FeatureCloud, Panel
from dann_experiments.comparison.verdict import judge

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
        arms.append(Arm(name, "adapted", {"domain_adaptation.method.lambda_da": 0.3 + 0.1 * number, "trainer.max_epochs": 10}))
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
            "runs": [20] * 4, "choices": [200] * 4, "spearman": [-0.12, 0.61, 0.44, float("nan")],
            "regret": [0.062, 0.011, 0.024, float("nan")],
        }),
        notes=["Seed 4 of the oracle was run at another commit."],
    )  # fmt: skip
    return judged(comparison)


def judged(comparison: Comparison) -> Comparison:
    scores = {arm.name: figures.seed_scores(comparison, arm.name, comparison.metric) for arm in comparison.arms}
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
        "iou/source_val": [(int(s), float(0.94 - 0.01 * r + rng.normal(0, 0.004))) for s, r in zip(epochs, rise, strict=True)],
        "iou/target_val": [
            (int(s), float(start + (end - start) * r + rng.normal(0, 0.015 * (s > 0)))) for s, r in zip(epochs, rise, strict=True)
        ],
    }
    if kind != "oracle":
        factor = 0.6 if kind == "adapted" else 0.0
        known = 0.95 - (0.38 if kind == "adapted" else 0.0) * progress
        found["da/lambda"] = [(int(s), float(factor * (2 / (1 + np.exp(-10 * p)) - 1))) for s, p in zip(steps, progress, strict=True)]
        found["da/domain_acc"] = [(int(s), float(v)) for s, v in zip(steps, np.clip(known + rng.normal(0, 0.06, 1000), 0, 1), strict=True)]
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
