"""Polygons of class maps: regions of the whole map, joined over blocks, without gaps; in files that QGIS opens in our colors."""

from __future__ import annotations

import functools
import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.features import shapes
from rasterio.transform import Affine
from test_predict import NAMES, PLACE, make_network, picture, read, run, save, write_tiff

from dann_experiments.config import InputError
from dann_experiments.prediction import mapping, vector_file
from dann_experiments.prediction.polygons import Tracer
from dann_experiments.prediction.qgis_style import qgis_style
from dann_experiments.reports.colors import class_colors

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
network = functools.cache(make_network)


@pytest.fixture
def model(workplace: Path) -> str:
    return str(save("model", network()))


def drawn(seed: int, no_data: bool = True, coarse: int = 1) -> np.ndarray:
    """(h, w) uint8 of noise, the hardest map: regions that touch at corners, holes, holes in holes."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    ids = rng.choice([0, 1, 255] if no_data else [0, 1, 2], (height, width))
    return ids.repeat(coarse, 0).repeat(coarse, 1).astype(np.uint8)


def wanted(ids: np.ndarray, transform: Affine = Affine.identity()) -> list[tuple[int, bytes]]:
    """The polygons of the whole map at once, by rasterio."""
    found = shapes(ids, ids != 255, connectivity=4, transform=transform)
    return sorted(_comparable(int(value), shapely.geometry.shape(shape)) for shape, value in found)


def _comparable(class_id: int, shape: shapely.Polygon) -> tuple[int, bytes]:
    return class_id, shapely.normalize(shape).wkb


def traced(ids: np.ndarray, rows: int, confidence: np.ndarray | None = None, **more: float) -> Iterator[Any]:
    """(class, pixels, confidence, polygon) of each region, traced in blocks of that many rows."""
    tracer = Tracer(len(ids), **more)
    for top in range(0, len(ids), rows):
        part = slice(top, top + rows)
        yield from zip(*tracer.add(ids[part], None if confidence is None else confidence[part]), strict=True)


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize("coarse", [1, 3])
def test_polygons_of_blocks_are_those_of_the_whole_map(rows, coarse):
    for seed in range(6):
        ids = drawn(seed, seed % 2 == 0, coarse)
        found = list(traced(ids, rows))
        assert sorted(_comparable(int(class_id), shape) for class_id, _, _, shape in found) == wanted(ids)
        assert all(shape.is_valid and shape.area == pixels for _, pixels, _, shape in found)


def test_confidence_is_the_mean_over_the_pixels_of_a_region():
    ids = np.array([[0, 0, 1], [1, 0, 1], [0, 0, 255]], np.uint8)
    confidence = np.array([[0.5, 0.7, 0.2], [0.9, 0.6, 0.4], [0.8, 0.4, np.nan]])
    found = {(int(class_id), int(pixels)): mean for class_id, pixels, mean, _ in traced(ids, 1, confidence)}
    assert found == pytest.approx({(0, 5): 0.6, (1, 2): 0.3, (1, 1): 0.9})
    assert all(np.isnan(mean) for _, _, mean, _ in traced(ids, 2))


def test_regions_below_the_smallest_size_are_left_out_wherever_the_blocks_end():
    ids = drawn(3, no_data=False)
    large = sorted(int(pixels) for _, pixels, _, _ in traced(ids, 100) if pixels >= 4)
    assert 1 < len(large) < len(wanted(ids))
    for rows in (1, 3, 100):
        assert sorted(int(pixels) for _, pixels, _, _ in traced(ids, rows, min_pixels=4)) == large


@pytest.mark.parametrize("rows", [1, 13, 100])
@pytest.mark.parametrize("no_data", [False, True])
def test_simplified_neighbors_have_no_gaps_and_no_overlaps(rows, no_data):
    for seed in range(3):
        ids = np.digitize(picture(60, 70, seed=seed)[0], [100, 130, 160]).astype(np.uint8)  # ragged borders that meet
        if no_data:
            ids[ids == 3] = 255
        found = [shape for *_, shape in traced(ids, rows, tolerance=2.0)]
        assert all(shape.is_valid for shape in found)
        assert len(found) == len(wanted(ids))  # no region vanishes
        together, whole = shapely.union_all(found), sum(shape.area for shape in found)
        assert together.area == pytest.approx(whole)  # no overlaps
        if not no_data:
            assert whole == pytest.approx(ids.size)  # no gaps
        if rows > 1:
            vertices = sum(shapely.get_num_coordinates(shape) for shape in found)
            assert vertices < 0.8 * sum(shapely.get_num_coordinates(shapely.from_wkb(wkb)) for _, wkb in wanted(ids))


def test_simplifying_removes_the_steps_of_the_pixels():
    rows, columns = np.mgrid[:60, :60]
    ids = (rows > columns).astype(np.uint8)
    upper, lower = (shape for *_, shape in traced(ids, 60, tolerance=1.0))
    assert shapely.get_num_coordinates([upper, lower]).max() <= 7  # with the steps there were more than 120
    assert upper.area + lower.area == 3600


# Whole predictions


def features(path: str, ids: np.ndarray | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts of a file of polygons, and its features."""
    info = pyogrio.read_info(path, layer="polygons")
    _, table = pyogrio.read_arrow(path, layer="polygons")
    name = info["geometry_name"] or "wkb_geometry"
    rows = [{**row, "shape": shapely.from_wkb(row.pop(name))} for row in table.to_pylist()]
    return info, rows


