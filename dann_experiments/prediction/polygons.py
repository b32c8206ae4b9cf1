"""Traces the class regions of a map as polygons, one block of rows after the other, in bounded memory.

Letters: h x w pixels of a block, which is as wide as the map; n regions. A region is a set of pixels of one class that are
neighbors by their sides, as in `rasterio.features.shapes`. Coordinates are pixels of the map, x to the right and y down; corners
of pixels are whole numbers, so every step is exact. Only regions that reach the next block are kept in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dann_experiments.prediction.rasters import NODATA

if TYPE_CHECKING:
    from shapely import LinearRing, Polygon


class Regions(NamedTuple):
    """Finished regions."""

    classes: np.ndarray
    """(n,) class ids."""
    pixels: np.ndarray
    """(n,) sizes in pixels of the map."""
    confidence: np.ndarray
    """(n,) mean confidence, 0..1; NaN = not known."""
    shapes: np.ndarray
    """(n,) shapely polygons."""


@dataclass
class _Open:
    """A region that may continue in the next block."""

    class_id: int
    pixels: int = 0
    total: float = 0.0
    """Sum of the confidence of its pixels."""
    pieces: list[Polygon] = field(default_factory=list)
    """Its part of each block, without the holes below."""
    holes: list[LinearRing] = field(default_factory=list)
    """Holes that touch no border of a block, so that joining the pieces does not change them."""

    def take(self, other: _Open) -> None:
        """Add a part of this region, or a region that turned out to be the same."""
        self.pixels, self.total = self.pixels + other.pixels, self.total + other.total
        self.pieces += other.pieces
        self.holes += other.holes


class Tracer:
    """Traces a map of `height` rows, whose blocks come from top to bottom."""

    def __init__(self, height: int, min_pixels: float = 0.0, tolerance: float = 0.0) -> None:
        """`min_pixels`: smaller regions are left out; `tolerance`: how much outlines are simplified, in pixels."""
        self.height, self.min_pixels, self.tolerance = height, min_pixels, tolerance
        self._top = 0
        self._open: dict[int, _Open] = {}
        self._edge = (np.empty(0, np.uint8), np.empty(0, np.int64))
        """Class ids of the last row (w,), and the keys of the open regions there, -1 = none."""

    def add(self, ids: np.ndarray, confidence: np.ndarray | None = None) -> Regions:
        """Add the next block of class ids (h, w) uint8, NODATA = no class; return the regions that are finished.

        `confidence`: (h, w) in 0..1, of all blocks or of none.
        """
        from skimage.measure import label

        labels = np.asarray(label(ids, connectivity=1, background=-1), np.int32)
        count = int(labels.max()) + 1  # labels start at 1
        classes = np.full(count, NODATA, np.uint8)
        classes[labels.ravel()] = ids.ravel()
        pixels = np.bincount(labels.ravel(), minlength=count)
        totals = np.full(count, np.nan)
        if confidence is not None:
            totals = np.bincount(labels.ravel(), confidence.ravel(), count)
        bottom = self._top + len(ids)
        is_whole = np.ones(count, bool)
        for row, at_border in ((0, self._top > 0), (-1, bottom < self.height)):
            if at_border:
                is_whole[labels[row]] = False
        wanted = (classes != NODATA) & (~is_whole | (pixels >= self.min_pixels))
        # neighbors are needed to simplify, even those that are not wanted
        shapes = _shapes_of(labels, None if self.tolerance else wanted[labels], self._top, count)
        if self.tolerance:
            shapes[1:] = _simplified(shapes[1:], self.tolerance)
            wholes = is_whole & wanted
            shapes[wholes] = without_straight(shapes[wholes])
        found = np.flatnonzero(is_whole & wanted)
        cut = {
            int(index): self._cut(int(classes[index]), int(pixels[index]), float(totals[index]), shapes[index], bottom)
            for index in np.flatnonzero(~is_whole & wanted)
        }
        closed = self._continue(ids, labels, cut, bottom)
        self._top = bottom
        return Regions(
            np.concatenate([classes[found], np.array([one.class_id for one in closed], np.uint8)]),
            np.concatenate([pixels[found], np.array([one.pixels for one in closed], np.int64)]),
            np.concatenate([totals[found] / pixels[found], np.array([one.total / one.pixels for one in closed])]),
            np.concatenate([shapes[found], _joined(closed)]),
        )

    def _cut(self, class_id: int, pixels: int, total: float, shape: Polygon, bottom: int) -> _Open:
        """Return a region that touches a border of the block."""
        import shapely

        if not shape.interiors:
            return _Open(class_id, pixels, total, [shape])
        holes = np.array(list(shape.interiors), object)
        bounds = shapely.bounds(holes)
        touches = (bounds[:, 1] == self._top) | (bounds[:, 3] == bottom)
        return _Open(
            class_id, pixels, total, [shapely.Polygon(shape.exterior, list(holes[touches]))], list(holes[~touches])
        )

    def _continue(self, ids: np.ndarray, labels: np.ndarray, cut: dict[int, _Open], bottom: int) -> list[_Open]:
        """Join the open regions with those of the block, `cut`, by label; return the regions that end here."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        before, new = list(self._open), list(cut)
        if self._top:
            above, keys = self._edge
            same = (above == ids[0]) & (above != NODATA)
            pairs = np.unique(np.stack([keys[same], labels[0][same]]), axis=1)
        else:
            pairs = np.empty((2, 0), np.int64)
        ends = np.searchsorted(before, pairs[0]), np.searchsorted(new, pairs[1]) + len(before)  # both are sorted
        nodes = len(before) + len(new)
        graph = coo_array((np.ones(pairs.shape[1]), ends), (nodes, nodes))
        number, groups = connected_components(graph, directed=False) if nodes else (0, np.empty(0, int))
        regions: list[_Open | None] = [None] * number
        for group, part in zip(groups.tolist(), [*self._open.values(), *cut.values()], strict=True):
            known = regions[group]
            if known is None:
                regions[group] = part
            else:
                known.take(part)
        owner = np.full(int(labels.max()) + 1, -1)
        owner[new] = groups[len(before) :]
        self._edge = ids[-1].copy(), owner[labels[-1]]
        goes_on = set(np.unique(self._edge[1]).tolist()) if bottom < self.height else set()
        self._open = {key: one for key, one in enumerate(regions) if one is not None and key in goes_on}
        return [
            one
            for key, one in enumerate(regions)
            if one is not None and key not in goes_on and one.pixels >= self.min_pixels
        ]


