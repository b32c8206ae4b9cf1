"""Draw docs/images/dann_light.svg and dann_dark.svg: which part of the network gets which gradient in DANN.

python -m benchmarks.gradients_figure
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.pages import DOCS

WIDTH, HEIGHT = 560, 610
LEFT, RIGHT = 145, 415  # x of the middle of both columns


@dataclass(frozen=True)
class Colors:
    """The colors of one variant."""

    text: str
    box: str
    line: str
    segmentation: str
    domain: str
    reversed: str


VARIANTS: Mapping[str, Colors] = {
    "light": Colors("#1f2933", "#f1f4f7", "#7b8794", "#1565c0", "#b45309", "#c62828"),
    "dark": Colors("#e4e7eb", "#323f4b", "#9aa5b1", "#64b5f6", "#ffb74d", "#ff8a80"),
}


def figure(colors: Colors) -> str:
    """Return the picture as SVG."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="16" role="img">',
        "<title>Who gets which gradient in DANN</title>",
        f"<defs>{_head('line', colors.line)}{_head('seg', colors.segmentation)}{_head('dom', colors.domain)}"
        f"{_head('rev', colors.reversed)}</defs>",
        *_boxes(colors),
        *_forward(colors),
        *_backward(colors),
        *_legend(colors),
        "</svg>", "",
    ])  # fmt: skip


def _head(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="12" markerHeight="12" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
    )


def _boxes(colors: Colors) -> Iterator[str]:
    yield from _box(colors, LEFT, 10, 216, ["source images", "with labels"])
    yield from _box(colors, RIGHT, 10, 216, ["target images", "without labels"])
    yield from _box(
        colors, (LEFT + RIGHT) // 2, 120, 486, ["network up to the tap", "weights θf, shared by both domains"]
    )
    yield from _box(colors, LEFT, 265, 216, ["rest of the network", "weights θy"])
    yield from _box(colors, RIGHT, 265, 216, ["gradient reversal", "forward: changes nothing"], dashed=True)
    yield from _box(colors, LEFT, 385, 216, ["segmentation loss Ly", "of the source"])
    yield from _box(colors, RIGHT, 385, 216, ["domain classifier", "weights θd"])
    yield from _box(colors, RIGHT, 495, 216, ["domain loss Ld", "source or target?"])


def _box(colors: Colors, middle: int, top: int, width: int, lines: list[str], dashed: bool = False) -> Iterator[str]:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    yield (
        f'<rect x="{middle - width // 2}" y="{top}" width="{width}" height="56" rx="8" fill="{colors.box}" '
        f'stroke="{colors.line}"{dash}/>'
    )
    for number, line in enumerate(lines):
        weight = ' font-weight="600"' if number == 0 else ' font-size="14"'
        yield _text(line, middle, top + 24 + 20 * number, colors.text, f' text-anchor="middle"{weight}')


def _text(text: str, x: int, y: int, color: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{color}"{more}>{text}</text>'


def _arrow(x: int, start: int, end: int, color: str, head: str, width: float = 1.5) -> str:
    return f'<line x1="{x}" y1="{start}" x2="{x}" y2="{end}" stroke="{color}" stroke-width="{width}" marker-end="url(#{head})"/>'


def _forward(colors: Colors) -> Iterator[str]:
    """Images, features and predictions: thin arrows down."""
    for x, start, end in (
        (LEFT, 66, 118), (RIGHT, 66, 118), (LEFT - 40, 176, 263), (RIGHT - 40, 176, 263),
        (LEFT - 40, 321, 383), (RIGHT - 40, 321, 383), (RIGHT - 40, 441, 493),
    ):  # fmt: skip
        yield _arrow(x, start, end, colors.line, "line")
    yield _text("source", LEFT - 48, 215, colors.text, ' text-anchor="end" font-size="14"')
    yield _text("source", RIGHT - 48, 215, colors.text, ' text-anchor="end" font-size="14"')
    yield _text("and target", RIGHT - 48, 233, colors.text, ' text-anchor="end" font-size="14"')


def _backward(colors: Colors) -> Iterator[str]:
    """Gradients: thick arrows up, each with its name."""
    for x, start, end, color, head, text in (
        (LEFT, 383, 323, colors.segmentation, "seg", "∂Ly/∂θy"),
        (LEFT, 263, 178, colors.segmentation, "seg", "∂Ly/∂θf"),
        (RIGHT, 493, 443, colors.domain, "dom", "∂Ld/∂θd"),
        (RIGHT, 383, 323, colors.domain, "dom", "∂Ld"),
        (RIGHT, 263, 178, colors.reversed, "rev", "\N{MINUS SIGN}λ ∂Ld/∂θf"),
    ):
        yield _arrow(x, start, end, color, head, 4)
        yield _text(text, x + 12, (start + end) // 2 + 5, color, ' font-weight="600"')


def _legend(colors: Colors) -> Iterator[str]:
    y = 582
    for x, color, text in (
        (20, colors.line, "forward"), (120, colors.segmentation, "gradient of Ly"),
        (265, colors.domain, "gradient of Ld"), (410, colors.reversed, "reversed, times λ"),
    ):  # fmt: skip
        yield f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{color}"/>'
        yield _text(text, x + 20, y + 12, colors.text, ' font-size="14"')


def main() -> None:
    """Write both variants."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, colors in VARIANTS.items():
        (DOCS / "images" / f"dann_{name}.svg").write_text(figure(colors))


if __name__ == "__main__":
    main()
