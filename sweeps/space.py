"""The search space: read from a mapping, checked against the settings that it changes, and sampled by an Optuna trial.

Every parameter is a dotted setting of `adapt`. Optuna takes only plain values (numbers, texts, booleans); any other value,
such as a list of layers, is represented by its YAML text.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from dann_experiments.config import Config, InputError, config_to_dict, known_keys, replace
from dann_experiments.config.nearest import meant
from dann_experiments.config.parsing import scalar
from dann_experiments.jobs import build
from dann_experiments.models.taps import Tap, list_layers
from dann_experiments.names import Key

FOLLOW_THE_LAYER = ("domain_adaptation.method.in_channels", Key.FEATURE_LAYERS)
NOT_SEARCHED = {
    "pretraining.": "the source model is trained once and shared by all trials",
    "tracking.": "it sets where runs are stored, not what they do",
    "seed": "the best seed is only luck; `confirm` runs the best trials over several",
    "data.num_workers": "it changes no result",
    "data.memory_gb": "it changes no result",
    "data.disk_cache_gb": "it changes no result",
    "threads": "it changes only the last digits",
    "trainer.devices": "trials run in one process",
    "trainer.enable_progress_bar": "it changes no result",
    "data.embedded.folder": "it changes no result",
    "monitor.forgetting_threshold": "it decides which trials may win",
    "monitor.expected_shares": "it says what is known of the target",
}
FIELDS = {
    "float": {"low", "high", "log", "step"},
    "int": {"low", "high", "log", "step"},
    "categorical": {"choices"},
}
AUTO = "auto"
MOST_POINTS = 100_000  # in the grid of one setting
Label = str | int | float | bool | None


@dataclass(frozen=True)
class Parameter:
    """One searched setting."""

    key: str
    distribution: BaseDistribution
    when: Mapping[str, Sequence[Label]]
    """Searched setting -> values. This parameter is searched only if each of these settings has one of its values."""

    def active(self, chosen: Mapping[str, Label]) -> bool:
        """Return whether it is searched, for the values chosen so far."""
        return all(key in chosen and chosen[key] in values for key, values in self.when.items())

    def ends(self) -> list[Label]:
        """Return all choices, or both ends of the range."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        assert isinstance(self.distribution, (FloatDistribution, IntDistribution))
        return [self.distribution.low, self.distribution.high]

    def grid(self) -> list[Label]:
        """Return every value. Raises InputError if there are infinitely many, or more than MOST_POINTS."""
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return list(found.choices)
        assert isinstance(found, (FloatDistribution, IntDistribution))
        if found.step is None or found.log:
            raise InputError(f"space: {self.key} has no grid; give it a step, or choices, for sampler grid.")
        if (found.high - found.low) / found.step > MOST_POINTS:
            raise InputError(f"space: {self.key} has a grid of more than {MOST_POINTS} values; give a larger step.")
        low, high, step = (
            Decimal(str(value)) for value in (found.low, found.high, found.step)
        )  # 0.3, not 0.30000000000000004
        if isinstance(found, IntDistribution):
            return list(range(found.low, found.high + 1, found.step))
        return [float(low + index * step) for index in range(int((high - low) / step) + 1)]


