"""Presets: each finds exactly the pairs of its data set's layout, and reads their labels as other readers do.

The trees are small copies of the real layouts (names, bands, types, ids or colours), written here and not taken from the
presets, so that a wrong pattern or a wrong id in a YAML shows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from conftest import write_raster
from PIL import Image

from dann_experiments import InputError, load_config
from dann_experiments.config.data import DomainDataConfig
from dann_experiments.config.presets import FOLDER, IGNORED, filled, preset, preset_names
from dann_experiments.data.labels import LabelMap, label_map, read_mask
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import read_header
from dann_experiments.data.reading import Reading
from dann_experiments.data.samples import Sample, find_samples
from dann_experiments.jobs.build import find_data
from dann_experiments.names import SOURCE_TRAIN, SOURCE_VAL, TARGET_VAL

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # torchgeo's

NAMES = ("cityscapes", "gta5", "inria", "landcoverai", "loveda", "openearthmap", "potsdam", "vaihingen")
SCENES = (
    "landsat_c2",
    "sentinel2_l2a",
    "sentinel2_l2a_before_0400",
)  # of satellites; tests/test_bands_in_files.py has theirs
SIZE = 16
IGNORE = 255
SIX = [(side, split) for side in ("source", "target") for split in ("train", "val", "test")]
Pair = tuple[str, str | None]  # image and mask, relative to the root
Colours = Sequence[tuple[int, int, int]]

STREET = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
ISPRS = {
    (255, 255, 255): "impervious surface", (0, 0, 255): "building", (0, 255, 255): "low vegetation",
    (0, 255, 0): "tree", (255, 255, 0): "car", (255, 0, 0): "clutter",
}  # fmt: skip
POTSDAM_TRAIN = {2: (10, 11, 12), 3: (10, 11, 12), 4: (10, 11, 12), 5: (10, 11, 12), 6: range(7, 13), 7: range(7, 13)}
POTSDAM_TEST = {2: (13, 14), 3: (13, 14), 4: (13, 14, 15), 5: (13, 14, 15), 6: (13, 14, 15), 7: (13,)}
POTSDAM_VAL = ("2_11", "2_12", "4_10", "5_11", "6_7", "7_8", "7_10")
POTSDAM_BANDS = {"RGB": ("2_Ortho_RGB", 3), "IRRG": ("3_Ortho_IRRG", 3), "RGBIR": ("4_Ortho_RGBIR", 4)}
VAIHINGEN_TRAIN = (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37)
VAIHINGEN_TEST = (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38)
VAIHINGEN_VAL = (11, 15, 28, 30, 34)
INRIA_CITIES = ("austin", "chicago", "kitsap", "tyrol-w", "vienna")


class Tree(NamedTuple):
    """A small data set and what a reader has to find in it."""

    pairs: dict[str, set[Pair]]
    """Of each split."""
    labels: Mapping[Any, str]
    """Id or colour in the masks -> class name; every mask holds all of them."""
    bands: int = 3


def write_image(path: Path, bands: int = 3) -> str:
    """An image of noise that its name determines; returns the name."""
    rng = np.random.default_rng(list(path.name.encode()))
    pixels = rng.integers(0, 256, (SIZE, SIZE, bands)).astype(np.uint8)
    if path.suffix == ".jpg":  # a gradient: noise would be what JPEG keeps least of
        pixels = np.broadcast_to(np.linspace(0, 255, SIZE).astype(np.uint8)[:, None, None], pixels.shape)
    write(path, pixels)
    return path.name


def write_ids(path: Path, ids: Iterable[int], colours: Colours | None = None, bands: int = 1) -> None:
    """A mask that holds all of `ids`, with a colour table if there are `colours`, the same in each of `bands`."""
    values = np.resize(np.array(sorted(ids), np.uint8), (SIZE, SIZE))
    if colours is None:
        write(path, values if bands == 1 else np.stack([values] * bands, axis=-1))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values).convert("P")
    image.putpalette([channel for colour in colours for channel in colour])
    image.save(path)


def write_colours(path: Path, colours: Iterable[tuple[int, int, int]]) -> None:
    """An RGB mask that holds all of `colours`."""
    table = np.array(list(colours), np.uint8)
    write(path, table[np.resize(np.arange(len(table)), (SIZE, SIZE))])


def write(path: Path, pixels: np.ndarray) -> None:
    """(h, w) or (h, w, B) as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 2 or pixels.shape[2] == 3:
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
        return
    write_raster(path, pixels.transpose(2, 0, 1))


