"""Draws both domains side by side: class shares and band values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Patch

from dann_experiments.names import OneDomain, SetName
from dann_experiments.reports.colors import DOMAIN_COLORS, PAPER
from dann_experiments.reports.plots.style import drawing, legend_above, legend_shape, new_figure, save, text_width
from dann_experiments.reports.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", "--", "-.", ":")  # of the domains that the source or target has
HATCHES = ("", "///", "...", "xxx")  # the same
SPLIT_SHADES = {"train": 1.0, "train_labelled": 0.8, "weak_labels": 0.8, "val": 0.6, "test": 0.3}


@drawing()
def draw_domains(
    path: Path,
    class_pixels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    values: Mapping[str, np.ndarray],
) -> None:
    """Draw the class shares of each labeled set, and the distribution of each band.

    Arguments:
        class_pixels: set, as in "source_train" -> (K,) pixels per class.
        values: domain, "source", "target" or "target.NAME" -> (B, n) values as stored in the files.
    """
    bands = max(len(found) for found in values.values())
    columns = min(bands, 4)
    rows = -(-bands // columns)
    names = [short(name) for name in class_names]
    turned = len(names) > 8 or len(names) * max(map(len, names), default=0) > 80
    labels = 0.5 + (0.7 * text_width(names, 8) if turned else 0)
    shown = {name: pixels for name, pixels in class_pixels.items() if pixels.sum()}
    of_sets, of_bands = ([Patch(label=words) for words in texts] for texts in (
        [SetName.parse(name).words for name in shown], [OneDomain.parse(name).words for name in values]
    ))  # fmt: skip
    columns_of_sets, lines = legend_shape(of_sets, 9) if of_sets else (1, 0.3)
    columns_of_bands, band_lines = legend_shape(of_bands, 7)
    grid, height = 2.0 * rows + 0.3 + band_lines, 3.3 + 2.0 * rows + labels + lines + band_lines
    figure = new_figure(10, height)
    above = figure.add_gridspec(left=0.07, right=0.98, top=1 - (0.25 + lines) / height, bottom=(grid + labels) / height)
    axis = figure.add_subplot(above[0])
    _draw_shares(axis, shown, names, turned, columns_of_sets, lines)
    top, bottom = (grid - 0.15 - band_lines) / height, 0.3 / height
    below = figure.add_gridspec(rows, columns, left=0.03, right=0.98, top=top, bottom=bottom, hspace=0.45, wspace=0.1)
    for band in range(bands):
        axis = figure.add_subplot(below[band // columns, band % columns])
        edges = _histogram_edges(np.concatenate([found[band] for found in values.values()])).tolist()
        for name, found in values.items():
            weights = np.full(len(found[band]), 1 / len(found[band]))
            domain = OneDomain.parse(name)
            number = [other for other in values if other.startswith(domain.role)].index(name)
            axis.hist(
                found[band], edges, weights=weights, histtype="step", linewidth=1.4, color=DOMAIN_COLORS[domain.role],
                linestyle=LINES[number % len(LINES)], label=domain.words,
            )  # fmt: skip
        axis.text(0.98, 0.97, f"band {band + 1}", fontsize=9, ha="right", va="top", transform=axis.transAxes)
        axis.set_yticks([])
        axis.locator_params(axis="x", nbins=5)
        if band == 0:
            legend_above(axis, columns_of_bands)
    figure.text(0.03, (grid - 0.1) / height, "values of the bands as stored (training images)", fontsize=10)
    save(figure, path)


def _draw_shares(
    axis: Axes, class_pixels: Mapping[str, np.ndarray], names: Sequence[str], turned: bool, columns: int, lines: float
) -> None:
    width = 0.8 / max(len(class_pixels), 1)
    members = {
        role: list(dict.fromkeys(SetName.parse(name).member for name in class_pixels if name.startswith(role)))
        for role in DOMAIN_COLORS
    }
    for number, (name, pixels) in enumerate(class_pixels.items()):
        of_set = SetName.parse(name)
        places = np.arange(len(names)) + width * (number - (len(class_pixels) - 1) / 2)
        axis.bar(
            places, pixels / pixels.sum(), width * 0.94, color=DOMAIN_COLORS[of_set.domain], alpha=SPLIT_SHADES[of_set.split],
            label=of_set.words, hatch=HATCHES[members[of_set.domain].index(of_set.member) % len(HATCHES)], edgecolor=PAPER,
            linewidth=0,
        )  # fmt: skip
    if turned:
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    else:
        axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylabel("share of labeled pixels")
    without = [name for name in DOMAIN_COLORS if not any(key.startswith(name) for key in class_pixels)]
    axis.set_title("classes" + "".join(f"; no masks of the {name}" for name in without), fontsize=10, pad=72 * lines)
    legend_above(axis, columns)


def _histogram_edges(values: np.ndarray) -> np.ndarray:
    """Return the edges of about 40 bins from the 0.5th to the 99.5th percentile.

    If all values are integers, each bin holds the same number of integers.
    """
    low, high = np.nanpercentile(values, (0.5, 99.5))
    if not high > low:
        return np.linspace(low - 0.5, low + 0.5, 41)
    if (values % 1 == 0).all():
        step = max(round((high - low) / 40), 1)
        return np.arange(np.floor(low) - 0.5, high + step, step)
    return np.linspace(low, high, 41)