def test_a_geopackage_holds_the_regions_of_the_map_with_class_area_and_confidence(model):
    image = np.maximum(picture(200, 170), 1)
    image[:, 50:80, :60] = 0
    write_tiff("scene.tif", image, nodata=0)
    result = run(model=model, input="scene.tif", output="map.tif", vector="out/map.gpkg", confidence="max_probability")
    info, rows = features("out/map.gpkg")
    ids, sure = read("map.tif")[0], read("map_confidence.tif")[0]
    assert info["crs"] == "EPSG:32633"
    found = [(row["class_id"], row["shape"]) for row in rows]
    assert sorted(_comparable(*one) for one in found) == wanted(ids, PLACE)
    assert result.metrics["predict/polygons"] == len(rows)
    assert all(row["class_name"] == NAMES[row["class_id"]] for row in rows)
    for row in rows:
        assert row["area"] == pytest.approx(row["shape"].area)  # square metres
    means = {}
    for row in rows:
        total = means.setdefault(row["class_id"], [0.0, 0.0])
        total[0], total[1] = total[0] + row["confidence"] * row["area"], total[1] + row["area"]
    for class_id, (total, area) in means.items():
        assert total / area == pytest.approx(sure[ids == class_id].mean(), rel=1e-5)
    assert sorted(path.name for path in Path("out").iterdir()) == ["map.gpkg"]


def test_blocks_of_a_map_are_joined_in_the_file(model, monkeypatch):
    monkeypatch.setattr(vector_file, "BLOCK_ROWS", 23)
    write_tiff("scene.tif", picture(100, 90))
    run(model=model, input="scene.tif", output="map.tif", vector="gpkg")
    _, rows = features("map.gpkg")
    assert sorted(_comparable(row["class_id"], row["shape"]) for row in rows) == wanted(read("map.tif")[0], PLACE)
    assert all(row["confidence"] is None for row in rows)


def test_geojson_is_in_wgs_84(model):
    write_tiff("scene.tif", picture(60, 50))
    run(
        model=model, input="scene.tif", output="map.png", vector="geojson"
    )  # a PNG holds no georeference; the image does
    facts = json.loads(Path("map.geojson").read_text())
    longitude, latitude = facts["features"][0]["geometry"]["coordinates"][0][0]
    assert (round(longitude, 2), round(latitude, 2)) == (15.0, 45.15)
    areas = [feature["properties"]["area"] for feature in facts["features"]]
    assert sum(areas) == pytest.approx(60 * 50 * abs(PLACE.determinant))
    assert ElementTree.parse("map.qml").find("renderer-v2") is not None


