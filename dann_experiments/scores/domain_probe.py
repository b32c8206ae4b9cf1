"""The probe: measures the gap between two domains with a new, simple classifier on their features.

The domain classifier of a run is trained against the network: if it is confused, the features may be similar, or the classifier
weak. So an independent classifier, a regularized logistic regression, is fitted to features of both domains and scored on other
images. Its accuracy gives the proxy A-distance (Ben-David et al. 2007 and 2010; Ganin et al. 2016, section 3.2).

Letters: N images, C channels, F features, H x W positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dann_experiments.adaptation.domain_classifier import resize_valid
from dann_experiments.scores.confusion import as_array

FEWEST_IMAGES = 4
"""Images per domain that a probe needs: with 4 it is fitted four times to 3 + 3 images, which is already very few."""
FOLDS = 5
MOST_DRAWS = 5
"""Maximal number of samples of the larger domain that are compared with the smaller one."""
REGULARIZATION = 0.1
"""`C` of the logistic regression on standardized features. On held-out images, pure noise gives 0.5 with any C. For true
differences in simulated cases (8 to 1024 features, 6 to 300 images per domain), 0.1 was within 0.02 of the best value in 1e-4 to
1; 1e-3 and less miss differences in few, collinear features (0.62 instead of 0.93)."""
MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """The result of a probe: how well a new classifier distinguishes two domains."""

    accuracy: float
    """Balanced accuracy, 0..1, on images that the probe was not fitted to; 0.5 is chance."""
    a_distance: float
    """Proxy A-distance, 0 (indistinguishable) to 2 (distinguished without error)."""
    images: tuple[int, int]
    """Numbers of source and target images used."""

    @property
    def standard_error(self) -> float:
        """Approximate standard error of the accuracy, sqrt(p (1 - p) / n).

        n is twice the harmonic mean of the two numbers of images, because the smaller domain dominates the error. p has one
        correct and one wrong answer added (Laplace), so that the error of 1.0 on six images is not 0. Folds share training
        images: on pure noise the true error was up to 1.25 times this.
        """
        count = 4 / (1 / self.images[0] + 1 / self.images[1])
        p = (self.accuracy * count + 1) / (count + 2)
        return math.sqrt(p * (1 - p) / count)


def a_distance(accuracy: float) -> float:
    """Return the proxy A-distance 2 (1 - 2 error) with error = 1 - accuracy, 0 to 2 (Ben-David et al. 2007, 2010).

    An accuracy below 0.5 is noise and gives 0: the distance is defined by the best classifier, and inverting all answers would
    give one with an accuracy above 0.5.

    >>> a_distance(0.75)
    1.0
    """
    return min(max(2 * (1 - 2 * (1 - accuracy)), 0.0), 2.0)


def probe(source: Tensor | np.ndarray, target: Tensor | np.ndarray, seed: int = 0) -> Probe | None:
    """Cross-validate a new classifier between features of the source (N, F) and of the target (M, F).

    It is a logistic regression on features that are standardized by the training folds, with 5 stratified folds, fewer for fewer
    images. Domains of unequal size are compared at equal size, over up to 5 samples of the larger one. (Class weights do not help
    with more features than images: the classifier predicts the larger domain nearly everywhere, and a true difference looks like
    0.5.) The same `seed` gives the same numbers.

    Each row counts as a separate image. Windows of one picture are similar, so with one to five pictures per domain a probe
    distinguishes *pictures*: for a single distribution, 40 windows of 5 pictures each gave 1.0, of 20 pictures 0.7.

    Returns None for fewer than 4 images in a domain, and if features are not finite (the network diverged).

    >>> noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    >>> found = probe(noise[:20], noise[20:] + 3)
    >>> found.accuracy, found.a_distance, found.images
    (1.0, 2.0, (20, 20))
    """
    source, target = as_array(source), as_array(target)
    count = min(len(source), len(target))
    if count < FEWEST_IMAGES or not (np.isfinite(source).all() and np.isfinite(target).all()):
        return None
    random = np.random.default_rng(seed)
    draws = min(max(len(source), len(target)) // count, MOST_DRAWS)
    # resize: each draw uses the whole smaller domain, and other images of the larger one
    sides = [domain[np.resize(random.permutation(len(domain)), draws * count)] for domain in (source, target)]
    parts = [slice(draw * count, (draw + 1) * count) for draw in range(draws)]
    accuracy = float(np.mean([_cross_validated(sides[0][part], sides[1][part]) for part in parts]))
    return Probe(accuracy, a_distance(accuracy), (min(len(source), draws * count), min(len(target), draws * count)))


def mean_probe(probes: Sequence[Probe | None]) -> Probe | None:
    """Return the mean of the probes of several layers; None if no layer could be probed."""
    made = [item for item in probes if item is not None]
    if not made:
        return None
    accuracy = sum(item.accuracy for item in made) / len(made)
    distance = sum(item.a_distance for item in made) / len(made)
    return Probe(accuracy, distance, made[0].images)


def mean_and_std(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return mean, then standard deviation over the positions with data, (N, 2C): the usual input of `probe`.

    The mean alone would be weak for a layer with few channels, and would miss textures with the same mean. `features`:
    (N, C, H, W); `valid`: (N, h, w) at any resolution, 0 where a pixel has no data. Positions are weighted by their share of
    valid pixels; an image without valid pixels gives NaN.

    >>> mean_and_std(torch.tensor([[[[1.0, 3.0]]]])).tolist()
    [[2.0, 1.0]]
    """
    if valid is None:
        weights = torch.ones_like(features[:, :1])
    else:
        weights = resize_valid(valid.float(), features)[:, None]  # (N, 1, H, W)
        features = torch.where(weights > 0, features, 0.0)  # NaN times a weight of 0 would still be NaN
    weights = weights / weights.sum((2, 3), keepdim=True)
    mean = (features * weights).sum((2, 3), keepdim=True)
    variance = ((features - mean).square() * weights).sum((2, 3))
    return torch.cat([mean.flatten(1), variance.sqrt()], 1)


def _cross_validated(source: np.ndarray, target: np.ndarray) -> float:
    """Return the accuracy (0..1) of a probe between the same number of images of each domain, in random order."""
    from sklearn.exceptions import ConvergenceWarning  # imported here: it takes a second, and most jobs never probe
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = len(source)
    features = np.concatenate([source, target]).astype(np.float64)
    domains = np.repeat([0, 1], count)
    # The same number of both domains in each fold. StratifiedKFold allows one more of one domain, which is then missing in
    # training: noise on 6 + 6 images gave 0.44 (mean of 300 draws) instead of 0.5.
    folds = PredefinedSplit(np.tile(np.arange(count) % min(FOLDS, count), 2))
    regression = LogisticRegression(C=REGULARIZATION, class_weight="balanced", max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        # a fit that has not quite converged is still a classifier, and is scored like any other
        warnings.simplefilter("ignore", ConvergenceWarning)
        answers = cross_val_predict(make_pipeline(StandardScaler(), regression), features, domains, cv=folds)
    return float(np.mean(answers == domains))
