"""The pictures of a run, drawn from plain arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dann_experiments.config.atomic_write import writing

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
DOMAIN_COLOURS = {"source": "#2e4057", "target": "#d1495b"}
SPLIT_SHADES = {"train": 1.0, "val": 0.6, "test": 0.3}


def class_colours(count: int) -> np.ndarray:
    """(count, 3) colours in 0..1; repeated beyond the palette's length."""
    return np.array([to_rgb(COLOURS[index % len(COLOURS)]) for index in range(count)])


def display_image(image: np.ndarray, stretch: bool = False) -> np.ndarray:
    """(H, W, 3) in 0..1 from an image (B, H, W) in 0..1: the first three bands, the first alone if there are fewer.

    `stretch`: from the 2nd to the 98th percentile, for sensors that use a small part of their range.
    """
    bands = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    pixels = bands.transpose(1, 2, 0).astype(np.float32)
    if not stretch:
        return pixels
    low, high = np.percentile(pixels, (2, 98))
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
    """Confusion matrix (K, K) of pixel counts, rows = truth: in each field its share of the true class (which colours it)
    above its count. A class without truth has a grey row with counts alone."""
    totals = confusion.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(totals == 0, confusion.shape), confusion / np.maximum(totals, 1))
    count = len(class_names)
    size = max(0.62 * count, 1.7)
    figure = Figure(figsize=(size + 2.6, size + 1.6), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#e4e4e4")
    image = axis.imshow(shares, cmap=colours, vmin=0, vmax=1)
    for row, column in np.ndindex(confusion.shape):
        _write_field(axis, row, column, shares[row, column], int(confusion[row, column]))
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name in class_names]
    # a class may be called $x$, which is no formula
    axis.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False)
    axis.set_yticks(range(count), names, fontsize=8, parse_math=False)
    axis.set_xticks(np.arange(1, count) - 0.5, minor=True)
    axis.set_yticks(np.arange(1, count) - 0.5, minor=True)
    axis.grid(which="minor", color="#d5d5d5", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("truth", fontsize=9)
    axis.set_title(title, fontsize=10)
    scale = figure.colorbar(image, ax=axis, shrink=0.8, aspect=30)
    scale.set_label("share of the true class", fontsize=9)
    scale.ax.tick_params(labelsize=8)
    _save(figure, path)


def _write_field(axis, row: int, column: int, share, pixels: int) -> None:
    if not pixels:  # most of a large matrix: what is left stands out
        axis.text(column, row, "0", ha="center", va="center", color="#a0a0a0", fontsize=7)
        return
    colour = "white" if share is not np.ma.masked and share > 0.5 else "black"
    if share is not np.ma.masked:
        axis.text(column, row - 0.16, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axis.text(column, row + 0.22, _short_count(pixels), ha="center", va="center", color=colour, fontsize=7)


def _short_count(pixels: int) -> str:
    """9999, 12.3k, 4.56M: at most four digits (the table has them all)."""
    if pixels < 10_000:
        return str(pixels)
    thousands = min(int(math.log10(pixels * 1.0005) // 3), 4)  # 999,600 is 1M when three digits are left of it
    return f"{pixels / 1000**thousands:.3g}{' kMGT'[thousands]}"


def draw_curves(path: Path, history: Mapping[str, Sequence[tuple[int, float]]], title: str) -> None:
    """IoU of both domains, lambda and domain accuracy over the optimizer step; `history`: metric -> [(step, value)]."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    for name, colour in (("iou/source_val", DOMAIN_COLOURS["source"]), ("iou/target_val", DOMAIN_COLOURS["target"])):
        _plot(above, history, name, colour, marker="o")
    above.set_ylabel("mean IoU")
    _plot(middle, history, "da/domain_acc", "#00798c", faint=True)
    _plot(middle, history, "da/domain_acc_val", "#a05195", marker="o")
    middle.axhline(0.5, color="#888888", linewidth=0.8, linestyle="--")
    middle.text(0, 0.44, "0.5: domains confused", fontsize=7, color="#666666")
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


def draw_domains(
    path: Path,
    class_pixels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    values: Mapping[str, np.ndarray],
) -> None:
    """Both domains side by side: class shares of each labelled set, and how the values of each band are spread.

    `class_pixels`: set -> (K,) pixels of each class. `values`: source and target -> (B, n) values as stored.
    """
    bands = max(len(found) for found in values.values())
    columns = min(bands, 4)
    rows = -(-bands // columns)
    figure = Figure(figsize=(10, 3.6 + 2.2 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, 2.2 * rows + 0.4])  # pyright: ignore[reportGeneralTypeIssues]
    _draw_shares(above, {name: pixels for name, pixels in class_pixels.items() if pixels.sum()}, class_names)
    below.suptitle("values of the bands as stored (training images)", fontsize=10)
    grid = below.subplots(rows, columns, squeeze=False)
    for band in range(rows * columns):
        axis = grid[band // columns][band % columns]
        if band >= bands:
            axis.set_axis_off()
            continue
        edges = _histogram_edges(np.concatenate([found[band] for found in values.values()]))
        for domain, found in values.items():
            axis.hist(
                found[band],
                edges,
                weights=np.full(len(found[band]), 1 / len(found[band])),
                histtype="step",
                linewidth=1.4,
                color=DOMAIN_COLOURS[domain],
                label=domain,
            )
        axis.set_title(f"band {band + 1}", fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
    handles, labels = grid[0][0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def _draw_shares(figure, class_pixels: Mapping[str, np.ndarray], class_names: Sequence[str]) -> None:
    axis = figure.subplots()
    width = 0.8 / max(len(class_pixels), 1)
    for number, (name, pixels) in enumerate(class_pixels.items()):
        domain, split = name.split("_")
        places = np.arange(len(class_names)) + width * (number - (len(class_pixels) - 1) / 2)
        axis.bar(
            places, pixels / pixels.sum(), width * 0.94, color=DOMAIN_COLOURS[domain], alpha=SPLIT_SHADES[split],
            label=f"{domain} {split}",
        )  # fmt: skip
    turned = len(class_names) > 8 or len(class_names) * max(map(len, class_names)) > 80
    axis.set_xticks(
        range(len(class_names)),
        class_names,
        fontsize=8,
        rotation=40 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor" if turned else "default",
    )
    axis.set_xlim(-0.5, len(class_names) - 0.5)
    axis.set_ylabel("share of labelled pixels", fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    without = [name for name in DOMAIN_COLOURS if not any(key.startswith(name) for key in class_pixels)]
    missing = "".join(f"; no masks of the {name}" for name in without)
    axis.set_title(f"classes{missing}", fontsize=10)
    if class_pixels:
        figure.legend(loc="outside lower center", ncols=len(class_pixels), fontsize=8, frameon=False)


def _histogram_edges(values: np.ndarray) -> np.ndarray:
    """About 40 bins over all but the outermost values; each holds as many whole numbers where the values are whole."""
    low, high = np.nanpercentile(values, (0.5, 99.5))
    if not high > low:
        return np.linspace(low - 0.5, low + 0.5, 41)
    if (values % 1 == 0).all():
        step = max(round((high - low) / 40), 1)
        return np.arange(np.floor(low) - 0.5, high + step, step)
    return np.linspace(low, high, 41)


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
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
