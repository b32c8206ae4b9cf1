"""The probe: what a fresh classifier tells about features of two domains, and what it means beside the run's own."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dann_experiments.adaptation.dann import DANNMethod
from dann_experiments.data.loaders import eval_loader
from dann_experiments.models.taps import resolve_taps
from dann_experiments.scores import domain_probe
from dann_experiments.scores.domain_probe import Probe, a_distance, mean_probe, probe
from dann_experiments.training.alignment_text import NOT_ENOUGH, explain
from dann_experiments.training.pooled_features import pooled_features


def noise(images: int, features: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(images, features)) + shift).astype(np.float32)


def accuracies(source: int, target: int, features: int, shift: float = 0.0, draws: int = 60) -> list[float]:
    made = [
        probe(noise(source, features, 2 * draw), noise(target, features, 2 * draw + 1, shift), draw)
        for draw in range(draws)
    ]
    return [item.accuracy for item in made if item is not None]


@pytest.mark.parametrize(("images", "features", "draws"), [(6, 512, 120), (7, 64, 60), (20, 256, 40), (40, 4, 40)])
def test_samples_of_one_distribution_give_one_half(images, features, draws):
    assert np.mean(accuracies(images, images, features, draws=draws)) == pytest.approx(0.5, abs=0.04)


@pytest.mark.slow
def test_domains_of_unequal_size_give_one_half_on_noise():
    found = accuracies(20, 200, 32, draws=20) + accuracies(200, 20, 32, draws=20)
    assert np.mean(found) == pytest.approx(0.5, abs=0.04)


def test_a_difference_shows_as_well_when_the_domains_are_of_unequal_size():
    equal = np.mean(accuracies(20, 20, 1024, shift=0.15, draws=20))
    assert equal > 0.7
    assert np.mean(accuracies(20, 200, 1024, shift=0.15, draws=10)) == pytest.approx(equal, abs=0.06)


@pytest.mark.parametrize(("images", "features"), [(4, 8), (6, 1024), (30, 1024), (100, 4)])
def test_well_separated_domains_are_told_apart(images, features):
    found = probe(noise(images, features, 0), noise(images, features, 1, shift=4.0))
    assert found is not None
    assert found.accuracy > 0.95
    assert found.a_distance == pytest.approx(2 * (1 - 2 * (1 - found.accuracy)))


def test_a_difference_in_few_of_many_collinear_features_is_found():
    random = np.random.default_rng(0)
    mixing = random.normal(size=(20, 256))

    def drawn(shift: float) -> np.ndarray:
        return (
            random.normal(size=(150, 20)) @ mixing / 4.5
            + 0.5 * random.normal(size=(150, 256))
            + shift * (np.arange(256) < 3)
        )

    found = probe(drawn(0), drawn(1.5))
    assert found is not None
    assert found.accuracy > 0.8


@pytest.mark.parametrize(("accuracy", "expected"), [(0.5, 0.0), (0.75, 1.0), (1.0, 2.0), (0.65, 0.6), (0.3, 0.0)])
def test_the_a_distance_is_two_times_one_minus_two_errors(accuracy, expected):
    assert a_distance(accuracy) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_probe_and_leaves_numpys_random_state_alone():
    source, target = noise(15, 16, 0), noise(40, 16, 1, shift=0.4)
    np.random.seed(3)
    first = probe(source, target, 5)
    drawn = np.random.random()
    np.random.seed(3)
    assert drawn == np.random.random()
    assert probe(source, target, 5) == first
    others = [probe(source, target, seed) for seed in range(5)]
    assert any(other != first for other in others)


def test_too_few_images_and_features_that_are_not_finite_give_no_probe():
    assert probe(noise(3, 8, 0), noise(50, 8, 1)) is None
    assert probe(noise(50, 8, 0), np.zeros((0, 8), np.float32)) is None
    assert probe(noise(4, 8, 0), noise(4, 8, 1)) is not None
    broken = noise(10, 8, 1)
    broken[3, 2] = np.nan
    assert probe(noise(10, 8, 0), broken) is None


def test_scaling_is_learnt_from_the_training_folds_alone(monkeypatch):
    fitted = []
    fit = StandardScaler.fit

    def recorded(self, features, *args, **kwargs):
        fitted.append(features.shape[0])
        return fit(self, features, *args, **kwargs)

    monkeypatch.setattr(StandardScaler, "fit", recorded)
    probe(noise(20, 8, 0), noise(20, 8, 1))
    assert fitted == [32] * 5


def test_each_fold_holds_as_many_images_of_either_domain(monkeypatch):
    from sklearn.linear_model import LogisticRegression

    seen = []
    fit = LogisticRegression.fit

    def recorded(self, features, labels, *args, **kwargs):
        seen.append(np.bincount(labels).tolist())
        return fit(self, features, labels, *args, **kwargs)

    monkeypatch.setattr(LogisticRegression, "fit", recorded)
    found = probe(noise(7, 8, 0), noise(16, 8, 1))
    assert found is not None
    assert found.images == (7, 14)
    assert seen == [[5, 5], [5, 5], [6, 6], [6, 6], [6, 6]] * 2


def test_the_user_sees_no_warning_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(domain_probe, "MOST_ITERATIONS", 1)
    source = np.repeat(noise(20, 1, 0), 300, 1)
    source[:, 5] = 1.0  # a dead channel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(source, source + 0.5) is not None


def test_the_standard_error_is_that_of_the_binomial_and_the_smaller_domain_rules_it():
    assert Probe(0.5, 0.0, (50, 50)).standard_error == pytest.approx(0.05)
    assert Probe(0.8, 1.2, (500, 500)).standard_error == pytest.approx(math.sqrt(0.16 / 1000), rel=0.01)
    assert Probe(0.5, 0.0, (20, 10**6)).standard_error == pytest.approx(math.sqrt(0.25 / 80), rel=0.01)
    assert Probe(1.0, 2.0, (6, 6)).standard_error > 0.05


def test_the_mean_over_layers_leaves_out_layers_without_a_probe():
    mean = mean_probe([Probe(0.6, 0.4, (9, 8)), None, Probe(0.8, 1.2, (9, 8))])
    assert mean is not None
    assert (mean.accuracy, mean.a_distance, mean.images) == (pytest.approx(0.7), pytest.approx(0.8), (9, 8))
    assert mean_probe([None]) is None


class Items(Dataset):
    """Images as a SegmentationDataset gives them; counts what was read."""

    def __init__(self, images: list[torch.Tensor], valid: list[torch.Tensor] | None = None) -> None:
        self.items = [{"image": image, "index": torch.tensor(index)} for index, image in enumerate(images)]
        for item, known in zip(self.items, valid or [], strict=bool(valid)):
            item["valid"] = known
        self.pieces = [SimpleNamespace(window=(0, 0, *image.shape[1:])) for image in images]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return self.items[index]


def loader_over(dataset: Any, batch_size: int) -> DataLoader:
    return eval_loader(dataset, batch_size)


class Small(nn.Module):
    """An encoder that passes the image on, and a head that must not run when nobody taps it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Dropout(0.5))
        with torch.no_grad():
            next(self.encoder.parameters()).copy_(torch.eye(2)[:, :, None, None])
        self.segmentation_head = nn.Conv2d(2, 3, 1)
        self.head_runs = 0

    def forward(self, images):
        features = self.encoder(images)
        self.head_runs += 1
        return self.segmentation_head(features)


