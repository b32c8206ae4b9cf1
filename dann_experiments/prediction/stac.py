"""A STAC item (version 1.1) beside a class map: where and when it is, its files, its classes, and the image it was made of.

https://github.com/radiantearth/stac-spec; extensions projection, classification, raster and processing. The item is plain JSON,
with paths relative to its own folder, so that a folder of maps can be moved.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import numpy as np

from dann_experiments.config.atomic_write import writing
from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import is_remote
from dann_experiments.data.rasters import open_raster
from dann_experiments.data.virtual import addresses, origins
from dann_experiments.names import Confidence
from dann_experiments.prediction.confidence import MEANINGS
from dann_experiments.prediction.find_images import CONFIDENCE, PROBABILITIES, STAC, path_beside
from dann_experiments.prediction.rasters import NODATA, PROBABILITY_STEPS, TIFF_SUFFIXES, read_tags

VERSION = "1.1.0"
EXTENSIONS = {
    prefix: f"https://stac-extensions.github.io/{name}/schema.json"
    for prefix, name in (
        ("proj:", "projection/v2.0.0"), ("classification:", "classification/v2.0.0"), ("raster:", "raster/v2.0.0"),
        ("processing:", "processing/v1.2.0"),
    )
}  # fmt: skip
"""Prefix of an extension's fields -> its schema."""
GEOPACKAGE, GEOJSON = "application/geopackage+sqlite3", "application/geo+json"
GEOTIFF = "image/tiff; application=geotiff; profile=cloud-optimized"
DENSE = 21
"""Points per edge of a footprint: straight lines of one CRS are curves in another."""
DIGITS = 7  # of degrees: a centimeter
TIME_TAGS = (
    ("IMAGERY", "ACQUISITIONDATETIME"), (None, "EXIF_DateTimeOriginal"), (None, "EXIF_DateTime"), (None, "TIFFTAG_DATETIME"),
)  # fmt: skip
"""(domain, name) of the metadata in which GDAL gives the time of an image, the best first."""
WRONG_TIME = "give a date, a time or a period, such as 2026-06-30, 2026-06-30T10:15:00Z or 2026-05-01/2026-09-30"
Times = Mapping[str, str | None]
"""The properties datetime or, of a period, datetime null with start_datetime and end_datetime; in UTC."""


def times_of_text(text: str, key: str) -> Times:
    """Return the times that a date, a time (without a zone: UTC) or a period FROM/TO means. A date is a period of a day.

    Raises InputError that names the setting `key` for any other text.
    """
    start, slash, end = text.strip().partition("/")
    try:
        if not slash and _time_of_day(start):
            return {"datetime": _rfc3339(datetime.fromisoformat(start))}
        first, last = _bound(start, time.min), _bound(end if slash else start, time(23, 59, 59))
    except ValueError:
        raise InputError(f"{key} is {text!r}; {WRONG_TIME}.") from None
    if last < first:
        raise InputError(f"{key} is {text!r}, which ends before it starts; {WRONG_TIME}.")
    return {"datetime": None, "start_datetime": _rfc3339(first), "end_datetime": _rfc3339(last)}


def times_of(image: Path, given: str | None) -> Times:
    """Return the times of an image: `given` (`times_of_text`), those of the STAC item beside it, or of its own metadata; of
    an image in several files, those of the first.

    Raises InputError if none of these is known.
    """
    if given is not None:
        return times_of_text(given, "stac_datetime")
    first = next(
        iter(origins(image)), image
    )  # of an image in several files, whose own file is a small one in the cache
    item = item_beside(first)
    if item is not None:
        own = {key: item[1].get(key) for key in ("datetime", "start_datetime", "end_datetime") if key in item[1]}
        if own.get("datetime") or (own.get("start_datetime") and own.get("end_datetime")):
            return own
    with open_raster(first) as file:
        for domain, name in TIME_TAGS:
            tags = file.tags(ns=domain) if domain else file.tags()
            found = _tag_time(tags.get(name, ""))
            if found is not None:
                return {"datetime": _rfc3339(found)}
    raise InputError(
        f"image {image} does not say when it was taken (no STAC item beside it, no time in its metadata), but a STAC item needs "
        f"that; set stac_datetime: {WRONG_TIME}."
    )


