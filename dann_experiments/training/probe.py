"""Is the domain gap smaller? A fresh, simple probe on pooled features, and what it says beside the run's own classifier.

The run's own classifier is one half of a game: that it is confused may mean that the features are alike, or that it is weak.
So after training a classifier that never played, a regularised logistic regression, is fitted to features of both domains and
judged on images it was not fitted to. Its accuracy gives the proxy A-distance (Ben-David et al. 2007 and 2010; Ganin et al.
2016, section 3.2).

Letters: N images, C channels, H x W positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, functional
from torch.utils.data import DataLoader, default_collate

from dann_experiments.adaptation.dann import OUTPUT_LAYER
from dann_experiments.adaptation.domain_classifier import resize_valid
from dann_experiments.models.networks import output_stride
from dann_experiments.models.passes import forward_to_taps
from dann_experiments.models.taps import Tap, evaluating

FEWEST_IMAGES = 4
"""Images a domain needs for a probe: with 4 it is fitted four times to 3 + 3 images, which is little enough."""
FOLDS = 5
MOST_DRAWS = 5
"""How often at most the larger domain is drawn from, to be compared with all of the smaller one."""
REGULARISATION = 0.1
"""`C` of the logistic regression on standardised features. Pure noise gives 0.5 with any C, for the images that judge were not
fitted to. On real differences 0.1 was within 0.02 of the best of 1e-4 ... 1 on drawn cases of 8 to 1024 features and 6 to 300
images a domain; 1e-3 and less lose differences in few, collinear features (0.62 for 0.93)."""
MOST_ITERATIONS = 1000

CONFUSED = (0.4, 0.6)
"""Balanced accuracy of a confused classifier: around the chance of 0.5."""
ADVERSARY_WINS = 0.9
"""From here on the classifier hardly errs: the network does not (or cannot) hide the domain."""
PROBE_LOW = 0.65
"""Below, the probe hardly tells the domains apart; an A-distance of 0.6."""

FEW_PICTURES = "or the images are windows of few pictures, which are told apart whatever their domain"
NOT_ENOUGH = "Alignment by itself does not make segmentation better (Zhao et al. 2019): compare the IoU."


@dataclass(frozen=True)
class Probe:
    """How well a fresh classifier tells the domains apart."""

    accuracy: float
    """Balanced accuracy, 0..1, on images that the probe was not fitted to; 0.5 is chance."""
    a_distance: float
    """Proxy A-distance, 0 (alike) .. 2 (told apart without error)."""
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
    """Proxy A-distance 2 (1 - 2 error) with error = 1 - accuracy, in 0..2 (Ben-David et al. 2007, 2010).

    An accuracy below 0.5 gives 0: the distance is defined by the best classifier of the class, and turning a classifier's
    answers round makes one that errs in at most half of the cases. What is below 0.5 is noise.
    """
    return min(max(2 * (1 - 2 * (1 - accuracy)), 0.0), 2.0)


def pooled_features(
    network: Module, taps: Sequence[Tap], loader: DataLoader, most_images: int = 500
) -> dict[str, np.ndarray]:
    """By layer (N, 2C) float32: mean, then standard deviation over the positions with data, an image a row.

    The mean alone would be weak where a layer has few channels (`segmentation_head` has one a class) and blind to textures
    that leave the mean as it is. Positions count by the share of valid pixels behind them; images without a valid pixel
    are left out. Features of `segmentation_head` are class logits, taken as probabilities, as the run's own classifier does.

    `loader` comes from `eval_loader` (a batch has one image size). Of more than `most_images` items one is drawn from each of
    `most_images` stretches of equal length: spread over the whole set, the same at each call, and never only the left column of a
    grid of windows. In eval mode, without gradients, no layer behind the deepest tap; each module's mode is given back.
    """
    by_name = {tap.name: tap for tap in taps}  # a layer named twice would never be "all taps reached"
    if not by_name:
        return {}
    device = next(network.parameters()).device
    rows: dict[str, list[Tensor]] = {name: [] for name in by_name}
    with evaluating(network):
        for batch in _spread(loader, most_images):
            images, valid = batch["image"].to(device), batch.get("valid")
            if valid is not None:
                valid = valid.to(device)
                known = (valid > 0).any(2).any(1)
                images, valid = images[known], valid[known]
                if not len(images):
                    continue
            images, valid = _filled_up(network, images, valid)
            for name, features in forward_to_taps(network, images, list(by_name.values())).items():
                rows[name].append(_mean_and_std(name, features.float(), valid).cpu())
    return {
        name: torch.cat(parts).numpy() if parts else np.zeros((0, 2 * by_name[name].channels), np.float32)
        for name, parts in rows.items()
    }


def probe(source: np.ndarray, target: np.ndarray, seed: int = 0) -> Probe | None:
    """A fresh classifier between features of the source (N, F) and of the target (M, F), cross-validated.

    Logistic regression on features that are standardised by the training folds; 5 folds, stratified, fewer for fewer images.
    Domains of unequal size are compared at equal size, over up to 5 draws from the larger one: with more features than images
    weighting the classes does not help, the classifier calls nearly everything the larger domain, and a true difference
    would look like 0.5. The same `seed` gives the same numbers.

    A row counts as an image of its own. Windows of one picture resemble each other, so that with one to five pictures a domain a
    probe tells the *pictures* apart: drawn from one distribution, 40 windows of 5 pictures each gave 1.0, of 20 pictures 0.7.

    None where it cannot be done: fewer than 4 images in a domain, or features that are not finite (a network that diverged).
    """
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
    """The mean over layers, for the plain names `da/probe_acc` and `da/a_distance`; None if no layer could be probed."""
    made = [item for item in probes if item is not None]
    if not made:
        return None
    accuracy = sum(item.accuracy for item in made) / len(made)
    distance = sum(item.a_distance for item in made) / len(made)
    return Probe(accuracy, distance, made[0].images)


def explain(domain_acc_val: float | None, before: Probe | None, after: Probe | None, adversary: bool = True) -> str:
    """What the run's own classifier and the probe say together, as text for the run.

    `domain_acc_val`: balanced accuracy (0..1) of the run's own classifier on held-out images in eval mode; None for a method
    without one. `before`, `after`: probe of the warm start and of the adapted network on the same images; None = not made.
    `adversary`: False for the lambda = 0 control, whose network feels nothing of its classifier.
    """
    if domain_acc_val is None:
        finding = "No classifier took part in this run"
        if after is None:
            finding += "."
        elif _low(after):
            finding += "; as far as a fresh probe tells, the features of the domains are alike."
        else:
            finding += f"; the features of the domains differ ({FEW_PICTURES})."
        return " ".join((finding, _probe_sentence(before, after), NOT_ENOUGH))
    number = f"balanced accuracy {domain_acc_val:.2f}, chance is 0.50"
    if not adversary:
        finding = (
            f"With lambda = 0 the network feels nothing of the run's own classifier ({number}): any change of the probe comes "
            "from more training and from BatchNorm."
        )
    elif domain_acc_val < CONFUSED[0]:
        finding = (
            f"The run's own classifier mistakes the domains for each other ({number}): it lags behind the network, which in our "
            "trials helped nothing; raise discriminator_lr, or lower lambda_da."
        )
    elif domain_acc_val <= CONFUSED[1]:
        finding = f"The run's own classifier is confused ({number}), {_if_confused(before, after)}"
    elif domain_acc_val < ADVERSARY_WINS:
        finding = (
            f"The run's own classifier still tells some of the images apart ({number}): the domains are partly aligned."
        )
        finding += _sees_more(after)
    else:
        finding = (
            f"The run's own classifier hardly errs ({number}), so the adversary wins: lambda_da is too low for the reversed "
            "gradient to matter (raise it), or the classifier is too strong (lower discriminator_lr)."
        )
        finding += _sees_more(after)
    return " ".join((finding, _probe_sentence(before, after), NOT_ENOUGH))


def _if_confused(before: Probe | None, after: Probe | None) -> str:
    if after is None:
        return "but without a probe nobody can say whether the domains are aligned or the classifier is weak."
    if not _low(after):
        return (
            "but a fresh probe is not: the features still differ, and the classifier is too weak or trained too little; raise "
            f"hidden_size or discriminator_lr ({FEW_PICTURES})."
        )
    aligned = "and so is a fresh probe: as far as these features tell, the domains are aligned"
    return f"{aligned}{', as they were in the warm start' if before is not None and _low(before) else ''}."


def _sees_more(after: Probe | None) -> str:
    if after is None or not _low(after):
        return ""
    return " What it goes by does not show in the mean and standard deviation of an image, which is all that the probe sees."


def _probe_sentence(before: Probe | None, after: Probe | None) -> str:
    if after is None:
        return f"No probe: fewer than {FEWEST_IMAGES} images with data in a domain, or features that are not finite."
    path = "" if before is None else f"{before.accuracy:.2f} before -> "
    text = (
        f"Probe accuracy {path}{after.accuracy:.2f} (standard error about {after.standard_error:.2f}; {after.images[0]} source "
        f"and {after.images[1]} target images), A-distance {after.a_distance:.2f}"
    )
    if before is not None:
        change = after.accuracy - before.accuracy
        # as if the two were independent; they share their images, so that the true error is rather smaller
        error = math.hypot(before.standard_error, after.standard_error)
        size = "no more than noise" if abs(change) < 2 * error else "more than noise"
        text += f"; the change of {change:+.2f} has a standard error of about {error:.2f} and is {size}"
    if abs(after.accuracy - PROBE_LOW) < 2 * after.standard_error:
        text += f"; too few images to say on which side of {PROBE_LOW} it lies"
    return text + "."


def _low(after: Probe) -> bool:
    return after.accuracy < PROBE_LOW


def _spread(loader: DataLoader, most: int) -> Iterator[Mapping[str, Tensor]]:
    """Batches of the loader, or of `most` of its items spread over the set; neighbours of one size together."""
    dataset: Any = loader.dataset
    if len(dataset) <= most:
        yield from loader
        return
    edges = np.arange(most + 1) * len(dataset) // most
    chosen = np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()
    batch_sampler: Any = loader.batch_sampler
    batch_size = loader.batch_size or max(len(batch) for batch in batch_sampler)  # None with a sampler of batches
    waiting: list[dict[str, Tensor]] = []
    for index in chosen:  # by hand: which of the chosen ones are of one size is known only from the items
        item = dataset[index]
        if waiting and (len(waiting) == batch_size or item["image"].shape != waiting[0]["image"].shape):
            yield default_collate(waiting)
            waiting = []
        waiting.append(item)
    yield default_collate(waiting)


def _filled_up(network: Module, images: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Images with sides that the network takes, as `logits_of_any_size` does it; what was added is not valid."""
    height, width = images.shape[-2:]
    stride = output_stride(network)
    padding = (0, -width % stride, 0, -height % stride)
    if not any(padding):
        return images, valid
    if valid is None:
        valid = torch.ones((len(images), height, width), device=images.device)
    return functional.pad(images, padding, mode="replicate"), functional.pad(valid, padding)


def _mean_and_std(layer: str, features: Tensor, valid: Tensor | None) -> Tensor:
    """(N, 2C) from features (N, C, H, W) and validity (N, h, w)."""
    if layer == OUTPUT_LAYER:
        features = features.softmax(1)
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
    """Accuracy (0..1) of a probe between as many images of either domain, in random order; balanced, therefore."""
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import, and most jobs never probe
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = len(source)
    features = np.concatenate([source, target]).astype(np.float64)
    domains = np.repeat([0, 1], count)
    # As many of either domain in each fold. StratifiedKFold allows one more of one domain, which then is missing in training:
    # noise on 6 + 6 images came out at 0.44 (mean of 300 draws) instead of 0.5.
    folds = PredefinedSplit(np.tile(np.arange(count) % min(FOLDS, count), 2))
    regression = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        # a fit that is not quite at its optimum is a classifier too, and is judged as one
        warnings.simplefilter("ignore", ConvergenceWarning)
        answers = cross_val_predict(make_pipeline(StandardScaler(), regression), features, domains, cv=folds)
    return float(np.mean(answers == domains))
