"""Target-free selection scores: definitions by hand-made cases, invariances, and how they choose."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dann_experiments.names import Metric
from dann_experiments.scores import (
    batch_nuclear_norm,
    information_maximization,
    mean_entropy,
    soft_neighborhood_density,
)
from dann_experiments.scores.predictions import log_probabilities
from dann_experiments.scores.selection import SCORES, choice_value
from dann_experiments.scores.snd import COMPARED, SLOTS, PixelSample, neighborhood_density
from dann_experiments.training.scoring import SelectionScorer

NAMES = ("entropy", "infomax", "snd", "bnm")
SURE = 1e4  # logits of 0 and this are one-hot in float32


def scored(logits, valid=None, batch_size=100):
    scorer = SelectionScorer()
    for start in range(0, len(logits), batch_size):
        part = slice(start, start + batch_size)
        scorer.update(logits[part], None if valid is None else valid[part])
    return scorer.compute()


def of_classes(classes, num_classes):
    """Logits (1, K, 1, n) of pixels that are surely of these classes."""
    return SURE * torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float().T[None, :, None]


def of_shares(shares):
    """Logits (1, K, 1, n) of pixels with these probabilities (n, K)."""
    return torch.tensor(shares).log().T[None, :, None]


def noise(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_density(shares, temperature=0.05):
    """Soft neighbourhood density as Saito et al. 2021 define it, pixel by pixel, over log(n - 1)."""
    rows = [row / np.linalg.norm(row) for row in np.asarray(shares, dtype=np.float64)]
    entropies = []
    for i, one in enumerate(rows):
        weights = np.array([math.exp(one @ other / temperature) for j, other in enumerate(rows) if j != i])
        weights /= weights.sum()
        entropies.append(-sum(weight * math.log(weight) for weight in weights if weight > 0))
    return np.mean(entropies) / math.log(len(rows) - 1)


def entropy_of(shares):
    return -sum(share * math.log(share) for share in shares)


def test_three_pixels_worked_out_by_hand():
    shares = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
    scores = scored(of_shares(shares))
    mean_entropy = (0.801819 + 0.639032 + 1.088900) / 3  # nats
    of_mean = entropy_of([1.1 / 3, 1.3 / 3, 0.6 / 3])
    assert scores["entropy"] == pytest.approx(mean_entropy / math.log(3), abs=1e-6)
    assert scores["infomax"] == pytest.approx((of_mean - mean_entropy) / math.log(3), abs=1e-6)
    assert scores["bnm"] == pytest.approx(np.linalg.svd(shares, compute_uv=False).sum() / 3, abs=1e-6)
    assert scores["snd"] == pytest.approx(naive_density(shares), abs=1e-5)


def test_uniform_predictions_are_fully_unsure_and_all_neighbours():
    scores = scored(torch.zeros(2, 4, 5, 5))
    assert scores == pytest.approx({"entropy": 1, "infomax": 0, "snd": 1, "bnm": 1 / 4}, abs=1e-6)


def test_sure_and_balanced_predictions_are_best_by_entropy_infomax_and_bnm():
    scores = scored(of_classes([0, 1, 2, 3] * 5, 4))
    assert (scores["entropy"], scores["infomax"], scores["bnm"]) == pytest.approx((0, 1, 1), abs=1e-6)
    # four neighbours at cosine 1, fifteen at 0
    weights = np.array([1.0] * 4 + [math.exp(-20)] * 15) / (4 + 15 * math.exp(-20))
    assert scores["snd"] == pytest.approx(entropy_of(weights) / math.log(19), abs=1e-6)


def test_one_class_everywhere_is_seen_by_infomax_and_bnm_and_not_by_entropy_and_snd():
    scores = scored(of_classes([2] * 12, 4))
    assert scores == pytest.approx({"entropy": 0, "infomax": 0, "snd": 1, "bnm": 1 / 2}, abs=1e-6)


def test_tight_clusters_are_denser_than_spread_predictions():
    spread = [[a, 1 - a] for a in np.linspace(0.02, 0.98, 40)]
    tight = [[0.9, 0.1]] * 20 + [[0.1, 0.9]] * 20
    assert scored(of_shares(tight))["snd"] > scored(of_shares(spread))["snd"] + 0.02


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(3, 60), st.sampled_from([0.3, 2.0, 8.0]))
def test_every_score_is_its_definition_over_all_pixels(seed, classes, pixels, scale):
    logits = noise(1, classes, 1, pixels, seed=seed, scale=scale)
    shares = logits[0, :, 0].T.double().softmax(1).numpy()
    of_pixels = np.mean([entropy_of(np.maximum(row, 1e-300)) for row in shares])
    expected = {
        "entropy": of_pixels / math.log(classes),
        "infomax": (entropy_of(shares.mean(0)) - of_pixels) / math.log(classes),
        "snd": naive_density(shares),
        "bnm": np.linalg.svd(shares, compute_uv=False).sum() / math.sqrt(pixels * classes),
    }
    assert scored(logits) == pytest.approx(expected, abs=2e-5)


def test_bnm_shows_no_rounding_where_the_other_classes_are_almost_never_predicted():
    logits = noise(1, 3, 200, 200, scale=0.01)
    logits[:, 0] += math.log(1e4)
    shares = logits[0].flatten(1).softmax(0).double().T.numpy()
    norm = np.linalg.svd(shares, compute_uv=False).sum()
    assert scored(logits)["bnm"] == pytest.approx(
        norm / math.sqrt(3 * 200 * 200), abs=1e-7
    )  # single precision: 1e-5 off


@pytest.mark.parametrize("batch_size", [1, 3, 7, 40])
@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("count", [7, 40])  # 40 images have more slots than are compared, 7 have fewer
def test_how_images_are_split_into_batches_does_not_matter(count, batch_size, with_valid):
    logits = noise(count, 3, 20, 20)
    valid = (noise(count, 20, 20, seed=1) > -1).float() if with_valid else None
    assert scored(logits, valid, batch_size) == pytest.approx(scored(logits, valid), abs=1e-6)


def test_a_large_batch_is_handled_in_parts_without_changing_anything(monkeypatch):
    logits, valid = noise(9, 3, 12, 11), noise(9, 12, 11, seed=1) > 0
    whole = scored(logits, valid)
    monkeypatch.setattr("dann_experiments.scores.predictions.CPU_VALUES", 2 * 3 * 12 * 11)
    assert scored(logits, valid) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("there", [math.nan, math.inf, 1e30, 0.0])
def test_pixels_without_data_change_nothing_whatever_stands_there(there):
    logits = noise(3, 4, 10, 10)
    padded = torch.full((3, 4, 14, 13), there)
    padded[:, :, 2:12, 3:] = logits
    valid = torch.zeros(3, 14, 13)
    valid[:, 2:12, 3:] = 1
    assert scored(padded, valid) == pytest.approx(scored(logits), abs=1e-6)
    assert scored(padded, valid.bool()) == scored(padded, valid)


def test_an_image_without_data_changes_nothing_but_the_places_of_the_pixels_compared():
    logits = noise(3, 4, 6, 6)
    valid = torch.ones(3, 6, 6)
    valid[1] = 0
    assert scored(logits, valid) == pytest.approx(scored(logits[[0, 2]]), abs=1e-6)  # of 36 pixels all are compared


@pytest.mark.parametrize("with_valid", [False, True])
def test_a_softmax_that_is_given_changes_nothing(with_valid):
    logits = noise(3, 4, 10, 10)
    valid = noise(3, 10, 10, seed=1) > 0 if with_valid else None
    if valid is not None:
        logits.masked_fill_(~valid[:, None], math.nan)
    scorer = SelectionScorer()
    scorer.update(logits, valid, log_probabilities(logits))
    assert scorer.compute() == scored(logits, valid)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single_precision(kind):
    logits = noise(2, 3, 16, 16).to(kind)
    assert scored(logits) == scored(logits.float())


def test_the_same_images_give_the_same_numbers_whatever_the_random_state():
    logits = noise(30, 3, 24, 24)
    torch.manual_seed(1)
    first = scored(logits)
    torch.manual_seed(2)
    assert scored(logits) == first


def test_scores_ask_for_no_gradient_and_leave_the_logits_alone():
    logits = noise(2, 3, 4, 4).requires_grad_()
    before = logits.detach().clone()
    scorer = SelectionScorer()
    scorer.update(logits)
    assert torch.equal(logits, before)
    assert not torch.as_tensor(scorer._sums.gram).requires_grad


class Places:
    """Of a set whose predictions tell where they are: which (image, row, column) are compared."""

    @staticmethod
    def of(count, height, width, valid=None):
        sample = PixelSample()
        axes = torch.arange(count), torch.arange(height), torch.arange(width)
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), 1).double()  # (N, 3, H, W), instead of probabilities
        for number in range(count):
            part = slice(number, number + 1)
            sample.add(places[part].flatten(2), None if valid is None else valid[part].flatten(1))
        return sample.rows().long()


@pytest.mark.parametrize(("height", "width"), [(2, 3), (16, 16), (17, 1)])
def test_of_few_small_images_every_pixel_is_compared_once(height, width):
    places = Places.of(5, height, width)
    assert len(places) == len(torch.unique(places, dim=0)) == 5 * height * width


def test_an_image_gives_at_most_its_slots_and_no_pixel_twice():
    places = Places.of(3, 64, 64)
    assert len(places) == len(torch.unique(places, dim=0)) == 3 * SLOTS


@pytest.mark.parametrize("count", [8, 17, 100, 1000, 5000])
def test_pixels_compared_lie_all_over_the_set_and_all_over_the_images(count):
    places = Places.of(count, 32, 32)
    assert COMPARED / 2 <= len(places) <= COMPARED
    assert len(torch.unique(places, dim=0)) == len(places)
    images = torch.bincount(places[:, 0], minlength=count)
    assert images.max() <= max(2 * len(places) / count, 1) + 1
    for part in torch.tensor_split(images, 8):  # each eighth of the set has about its share
        assert part.sum() == pytest.approx(len(places) * len(part) / count, rel=0.1)
    for axis in (1, 2):  # each row, and each column, has about its share
        lines = torch.bincount(places[:, axis], minlength=32)
        assert lines.min() > 0.7 * len(places) / 32, lines
        assert lines.max() < 1.3 * len(places) / 32, lines


def test_pixels_compared_have_data_however_few_have():
    valid = torch.zeros(4, 20, 20, dtype=torch.bool)
    valid[0, 3, 4:9] = True
    valid[2] = noise(20, 20) > 0
    valid[3, 19, 19] = True
    places = Places.of(4, 20, 20, valid)
    image, row, column = places.T
    assert valid[image, row, column].all()
    assert torch.bincount(image).tolist() == [5, 0, int(valid[2].sum().clamp_max(SLOTS)), 1]
    assert len(torch.unique(places, dim=0)) == len(places)


def test_a_set_without_data_scores_nan():
    for scores in (SelectionScorer().compute(), scored(noise(2, 3, 4, 4), torch.zeros(2, 4, 4))):
        assert tuple(scores) == NAMES
        assert all(math.isnan(value) for value in scores.values())


def test_logits_that_are_not_numbers_score_nan():
    logits = noise(2, 3, 4, 4)
    logits[1, 0, 2, 2] = math.nan
    assert all(math.isnan(value) for value in scored(logits).values())


def test_two_pixels_have_no_neighbourhood():
    scores = scored(noise(1, 3, 1, 2))
    assert math.isnan(scores["snd"])
    assert not any(math.isnan(scores[name]) for name in NAMES if name != "snd")


def test_the_density_of_features_is_that_of_a_naive_double_loop():
    features = noise(300, 7, scale=1.0)  # more than are handled at a time
    assert neighborhood_density(features) == pytest.approx(naive_density(features.numpy()), abs=1e-5)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="fewer than two classes"):
        SelectionScorer().update(torch.zeros(1, 1, 4, 4))


SELECTION_SCORES = (mean_entropy, information_maximization, soft_neighborhood_density, batch_nuclear_norm)


@pytest.mark.parametrize("score", SELECTION_SCORES)
@pytest.mark.parametrize("shape", [(), (3,), (4, 3)])
def test_logits_without_an_axis_of_pixels_are_told_by_their_shape(score, shape):
    told = re.escape(f"logits have shape {shape}; give (N, K, ...)")
    with pytest.raises(ValueError, match=told):
        score(torch.zeros(shape))


@pytest.mark.parametrize("score", SELECTION_SCORES)
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 4), (3, 4, 6), (2, 1, 4, 6), (2, 24)])
def test_valid_of_another_shape_than_the_pixels_is_told(score, shape):
    """(2, 6, 4) has as many pixels as (2, 4, 6): it would leave out the wrong ones."""
    told = re.escape(f"valid has shape {shape}, logits (2, 3, 4, 6); valid must be (2, 4, 6)")
    with pytest.raises(ValueError, match=told):
        score(noise(2, 3, 4, 6), torch.ones(shape))


def test_the_table_names_what_is_computed_and_worst_loses_against_every_value():
    assert tuple(SCORES) == tuple(Metric.SELECT + name for name in scored(noise(1, 2, 4, 4)))
    for score in SCORES.values():
        assert score.worst > 1 if score.better == "min" else score.worst < 0


@pytest.mark.parametrize("metric", SCORES)
def test_a_score_chooses_by_its_value_unless_the_source_is_forgotten(metric):
    assert choice_value(metric, {metric: 0.25, Metric.SOURCE_KEPT: 1.0}) == 0.25
    assert choice_value(metric, {metric: 0.25}) == 0.25
    assert choice_value(metric, {metric: 0.25, Metric.SOURCE_KEPT: 0.0}) == SCORES[metric].worst
    assert choice_value(metric, {metric: math.nan, Metric.SOURCE_KEPT: 1.0}) == SCORES[metric].worst


def test_other_metrics_choose_as_they_are():
    metrics = {"iou/source_val": 0.5, "loss/val_source": math.nan, Metric.SOURCE_KEPT: 0.0}
    assert choice_value("iou/source_val", metrics) == 0.5
    assert math.isnan(choice_value("loss/val_source", metrics))
    assert choice_value(Metric.SOURCE_KEPT, metrics) == 0.0
    with pytest.raises(KeyError, match="select/snd"):
        choice_value("select/snd", metrics)