def loveda(root: Path) -> Tree:
    """Two scenes; the numbers go on over scenes and splits, and Test has no masks."""
    labels = dict(enumerate((IGNORED, "background", "building", "road", "water", "barren", "forest", "agriculture")))
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set(), "test": set()}
    numbers = itertools.count()
    for folder, split in (("Train", "train"), ("Val", "val"), ("Test", "test")):
        for scene in ("Urban", "Rural"):
            for number in itertools.islice(numbers, 2):
                image, mask = (f"{folder}/{scene}/{kind}_png/{number}.png" for kind in ("images", "masks"))
                write_image(root / image)
                if split != "test":
                    write_ids(root / mask, labels)
                pairs[split].add((image, None if split == "test" else mask))
    return Tree(pairs, labels)


def potsdam(root: Path) -> Tree:
    """All 38 tiles in the three band choices; the tree says what the default, RGB, has to find."""
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set(), "test": set()}
    for rows, split in ((POTSDAM_TRAIN, "train"), (POTSDAM_TEST, "test")):
        for tile in (f"{row}_{column}" for row, columns in rows.items() for column in columns):
            mask = f"5_Labels_all/top_potsdam_{tile}_label.tif"
            write_colours(root / mask, [*ISPRS, (252, 255, 0)] if tile == "6_7" else ISPRS)
            for bands, (folder, count) in POTSDAM_BANDS.items():
                write_image(root / folder / f"top_potsdam_{tile}_{bands}.tif", count)
            if tile != "4_12":  # a file that was compressed with losses; no split has it
                mine = "val" if tile in POTSDAM_VAL else split
                pairs[mine].add((f"2_Ortho_RGB/top_potsdam_{tile}_RGB.tif", mask))
    return Tree(pairs, dict(ISPRS))


def vaihingen(root: Path) -> Tree:
    """Images in top/, masks of the same names beside it."""
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set(), "test": set()}
    for area in (*VAIHINGEN_TRAIN, *VAIHINGEN_TEST):
        name = f"top_mosaic_09cm_area{area}.tif"
        write_image(root / "top" / name)
        write_colours(root / name, ISPRS)
        split = "val" if area in VAIHINGEN_VAL else "train" if area in VAIHINGEN_TRAIN else "test"
        pairs[split].add((f"top/{name}", name))
    return Tree(pairs, dict(ISPRS))


def openearthmap(root: Path) -> Tree:
    """A folder a region; text files say which tiles make up a split, and name some of xBD that are not there."""
    names = (IGNORED, "barren", "rangeland", "developed", "road", "tree", "water", "agriculture", "building")
    labels = dict(enumerate(names))
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set()}
    lists: dict[str, list[str]] = {"train": ["joplin_11.tif"], "val": []}
    for region in ("tokyo", "al_qurnah"):
        for number in range(1, 6):
            tile = f"{region}_{number}.tif"
            split = "val" if number == 5 else "train"
            image, mask = f"{region}/images/{tile}", f"{region}/labels/{tile}"
            write_image(root / image)
            write_ids(root / mask, labels)
            pairs[split].add((image, mask))
            lists[split].append(tile)
    for split, tiles in lists.items():
        (root / f"{split}.txt").write_text("\n".join(tiles) + "\n")
    return Tree(pairs, labels)


