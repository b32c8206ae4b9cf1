"""Polygons as masks: drawn like GDAL draws them, window by window, by the class that an attribute names."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import yaml
from affine import Affine
from conftest import small_settings, write_raster
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.features import rasterize
from rasterio.transform import from_origin
from rasterio.warp import transform

from dann_experiments import InputError, load_config
from dann_experiments.__main__ import main
from dann_experiments.data import vector_masks
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.headers import checked_header
from dann_experiments.data.labels import LabelMap, VectorRules, label_map
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.data.samples import Sample, content_digest, files_of, find_samples
from dann_experiments.data.vector_masks import mask_of
from dann_experiments.jobs import adapt, check_data
from dann_experiments.jobs.build import find_data
from dann_experiments.names import SOURCE_TRAIN, TARGET_LABELLED, TARGET_VAL, TARGET_WEAK

UTM = "EPSG:32632"
PLACE = from_origin(500_000, 5_000_000, 10, 10)
HEIGHT, WIDTH = 40, 60
WHOLE = Window(0, 0, HEIGHT, WIDTH)
NAMES = ("ground", "maize", "grass")
ONE_BAND = Normalization((0.0,), (255.0,), (0.5,), (0.25,))
DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".json": "GeoJSON", ".shp": "ESRI Shapefile"}


def rules(**more: Any) -> LabelMap:
    given = {"attribute": "crop", "background": 0} | more
    names = given.pop("class_names", NAMES)
    return LabelMap(len(names), vector=VectorRules(**given), settings="data.source.", class_names=names)


def image_in(folder: Path, name: str = "image.tif", place: Affine = PLACE, crs: str | None = UTM, **more: Any) -> Path:
    values = np.random.default_rng(0).integers(1, 255, (1, HEIGHT, WIDTH)).astype(np.uint8)
    return write_raster(folder / name, values, transform=place, crs=crs, **more)


def on_ground(shapes: Sequence[Any], place: Affine = PLACE) -> np.ndarray:
    """Shapes given in pixels (column, row), in coordinates of the CRS."""
    a, b, c, d, e, f = place[:6]
    return shapely.transform(
        np.array(shapes, object),
        lambda p: np.column_stack([a * p[:, 0] + b * p[:, 1] + c, d * p[:, 0] + e * p[:, 1] + f]),
    )


def in_crs(shapes: np.ndarray, crs: str, of: str = UTM) -> np.ndarray:
    return shapely.transform(shapes, lambda p: np.column_stack(transform(of, crs, p[:, 0], p[:, 1])))


def write_polygons(
    path: Path, shapes: Sequence[Any], crops: Sequence[Any] | None = None, crs: str | None = UTM, **more: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    crops = ["maize"] * len(shapes) if crops is None else crops
    values = np.array(crops) if all(isinstance(crop, int) for crop in crops) else np.array(crops, object)
    given = {"fields": ["crop"], "geometry_type": "Unknown"} | more
    if path.suffix == ".shp" and given["geometry_type"] == "Unknown":
        given["geometry_type"] = "Polygon"
    pyogrio.raw.write(
        path, geometry=np.array(shapely.to_wkb(np.array(shapes, object)), object), field_data=[values], crs=crs,
        driver=DRIVERS[path.suffix], **given,
    )  # fmt: skip
    return path


def mask_in(sample: Sample, labels: LabelMap, window: Window = WHOLE, reading: Reading | None = None) -> np.ndarray:
    return mask_of(sample, labels, reading or Reading(), read_header(sample.image), window)


SHAPES = [shapely.Point(12.3, 9.1).buffer(7.7), shapely.box(20.2, 3.4, 47.6, 31.9), shapely.Point(50, 30).buffer(12)]
CROPS = ["maize", "grass", "maize"]


@pytest.fixture
def fields(tmp_path) -> Sample:
    return Sample(image_in(tmp_path), write_polygons(tmp_path / "fields.gpkg", on_ground(SHAPES), CROPS))


def drawn(shapes: Sequence[Any], values: Sequence[int], **more: Any) -> np.ndarray:
    """What rasterio draws of shapes in pixels."""
    return rasterize(zip(shapes, values, strict=True), (HEIGHT, WIDTH), dtype="uint8", **more)


# drawing


@pytest.mark.parametrize("suffix", DRIVERS)
def test_polygons_are_drawn_as_rasterio_draws_the_whole(tmp_path, suffix):
    crs = "EPSG:4326" if "json" in suffix else UTM  # GeoJSON is WGS 84 (RFC 7946)
    path = write_polygons(tmp_path / f"fields{suffix}", in_crs(on_ground(SHAPES), crs), CROPS, crs)
    found = mask_in(Sample(image_in(tmp_path), path), rules())
    assert (found == drawn(SHAPES, [1, 2, 1])).all()
    assert set(np.unique(found)) == {0, 1, 2}


def test_geojson_without_a_crs_is_wgs_84(tmp_path):
    shapes = in_crs(on_ground(SHAPES), "EPSG:4326")
    features = [
        {"type": "Feature", "properties": {"crop": crop}, "geometry": shapely.geometry.mapping(shape)}
        for shape, crop in zip(shapes, CROPS, strict=True)
    ]
    path = tmp_path / "fields.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert (mask_in(Sample(image_in(tmp_path), path), rules()) == drawn(SHAPES, [1, 2, 1])).all()


corner = st.tuples(st.integers(-80, 560), st.integers(-80, 400)).map(
    lambda c: (c[0] / 8, c[1] / 8)
)  # in eighths of a pixel
ring = st.lists(corner, min_size=3, max_size=7, unique=True)


@pytest.mark.slow
@hypothesis_settings(deadline=None, max_examples=150)
@given(
    rings=st.lists(ring, min_size=1, max_size=4),
    top=st.integers(0, HEIGHT - 1), left=st.integers(0, WIDTH - 1), rows=st.integers(1, HEIGHT), columns=st.integers(1, WIDTH),
    all_touched=st.booleans(),
    place=st.sampled_from([PLACE, from_origin(0.1, 0.3, 0.7, 0.9), Affine(8, 6, 1000, 6, -8, 2000), Affine(2, 0, 5, 0, 2, 7)]),
)  # fmt: skip
def test_a_window_is_drawn_like_this_part_of_the_whole(
    tmp_path_factory, rings, top, left, rows, columns, all_touched, place
):
    folder = tmp_path_factory.mktemp("drawn")
    shapes = [shapely.make_valid(shapely.Polygon(one), method="structure", keep_collapsed=False) for one in rings]
    shapes = [shape for shape in shapes if shape.area > 0] or [shapely.box(1, 1, 5, 5)]
    values = [1 + number % 2 for number in range(len(shapes))]
    path = write_polygons(folder / "fields.gpkg", on_ground(shapes, place), [NAMES[value] for value in values])
    sample, labels = Sample(image_in(folder, place=place), path), rules(all_touched=all_touched)
    whole = mask_in(sample, labels)
    window = Window(top, left, min(rows, HEIGHT - top), min(columns, WIDTH - left))
    part = mask_in(sample, labels, window)
    assert (part == whole[top : top + window.height, left : left + window.width]).all()
    snapped = [shapely.set_precision(shape, 1 / 1024, mode="pointwise") for shape in shapes]
    if not all_touched:
        assert (whole == drawn(snapped, values)).all()


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several blocks in the small images of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_masks, "BLOCK", 16)
        yield


def test_only_a_window_is_drawn_never_the_whole_image(fields, monkeypatch):
    sizes = []
    own = rasterio.features.rasterize
    monkeypatch.setattr(
        rasterio.features, "rasterize", lambda pairs, shape, **more: sizes.append(shape) or own(pairs, shape, **more)
    )
    data = SegmentationDataset([fields], rules(), ONE_BAND, window_size=16)
    found = [data.read(index)[1] for index in range(len(data))]
    assert len(found) == 12
    assert set(sizes) == {(20, 20)}  # and two pixels around


def test_the_last_feature_is_on_top(tmp_path):
    shapes = [shapely.box(0, 0, 20, 20), shapely.box(10, 10, 30, 30)]
    for crops, at_both in ((["maize", "grass"], 2), (["grass", "maize"], 1)):
        path = write_polygons(tmp_path / f"{crops[0]}.gpkg", on_ground(shapes), crops)
        assert mask_in(Sample(image_in(tmp_path), path), rules())[15, 15] == at_both


def test_holes_and_parts_of_multipolygons_are_drawn(tmp_path):
    ring_ = shapely.Polygon(shapely.box(2, 2, 18, 18).exterior.coords, [shapely.box(6, 6, 12, 12).exterior.coords])
    path = write_polygons(tmp_path / "f.gpkg", on_ground([shapely.MultiPolygon([ring_, shapely.box(30, 30, 40, 38)])]))
    found = mask_in(Sample(image_in(tmp_path), path), rules())
    assert (found[3, 3], found[8, 8], found[35, 35], found[25, 25]) == (1, 0, 1, 0)
    assert found.sum() == 16 * 16 - 36 + 80


def test_all_touched_counts_pixels_whose_center_is_outside(tmp_path):
    path = write_polygons(tmp_path / "f.gpkg", on_ground([shapely.box(10.6, 10.6, 13.4, 13.4)]))
    sample = Sample(image_in(tmp_path), path)
    assert (mask_in(sample, rules()) == 1).sum() == 4
    assert (mask_in(sample, rules(all_touched=True)) == 1).sum() == 16


def test_a_coarser_grid_has_the_class_at_its_pixels_centers(fields):
    reading = Reading(pixel_size=20.0)
    found = mask_in(fields, rules(), Window(0, 0, 20, 30), reading)
    halved = [shapely.transform(shape, lambda p: p / 2) for shape in SHAPES]
    expected = rasterize(zip(halved, [1, 2, 1], strict=True), (20, 30), dtype="uint8")
    assert (found != expected).sum() <= 1  # corners are rounded to a thousandth of a pixel
    assert (found == 2).sum() > 100


# classes


def test_pixels_outside_are_ignored_unless_the_background_is_named(fields):
    assert set(np.unique(mask_in(fields, rules(background=None)))) == {1, 2, 255}
    assert set(np.unique(mask_in(fields, rules(background=2)))) == {1, 2}


def test_nothing_is_labelled_outside_the_area(fields, tmp_path):
    area = write_polygons(
        tmp_path / "area.geojson", in_crs(on_ground([shapely.box(10, 0, 30, 40)]), "EPSG:4326"), crs="EPSG:4326"
    )
    limited = Sample(fields.image, fields.mask, area=area)
    found, whole = mask_in(limited, rules()), mask_in(fields, rules())
    assert (found[:, :10] == 255).all()
    assert (found[:, 30:] == 255).all()
    assert (found[:, 10:30] == whole[:, 10:30]).all()


def test_an_area_limits_masks_in_pixels_too(tmp_path):
    image = image_in(tmp_path)
    mask = write_raster(tmp_path / "mask.tif", np.ones((1, HEIGHT, WIDTH), np.uint8), transform=PLACE, crs=UTM)
    area = write_polygons(tmp_path / "area.gpkg", on_ground([shapely.box(10, 0, 30, 40)]))
    assert (mask_in(Sample(image, mask, area=area), rules()) == 1).sum() == 20 * HEIGHT


def test_without_an_attribute_polygons_are_the_only_other_class(fields):
    labels = rules(attribute=None, class_names=("building", "ground"), background=1)
    assert (mask_in(fields, labels) == np.where(drawn(SHAPES, [1, 1, 1]) == 1, 0, 1)).all()


@pytest.mark.parametrize(
    ("crops", "more", "ids"),
    [
        ([1, 2, 1], {}, None),  # numbers are class ids, as in masks
        ([311, 24, 311], {}, {311: 1, 24: 2}),  # value_map
        ([311, 24, 311], {"texts": {"311": 1, "24": 2}}, None),  # label_map
        (["311", "24", "311"], {"texts": {"311": 1, "24": 2}}, None),
        ([311, 24, 311], {"texts": {"24": 2}}, {311: 1}),  # both maps
        (["corn", "grass", "corn"], {"texts": {"corn": 1, "grass": 2}}, None),
    ],
)
def test_values_are_found_by_number_or_text(tmp_path, crops, more, ids):
    path = write_polygons(tmp_path / "f.gpkg", on_ground(SHAPES), crops)
    labels = dataclasses.replace(rules(**more), ids=ids)
    assert (mask_in(Sample(image_in(tmp_path), path), labels) == drawn(SHAPES, [1, 2, 1])).all()


def test_a_name_that_is_no_class_counts_nowhere(tmp_path):
    config = load_config(
        None,
        {
            "data.class_names": ["ground", "maize"], "data.source.label_map": {"maize": "maize", "grass": "ignored", 7: "maize"},
            "data.source.label_background": "ground", "model.classes": 2, "data.source.label_attribute": "crop",
        },
    )  # fmt: skip
    from dann_experiments.jobs.build import data_plan

    labels = next(iter(data_plan(config).images.values())).labels
    assert labels.vector.texts == {"maize": 1, "grass": 255, "7": 1}
    path = write_polygons(tmp_path / "f.gpkg", on_ground(SHAPES), CROPS)
    found = mask_in(Sample(image_in(tmp_path), path), labels)
    assert (found == np.array([0, 1, 255], np.uint8)[drawn(SHAPES, [1, 2, 1])]).all()


def test_the_label_map_names_the_classes_background_first():
    settings = {
        "data.source.label_map": {"corn": "crop", "rye": "crop", "gras": "grass", "?": "ignored"},
        "data.source.label_background": "ground", "data.source.label_attribute": "crop", "model.classes": 3,
    }  # fmt: skip
    assert load_config(None, settings).class_names == ["ground", "crop", "grass"]


# photographs: polygons in pixels


def photo_in(folder: Path, name: str = "images/a.png") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(1).integers(1, 255, (HEIGHT, WIDTH)).astype(np.uint8)).save(path)
    return path


def coco_in(path: Path, annotations: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]] | None = None) -> Path:
    content = {
        "images": images or [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 7, "name": "maize"}, {"id": 3, "name": "grass"}],
        "annotations": [{"id": 100 + number, "image_id": 1, **one} for number, one in enumerate(annotations)],
    }
    path.write_text(json.dumps(content))
    return path


def flat(shape: Any) -> list[float]:
    return [float(one) for corner in shape.exterior.coords[:-1] for one in corner]


def coco_of(shapes: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"category_id": 7 if crop == "maize" else 3, "segmentation": [flat(shape)]}
        for shape, crop in zip(shapes, CROPS, strict=True)
    ]


PHOTO = rules(attribute=None)


def test_coco_polygons_are_in_pixels(tmp_path):
    sample = Sample(photo_in(tmp_path), coco_in(tmp_path / "all.json", coco_of(SHAPES)))
    assert (mask_in(sample, PHOTO) == drawn(SHAPES, [1, 2, 1])).all()
    part = mask_in(sample, PHOTO, Window(5, 7, 20, 30))
    assert (part == drawn(SHAPES, [1, 2, 1])[5:25, 7:37]).all()


def test_plain_run_lengths_of_coco_are_read(tmp_path):
    wanted = drawn(SHAPES[:1], [1])
    column = wanted.T.ravel()  # column after column, starting with zeros
    edges = np.flatnonzero(np.diff(column)) + 1
    counts = np.diff([0, *edges, len(column)]).tolist()
    shape = {"counts": counts, "size": [HEIGHT, WIDTH]}
    path = coco_in(tmp_path / "all.json", [{"category_id": 7, "segmentation": shape, "iscrowd": 1}])
    assert (mask_in(Sample(photo_in(tmp_path), path), PHOTO) == wanted).all()


def test_the_image_of_coco_is_found_by_its_folders_too(tmp_path):
    images = [{"id": 1, "file_name": "north/a.png"}, {"id": 2, "file_name": "south/a.png"}]
    annotations = [
        {"category_id": 7, "segmentation": [flat(SHAPES[0])]},
        {"category_id": 3, "segmentation": [flat(SHAPES[1])], "image_id": 2},
    ]
    path = coco_in(tmp_path / "all.json", annotations, images)
    north, south = (Sample(photo_in(tmp_path, f"{name}/a.png"), path) for name in ("north", "south"))
    assert (mask_in(north, PHOTO) == drawn(SHAPES[:1], [1])).all()
    assert (mask_in(south, PHOTO) == drawn(SHAPES[1:2], [2])).all()
    with pytest.raises(InputError, match=r"north/a\.png and south/a\.png, either of which"):
        mask_in(Sample(photo_in(tmp_path, "east/a.png"), path), PHOTO)


def yolo_in(path: Path, shapes: Sequence[Any], ids: Sequence[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scaled = [shapely.transform(shape, lambda p: p / (WIDTH, HEIGHT)) for shape in shapes]
    path.write_text("".join(f"{i} {' '.join(f'{x:.9f}' for x in flat(s))}\n" for s, i in zip(scaled, ids, strict=True)))
    return path


INSIDE = [shapely.box(3.2, 3.2, 20.4, 30.7), shapely.box(10, 20, 55.5, 38.1)]


def test_yolo_polygons_have_class_ids_or_the_names_of_data_yaml(tmp_path):
    sample = Sample(photo_in(tmp_path), yolo_in(tmp_path / "labels/train/a.txt", INSIDE, [1, 2]))
    assert (mask_in(sample, PHOTO) == drawn(INSIDE, [1, 2])).all()
    before = content_digest([sample])
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"names": {1: "grass", 2: "maize"}}))
    assert (mask_in(sample, PHOTO) == drawn(INSIDE, [2, 1])).all()
    assert content_digest([sample]) != before


def test_an_empty_yolo_file_is_all_background(tmp_path):
    sample = Sample(photo_in(tmp_path), yolo_in(tmp_path / "labels/a.txt", [], []))
    assert (mask_in(sample, PHOTO) == 0).all()


def test_polygons_lie_on_the_photograph_as_it_is_shown(tmp_path):
    image = Image.fromarray(np.zeros((WIDTH, HEIGHT), np.uint8))  # stored upright, shown lying
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    images = [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
    sample = Sample(tmp_path / "a.jpg", coco_in(tmp_path / "all.json", coco_of(SHAPES), images))
    assert read_header(sample.image).width == WIDTH
    assert (mask_in(sample, PHOTO) == drawn(SHAPES, [1, 2, 1])).all()


# where masks are named


def test_every_form_of_masks_takes_polygons(tmp_path):
    images = [image_in(tmp_path, f"images/{name}.tif") for name in "ab"]
    one = write_polygons(tmp_path / "all.gpkg", on_ground(SHAPES), CROPS)
    own = [
        write_polygons(tmp_path / f"masks/{name}.geojson", in_crs(on_ground(SHAPES), "EPSG:4326"), CROPS, "EPSG:4326")
        for name in "ab"
    ]
    (tmp_path / "list.csv").write_text("image,mask\nimages/a.tif,all.gpkg\nimages/b.tif,masks/b.geojson\n")
    found = lambda entry: [sample.mask for sample in find_samples([entry], tmp_path, "data.source.train", "required")]  # noqa: E731
    assert found({"images": "images", "masks": "all.gpkg"}) == [one, one]
    assert found({"images": "images/*.tif", "masks": "all.gpkg", "names": ["b"]}) == [one]
    assert found({"images": "images/*.tif", "masks": "masks/*.geojson"}) == own
    assert found({"images": "images", "masks": "masks"}) == own
    assert found({"images": ["images/a.tif", "images/b.tif"], "masks": ["all.gpkg", "masks/b.geojson"]}) == [
        one,
        own[1],
    ]
    assert found(".") == own
    assert found("list.csv") == [one, own[1]]
    assert images == [sample.image for sample in find_samples(["."], tmp_path, "data.source.train")]
    (sample,) = find_samples(
        [{"images": "images/a.tif", "masks": "all.gpkg", "layer": "all", "area": "all.gpkg"}], tmp_path, "k.val"
    )
    assert (sample.layer, sample.area) == ("all", one)


def test_images_of_a_mask_folder_come_before_other_files_in_it(tmp_path):
    photo_in(tmp_path)
    photo_in(tmp_path, "masks/a.png")
    (tmp_path / "masks" / "a.json").write_text("{}")  # of a labelling tool
    (sample,) = find_samples(["."], tmp_path, "data.source.train")
    assert sample.mask == tmp_path / "masks" / "a.png"


def test_the_digest_covers_the_side_files_the_layer_and_the_area(tmp_path):
    path = write_polygons(tmp_path / "f.shp", on_ground(SHAPES), CROPS)
    sample = Sample(image_in(tmp_path), path)
    assert {file.suffix for file in files_of([sample])} == {".tif", ".shp", ".shx", ".dbf", ".prj", ".cpg"}
    digests = {content_digest([sample]), content_digest([Sample(sample.image, path, layer="f")])}
    digests.add(content_digest([Sample(sample.image, path, area=path)]))
    assert (mask_in(sample, rules()) == 2).any()
    write_polygons(tmp_path / "f.shp", on_ground(SHAPES), ["maize", "maize", "maize"])  # only the .dbf differs
    digests.add(content_digest([sample]))
    assert len(digests) == 4
    assert (mask_in(sample, rules()) == 2).sum() == 0  # read again, not remembered


# a tree with all sets


def tree_in(folder: Path) -> dict[str, Any]:
    """Settings of a run whose labels are polygons: fields that are bright in the source, dark in the target."""
    rng = np.random.default_rng(3)
    for domain, first in (("source", 0), ("target", 20)):
        shapes, crops = [], []
        for number in range(6):
            place = from_origin(500_000 + 1000 * (first + number), 5_000_000, 10, 10)
            corners = rng.integers(2, 18, (2, 2))
            squares = [shapely.box(x, y, x + 10, y + 10) for x, y in corners]
            values = rng.normal(60, 10, (3, 32, 32)) + 120 * drawn_in(squares)
            values = values if domain == "source" else 255 - values
            write_raster(
                folder / domain / f"{number}.tif", np.clip(values, 1, 255).astype(np.uint8), transform=place, crs=UTM
            )
            shapes += list(on_ground(squares, place))
            crops += ["field"] * 2
        write_polygons(folder / f"{domain}.geojson", in_crs(np.array(shapes, object), "EPSG:4326"), crops, "EPSG:4326")
    settings: dict[str, Any] = {
        "data.root": str(folder), "data.class_names": ["ground", "field"], "model.classes": 2,
        "data.source.label_background": "ground", "data.target.label_background": "ground",
        "data.source.train": [{"images": "source", "masks": "source.geojson", "names": ["[0-3]"]}],
        "data.source.val": [{"images": "source", "masks": "source.geojson", "names": ["[45]"]}],
        "data.target.train": [{"images": "target", "names": ["[0-3]"]}],
        "data.target.val": [{"images": "target", "masks": "target.geojson", "names": ["[45]"]}],
        "data.target.test": [],
    }  # fmt: skip
    return settings


def drawn_in(shapes: Sequence[Any]) -> np.ndarray:
    return rasterize([(shape, 1) for shape in shapes], (32, 32), dtype="uint8")


def settings_of(folder: Path, **more: Any) -> dict[str, Any]:
    return small_settings(folder) | tree_in(folder) | {key.replace("__", "."): value for key, value in more.items()}


def test_all_sets_take_polygons(workplace):
    labelled = [{"images": "target", "masks": "target.geojson", "names": ["[01]"]}]
    settings = settings_of(
        workplace, data__target__train_labelled=labelled, data__target__weak_labels=labelled,
        domain_adaptation__companions=["weak_labels"],
    )  # fmt: skip
    sets = find_data(load_config(None, settings)).read()
    for name in (SOURCE_TRAIN, TARGET_VAL, TARGET_LABELLED, TARGET_WEAK):
        dataset = sets.get(name)
        assert dataset is not None
        held = np.stack([np.bincount(dataset[index]["mask"].ravel(), minlength=256) for index in range(len(dataset))])
        labelled_ones = 2 if name == TARGET_WEAK else len(dataset)
        assert (held[:labelled_ones, 1] > 50).all(), name
        assert (held[labelled_ones:, 255] == 32 * 32).all(), name


def test_check_data_counts_features_and_names_those_outside_every_image(workplace, capsys):
    settings = settings_of(workplace)
    report = check_data(load_config(None, settings))
    assert not report.problems
    assert report.polygons == [
        f"{workplace}/source.geojson: 12 features (12 field).",
        f"{workplace}/target.geojson: 12 features (12 field); 8 outside every image (ids 0, 1, 2, 3, 4 and 3 more).",
    ]
    bow_tie = shapely.Polygon([(1, 1), (9, 9), (9, 1), (1, 9)])
    flat_one = shapely.Polygon([(20, 20), (20, 20), (20, 20)])
    place = from_origin(500_000, 5_000_000, 10, 10)
    write_polygons(
        workplace / "source.gpkg",
        on_ground([bow_tie, flat_one, shapely.box(2, 2, 30, 30)], place),
        ["ground", "field", "field"],
    )
    settings["data.source.train"] = [{"images": "source", "masks": "source.gpkg", "names": ["[01]"]}]
    settings["data.source.label_attribute"] = "crop"
    settings["data.source.val"], settings["data.target.val"] = [], []
    report = check_data(load_config(None, settings))
    (line,) = report.polygons
    assert line.endswith(
        "source.gpkg: 3 features (2 field, 1 ground); 1 without any area, not used (ids 2); 1 invalid, such as crossing itself, "
        "and mended (ids 1)."
    )
    (bare,) = [text for text in report.remarks if "no polygon touches" in text]
    assert f"no polygon touches 1 image, the first of which is {workplace}/source/1.tif" in bare
    (both,) = [text for text in report.remarks if "several classes" in text]
    assert both.startswith("data.source.train: 24 pixels are in polygons of several classes; the later one")


def test_settings_of_polygons_without_polygons_are_pointed_out(workplace):
    settings = settings_of(workplace)
    masks = workplace / "masks"
    masks.mkdir()
    for image in (workplace / "source").iterdir():
        Image.fromarray(np.tile(np.uint8([0, 1]), (32, 16))).save(masks / f"{image.stem}.png")
    settings["data.source.train"] = [{"images": "source", "masks": "masks"}]
    settings["data.source.val"] = settings["data.target.val"] = []
    wanted = "data.source: label_background has no effect, because no mask is a file of polygons."
    assert wanted in check_data(load_config(None, settings)).remarks


# errors


def error_of(sample: Sample, labels: LabelMap) -> str:
    with pytest.raises(InputError) as caught:
        checked_header(sample, Reading(), 1, labels)
    return str(caught.value)


def test_an_attribute_that_is_not_there_is_named_with_those_that_are(fields):
    text = error_of(fields, rules(attribute="corp"))
    assert (
        text
        == f"{fields.mask} has no attribute 'corp' (data.source.label_attribute); it has 'crop'; did you mean 'crop'?"
    )


def test_a_value_without_a_class_is_named_with_its_file(tmp_path):
    path = write_polygons(tmp_path / "f.gpkg", on_ground(SHAPES), ["rye", "grass", "rye"])
    sample = Sample(image_in(tmp_path), path)
    assert error_of(sample, rules()) == (
        f"{path}: 2 features (ids 1, 3) have crop 'rye', which are not among the classes ['ground', 'maize', 'grass']; say in "
        "data.source.label_map which class they are."
    )
    assert "which data.source.label_map does not name" in error_of(sample, rules(texts={"grass": 2}))
    path = write_polygons(tmp_path / "n.gpkg", on_ground(SHAPES), [1, 9, 1])
    assert "crop 9" in error_of(Sample(sample.image, path), rules())
    path = write_polygons(tmp_path / "e.gpkg", on_ground(SHAPES), ["maize", None, "maize"])
    assert "1 features have no value in crop (ids 2)" in error_of(Sample(sample.image, path), rules())
    assert mask_in(Sample(sample.image, path), rules(texts={"": 255, "maize": 1})).max() == 255


def test_one_of_several_layers_must_be_named(tmp_path):
    path = write_polygons(tmp_path / "f.gpkg", on_ground(SHAPES), CROPS, layer="y2018")
    write_polygons(path, on_ground(SHAPES), CROPS[::-1], layer="y2019", append=True)
    sample = Sample(image_in(tmp_path), path)
    assert "has 2 layers (y2018, y2019); name one in the entry: {images: ..., masks: f.gpkg, layer: y2018}" in error_of(
        sample, rules()
    )
    assert "has no layer 'y2020'; it has 'y2018', 'y2019'" in error_of(
        Sample(sample.image, path, layer="y2020"), rules()
    )
    assert (mask_in(Sample(sample.image, path, layer="y2018"), rules()) == drawn(SHAPES, [1, 2, 1])).all()


def test_lines_and_points_are_counted_and_refused(tmp_path):
    shapes = [*SHAPES, shapely.Point(1, 1), shapely.LineString([(0, 0), (5, 5)]), shapely.Point(2, 2)]
    path = write_polygons(tmp_path / "f.geojson", in_crs(on_ground(shapes), "EPSG:4326"), ["maize"] * 6, "EPSG:4326")
    text = error_of(Sample(image_in(tmp_path), path), rules())
    assert "holds 1 linestring, 2 points among its 6 features; labels are polygons. Buffer them" in text


def test_z_coordinates_are_dropped(tmp_path):
    path = write_polygons(tmp_path / "f.gpkg", shapely.force_3d(on_ground(SHAPES), 7.0), CROPS)
    assert (mask_in(Sample(image_in(tmp_path), path), rules()) == drawn(SHAPES, [1, 2, 1])).all()


def test_a_missing_crs_is_named_on_either_side(tmp_path):
    bare = write_polygons(tmp_path / "f.shp", on_ground(SHAPES), CROPS, None)
    with_crs = write_polygons(tmp_path / "g.gpkg", on_ground(SHAPES), CROPS)
    located, plain = image_in(tmp_path), image_in(tmp_path, "plain.tif", crs=None)
    assert f"{bare} has no CRS (for a Shapefile in f.prj), but its images have one" in error_of(
        Sample(located, bare), rules()
    )
    assert "but an image that it labels has none" in error_of(Sample(plain, with_crs), rules())
    assert (mask_in(Sample(plain, bare), rules()) == drawn(SHAPES, [1, 2, 1])).all()


def test_an_image_without_georeference_is_refused(tmp_path, fields):
    text = error_of(Sample(photo_in(tmp_path), fields.mask), rules())
    assert "a.png has no georeference, so the polygons of" in text
    assert "COCO (.json) or YOLO (.txt)" in text


def test_without_attribute_and_background_the_class_is_not_guessed(fields):
    text = error_of(fields, rules(attribute=None, background=None))
    assert "it could be any of ['ground', 'maize', 'grass']; name the attribute" in text


def test_a_background_that_is_no_class_is_refused():
    from dann_experiments.data.labels import vector_rules

    with pytest.raises(InputError, match=r"data\.source\.label_background is 'soil', which is not among the classes"):
        vector_rules(NAMES, 255, None, None, "soil", False, "data.source.")
    assert label_map(NAMES, 255, None, None, ()).vector == VectorRules()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", "cannot be read as JSON"),
        ('{"type": "Topology"}', "cannot be read as vector labels"),
        ("[1]", "cannot be read as vector labels"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no image called image.tif"),
        ('{"images": [3], "annotations": [], "categories": []}', "cannot be read as COCO annotations"),
        ('{"type": "FeatureCollection", "features": []}', "has no attribute"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, content, wanted):
    path = tmp_path / "f.json"
    path.write_text(content)
    labels = PHOTO if "images" in content else rules()
    text = error_of(Sample(image_in(tmp_path), path), labels)
    assert str(path) in text
    assert wanted in text


@pytest.mark.parametrize("suffix", [".gpkg", ".shp", ".geojson"])
def test_files_of_another_kind_are_named(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    path.write_bytes(b"no polygons here")
    assert f"{path} cannot be read as vector labels" in error_of(Sample(image_in(tmp_path), path), rules())
    path.write_text(
        "<OGRVRTDataSource><OGRVRTLayer name='f'><SrcDataSource>/other.shp</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>"
    )
    assert str(path) in error_of(Sample(image_in(tmp_path), path), rules())


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"segmentation": []}, r"1 annotations of a.png have no polygon, only a box (ids 100)"),
        ({"segmentation": {"counts": "PbZ1", "size": [HEIGHT, WIDTH]}}, "compressed run-length mask"),
        ({"segmentation": {"counts": [3], "size": [HEIGHT, WIDTH]}}, "run lengths that do not fit"),
        ({"segmentation": [[1, 2, 3, 4]]}, "polygon that is not a list of x and y of three corners"),
        ({"segmentation": [flat(SHAPES[0])], "category_id": 4}, "has category 4, which categories lacks"),
        (
            {"segmentation": [flat(SHAPES[0])], "image_id": 4},
            "1 annotations are of images that it does not list (ids 100)",
        ),
    ],
)
def test_wrong_coco_annotations_are_named(tmp_path, change, wanted):
    path = coco_in(tmp_path / "all.json", [{"category_id": 7, **change}])
    text = error_of(Sample(photo_in(tmp_path), path), PHOTO)
    assert str(path) in text
    assert wanted in text


def test_coco_of_another_size_or_with_an_attribute_is_refused(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "height": WIDTH, "width": HEIGHT}]
    sample = Sample(photo_in(tmp_path), coco_in(tmp_path / "all.json", coco_of(SHAPES), images))
    assert "describes a.png as 40 x 60 pixels (width x height), but" in error_of(sample, PHOTO)
    assert "have no data.source.label_attribute; leave it out" in error_of(sample, rules())


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("1 0.5 0.5 0.2 0.2", "line 1 holds a box (4 numbers)"),
        ("1 0.5 0.5 0.2 0.2 0.3", "has 5 numbers after the class id"),
        ("1 0.5 0.5 0.2 0.2 0.3 7", "from 0.2 to 7"),
        ("maize 0.5 0.5 0.2 0.2 0.3 0.3", "is not a class id and numbers"),
        ("5 0.5 0.5 0.2 0.2 0.3 0.3", "category 5, which are not among the classes"),
    ],
)
def test_wrong_yolo_lines_are_named(tmp_path, line, wanted):
    path = tmp_path / "a.txt"
    path.write_text(line)
    text = error_of(Sample(photo_in(tmp_path), path), PHOTO)
    assert str(path) in text
    assert wanted in text


def test_a_missing_package_is_named_with_its_command(fields, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyogrio", None)
    fields.mask.touch()
    vector_masks.read_polygons.__globals__["_read"].cache_clear()
    assert re.search(r"install them with: pip install --editable \S*\[vector\]", error_of(fields, rules()))


def test_a_wrong_entry_is_refused(tmp_path):
    with pytest.raises(InputError, match="label_map has the keys 7 and '7', which are one value"):
        load_config(None, {"data.source.label_map": {7: "maize", "7": "grass"}})
    for entry, wanted in (
        ({"images": "a", "layer": "x"}, "whose layer is 'x'; give a text, beside masks"),
        ({"images": "a", "masks": "b.gpkg", "area": 3}, "whose area is 3"),
        ({"images": "a", "masks": "b.gpkg", "atribute": "x"}, "not atribute"),
    ):
        with pytest.raises(InputError, match=r"data\.source\.train has the entry") as caught:
            load_config(None, {"data.source.train": [entry]})
        assert wanted in str(caught.value)


def test_wrong_polygons_end_a_command_with_exit_code_2(workplace, capsys):
    settings = settings_of(workplace, data__source__label_attribute="kind")
    (workplace / "mine.yaml").write_text(yaml.safe_dump(settings_tree(settings)))
    assert main(["adapt", "--config", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert "source.geojson has no attribute 'kind' (data.source.label_attribute); it has 'crop'." in error
    assert "Traceback" not in error


def settings_tree(flat_: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat_.items():
        node = tree
        *groups, last = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


# a whole run


@pytest.mark.slow
def test_a_training_on_polygons_has_the_numbers_of_one_on_masks(workplace):
    settings = settings_of(workplace, trainer__max_epochs=2)
    by_polygons = adapt(load_config(None, settings))
    for domain in ("source", "target"):
        for image in (workplace / domain).iterdir():
            labels = rules(class_names=("ground", "field"))
            sample = Sample(image, workplace / f"{domain}.geojson")
            mask = mask_in(sample, labels, Window(0, 0, 32, 32))
            (workplace / f"{domain}_masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(workplace / f"{domain}_masks" / f"{image.stem}.png")
    drawn_before = {
        key: [entry | ({"masks": entry["masks"].replace(".geojson", "_masks")} if "masks" in entry else {}) for entry in value]
        if key in ("data.source.train", "data.source.val", "data.target.val") else value
        for key, value in settings.items() if not key.endswith("label_background")
    }  # fmt: skip
    by_masks = adapt(load_config(None, drawn_before))
    assert by_polygons.metrics == by_masks.metrics
    assert by_polygons.run_id != by_masks.run_id


MEASURE = """
import resource, sys
from pathlib import Path
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.labels import LabelMap, VectorRules
from dann_experiments.data.reading import Normalization
from dann_experiments.data.samples import Sample
labels = LabelMap(3, vector=VectorRules("crop", None, 0), class_names=("ground", "maize", "grass"))
mask = Path(sys.argv[2]) if len(sys.argv) > 2 else None
data = SegmentationDataset([Sample(Path(sys.argv[1]), mask)], labels, Normalization(*[(0.0,), (1.0,)] * 2))
masks = (data.read(index)[1] for index in range(len(data)))
found = sum(int((one > 0).sum()) for one in masks if one is not None)
print(len(data), found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_a_large_scene_with_100000_polygons_needs_less_memory_than_its_mask(tmp_path):
    side, rng = 12_000, np.random.default_rng(0)
    profile = {
        "driver": "GTiff",
        "count": 1,
        "height": side,
        "width": side,
        "dtype": "uint8",
        "tiled": True,
        "sparse_ok": True,
    }
    with rasterio.open(tmp_path / "scene.tif", "w", crs=UTM, transform=PLACE, **profile):
        pass
    shapes = shapely.buffer(
        shapely.points(rng.uniform(0, side, (100_000, 2))), rng.uniform(5, 40, 100_000), quad_segs=4
    )
    write_polygons(tmp_path / "fields.gpkg", on_ground(shapes), rng.choice(["maize", "grass"], len(shapes)).tolist())

    def measured(*words: str) -> list[int]:
        files = [str(tmp_path / word) for word in words]
        ran = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True)
        return [int(word) for word in ran.stdout.split()]

    windows, found, with_mask = measured("scene.tif", "fields.gpkg")
    assert windows == 144
    assert found > 100_000_000
    without = measured("scene.tif")[2]
    assert with_mask - without < side * side / 2**20, (with_mask, without)