def test_min_area_is_in_the_unit_of_the_crs_and_simplify_in_pixels(model):
    write_tiff("scene.tif", picture(80, 90))
    run(model=model, input="scene.tif", output="map.tif", vector="gpkg", min_area=3 * abs(PLACE.determinant))
    ids = read("map.tif")[0]
    _, rows = features("map.gpkg")
    sizes = sorted(
        round(shape.area) for _, wkb in wanted(ids) if (shape := shapely.from_wkb(wkb)).area >= 3
    )  # fmt: skip
    assert sorted(round(row["area"] / abs(PLACE.determinant)) for row in rows) == sizes
    run(model=model, input="scene.tif", output="map.tif", vector="gpkg", simplify=1.0, overwrite=True)
    _, rows = features("map.gpkg")
    whole = 80 * 90 * abs(PLACE.determinant)
    assert shapely.union_all([row["shape"].buffer(1e-6) for row in rows]).area == pytest.approx(whole, rel=1e-3)
    assert sum(row["shape"].area for row in rows) == pytest.approx(whole)
    assert sum(row["area"] for row in rows) == pytest.approx(whole)


@pytest.mark.parametrize("kind", ["photo", "control points", "turned"])
def test_without_a_transform_polygons_are_in_pixels_of_the_map(model, kind, caplog):
    values = picture(40, 60)
    if kind == "control points":
        corners = [GroundControlPoint(row, column, 10 + column, 50 - row) for row in (0, 40) for column in (0, 60)]
        with rasterio.open(
            "scene.tif", "w", driver="GTiff", height=40, width=60, count=3, dtype="uint8", gcps=corners, crs="EPSG:4326"
        ) as file:
            file.write(values)
        name = "scene.tif"
    else:
        name, exif = "scene.jpg", Image.Exif()
        exif[0x0112] = 6 if kind == "turned" else 1  # displayed a quarter turn clockwise
        Image.fromarray(values.transpose(1, 2, 0)).save(name, exif=exif)
    with caplog.at_level(logging.WARNING):
        run(model=model, input=name, output=f"map{'.tif' if 'tif' in name else '.png'}", vector="gpkg")
    assert "its polygons are in pixels of the map, y down" in caplog.text
    with rasterio.open(next(Path().glob("map.[tp]*"))) as file:
        ids = file.read(1)
    assert ids.shape == ((60, 40) if kind == "turned" else (40, 60))
    info, rows = features("map.gpkg")
    assert info["crs"] is None or "Undefined" in info["crs"]
    assert sorted(_comparable(row["class_id"], row["shape"]) for row in rows) == wanted(ids)
    assert sum(row["area"] for row in rows) == 2400


def test_a_map_without_data_has_a_file_without_polygons(model):
    write_tiff("scene.tif", np.zeros((3, 30, 30), np.uint8), nodata=0)
    run(model=model, input="scene.tif", output="map.tif", vector="gpkg")
    assert features("map.gpkg")[1] == []


# Interrupted, and started again


def test_missing_polygons_are_made_of_the_map_without_the_network(model, monkeypatch):
    write_tiff("scene.tif", picture(60, 50))
    settings = {"model": model, "input": "scene.tif", "output": "map.tif"}
    run(**settings)
    before = Path("map.tif").stat().st_mtime_ns
    monkeypatch.setattr(mapping, "Tiler", None)  # no forward pass
    assert run(**settings, vector="gpkg").metrics["predict/maps"] == 0
    assert Path("map.tif").stat().st_mtime_ns == before
    _, rows = features("map.gpkg")
    assert sorted(_comparable(row["class_id"], row["shape"]) for row in rows) == wanted(read("map.tif")[0], PLACE)


def test_interrupted_polygons_leave_no_file_and_are_made_again(model, monkeypatch):
    write_tiff("scene.tif", picture(60, 50))
    settings = {"model": model, "input": "scene.tif", "output": "map.tif", "vector": "gpkg"}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vector_file.Tracer, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(**settings)
    assert Path("map.tif").exists()
    assert not list(Path().glob("map.gpkg*"))
    Path("map.gpkg.partial").mkdir()
    Path("map.gpkg.partial/map.gpkg").write_text("what a killed process leaves")
    run(**settings)
    assert features("map.gpkg")[1]
    assert not Path("map.gpkg.partial").exists()