def inria(root: Path) -> Tree:
    """36 tiles a city; tiles 1 to 5 of each validate. The test folder shows other cities, without masks."""
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set()}
    for city in INRIA_CITIES:
        for number in range(1, 37):
            image, mask = (f"train/{kind}/{city}{number}.tif" for kind in ("images", "gt"))
            write_image(root / image)
            write_ids(root / mask, (0, 255))
            pairs["val" if number <= 5 else "train"].add((image, mask))
    write_image(root / "test" / "images" / "innsbruck1.tif")
    return Tree(pairs, {0: "background", 255: "building"})


def landcoverai(root: Path) -> Tree:
    """What split.py leaves: tiles beside their masks (the id in three bands), whole orthophotos in images/, lists."""
    labels = dict(enumerate(("background", "building", "forest", "water", "road")))
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set(), "test": set()}
    for sheet in ("M-33-20-D-c-4-2", "N-34-140-A-b-3-2"):
        write_image(root / "images" / f"{sheet}.tif")
        write_ids(root / "masks" / f"{sheet}.tif", labels)
        for number in range(4):
            image, mask = f"output/{sheet}_{number}.jpg", f"output/{sheet}_{number}_m.png"
            write_image(root / image)
            write_ids(root / mask, labels, bands=3)
            pairs[("train", "train", "val", "test")[number]].add((image, mask))
    for split, found in pairs.items():
        lines = sorted(Path(image).stem for image, _ in found)
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return Tree(pairs, {(value, value, value): name for value, name in labels.items()})


def cityscapes(root: Path) -> Tree:
    """A folder a city; beside the ids lie instances, colours and polygons. Masks of test hold nothing that is scored."""
    labels = {value: STREET.get(value, IGNORED) for value in (*range(34), 255)}
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set(), "test": set()}
    cities = {"train": ("aachen", "zurich"), "val": ("frankfurt", "lindau", "munster"), "test": ("berlin",)}
    for split, names in cities.items():
        for city in names:
            for frame in ("000000_000019", "000001_000019"):
                image = f"leftImg8bit/{split}/{city}/{city}_{frame}_leftImg8bit.png"
                start = f"gtFine/{split}/{city}/{city}_{frame}_gtFine_"
                write_image(root / image)
                write_ids(root / f"{start}labelIds.png", labels if split != "test" else range(4))
                write_ids(root / f"{start}instanceIds.png", range(20))
                write_image(root / f"{start}color.png")
                (root / f"{start}polygons.json").write_text("{}")
                pairs[split].add((image, None if split == "test" else f"{start}labelIds.png"))
    return Tree(pairs, labels)


def gta5(root: Path) -> Tree:
    """Numbered frames, masks as ids with a colour table."""
    labels = {value: STREET.get(value, IGNORED) for value in range(35)}
    colours = [(value, 255 - value, 7 * value % 256) for value in range(256)]
    pairs: dict[str, set[Pair]] = {"train": set(), "val": set()}
    for number in (1, 2, 19999, 23999, 24000, 24966):
        image, mask = f"images/{number:05}.png", f"labels/{number:05}.png"
        write_image(root / image)
        write_ids(root / mask, labels, colours)
        pairs["train" if number < 24000 else "val"].add((image, mask))
    return Tree(pairs, labels)


BUILDERS: dict[str, Callable[[Path], Tree]] = {
    "cityscapes": cityscapes, "gta5": gta5, "inria": inria, "landcoverai": landcoverai, "loveda": loveda,
    "openearthmap": openearthmap, "potsdam": potsdam, "vaihingen": vaihingen,
}  # fmt: skip


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tree]]:
    """Root and tree of a data set, written when first asked for. Not to be changed."""
    written: dict[str, tuple[Path, Tree]] = {}

    def get(name: str) -> tuple[Path, Tree]:
        if name not in written:
            root = tmp_path_factory.mktemp(name)
            written[name] = (root, BUILDERS[name](root))
        return written[name]

    return get


def domain(name: str, scene: str | None = None) -> DomainDataConfig:
    """What a user gets who names the preset and nothing else."""
    return filled(DomainDataConfig(preset=name, scene=scene))


def labels_of(settings: DomainDataConfig) -> LabelMap:
    """The label map of a network that has the preset's classes."""
    assert settings.class_names is not None
    return label_map(settings.class_names, IGNORE, settings.value_map, settings.colors, settings.ignore_values)


