"""Where images and masks lie: folders, patterns, lists, manifests with splits, single files; and what pairs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dann_experiments.config import InputError, load_config
from dann_experiments.config.paths import near_name
from dann_experiments.data.overlaps import shared_images
from dann_experiments.data.samples import Sample, find_samples


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / name)


def names(samples: list[Sample], root: Path) -> list[tuple[str, str | None]]:
    return [
        (s.image.relative_to(root).as_posix(), s.mask.relative_to(root).as_posix() if s.mask else None) for s in samples
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two cities whose images and masks have other names."""
    for city in ("aa", "bb"):
        for number in (1, 2):
            touch(tmp_path, f"left/{city}/{city}_{number}_left.png", f"fine/{city}/{city}_{number}_fine_ids.png")
    touch(tmp_path, "one/a.jpg", "one/b.tif", "two/a.png", "two/b.png")
    return tmp_path


def test_two_folders_are_paired_by_stem(tree):
    found = find_samples([{"images": "one", "masks": "two"}], tree, "data.source.train", "required")
    assert names(found, tree) == [("one/a.jpg", "two/a.png"), ("one/b.tif", "two/b.png")]


def test_two_patterns_are_paired_by_what_their_wildcards_stand_for(tree):
    entry = {"images": "left/*/*_left.png", "masks": "fine/*/*_fine_ids.png"}
    found = names(find_samples([entry], tree, "data.source.train", "required"), tree)
    assert found[1] == ("left/aa/aa_2_left.png", "fine/aa/aa_2_fine_ids.png")
    assert len(found) == 4
    (tree / "fine/bb/bb_1_fine_ids.png").unlink()
    with pytest.raises(InputError, match=r"bb_1_left\.png has no mask"):
        find_samples([entry], tree, "data.source.train", "required")


def test_a_pattern_alone_names_images_also_through_all_folders(tree):
    assert len(find_samples(["left/**/*.png"], tree, "data.target.train", "no")) == 4
    assert len(find_samples(["left/[a]?/*_[!2]_left.png"], tree, "data.target.train", "no")) == 1
    with pytest.raises(InputError, match=r"left/\*\.gif, which matches no image"):
        find_samples(["left/*.gif"], tree, "data.target.train", "no")


def test_lists_are_paired_by_their_order_and_name_files_beside_themselves(tree):
    (tree / "lists").mkdir()
    (tree / "lists" / "x.txt").write_text("../one/b.tif\n\n../one/a.jpg\n")
    (tree / "lists" / "y.txt").write_text("../two/b.png\n../two/a.png\n")
    found = find_samples([{"images": "lists/x.txt", "masks": "lists/y.txt"}], tree, "k.train", "required")
    assert [(s.image.name, s.mask.name) for s in found if s.mask] == [("b.tif", "b.png"), ("a.jpg", "a.png")]
    assert len(find_samples(["lists/x.txt"], tree, "data.target.train", "no")) == 2
    inline = {"images": ["one/a.jpg", "one/b.tif"], "masks": ["two/a.png"]}
    with pytest.raises(InputError, match=r"one/b\.tif has no mask"):
        find_samples([inline], tree, "k.train", "required")


def test_a_manifest_with_splits_gives_the_rows_of_the_list_it_stands_in(tree):
    (tree / "all.csv").write_text("image,mask,split\none/a.jpg,two/a.png,train\none/b.tif,two/b.png,val\n")
    assert names(find_samples(["all.csv"], tree, "data.source.train"), tree) == [("one/a.jpg", "two/a.png")]
    assert names(find_samples(["all.csv"], tree, "data.source.val"), tree) == [("one/b.tif", "two/b.png")]
    with pytest.raises(InputError, match=r"all\.csv has no rows with split test; it has \['train', 'val'\]"):
        find_samples(["all.csv"], tree, "data.source.test")


def test_an_image_file_is_an_entry_and_a_region_of_it_belongs_to_the_set(tree):
    entry = {"images": "one/b.tif", "masks": "two/b.png", "region": [0, 1, 2, 3]}
    assert find_samples([entry], tree, "k.val") == [Sample(tree / "one/b.tif", tree / "two/b.png", (0, 1, 2, 3))]
    assert find_samples(["one/b.tif"], tree, "k.val") == [Sample(tree / "one/b.tif", None)]


