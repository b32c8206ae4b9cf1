"""The pictures of a run, drawn from plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

COLOURS = (
    "#f2f2f2",
    "#d1495b",
    "#00798c",
    "#edae49",
    "#66a182",
    "#2e4057",
    "#8d96a3",
    "#a05195",
    "#ff7c43",
    "#4f9d69",
    "#b5838d",
)
IGNORED_COLOUR = "#000000"


def class_colours(count: int) -> np.ndarray:
    """(count, 3) colours in 0..1; repeated beyond the palette's length."""
    return np.array([to_rgb(COLOURS[index % len(COLOURS)]) for index in range(count)])


def display_image(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) in 0..1 from an image (B, H, W) as stored: the first three bands, the first alone if there are fewer."""
    bands = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    pixels = bands.transpose(1, 2, 0).astype(np.float32)
    if image.dtype == np.uint8:
        return pixels / 255
    low, high = np.percentile(pixels, (2, 98))  # 16 bit sensors use a small part of their range
    return np.clip((pixels - low) / max(float(high - low), 1e-6), 0, 1)


def draw_predictions(
    path: Path,
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    class_names: Sequence[str],
    title: str,
) -> None:
    """A row an image: image, truth, one column a prediction.

    Images (H, W, 3) in 0..1; truth (may be empty) and predictions (H, W) class ids, ids outside the classes in black.
    """
    columns: dict[str, Sequence[np.ndarray]] = {"image": images}
    maps_by_name = {"truth": truth, **predictions} if truth else predictions
    for name, maps in maps_by_name.items():
        columns[name] = [_paint(ids, len(class_names)) for ids in maps]
    rows = len(images)
    figure = Figure(figsize=(1.5 * len(columns) + 0.3, 1.5 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0][column].set_title(name, fontsize=10)
        for row in range(rows):
            axes[row][column].imshow(pictures[row], interpolation="nearest")
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
    from matplotlib.patches import Patch

    colours = class_colours(len(class_names))
    handles = [Patch(facecolor=colours[i], edgecolor="#555555", label=name) for i, name in enumerate(class_names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Confusion matrix (K, K) of pixel counts, rows = truth, each row as shares of its class."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = 2.2 + 0.55 * len(class_names)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(class_names)):
        for column in range(len(class_names)):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(class_names)), class_names, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(class_names)), class_names, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("truth")
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    _save(figure, path)


def draw_curves(path: Path, history: Mapping[str, Sequence[tuple[int, float]]], title: str) -> None:
    """IoU of both domains, lambda and domain accuracy over the optimizer step; `history`: metric -> [(step, value)]."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    for name, colour in (("iou/source_val", "#2e4057"), ("iou/target_val", "#d1495b")):
        _plot(above, history, name, colour, marker="o")
    above.set_ylabel("mean IoU")
    _plot(middle, history, "da/domain_acc", "#00798c", faint=True)
    middle.axhline(0.5, color="#888888", linewidth=0.8, linestyle="--")
    middle.text(0, 0.51, "0.5: domains confused", fontsize=7, color="#666666")
    middle.set_ylim(0, 1.02)
    middle.set_ylabel("domain accuracy")
    _plot(below, history, "da/lambda", "#edae49")
    below.set_ylabel("lambda")
    below.set_xlabel("optimizer step")
    for axis in (above, middle, below):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="best")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _plot(axis, history, name: str, colour: str, marker: str | None = None, faint: bool = False) -> None:
    points = history.get(name, [])
    if not points:
        return
    steps, values = np.array([step for step, _ in points]), np.array([value for _, value in points])
    if not faint or len(values) < 20:
        axis.plot(steps, values, color=colour, marker=marker, markersize=3, label=name)
        return
    width = max(len(values) // 50, 5)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
    axis.plot(steps[width - 1 :], smooth, color=colour, label=f"{name} (mean of {width} steps)")


def _paint(ids: np.ndarray, count: int) -> np.ndarray:
    colours = np.concatenate([class_colours(count), [to_rgb(IGNORED_COLOUR)]])
    return colours[np.where((ids >= 0) & (ids < count), ids, count)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
