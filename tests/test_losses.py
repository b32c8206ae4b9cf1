"""The segmentation loss: definitions by hand-made cases, ignored pixels, batches without labels, and that all arms share it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import read_sets, small_settings
from torch.nn import functional

from dann_experiments import InputError, load_config
from dann_experiments.config import replace
from dann_experiments.config.loss import NAMES, LossTerm
from dann_experiments.jobs import adapt, pretrain
from dann_experiments.training.losses import SegmentationLoss, class_weights_from, segmentation_loss

IGNORED = 255
WEIGHTS = [0.5, 3.0, 1.0]


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 7, generator=made).to(dtype).requires_grad_()
    labels = torch.randint(3, (2, 6, 7), generator=made)
    labels[:, :2] = IGNORED
    return logits, labels


def of(name: str, logits: torch.Tensor, labels: torch.Tensor, weights=None, **options: float) -> torch.Tensor:
    return SegmentationLoss([LossTerm(name, **options)], IGNORED, weights)(logits, labels)[0]  # pyright: ignore[reportArgumentType]


def labelled(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (P, K) and one-hot labels (P, K) of the labelled pixels."""
    known = labels != IGNORED
    return logits.movedim(1, -1)[known], functional.one_hot(labels[known], 3).float()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torch_s_weighted_mean(weights, smoothing):
    logits, labels = batch()
    given = None if weights is None else torch.tensor(weights)
    expected = functional.cross_entropy(logits, labels, given, ignore_index=IGNORED, label_smoothing=smoothing)
    assert torch.allclose(of("cross_entropy", logits, labels, weights, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    ("name", "options", "alpha", "beta", "gamma"),
    [("dice", {}, 0.5, 0.5, 1), ("jaccard", {}, 1, 1, 1), ("tversky", {"alpha": 0.3, "beta": 0.7, "gamma": 2}, 0.3, 0.7, 2)],
)  # fmt: skip
def test_overlap_losses_are_one_minus_the_tversky_index_of_the_batch(name, options, alpha, beta, gamma, weights):
    """Salehi et al. 2017, equation 3: TP / (TP + alpha FP + beta FN) of probabilities; Dice: 1/2 and 1/2, Jaccard: 1 and 1."""
    logits, labels = batch()
    scores, truth = labelled(logits, labels)
    chances = scores.softmax(1)
    hits = (chances * truth).sum(0)
    index = hits / (hits + alpha * (chances * (1 - truth)).sum(0) + beta * ((1 - chances) * truth).sum(0))
    share = torch.tensor(weights or [1.0, 1.0, 1.0])
    expected = (((1 - index) * share).sum() / share.sum()) ** gamma
    assert torch.allclose(of(name, logits, labels, weights, **options), expected, atol=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal_is_the_mean_over_classes_of_the_binary_focal_loss(weights):
    """Lin et al. 2017, equation 4: -(1 - p_t)^gamma log p_t, each class against the rest."""
    logits, labels = batch()
    scores, truth = labelled(logits, labels)
    right = torch.where(truth == 1, scores.sigmoid(), 1 - scores.sigmoid())
    share = torch.tensor(weights or [1.0, 1.0, 1.0])
    of_classes = (-((1 - right) ** 1.5) * right.log()).mean(0)
    expected = (of_classes * share).sum() / share.sum()
    assert torch.allclose(of("focal", logits, labels, weights, gamma=1.5), expected, atol=1e-6)


def test_lovasz_of_a_certain_prediction_is_one_minus_the_mean_iou():
    """Berman et al. 2018: the extension agrees with the Jaccard loss where predictions are 0 or 1; mean over classes present."""
    _, labels = batch()
    guess = torch.randint(2, labels.shape, generator=torch.Generator().manual_seed(3))  # class 2 is never guessed
    logits = 200 * functional.one_hot(guess, 3).movedim(-1, 1).float()
    known = labels != IGNORED
    ious = [
        ((guess == k) & (labels == k) & known).sum() / (((guess == k) | (labels == k)) & known).sum() for k in range(3)
    ]
    assert float(of("lovasz", logits, labels)) == pytest.approx(1 - float(sum(ious)) / 3, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_batch_without_a_labelled_pixel_has_loss_and_gradient_zero(name, dtype, weights):
    logits, labels = batch(dtype)
    loss = of(name, logits, torch.full_like(labels, IGNORED), weights)
    loss.backward()
    assert loss.shape == ()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("there", [0.0, 50.0, math.inf, math.nan])
def test_ignored_pixels_reach_no_loss_whatever_their_logits(name, dtype, there):
    logits, labels = batch(dtype)
    expected = of(name, logits, labels, None)
    changed = logits.detach().clone()
    changed[:, 1, :2] = there
    changed.requires_grad_()
    loss = of(name, changed, labels)
    loss.backward()
    assert float(loss.detach()) == float(expected.detach())
    assert changed.grad is not None
    if name != "cross_entropy" or math.isfinite(
        there
    ):  # torch's own has the gradient 0 * NaN there: a step told as a bad one
        assert not changed.grad[:, :, :2].any()
    assert changed.grad[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_under_autocast_is_the_loss_of_the_rounded_logits(name):
    logits, labels = batch(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = of(name, logits, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(of(name, logits.float(), labels)), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_falls_when_it_is_followed(name):
    logits, labels = batch()
    first = of(name, logits, labels)
    (gradient,) = torch.autograd.grad(first, logits)
    assert float(of(name, logits - gradient / gradient.norm(), labels)) < float(first)


def test_terms_add_up_by_their_weights_and_a_repeated_one_is_numbered():
    logits, labels = batch()
    terms = [LossTerm("cross_entropy", 0.5), LossTerm("focal", 2.0, gamma=1), LossTerm("focal", 1.0)]
    total, parts = SegmentationLoss(terms, IGNORED)(logits, labels)
    assert list(parts) == ["cross_entropy", "focal_1", "focal_2"]
    expected = 0.5 * parts["cross_entropy"] + 2 * parts["focal_1"] + parts["focal_2"]
    assert torch.allclose(total, expected)


def test_the_default_is_plain_cross_entropy_bit_for_bit():
    logits, labels = batch()
    assert torch.equal(of("cross_entropy", logits, labels), segmentation_loss(logits, labels, IGNORED))


def test_automatic_weights_give_each_class_the_same_share():
    pixels = np.array([700, 200, 100, 0])
    weights = np.array(class_weights_from(pixels))
    assert np.allclose((weights * pixels)[:3], 1000 / 3)
    assert weights[3] == 0


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("dise", r"loss\[0\]\.name is 'dise'; it is one of .*; did you mean 'dice'\?"),
        ("[{name: dice, wieght: 2}]", r"loss\[0\] has the key 'wieght'; .* did you mean 'weight'\?"),
        ("[dice, {name: dice, gamma: 2}]", r"loss\[1\]\.gamma is 2\.0, but dice has no gamma"),
        ("[{name: focal, gamma: -1}]", r"loss\[0\]\.gamma is -1\.0; give a number of at least 0"),
        ("[{name: tversky, gamma: 0.75}]", r"loss\[0\]\.gamma is 0\.75; give 1 or more"),
        ("[{name: tversky, alpha: 0, beta: 0}]", r"loss\[0\]\.alpha and loss\[0\]\.beta are both 0"),
        ("[{name: dice, weight: 0}]", r"loss\[0\]\.weight is 0\.0; give a number above 0"),
        ("[{name: dice, weight: much}]", r"loss is .*'much'"),
        ("[{class_path: os.system}]", r"loss\[0\] has the key 'class_path'"),
        ("[]", r"loss is \[\]; name at least one"),
        ("7", r"loss\[0\] is 7; give a name"),
    ],
)
def test_a_wrong_loss_is_told_by_its_key(loss, told):
    with pytest.raises(InputError, match=told):
        load_config(overrides={"loss": loss})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"class_weights": "[1, 2, 3]"}, r"class_weights is \[1\.0, 2\.0, 3\.0\], but model\.classes is 2"),
        ({"class_weights": "[0, 0]"}, r"class_weights is \[0\.0, 0\.0\]"),
        ({"class_weights": "[-1, 1]"}, r"class_weights is \[-1\.0, 1\.0\]"),
        ({"class_weights": "balanced"}, r"class_weights is 'balanced', but must be auto"),
        ({"class_weights": "auto", "loss": "lovasz"}, r"class_weights has no effect, because the only loss is lovasz"),
    ],
)
def test_wrong_class_weights_are_told(settings, told):
    with pytest.raises(InputError, match=told):
        load_config(overrides=settings)