def test_finished_polygons_of_many_images_are_kept_and_those_of_other_settings_named(model):
    for name in ("a", "b"):
        write_tiff(f"{name}.tif", picture(40, 50, seed=ord(name)))
    settings = {"model": model, "input": ["a.tif", "b.tif"], "output": "maps"}
    run(**settings, vector="geojson")
    before = {path.name: path.stat().st_mtime_ns for path in Path("maps").iterdir()}
    assert sorted(before) == sorted(f"{name}.{suffix}" for name in "ab" for suffix in ("geojson", "qml", "tif"))
    Path("maps/b.geojson").unlink()
    run(**settings, vector="geojson")
    after = {path.name: path.stat().st_mtime_ns for path in Path("maps").iterdir()}
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} - {"b.qml"} == {"b.geojson"}
    with pytest.raises(InputError, match=r"a\.geojson exists, but was made with other settings"):
        run(**settings, vector="geojson", min_area=3)
    run(**settings, vector="geojson", min_area=3, overwrite=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vector": "map.shp"}, r"vector is 'map\.shp'; give gpkg, geojson"),
        ({"vector": "mygpkg"}, r"vector is 'mygpkg'"),
        ({"min_area": 3}, "min_area has no effect without vector"),
        ({"simplify": 1}, "simplify has no effect without vector"),
        ({"vector": "gpkg", "simplify": -1}, "simplify is -1"),
        (
            {"vector": "map.gpkg", "output": "maps/"},
            r"vector is map\.gpkg, but there may be several images; give gpkg alone",
        ),
        ({"vector": "there.gpkg"}, r"output there\.gpkg exists"),
    ],
)
def test_what_can_be_mended_is_told_before_anything_is_mapped(model, more, message):
    write_tiff("scene.tif", picture(40, 50))
    Path("there.gpkg").touch()
    with pytest.raises(InputError, match=message):
        run(**{"model": model, "input": "scene.tif", "output": "map.tif", **more})
    assert not Path("map.tif").exists()


def test_missing_packages_are_named_with_the_command_that_brings_them(model, monkeypatch):
    write_tiff("scene.tif", picture(40, 50))
    monkeypatch.setattr(vector_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --editable \S*\[vector\]"):
        run(model=model, input="scene.tif", output="map.tif", vector="gpkg")
    assert not Path("map.tif").exists()


# Styles for QGIS


def test_the_style_names_and_colors_each_class_for_rasters_and_for_polygons():
    root = ElementTree.fromstring(qgis_style(["ground", "roof & tree"], class_colors(2)))
    colors = [tuple(round(255 * float(part)) for part in color) for color in class_colors(2)]
    raster = root.find("pipe/rasterrenderer")
    assert (root.tag, raster.get("type"), raster.get("band")) == ("qgis", "paletted", "1")
    entries = [(entry.get("value"), entry.get("label"), entry.get("color")) for entry in raster.iter("paletteEntry")]
    assert entries == [
        (str(index), name, "#{:02x}{:02x}{:02x}".format(*color))
        for index, (name, color) in enumerate(zip(["ground", "roof & tree"], colors, strict=True))
    ]
    renderer = root.find("renderer-v2")
    assert (renderer.get("type"), renderer.get("attr")) == ("categorizedSymbol", "class_id")
    for index, category in enumerate(renderer.find("categories")):
        symbol = renderer.find(f"symbols/symbol[@name='{category.get('symbol')}']")
        options = {option.get("name"): option.get("value") for option in symbol.iter("Option") if option.get("name")}
        assert category.get("value") == str(index)
        assert options["color"] == ",".join(map(str, (*colors[index], 255)))


def test_a_geopackage_brings_its_style_and_a_style_of_the_user_beside_a_map_stays(model):
    write_tiff("scene.tif", picture(40, 50))
    Path("map.qml").write_text("<qgis>of the user</qgis>")
    run(model=model, input="scene.tif", output="map.tif", vector="styled.gpkg")
    assert Path("map.qml").read_text() == "<qgis>of the user</qgis>"
    with closing(sqlite3.connect("styled.gpkg")) as file:
        file.row_factory = sqlite3.Row
        (row,) = file.execute("SELECT * FROM layer_styles").fetchall()
        (kind,) = file.execute("SELECT data_type FROM gpkg_contents WHERE table_name = 'layer_styles'").fetchone()
    assert (row["f_table_schema"], row["f_table_name"], row["f_geometry_column"]) == ("", "polygons", "geom")
    assert (row["useAsDefault"], kind) == (1, "attributes")
    assert row["styleQML"] == qgis_style(NAMES, class_colors(3))
    run(model=model, input="scene.tif", output="other.tif")
    assert Path("other.qml").read_text() == row["styleQML"]
