"""Builds the adaptation method that the settings name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dann_experiments.adaptation.companions.appearance import Appearance
from dann_experiments.adaptation.companions.companion import Part, WithCompanions
from dann_experiments.adaptation.companions.entropy import EntropyMinimization, MaximumSquares
from dann_experiments.adaptation.companions.fda import FourierAdaptation
from dann_experiments.adaptation.companions.histogram import HistogramMatching
from dann_experiments.adaptation.companions.moments import MomentMatching
from dann_experiments.adaptation.companions.self_training import SelfTraining
from dann_experiments.adaptation.companions.style import Style
from dann_experiments.adaptation.companions.weak_labels import WeakLabels
from dann_experiments.adaptation.dann import DANNMethod, LambdaZero, SourceOnly
from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.adaptation.own_class import find_class
from dann_experiments.adaptation.schedules import ConstantScheduler, DANNScheduler, LambdaScheduler, LinearScheduler
from dann_experiments.config.companions import CompanionTerm
from dann_experiments.config.errors import InputError

METHODS: dict[str, type[DomainAdaptationMethod]] = {
    "dann": DANNMethod,
    "lambda_zero": LambdaZero,
    "source_only": SourceOnly,
}
LOSSES: dict[str, type[EntropyMinimization | MaximumSquares]] = {
    one.name: one for one in (EntropyMinimization, MaximumSquares)
}
COMPANIONS: dict[str, type[Part]] = {
    one.name: one
    for one in (*LOSSES.values(), SelfTraining, WeakLabels, Style, MomentMatching, HistogramMatching, FourierAdaptation)
}


def build_schedule(kind: str, gamma: float) -> LambdaScheduler:
    """Return the schedule of `kind` dann, linear or constant; only dann uses `gamma`."""
    if kind == "dann":
        return DANNScheduler(gamma)
    return LinearScheduler() if kind == "linear" else ConstantScheduler()


def build_method(
    name: str,
    feature_layer: Sequence[str],
    channels: Mapping[str, int],
    given_channels: int | Sequence[int] | None,
    schedule: LambdaScheduler,
    companions: Sequence[Part] = (),
    **arguments: Any,
) -> DomainAdaptationMethod:
    """Return a built-in method, with companions if there are any.

    `channels`: layer -> channels, as read from the network. Raises InputError if `given_channels` is not None and differs.
    """
    if companions:
        method = build_method(name, feature_layer, channels, given_channels, schedule, **arguments)
        return WithCompanions(method, companions)
    if name == "source_only":
        return SourceOnly()
    actual = [channels[layer] for layer in feature_layer]
    if given_channels is not None:
        given = [given_channels] if isinstance(given_channels, int) else list(given_channels)
        if given != actual:
            raise InputError(
                f"domain_adaptation.method.in_channels is {given_channels}, but {list(feature_layer)} has {actual} "
                f"channels; give {actual[0] if len(actual) == 1 else actual}, or null to read it from the network."
            )
    return METHODS[name](list(feature_layer), actual, lambda_schedule=schedule, **arguments)  # pyright: ignore[reportCallIssue]


def build_companion(term: CompanionTerm, seed: int, ignore_index: int) -> Part:
    """Return the companion of a term of the settings; `seed` is that of its random draws."""
    if term.name == "self_training":
        return SelfTraining(term.weight, term.ramp, term.threshold, term.ema_decay, seed, ignore_index)
    if term.name == "weak_labels":
        return WeakLabels(term.weight, term.ramp, ignore_index)
    if term.name in LOSSES:
        return LOSSES[term.name](term.weight, term.ramp)
    return _appearance(term, seed)


def _appearance(term: CompanionTerm, seed: int) -> Appearance:
    if term.name == "moments":
        return MomentMatching(term.probability, term.space, seed)
    if term.name == "fda":
        return FourierAdaptation(term.probability, term.band, seed)
    return Style(term.probability, seed) if term.name == "style" else HistogramMatching(term.probability, seed)


def load_own_method(
    class_path: str, init_args: Mapping[str, Any], channels: Mapping[str, int]
) -> DomainAdaptationMethod:
    """Return a user's method, `package.module.Class(**init_args)`.

    A constructor with a parameter `channels` gets the mapping layer -> channels of the captured layers. Raises InputError if the
    class cannot be imported, is not a DomainAdaptationMethod or refuses `init_args`.
    """
    where = f"domain_adaptation.method.class_path is {class_path!r}"
    try:
        method = find_class(class_path)
    except ImportError as error:
        raise InputError(f"{where}, which cannot be imported ({error}); is its package installed?") from None
    if not (isinstance(method, type) and issubclass(method, DomainAdaptationMethod)):
        raise InputError(f"{where}, which is not a subclass of dann_experiments.DomainAdaptationMethod.")
    arguments = dict(init_args)
    if "channels" in method.__init__.__code__.co_varnames[: method.__init__.__code__.co_argcount]:
        arguments.setdefault("channels", dict(channels))
    if "weak_labels" in method.needs:
        raise InputError(
            f"{where}, which needs weak_labels; only the companion weak_labels of a built-in method gets them."
        )
    try:
        return method(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}, whose constructor refuses init_args {dict(init_args)}: {error}") from None
