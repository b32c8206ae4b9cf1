"""`check-data`: everything that is wrong with the files in one go and by name; else what both domains look like."""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import read_sets, small_settings, write_raster
from PIL import Image

from dann_experiments import InputError, load_config
from dann_experiments.__main__ import main
from dann_experiments.jobs import check_data
from dann_experiments.jobs.build import find_data
from dann_experiments.tracking.store import open_store
from sweeps.cli import main as sweeps_main


@pytest.fixture
def root(empty_place: Path, squares: Path) -> Path:
    """A copy of `squares` to break, in an empty empty_place."""
    return Path(shutil.copytree(squares, empty_place / "data"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that is made once, as that takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}", "dann")
    return path


def count_runs(store: Path) -> int:
    with sqlite3.connect(store) as connection:
        return connection.execute("select count(*) from runs").fetchone()[0]


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """A YAML file of dotted settings."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    path.write_text(yaml.safe_dump(nested))
    return path


def run(root: Path, command: str = "check-data", **more: Any) -> int:
    return main([command, "--config", str(write_config(root.parent / "config.yaml", small_settings(root, **more)))])


def nothing_was_written(empty_place: Path) -> bool:
    return sorted(path.name for path in empty_place.iterdir()) == ["config.yaml", "data"]


# --- each kind of problem alone: a function breaks the data, returns what the message must hold and settings to change ---


def as_manifest(root: Path, name: str, rows: list[str]) -> None:
    """Put a manifest in the place of a folder, which moves to NAME_files."""
    (root / name).rename(root / f"{name}_files")
    (root / name).write_text("\n".join(["image,mask", *rows]) + "\n")


def grey(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


def missing_image(root):
    as_manifest(root, "source", ["source_files/images/none.png,source_files/masks/0.png"])
    return ["data.source.train: image", "source_files/images/none.png does not exist"]


def missing_mask(root):
    as_manifest(root, "source", ["source_files/images/0.png,source_files/masks/none.png"])
    return ["data.source.train: mask", "source_files/masks/none.png of image"]


def a_folder_for_an_image(root):
    as_manifest(root, "source", ["source_files/images,source_files/masks/0.png"])
    return ["source_files/images is not a file"]


def image_without_mask(root):
    (root / "source" / "masks" / "3.png").unlink()
    return ["source/images/3.png has no mask of the same stem"]


def mask_without_image(root):
    (root / "target_val" / "images" / "3.png").unlink()
    return ["target_val/masks/3.png has no image of the same stem"]


def some_masks_missing(root):
    as_manifest(root, "target_val", [f"target_val_files/images/{n}.png,target_val_files/masks/{n}.png" for n in (0, 1)])
    with open(root / "target_val", "a") as file:
        file.write("target_val_files/images/2.png,\ntarget_val_files/images/3.png,\n")
    return [f"target_val_files/images/{n}.png has no mask, but others of this set have" for n in (2, 3)]


def required_masks_missing(root):
    shutil.rmtree(root / "source_val" / "masks")
    return [f"source_val/images/{n}.png has no mask, but this set needs one per image" for n in range(4)]


def unreadable_image(root):
    (root / "target" / "images" / "2.png").write_text("hello")
    return ["target/images/2.png cannot be read as an image"]


def cut_off_image(root):
    path = root / "source" / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:900])
    return ["source/images/2.png cannot be read as an image"]


def empty_file(root):
    (root / "source_val" / "images" / "1.png").write_bytes(b"")
    return ["source_val/images/1.png cannot be read as an image"]


def unreadable_mask(root):
    (root / "target_test" / "masks" / "1.png").write_text("hello")
    return ["target_test/masks/1.png cannot be read as an image"]


def other_size(root):
    grey(root / "source" / "masks" / "1.png", np.zeros((30, 32), np.uint8))
    return ["source/images/1.png is 32 x 32 pixels, its mask", "source/masks/1.png 30 x 32"]


def four_bands(root):
    (root / "target" / "images" / "1.png").unlink()
    write_raster(root / "target" / "images" / "1.tif", np.zeros((4, 32, 32), np.uint8))
    return ["target/images/1.tif has 4 bands, but the network takes 3"]


def band_that_is_not_there(root):
    return ["source/images/0.png has 3 bands, but data.source.bands is [1, 2, 4]"], {"data__source__bands": [1, 2, 4]}


def mask_of_three_bands(root):
    Image.fromarray(np.full((32, 32, 3), (0, 0, 1), np.uint8)).save(root / "source" / "masks" / "1.png")
    return ["source/masks/1.png has 3 bands; masks hold one class id per pixel"]


def id_outside_the_classes(root):
    grey(root / "target_val" / "masks" / "1.png", np.full((32, 32), 7, np.uint8))
    return ["target_val/masks/1.png holds id 7, but classes go from 0 to 1"]


def id_outside_the_map(root):
    named = {"data__source__value_map": {0: "ground"}}
    files = [f"source/masks/{n}.png" for n in range(10)]
    return ["masks/0.png holds id 1, but data.source.value_map knows [0]", "So do 13 other masks: ", *files], named


def colour_outside_the_map(root):
    for name in ("source", "source_val"):
        for path in (root / name / "masks").iterdir():
            Image.fromarray(np.stack([np.asarray(Image.open(path)) * 255] * 3, -1)).save(path)
    colours = {"data__source__color_map": {"0,0,0": "ground", "255,255,254": "square"}}
    told = [
        "source/masks/0.png holds the color (255, 255, 255), which data.source.color_map does not name",
        "source_val/masks/3",
    ]
    return told, colours


def mask_of_fractions(root):
    (root / "source" / "masks" / "1.png").unlink()
    write_raster(root / "source" / "masks" / "1.tif", np.full((1, 32, 32), np.inf, np.float32))
    return ["source/masks/1.tif holds values that are not whole numbers"]


def only_ignored_and_one_class(root):
    for path in (root / "source" / "masks").iterdir():
        grey(path, np.asarray(Image.open(path)) * 255)
    return ["data.source.train: the masks hold the ids [0, 255], of which 255 is ignored"]


def empty_folder(root):
    for path in (root / "target" / "images").iterdir():
        path.unlink()
    return ["data.target.train names", "data/target, which holds no images"]


def empty_manifest(root):
    as_manifest(root, "source", [])
    return ["data.source.train names", "data/source, which holds no images"]


def no_training_list(root):
    return ["data.target.train is empty"], {"data__target__train": []}


def missing_folder(root):
    shutil.rmtree(root / "target")
    return ["data.target.train names", "data/target, which does not exist"]


def no_row_of_the_split(root):
    as_manifest(root, "source", [])
    (root / "source").write_text("image,mask,split\nsource_files/images/0.png,source_files/masks/0.png,val\n")
    return ["data/source has no rows with split train; it has ['val']"]


def same_stem_twice(root):
    shutil.copy(root / "source" / "images" / "0.png", root / "source" / "images" / "0.bmp")
    return ["source/images/0.bmp and", "source/images/0.png have the same stem"]


def train_image_in_val(root):
    shutil.copy(root / "source" / "images" / "1.png", root / "source_val" / "images" / "2.png")
    return ["data.source.val: image", "source_val/images/2.png holds the same bytes as", "source/images/1.png"]


def train_image_in_test(root):
    shutil.copy(root / "target" / "images" / "1.png", root / "target_test" / "images" / "2.png")
    return ["data.target.test: image", "target_test/images/2.png holds the same bytes as", "target/images/1.png"]


def target_image_in_source(root):
    shutil.copy(root / "source" / "images" / "1.png", root / "target" / "images" / "2.png")
    return ["data.target.train: image", "target/images/2.png holds the same bytes as", "source/images/1.png"]


def nothing_but_nodata(root):
    for path in (root / "target_val" / "images").iterdir():
        path.unlink()
        write_raster(path.with_suffix(".tif"), np.full((3, 32, 32), np.nan, np.float32))
    return ["data.target.val: image", "target_val/images/0.tif and the others of its set have no data"], {
        "data__target__scale": [0, 1]
    }


def range_that_nobody_said(root):
    (root / "target" / "images" / "1.png").unlink()
    write_raster(root / "target" / "images" / "1.tif", np.zeros((3, 32, 32), np.float32))
    return ["target/images/1.tif holds float32 values, whose range is unknown"]


def complex_numbers(root):
    (root / "target" / "images" / "1.png").unlink()
    write_raster(root / "target" / "images" / "1.tif", np.zeros((3, 32, 32), np.complex64))
    return ["target/images/1.tif holds complex64 values"]


def sizes_that_differ(root):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "target" / "images" / "1.png")
    return ["data.target.train: images differ in size", "target/images/1.png: 64 x 64", "set data.crop_size"]


def smaller_than_the_crop(root):
    return ["data.source.train: image", "source/images/0.png is 32 x 32 pixels, smaller than data.crop_size 48"], {
        "data__crop_size": 48, "data__pad_to_crop": False
    }  # fmt: skip


def region_beyond_the_image(root):
    entry = {"images": "target/images/0.png", "region": [0, 0, 40, 32]}
    return ["target/images/0.png is 32 pixels wide and 32 high; its region"], {"data__target__train": [entry]}


def pixel_size_that_is_not_known(root):
    return ["target/images/0.png has no georeference with a pixel size"], {"data__target__pixel_size": 0.5}


def pixel_size_in_another_unit(root):
    sizes = {"data__target__pixel_size": 1e-9, "data__target__file_pixel_size": 0.5}
    return ["target/images/0.png has pixels of 0.5, but data.target.pixel_size is 1e-09: each would be cut into"], sizes


ALONE = [
    missing_image, missing_mask, a_folder_for_an_image, image_without_mask, mask_without_image, some_masks_missing,
    required_masks_missing, unreadable_image, cut_off_image, empty_file, unreadable_mask, other_size, four_bands,
    band_that_is_not_there, mask_of_three_bands, id_outside_the_classes, id_outside_the_map, colour_outside_the_map,
    mask_of_fractions, only_ignored_and_one_class, empty_folder, empty_manifest, no_training_list, missing_folder,
    no_row_of_the_split, same_stem_twice, train_image_in_val, train_image_in_test, target_image_in_source,
    nothing_but_nodata, range_that_nobody_said, complex_numbers, sizes_that_differ, smaller_than_the_crop,
    region_beyond_the_image, pixel_size_that_is_not_known, pixel_size_in_another_unit,
]  # fmt: skip


@pytest.mark.parametrize("damage", ALONE, ids=lambda damage: damage.__name__)
def test_each_problem_is_told_by_file_name_and_nothing_is_written(root, capsys, damage: Callable[[Path], Any]):
    found = damage(root)
    wanted, more = found if isinstance(found, tuple) else (found, {})
    assert run(root, **more) == 2
    errors = capsys.readouterr().err
    for text in wanted:
        assert text in errors
    assert "Traceback" not in errors
    assert nothing_was_written(root.parent)


def test_all_problems_are_listed_in_one_go(root, capsys):
    together = [
        unreadable_image, cut_off_image, empty_file, unreadable_mask, other_size, four_bands, id_outside_the_classes,
        image_without_mask, mask_without_image, sizes_that_differ, train_image_in_test,
    ]  # fmt: skip
    shutil.copy(root / "target" / "images" / "4.png", root / "target" / "images" / "40.png")
    wanted = []
    for damage in together:
        if damage is sizes_that_differ:
            Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "target" / "images" / "5.png")
            wanted += ["data.target.train: images differ in size"]
        elif damage is train_image_in_test:
            shutil.copy(root / "target" / "images" / "4.png", root / "target_test" / "images" / "2.png")
            wanted += ["target_test/images/2.png holds the same bytes as"]
        else:
            wanted += damage(root)
    (root / "source" / "masks" / "2.png").write_text("the mask of an image that is broken as well")
    grey(root / "source_val" / "masks" / "1.png", np.full((32, 32), 9, np.uint8))
    wanted += ["source/masks/2.png cannot be read", "source_val/masks/1.png"]
    assert run(root) == 2
    errors = capsys.readouterr().err
    assert [text for text in wanted if text not in errors] == []
    assert errors.startswith("Error: 13 problems with the data:\n  - ")
    assert len(errors.splitlines()) == 14


def test_the_same_way_out_of_many_problems_is_printed_once(root, capsys):
    for number in range(3):
        (root / "source" / "masks" / f"{number}.png").unlink()
        write_raster(root / "source" / "masks" / f"{number}.tif", np.full((1, 32, 32), 0.5, np.float32))
    assert run(root) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "not whole numbers" in line]
    assert len(lines) == 3
    assert ["; " in line for line in lines] == [True, False, False]


def test_values_without_a_class_are_one_problem_with_all_masks_and_all_values(root, capsys):
    """Also those of later windows, and the ids that are classes as they are: the map to fill in must name them too."""
    for number in range(3):
        mask = np.zeros((32, 32), np.uint8)
        mask[:16, :16], mask[20:, 20:] = 7 + number, 1
        grey(root / "source" / "masks" / f"{number}.png", mask)
    colours = np.full((32, 32, 3), (0, 0, 1), np.uint8)
    colours[:5] = (9, 200, 30)
    Image.fromarray(colours).save(root / "source_val" / "masks" / "1.png")
    assert run(root, data__window_size=16) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Error: 2 problems with the data:\n")
    ids, rgb = errors.splitlines()[1:]
    assert "source/masks/0.png holds id 7" in ids
    assert "So do 2 other masks: source/masks/1.png, source/masks/2.png." in ids
    assert "data.source.value_map: {0: CLASS, 1: CLASS, 7: CLASS, 8: CLASS, 9: CLASS}, with one of the classes" in ids
    assert 'data.source.color_map: {"0,0,1": CLASS, "9,200,30": CLASS}' in rgb
    assert "other masks" not in rgb


def test_the_line_to_fill_in_names_the_ids_of_the_good_masks_and_not_those_that_are_ignored(root, capsys):
    """A map names every id that counts. A nodata value that it names would become a class."""
    mask = np.full((1, 32, 32), 7, np.int16)
    mask[0, :9] = -9999
    (root / "source" / "masks" / "0.png").unlink()
    write_raster(root / "source" / "masks" / "0.tif", mask, nodata=-9999)
    assert run(root) == 2
    assert "data.source.value_map: {0: CLASS, 1: CLASS, 7: CLASS}, with" in capsys.readouterr().err
    assert run(root, data__source__value_map={0: "ground", 1: "square"}) == 2
    errors = capsys.readouterr().err
    assert "0.tif holds id 7" in errors
    assert "-9999" not in errors


def test_values_that_a_map_lacks_are_listed_together(root, capsys):
    mask = np.zeros((32, 32), np.uint8)
    mask[:3], mask[9:12] = 1, 4
    grey(root / "source" / "masks" / "0.png", mask)
    assert run(root, data__source__value_map={0: "ground", 1: "square"}) == 2
    assert "source/masks/0.png holds id 4, but data.source.value_map knows [0, 1]" in capsys.readouterr().err
    mask[20:] = 5
    grey(root / "source" / "masks" / "0.png", mask)
    assert run(root, data__source__value_map={0: "ground", 1: "square"}) == 2
    assert "Without a class: 4, 5." in capsys.readouterr().err


def test_more_problems_than_training_shows_are_all_listed(root, capsys, store):
    for path in [*(root / "target" / "images").iterdir(), *(root / "source" / "masks").iterdir()]:
        path.write_bytes(b"\0")
    assert run(root) == 2
    listed = capsys.readouterr().err
    assert listed.count("cannot be read as an image") == 23
    assert run(root, "adapt", tracking__uri=f"sqlite:///{store}") == 2
    shown = capsys.readouterr().err
    assert shown.count("cannot be read as an image") == 3
    assert "and 20 more files like these; `check-data` lists all" in shown


def test_an_image_that_is_broken_in_one_window_is_told_once(root, capsys):
    values = np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8)
    (root / "target" / "images" / "1.png").unlink()
    path = write_raster(root / "target" / "images" / "1.tif", values, compress="deflate", blockysize=16)
    data = bytearray(path.read_bytes())
    data[3000:3600] = bytes(600)
    path.write_bytes(data)
    assert run(root, data__window_size=16) == 2
    assert capsys.readouterr().err.count("1.tif") <= 2  # once by us, once in GDAL's own words


# --- good data ---


def test_good_data_end_in_a_run_whose_numbers_are_those_of_the_files(empty_place, store):
    rng = np.random.default_rng(5)
    settings = small_settings(
        empty_place, tracking__uri=f"sqlite:///{store}", data__window_size=16, data__normalization="domain",
        data__source__scale=[0, 100], data__source__nodata=-9.0, data__target__nodata=0, data__class_names=["a", "b", "c"],
        model__classes=3, data__source__ignore_values=[9], data__target__test=[],
    )  # fmt: skip
    images: dict[str, list[np.ndarray]] = {"source": [], "source_val": [], "target": [], "target_val": []}
    masks: dict[str, list[np.ndarray]] = {"source": [], "source_val": [], "target_val": []}
    for name, images_here in images.items():
        for number in range(3):
            if name.startswith("source"):
                image = rng.normal(50, 9, (3, 40, 24)).astype(np.float32)
                image[:, rng.random((40, 24)) < 0.1] = -9
                image[1, rng.random((40, 24)) < 0.05] = np.nan
            else:
                image = rng.integers(0, 256, (3, 40, 24)).astype(np.uint8)
                image[:, :5] = 0
            images_here.append(image)
            write_raster(empty_place / name / "images" / f"{number}.tif", image)
            if name in masks:
                mask = rng.choice([0, 1, 2, 9 if name.startswith("source") else 255], (40, 24)).astype(np.uint8)
                masks[name].append(mask)
                write_raster(empty_place / name / "masks" / f"{number}.tif", mask[None])
    before = count_runs(store)
    assert main(["check-data", "--config", str(write_config(empty_place / "config.yaml", settings))]) == 0

    assert count_runs(store) == before + 1
    opened = open_store(f"sqlite:///{store}", "dann")
    found = opened.client.search_runs([opened.experiment_id], max_results=1)[0]
    assert found.info.status == "FINISHED"
    assert found.data.tags["dann.job"] == "check-data"
    assert found.data.params["cfg.data.window_size"] == "16"
    folder = Path(opened.client.download_artifacts(found.info.run_id, "", str(empty_place)))
    with Image.open(folder / "figures" / "domains.png") as picture:
        assert picture.size[0] > 900
    counts = pd.read_csv(folder / "tables" / "counts.csv", index_col="set")
    bands = pd.read_csv(folder / "tables" / "bands.csv", index_col=["domain", "band"])
    assert list(counts.index) == ["source_train", "source_val", "target_train", "target_val"]
    for row in counts.index:
        name = {"source_train": "source", "target_train": "target"}.get(row, row)
        valid = [
            np.isfinite(image).all(0) & ~(image == (-9 if name.startswith("source") else 0)).all(0)
            for image in images[name]
        ]
        share_without = 1 - np.mean(valid)
        assert counts.loc[row, ["images", "windows", "pixels"]].tolist() == [3, 3 * 6, 3 * 40 * 24]
        assert counts.at[row, "without data"] == pytest.approx(share_without)
        assert 0.05 < share_without < 0.3
        if name in masks:
            labels = np.concatenate([mask[here] for mask, here in zip(masks[name], valid, strict=True)])
            labels = labels[labels < 3]
            for index, label in enumerate("abc"):
                assert counts.at[row, label] == pytest.approx(np.mean(labels == index))
            assert counts.at[row, "not labelled"] == pytest.approx(1 - labels.size / (3 * 40 * 24))
        else:
            assert counts.loc[row, ["a", "b", "c", "not labelled"]].isna().all()
        if row.endswith("train"):
            pixels = np.concatenate([i[:, here] for i, here in zip(images[name], valid, strict=True)], 1).astype(float)
            for band in range(3):
                values, line = pixels[band], bands.loc[(name, band + 1)]
                assert line["minimum"] == values.min()
                assert line["maximum"] == values.max()
                assert line["mean"] == pytest.approx(values.mean(), rel=1e-6)
                assert line["std"] == pytest.approx(values.std(), rel=1e-6)
                assert line["p2"] == pytest.approx(np.percentile(values, 2), abs=0.1 * values.std())  # of drawn pixels
                assert line["p98"] == pytest.approx(np.percentile(values, 98), abs=0.1 * values.std())


def test_the_terminal_shows_every_set_by_its_whole_name(root, store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(root, tracking__uri=f"sqlite:///{store}") == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "Nothing is wrong with the data." in shown
    figure = Path(re.search(r"^Figure: (.*)$", shown, re.MULTILINE)[1])
    assert figure.is_file()
    tables = Path(re.search(r"^Tables: (.*)$", shown, re.MULTILINE)[1])
    assert {path.name for path in tables.iterdir()} == {"counts.csv", "bands.csv"}
    assert f"Run {figure.parents[2].name}; mlflow ui --backend-store-uri" in shown


def test_a_set_without_any_mask_and_a_target_without_scores_are_fine(root, store):
    shutil.rmtree(root / "target_val" / "masks")
    more = {"data__target__test": [], "tracking__uri": f"sqlite:///{store}"}
    report = check_data(load_config(None, small_settings(root, **more)))
    assert report.problems == []
    assert np.isnan(report.counts.at["target_val", "ground"])


def test_everything_is_read_where_training_takes_random_windows(root, capsys):
    mask = np.zeros((64, 64), np.uint8)
    mask[-1, -1] = 7
    for name in ("images", "masks"):
        (root / "source" / name / "9.png").unlink()
    grey(root / "source" / "images" / "9.png", np.zeros((64, 64), np.uint8))
    grey(root / "source" / "masks" / "9.png", mask)
    windows = {"data__window_size": 16, "data__windows": "random", "data__window_count": 2}
    assert run(root, **windows) == 2
    assert "source/masks/9.png holds id 7" in capsys.readouterr().err


def test_an_ignored_class_has_no_share(root, store):
    more = {"data__ignore_index": 0, "data__class_names": ["void", "square", "more"], "model__classes": 3}
    for path in (root / "source" / "masks").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[:3] = 2
        grey(path, mask)
    report = check_data(load_config(None, small_settings(root, tracking__uri=f"sqlite:///{store}", **more)))
    assert report.problems == []
    assert report.counts.at["source_train", "void"] == 0
    assert report.counts.loc["source_train", ["square", "more"]].sum() == pytest.approx(1)


# --- one image in two sets ---


def one_raster(root: Path, train: list[int], val: list[int]) -> dict[str, Any]:
    """Settings that take train and val from two regions of one raster."""
    rng = np.random.default_rng(0)
    image = write_raster(root / "town" / "image.tif", rng.integers(0, 255, (3, 64, 64), np.uint8))
    mask = write_raster(root / "town" / "mask.tif", rng.integers(0, 2, (1, 64, 64), np.uint8))
    entry = {"images": str(image), "masks": str(mask)}
    return {
        "data__source__train": [{**entry, "region": train}],
        "data__source__val": [{**entry, "region": val}],
    }


def test_parts_of_one_raster_may_be_in_two_sets_if_they_do_not_overlap(root, store):
    settings = one_raster(root, [0, 0, 32, 64], [32, 0, 64, 64]) | {"tracking__uri": f"sqlite:///{store}"}
    report = check_data(load_config(None, small_settings(root, **settings)))
    assert report.problems == []
    assert report.counts["pixels"][["source_train", "source_val"]].tolist() == [2048, 2048]


def test_overlapping_parts_of_one_raster_are_a_problem(root, capsys):
    assert run(root, **one_raster(root, [0, 0, 32, 64], [31, 63, 64, 64])) == 2
    assert "data.source.val: image" in (errors := capsys.readouterr().err)
    assert "town/image.tif is in data.source.train as well; an image may be in one set only" in errors


def test_an_image_in_two_sets_is_a_warning_of_training(root, caplog):
    train_image_in_val(root)
    target_image_in_source(root)
    config = load_config(None, small_settings(root))
    with caplog.at_level(logging.WARNING):
        read_sets(config)
    text = caplog.text
    assert "2 images are in two sets that should not share any" in text
    assert "source_val/images/2.png" in text or "target/images/2.png" in text


# --- training looks at every header first ---

HEADERS = [unreadable_image, cut_off_image, other_size, four_bands, image_without_mask, empty_file, missing_folder]


def break_headers(root: Path) -> list[str]:
    wanted = [text for damage in HEADERS[:-1] for text in damage(root)]
    shutil.rmtree(root / "target_test")
    return [*wanted, "data.target.test names"]


@pytest.mark.parametrize("command", ["adapt", "pretrain"])
def test_training_lists_what_is_wrong_with_headers_before_anything_starts(root, store, capsys, command):
    wanted, before = break_headers(root), count_runs(store)
    if command == "pretrain":  # it reads no target training images
        wanted = [text for text in wanted if "target/images" not in text]
    assert run(root, command, tracking__uri=f"sqlite:///{store}") == 2
    errors = capsys.readouterr().err
    assert [text for text in wanted if text not in errors] == []
    assert count_runs(store) == before
    assert nothing_was_written(root.parent)


def test_a_sweep_lists_what_is_wrong_with_headers_before_the_study_is_made(root, store, capsys):
    wanted, before = break_headers(root), count_runs(store)
    settings = small_settings(root, tracking__uri=f"sqlite:///{store}")
    config = write_config(root.parent / "config.yaml", settings)
    space = root.parent / "space.yaml"
    space.write_text(
        "study: s\nn_trials: 2\nobjective: iou/source_val\nspace:\n"
        "  domain_adaptation.method.lambda_da: {type: float, low: 0.1, high: 1.0}\n"
    )
    assert sweeps_main(["run", "--config", str(config), "--space", str(space)]) == 2
    errors = capsys.readouterr().err
    assert [text for text in wanted if text not in errors] == []
    assert count_runs(store) == before
    assert not (root.parent / "studies" / "s" / "journal.log").exists()


def test_pictures_of_any_data_can_be_drawn(tmp_path):
    from dann_experiments.reports.plots.domains import draw_domains

    constant, few = np.full((2, 50), 3.0), np.array([[0.25], [1e30]])
    for number, values in enumerate(({"source": constant, "target": constant}, {"source": few, "target": constant})):
        for shares in ({}, {"source_train": np.array([0, 0])}, {"target_test": np.array([5, 1])}):
            draw_domains(tmp_path / f"{number}.png", shares, ["a", "b"], values)


def test_problems_are_errors_for_callers_of_the_function_only_in_the_report(root):
    unreadable_image(root)
    report = check_data(load_config(None, small_settings(root)))
    assert len(report.problems) == 1
    assert report.run_id is None
    with pytest.raises(InputError, match=r"target/images/2\.png"):
        find_data(load_config(None, small_settings(root)))


def test_the_classes_of_masks_that_were_not_read_are_not_missed(root, capsys):
    """The two masks that are left hold one class; that says nothing."""
    for number in range(10):
        values = np.full((32, 32), 200 if number < 8 else 0, np.uint8)
        grey(root / "source" / "masks" / f"{number}.png", values)
    assert run(root) == 2
    errors = capsys.readouterr().err
    assert "holds id 200" in errors
    assert "to learn" not in errors


def test_lossy_masks_are_one_problem(root, capsys):
    for number in range(4):
        (root / "source" / "masks" / f"{number}.png").unlink()
        mask = np.random.default_rng(number).integers(0, 2, (32, 32)).astype(np.uint8) * 60
        Image.fromarray(mask).save(root / "source" / "masks" / f"{number}.jpg")
    assert run(root) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Error: 1 problem")
    assert "lossy compression (such as JPEG)" in errors
    assert "So do 3 other masks: source/masks/1.jpg, source/masks/2.jpg, source/masks/3.jpg." in errors
    assert "CLASS" not in errors


def test_a_black_and_white_mask_of_one_bit_says_what_it_holds(root, capsys):
    mask = np.zeros((32, 32), bool)
    mask[:9] = True
    Image.fromarray(mask).save(root / "source" / "masks" / "0.png")
    assert run(root, data__source__value_map={0: "ground", 255: "square"}) == 2
    assert "add it there (a file of one bit a pixel holds 0 and 1, not 0 and 255)" in capsys.readouterr().err


def test_a_large_picture_in_the_place_of_a_mask_is_asked_about(root, capsys):
    """Its colors are not collected: there may be millions."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(root / "source" / "masks" / "0.png")
    assert run(root) == 2
    errors = capsys.readouterr().err
    assert "More than 32 different ones were found here: is it a picture?" in errors
    assert "CLASS" not in errors