@pytest.mark.parametrize("listed", [["aa_1_left", "bb"], "keep.txt"])
def test_names_keep_what_they_list_by_file_name_stem_or_wildcard(tree, listed):
    (tree / "keep.txt").write_text("left/aa/aa_1_left.png\nbb_1\nbb_2\n")
    entry = {"images": "left/*/*_left.png", "masks": "fine/*/*_fine_ids.png", "names": listed}
    found = find_samples([entry], tree, "k.train", "required")
    assert [sample.image.name for sample in found] == ["aa_1_left.png", "bb_1_left.png", "bb_2_left.png"]


def test_images_that_two_sets_share_are_found_by_their_bytes_but_apart_regions_may_share(tree):
    Image.fromarray(np.ones((4, 4), np.uint8)).save(tree / "two" / "b.png")
    (tree / "copy.png").write_bytes((tree / "two" / "b.png").read_bytes())
    sets = {"source_train": [Sample(tree / "two/b.png", None)], "target_train": [Sample(tree / "copy.png", None)]}
    assert shared_images(sets, Path.read_bytes) == [
        ("target_train", tree / "copy.png", "source_train", tree / "two/b.png")
    ]
    left, right = Sample(tree / "copy.png", None, (0, 0, 2, 4)), Sample(tree / "copy.png", None, (2, 0, 4, 4))
    assert shared_images({"source_train": [left], "source_val": [right]}, Path.read_bytes) == []
    assert len(shared_images({"source_train": [left], "source_val": [left]}, Path.read_bytes)) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.source.train", [{"masks": "m"}], "a mapping takes images (needed)"),
        ("data.source.train", [{"images": "i", "mask": "m"}], "not mask"),
        ("data.source.train", [{"images": "i", "region": [3, 0, 1, 2]}], "[left, top, right, bottom]"),
        ("data.source.value_map", {}, "data.source.value_map is {}"),
        ("data.source.color_map", {"1,2": "a"}, '"RED,GREEN,BLUE"'),
        ("data.source.color_map", {"1,2,300": "a"}, "go from 0 to 255"),
        ("data.source.bands", [0, 1, 2], "counted from 1"),
        ("data.source.bands", [1, 2], "data.source.bands names 2 bands, but model.in_channels is 3"),
        ("data.source.scale", [3, 1], "[LOW, HIGH]"),
        ("data.source.scale", "minmax", "data.source.scale is 'minmax'"),
        ("data.source.pixel_size", -1, "pixel_size"),
        ("data.source.file_pixel_size", 0.5, "no effect without pixel_size"),
        ("data.source.preset", "lovedas", "give one of cityscapes"),
        ("data.source.scene", "Urban", "no effect without a preset"),
        ("data.window_count", 5, "no effect with data.windows grid"),
        ("data.crop_size", 4, "data.crop_size is 4"),
        ("data.memory_gb", -1, "data.memory_gb"),
    ],
)
def test_a_wrong_description_of_data_is_refused_with_the_way_out(key, value, message):
    with pytest.raises(InputError) as error:
        load_config(None, {key: value})
    assert message in str(error.value)


def test_the_label_map_of_the_source_names_the_classes_and_their_number_must_agree():
    named = {"data.source.value_map": {3: "water", 1: "land", 2: "land"}}
    assert load_config(None, named).class_names == ["land", "water"]
    with pytest.raises(InputError, match=r"the label map of data\.source has 2 names, but model\.classes is 3"):
        load_config(None, {**named, "model.classes": 3})
    assert load_config(None, {**named, "data.class_names": ["water", "land"]}).class_names == ["water", "land"]


def test_a_misspelt_folder_is_told_the_name_beside_it(tree):
    (tree / "target_val").mkdir()
    assert near_name(tree / "target_vall") == f" (did you mean {tree / 'target_val'}?)"
    assert near_name(tree / "target_vall" / "images" / "a.png") == f" (did you mean {tree / 'target_val'}?)"
    assert near_name(tree / "elsewhere") == near_name("\0") == ""
    with pytest.raises(
        InputError, match=r"target_vall, which does not exist \(did you mean .*/target_val\?\); give a CSV"
    ):
        find_samples(["target_vall"], tree, "data.target.val")