@pytest.mark.slow
def test_a_run_logs_the_loss_its_terms_and_the_weights(squares, workplace):
    settings = small_settings(squares, loss=["cross_entropy", {"name": "dice", "weight": 2.0}], class_weights="auto")
    config = load_config(overrides={key.replace("__", "."): value for key, value in settings.items()})
    result = pretrain(config)
    points = result.history().pivot_table(index="step", columns="metric", values="value")
    total = points["loss/train_seg_cross_entropy"] + 2 * points["loss/train_seg_dice"]
    steps = points["loss/train_seg"].dropna().index
    assert len(steps)
    assert np.allclose(points["loss/train_seg"][steps], total[steps], rtol=1e-5)
    pixels = read_sets(config).training()["source"].count_classes()[0][:2]
    expected = class_weights_from(pixels)
    import mlflow

    tag = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).data.tags["dann.class_weights"]
    assert [float(part.split()[-1]) for part in tag.split(", ")] == pytest.approx(expected, rel=1e-3)
    # an adaptation that starts from this run says that its own loss is another one
    assert adapt(replace(config, {"trainer.max_epochs": 1})).source_run_id == result.run_id


def test_counts_of_a_set_that_is_not_kept_in_memory_are_those_of_one_that_is(squares):
    overrides = {key.replace("__", "."): value for key, value in small_settings(squares).items()}
    kept, read = (read_sets(load_config(overrides=overrides | {"data.memory_gb": size})) for size in (1.0, 0.0))
    assert read.training()["source"].class_pixels is None
    pixels, holds = kept.training()["source"].count_classes()
    assert np.array_equal(pixels, kept.training()["source"].class_pixels)  # pyright: ignore[reportArgumentType]
    for one, other in zip((pixels, holds), read.training()["source"].count_classes(), strict=True):
        assert np.array_equal(one, other)