def tapped(network: nn.Module, layers: list[str], in_channels: int = 2):
    return resolve_taps(network, layers, in_channels)


@pytest.mark.parametrize("stride", [1, 3])
def test_pooled_features_are_mean_and_standard_deviation_over_the_positions(stride):
    torch.manual_seed(0)
    images = [torch.randn(2, 8, 8) * 3 + 1 for _ in range(5)]
    network = Small()
    network.encoder.output_stride = stride  # 3 does not divide 8: what is filled up must not count
    found = pooled_features(network, tapped(network, ["encoder"]), loader_over(Items(images), 2))
    assert found["encoder"].dtype == np.float32
    stack = torch.stack(images).flatten(2) / math.sqrt(1 + 1e-5)  # BatchNorm of a new network
    expected = torch.cat([stack.mean(2), stack.std(2, correction=0)], 1)
    np.testing.assert_allclose(found["encoder"], expected.numpy(), rtol=1e-5)


def test_positions_without_data_and_images_without_any_are_left_out():
    torch.manual_seed(0)
    network = Small()
    taps = tapped(network, ["encoder"])
    whole = [torch.randn(2, 8, 8) for _ in range(4)]
    cut = pooled_features(network, taps, loader_over(Items([image[:, :, :5] for image in whole]), 2))
    for nothing in (0.0, 100.0, float("nan")):
        images = [image.clone() for image in whole]
        valid = [torch.ones(8, 8) for _ in whole]
        for image, known in zip(images, valid, strict=True):
            image[:, :, 5:] = nothing
            known[:, 5:] = 0
        images.insert(1, torch.full((2, 8, 8), nothing))
        valid.insert(1, torch.zeros(8, 8))
        found = pooled_features(network, taps, loader_over(Items(images, valid), 2))
        np.testing.assert_allclose(found["encoder"], cut["encoder"], rtol=1e-5, atol=1e-6)
    empty = pooled_features(network, taps, loader_over(Items(whole, [torch.zeros(8, 8)] * 4), 2))
    assert empty["encoder"].shape == (0, 4)