def without_straight(shapes: np.ndarray) -> np.ndarray:
    """Return polygons (n,) without the vertices at which the outline goes straight on. Coordinates are whole numbers."""
    import shapely

    if not len(shapes):
        return shapes
    rings, owners = shapely.get_rings(shapes, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    starts = np.flatnonzero(np.diff(ring, prepend=-1))
    closing = np.append(starts[1:], len(points)) - 1  # the last point of a ring repeats its first
    before, after = np.arange(-1, len(points) - 1), np.arange(1, len(points) + 1)
    before[starts] = closing - 1
    inner = np.ones(len(points), bool)
    inner[closing] = False
    after = np.minimum(after, len(points) - 1)
    (x1, y1), (x2, y2) = (points - points[before]).T, (points[after] - points).T
    kept = inner & (x1 * y2 != x2 * y1)
    lines: Any = shapely.linearrings(points[kept], indices=ring[kept])
    polygons: Any = shapely.polygons(lines, indices=owners)
    return polygons


def _shapes_of(labels: np.ndarray, mask: np.ndarray | None, top: int, count: int) -> np.ndarray:
    """Return the polygon of each label (count,), None where the mask hides it; `top`: first row of the block in the map."""
    import shapely
    from rasterio.features import shapes
    from rasterio.transform import Affine

    values, rings, owners = [], [], []
    for shape, value in shapes(labels, mask, connectivity=4, transform=Affine.translation(0, top)):
        owners += [len(values)] * len(shape["coordinates"])
        values.append(int(value))
        rings += [np.array(ring) for ring in shape["coordinates"]]
    result = np.full(count, None, object)
    if values:
        lines: Any = shapely.linearrings(
            np.concatenate(rings), indices=np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
        )
        result[values] = shapely.polygons(lines, indices=owners)
    return result


def _simplified(shapes: np.ndarray, tolerance: float) -> np.ndarray:
    """Simplify the outlines of all regions of a block together, so that there are no gaps and overlaps between neighbors.

    Vertices whose triangle with their neighbors is smaller than `tolerance` squared are removed, the smallest first
    (Visvalingam & Whyatt 1993). The border of the block stays as it is, so blocks fit together, too.
    """
    import shapely

    # shared edges must have the same vertices on both sides: those at which a third region meets lack in `rasterio`'s polygons
    return shapely.coverage_simplify(shapely.segmentize(shapes, 1.0), tolerance, simplify_boundary=False)


def _joined(regions: Sequence[_Open]) -> np.ndarray:
    """Return the polygon of each region, (n,)."""
    import shapely

    result: np.ndarray[Any, Any] = np.full(len(regions), None, object)
    for index, one in enumerate(regions):
        whole = shapely.union_all(one.pieces) if len(one.pieces) > 1 else one.pieces[0]
        assert isinstance(whole, shapely.Polygon)  # its pieces are neighbors by their sides
        result[index] = shapely.Polygon(whole.exterior, [*whole.interiors, *one.holes]) if one.holes else whole
    return without_straight(result)
