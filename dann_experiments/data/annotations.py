"""Reads polygons of photographs from COCO (.json) and YOLO (.txt) files, in pixels of the image as it is shown."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dann_experiments.config.errors import InputError
from dann_experiments.config.yaml_loader import YAML_ERRORS
from dann_experiments.data.vector_files import Polygons, Value, needed, shapefile_parts, some, split_up, state_of

COCO_KEYS = {"images", "annotations", "categories"}
NAMES_FILE = "data.yaml"  # of YOLO, with the names of the class ids
FOLDERS_ABOVE = 3  # to look for it in: ROOT/labels/train/x.txt
LEAST_NUMBERS = 6  # three corners


@dataclass(frozen=True, eq=False)
class _Photo:
    """An image of a COCO file."""

    name: str
    size: tuple[Any, Any]
    """(width, height); None where the file does not say."""
    annotations: list[Mapping[str, Any]]


@functools.lru_cache(maxsize=64)
def _is_coco(path: Path, state: object) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096)
    if b'"FeatureCollection"' in head or b'"Feature"' in head:  # no need to read all of a large GeoJSON
        return False
    content = _json(path)
    return isinstance(content, dict) and set(content) >= COCO_KEYS


def is_coco(path: Path) -> bool:
    """Return True for a .json file with the keys of COCO. Raises InputError if it cannot be read as JSON."""
    return path.suffix.lower() == ".json" and _is_coco(path, state_of(path))


def coco_polygons(path: Path, image: Path, height: int, width: int) -> Polygons:
    """Return the polygons of an image (`height` x `width` as shown). Raises InputError if the file has other ones, or none."""
    return _of_photo(path, state_of(path), image, height, width)


def side_files(path: Path) -> list[Path]:
    """Return the further files that decide what a label file says: the parts of a Shapefile, the names of YOLO's classes."""
    named = names_file(path) if path.suffix.lower() == ".txt" else None
    return shapefile_parts(path) + ([] if named is None else [named])


def names_file(path: Path) -> Path | None:
    """Return the file with the names of the class ids in a YOLO label file; None if there is none."""
    folders = path.absolute().parents[:FOLDERS_ABOVE]
    return next((folder / NAMES_FILE for folder in folders if (folder / NAMES_FILE).is_file()), None)


def yolo_polygons(path: Path, height: int, width: int) -> Polygons:
    """Return the polygons of a YOLO label file, for an image of `height` x `width` pixels as shown.

    Raises InputError for boxes, and for lines that are not a class id and the corners of a polygon between 0 and 1.
    """
    named = names_file(path)
    return _of_lines(path, state_of(path), named, None if named is None else state_of(named), height, width)


