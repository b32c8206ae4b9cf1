"""The embedded data: split by digit and by photograph, the same for the same seed, no masks for the target's training."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dann_experiments.data import digits
from dann_experiments.data.digits import build_digits, photo_strips, photographs


@pytest.fixture(scope="module", autouse=True)
def _fewer() -> Iterator[None]:
    """A tenth of the handwriting: the recipes' tests build all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "DIGITS", {name: count // 10 for name, count in digits.DIGITS.items()})
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_digits(tmp_path_factory.mktemp("digits"), seed=3)


def rows(manifest: Path) -> list[dict[str, str]]:
    with open(manifest, newline="") as file:
        return list(csv.DictReader(file))


def test_the_target_s_training_manifest_names_no_masks_and_the_oracle_s_stand_apart(built):
    assert set(rows(built / "target" / "train.csv")[0]) == {"image"}
    assert not (built / "target" / "masks" / "train").exists()
    oracle = rows(built / "oracle" / "target_train.csv")
    assert len(oracle) == len(rows(built / "target" / "train.csv"))
    assert all(
        (built / "oracle" / row["image"]).is_file() and (built / "oracle" / row["mask"]).is_file() for row in oracle
    )


def test_source_masks_are_the_pixels_brighter_than_the_threshold(built):
    for row in rows(built / "source" / "val.csv")[:20]:
        image = np.asarray(Image.open(built / "source" / row["image"]))
        mask = np.asarray(Image.open(built / "source" / row["mask"]))
        assert image.shape == (32, 32, 3)
        assert np.array_equal(mask, (image[..., 0] > digits.STROKE_THRESHOLD).astype(np.uint8))


def test_no_handwriting_is_in_two_sets(built):
    def shapes(manifest: Path) -> set[bytes]:
        return {(manifest.parent / row["mask"]).read_bytes() for row in rows(manifest)}

    sets = [shapes(built / part) for part in ("source/train.csv", "source/val.csv", "target/val.csv", "target/test.csv",
                                              "target/unseen.csv", "oracle/target_train.csv")]  # fmt: skip
    for index, one in enumerate(sets):
        for other in sets[index + 1 :]:
            assert len(one & other) < 5  # plain strokes of a 1 may agree to the pixel; shared digits would by hundreds


def test_the_strips_of_a_photograph_do_not_touch():
    marked = np.arange(400 * 300 * 3).reshape(400, 300, 3)
    for seed in range(6):
        strips = photo_strips(marked, np.random.default_rng(seed))
        pixels = {name: set(strip.ravel().tolist()) for name, strip in strips.items()}
        assert set(pixels) == {"train", "val", "test"}
        names = list(pixels)
        for index, one in enumerate(names):
            for other in names[index + 1 :]:
                assert not pixels[one] & pixels[other]
        assert all(min(strip.shape[:2]) >= digits.SIZE for strip in strips.values())


def test_unseen_photographs_exist_and_are_used_for_nothing_else():
    assert set(digits.UNSEEN) < set(photographs())


def test_the_target_is_the_difference_of_photograph_and_digit(built):
    """Where the digit is black the photograph stands unchanged: so target images of one mask differ, and are not black."""
    image = np.asarray(Image.open(built / "target" / rows(built / "target" / "val.csv")[0]["image"]))
    assert image[0, 0].max() <= 255
    dark = [
        np.asarray(Image.open(built / "target" / row["image"]))[0, 0].mean()
        for row in rows(built / "target" / "val.csv")[:100]
    ]
    assert np.mean(dark) > 20


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files_and_another_seed_others(built, tmp_path):
    again = build_digits(tmp_path, seed=3)
    other = build_digits(tmp_path, seed=4)
    for name in ("source/images/train/00007.png", "target/images/train/00011.png", "target/masks/test/00003.png"):
        assert (again / name).read_bytes() == (built / name).read_bytes()
        assert (other / name).read_bytes() != (built / name).read_bytes()


def test_a_folder_that_stands_is_not_built_again(built):
    before = (built / "done.json").stat().st_mtime_ns
    assert build_digits(built.parent, seed=3) == built
    assert (built / "done.json").stat().st_mtime_ns == before


def test_eleven_classes_are_the_same_images_with_the_digit_as_class(tmp_path, built):
    classes = build_digits(tmp_path, seed=3, name="digits_classes")
    for number in range(5):
        name = f"target/images/test/{number:05d}.png"
        assert (classes / name).read_bytes() == (built / name).read_bytes()
        mask = np.asarray(Image.open(classes / name.replace("images", "masks")))
        plain = np.asarray(Image.open(built / name.replace("images", "masks")))
        assert len(np.unique(mask[mask > 0])) == 1
        assert np.array_equal(mask > 0, plain > 0)
