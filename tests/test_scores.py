"""Scores: IoU, precision, recall and F1 from one confusion matrix for the whole set, macro means, ignored pixels left out."""

import doctest
import importlib
import math
import pkgutil

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, jaccard_score, precision_recall_fscore_support
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments import scores
from dann_experiments.models.networks import predicted_classes
from dann_experiments.scores import macro_mean, row_shares
from dann_experiments.scores.predictions import log_probabilities
from dann_experiments.training.scoring import Scorer, Scores, SelectionScorer, predict_images, score_set

IGNORED = 255


def score(predictions, labels, num_classes, ignored=IGNORED, batch_size=100):
    """Scores of maps of class ids (N, H, W), given to the scorer in batches."""
    predictions, labels = torch.as_tensor(predictions), torch.as_tensor(labels)
    logits = nn.functional.one_hot(predictions, num_classes).movedim(-1, 1).float()
    scorer = Scorer(num_classes, ignored)
    for start in range(0, len(labels), batch_size):
        scorer.update(logits[start : start + batch_size], labels[start : start + batch_size])
    return scorer.compute()


def test_iou_of_a_map_worked_out_by_hand():
    # truth 0 0 / 1 1, prediction 0 1 / 1 1: class 0 has 1 of 2 pixels, class 1 has 2 of 3
    scores = score([[[0, 1], [1, 1]]], [[[0, 0], [1, 1]]], num_classes=2)
    assert scores.confusion.tolist() == [[1, 1], [0, 2]]  # rows = truth
    assert scores.class_iou.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert scores.iou == pytest.approx(7 / 12)


def test_a_class_neither_labelled_nor_predicted_does_not_count():
    scores = score([[[0, 2], [2, 2]]], [[[0, 0], [2, 2]]], num_classes=4)
    assert scores.class_iou.tolist() == pytest.approx([1 / 2, math.nan, 2 / 3, math.nan], nan_ok=True)
    assert scores.iou == pytest.approx(7 / 12)


def test_a_class_that_is_only_predicted_counts_as_0():
    scores = score([[[0, 1], [0, 0]]], [[[0, 0], [0, 0]]], num_classes=2)
    assert scores.class_iou.tolist() == [3 / 4, 0.0]
    assert scores.iou == 3 / 8


@pytest.mark.parametrize("predicted_there", [0, 1])
def test_what_is_predicted_at_an_ignored_pixel_does_not_count(predicted_there):
    scores = score([[[0, 1], [1, predicted_there]]], [[[0, 0], [1, IGNORED]]], num_classes=2)
    assert scores.confusion.sum() == 3
    assert scores.class_iou.tolist() == [1 / 2, 1 / 2]


@pytest.mark.parametrize("ignored", [0, 2])
def test_a_class_that_is_ignored_may_still_be_predicted_and_is_then_wrong(ignored):
    scores = score([[[1, ignored], [1, 1]]], [[[1, 1], [1, ignored]]], num_classes=3, ignored=ignored)
    assert scores.class_iou[1] == 2 / 3
    assert scores.class_iou[ignored] == 0.0
    assert scores.iou == 1 / 3