@functools.lru_cache(maxsize=256)
def _of_lines(path: Path, state: object, named: Path | None, its_state: object, height: int, width: int) -> Polygons:
    needed(path)
    names = {} if named is None else _names(named)
    items: list[tuple[Any, Value, list[np.ndarray]]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as YOLO labels: {error}") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            index, corners = int(words[0]), np.array([float(word) for word in words[1:]])
        except ValueError:
            raise InputError(
                f"{path}, line {number}: {line[:40]!r} is not a class id and numbers; YOLO polygons are: ID X1 Y1 X2 Y2 X3 Y3 ..."
            ) from None
        if len(corners) == 4:
            raise InputError(
                f"{path}, line {number} holds a box (4 numbers); labels are polygons of three corners and more. A box is no "
                "mask: export the labels for segmentation."
            )
        if len(corners) < LEAST_NUMBERS or len(corners) % 2 or not ((corners >= 0) & (corners <= 1)).all():
            raise InputError(
                f"{path}, line {number} has {len(corners)} numbers after the class id, from {min(corners, default=0):g} to "
                f"{max(corners, default=0):g}; give an x and a y from 0 to 1 for each of three corners or more."
            )
        if names and index not in names:
            raise InputError(f"{path}, line {number} has class id {index}, which {named} does not name; add it there.")
        items.append((number, Value(names.get(index), index), [corners.reshape(-1, 2) * (width, height)]))
    return _built(path, items)


def _names(path: Path) -> dict[int, str]:
    """Return class id -> name from a YOLO data.yaml."""
    try:
        found = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("names")
        pairs = found.items() if isinstance(found, dict) else enumerate(found or [])
        return {int(index): str(name) for index, name in pairs}
    except (OSError, UnicodeDecodeError, *YAML_ERRORS) as error:
        raise InputError(f"{path} cannot be read for the names of the classes: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None


@functools.lru_cache(maxsize=2)
def _coco(path: Path, state: object) -> tuple[dict[str, list[_Photo]], dict[Any, str]]:
    """Return the images of a COCO file by the last part of their name, and category id -> name."""
    content = _json(path)
    try:
        categories = {one["id"]: str(one["name"]) for one in content["categories"]}
        photos = {
            one["id"]: _Photo(str(one["file_name"]), (one.get("width"), one.get("height")), [])
            for one in content["images"]
        }
        lost = []
        for annotation in content["annotations"]:
            if annotation["image_id"] in photos:
                photos[annotation["image_id"]].annotations.append(annotation)
            else:
                lost.append(annotation.get("id"))
            if annotation["category_id"] not in categories:
                raise InputError(
                    f"{path}: annotation {annotation.get('id')} has category {annotation['category_id']}, which categories lacks."
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as COCO annotations: {error!r} in it is missing or wrong.") from None
    if lost:
        raise InputError(f"{path}: {len(lost)} annotations are of images that it does not list (ids {some(lost)}).")
    by_name: dict[str, list[_Photo]] = {}
    for photo in photos.values():
        by_name.setdefault(_parts(photo.name)[-1], []).append(photo)
    return by_name, categories


def _parts(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").split("/") if part] or [""]


def _found(path: Path, by_name: Mapping[str, Sequence[_Photo]], image: Path) -> _Photo:
    """Return the entry of an image: of those with its file name, the one with most folders in common."""

    def common(photo: _Photo) -> int:
        ours, its = [list(reversed(_parts(name))) for name in (str(image), photo.name)]
        return next((i for i, (a, b) in enumerate(zip(ours, its, strict=False)) if a != b), min(len(ours), len(its)))

    ranked = sorted(by_name.get(image.name, ()), key=common, reverse=True)
    if not ranked:
        raise InputError(f"{path} lists no image called {image.name}; its annotations cannot be those of {image}.")
    if len(ranked) > 1 and common(ranked[0]) == common(ranked[1]):
        raise InputError(
            f"{path} lists {ranked[0].name} and {ranked[1].name}, either of which could be {image}; give "
            "file_name with its folders."
        )
    return ranked[0]


@functools.lru_cache(maxsize=256)
def _of_photo(path: Path, state: object, image: Path, height: int, width: int) -> Polygons:
    needed(path)
    by_name, categories = _coco(path, state)
    photo = _found(path, by_name, image)
    if None not in photo.size and photo.size != (width, height):
        raise InputError(
            f"{path} describes {photo.name} as {photo.size[0]} x {photo.size[1]} pixels (width x height), but {image} is "
            f"{width} x {height} as it is shown; give the image that was annotated."
        )
    items: list[tuple[Any, Value, list[np.ndarray]]] = []
    boxes = []
    for annotation in photo.annotations:
        shape, number = annotation.get("segmentation"), annotation.get("id")
        if not shape:
            boxes.append(number)
            continue
        category = annotation["category_id"]
        value = Value(categories[category], category if isinstance(category, int) else None)
        rings = (
            _runs(path, number, shape, height, width)
            if isinstance(shape, Mapping)
            else [_ring(path, number, ring) for ring in shape]
        )
        items.append((number, value, rings))
    if boxes:
        raise InputError(
            f"{path}: {len(boxes)} annotations of {photo.name} have no polygon, only a box (ids {some(boxes)}); labels are "
            "polygons. Take them out, or draw them."
        )
    return _built(path, items)


def _ring(path: Path, number: Any, ring: Any) -> np.ndarray:
    """Return the corners (N, 2) of a COCO polygon [x1, y1, x2, y2, ...]."""
    try:
        corners = np.array(ring, np.float64)
    except (TypeError, ValueError):
        corners = np.empty((0, 0))
    if corners.ndim != 1 or len(corners) < LEAST_NUMBERS or len(corners) % 2 or not np.isfinite(corners).all():
        raise InputError(
            f"{path}: annotation {number} has a polygon that is not a list of x and y of three corners or more."
        )
    return corners.reshape(-1, 2)


def _runs(path: Path, number: Any, shape: Mapping[str, Any], height: int, width: int) -> list[Any]:
    """Return the outlines of a mask in run lengths, {"counts": [...], "size": [height, width]}, column after column."""
    import shapely
    from rasterio.features import shapes

    counts = shape.get("counts")
    if isinstance(counts, (str, bytes)):
        raise InputError(
            f"{path}: annotation {number} is a compressed run-length mask, which is not read; write it as polygons or as plain "
            'run lengths ("counts": [...]), for example with pycocotools: mask.decode.'
        )
    try:
        runs = np.array(counts, np.int64)
        if list(shape["size"]) != [height, width] or runs.min(initial=0) < 0 or runs.sum() != height * width:
            raise ValueError
        filled = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(width, height).T
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: annotation {number} has run lengths that do not fit an image of {height} x {width} pixels."
        ) from None
    return [shapely.geometry.shape(outline) for outline, _ in shapes(np.ascontiguousarray(filled), filled == 1)]


def _built(path: Path, items: Sequence[tuple[Any, Value, list[Any]]]) -> Polygons:
    """Return the polygons of items (id, value, rings of corners (N, 2) or polygons)."""
    import shapely

    positions: dict[Value, int] = {}
    value_of = [positions.setdefault(value, len(positions)) for _, value, _ in items]
    ids = np.array([number for number, _, _ in items], object)
    rings = [(place, ring) for place, (_, _, rings) in enumerate(items) for ring in rings]
    owner = np.array([place for place, _ in rings], np.int64)
    shapes = [shapely.Polygon(ring) if isinstance(ring, np.ndarray) else ring for _, ring in rings]
    wkb = np.array(shapely.to_wkb(np.array(shapes, object)), object)
    made = split_up(path, ids[owner], wkb)
    made |= {"feature": owner[made["feature"]]}
    made |= {name: tuple(dict.fromkeys(made[name])) for name in ("empty", "mended")}
    return Polygons(ids=ids, values=list(positions), value_of=np.array(value_of, np.int64), **made)
