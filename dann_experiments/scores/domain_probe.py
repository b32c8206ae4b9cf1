"""The probe: is the gap between two domains small, as a fresh, simple classifier on features sees it?

A run's own domain classifier is one half of a game: if it is confused, the features may be alike, or the classifier weak. So a
classifier that never played, a regularized logistic regression, is fitted to features of both domains and judged on images that
it was not fitted to. Its accuracy gives the proxy A-distance (Ben-David et al. 2007 and 2010; Ganin et al. 2016, section 3.2).

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
"""Images per domain that a probe needs: with 4 it is fitted four times to 3 + 3 images, which is little enough."""
FOLDS = 5
MOST_DRAWS = 5
"""How often at most the larger domain is drawn from, to be compared with all of the smaller one."""
REGULARIZATION = 0.1
"""`C` of the logistic regression on standardized features. Pure noise gives 0.5 with any C, on images that it was not
fitted to. On real differences 0.1 was within 0.02 of the best of 1e-4 ... 1 on drawn cases of 8 to 1024 features and 6 to 300
images per domain; 1e-3 and less lose differences in few, collinear features (0.62 instead of 0.93)."""
MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """How well a fresh classifier tells two domains apart."""

    accuracy: float
    """Balanced accuracy, 0..1, on images that the probe was not fitted to; 0.5 is chance."""
    a_distance: float
    """Proxy A-distance, 0 (alike) to 2 (told apart without error)."""
    images: tuple[int, int]
    """Images of the source and of the target that took part."""

    @property
    def standard_error(self) -> float:
        """Approximate standard error of the accuracy, sqrt(p (1 - p) / n).

        n is twice the harmonic mean of the two numbers of images, their sum where they are equal (the less sure domain rules the
        mean of two). p has one right and one wrong answer added (Laplace), so that 1.0 on six images has an error too. Folds
        share training images: on pure noise the true error was up to 1.25 times this.
        """
        count = 4 / (1 / self.images[0] + 1 / self.images[1])
        p = (self.accuracy * count + 1) / (count + 2)
        return math.sqrt(p * (1 - p) / count)


def a_distance(accuracy: float) -> float:
    """Return the proxy A-distance 2 (1 - 2 error) with error = 1 - accuracy, 0 to 2 (Ben-David et al. 2007, 2010).

    An accuracy below 0.5 gives 0: the distance is defined by the best classifier of the class, and inverting a classifier's
    answers makes one that errs in at most half of the cases. What is below 0.5 is noise.

    >>> a_distance(0.75)
    1.0
    """
    return min(max(2 * (1 - 2 * (1 - accuracy)), 0.0), 2.0)


def probe(source: Tensor | np.ndarray, target: Tensor | np.ndarray, seed: int = 0) -> Probe | None:
    """Cross-validate a fresh classifier between features of the source (N, F) and of the target (M, F).

    Logistic regression on features that are standardized by the training folds; 5 folds, stratified, fewer for fewer images.
    Domains of unequal size are compared at equal size, over up to 5 draws from the larger one: with more features than images
    weighting the classes does not help, the classifier calls nearly everything the larger domain, and a true difference
    would look like 0.5. The same `seed` gives the same numbers.

    Each row counts as an image of its own. Windows of one picture resemble each other, so with one to five pictures per domain a
    probe tells the *pictures* apart: drawn from one distribution, 40 windows of 5 pictures each gave 1.0, of 20 pictures 0.7.

    Returns None for fewer than 4 images in a domain, and for features that are not finite (a network that diverged).

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
    # resize: the smaller domain takes part as a whole each time, the larger one with other images each time
    sides = [domain[np.resize(random.permutation(len(domain)), draws * count)] for domain in (source, target)]
    parts = [slice(draw * count, (draw + 1) * count) for draw in range(draws)]
    accuracy = float(np.mean([_cross_validated(sides[0][part], sides[1][part]) for part in parts]))
    return Probe(accuracy, a_distance(accuracy), (min(len(source), draws * count), min(len(target), draws * count)))


def mean_probe(probes: Sequence[Probe | None]) -> Probe | None:
    """Return the mean over layers; None if no layer could be probed."""
    made = [item for item in probes if item is not None]
    if not made:
        return None
    accuracy = sum(item.accuracy for item in made) / len(made)
    distance = sum(item.a_distance for item in made) / len(made)
    return Probe(accuracy, distance, made[0].images)


def mean_and_std(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return mean, then standard deviation over the positions with data, (N, 2C): what `probe` is usually fitted to.

    The mean alone would be weak where a layer has few channels, and blind to textures that leave the mean as it is. `features`:
    (N, C, H, W); `valid`: (N, h, w) at any resolution, 0 where a pixel has no data. Positions count by the share of valid pixels
    behind them; an image without any gives NaN.

    >>> mean_and_std(torch.tensor([[[[1.0, 3.0]]]])).tolist()
    [[2.0, 1.0]]
    """
    if valid is None:
        weights = torch.ones_like(features[:, :1])
    else:
        weights = resize_valid(valid.float(), features)[:, None]  # (N, 1, H, W)
        features = torch.where(weights > 0, features, 0.0)  # a NaN would pass a weight of 0
    weights = weights / weights.sum((2, 3), keepdim=True)
    mean = (features * weights).sum((2, 3), keepdim=True)
    variance = ((features - mean).square() * weights).sum((2, 3))
    return torch.cat([mean.flatten(1), variance.sqrt()], 1)


def _cross_validated(source: np.ndarray, target: np.ndarray) -> float:
    """Return the accuracy (0..1) of a probe between equally many images of each domain, in random order: it is balanced."""
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import, and most jobs never probe
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = len(source)
    features = np.concatenate([source, target]).astype(np.float64)
    domains = np.repeat([0, 1], count)
    # Equally many of each domain in each fold. StratifiedKFold allows one more of one domain, which then is missing in training:
    # noise on 6 + 6 images came out at 0.44 (mean of 300 draws) instead of 0.5.
    folds = PredefinedSplit(np.tile(np.arange(count) % min(FOLDS, count), 2))
    regression = LogisticRegression(C=REGULARIZATION, class_weight="balanced", max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        # a fit that is not quite at its optimum is a classifier too, and is judged as one
        warnings.simplefilter("ignore", ConvergenceWarning)
        answers = cross_val_predict(make_pipeline(StandardScaler(), regression), features, domains, cv=folds)
    return float(np.mean(answers == domains))
