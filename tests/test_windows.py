"""Where windows lie, what a set of them holds, and what is kept of them in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import write_raster
from hypothesis import given, settings
from hypothesis import strategies as st

from dann_experiments.config import InputError
from dann_experiments.data import dataset as dataset_module
from dann_experiments.data.dataset import Memory, SegmentationDataset
from dann_experiments.data.labels import LabelMap
from dann_experiments.data.loaders import eval_loader, train_loader
from dann_experiments.data.rasters import Window
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.data.samples import Sample
from dann_experiments.data.statistics import measure, normalization_from
from dann_experiments.data.windows import at_random, default_size, grid

ONE_BAND = Normalization((0.0,), (255.0,), (0.0,), (1.0,))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_the_grid_counts_every_pixel_of_the_area_once(height, width, size, top, left):
    counted = np.zeros((90, 90), int)
    for piece in grid(0, Window(top, left, height, width), size):
        window = piece.window
        assert (window.height, window.width) == (min(size, height), min(size, width))
        counted[
            window.top + piece.counted_rows : window.top + window.height,
            window.left + piece.counted_columns : window.left + window.width,
        ] += 1
    expected = np.zeros_like(counted)
    expected[top : top + height, left : left + width] = 1
    assert np.array_equal(counted, expected)


def test_random_windows_are_drawn_once_by_the_seed_more_from_the_larger_image():
    areas = [(0, Window(0, 0, 100, 100), 20), (1, Window(0, 0, 300, 300), 20)]
    drawn = at_random(areas, 400, seed=3)
    assert drawn == at_random(areas, 400, seed=3)
    assert drawn != at_random(areas, 400, seed=4)
    assert 250 < sum(piece.sample == 1 for piece in drawn) < 400  # 225 of 250 grid cells
    assert all(0 <= piece.window.top <= 280 and piece.window.height == 20 for piece in drawn)
    assert len(at_random(areas, None, seed=0)) == 25 + 225


def test_an_image_above_2048_pixels_square_is_never_one_window():
    assert default_size(2048, 2048, None, None) is None
    assert default_size(2049, 2048, None, 256) == 1024
    assert default_size(4000, 4000, None, 2000) == 2000
    assert default_size(100, 100, 64, None) == 64


def raster_set(folder, values: np.ndarray, mask: np.ndarray | None = None, nodata=None, **more) -> SegmentationDataset:
    image = write_raster(folder / "image.tif", values, nodata=nodata)
    sample = Sample(image, None if mask is None else write_raster(folder / "mask.tif", mask[None]))
    return SegmentationDataset([sample], LabelMap(2), ONE_BAND, **more)


def test_a_labelled_pixel_is_scored_once_however_the_windows_overlap(tmp_path):
    rng = np.random.default_rng(0)
    values, mask = rng.integers(0, 255, (1, 50, 70), dtype=np.uint8), rng.integers(0, 2, (50, 70)).astype(np.uint8)
    windows = raster_set(tmp_path, values, mask, window_size=32)
    counts = sum(torch.bincount(windows[i]["mask"].flatten(), minlength=256) for i in range(len(windows)))
    assert isinstance(counts, torch.Tensor)
    assert counts[:2].tolist() == np.bincount(mask.ravel()).tolist()


def test_windows_without_any_data_are_skipped_in_training_and_a_set_of_nothing_else_is_refused(tmp_path):
    values = np.zeros((1, 64, 64), np.uint8)
    values[0, :20, :20] = 9
    values[0, 40, 40] = 9
    found = raster_set(tmp_path / "a", values, nodata=0, window_size=32, training=True)
    list(found.fill())
    assert [piece.window[:2] for piece in found.pieces] == [(0, 0), (32, 32)]
    scored = raster_set(tmp_path / "b", values, nodata=0, window_size=32)
    list(scored.fill())
    assert len(scored) == 4
    nothing = raster_set(tmp_path / "c", values * 0, nodata=0, window_size=32, training=True)
    with pytest.raises(InputError, match=r"image\.tif .* hold no data"):
        list(nothing.fill())


def test_what_fits_in_memory_is_decoded_once_and_no_more_than_that_is_kept(tmp_path, monkeypatch):
    values = np.ones((1, 64, 64), np.uint8)
    reads = []
    read_pixels = dataset_module.read_pixels
    monkeypatch.setattr(dataset_module, "read_pixels", lambda *given: reads.append(given[-1]) or read_pixels(*given))
    memory = Memory(2 * 32 * 32 / 1e9)
    found = raster_set(tmp_path, values, window_size=32, memory=memory)
    for _ in range(3):
        for index in range(len(found)):
            found[index]
    assert memory.bytes_left == 0
    assert len(reads) == 2 + 3 * 2  # two windows kept, two decoded each time
    assert len(found._kept) == 2


def test_what_does_not_fit_in_memory_is_not_decoded_ahead_for_nothing(tmp_path, monkeypatch):
    reads = []
    read_pixels = dataset_module.read_pixels
    monkeypatch.setattr(dataset_module, "read_pixels", lambda *given: reads.append(given[-1]) or read_pixels(*given))
    memory = Memory(2.5 * 32 * 32 / 1e9)
    found = raster_set(tmp_path, np.ones((1, 96, 96), np.uint8), window_size=32, memory=memory)
    list(found.fill())
    assert len(found) == 9
    assert len(reads) == 3  # two that are kept, and the one that showed that no more fits


def test_normalisation_is_measured_over_the_windows_where_there_is_data(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.normal(1000, 200, (2, 60, 60)).astype(np.float32)
    values[:, :10] = -9999
    given = Normalization((0.0,) * 2, (4000.0,) * 2, (0.5,) * 2, (0.25,) * 2)
    image = write_raster(tmp_path / "a.tif", values, nodata=-9999)
    windows = SegmentationDataset(
        [Sample(image, None)], LabelMap(2), given, Reading(scale=(0.0, 4000.0)), window_size=32
    )
    *_, sums = measure(windows)
    found = sums.result()
    real = values[:, 10:].reshape(2, -1)
    # the windows of a grid overlap at the edge, so a few pixels weigh twice
    assert found.mean == pytest.approx(real.mean(1), rel=0.02)
    assert found.std == pytest.approx(real.std(1), rel=0.05)
    assert found.low == pytest.approx(np.percentile(real, 2, axis=1), rel=0.03)
    assert found.minimum.min() > 0
    own = normalization_from(found, given, (0.0, 4000.0), 1.0, own=True)
    assert own.mean == pytest.approx(tuple(found.mean / 4000))
    by_percentiles = normalization_from(found, given, "percentiles", 1.0, own=False)
    assert by_percentiles.low == tuple(found.low)
    assert by_percentiles.mean == (0.5, 0.5)


def test_a_region_is_all_that_is_read_of_an_image(tmp_path):
    values = np.arange(40 * 60, dtype=np.uint16).reshape(1, 40, 60)
    image = write_raster(tmp_path / "a.tif", values)
    found = SegmentationDataset([Sample(image, None, (10, 5, 30, 25))], LabelMap(2), ONE_BAND)
    assert np.array_equal(found.read(0)[0], values[:, 5:25, 10:30])
    with pytest.raises(InputError, match=r"a\.tif is 60 pixels wide and 40 high; its region \[10, 5, 61, 25\]"):
        SegmentationDataset([Sample(image, None, (10, 5, 61, 25))], LabelMap(2), ONE_BAND)


def training_set(folder, augmentation: str) -> SegmentationDataset:
    rng = np.random.default_rng(0)
    samples = []
    for number in range(6):
        mask = rng.integers(0, 2, (1, 24, 24), dtype=np.uint8)
        image = np.repeat(mask * 200 + 20, 3, axis=0).astype(np.uint8)
        samples.append(
            Sample(
                write_raster(folder / f"{number}.tif", image, nodata=0), write_raster(folder / f"{number}_m.tif", mask)
            )
        )
    plain = Normalization((0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    return SegmentationDataset(samples, LabelMap(2), plain, training=True, crop_size=16, augmentation=augmentation)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("augmentation", ["none", "light", "color", "strong"])
def test_crops_and_augmentations_depend_on_the_seed_alone_and_on_no_number_of_workers(tmp_path, augmentation):
    items = training_set(tmp_path, augmentation)

    def drawn(seed: int, workers: int) -> list[torch.Tensor]:
        loader = train_loader(items, 3, "source", seed, num_workers=workers)
        return [batch["image"] for _ in range(2) for batch in loader]

    first = drawn(1, 0)
    torch.rand(3)
    for again in (drawn(1, 0), drawn(1, 2)):
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, drawn(2, 0), strict=True))
    assert not torch.equal(first[0], first[2])  # the second epoch draws anew


def test_a_loader_leaves_the_random_state_of_others_alone(tmp_path):
    items = training_set(tmp_path, "strong")
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    list(train_loader(items, 3, "source", seed=1))
    assert torch.equal(torch.rand(4), expected)


def test_light_augmentation_moves_image_and_mask_together_and_changes_no_value(tmp_path):
    items = training_set(tmp_path, "light")
    orientations = set()
    for seed in range(40):
        item = items[(0, seed)]
        bright = item["image"].mean(0) > 0
        assert torch.equal(bright, item["mask"] == 1)
        orientations.add(tuple(item["mask"].flatten().tolist()))
    plain = {tuple(items[(0, seed)]["image"].unique().tolist()) for seed in range(5)}
    assert len(plain) == 1
    assert len(orientations) > 8


def test_strong_augmentation_changes_colours_and_scale_but_neither_the_labels_nor_the_range(tmp_path):
    items = training_set(tmp_path, "strong")
    seen = set()
    for seed in range(30):
        item = items[(1, seed)]
        assert item["image"].shape == (3, 16, 16)
        assert set(item["mask"].unique().tolist()) <= {0, 1}
        assert item["image"].min() >= -2 - 1e-5
        assert item["image"].max() <= 2 + 1e-5
        seen.add(round(float(item["image"].max()), 3))
    assert len(seen) > 5


def test_color_augmentation_changes_colours_but_neither_scale_nor_sharpness(tmp_path):
    """The images have two values, one per class: as many after it, at the same pixels."""
    items = training_set(tmp_path, "color")
    seen = set()
    for seed in range(30):
        item = items[(1, seed)]
        bright = item["image"].mean(0) > item["image"].mean()
        assert torch.equal(bright, item["mask"] == 1)
        for value in (0, 1):
            of_class = item["image"][:, item["mask"] == value]
            assert torch.allclose(of_class, of_class[:, :1].expand_as(of_class), atol=1e-5)
        seen.add(round(float(item["image"].max()), 3))
    assert len(seen) > 5


@pytest.mark.parametrize("augmentation", ["color", "strong"])
def test_five_bands_are_augmented_too(tmp_path, augmentation):
    image = write_raster(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (5, 16, 12), dtype=np.uint8))
    plain = Normalization((0.0,) * 5, (255.0,) * 5, (0.5,) * 5, (0.25,) * 5)
    items = SegmentationDataset([Sample(image, None)], LabelMap(2), plain, training=True, augmentation=augmentation)
    assert len({float(items[(0, seed)]["image"].mean()) for seed in range(5)}) == 5


def test_nodata_is_the_mean_in_the_image_ignored_in_the_mask_and_marked(tmp_path):
    values = np.full((1, 8, 8), 50, np.uint8)
    values[0, :3] = 0
    items = raster_set(tmp_path, values, np.ones((8, 8), np.uint8), nodata=0)
    item = items[0]
    assert (item["image"][0, :3] == 0).all()
    assert (item["mask"][:3] == 255).all()
    assert (item["mask"][3:] == 1).all()
    assert item["valid"].tolist() == [[0.0] * 8] * 3 + [[1.0] * 8] * 5


def test_validation_takes_neighbours_of_one_size_together(tmp_path):
    samples = [
        Sample(write_raster(tmp_path / f"{number}.tif", np.zeros((1, side, 8), np.uint8)), None)
        for number, side in enumerate([8, 8, 8, 16, 16, 8])
    ]
    found = SegmentationDataset(samples, LabelMap(2), ONE_BAND)
    assert [batch["index"].tolist() for batch in eval_loader(found, 2)] == [[0, 1], [2], [3, 4], [5]]
