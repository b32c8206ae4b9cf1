"""Draws polygons as masks, window by window: no mask of a whole image is ever in memory.

Pixels are (h, w) of a window of the working grid (see `reading`). P polygons, V distinct values of the attribute.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.annotations import coco_polygons, is_coco, yolo_polygons
from dann_experiments.data.georeference import Place, place_of
from dann_experiments.data.labels import LabelMap, read_mask
from dann_experiments.data.pixels import span_of
from dann_experiments.data.rasters import Header, Window, open_raster
from dann_experiments.data.reading import Reading
from dann_experiments.data.samples import Sample
from dann_experiments.data.vector_files import Polygons, Value, is_vector, read_polygons, some

# Corners are rounded to this part of a pixel. Differences of such numbers are exact, so that a window is drawn exactly like
# the same part of the whole image.
FINEST = 1 / 1024
# What GDAL draws with all_touched depends, where a corner of a pixel is just touched, on the edges of what it draws. Blocks at
# fixed places of the image, drawn with some pixels around, make all windows agree.
BLOCK, MARGIN = 512, 2
SHOWN_VALUES = 5  # in a message


def mask_of(sample: Sample, labels: LabelMap, reading: Reading, header: Header, window: Window) -> np.ndarray:
    """Read a window of a sample's mask, a raster or polygons, as (h, w) uint8 class ids.

    Pixels outside `sample.area` are ignored. Raises InputError as `read_mask` and `polygons_of` do.
    """
    assert sample.mask is not None
    factor = reading.factor(header, sample.image)
    if is_vector(sample.mask):
        mask = _classes(sample, labels, header, window, factor)
    else:
        mask = read_mask(sample.mask, labels, window, factor)
    if sample.area is not None:
        polygons, place = _area_of(sample, labels)
        inside = _drawn(polygons, np.ones(len(polygons.ids), np.uint8), place, header, window, factor, 0, False)
        mask[inside == 0] = labels.ignore_index
    return mask


def contested(sample: Sample, labels: LabelMap, reading: Reading, header: Header, window: Window) -> np.ndarray:
    """Return the pixels of a window, (h, w) bool, that are in polygons of several classes."""
    factor = reading.factor(header, sample.image)
    return _classes(sample, labels, header, window, factor) != _classes(sample, labels, header, window, factor, True)


def _classes(
    sample: Sample, labels: LabelMap, header: Header, window: Window, factor: float, first_on_top: bool = False
) -> np.ndarray:
    """Return the class ids (h, w) of a window of a mask that is polygons; the last one in the file is on top."""
    polygons, place = polygons_of(sample, labels, header)
    rules = labels.vector
    outside = labels.ignore_index if rules.background is None else rules.background
    values = class_ids(polygons, labels, sample)[polygons.value_of]
    return _drawn(polygons, values, place, header, window, factor, outside, rules.all_touched, first_on_top)


def check_vectors(sample: Sample, labels: LabelMap | None, header: Header) -> None:
    """Raise InputError if the polygons of a sample's mask or area cannot be used. Without `labels`, classes are not checked."""
    if sample.mask is not None and is_vector(sample.mask):
        polygons, _ = polygons_of(sample, labels or LabelMap(0), header)
        if labels is not None:
            class_ids(polygons, labels, sample)
    elif sample.layer is not None:
        raise InputError(
            f"image {sample.image} has the layer {sample.layer!r}, but its mask {sample.mask} has none; remove it."
        )
    if sample.area is not None:
        _area_of(sample, labels or LabelMap(0))


