"""Scores: IoU from one confusion matrix for the whole set, macro mean over the classes present, ignored pixels left out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments.training.scores import Scorer, metric_name, predict_images, score_set

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
    for scores in (score([[[0, 1]]], [[[IGNORED, IGNORED]]], 2), Scorer(2, IGNORED).compute()):
        assert math.isnan(scores.iou)
        assert math.isnan(scores.loss)
        assert np.isnan(scores.class_iou).all()
        assert scores.confusion.sum() == 0
        assert list(scores.metrics("source_val", ["ground", "house"])) == ["iou/source_val"]


def test_metrics_name_the_classes_present():
    scores = score([[[0, 2], [2, 2]]], [[[0, 0], [2, 2]]], num_classes=3)
    expected = {
        "iou/target_val": 7 / 12,
        "class_iou/target_val/ground": 1 / 2,
        "class_iou/target_val/trees_shrubs": 2 / 3,
    }
    assert scores.metrics("target_val", ["ground", "water", "trees/shrubs"]) == pytest.approx(expected)


def test_characters_that_mlflow_refuses_become_underscores():
    assert metric_name("low_veg 2.0-a") == "low_veg 2.0-a"
    assert metric_name("Straße/Weg (asphalt)") == "Stra_e_Weg _asphalt_"


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
