"""Explains a run's domain accuracy and probe accuracy in words, and says what to change."""

from __future__ import annotations

import math

from dann_experiments.scores.domain_probe import FEWEST_IMAGES, Probe

CONFUSED = (-0.2, 0.2)
"""Range of the skill of a confused classifier, around chance: for two domains, a balanced accuracy of 0.4 to 0.6."""
ADVERSARY_WINS = 0.8
"""From this skill on the classifier hardly errs: the network does not (or cannot) hide the domain. For two domains, 0.9."""
PROBE_LOW = 0.65
"""Below this accuracy the probe can hardly distinguish the domains; corresponds to an A-distance of 0.6."""

FEW_PICTURES = "or the images are windows cut from few pictures, which can be distinguished regardless of their domain"
NOT_PROBED = "Probe accuracy and A-distance were not measured: monitor.probe is false."
NOT_ENOUGH = "Alignment by itself does not make segmentation better (Zhao et al. 2019): compare the IoU."


def explain(
    domain_acc_val: float | None,
    before: Probe | None,
    after: Probe | None,
    adversary: bool = True,
    probed: bool = True,
    domains: int = 2,
    harmed: bool = False,
) -> str:
    """Explain the results of the run's own classifier and of the probe together, as text for the run.

    `domain_acc_val`: balanced accuracy (0..1) of the run's own classifier on held-out images in eval mode; None for a method
    without one. `before`, `after`: probe of the warm start and of the adapted network on the same images; None if not measured.
    `adversary`: False for the lambda = 0 control, whose network gets no gradient from its classifier. `probed`: False if the
    settings switch the probe off. `domains`: number of classes of the run's own classifier; chance is 1 / domains. `harmed`: the
    run was warned that it forgets the source or that its target maps are implausible, so no advice may be to adapt more.
    """
    probe_sentence = _probe_sentence(before, after) if probed else NOT_PROBED
    if domain_acc_val is None:
        finding = "No classifier was trained in this run"
        if after is None:
            finding += "."
        elif _low(after):
            finding += "; according to a fresh probe, the features of the domains are alike."
        else:
            finding += f"; the features of the domains differ ({FEW_PICTURES})."
        return " ".join((finding, probe_sentence, NOT_ENOUGH))
    chance = 1 / domains
    number = f"balanced accuracy {domain_acc_val:.2f}, chance is {chance:.2f}" + (
        f" for {domains} domains" if domains > 2 else ""
    )
    skill = _skill(domain_acc_val, chance)
    if not adversary:
        finding = (
            f"With lambda = 0 the network gets no gradient from the run's own classifier ({number}): any change of the probe "
            "comes from more training and from BatchNorm."
        )
    elif skill < CONFUSED[0]:
        finding = (
            f"The run's own classifier mistakes the domains for each other ({number}): it lags behind the network, which did "
            "not help in our trials; raise discriminator_lr, or lower lambda_da."
        )
    elif skill <= CONFUSED[1]:
        finding = f"The run's own classifier is confused ({number}), {_if_confused(before, after)}"
    elif skill < ADVERSARY_WINS:
        finding = f"The run's own classifier can still distinguish some of the images ({number}): the domains are partly aligned."
        finding += _sees_more(after)
    elif harmed:
        finding = (
            f"The run's own classifier hardly errs ({number}), so the adversary wins. Yet the network has already been "
            "harmed (see the run's warnings), which a larger lambda_da would make worse: lower discriminator_lr, or try a "
            "method without an adversary (docs/which-method.md)."
        )
        finding += _sees_more(after)
    else:
        finding = (
            f"The run's own classifier hardly errs ({number}), so the adversary wins: lambda_da is too low for the reversed "
            "gradient to matter (raise it), or the classifier is too strong (lower discriminator_lr)."
        )
        finding += _sees_more(after)
    return " ".join((finding, probe_sentence, NOT_ENOUGH))


def _skill(accuracy: float, chance: float) -> float:
    """Return an accuracy on a scale on which chance is 0, an accuracy of 1 is 1, and one of 0 is -1."""
    distance = accuracy - chance
    return round(distance / (1 - chance if distance > 0 else chance), 9)


def _if_confused(before: Probe | None, after: Probe | None) -> str:
    if after is None:
        return "but without a probe it is unknown whether the domains are aligned or the classifier is weak."
    if not _low(after):
        return (
            "but a fresh probe is not: the features still differ, and the classifier is too weak or trained too little; raise "
            f"hidden_size or discriminator_lr ({FEW_PICTURES})."
        )
    aligned = "and so is a fresh probe: judging by these features, the domains are aligned"
    return f"{aligned}{', as they were in the warm start' if before is not None and _low(before) else ''}."


def _sees_more(after: Probe | None) -> str:
    if after is None or not _low(after):
        return ""
    return " It uses differences that the mean and standard deviation per image, the input of the probe, do not show."


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
        # as if the two were independent; they share their images, so the true error is probably smaller
        error = math.hypot(before.standard_error, after.standard_error)
        size = "no more than noise" if abs(change) < 2 * error else "more than noise"
        text += f"; the change of {change:+.2f} has a standard error of about {error:.2f} and is {size}"
    if abs(after.accuracy - PROBE_LOW) < 2 * after.standard_error:
        text += f"; too few images to decide whether it is above or below {PROBE_LOW}"
    return text + "."


def _low(after: Probe) -> bool:
    return after.accuracy < PROBE_LOW