@st.composite
def maps_and_settings(draw):
    classes = draw(st.integers(2, 6))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    labels = generator.integers(0, classes, shape)
    labels[generator.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = IGNORED
    return generator.integers(0, classes, shape), labels, classes, draw(st.integers(1, 4))


@settings(deadline=None)
@given(maps_and_settings())
def test_iou_is_the_macro_jaccard_score_of_scikit_learn(drawn):
    predictions, labels, classes, batch_size = drawn
    labelled = labels != IGNORED
    assume(labelled.any())
    scores = score(predictions, labels, classes, batch_size=batch_size)
    # its default labels are those present in truth or prediction
    expected = jaccard_score(labels[labelled], predictions[labelled], average="macro")
    assert scores.iou == pytest.approx(expected, abs=1e-12)
    each = jaccard_score(labels[labelled], predictions[labelled], average=None)
    assert scores.class_iou[~np.isnan(scores.class_iou)].tolist() == pytest.approx(each.tolist(), abs=1e-12)


def test_iou_is_that_of_the_whole_set_and_no_mean_over_batches():
    predictions, labels = [[[1, 1, 1, 1]], [[0, 0, 1, 0]]], [[[1, 1, 1, 0]], [[0, 0, 0, 0]]]
    whole = score(predictions, labels, num_classes=2)
    by_image = score(predictions, labels, num_classes=2, batch_size=1)
    assert by_image.confusion.tolist() == whole.confusion.tolist() == [[3, 2], [0, 3]]
    assert by_image.iou == pytest.approx((3 / 5 + 3 / 5) / 2)
    mean_of_images = np.mean([score(predictions[i : i + 1], labels[i : i + 1], 2).iou for i in range(2)])
    assert mean_of_images == pytest.approx(3 / 8)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_loss_is_the_mean_over_the_labelled_pixels_of_the_whole_set(batch_size):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (5, 4, 4), generator=generator)
    labels[0] = IGNORED
    labels[1, 1:] = IGNORED  # batches of unequal numbers of labelled pixels
    scorer = Scorer(3, IGNORED)
    for start in range(0, 5, batch_size):
        scorer.update(logits[start : start + batch_size], labels[start : start + batch_size])
    labelled = labels != IGNORED
    by_pixel = -logits.movedim(1, -1)[labelled].log_softmax(1).gather(1, labels[labelled][:, None])
    assert scorer.compute().loss == pytest.approx(float(by_pixel.mean()), abs=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_set_without_labelled_pixels_scores_nan():
    for found in (score([[[0, 1]]], [[[IGNORED, IGNORED]]], 2), Scorer(2, IGNORED).compute()):
        assert math.isnan(found.iou)
        assert math.isnan(found.loss)
        assert np.isnan(found.class_iou).all()
        assert found.confusion.sum() == 0
        assert list(found.metrics("source_val", ["ground", "house"])) == ["iou/source_val"]


def test_metrics_name_the_classes_present():
    scores = score([[[0, 2], [2, 2]]], [[[0, 0], [2, 2]]], num_classes=3)
    expected = {
        "iou/target_val": 7 / 12,
        "class_iou/target_val/ground": 1 / 2,
        "class_iou/target_val/trees_shrubs": 2 / 3,
        "floor/target_val": 1 / 4,  # half of the pixels are of one class, and two classes are labelled
        "map/target_val": (3 / 4 + 2 / 3) / 2,
        "ap/target_val/ground": 1 / 2 + 1 / 4,  # one ranks first, the other in a tie of all that are left: 2 of 4
        "ap/target_val/trees_shrubs": 2 / 3,  # both in a tie of three
        "share/target_val/ground": 1 / 4,
        "share/target_val/water": 0,
        "share/target_val/trees_shrubs": 3 / 4,
        "true_share/target_val/ground": 1 / 2,
        "true_share/target_val/water": 0,
        "true_share/target_val/trees_shrubs": 1 / 2,
    }
    assert scores.metrics("target_val", ["ground", "water", "trees/shrubs"]) == pytest.approx(expected)


class Threshold(nn.Module):
    """Class 1 where the first band is above 0; in train mode, what eval mode says turned round."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        band = images[:, 0] * self.scale * (-1 if self.training else 1)
        return torch.stack([-band, band], 1)


def test_a_set_is_scored_in_eval_mode_each_image_once():
    network = Threshold().train()
    images = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = (images[:, 0] > 0).long()
    loader = DataLoader([{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)], 2)
    scores = score_set(network, loader, 2, IGNORED)
    assert scores.iou == 1.0
    assert scores.confusion.sum() == 5 * 4 * 4
    assert network.training


def test_predictions_are_maps_of_class_ids_made_in_eval_mode():
    network = Threshold().train()
    image = torch.tensor([[[1.0, -1.0, 2.0], [-3.0, 0.5, -0.5]]])
    (prediction,) = predict_images(network, [image])
    assert prediction.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert network.training


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 7, 300])  # bfloat16 counts to 256
def test_the_predicted_class_is_the_first_of_the_greatest_logits(kind, classes):
    logits = (
        torch.randint(0, 5, (2, classes, 9, 9), generator=torch.Generator().manual_seed(0)).to(kind).requires_grad_()
    )
    before = logits.detach().clone()
    predicted = predicted_classes(logits)
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == logits.detach().double().numpy().argmax(1).tolist()  # numpy's gives the first
    assert torch.equal(logits.detach(), before)


def test_a_batch_handled_in_parts_or_with_its_softmax_given_scores_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 6, 6, generator=generator)
    labels = torch.randint(0, 3, (5, 6, 6), generator=generator)
    labels[2] = IGNORED
    found = []
    for logs in (None, log_probabilities(logits)):
        for values in (10**9, 2 * 3 * 6 * 6, 1):
            monkeypatch.setattr("dann_experiments.scores.predictions.CPU_VALUES", values)
            scorer = Scorer(3, IGNORED)
            scorer.update(logits, labels, logs)
            found.append(scorer.compute())
    assert all(np.array_equal(scores.confusion, found[0].confusion) for scores in found)
    assert [scores.loss for scores in found] == pytest.approx([found[0].loss] * 6, abs=1e-6)


# rows = truth: of 8 field, 6 found; of 4 wood, 1 found; no town, but 3 pixels called so; no lake at all
HAND = Scores(np.array([[6, 1, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]), loss=0.0)
NAN = math.nan


def test_precision_recall_and_f1_of_a_matrix_worked_out_by_hand():
    assert HAND.class_precision.tolist() == pytest.approx([6 / 7, 1 / 2, 0, NAN], nan_ok=True)
    assert HAND.class_recall.tolist() == pytest.approx([6 / 8, 1 / 4, NAN, NAN], nan_ok=True)
    assert HAND.class_f1.tolist() == pytest.approx([12 / 15, 2 / 6, 0, NAN], nan_ok=True)
    assert HAND.accuracy == pytest.approx(7 / 12)
    assert HAND.truth_pixels.tolist() == [8, 4, 0, 0]
    assert HAND.predicted_pixels.tolist() == [7, 2, 3, 0]


def test_a_class_never_predicted_has_no_precision_but_recall_and_f1_0():
    scores = Scores(np.array([[5, 0], [2, 0]]), loss=0.0)
    assert scores.class_precision.tolist() == pytest.approx([5 / 7, NAN], nan_ok=True)
    assert scores.class_recall.tolist() == [1, 0]
    assert scores.class_f1.tolist() == pytest.approx([10 / 12, 0])


def test_evaluate_s_metrics_are_those_of_training_and_each_score_where_it_is_defined():
    expected = HAND.metrics("target_test", ["field", "wood", "town/village", "lake"]) | {
        "precision/target_test": (6 / 7 + 1 / 2 + 0) / 3,  # over the classes predicted
        "precision/target_test/field": 6 / 7,
        "precision/target_test/wood": 1 / 2,
        "precision/target_test/town_village": 0,
        "recall/target_test": (6 / 8 + 1 / 4) / 2,  # over the classes labelled
        "recall/target_test/field": 6 / 8,
        "recall/target_test/wood": 1 / 4,
        "f1/target_test": (12 / 15 + 2 / 6 + 0) / 3,  # over both
        "f1/target_test/field": 12 / 15,
        "f1/target_test/wood": 2 / 6,
        "f1/target_test/town_village": 0,
        "accuracy/target_test": 7 / 12,
    }
    assert HAND.all_metrics("target_test", ["field", "wood", "town/village", "lake"]) == pytest.approx(expected)


def test_each_row_of_the_normalised_matrix_is_shares_of_its_class():
    assert row_shares(HAND.confusion)[:2].tolist() == [[6 / 8, 1 / 8, 1 / 8, 0], [1 / 4, 1 / 4, 2 / 4, 0]]
    assert np.isnan(row_shares(HAND.confusion)[2:]).all()


@settings(deadline=None)
@given(maps_and_settings())
def test_precision_recall_f1_and_accuracy_are_those_of_scikit_learn(drawn):
    predictions, labels, classes, batch_size = drawn
    labelled = labels != IGNORED
    assume(labelled.any())
    scores = score(predictions, labels, classes, batch_size=batch_size)
    truth, predicted = labels[labelled], predictions[labelled]
    expected = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=NAN)
    for found, wanted in zip((scores.class_precision, scores.class_recall, scores.class_f1), expected[:3], strict=True):
        assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-12, nan_ok=True)
        assert macro_mean(found) == pytest.approx(np.nanmean(wanted), abs=1e-12)
    assert scores.accuracy == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    assert scores.class_f1.tolist() == pytest.approx(
        (2 * scores.class_iou / (1 + scores.class_iou)).tolist(), nan_ok=True
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_set_without_labelled_pixels_has_means_of_nan_and_no_class_scores():
    found = Scorer(2, IGNORED).compute().all_metrics("source_val", ["ground", "house"])
    assert set(found) == {f"{kind}/source_val" for kind in ("iou", "precision", "recall", "f1", "accuracy")}
    assert all(math.isnan(value) for value in found.values())


def test_the_functions_on_whole_tensors_give_what_training_adds_up_batch_by_batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20, 4, 24, 24, generator=generator)
    labels = torch.randint(0, 4, (20, 24, 24), generator=generator)
    labels[::3, 5:] = IGNORED
    valid = torch.rand(20, 24, 24, generator=generator) > 0.2
    labeled, unlabeled = Scorer(4, IGNORED), SelectionScorer()
    for start in range(0, 20, 6):
        part = slice(start, start + 6)
        labeled.update(logits[part], labels[part])
        unlabeled.update(logits[part], valid[part])
    confusion = scores.confusion_matrix(logits.argmax(1), labels, 4)
    assert scores.mean_iou(confusion) == labeled.compute().iou
    assert unlabeled.compute() == pytest.approx({
        "entropy": scores.mean_entropy(logits, valid), "infomax": scores.information_maximization(logits, valid),
        "snd": scores.soft_neighborhood_density(logits, valid), "bnm": scores.batch_nuclear_norm(logits, valid),
    }, abs=1e-9)  # fmt: skip


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(scores.__path__)])
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"dann_experiments.scores.{name}")
    assert doctest.testmod(module).failed == 0


def test_every_exported_score_has_an_example():
    functions = [getattr(scores, name) for name in scores.__all__ if name.islower()]
    assert [function.__name__ for function in functions if ">>>" not in (function.__doc__ or "")] == []