def polygons_of(sample: Sample, labels: LabelMap, header: Header) -> tuple[Polygons, Place | None]:
    """Return the polygons of a sample's mask, and the image's place if they are in coordinates of its CRS, not in pixels.

    Raises InputError for a file that cannot be read or does not fit the image.
    """
    path, height, width = sample.mask, header.height, header.width
    assert path is not None
    pixels = path.suffix.lower() == ".txt" or is_coco(path)
    if pixels and (labels.vector.attribute is not None or sample.layer is not None):
        part = f"{labels.settings}label_attribute" if sample.layer is None else "layer"
        raise InputError(f"{path} holds annotations of COCO or YOLO, which have no {part}; leave it out.")
    if path.suffix.lower() == ".txt":
        return yolo_polygons(path, height, width), None
    if pixels:
        return coco_polygons(path, sample.image, height, width), None
    place = _place(sample, path)
    return read_polygons(path, sample.layer, labels.vector.attribute, place.crs, labels.settings), place


def _area_of(sample: Sample, labels: LabelMap) -> tuple[Polygons, Place]:
    assert sample.area is not None
    place = _place(sample, sample.area)
    return read_polygons(sample.area, None, None, place.crs, labels.settings), place


def _place(sample: Sample, path: Any) -> Place:
    with open_raster(sample.image) as file:
        place = place_of(file)
    if place is None:
        raise InputError(
            f"image {sample.image} has no georeference, so the polygons of {path} cannot be laid over it; give georeferenced "
            "images, or polygons in pixels as COCO (.json) or YOLO (.txt)."
        )
    return place


def class_ids(polygons: Polygons, labels: LabelMap, sample: Sample) -> np.ndarray:
    """Return the class id of each distinct value (V,) uint8. Raises InputError for values that no class belongs to."""
    if polygons.values and labels.vector.attribute is None and polygons.values[0].number is None and _is_geo(sample):
        return np.full(len(polygons.values), _only_class(labels, sample), np.uint8)
    found = [_class_id(value, labels) for value in polygons.values]
    unknown = [number for number, index in enumerate(found) if index is None]
    if unknown:
        raise InputError(_unknown(unknown, polygons, labels, sample))
    return np.array(found, np.uint8)


def _is_geo(sample: Sample) -> bool:
    assert sample.mask is not None
    return sample.mask.suffix.lower() != ".txt" and not is_coco(sample.mask)


def _only_class(labels: LabelMap, sample: Sample) -> int:
    """Return the only class besides the background, to which polygons belong if no attribute names their class."""
    rules = labels.vector
    others = [index for index in range(len(labels.class_names)) if index != rules.background]
    if len(others) == 1:
        return others[0]
    raise InputError(
        f"{labels.settings}label_attribute is not set, so all polygons of {sample.mask} would be of one class, but it could be "
        f"any of {[labels.class_names[index] for index in others]}; name the attribute that holds the class, or set "
        f"{labels.settings}label_background if the other class is what lies outside the polygons."
    )


def _class_id(value: Value, labels: LabelMap) -> int | None:
    """Return the class id of a value (or ignore_index); None if no setting says what it means."""
    rules, number = labels.vector, value.number
    if rules.texts is not None:
        for text in (value.text, None if number is None else str(number)):
            if text is not None and text in rules.texts:
                return rules.texts[text]
    elif value.text is not None and value.text in labels.class_names:
        return labels.class_names.index(value.text)
    if number is None or (value.text is not None and labels.ids is None):  # ids of categories are not class ids
        return None
    if rules.texts is not None and labels.ids is None:
        return labels.ignore_index if number in labels.ignored else None
    return labels.network_id(number)


def _unknown(positions: list[int], polygons: Polygons, labels: LabelMap, sample: Sample) -> str:
    """Return the message for values without a class."""
    rules = labels.vector
    what = "category" if rules.attribute is None else rules.attribute
    shown = [f"{what} {polygons.values[number].shown}" for number in positions[:SHOWN_VALUES]]
    more = f" and {len(positions) - SHOWN_VALUES} more values" if len(positions) > SHOWN_VALUES else ""
    ids = polygons.ids[np.isin(polygons.value_of, positions)]
    if [polygons.values[number] for number in positions] == [Value("")]:
        return (
            f"{sample.mask}: {len(ids)} features have no value in {what} (ids {some(ids)}); give them one, or set "
            f'{labels.settings}label_map {{"": ignored}}.'
        )
    known = (
        f"which {labels.settings}label_map does not name; add them there, with the class ignored if they count nowhere"
        if rules.texts is not None
        else f"which are not among the classes {list(labels.class_names)}; say in {labels.settings}label_map which class they are"
    )
    return f"{sample.mask}: {len(ids)} features (ids {some(ids)}) have {', '.join(shown)}{more}, {known}."


