"""Images and masks: what is read, in what order it is drawn, and what is refused by file name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_settings, write_domain, write_raster
from PIL import Image

from dann_experiments import InputError, adapt, load_config
from dann_experiments.__main__ import main
from dann_experiments.data.dataset import Memory, SegmentationDataset
from dann_experiments.data.labels import LabelMap, read_mask
from dann_experiments.data.loaders import train_loader
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.data.samples import Sample, content_digest, find_samples


def dataset(folder: Path, **more) -> SegmentationDataset:
    samples = find_samples([str(folder)], folder, "data.source.train")
    normalisation = Normalization((0.0,) * 3, (1.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    return SegmentationDataset(samples, LabelMap(2), normalisation, training=True, **more)


def test_pixels_are_scaled_to_0_1_and_normalised_and_labels_are_ids(squares):
    item = dataset(squares / "source")[0]
    stored = np.asarray(Image.open(squares / "source" / "images" / "0.png")).transpose(2, 0, 1)
    assert torch.allclose(item["image"], torch.from_numpy((stored / 255 - 0.5) / 0.25).float(), atol=1e-6)
    assert item["mask"].dtype == torch.int64
    assert set(item["mask"].unique().tolist()) == {0, 1}


def test_grey_palette_and_16_bit_images_are_read(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_pixels(tmp_path / "grey.png", 3, Reading()).values, np.stack([grey] * 3))
    assert read_pixels(tmp_path / "grey.png", 1, Reading()).values.shape == (1, 4, 4)
    Image.fromarray(grey.astype(np.uint16) * 1000).save(tmp_path / "deep.tif")
    assert read_pixels(tmp_path / "deep.tif", 1, Reading()).values.max() == 15000
    palette = Image.fromarray(grey % 2).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "mask.png")
    assert set(np.unique(read_mask(tmp_path / "mask.png", LabelMap(2)))) == {0, 1}


def test_a_crop_cuts_image_and_mask_at_the_same_place(tmp_path):
    write_domain(tmp_path, 1, seed=0, size=64)
    cropped = dataset(tmp_path, crop_size=16)
    torch.manual_seed(0)
    for _ in range(5):
        item = cropped[0]
        assert item["image"].shape == (3, 16, 16)
        bright = (item["image"].mean(0) * 0.25 + 0.5) > 0.5  # the square is the bright part of the picture
        assert torch.equal(bright, item["mask"] == 1)


def test_a_cropped_item_is_shown_as_the_file_holds_it_at_the_place_of_the_crop(squares):
    whole = dataset(squares / "source")
    assert np.allclose(whole.picture(whole[2]), whole.read(2)[0] / 255, atol=1e-6)
    cropped = dataset(squares / "source", crop_size=16)
    assert cropped.picture(cropped[2]).shape == (3, 16, 16)


def test_the_order_of_training_images_depends_on_the_seed_alone(squares):
    def order(seed: int) -> list[int]:
        loader = train_loader(dataset(squares / "source"), 4, "source", seed)
        return [int(index) for _ in range(2) for batch in loader for index in batch["index"]]

    first = order(1)
    torch.rand(7)
    assert order(1) == first
    assert order(2) != first
    assert first[:8] != first[8:]


def test_a_decoded_image_is_kept_and_read_once(tmp_path):
    write_domain(tmp_path, 1, seed=0)
    kept, fresh = dataset(tmp_path, memory=Memory(1)), dataset(tmp_path)
    before = kept[0]["image"]
    fresh[0]
    (tmp_path / "images" / "0.png").unlink()
    assert torch.equal(kept[0]["image"], before)
    with pytest.raises(InputError):
        fresh[0]


def test_equal_bytes_have_equal_digests_wherever_they_stand(squares, tmp_path):
    shutil.copytree(squares / "source", tmp_path / "copy")
    here = find_samples([str(squares / "source")], squares, "k")
    there = find_samples(["copy"], tmp_path, "k")
    assert content_digest(here) == content_digest(there)
    assert content_digest(here) != content_digest([Sample(item.image, None) for item in here])


def test_a_manifest_names_files_relative_to_itself_with_or_without_masks(squares, tmp_path):
    shutil.copytree(squares / "source", tmp_path / "deep" / "er")
    (tmp_path / "deep" / "m.csv").write_text(
        "\ufeffimage,mask\ner/images/0.png,er/masks/0.png\n\ner/images/1.png,er/masks/1.png\n"
    )
    (tmp_path / "deep" / "n.csv").write_text("image\ner/images/0.png\n")
    assert len(find_samples(["deep/m.csv"], tmp_path, "k", "required")) == 2
    assert find_samples(["deep/n.csv"], tmp_path, "k")[0].mask is None


def empty_images(root: Path) -> str:
    for file in (root / "source" / "images").iterdir():
        file.unlink()
    return "holds no images"


def missing_mask(root: Path) -> str:
    (root / "source" / "masks" / "3.png").unlink()
    return "3.png has no mask of the same stem"


def damaged_image(root: Path) -> str:
    data = (root / "source" / "images" / "2.png").read_bytes()
    (root / "source" / "images" / "2.png").write_bytes(data[: len(data) // 2])
    return "source/images/2.png cannot be read as an image"


def not_an_image(root: Path) -> str:
    (root / "target" / "images" / "2.png").write_text("hello")
    return "target/images/2.png cannot be read as an image"


def other_size(root: Path) -> str:
    Image.fromarray(np.zeros((30, 32), np.uint8)).save(root / "source" / "masks" / "1.png")
    return "source/images/1.png is 32 x 32 pixels, its mask"


def class_outside(root: Path) -> str:
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(root / "source" / "masks" / "1.png")
    return "source/masks/1.png holds id 7, but classes go from 0 to 1"


def four_bands(root: Path) -> str:
    write_raster(root / "target" / "images" / "1.tif", np.zeros((4, 32, 32), np.uint8))
    (root / "target" / "images" / "1.png").unlink()
    return "target/images/1.tif has 4 bands, but the network takes 3"


def colour_mask(root: Path) -> str:
    Image.fromarray(np.arange(32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)).save(
        root / "source" / "masks" / "1.png"
    )
    return "source/masks/1.png has 3 bands; masks hold one class id per pixel"


def unequal_images(root: Path) -> str:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "target" / "images" / "1.png")
    return "set data.crop_size to train on crops"


def no_masks_at_all(root: Path) -> str:
    shutil.rmtree(root / "source" / "masks")
    return "has no mask, but this set needs one per image"


def manifest_without_images(root: Path) -> str:
    (root / "source").rename(root / "elsewhere")
    (root / "source").write_text("picture,mask\na.png,b.png\n")
    return "it needs one called image"


def manifest_of_missing_files(root: Path) -> str:
    (root / "source").rename(root / "elsewhere")
    (root / "source").write_text("image,mask\nelsewhere/images/0.png,elsewhere/masks/none.png\n")
    return "elsewhere/masks/none.png of image"


def masks_of_0_and_255(root: Path) -> str:
    for file in (root / "source" / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) * 255).save(file)
    return "hold the ids [0, 255], of which 255 is ignored"


def other_column_name(root: Path) -> str:
    (root / "source").rename(root / "elsewhere")
    (root / "source").write_text("image, label\nelsewhere/images/0.png,elsewhere/masks/0.png\n")
    return "the one with the masks must be called mask"


BREAKS = [
    masks_of_0_and_255,
    other_column_name,
    empty_images,
    missing_mask,
    damaged_image,
    not_an_image,
    other_size,
    class_outside,
    four_bands,
    colour_mask,
    unequal_images,
    no_masks_at_all,
    manifest_without_images,
    manifest_of_missing_files,
]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_bad_files_are_refused_by_name_before_any_run(workplace, squares, damage: Callable[[Path], str]):
    shutil.copytree(squares, workplace / "data")
    message = damage(workplace / "data")
    with pytest.raises(InputError) as error:
        adapt(load_config(None, small_settings(workplace / "data")))
    assert message in str(error.value).replace(str(workplace), "")
    assert not (workplace / "outputs").exists()


def test_the_command_line_says_it_in_one_message_with_exit_code_2(workplace, squares, capsys):
    shutil.copytree(squares, workplace / "data")
    message = class_outside(workplace / "data")
    settings = small_settings(workplace / "data")
    (workplace / "empty.yaml").write_text("")
    arguments = [
        part for key, value in settings.items() for part in (f"--{key}", "null" if value is None else str(value))
    ]
    assert main(["adapt", "--config", "empty.yaml", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_names_as_a_number_is_the_file_of_that_name(tmp_path):
    """YAML reads `names: 7` as a number; in a list, numbers are names."""
    (tmp_path / "images").mkdir()
    for name in ("7", "8"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    with pytest.raises(InputError, match=r"file of names .*7 does not exist; for a single name give a list, \[7\]\."):
        find_samples([{"images": "images", "names": 7}], tmp_path, "data.source.train")
    (tmp_path / "7").write_text("8\n")
    by_file, by_list = (
        find_samples([{"images": "images", "names": names}], tmp_path, "data.source.train") for names in (7, [7])
    )
    assert [one.image.stem for one in by_file] == ["8"]
    assert [one.image.stem for one in by_list] == ["7"]