@dataclass(frozen=True)
class Space:
    """All searched settings, parents before the children that depend on them."""

    parameters: tuple[Parameter, ...]

    @property
    def conditional(self) -> bool:
        """True if some parameter depends on another."""
        return any(parameter.when for parameter in self.parameters)

    def suggest(self, trial: optuna.Trial) -> dict[str, Label]:
        """Draw a value for each active parameter."""
        chosen: dict[str, Label] = {}
        for parameter in self.parameters:
            if parameter.active(chosen):
                chosen[parameter.key] = _suggest(trial, parameter)
        return chosen

    def grid(self) -> Iterator[dict[str, Label]]:
        """Yield every point, without inactive parameters."""

        def points(done: dict[str, Label], rest: Sequence[Parameter]) -> Iterator[dict[str, Label]]:
            if not rest:
                yield done
            elif not rest[0].active(done):
                yield from points(done, rest[1:])
            else:
                for value in rest[0].grid():
                    yield from points({**done, rest[0].key: value}, rest[1:])

        return points({}, self.parameters)

    def values_of(self, config: Config) -> dict[str, Label] | None:
        """Return the point of the space with the values of these settings; None if they are outside the space."""
        chosen, outside = self._values_of(config)
        return chosen if outside is None else None

    def outside(self, config: Config) -> str | None:
        """Return the first setting whose value is outside the space, with this value; None if there is none."""
        return self._values_of(config)[1]

    def _values_of(self, config: Config) -> tuple[dict[str, Label], str | None]:
        settings = config_to_dict(config)
        chosen: dict[str, Label] = {}
        for parameter in self.parameters:
            if not parameter.active(chosen):
                continue
            value = label_of(_found(settings, parameter.key))
            distribution = parameter.distribution
            if isinstance(distribution, CategoricalDistribution):
                # True == 1 in Python, but not in a configuration
                match = [choice for choice in distribution.choices if choice == value and type(choice) is type(value)]
                if not match:
                    return chosen, f"{parameter.key} {value}"
                chosen[parameter.key] = match[0]
            else:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not distribution._contains(distribution.to_internal_repr(value)):
                    return chosen, f"{parameter.key} {value}"
                chosen[parameter.key] = value
        return chosen, None

    def described(self) -> dict[str, Any]:
        """Return the space as plain values, to store it with the study and to compare it later."""
        described = {}
        for parameter in self.parameters:
            found = parameter.distribution
            if isinstance(found, CategoricalDistribution):
                entry: dict[str, Any] = {"type": "categorical", "choices": list(found.choices)}
            else:
                assert isinstance(found, (FloatDistribution, IntDistribution))
                kind = "float" if isinstance(found, FloatDistribution) else "int"
                entry = {"type": kind, "low": found.low, "high": found.high, "log": found.log, "step": found.step}
            if parameter.when:
                entry["when"] = {key: list(values) for key, values in parameter.when.items()}
            described[parameter.key] = entry
        return described


def settings_of(chosen: Mapping[str, Label]) -> dict[str, Any]:
    """Return the overrides for a point of the space. Settings that depend on the feature layer are reset with it."""
    overrides = {key: scalar(value, key) for key, value in chosen.items()}
    if Key.FEATURE_LAYER in overrides:
        overrides |= {key: None for key in FOLLOW_THE_LAYER if key not in overrides}
    return overrides