def to_pixels(shapes: np.ndarray, place: Place | None) -> np.ndarray:
    """Return shapes with corners in pixels (column, row) of the image; `place` None: they are in pixels already."""
    import shapely

    def move(points: np.ndarray) -> np.ndarray:
        if place is not None:
            a, b, c, d, e, f = (~place.transform)[:6]
            x, y = points.T
            points = np.column_stack([a * x + b * y + c, d * x + e * y + f])
        return np.round(points / FINEST) * FINEST

    return shapely.transform(shapes, move)


def box_around(window: tuple[float, float, float, float], place: Place | None) -> tuple[float, float, float, float]:
    """Return (least x, least y, largest x, largest y), in coordinates of the polygons, of a box of pixels.

    `window`: (top, left, height, width)."""
    top, left, height, width = window
    corners = [(left, top), (left + width, top), (left, top + height), (left + width, top + height)]
    if place is not None:
        a, b, c, d, e, f = place.transform[:6]
        corners = [(a * x + b * y + c, d * x + e * y + f) for x, y in corners]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _drawn(
    polygons: Polygons, values: np.ndarray, place: Place | None, header: Header, window: Window, factor: float, outside: int,
    all_touched: bool, first_on_top: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return a window (h, w) uint8 with the values (F,) of the features, later ones on top, and `outside` elsewhere."""
    if not all_touched:
        return _burnt(polygons, values, place, header, window, factor, outside, False, first_on_top)
    found = np.empty((window.height, window.width), np.uint8)
    bottom, right = window.top + window.height, window.left + window.width
    for top in range(window.top // BLOCK * BLOCK, bottom, BLOCK):
        for left in range(window.left // BLOCK * BLOCK, right, BLOCK):
            block = _burnt(
                polygons, values, place, header, Window(top, left, BLOCK, BLOCK), factor, outside, True, first_on_top
            )
            rows = slice(max(top, window.top), min(top + BLOCK, bottom))
            columns = slice(max(left, window.left), min(left + BLOCK, right))
            found[
                rows.start - window.top : rows.stop - window.top,
                columns.start - window.left : columns.stop - window.left,
            ] = block[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return found


def _burnt(
    polygons: Polygons, values: np.ndarray, place: Place | None, header: Header, window: Window, factor: float, outside: int,
    all_touched: bool, first_on_top: bool,
) -> np.ndarray:  # fmt: skip
    """Do the same for one window in one piece; with `all_touched` it may reach beyond the image."""
    import shapely
    from rasterio.features import rasterize

    shape = (window.height, window.width)
    top, left, height, width = span_of(window, factor, header)
    if all_touched:
        height, width = window.height * factor, window.width * factor
    step = np.array([width / shape[1], height / shape[0]])
    margin = MARGIN * step.max() + 1  # and a corner may move by half of FINEST
    around = (top - margin, left - margin, height + 2 * margin, width + 2 * margin)
    chosen = polygons.within(*box_around(around, place))[:: -1 if first_on_top else 1]
    if not len(chosen):
        return np.full(shape, outside, np.uint8)
    shapes = to_pixels(shapely.from_wkb(polygons.wkb[chosen]), place)
    shapes = shapely.transform(shapes, lambda points: (points - (left, top)) / step + MARGIN)
    pairs = zip(shapes, values[polygons.feature[chosen]].tolist(), strict=True)
    larger = (shape[0] + 2 * MARGIN, shape[1] + 2 * MARGIN)
    found = rasterize(pairs, larger, fill=outside, all_touched=all_touched, dtype="uint8")
    return found[MARGIN:-MARGIN, MARGIN:-MARGIN].copy()  # pyright: ignore[reportOptionalSubscript]
