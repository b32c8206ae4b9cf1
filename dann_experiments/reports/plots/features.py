"""Draws the features of both domains in two dimensions."""

from __future__ import annotations

import importlib.util
import textwrap
import warnings
from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from dann_experiments.reports.colors import DOMAIN_COLORS, GRID, MUTED, PAPER
from dann_experiments.reports.plots.style import drawing, new_figure

Projection = Literal["pca", "umap"]
Cloud = tuple[np.ndarray, np.ndarray]
"""Features (N, C) of the source and (M, C) of the target."""
MOST_FEATURES = 600  # points per domain


def has_umap() -> bool:
    """Return whether the optional package umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def project(source: np.ndarray, target: np.ndarray, how: Projection) -> Cloud:
    """Project both domains (N, C) to two dimensions (N, 2), fitted on both together; rows that are not finite are left out.

    `pca`: the two directions of largest variance (a missing second one is 0). `umap`: McInnes et al. 2018, with the seed 0;
    needs umap-learn. Raises ValueError if fewer than 3 images (`umap`: 5) are left.
    """
    source, target = (values[np.isfinite(values).all(1)] for values in (source, target))
    both = np.concatenate([source, target]).astype(np.float64)  # (N_source + N_target, C)
    least = 5 if how == "umap" else 3
    if len(both) < least:
        raise ValueError(f"{how} needs at least {least} images with finite features, got {len(both)}")
    if how == "umap":
        from umap import UMAP  # pyright: ignore[reportMissingImports]  # optional, and slow to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            neighbors = min(15, len(both) - 1)
            flat = UMAP(n_neighbors=neighbors, random_state=0, n_jobs=1, init="random").fit_transform(both)
    else:
        with np.errstate(invalid="ignore"):  # the explained share of a variance of 0, which is not used
            flat = PCA(min(2, both.shape[1]), random_state=0).fit_transform(both)
    flat = np.pad(np.asarray(flat, np.float64), ((0, 0), (0, 2 - flat.shape[1])))
    return flat[: len(source)], flat[len(source) :]


@drawing()
def features_figure(clouds: Mapping[str, Cloud], how: Projection) -> Figure:
    """Draw the features of both domains, one axis per network (title -> cloud), each projected separately."""
    count = max(len(clouds), 1)
    figure = new_figure(10.2 if count > 1 else 5.2, 4.4, (0.05, 0.05, 0.3, 0.35), wspace=0.05)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (name, cloud) in zip(axes, clouds.items(), strict=False):
        axis.set(title=name, xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color=GRID)
        try:
            flat = project(_sample(cloud[0]), _sample(cloud[1]), how)
        except ValueError as error:
            axis.text(0.5, 0.5, textwrap.fill(str(error), 40), ha="center", transform=axis.transAxes, color=MUTED)
            continue
        for (domain, color), marker, places in zip(DOMAIN_COLORS.items(), "o^", flat, strict=True):
            axis.scatter(
                *places.T, s=20, marker=marker, color=color, alpha=0.6, linewidths=0.4, edgecolors=PAPER,
                label=f"{domain} ({len(places)} images)",
            )  # fmt: skip
        axis.set_aspect("equal", adjustable="datalim")
        axis.margins(0.06)
        axis.legend(loc="lower left", bbox_to_anchor=(0, -0.09), ncols=2, borderaxespad=0, handletextpad=0.2)
    return figure


def _sample(values: np.ndarray) -> np.ndarray:
    """Return at most MOST_FEATURES rows, the same at each call."""
    if len(values) <= MOST_FEATURES:
        return values
    return values[np.sort(np.random.default_rng(0).choice(len(values), MOST_FEATURES, replace=False))]