def samples(root: Path, name: str, split: str, scene: str | None = None) -> list[Sample]:
    return find_samples(getattr(domain(name, scene), split), root, f"data.source.{split}")


def pairs(root: Path, name: str, split: str, scene: str | None = None) -> list[Pair]:
    """Sorted (image, mask) that the preset finds, relative to the root."""
    return sorted(
        (item.image.relative_to(root).as_posix(), item.mask and item.mask.relative_to(root).as_posix())
        for item in samples(root, name, split, scene)
    )  # fmt: skip


def urban_to_rural(root: Path) -> dict[str, Any]:
    """Settings of a job on LoveDA that name the preset and nothing else of the data."""
    return {
        "model.classes": 7,
        "data.source.preset": "loveda",
        "data.source.scene": "Urban",
        "data.source.root": str(root),
        "data.target.preset": "loveda",
        "data.target.scene": "Rural",
        "data.target.root": str(root),
    }


def class_names_in(mask: Path, settings: DomainDataConfig) -> np.ndarray:
    """(h, w) class names of a mask as we read it."""
    names = np.array([*(settings.class_names or ()), *[IGNORED] * (IGNORE + 1)])[: IGNORE + 1]
    return names[read_mask(mask, labels_of(settings))]


def test_there_is_a_preset_for_each_data_set_we_name():
    assert preset_names() == sorted((*NAMES, *SCENES))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_has_known_keys_alone_and_one_label_map(name):
    known = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(known) <= {
        "about", "scene", "train", "val", "test", "value_map", "color_map", "ignore_values", "bands", "scale", "nodata",
    }  # fmt: skip
    assert "https://" in known["about"]
    assert "\n" not in known["about"].strip()
    assert ("value_map" in known) != ("color_map" in known)
    assert set(known.get("scene", {})) <= {"default", "example", "means", "values"}
    for split in ("train", "val", "test"):
        for entry in known.get(split, []):
            assert set(entry) <= {"images", "masks", "names"}
            assert all(isinstance(listed, str) for listed in entry.get("names", [])), "2_10 without quotes is 210"


@pytest.mark.parametrize("name", NAMES)
def test_class_names_are_plain_lower_case_english(name):
    for label in domain(name).class_names or []:
        assert label == label.lower().strip()
        assert label.replace(" ", "").isalpha()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_preset_finds_exactly_the_pairs_of_its_layout(trees, name, split):
    root, tree = trees(name)
    if split not in tree.pairs:
        pytest.skip(f"{name} has no {split}, or has it in a test of its own")
    assert pairs(root, name, split) == sorted(tree.pairs[split], key=lambda pair: pair[0])


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_in_two_splits(trees, name):
    root, tree = trees(name)
    found = [image for split in tree.pairs for image, _ in pairs(root, name, split)]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", NAMES)
def test_images_are_read_with_the_bands_the_set_has(trees, name):
    root, tree = trees(name)
    settings = domain(name)
    reading = Reading(bands=None if settings.bands is None else tuple(settings.bands))
    first = samples(root, name, "train")[0].image
    assert read_pixels(first, tree.bands, reading).values.shape == (tree.bands, SIZE, SIZE)


@pytest.mark.parametrize("name", NAMES)
def test_every_id_or_colour_of_the_masks_becomes_the_right_class(trees, name):
    root, tree = trees(name)
    expected = np.array([label for _, label in sorted(tree.labels.items())])
    if name in ("potsdam", "vaihingen"):  # colours are written in the order of the table
        expected = np.array(list(tree.labels.values()))
    for split in tree.pairs:
        for item in samples(root, name, split):
            if item.mask is not None and "6_7_label" not in item.mask.name:
                found = class_names_in(item.mask, domain(name))
                assert np.array_equal(found, np.resize(expected, (SIZE, SIZE))), item.mask


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("potsdam", "vaihingen", "landcoverai")])
def test_an_id_that_no_table_names_is_an_error(tmp_path, name):
    settings = domain(name)
    known = {*(settings.value_map or {}), *settings.ignore_values, IGNORE}
    write_ids(tmp_path / "mask.png", [min(set(range(256)) - known)])
    with pytest.raises(InputError, match=r"mask\.png holds id"):
        read_mask(tmp_path / "mask.png", labels_of(settings))