def test_the_output_layer_is_probed_as_the_probabilities_that_the_runs_own_classifier_judges():
    network = Small()
    images = [torch.randn(2, 4, 4) for _ in range(4)]
    found = pooled_features(network, tapped(network, ["segmentation_head"]), loader_over(Items(images), 4))
    means = found["segmentation_head"][:, :3]
    np.testing.assert_allclose(means.sum(1), 1.0, rtol=1e-5)
    method = DANNMethod("segmentation_head", 3, hidden_size=4)
    assert all(classifier.on_logits for classifier in method.classifiers)
    network.eval()
    with torch.no_grad():
        np.testing.assert_allclose(means, network(torch.stack(images)).softmax(1).mean((2, 3)).numpy(), rtol=1e-4)


def test_nothing_of_the_network_changes_and_nothing_behind_the_deepest_tap_runs():
    network = Small()
    network.train()
    network.encoder[1].eval()
    taps = tapped(network, ["encoder"])
    network.head_runs = 0
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    loader = loader_over(Items([torch.randn(2, 8, 8) + 5 for _ in range(6)]), 2)
    first = pooled_features(network, [*taps, *taps], loader)  # the encoder is tapped, and probed anyway
    assert network.head_runs == 0
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    np.testing.assert_array_equal(first["encoder"], pooled_features(network, taps, loader)["encoder"])


def test_of_a_large_set_images_are_taken_from_every_part_of_it_and_from_every_column():
    torch.manual_seed(0)
    network = Small()
    taps = tapped(network, ["encoder"])
    dataset = Items([torch.randn(2, 4, 4 if index < 300 else 8) for index in range(600)])
    found = pooled_features(network, taps, loader_over(dataset, 8), most_images=60)["encoder"]
    assert found.shape == (60, 4)
    assert [index // 10 for index in dataset.read] == list(range(60))
    assert len({index % 10 for index in dataset.read}) == 10
    expected = torch.stack([dataset.items[index]["image"].mean((1, 2)) for index in dataset.read])
    np.testing.assert_allclose(found[:, :2], expected / math.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-6)


def test_images_of_any_size_pass_through_a_network_of_smp_and_several_layers_at_once():
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, in_channels=2, classes=3)
    taps = tapped(network, ["encoder", "decoder", "segmentation_head"])
    sizes = [(64, 64), (40, 56), (40, 56), (33, 64)]
    loader = loader_over(Items([torch.randn(2, *size) for size in sizes]), 2)
    found = pooled_features(network, taps, loader)
    assert {name: rows.shape for name, rows in found.items()} == {
        "encoder": (4, 1024), "decoder": (4, 32), "segmentation_head": (4, 6),
    }  # fmt: skip
    assert all(np.isfinite(rows).all() for rows in found.values())


