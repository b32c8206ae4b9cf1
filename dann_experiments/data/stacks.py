"""Stacks files into the bands of one image: one file per band, several dates, or both.

The first file decides the pixels. Files with other pixels are resampled to them: images bilinearly, quality bands by the nearest
pixel. The result is a virtual raster (`virtual`), so windows of it are read from the files as they are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.georeference import Place, described, pixels_apart, place_of, point_at
from dann_experiments.data.nodata import fits
from dann_experiments.data.rasters import Header, open_raster, verified_header
from dann_experiments.data.virtual import SUFFIX, keep

SAME = 0.01  # pixels by which the corners of two files may differ that are taken to have the same pixels
GDAL_TYPES = {
    "uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32",
    "float32": "Float32", "float64": "Float64",
}  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """A file whose values say which pixels are not to be used."""

    bits: tuple[int, ...] = ()
    """Bits, from 0, of which any marks a pixel without data."""
    values: tuple[int, ...] = ()
    """Values that mark pixels without data."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Quality:
        """Return the settings of an entry's `quality`."""
        return cls(tuple(entry.get("bits") or ()), tuple(entry.get("values") or ()))


@dataclass(frozen=True)
class _Layer:
    """One of the files."""

    path: Path
    header: Header
    place: Place | None
    count: int
    names: tuple[str | None, ...]
    """Descriptions of the bands."""
    warped: str | None = None
    """XML of the file in the pixels of the first one; None if it has them already."""
    coverage: str | None = None
    """XML of the file's alpha band in the pixels of the first one, where it does not cover it or has a mask."""


def stack(
    files: Sequence[Path],
    nodata: float | None = None,
    warp: bool = False,
    quality: tuple[Path, Quality] | None = None,
) -> Path:
    """Return the path of a virtual raster that has the bands of all `files`, in order.

    `nodata`: value without data in files that declare none; `warp`: reproject files with another CRS than the first one, rather
    than refuse them; `quality`: the file that marks pixels without data. Raises InputError for files that cannot be stacked.
    """
    first = _layer(files[0])
    layers = [first, *(_on_grid_of(first, _layer(path), warp, "bilinear", nodata) for path in files[1:])]
    for layer in layers[1:]:
        if layer.header.dtype != first.header.dtype:
            raise InputError(
                f"{first.path} holds {first.header.dtype} values and {layer.path} {layer.header.dtype}, which have no common "
                "range, but they are to be bands of one image; write them with one type, for example with gdal_translate -ot."
            )
    if nodata is not None and not fits(nodata, first.header.dtype):
        raise InputError(f"{first.path} holds {first.header.dtype} values, of which nodata {nodata:g} is none.")
    mask = None if quality is None else _on_grid_of(first, _layer(quality[0]), warp, "nearest", None)
    name = stem_of(files)
    extra: dict[str, str] = {}
    rows = _head(first)
    numbers = itertools.count(1)
    for index, layer in enumerate(layers):
        source = _source_name(layer.path, layer.warped, f"{index:02d}", extra)
        for band in layer.header.data_bands:
            own = layer.header.nodata[band - 1]
            rows += _band(next(numbers), layer, band, source, nodata if own is None else own)
    rows += _mask_band(first, layers, mask, quality, extra)
    rows.append("</VRTDataset>\n")
    return keep({**extra, f"{name}{SUFFIX}": "\n".join(rows)}, f"{name}{SUFFIX}")


def stem_of(files: Sequence[Path]) -> str:
    """Return a readable stem for a stack: what the stems of its files have in common, or else the first stem.

    >>> stem_of([Path("T33UUP_20200101_B02_10m.jp2"), Path("T33UUP_20200101_B11_20m.jp2")])
    'T33UUP_20200101'
    """
    stems = [file.stem for file in files]
    common = "".join(letters[0] for letters in itertools.takewhile(_all_equal, zip(*stems, strict=False)))
    if any(stem[len(common) :][:1].isalnum() for stem in stems):  # do not end within a word
        common = common[: max((common.rfind(mark) for mark in "_-. "), default=-1) + 1]
    return common.strip("_-. ") or stems[0]


def _all_equal(letters: Sequence[str]) -> bool:
    return len(set(letters)) == 1