def label_of(value: Any) -> Label:
    """Return a setting's value as Optuna takes it: unchanged, or as YAML text."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()


def read_space(entries: Mapping[str, Any], config: Config) -> Space:
    """Read a space and check it against the settings that it changes.

    Raises InputError, with the key, for an unknown key, a wrong type, a layer that does not exist, an end of a range that the
    settings do not allow, and a dependence on a setting that is not searched.
    """
    if not entries:
        raise InputError("space is empty; name the settings to search, as sweeps/dann.yaml does.")
    for key in entries:
        _check_key(key)
    parameters = [_read_parameter(key, entries[key], entries, config) for key in _parents_first(entries)]
    space = Space(tuple(parameters))
    for parameter in space.parameters:
        _check_ends(parameter, space, config)
    return space


def read_stored(described: Mapping[str, Any]) -> Space:
    """Return the space that `Space.described` returned. It was checked before it was stored."""
    parameters = []
    for key, entry in described.items():
        fields = {name: value for name, value in entry.items() if name not in ("type", "when")}
        kinds: dict[str, Any] = {
            "float": FloatDistribution,
            "int": IntDistribution,
            "categorical": CategoricalDistribution,
        }
        parameters.append(Parameter(key, kinds[entry["type"]](**fields), entry.get("when", {})))
    return Space(tuple(parameters))


def _check_key(key: Any) -> None:
    known = known_keys()
    if key not in known and not str(key).startswith("domain_adaptation.method.init_args."):
        same_name = [name for name in known if name.rpartition(".")[2] == str(key).rpartition(".")[2]]
        near = meant(key, same_name or known, least=0.0 if same_name else 0.55)
        raise InputError(f"space: unknown setting {key!r}{near or '; docs/settings.md lists all.'}")
    for start, reason in NOT_SEARCHED.items():
        if key.startswith(start) if start.endswith(".") else key == start:
            raise InputError(f"space: {key} cannot be searched: {reason}.")


def _parents_first(entries: Mapping[str, Any]) -> list[str]:
    order: list[str] = []

    def add(key: str, below: tuple[str, ...]) -> None:
        if key in below:
            raise InputError(f"space: {' -> '.join([*below, key])}: these depend on each other in a ring.")
        if key in order:
            return
        when = entries[key].get("when") if isinstance(entries[key], Mapping) else None
        if when is not None and not isinstance(when, Mapping):
            raise InputError(f"space: {key}.when is {when!r}; give a mapping of settings to values.")
        for parent in when or {}:
            if parent not in entries:
                raise InputError(f"space: {key} depends on {parent!r}, which is not searched; add it or remove `when`.")
            add(parent, (*below, key))
        order.append(key)

    for key in entries:
        add(key, ())
    return order


def _read_parameter(key: str, entry: Any, entries: Mapping[str, Any], config: Config) -> Parameter:
    if entry == AUTO:
        entry = {"type": "categorical", "choices": AUTO}
    if not isinstance(entry, Mapping):
        raise InputError(f"space: {key} is {entry!r}; give a mapping such as {{type: float, low: 1, high: 20}}.")
    kind = entry.get("type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise InputError(f"space: {key}.type is {kind!r}; it is one of {list(FIELDS)}.")
    unknown = sorted(str(name) for name in set(entry) - FIELDS[kind] - {"type", "when"})
    if unknown:
        raise InputError(f"space: {key} has {unknown}; type {kind} knows {sorted(FIELDS[kind])} and when.")
    if kind == "categorical":
        distribution: BaseDistribution = CategoricalDistribution(_choices(key, entry, config))
    else:
        distribution = _range(key, kind, entry)
    when = {}
    for parent, values in (entry.get("when") or {}).items():
        listed = values if isinstance(values, list) else [values]
        when[parent] = [label_of(value) for value in listed]
    return Parameter(key, distribution, when)


def _choices(key: str, entry: Mapping[str, Any], config: Config) -> list[Label]:
    choices = entry.get("choices")
    if choices == AUTO:
        if key != Key.FEATURE_LAYER:
            raise InputError(f"space: {key}.choices is 'auto', which works only for {Key.FEATURE_LAYER}.")
        return list(_useful_layers(config))
    if not isinstance(choices, list) or not choices:
        raise InputError(f"space: {key}.choices is {choices!r}; give a list.")
    labels = [label_of(choice) for choice in choices]
    if len({(type(label), label) for label in labels}) != len(labels):
        raise InputError(f"space: {key}.choices is {choices!r}; name each once.")
    return labels


def _range(key: str, kind: str, entry: Mapping[str, Any]) -> BaseDistribution:
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise InputError(f"space: {key}.log is {log!r}; give true or false.")
    whole = kind == "int"
    for name in ("low", "high", "step"):
        value = entry.get(name)
        if value is None and name == "step":
            continue
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not abs(value or 0) <= (2**63 - 1 if whole else sys.float_info.max):  # NaN fails too
            wanted = "whole number of at most 64 bit" if whole else "finite number"
            raise InputError(f"space: {key}.{name} is {value!r}; give a {wanted}.")
    low, high, step = entry["low"], entry["high"], entry.get("step")
    try:
        if whole:
            return IntDistribution(low, high, log=log, step=1 if step is None else step)
        return FloatDistribution(float(low), float(high), log=log, step=step)
    except ValueError as error:
        raise InputError(f"space: {key} from {low} to {high}: {error}") from None


def _useful_layers(config: Config) -> list[str]:
    """Return the layers of this network that can be tapped with these settings."""
    network = _network(config)
    layers = [
        layer for layer in list_layers(network, config.model.in_channels, build.blank_size(config)) if layer.useful
    ]
    stages = [layer for layer in layers if layer.name.startswith("encoder.")]
    whole = [layer for layer in layers if layer.name == "encoder"]
    if stages and whole and (stages[-1].channels, stages[-1].stride) == (whole[0].channels, whole[0].stride):
        layers.remove(stages[-1])  # `encoder` means its deepest feature map, so both are the same
    return [layer.name for layer in layers if _refused(config, {Key.FEATURE_LAYER: layer.name}) is None]


def _refused(config: Config, chosen: Mapping[str, Label]) -> InputError | None:
    try:
        changed = replace(config, settings_of(chosen))
        build.make_method(changed, _taps(changed))
    except InputError as error:
        return error
    except RuntimeError as error:  # mostly out of memory
        return InputError(f"it cannot be built: {' '.join(str(error).split())[:200]}")
    return None


_networks: dict[str, nn.Module] = {}  # only the newest one: a space is checked at many points with the same network
_found_taps: dict[str, list[Tap]] = {}  # of that network, by the settings that they depend on


def _taps(config: Config) -> list[Tap]:
    network, da = _network(config), config.domain_adaptation
    named = (da.layers, da.method.layers, da.method.name, da.method.class_path)
    key = repr((named, da.batchnorm, config.model.in_channels, build.blank_size(config)))
    if key not in _found_taps:
        _found_taps[key] = build.make_taps(config, network)
    return _found_taps[key]


def _network(config: Config) -> nn.Module:
    key = repr(config.model)
    if key not in _networks:
        network = build.make_network(config, with_weights=False, initialize=False)  # only its layers are used
        _networks.clear()
        _found_taps.clear()
        _networks[key] = network
    return _networks[key]


def _check_ends(parameter: Parameter, space: Space, config: Config) -> None:
    by_key = {other.key: other for other in space.parameters}

    def parents(of: Parameter) -> Iterator[dict[str, Label]]:
        """Yield every combination of parents' values for which `of` is searched."""
        for values in itertools.product(*of.when.values()):
            wanted = dict(zip(of.when, values, strict=True))
            above = [grand for key in wanted for grand in itertools.islice(parents(by_key[key]), 1)]
            yield {key: value for grand in above for key, value in grand.items()} | wanted

    for key, values in parameter.when.items():
        allowed = by_key[key].ends()
        for value in values:
            found = by_key[key].distribution
            fits = value in allowed
            if not isinstance(found, CategoricalDistribution):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                fits = number and found._contains(found.to_internal_repr(value))
            if not fits:
                raise InputError(
                    f"space: {parameter.key} needs {key} = {value!r}, which is none of its values ({allowed})."
                )
    for given in parents(parameter) if parameter.when else iter([{}]):
        for value in parameter.ends():
            error = _refused(config, {**given, parameter.key: value})
            if error is not None:
                where = f" (with {given})" if given else ""
                raise InputError(f"space: {parameter.key} = {value!r}{where} is refused: {error}")


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Label:
    found = parameter.distribution
    if isinstance(found, CategoricalDistribution):
        return trial.suggest_categorical(parameter.key, found.choices)
    if isinstance(found, IntDistribution):
        return trial.suggest_int(parameter.key, found.low, found.high, step=found.step, log=found.log)
    assert isinstance(found, FloatDistribution)
    return trial.suggest_float(parameter.key, found.low, found.high, step=found.step, log=found.log)


def _found(settings: Any, key: str) -> Any:
    """Return the value at a dotted name; None if it is not set (an argument of a user's own method)."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings
