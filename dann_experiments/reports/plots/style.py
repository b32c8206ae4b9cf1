"""The shared parts of all figures: style, fixed margins, legends, grids of pictures. Sizes are in inches.

No figure uses a Matplotlib layout engine: measuring every text takes longer than drawing the figure.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.dom import minidom

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dann_experiments.config.atomic_write import writing
from dann_experiments.reports.colors import GRID, IGNORED_COLOR, INK, MUTED, class_colors
from dann_experiments.reports.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = {
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # the name of a class or an arm may be $x$
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}
NOT_LABELED = "not labeled"


@contextmanager
def drawing(changes: Mapping[str, Any] = {}) -> Iterator[None]:
    """Apply the style while a figure is made or saved; also a decorator. Matplotlib's settings are restored afterwards."""
    style: Any = {**STYLE, **changes}  # Matplotlib's type of the keys is a Literal of 300 words
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # the reader's browser has other fonts
        yield


def new_figure(
    width: float, height: float, margins: tuple[float, float, float, float] = (0, 0, 0, 0), **spacing: Any
) -> Figure:
    """Return an empty figure with fixed margins (left, right, top, bottom); `spacing`: `wspace` and `hspace`."""
    left, right, top, bottom = margins
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, **spacing)
    return figure


def save(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a PNG file and create its folder if needed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, format="png", pil_kwargs={"compress_level": 3})  # half the time, 15 % more bytes


def text_width(texts: Sequence[str], size: float = 7.5) -> float:
    """Estimate the width of the longest text in inches; `size` in points."""
    return max(map(len, texts), default=0) * 0.6 * size / 72


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure as an `<svg>` element: text stays text; style.css replaces the colors in THEME.

    `name`: different for each figure of a page, because ids derive from it. `label`: for screen readers.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with drawing({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=160, metadata=metadata)
    svg = minidom.parseString(buffer.getvalue()).documentElement  # noqa: S318  (written by Matplotlib a line above)
    assert svg is not None
    svg.setAttribute("role", "img")
    svg.setAttribute("aria-label", label)
    for group in svg.getElementsByTagName("g"):  # numbered per figure, so not unique in a page; nothing refers to them
        if group.hasAttribute("id"):
            group.removeAttribute("id")
    return Markup(svg.toxml())  # noqa: S704


def class_handles(names: Sequence[str], shown: Sequence[int] | None = None, not_labeled: bool = False) -> list[Patch]:
    """Return legend entries for the classes (`shown`: only these ids), and for pixels without a label."""
    colors = class_colors(len(names))
    ids = range(len(names)) if shown is None else shown
    handles = [Patch(facecolor=colors[i], edgecolor=MUTED, linewidth=0.6, label=short(names[i])) for i in ids]
    return handles + [Patch(facecolor=IGNORED_COLOR, label=NOT_LABELED)] * not_labeled


def legend_shape(handles: Sequence[Any], width: float) -> tuple[int, float]:
    """Return how many columns of legend entries fit into `width`, and the height of the legend."""
    columns = max(int(width / (text_width([handle.get_label() for handle in handles]) + 0.5)), 1)
    return columns, 0.18 * -(-len(handles) // columns) + 0.12


def legend_above(axis: Axes, columns: int | None = None) -> None:
    """Put the legend above the axis, in one line, or in lines of `columns` entries."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        count = columns or len(handles)
        axis.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 0.98), ncols=count, borderaxespad=0)


def canvas(figure: Figure) -> Axes:
    """Return invisible axes over the whole figure, in inches from its upper left corner."""
    width, height = figure.get_size_inches()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return axis


def tallest(pictures: Sequence[np.ndarray]) -> float:
    """Return the largest height of the pictures, each scaled so that its longest side is 1."""
    return max((picture.shape[0] / max(picture.shape[:2]) for picture in pictures), default=1.0)


def draw_grid(
    axis: Axes,
    columns: Sequence[tuple[str, Sequence[np.ndarray | None]]],
    left: float,
    top: float,
    side: float,
    size: float = 9,
    row_height: float | None = None,
) -> None:
    """Draw columns of pictures (H, W, 3) on a `canvas`, each fitted into a square of `side`, with a title above each column."""
    place = 0.96 * side
    for column, (title, pictures) in enumerate(columns):
        x = left + column * side
        axis.text(x, top - 0.06, title, fontsize=size, va="bottom", linespacing=1.1)
        for row, picture in enumerate(pictures):
            if picture is None:
                continue
            height, width = (place * length / max(picture.shape[:2]) for length in picture.shape[:2])
            y = top + row * (row_height or side)
            axis.imshow(picture, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto")
            axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=GRID, linewidth=0.6))