@pytest.mark.parametrize("name", ["cityscapes", "gta5", "loveda", "openearthmap"])
def test_ignored_ids_count_nowhere(trees, tmp_path, name):
    ignored = [value for value, label in trees(name)[1].labels.items() if label == IGNORED]
    write_ids(tmp_path / "mask.png", ignored)
    assert set(np.unique(read_mask(tmp_path / "mask.png", labels_of(domain(name))))) == {IGNORE}


@pytest.mark.parametrize("name", ["potsdam", "vaihingen"])
def test_object_boundaries_that_are_black_count_nowhere(tmp_path, name):
    write_colours(tmp_path / "mask.tif", [(0, 0, 0)])
    assert set(np.unique(read_mask(tmp_path / "mask.tif", labels_of(domain(name))))) == {IGNORE}
    assert domain(name).class_names == list(ISPRS.values())


def test_the_cars_of_potsdam_6_7_are_cars_in_both_of_their_yellows(trees):
    root, _ = trees("potsdam")
    found = class_names_in(root / "5_Labels_all" / "top_potsdam_6_7_label.tif", domain("potsdam"))
    assert np.array_equal(found, np.resize(np.array([*ISPRS.values(), "car"]), (SIZE, SIZE)))


def test_inria_keeps_255_as_building_although_255_is_ignored_elsewhere(trees):
    root, _ = trees("inria")
    found = read_mask(root / "train" / "gt" / "austin1.tif", labels_of(domain("inria")))
    assert set(np.unique(found)) == {0, 1}


def test_cityscapes_and_gta5_have_the_same_19_classes_in_the_same_order():
    assert domain("cityscapes").class_names == domain("gta5").class_names == list(STREET.values())


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("potsdam", "vaihingen", {"impervious surface", "building", "low vegetation", "tree", "car", "clutter"}),
        ("loveda", "openearthmap", {"building", "road", "water", "barren", "agriculture"}),
        ("loveda", "landcoverai", {"background", "building", "road", "water", "forest"}),
        ("openearthmap", "potsdam", {"building", "tree"}),
        ("inria", "loveda", {"background", "building"}),
    ],
)
def test_sets_meet_by_the_names_of_the_classes_they_share(one, other, shared):
    assert set(domain(one).class_names or ()) & set(domain(other).class_names or ()) == shared