def item_beside(image: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Return path and properties of the STAC item beside an image, STEM.stac.json or STEM.json, that has it among its assets."""
    for name in (f"{image.stem}.stac.json", f"{image.stem}.json"):
        path = image.with_name(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            assets = found["assets"].values() if found["type"] == "Feature" else ()
            names = [path.parent / asset["href"] for asset in assets]
            if any(os.path.realpath(one) == os.path.realpath(image) for one in names):
                return path, dict(found["properties"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # none, or something else
            continue
    return None


def write_item(
    output: Path, image: Path, times: Times, class_names: Sequence[str], colors: np.ndarray, probabilities: bool,
    confidence: Confidence | None, polygons: Path | None = None,
) -> Path:  # fmt: skip
    """Write the item of the finished map `output` of `image` and return its path.

    `colors`: (K, 3) in 0..1; `probabilities`, `confidence`, `polygons`: the files that were written with it. Model, software and
    run are those of the map's metadata.
    """
    path = path_beside(output, STAC)
    tags = read_tags(output)
    sources = [
        source if is_remote(source) else _href(item[0] if (item := item_beside(Path(source))) else Path(source), path)
        for source in addresses(image)
    ]
    name, _, version = tags.get("software", "").partition(" ")
    properties = {
        **times,
        "created": _rfc3339(datetime.now(UTC)),
        **({"processing:software": {name: version}} if name else {}),
    }
    properties |= {f"dann:{key.removeprefix('dann_')}": tags[key] for key in ("model", "dann_run_id") if key in tags}
    footprint, projection = _place(output)
    properties |= projection
    assets = _assets(output, class_names, colors, probabilities, confidence)
    if polygons is not None:
        kind = GEOPACKAGE if polygons.suffix.lower() == ".gpkg" else GEOJSON
        assets["polygons"] = {"href": _href(polygons, path), "title": "Polygons", "type": kind, "roles": ["data"]}
    used = [schema for prefix, schema in EXTENSIONS.items() if f'"{prefix}' in json.dumps([properties, assets])]
    item = {
        "type": "Feature", "stac_version": VERSION, "stac_extensions": used, "id": output.stem, **footprint,
        "properties": properties,
        "links": [{"rel": "derived_from", "href": source} for source in dict.fromkeys(sources)],
        "assets": assets,
    }  # fmt: skip
    part = path.with_name(f"{path.name}.partial")
    with writing(path, part):
        part.write_text(json.dumps(item, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    return path


def _assets(
    output: Path, class_names: Sequence[str], colors: np.ndarray, probabilities: bool, confidence: Confidence | None
) -> dict[str, Any]:
    classes = [
        {"value": number, "name": _slug(name, number), "title": name, "color_hint": _hex(color)}
        for number, (name, color) in enumerate(zip(class_names, colors, strict=True))
    ]
    geotiff = output.suffix.lower() in TIFF_SUFFIXES
    found: dict[str, Any] = {
        "map": {
            "href": f"./{output.name}", "title": "Class ids", "type": GEOTIFF if geotiff else "image/png", "roles": ["data"],
            "data_type": "uint8", "nodata": NODATA, "classification:classes": classes,
        }
    }  # fmt: skip
    if probabilities:
        found["probabilities"] = {
            "href": f"./{path_beside(output, PROBABILITIES).name}", "title": "Probability of each class", "type": GEOTIFF,
            "roles": ["data"], "data_type": "uint8", "nodata": NODATA, "raster:scale": 1 / PROBABILITY_STEPS,
            "bands": [{"name": name} for name in class_names],
        }  # fmt: skip
    if confidence is not None:
        found["confidence"] = {
            "href": f"./{path_beside(output, CONFIDENCE).name}", "title": f"Confidence: {MEANINGS[confidence]}",
            "type": GEOTIFF, "roles": ["data"], "data_type": "float32", "nodata": "nan",
        }  # fmt: skip
    return found


def _place(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return geometry and bbox in WGS 84, and the properties of the extension projection; without georeference no place."""
    from rasterio.transform import from_gcps
    from rasterio.warp import transform_geom

    with open_raster(path) as file:
        points, crs_of_points = file.gcps
        crs = crs_of_points if points else file.crs
        transform = from_gcps(points) if points else file.transform
        shape = [file.height, file.width]
        projection: dict[str, Any] = {"proj:shape": shape}
        if crs is None:
            return {"geometry": None}, projection
        if not points:
            projection["proj:transform"] = list(transform)[:6]
    authority = crs.to_authority()
    projection["proj:code"] = ":".join(authority) if authority else None
    if authority is None:
        projection["proj:wkt2"] = crs.to_wkt(version="WKT2_2019")
    a, b, c, d, e, f = transform[:6]
    ring = [(a * column + b * row + c, d * column + e * row + f) for column, row in _edge(*shape)]
    if a * e - b * d > 0:  # rows go north
        ring.reverse()
    geometry = {"type": "Polygon", "coordinates": [ring]}
    geometry = transform_geom(crs, "EPSG:4326", geometry, antimeridian_cutting=True, precision=DIGITS)
    geometry = json.loads(json.dumps(geometry))  # lists instead of tuples
    return {"geometry": geometry, "bbox": _bbox(geometry)}, projection


def _edge(height: int, width: int) -> list[tuple[float, float]]:
    """Return (column, row) of points around a raster, closed; counterclockwise on a map whose rows go south, as RFC 7946 asks."""
    steps = np.linspace(0, 1, DENSE)[:-1]
    corners = [(0, 0), (0, height), (width, height), (width, 0), (0, 0)]
    points = [
        (float(x0 + step * (x1 - x0)), float(y0 + step * (y1 - y0)))
        for (x0, y0), (x1, y1) in itertools.pairwise(corners)
        for step in steps
    ]
    return [*points, points[0]]


def _bbox(geometry: Mapping[str, Any]) -> list[float]:
    """Return [west, south, east, north]; west is larger than east for a map across the antimeridian, as RFC 7946 asks."""
    parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    boxes = [(*np.min(part[0], axis=0)[:2], *np.max(part[0], axis=0)[:2]) for part in parts]
    west, south, east, north = (float(f([box[side] for box in boxes])) for side, f in enumerate((min, min, max, max)))
    if len(boxes) > 1 and west <= -180 and east >= 180:
        west = float(min(box[0] for box in boxes if box[2] >= 180))
        east = float(max(box[2] for box in boxes if box[0] <= -180))
    return [west, south, east, north]


def _href(path: Path, item: Path) -> str:
    """Return the path relative to the item's folder, or absolute where there is none (another drive)."""
    try:
        return Path(os.path.relpath(path.resolve(), item.parent.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_uri()


def _slug(name: str, number: int) -> str:
    """Return a class name of the letters that the extension allows."""
    return re.sub(r"[^0-9A-Za-z_-]+", "_", name).strip("_") or f"class_{number}"


def _hex(color: np.ndarray) -> str:
    return "".join(f"{round(float(part) * 255):02X}" for part in color)


def _tag_time(text: str) -> datetime | None:
    """Return the time of a tag, with : or - between the parts of its date; None for anything else, also for 0000:00:00."""
    found = re.match(r"\s*(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d:\d\d:\d\d)", text)
    try:
        return found and datetime.fromisoformat(f"{found[1]}-{found[2]}-{found[3]}T{found[4]}")
    except ValueError:
        return None


def _time_of_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return True
    return False


def _bound(text: str, of_day: time) -> datetime:
    """Return a time; of a date, its first or last moment."""
    found = datetime.fromisoformat(text) if _time_of_day(text) else datetime.combine(date.fromisoformat(text), of_day)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _rfc3339(moment: datetime) -> str:
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.replace(microsecond=0).isoformat().replace("+00:00", "Z")