LOW, HIGH, WARM = Probe(0.53, 0.12, (200, 200)), Probe(0.93, 1.72, (200, 200)), Probe(0.95, 1.8, (200, 200))


@pytest.mark.parametrize(
    ("accuracy", "after", "said", "not_said"),
    [
        (0.52, LOW, ["0.52", "domains are aligned"], ["raise"]),
        (0.4, LOW, ["domains are aligned"], ["mistakes"]),
        (0.6, LOW, ["domains are aligned"], ["partly"]),
        (0.52, HIGH, ["too weak or trained too little", "hidden_size", "discriminator_lr"], ["domains are aligned"]),
        (0.52, None, ["without a probe it is unknown", "No probe: fewer"], ["raise"]),
        (0.9, HIGH, ["the adversary wins", "lambda_da", "lower discriminator_lr"], ["input of the probe"]),
        (0.97, LOW, ["the adversary wins", "input of the probe"], ["domains are aligned"]),
        (0.75, HIGH, ["partly aligned", "0.75"], ["wins"]),
        (0.39, LOW, ["mistakes the domains", "lags behind", "did not help"], ["are aligned"]),
        (None, LOW, ["No classifier", "are alike"], ["differ"]),
        (None, HIGH, ["No classifier", "differ"], ["are alike"]),
        (None, None, ["No classifier", "No probe: fewer"], ["the features of"]),
    ],
)
def test_each_combination_is_explained(accuracy, after, said, not_said):
    text = explain(accuracy, WARM, after)
    assert all(words in text for words in said), text
    assert not any(words in text for words in not_said), text
    assert text.endswith(NOT_ENOUGH)
    if after is not None:
        assert f"0.95 before -> {after.accuracy:.2f}" in text
        assert "200 source and 200 target" in text


@pytest.mark.parametrize("accuracy", [0.3, 0.5, 0.75, 0.97])
def test_no_advice_is_to_adapt_more_after_a_warning_of_harm(accuracy):
    for after in (LOW, HIGH):
        text = explain(accuracy, WARM, after, harmed=True)
        assert "raise it" not in text
        assert "lambda_da is too low" not in text
    assert "already been harmed" in explain(0.97, WARM, HIGH, harmed=True)


def test_a_small_change_of_the_probe_is_called_noise_and_a_large_one_is_not():
    assert "is no more than noise" in explain(0.5, Probe(0.75, 1.0, (20, 20)), Probe(0.68, 0.72, (20, 20)))
    assert "is more than noise" in explain(0.5, Probe(0.75, 1.0, (2000, 2000)), Probe(0.68, 0.72, (2000, 2000)))
    assert "->" not in explain(0.5, None, LOW)
    assert "as they were in the warm start" in explain(0.5, LOW, LOW)
    assert "as they were in the warm start" not in explain(0.5, WARM, LOW)
    assert "too few images to decide" in explain(0.5, None, Probe(0.6, 0.4, (10, 10)))
    assert "too few images to decide" not in explain(0.5, None, LOW)


def test_the_control_is_not_told_to_raise_its_lambda():
    text = explain(0.97, WARM, HIGH, adversary=False)
    assert "lambda = 0" in text
    assert "raise" not in text
    assert "0.97" in text