@pytest.mark.parametrize(
    ("name", "scene", "part"),
    [
        ("loveda", "Urban", "/Urban/"),
        ("loveda", "Rural", "/Rural/"),
        ("openearthmap", "tokyo", "tokyo/"),
        ("openearthmap", "al_*", "al_qurnah/"),
        ("inria", "vienna", "/vienna"),
        ("inria", "tyrol-w", "/tyrol-w"),
        ("inria", "*", ""),
        ("inria", "[ak]*", "s"),  # austin and kitsap: a pattern is one too
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_scene_restricts_a_split_to_its_part(trees, name, scene, part, split):
    root, tree = trees(name)
    expected = {pair for pair in tree.pairs[split] if part in pair[0]}
    if scene == "[ak]*":
        expected = {pair for pair in tree.pairs[split] if Path(pair[0]).name[0] in "ak"}
    assert expected
    assert set(pairs(root, name, split, scene)) == expected


def test_loveda_test_images_follow_the_scene_as_well(trees):
    root, tree = trees("loveda")
    assert set(pairs(root, "loveda", "test", "Rural")) == {pair for pair in tree.pairs["test"] if "Rural" in pair[0]}


def test_a_city_of_cityscapes_restricts_training_and_leaves_val_and_test_whole(trees):
    root, tree = trees("cityscapes")
    assert {Path(image).parts[2] for image, _ in pairs(root, "cityscapes", "train", "zurich")} == {"zurich"}
    for split in ("val", "test"):
        assert set(pairs(root, "cityscapes", split, "zurich")) == tree.pairs[split]


@pytest.mark.parametrize("bands", list(POTSDAM_BANDS))
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_scene_of_potsdam_is_a_band_choice_with_the_same_tiles(trees, bands, split):
    root, tree = trees("potsdam")
    folder, count = POTSDAM_BANDS[bands]
    expected = {
        (image.replace("2_Ortho_RGB", folder).replace("_RGB.tif", f"_{bands}.tif"), mask)
        for image, mask in tree.pairs[split]
    }
    assert set(pairs(root, "potsdam", split, bands)) == expected
    assert {read_header(root / image).bands for image, _ in expected} == {count}


@pytest.mark.parametrize("name", [name for name in NAMES if "scene" in preset(name)])
def test_the_example_of_a_scene_is_one(name):
    about = preset(name)["scene"]
    assert about["default"] != about["example"]
    assert domain(name, about["example"]).train != domain(name).train
    assert "{scene}" not in str(domain(name).train)


@pytest.mark.parametrize("name", [name for name in NAMES if "scene" in preset(name)])
def test_a_scene_that_is_not_there_is_an_error_with_the_pattern(trees, name):
    root, _ = trees(name)
    with pytest.raises(InputError, match=r"data\.source\.train.*Atlantis"):
        samples(root, name, "train", "Atlantis")


@pytest.mark.parametrize("name", [name for name in NAMES if "scene" not in preset(name)])
def test_a_scene_is_refused_where_a_preset_has_none(name):
    with pytest.raises(InputError, match=f"preset {name} has no scenes"):
        domain(name, "Urban")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_root_without_the_layout_is_an_error_with_the_pattern(tmp_path, name, split):
    entries = getattr(domain(name), split)
    if not entries:
        pytest.skip(f"{name} has no {split}")
    with pytest.raises(InputError) as error:
        find_samples(entries, tmp_path, f"data.source.{split}")
    assert str(tmp_path / entries[0]["images"]) in str(error.value)
    assert f"data.source.{split}" in str(error.value)


def test_two_scenes_of_a_set_are_two_domains_of_one_network(trees):
    root, tree = trees("loveda")
    config = load_config(None, urban_to_rural(root))
    assert config.class_names == list(tree.labels.values())[1:]
    sets = find_data(config).read().sets
    assert {str(name): len(found) for name, found in sets.items()} == {f"{side}_{split}": 2 for side, split in SIX}
    assert {name for name, found in sets.items() if found.has_masks} == {SOURCE_TRAIN, SOURCE_VAL, TARGET_VAL}
    mask = sets[TARGET_VAL][0]["mask"]
    assert set(mask.unique().tolist()) == {*range(7), IGNORE}


def test_a_source_and_a_target_of_different_sets_meet_by_class_name(trees):
    source, target = trees("loveda")[0], trees("landcoverai")[0]
    shared = ["background", "building", "road", "water", "forest"]
    settings = urban_to_rural(source) | {
        "data.target.preset": "landcoverai", "data.target.scene": None, "data.target.root": str(target),
        "data.class_names": shared, "model.classes": 5,
    }  # fmt: skip
    sets = find_data(load_config(None, settings), (SOURCE_VAL, TARGET_VAL)).read().sets
    # ids 0 (no data), 5 (barren) and 7 (agriculture) of LoveDA are no class here; LandCover.ai has water before road
    of_loveda = np.array([IGNORE, 0, 1, 2, 3, IGNORE, 4, IGNORE])
    of_landcoverai = np.array([0, 1, 4, 3, 2])
    for name, table in ((SOURCE_VAL, of_loveda), (TARGET_VAL, of_landcoverai)):
        assert np.array_equal(sets[name][0]["mask"].numpy(), np.resize(table, (SIZE, SIZE)))


@pytest.mark.parametrize(("key", "value"), [("data.source.scene", "Atlantis"), ("data.source.root", "elsewhere")])
def test_an_error_about_a_layout_names_the_preset(trees, key, value):
    root, _ = trees("loveda")
    with pytest.raises(InputError, match=r"Train/.*\(preset loveda\)"):
        find_data(load_config(None, urban_to_rural(root) | {key: value}))


def test_a_list_of_names_that_is_missing_is_an_error_with_its_path(tmp_path):
    landcoverai(tmp_path)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(InputError, match=r"data\.source\.val.*val\.txt does not exist"):
        samples(tmp_path, "landcoverai", "val")


def with_test_images_of_openearthmap(root: Path) -> Tree:
    """As published: images of the test split have no labels, labels of xBD no images."""
    tree = openearthmap(root)
    write_image(root / "tokyo" / "images" / "tokyo_6.tif")
    (root / "test.txt").write_text("tokyo_6.tif\n")
    write_ids(root / "joplin" / "labels" / "joplin_11.tif", range(9))
    tree.pairs["test"] = {("tokyo/images/tokyo_6.tif", None)}
    return tree


def with_more_masks_of_vaihingen(root: Path) -> Tree:
    """As published: the complete ground truth has an area without an image, the eroded one lies beside it."""
    tree = vaihingen(root)
    write_colours(root / "top_mosaic_09cm_area9.tif", ISPRS)
    write_colours(root / "top_mosaic_09cm_area1_noBoundary.tif", [*ISPRS, (0, 0, 0)])
    return tree


@pytest.mark.parametrize(
    ("name", "builder"),
    [("openearthmap", with_test_images_of_openearthmap), ("vaihingen", with_more_masks_of_vaihingen)],
)
def test_files_that_no_name_of_a_split_asks_for_need_no_partner(tmp_path, name, builder):
    for split, expected in builder(tmp_path).pairs.items():
        assert set(pairs(tmp_path, name, split)) == expected


# What other readers find in the same trees ---------------------------------------------------------------------------


class Read(NamedTuple):
    """One sample as another reader has it."""

    image: Path
    mask: Path | None
    pixels: np.ndarray
    """(B, h, w)."""
    labels: np.ndarray | None
    """(h, w) names of our classes."""


def compare(root: Path, name: str, splits: Sequence[str], theirs: Sequence[Read], scene: str | None = None) -> None:
    """The same files, the same pixels, the same class at each pixel."""
    settings = domain(name, scene)
    ours = {item.image.resolve(): item for split in splits for item in samples(root, name, split, scene)}
    assert len(theirs) == len(ours) > 0
    for read in theirs:
        mine = ours[read.image.resolve()]
        assert (mine.mask and mine.mask.resolve()) == (read.mask and read.mask.resolve())
        values = read_pixels(mine.image, len(read.pixels), Reading()).values
        assert np.array_equal(values, read.pixels)
        if mine.mask is not None and read.labels is not None:
            assert np.array_equal(class_names_in(mine.mask, settings), read.labels)


ISPRS_OF_TORCHGEO = {
    "Clutter/background": "clutter", "Impervious surfaces": "impervious surface", "Building": "building",
    "Low Vegetation": "low vegetation", "Tree": "tree", "Car": "car",
}  # fmt: skip


@pytest.fixture(scope="module")
def torchgeo() -> Any:
    return pytest.importorskip(
        "torchgeo.datasets", reason="torchgeo, whose readers these tests compare with, is not there"
    )


def reads(dataset: Any, names: np.ndarray | None, mask_key: str = "mask") -> list[Read]:
    """All samples of a torchgeo data set; `names` of its classes by their id."""
    result = []
    for index, files in enumerate(dataset.files):
        sample = dataset[index]
        mask = Path(files[mask_key]) if mask_key in files else None
        labels = None if mask is None or names is None else names[sample["mask"].numpy()]
        result.append(Read(Path(files["image"]), mask, sample["image"].numpy(), labels))
    return result


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("scene", [None, "Urban", "Rural"])
def test_loveda_is_read_as_torchgeo_reads_it(trees, torchgeo, split, scene):
    root, _ = trees("loveda")
    scenes = ["urban", "rural"] if scene is None else [scene.lower()]
    theirs = torchgeo.LoveDA(root, split=split, scene=scenes)
    # torchgeo hands the id of the file out as it is, and lists "no-data", which is 0 there, last
    names = np.array([IGNORED, *theirs.classes[:-1]])
    compare(root, "loveda", [split], reads(theirs, names), scene)


@pytest.mark.parametrize("split", ["train", "test"])
def test_potsdam_is_read_as_torchgeo_reads_it(tmp_path, torchgeo, split):
    potsdam(tmp_path)
    for mask in (tmp_path / "5_Labels_all").iterdir():  # torchgeo looks for them in the root
        (tmp_path / mask.name).symlink_to(mask)
    theirs = torchgeo.Potsdam2D(tmp_path, split=split)
    names = np.array([ISPRS_OF_TORCHGEO[label] for label in theirs.classes])
    found = reads(theirs, names)
    assert len(found) == {"train": 24, "test": 14}[split]
    # Two files whose colours torchgeo does not know and takes for clutter: 4_12, which no split of ours has, and 6_7
    found = [read for read in found if "_4_12_" not in read.image.name]
    found = [read._replace(labels=None) if "_6_7_" in read.image.name else read for read in found]
    compare(tmp_path, "potsdam", ["train", "val"] if split == "train" else ["test"], found, "RGBIR")


@pytest.mark.parametrize("split", ["train", "test"])
def test_vaihingen_is_read_as_torchgeo_reads_it(trees, torchgeo, split):
    root, _ = trees("vaihingen")
    theirs = torchgeo.Vaihingen2D(root, split=split)
    names = np.array([ISPRS_OF_TORCHGEO[label] for label in theirs.classes])
    found = reads(theirs, names)
    assert len(found) == {"train": 16, "test": 17}[split]
    compare(root, "vaihingen", ["train", "val"] if split == "train" else ["test"], found)


@pytest.mark.parametrize("split", ["train", "val"])
def test_inria_is_read_as_torchgeo_reads_it(tmp_path, monkeypatch, torchgeo, split):
    inria(tmp_path / "AerialImageDataset")
    monkeypatch.chdir(tmp_path)  # torchgeo takes the first number of a whole path for the tile
    theirs = torchgeo.InriaAerialImageLabeling(".", split=split)
    found = reads(theirs, np.array(["background", "building"]), "label")
    assert len(found) == {"train": 155, "val": 25}[split]
    compare(Path.cwd() / "AerialImageDataset", "inria", [split], found)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_landcoverai_is_read_as_torchgeo_reads_it(trees, torchgeo, split):
    root, _ = trees("landcoverai")
    theirs = torchgeo.LandCoverAI(root, split=split)
    ours = {"Background": "background", "Building": "building", "Woodland": "forest", "Water": "water", "Road": "road"}
    names = np.array([ours[label] for label in theirs.classes])
    found = []
    for index, name in enumerate(line.strip() for line in theirs.ids):
        sample = theirs[index]
        image, mask = (root / "output" / f"{name}{end}" for end in (".jpg", "_m.png"))
        found.append(Read(image, mask, sample["image"].numpy(), names[sample["mask"].numpy()]))
    compare(root, "landcoverai", [split], found)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_cityscapes_is_read_as_torchvision_reads_it(trees, split):
    from torchvision.datasets import Cityscapes

    root, _ = trees("cityscapes")
    theirs = Cityscapes(os.fspath(root), split=split, target_type="semantic")
    names = np.full(256, IGNORED, dtype="<U16")
    for label in theirs.classes:
        if label.id >= 0 and not label.ignore_in_eval:
            names[label.id] = label.name
    found = []
    for index in range(len(theirs)):
        image, target = theirs[index]
        mask = None if split == "test" else Path(theirs.targets[index][0])  # the masks of test are empty stand-ins
        pixels = np.asarray(image).transpose(2, 0, 1)
        found.append(Read(Path(theirs.images[index]), mask, pixels, names[np.asarray(target)]))
    compare(root, "cityscapes", [split], found)
