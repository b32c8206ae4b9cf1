"""STAC items of maps: they are valid, and say where, when, of what and with which classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from conftest import small_settings, write_raster
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.projection import ProjectionExtension
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform

from dann_experiments.config import InputError, load_config
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data.samples import Sample, find_samples
from dann_experiments.jobs import predict
from dann_experiments.jobs.build import data_plan
from dann_experiments.jobs.identity import domain_name
from dann_experiments.names import SOURCE_TRAIN
from dann_experiments.prediction.stac import times_of, times_of_text

TAKEN = "2026:06:30 10:15:00"
PLACE = from_origin(500_000, 4_000_000, 10, 10)


@pytest.fixture
def place(pretrained_place: Path, shared_runs: Any) -> tuple[Path, str]:
    """The current folder, and the address of a model for images of three bands."""
    return pretrained_place, f"runs:/{shared_runs.result('pretrain').run_id}"


def scene(
    path: str | Path, crs: str | None = "EPSG:32633", place: Affine = PLACE, taken: str | None = TAKEN, **more: Any
) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (3, 40, 60), np.uint8)
    written = write_raster(Path(path), values, crs=crs, transform=place, **more)
    if taken:
        with rasterio.open(written, "r+") as file:
            file.update_tags(TIFFTAG_DATETIME=taken)
    return written


def item_of(path: str) -> pystac.Item:
    """The item, valid by the schema of STAC 1.1. The schemas of extensions are not on this machine; pystac reads their fields."""
    facts = json.loads(Path(path).read_text())
    pystac.Item.from_dict({**facts, "stac_extensions": []}).validate()
    return pystac.Item.from_file(path)


def test_an_item_says_where_when_and_what(place):
    folder, model = place
    image = scene("scene.tif")
    predict(
        PredictConfig(
            model, input="scene.tif", output="maps/map.tif", stac=True, probabilities=True, confidence="entropy"
        )
    )
    item = item_of("maps/map.stac.json")
    assert item.datetime is not None
    assert item.datetime.isoformat() == "2026-06-30T10:15:00+00:00"
    with rasterio.open("maps/map.tif") as file:
        projection = ProjectionExtension.ext(item)
        assert (projection.code, projection.shape) == ("EPSG:32633", [40, 60])
        assert projection.transform == list(file.transform)[:6]
        xs, ys = transform(
            file.crs,
            "EPSG:4326",
            *zip(
                *(
                    rasterio.transform.xy(file.transform, row, column, offset="ul")
                    for column, row in ((0, 0), (60, 0), (60, 40), (0, 40))
                ),
                strict=True,
            ),
        )
        colors = file.colormap(1)
        run_id = file.tags()["dann_run_id"]
    assert item.bbox == pytest.approx([min(xs), min(ys), max(xs), max(ys)], abs=1e-6)
    ring = np.array(item.geometry["coordinates"][0])
    assert (ring[0] == ring[-1]).all()
    x, y = ring.T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0, "counterclockwise"
    for corner in zip(xs, ys, strict=True):
        assert np.abs(ring - corner).sum(1).min() < 1e-6
    assert item.properties["dann:run_id"] == run_id
    assert item.properties["dann:model"] == model

    [link] = [link for link in item.links if link.rel == "derived_from"]
    assert (folder / "maps" / link.href).resolve() == image.resolve()
    for name, asset in item.assets.items():
        with rasterio.open(folder / "maps" / asset.href) as file:
            assert file.count == (2 if name == "probabilities" else 1)
            assert file.dtypes[0] == asset.extra_fields["data_type"]
    assert set(item.assets) == {"map", "probabilities", "confidence"}
    classes = ClassificationExtension.ext(item.assets["map"]).classes
    assert [one.value for one in classes] == [0, 1]
    for one in classes:
        assert tuple(bytes.fromhex(one.color_hint)) == colors[one.value][:3]


def test_polygons_are_an_asset_and_a_later_one_joins_the_item(place):
    _, model = place
    scene("scene.tif")
    predict(PredictConfig(model, input="scene.tif", output="map.tif", stac=True))
    assert set(item_of("map.stac.json").assets) == {"map"}
    predict(PredictConfig(model, input="scene.tif", output="map.tif", stac=True, vector="shapes.gpkg"))
    asset = item_of("map.stac.json").assets["polygons"]
    assert (asset.href, asset.media_type) == ("shapes.gpkg", pystac.MediaType.GEOPACKAGE)


def test_a_period_or_the_item_beside_the_image_says_when(place):
    folder, model = place
    scene("in/a.tif", taken=None)
    scene("in/b.tif", taken=None)
    own = {
        "type": "Feature",
        "properties": {"datetime": "2020-02-03T04:05:06Z"},
        "assets": {"visual": {"href": "./b.tif"}},
    }
    Path("in/b.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match=r"a\.tif does not say when it was taken .* set stac_datetime"):
        predict(PredictConfig(model, input="in", output="maps", stac=True))
    item = item_of("maps/b.stac.json")
    assert item.properties["datetime"] == "2020-02-03T04:05:06Z"
    [link] = [link for link in item.links if link.rel == "derived_from"]
    assert (folder / "maps" / link.href).resolve() == (folder / "in" / "b.json").resolve()

    # b's map is finished, and keeps its item; a removed item comes back
    Path("maps/b.stac.json").unlink()
    predict(PredictConfig(model, input="in", output="maps", stac=True, stac_datetime="2026-05-01/2026-09-30"))
    for name in "ab":
        found = item_of(f"maps/{name}.stac.json").properties
        assert found["datetime"] is None
        assert (found["start_datetime"], found["end_datetime"]) == ("2026-05-01T00:00:00Z", "2026-09-30T23:59:59Z")


def test_the_item_of_an_image_in_several_files_links_to_all_of_them(place):
    folder, model = place
    for name in ("red", "green", "blue"):
        with rasterio.open(scene(f"{name}_all.tif")) as file:
            written = write_raster(Path(f"in/s_{name}.tif"), file.read([1]), crs=file.crs, transform=file.transform)
        with rasterio.open(written, "r+") as file:
            file.update_tags(TIFFTAG_DATETIME=TAKEN)
    given = {"images": ["in/*_red.tif", "in/*_green.tif", "in/*_blue.tif"]}
    predict(PredictConfig(model, input=[given], output="maps/", stac=True))
    [written] = Path("maps").glob("*.stac.json")
    item = item_of(str(written))
    assert item.properties["datetime"] == "2026-06-30T10:15:00Z"
    links = [(folder / "maps" / link.href).resolve() for link in item.links if link.rel == "derived_from"]
    assert sorted(links) == sorted((folder / "in").iterdir())


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_maps_without_georeference_or_across_the_antimeridian_or_with_control_points_have_items(place):
    _, model = place
    scene("plain.tif", crs=None, place=Affine.identity())
    predict(PredictConfig(model, input="plain.tif", output="plain_map.tif", stac=True))
    item = item_of("plain_map.stac.json")
    assert (item.geometry, item.bbox) == (None, None)

    scene(
        "fiji.tif", crs="EPSG:32701", place=from_origin(166_000, 8_000_000, 1000, 1000)
    )  # 180 degrees is near its left edge
    predict(PredictConfig(model, input="fiji.tif", output="fiji_map.tif", stac=True))
    item = item_of("fiji_map.stac.json")
    assert item.geometry["type"] == "MultiPolygon"
    west, _, east, _ = item.bbox
    assert 179 < west < 180
    assert -180 < east < -178

    corners = ((0, 0), (0, 60), (40, 0), (40, 60))
    points = [GroundControlPoint(row, column, 12 + column / 100, 50 - row / 100) for row, column in corners]
    with rasterio.open(scene("gcps.tif", crs=None, place=Affine.identity()), "r+") as file:
        file.gcps = (points, "EPSG:4326")
    predict(PredictConfig(model, input="gcps.tif", output="gcps_map.tif", stac=True))
    item = item_of("gcps_map.stac.json")
    assert item.bbox == pytest.approx([12, 49.6, 12.6, 50], abs=1e-5)
    assert ProjectionExtension.ext(item).transform is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-06-30T10:15:00Z", {"datetime": "2026-06-30T10:15:00Z"}),
        ("2026-06-30T10:15:00+02:00", {"datetime": "2026-06-30T08:15:00Z"}),
        ("2026-06-30 10:15", {"datetime": "2026-06-30T10:15:00Z"}),
        (
            "2026-06-30",
            {"datetime": None, "start_datetime": "2026-06-30T00:00:00Z", "end_datetime": "2026-06-30T23:59:59Z"},
        ),
    ],
)
def test_times_are_in_utc_and_a_date_is_a_day(text, expected):
    assert times_of_text(text, "stac_datetime") == expected


@pytest.mark.parametrize(
    "text", ["", "abc", "2026-13-01", "2026-06-30/", "/2026-06-30", "2026-09-30/2026-05-01", "a/b/c", "1e9"]
)
def test_wrong_times_are_refused(text):
    with pytest.raises(InputError, match="stac_datetime is"):
        times_of_text(text, "stac_datetime")


def collection(folder: Path, names: str, items: str = "items.json") -> Path:
    """A file of STAC items of the images and masks of a folder; hrefs relative to it."""
    features = [
        {
            "type": "Feature", "stac_version": "1.1.0", "id": name, "geometry": None, "links": [],
            "properties": {"datetime": "2026-06-30T00:00:00Z"},
            "assets": {
                "visual": {"href": f"./images/{name}", "roles": ["data"]},
                "labels": {"href": f"masks/{name}", "roles": ["labels"]},
                "thumbnail": {"href": "https://nowhere.example/small.png", "roles": ["thumbnail"]},
            },
        }
        for name in names.split()
    ]  # fmt: skip
    path = folder / items
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_a_file_of_items_is_an_entry_of_images_and_masks(squares, tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    for kind in ("images", "masks"):
        (folder / kind).symlink_to(squares / "source" / kind)
    names = sorted(path.name for path in (folder / "images").iterdir())[:4]
    collection(folder, " ".join(names))
    entry = {"items": "site/items.json", "assets": ["visual"], "mask": "labels"}
    found = find_samples([entry], tmp_path, "data.source.train", "required")
    assert [(one.image, one.mask) for one in found] == [
        (folder / "images" / name, folder / "masks" / name) for name in names
    ]
    assert find_samples([entry], tmp_path, "data.target.train", "no") == [
        Sample(folder / "images" / name, None) for name in names
    ]
    assert [one.image.name for one in find_samples(["site/items.json"], tmp_path, "data.target.train")] == names

    config = load_config(None, {**small_settings(squares), "data.root": str(tmp_path), "data.source.train": [entry]})
    problems: list[str] = []
    assert len(data_plan(config).find(SOURCE_TRAIN, problems.append) or ()) == 4
    assert not problems
    assert domain_name(config, "source") == "site/items.json"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"items": "items.json", "assets": ["nir"]},
            r"item 'a\.png' of .*items\.json has no asset 'nir'; it has visual, labels",
        ),
        ({"items": "items.json", "mask": "thumbnail"}, "the href of item .* is .*, which is an address"),
        ({"items": "items.json", "mask": "clouds"}, "has no asset 'clouds'"),
        ({"items": "none.json"}, "cannot be read as JSON"),
        ("catalog.json", "should hold STAC items .* but is a catalog or collection"),
        ("two.json", "has 2 assets with the role 'data'; choose the image by"),
    ],
)
def test_wrong_items_are_named(entry, message, tmp_path):
    collection(tmp_path, "a.png")
    Path(tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "links": []}))
    bands = {name: {"href": f"{name}.tif", "roles": ["data"]} for name in ("red", "nir")}
    Path(tmp_path / "two.json").write_text(
        json.dumps({"type": "Feature", "id": "x", "properties": {}, "assets": bands})
    )
    with pytest.raises(InputError, match=message):
        find_samples([entry], tmp_path, "data.target.train")


@pytest.mark.parametrize(
    "entry",
    [
        {"items": "i.json", "assets": []}, {"items": "i.json", "assets": ["red", 2]}, {"items": "i.json", "assets": "red"},
        {"items": ["i.json"]},
        {"items": "i.json", "masks": "m"}, {"items": "i.json", "images": "i"},
    ],
)  # fmt: skip
def test_wrong_parts_of_an_entry_of_items_are_refused(entry, squares):
    with pytest.raises(InputError, match="a mapping of STAC items takes items"):
        load_config(None, {**small_settings(squares), "data.target.train": [entry]})


def test_several_assets_of_an_item_are_the_bands_of_its_image(tmp_path):
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500000, 0, -10, 4000000)}
    for value, name in ((7, "red"), (9, "nir")):
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", height=4, width=6, count=1, dtype="uint8", **place
        ) as file:
            file.write(np.full((1, 4, 6), value, np.uint8))
    bands = {name: {"href": f"{name}.tif", "roles": ["data"]} for name in ("red", "nir")}
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"type": "Feature", "id": "x", "properties": {}, "assets": bands}))
    found = find_samples([{"items": "two.json", "assets": ["nir", "red"]}], tmp_path, "data.target.train")
    with rasterio.open(found[0].image) as file:
        assert [file.read(band).max() for band in (1, 2)] == [9, 7]
    (tmp_path / "red.tif").unlink()
    with pytest.raises(InputError, match=r"data\.target\.train: image .*red\.tif of item 'x' of .* does not exist"):
        find_samples([{"items": "two.json", "assets": ["nir", "red"]}], tmp_path, "data.target.train")


def test_a_blank_in_an_address_is_decoded(tmp_path):
    image = scene(tmp_path / "two words.tif")
    item = {"type": "Feature", "id": "x", "properties": {}, "assets": {"image": {"href": "./two%20words.tif"}}}
    (tmp_path / "item.json").write_text(json.dumps(item))
    assert [one.image for one in find_samples(["item.json"], tmp_path, "data.target.train")] == [image]


@pytest.mark.parametrize("taken", ["0000:00:00 00:00:00", "yesterday"])
def test_a_tag_that_is_no_time_is_none(taken, empty_place):
    with pytest.raises(InputError, match="does not say when"):
        times_of(scene("scene.tif", taken=taken), None)


def test_an_existing_item_is_not_replaced_unasked(place):
    _, model = place
    scene("scene.tif")
    Path("map.stac.json").write_text("mine")
    with pytest.raises(InputError, match=r"map\.stac\.json exists"):
        predict(PredictConfig(model, input="scene.tif", output="map.tif", stac=True))
    assert Path("map.stac.json").read_text() == "mine"
