"""Colors that all figures, pages and maps share."""

from __future__ import annotations

import numpy as np

COLORS = (
    "#f2f2f2", "#d1495b", "#00798c", "#edae49", "#66a182", "#2e4057", "#8d96a3", "#a05195", "#ff7c43", "#4f9d69", "#b5838d",
    "#6a3d9a", "#8c510a", "#1f78b4", "#b8d98b", "#f4a6c0", "#808000", "#35c9d6", "#101f6b", "#d4c400",
)  # fmt: skip
IGNORED_COLOR = "#000000"
INK, MUTED, GRID, PAPER = "#1f2328", "#656d76", "#d8dee4", "#ffffff"
RED, TEAL, YELLOW, NAVY, GRAY, PURPLE, ORANGE = (COLORS[index] for index in (1, 2, 3, 5, 6, 7, 8))
DOMAIN_COLORS = {"source": NAVY, "target": RED}
THEME = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", NAVY: "--source", RED: "--target", TEAL: "--teal",
    PURPLE: "--purple",
}  # fmt: skip
"""Drawn color -> CSS variable of style.css that replaces it in a page, so that it is visible on a dark background too."""


def themed(color: str) -> str:
    """Return the CSS of a color: its variable, which follows the theme of the page, if it has one."""
    return f"var({THEME[color]})" if color in THEME else color


def class_colors(count: int) -> np.ndarray:
    """Return (count, 3) colors in 0..1, one per class; they repeat after 20 classes.

    >>> class_colors(2).round(2).tolist()
    [[0.95, 0.95, 0.95], [0.82, 0.29, 0.36]]
    """
    return np.array([_rgb(COLORS[index % len(COLORS)]) for index in range(count)])


def paint(ids: np.ndarray, count: int) -> np.ndarray:
    """Return (H, W, 3) uint8 colors for class ids (H, W); ids outside of 0 to `count` - 1 become black."""
    palette = np.concatenate([class_colors(count), [_rgb(IGNORED_COLOR)]])
    return np.round(255 * palette[np.where((ids >= 0) & (ids < count), ids, count)]).astype(np.uint8)


def _rgb(color: str) -> list[float]:
    return [part / 255 for part in bytes.fromhex(color[1:])]