def _layer(path: Path) -> _Layer:
    """Read what a stack needs of a file. Raises InputError for a file that cannot be stacked."""
    with open_raster(path) as file:
        header = verified_header(file, path)
        if header.palette:
            raise InputError(f"{path} has a color table, so its values cannot be a band of an image; convert it first.")
        if header.orientation != 1:
            raise InputError(
                f"{path} is stored turned (EXIF orientation {header.orientation}); turn it before stacking."
            )
        if header.dtype not in GDAL_TYPES:
            raise InputError(f"{path} holds {header.dtype} values, which cannot be a band of an image.")
        place = place_of(file)
        if place is None and header.pixel_size is not None:
            place = Place(header.height, header.width, file.crs, file.transform)
        return _Layer(path.absolute(), header, place, file.count, tuple(file.descriptions))


def _on_grid_of(first: _Layer, layer: _Layer, warp: bool, way: str, nodata: float | None) -> _Layer:
    """Return the layer with the XML that shows it in the pixels of the first. Raises InputError if it cannot be shown there."""
    size, own = (f"{one.header.height} x {one.header.width}" for one in (first, layer))
    if first.place is None or layer.place is None:
        if size == own:
            return layer
        lacking = first if first.place is None else layer
        raise InputError(
            f"{first.path} is {size} pixels and {layer.path} {own}, but {lacking.path} has no georeference, so it is not known "
            "how they lie on each other; give files of one size, or georeferenced ones."
        )
    other_crs = None not in (first.place.crs, layer.place.crs) and first.place.crs != layer.place.crs
    if other_crs and not warp:
        raise InputError(
            f"{layer.path} and {first.path} have different CRS ({described(layer.place)}; {described(first.place)}), but are to "
            "be bands of one image; add `warp: true` to the entry to reproject the first-named to the other, or reproject it "
            "yourself with gdalwarp."
        )
    if size == own and not other_crs and (pixels_apart(first.place, layer.place) or 0) <= SAME:
        return layer
    overlap, covers = _covered(first.place, layer.place, other_crs)
    if not overlap:
        raise InputError(
            f"{layer.path} and {first.path} do not overlap ({described(layer.place)}; {described(first.place)}), but are to be "
            "bands of one image; check how they are paired."
        )
    declared = any(value is not None for value in layer.header.nodata)
    value = next((value for value in layer.header.nodata if value is not None), nodata)
    coverage = None if covers and not layer.header.masked else _warped(first, layer, "nearest", None, alpha=True)
    values = _warped(first, layer, way, value if declared or nodata is not None else None, alpha=False)
    return _Layer(layer.path, layer.header, layer.place, layer.count, layer.names, values, coverage)


def _covered(first: Place, layer: Place, other_crs: bool) -> tuple[bool, bool]:
    """Return whether the layer overlaps the first file, and whether it covers it all."""
    corners = [(0, 0), (first.width, 0), (0, first.height), (first.width, first.height)]
    points = [point_at(first.transform, *corner) for corner in corners]
    if other_crs:
        from rasterio.warp import transform

        try:
            xs, ys = transform(first.crs, layer.crs, [x for x, _ in points], [y for _, y in points])[:2]
        except Exception:  # PROJ knows no transform between them: opening the raster reports it
            return True, False
        points = list(zip(xs, ys, strict=True))
    pixels = np.array([point_at(~layer.transform, *point) for point in points])  # (corners, 2): column, row
    (left, top), (right, bottom) = pixels.min(0), pixels.max(0)
    overlap = left < layer.width and right > 0 and top < layer.height and bottom > 0
    inside = left >= -SAME and right <= layer.width + SAME and top >= -SAME and bottom <= layer.height + SAME
    return bool(overlap), bool(inside and not other_crs)


def _warped(first: _Layer, layer: _Layer, way: str, nodata: float | None, alpha: bool) -> str:
    """Return the XML of a virtual raster that shows a file in the pixels of the first one."""
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    assert first.place is not None
    with open_raster(layer.path) as file:
        crs = file.crs or first.place.crs
        if crs is None:  # both have only a transform: any CRS does, as long as it is the same
            crs = "EPSG:3857"
        with WarpedVRT(
            file, src_crs=crs, crs=first.place.crs or crs, transform=first.place.transform,
            width=first.header.width, height=first.header.height, resampling=Resampling[way], src_nodata=nodata,
            nodata=nodata, add_alpha=alpha and not layer.header.alpha,
        ) as shown:  # fmt: skip
            return shown.tags(ns="xml:VRT")["xml:VRT"]


