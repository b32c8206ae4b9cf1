"""Compares the georeferences of images and masks, and finds the unit of pixel sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# Largest distance in pixels between the corners of an image and its mask: half a pixel, if one file refers to the corners of
# pixels and the other to their centers, plus rounding.
FARTHEST = 0.501


class Place(NamedTuple):
    """Size and georeference of a file."""

    height: int
    width: int
    crs: Any
    """None if only a transform is known (a world file)."""
    transform: Any


def place_of(file: DatasetReader) -> Place | None:
    """Return the place of an open file; None without a georeference or with only ground control points."""
    transform = file.transform
    if transform.is_identity or not transform.determinant:
        return None
    return Place(file.height, file.width, file.crs, transform)


def unit_of(crs: Any) -> str | None:
    """Return the unit of a CRS's coordinates, such as metre or degree; None without a CRS."""
    if crs is None:
        return None
    if crs.is_geographic:
        return "degree"
    try:
        name = crs.units_factor[0]
    except Exception:  # PROJ knows no unit for this kind of CRS
        return None
    return str(name) or None


def pixels_apart(image: Place, mask: Place) -> float | None:
    """Return the largest distance between the corners of an image and its mask of equal size, in pixels of the image.

    None if their CRS cannot be compared. A shift, another pixel size and rows stored from south to north all show up.
    """
    corners = [(0, 0), (mask.width, 0), (0, mask.height), (mask.width, mask.height)]
    points = [point_at(mask.transform, *corner) for corner in corners]
    if image.crs is not None and mask.crs is not None and image.crs != mask.crs:
        from rasterio.warp import transform

        try:
            found = transform(mask.crs, image.crs, [x for x, _ in points], [y for _, y in points])
        except Exception:  # PROJ knows no transform between them
            return None
        points = list(zip(found[0], found[1], strict=True))
    back = ~image.transform
    found = [point_at(back, *point) for point in points]
    return max(max(abs(x - column), abs(y - row)) for (x, y), (column, row) in zip(found, corners, strict=True))


def described(place: Place) -> str:
    """Describe a place for messages: upper left corner, pixel size, CRS."""
    x, y = point_at(place.transform, 0, 0)
    name = "no CRS" if place.crs is None else place.crs.to_string()
    name = name if len(name) <= 60 else f"{name[:60]}..."
    return f"upper left corner {x:.10g}, {y:.10g}, pixels of {place.transform.a:.6g} x {place.transform.e:.6g}, {name}"


def point_at(transform: Any, column: float, row: float) -> tuple[float, float]:
    """Return the coordinates (x, y) of a place in pixels."""
    a, b, c, d, e, f = transform[:6]
    return a * column + b * row + c, d * column + e * row + f
