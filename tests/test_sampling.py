"""Source items drawn by class: the paper's probabilities, items and crops that hold the drawn class, orders that resume."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_sets, small_settings

from dann_experiments import InputError, load_config
from dann_experiments.comparison.arms import _settings
from dann_experiments.comparison.result import Arm
from dann_experiments.config import Config
from dann_experiments.data.loaders import SeededOrder, class_sampling
from dann_experiments.jobs import pretrain
from dann_experiments.jobs.build import make_loaders

RARE = {"data.source.sampling": "rare_classes", "data.source.sampling_temperature": 0.5}


def config_of(root: Path, **more: object) -> Config:
    return load_config(
        None, small_settings(root) | RARE | {key.replace("__", "."): value for key, value in more.items()}
    )


def test_rare_classes_have_the_probabilities_of_the_paper():
    """Hoyer et al. 2022 (DAFormer), section 3.4, with T = 0.01: exp((1 - f) / T) over its sum."""
    pixels = np.array([990, 9, 1, 0])
    chances = class_sampling(pixels, np.ones((1, 4), bool), 0.01).chances
    terms = np.exp((1 - pixels[:3] / 1000) / 0.01)
    assert chances[:3] == pytest.approx(terms / terms.sum())
    assert chances[3] == 0


def test_balanced_draws_each_class_that_occurs_equally_often():
    assert class_sampling(np.array([990, 10, 0]), np.ones((1, 3), bool), None).chances.tolist() == [0.5, 0.5, 0.0]


def order_of(dataset: object, seed: int = 0, share: tuple[int, int] = (0, 1)) -> SeededOrder:
    holds = np.zeros((10, 3), bool)
    holds[:, 0], holds[2:4, 1], holds[7, 2] = True, True, True
    return SeededOrder(dataset, seed, share, class_sampling(np.array([900, 90, 10]), holds, 0.3))  # pyright: ignore[reportArgumentType]


def test_items_hold_the_class_they_are_drawn_for_and_classes_come_as_often_as_they_should():
    order = order_of(range(10))
    drawn = [item for _ in range(300) for item in order]
    assert len(drawn) == 3000
    holders = {0: set(range(10)), 1: {2, 3}, 2: {7}}
    assert all(index in holders[own] for index, _, own in drawn)
    counts = Counter(own for _, _, own in drawn)
    terms = np.exp((1 - np.array([0.9, 0.09, 0.01])) / 0.3)
    for own, expected in enumerate(terms / terms.sum()):
        assert counts[own] / 3000 == pytest.approx(expected, abs=0.03)
    of_zero = Counter(index for index, _, own in drawn if own == 0)
    assert set(of_zero) == set(range(10))  # every item that holds the class


@pytest.mark.parametrize("done", [1, 4, 9])
def test_the_draws_go_on_in_mid_pass_as_if_nothing_had_happened(done):
    first = list(order_of(range(10)))
    begun = order_of(range(10))
    assert list(itertools.islice(iter(begun), done)) == first[:done]
    resumed = order_of(range(10))
    resumed.go_on_from(begun.position(done), 0)
    assert list(resumed) == first[done:]
    resumed.set_epoch(1)
    whole_again = order_of(range(10))
    list(whole_again)
    whole_again.set_epoch(1)
    assert list(resumed) == list(whole_again) != first


def test_ranks_take_equal_parts_of_one_order():
    whole = list(order_of(range(10)))
    parts = [list(order_of(range(10), share=(rank, 2))) for rank in range(2)]
    assert [item for pair in zip(*parts, strict=True) for item in pair] == whole


@pytest.mark.parametrize("augmentation", ["none", "light"])
def test_crops_hold_the_drawn_class(squares, augmentation):
    config = config_of(squares, data__crop_size=8, data__source__augmentation=augmentation)
    dataset = read_sets(config).training()["source"]
    _, holds = dataset.count_classes()
    seen = 0
    for index, own in itertools.product(range(len(dataset)), (0, 1)):
        if holds[index, own]:
            for seed in range(5):
                assert bool((dataset[index, seed, own]["mask"] == own).any())
                seen += 1
    assert seen >= 50
    without = [bool((dataset[0, seed]["mask"] == 1).any()) for seed in range(40)]
    assert not all(without)  # a crop that is not asked to hold a class often does not


def test_every_place_that_holds_a_pixel_can_be_cropped(squares):
    """Crops are not centred on the pixel: it lies in every row and column of them."""
    config = config_of(squares, data__crop_size=8)
    dataset = read_sets(config).training()["source"]
    one = np.zeros((1, 32, 32), np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[10, 20] = 1
    places = set()
    for seed in range(600):
        torch.manual_seed(seed)
        _, cropped, _ = dataset._crop((one, mask, None), 0, 1)
        assert cropped is not None
        ((row, column),) = np.argwhere(cropped == 1)
        places.add((int(row), int(column)))
    assert places == set(itertools.product(range(8), range(8)))


def test_the_source_is_sampled_and_the_target_shuffled(squares):
    config = config_of(squares)
    loaders = make_loaders(config, read_sets(config)).training()
    assert all(len(item) == 3 for item in loaders["source"].sampler)  # pyright: ignore[reportGeneralTypeIssues]
    assert all(len(item) == 2 for item in loaders["target"].sampler)  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.slow
def test_a_run_with_rare_classes_trains_and_workers_change_nothing(squares, workplace):
    results = [
        pretrain(config_of(squares, data__num_workers=workers, data__crop_size=16, pretraining__max_epochs=1))
        for workers in (0, 2)
    ]
    assert results[0].metrics == results[1].metrics


def test_the_target_cannot_be_sampled_by_labels_it_does_not_have():
    with pytest.raises(InputError, match=r"data\.target\.sampling is balanced, which needs labels"):
        load_config(overrides={"data.target.sampling": "balanced"})


def test_the_oracle_is_sampled_like_the_source(squares):
    config = config_of(squares, data__oracle=["target_val"])
    oracle = _settings(Arm("oracle", "oracle"), config, 0)
    assert oracle.data.source.sampling == "rare_classes"
    assert oracle.data.source.sampling_temperature == 0.5
