"""The floor of a score and average precision: by hand, against scikit-learn, added up over batches, and in whole runs."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from dann_experiments import scores
from dann_experiments.names import SetName
from dann_experiments.scores.average_precision import (
    BINS,
    bins_of,
    class_average_precision_from,
    count_probabilities,
)
from dann_experiments.scores.predictions import log_probabilities
from dann_experiments.training.scoring import Scorer, Scores, ShareCounter, metrics_of_sets, shares_of_sets

IGNORED = 255
NAN = math.nan


# --- the best constant prediction


def constant_by_trying(confusion):
    """The mean IoU of each constant map, the best of them."""
    truth = np.asarray(confusion).sum(1)
    found = []
    for index in range(len(truth)):
        constant = np.zeros_like(np.asarray(confusion))
        constant[:, index] = truth
        found.append(scores.mean_iou(constant))
    return max(found)


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        ([[50, 13], [30, 7]], 0.63 / 2),  # the site of a network that called everything ground: 31.5
        ([[0, 4], [4, 0]], 0.5 / 2),  # a tie
        ([[6, 0, 0], [0, 3, 0], [0, 0, 1]], 0.6 / 3),
        ([[6, 0, 2], [1, 1, 0], [0, 0, 0]], 0.8 / 2),  # the third class has no labels, though it is predicted
        ([[0, 5], [0, 0]], 1.0),  # one class alone: a constant map is all that can be asked
    ],
)
def test_the_floor_is_the_largest_share_over_the_number_of_labelled_classes(confusion, expected):
    assert scores.constant_iou(np.array(confusion)) == pytest.approx(expected)
    assert constant_by_trying(confusion) == pytest.approx(expected)


def test_ignored_pixels_do_not_count_in_the_floor_and_no_labels_have_none():
    labels = torch.tensor([[0, 0, 0, 1, IGNORED, IGNORED]])
    confusion = scores.confusion_matrix(torch.tensor([[1, 1, 0, 0, 0, 1]]), labels, 2)
    assert scores.constant_iou(confusion) == pytest.approx(0.75 / 2)
    assert math.isnan(scores.constant_iou(np.zeros((3, 3))))
    assert np.isnan(scores.true_shares(np.zeros((2, 2)))).all()


def test_shares_of_the_truth_are_rows_and_shares_of_the_prediction_are_columns():
    confusion = np.array([[5, 1, 0], [3, 1, 0], [0, 0, 0]])
    assert scores.true_shares(confusion).tolist() == [0.6, 0.4, 0]
    assert scores.predicted_shares(confusion).tolist() == [0.8, 0.2, 0]


# --- average precision


def drawn(seed, sharpness=2.0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (6, 16, 16), generator=generator)
    logits = sharpness * torch.randn(6, classes, 16, 16, generator=generator)
    logits.scatter_add_(1, labels[:, None], torch.full((6, 1, 16, 16), sharpness))
    labels[1, :5] = IGNORED
    return logits, labels


def of_scikit_learn(ranked, labels):
    """Average precision of each class; `ranked`: values (N, K, H, W) that grow with the probability."""
    kept = labels != IGNORED
    return [
        average_precision_score((labels[kept] == index).numpy(), ranked[:, index][kept].numpy())
        for index in range(ranked.shape[1])
    ]


@pytest.mark.parametrize(("sharpness", "within"), [(0.1, 0.006), (2.0, 0.001), (30.0, 0.001)])  # 0.1: p of 0.28 to 0.39
def test_average_precision_is_that_of_scikit_learn(sharpness, within):
    logits, labels = drawn(0, sharpness)
    found = scores.class_average_precision(logits, labels)
    logs = log_probabilities(logits)
    assert found.tolist() == pytest.approx(of_scikit_learn(-bins_of(logs), labels), abs=1e-12)  # the same bins: exact
    assert found.tolist() == pytest.approx(of_scikit_learn(logs, labels), abs=within)  # every probability of its own


def test_average_precision_by_hand_and_without_positives():
    logits = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [0.0] * 4, [-50.0] * 4]])
    found = scores.class_average_precision(logits, torch.tensor([[0, 1, 0, IGNORED]]))
    assert found.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 2, NAN], nan_ok=True)
    with pytest.raises(ValueError, match=r"labels must be \(1, 4\)"):
        scores.class_average_precision(logits, torch.zeros(1, 5))


def test_a_ranking_that_knows_nothing_has_the_share_of_the_class():
    labels = torch.tensor([[0] * 63 + [1] * 37])
    assert scores.class_average_precision(torch.zeros(1, 2, 100), labels).tolist() == pytest.approx([0.63, 0.37])


def test_histograms_of_batches_add_up_to_that_of_the_set():
    logits, labels = drawn(1)
    whole = count_probabilities(log_probabilities(logits), labels, IGNORED)
    parts = [
        count_probabilities(log_probabilities(logits[some]), labels[some], IGNORED)
        for some in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert whole[:, 0].sum(1).tolist() == [(labels != IGNORED).sum()] * 3
    assert whole[:, 1].sum(1).tolist() == [(labels == index).sum() for index in range(3)]
    assert class_average_precision_from(whole).tolist() == scores.class_average_precision(logits, labels).tolist()


def test_bins_keep_the_order_of_probabilities_and_take_any_value():
    logs = torch.cat([torch.linspace(-200, 0, 100_001), -torch.logspace(-12, 2, 10_001)]).sort().values
    bins = bins_of(logs)
    assert (bins.diff() <= 0).all()
    assert (bins.min(), bins.max()) == (0, BINS - 1)
    odd = bins_of(torch.tensor([0.0, -0.0, -math.inf, math.nan]))
    assert odd.tolist() == [0, 0, BINS - 1, BINS - 1]


# --- in the scores of runs


def test_scores_come_back_from_a_checkpoint_and_those_of_earlier_versions_lack_average_precision():
    logits, labels = drawn(2)
    scorer = Scorer(3, IGNORED)
    scorer.update(logits, labels)
    found = scorer.compute()
    again = Scores.from_plain(found.as_plain())
    assert again.metrics("source_val", "xyz") == found.metrics("source_val", "xyz")
    earlier = {key: value for key, value in found.as_plain().items() if key != "class_ap"}
    lacking = set(found.metrics("source_val", "xyz")) - set(Scores.from_plain(earlier).metrics("source_val", "xyz"))
    assert lacking == {"map/source_val", "ap/source_val/x", "ap/source_val/y", "ap/source_val/z"}


def test_the_floor_of_several_domains_is_the_mean_of_theirs():
    first, second = Scores(np.array([[9, 0], [1, 0]]), 0.1), Scores(np.array([[2, 2], [2, 2]]), 0.3)
    found = metrics_of_sets({SetName("target", "val", "a"): first, SetName("target", "val", "b"): second}, ["x", "y"])
    assert [found[f"floor/target_val{end}"] for end in (".a", ".b", "")] == pytest.approx([0.45, 0.25, 0.35])
    assert [found[f"share/target_val{end}/y"] for end in (".a", ".b", "")] == pytest.approx([0, 0.5, 0.25])


def test_shares_of_images_without_labels_leave_out_pixels_without_data():
    logits = torch.tensor([[[[2.0, 2.0, 0.0, 0.0, 0.0]], [[1.0] * 5], [[0.0] * 5]]])  # classes 0 0 1 1 1
    counter = ShareCounter(3)
    counter.update(logits)
    counter.update(logits, torch.tensor([[[0, 1, 0, 0, 1]]]))
    assert counter.compute().tolist() == [3, 4, 0]
    domains = {SetName("target", "val", "a"): np.array([3, 1]), SetName("target", "val", "b"): np.array([0, 10])}
    shares = shares_of_sets(domains | {SetName("target", "val", "c"): np.zeros(2)}, ["x", "y"])
    assert shares == {
        "share/target_val/x": 3 / 8, "share/target_val/y": 5 / 8, "share/target_val.a/x": 3 / 4,
        "share/target_val.a/y": 1 / 4, "share/target_val.b/x": 0, "share/target_val.b/y": 1,
    }  # fmt: skip