def _head(first: _Layer) -> list[str]:
    rows = [f'<VRTDataset rasterXSize="{first.header.width}" rasterYSize="{first.header.height}">']
    if first.place is not None:
        if first.place.crs is not None:
            rows.append(f'<SRS dataAxisToSRSAxisMapping="1,2">{escape(first.place.crs.to_wkt())}</SRS>')
        rows.append(
            f"<GeoTransform>{', '.join(repr(float(part)) for part in first.place.transform.to_gdal())}</GeoTransform>"
        )
    return rows


def _source_name(path: Path, warped: str | None, name: str, extra: dict[str, str]) -> str:
    """Return the element that names a source: the file itself, or its warped view, which is added to `extra`."""
    if warped is None:
        return f'<SourceFilename relativeToVRT="0">{escape(str(path))}</SourceFilename>'
    name = f"sources/{name}{SUFFIX}"
    extra[name] = warped
    return f'<SourceFilename relativeToVRT="1">{name}</SourceFilename>'


def _band(number: int, layer: _Layer, band: int, source: str, nodata: float | None) -> list[str]:
    bits = layer.header.bits
    own_name = layer.names[band - 1] or (f"{layer.path.stem} {band}" if layer.header.bands > 1 else layer.path.stem)
    return [
        f'<VRTRasterBand dataType="{GDAL_TYPES[layer.header.dtype]}" band="{number}">',
        f"<Description>{escape(own_name)}</Description>",
        *([f'<Metadata domain="IMAGE_STRUCTURE"><MDI key="NBITS">{bits}</MDI></Metadata>'] if bits else []),
        *([f"<NoDataValue>{float(nodata)!r}</NoDataValue>"] if nodata is not None else []),
        f"<SimpleSource>{source}<SourceBand>{band}</SourceBand></SimpleSource>",
        "</VRTRasterBand>",
    ]


def _mask_band(
    first: _Layer,
    layers: Sequence[_Layer],
    mask: _Layer | None,
    quality: tuple[Path, Quality] | None,
    extra: dict[str, str],
) -> list[str]:
    """Return the mask of the stack: 0 where any file has no pixel, or is masked, or the quality band says so; [] if nowhere."""
    sources: list[str] = []
    every = list(layers) if mask is None else [*layers, mask]
    for index, layer in enumerate(every):
        if layer.coverage is not None:
            name = _source_name(layer.path, layer.coverage, f"{index:02d}-where", extra)
            alpha = layer.header.alpha or layer.count + 1
            sources.append(f"<SimpleSource>{name}<SourceBand>{alpha}</SourceBand></SimpleSource>")
        elif layer.header.masked and layer is not mask:
            name = _source_name(layer.path, None, "", extra)
            band = layer.header.alpha or "mask,1"
            sources.append(f"<SimpleSource>{name}<SourceBand>{band}</SourceBand></SimpleSource>")
    if mask is not None and quality is not None:
        name = _source_name(mask.path, mask.warped, "quality", extra)
        sources.append(
            f"<ComplexSource>{name}<SourceBand>1</SourceBand><LUT>{_table(mask, quality[1])}</LUT></ComplexSource>"
        )
    if not sources:
        return []
    kind = ' subClass="VRTDerivedRasterBand"' if len(sources) > 1 else ""
    product = ["<PixelFunctionType>mul</PixelFunctionType>"] if len(sources) > 1 else []  # 255 * 255 is cut off at 255
    return [
        "<MaskBand>", f'<VRTRasterBand dataType="Byte"{kind}>', *product, *sources, "</VRTRasterBand>", "</MaskBand>",
    ]  # fmt: skip


def _table(mask: _Layer, quality: Quality) -> str:
    """Return the lookup table of GDAL (it interpolates between entries) from quality values to 255 = use, 0 = do not."""
    if mask.header.dtype not in ("uint8", "uint16"):
        raise InputError(
            f"quality file {mask.path} holds {mask.header.dtype} values; it must be of 8 or 16 bit, unsigned."
        )
    values = np.arange(2 ** (8 if mask.header.dtype == "uint8" else 16))
    flags = sum(1 << bit for bit in quality.bits)
    bad = (values & flags != 0) | np.isin(values, quality.values)
    ends = np.flatnonzero(np.diff(bad))
    shown = np.unique(np.concatenate([[0, len(values) - 1], ends, ends + 1]))
    return ",".join(f"{value}:{0 if bad[value] else 255}" for value in shown)
