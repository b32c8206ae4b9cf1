"""Styles for QGIS (QML): the classes' names and colors, for class maps and for polygons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

CLASS_COLUMN, NAME_COLUMN = "class_id", "class_name"
"""Columns of the polygons."""
MARK = "Written by dann_experiments"
"""Marks our files: a style that the user saved in QGIS has no such comment."""


def qgis_style(class_names: Sequence[str], colors: np.ndarray) -> str:
    """Return the text of a QML file that serves rasters of class ids and polygons alike; `colors`: (K, 3) in 0..1.

    QGIS looks for NAME.qml beside NAME.tif and beside NAME.geojson, so both may have to share one file. A raster layer reads
    `pipe` of it alone, a vector layer `renderer-v2`.
    """
    root = ElementTree.Element("qgis", version="3.22.0", styleCategories="Symbology")
    root.append(ElementTree.Comment(f" {MARK} "))
    pipe = ElementTree.SubElement(root, "pipe")
    palette = ElementTree.SubElement(
        ElementTree.SubElement(pipe, "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1"),
        "colorPalette",
    )
    renderer = ElementTree.SubElement(
        root, "renderer-v2", type="categorizedSymbol", attr=CLASS_COLUMN, symbollevels="0", enableorderby="0",
        forceraster="0",
    )  # fmt: skip
    categories = ElementTree.SubElement(renderer, "categories")
    symbols = ElementTree.SubElement(renderer, "symbols")
    for index, (name, color) in enumerate(zip(class_names, colors, strict=True)):
        number, (red, green, blue) = str(index), (round(255 * float(part)) for part in color)
        hexadecimal = f"#{red:02x}{green:02x}{blue:02x}"
        ElementTree.SubElement(palette, "paletteEntry", value=number, color=hexadecimal, label=name, alpha="255")
        ElementTree.SubElement(categories, "category", value=number, symbol=number, label=name, render="true")
        symbol = ElementTree.SubElement(symbols, "symbol", type="fill", name=number, alpha="1", clip_to_extent="1")
        layer = ElementTree.SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1", "pass": "0"})
        options = ElementTree.SubElement(layer, "Option", type="Map")
        for key, value in (
            ("color", f"{red},{green},{blue},255"),
            ("outline_color", "35,35,35,255"),
            ("outline_style", "solid"),
            ("outline_width", "0.1"),
            ("style", "solid"),
        ):
            ElementTree.SubElement(options, "Option", name=key, type="QString", value=value)
    ElementTree.indent(root)
    return f"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n{ElementTree.tostring(root, 'unicode')}\n"


def write_style(beside: Path, class_names: Sequence[str], colors: np.ndarray) -> None:
    """Write the style of the file `beside`, under its name with the suffix .qml. A style that the user saved there stays."""
    path = beside.with_suffix(".qml")
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    new = path.with_suffix(".qml.new")
    new.write_text(qgis_style(class_names, colors), encoding="utf-8")
    os.replace(new, path)
