"""Reads YAML files and dotted overrides and returns a checked `Config`. Only this file uses jsonargparse."""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dann_experiments.config.adaptation import MethodConfig
from dann_experiments.config.data import DomainDataConfig
from dann_experiments.config.description import plain_values, type_name
from dann_experiments.config.errors import InputError
from dann_experiments.config.label_keys import check_label_keys
from dann_experiments.config.limits import settings_of
from dann_experiments.config.nearest import meant, nearest
from dann_experiments.config.paths import local_path, near_name
from dann_experiments.config.recipes import settings_file
from dann_experiments.config.schema import Config
from dann_experiments.config.target_dialect import translate
from dann_experiments.config.terms import TERMS, with_whole_terms
from dann_experiments.config.yaml_loader import MOST_LETTERS, MOST_VALUES, YAML_ERRORS, PlainLoader, SameKey, values_in
from dann_experiments.names import DOMAINS

Settings = TypeVar("Settings")
MOST_SHOWN = 200  # characters of a wrong value in a message


def load_config(file: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read settings and check them.

    `file`: a YAML file, or the name of a recipe (`"digits"`); `overrides`: dotted name -> value, which take precedence. Values
    may be Python values or texts as on a command line (`"1e-4"`, `"[encoder, decoder]"`). All other settings have their
    defaults. Raises InputError, which names the key, its value and what to do.

    >>> config = load_config(overrides={"optimizer.lr": "1e-4", "data.source.batch_size": 4})
    >>> config.optimizer.lr, config.data.source.batch_size
    (0.0001, 4)
    """
    return _load(Config, None if file is None else settings_file(file), overrides, translate)


def load_settings(cls: type[Settings], file: str | Path | None, overrides: Mapping[str, Any]) -> Settings:
    """Read settings of another class, a frozen dataclass, as `load_config` does."""
    return _load(cls, file, overrides)


def given_settings(file: str | Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted name -> value of the settings in `file` and `overrides`, without defaults, for `replace`."""
    settings = _read_yaml(settings_file(file)) if file is not None else {}
    for key, value in overrides.items():
        _set_dotted(settings, key, _scalar(value, key, Config))
    settings = translate(settings)
    _refuse_unknown_keys(Config, settings)
    groups, given = _groups(Config), {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            if f"{prefix}{name}" in groups:
                walk(value or {}, f"{prefix}{name}.")
            else:
                given[f"{prefix}{name}"] = value

    walk(settings, "")
    return given


def config_from_dict(settings: Mapping[str, Any]) -> Config:
    """Build a config from the result of `config_to_dict`, and check it again."""
    return _checked(Config, dict(settings))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return settings as nested plain values for YAML and JSON: mappings, lists, numbers, strings."""
    return plain_values(config)


def config_to_yaml(config: Config) -> str:
    """Return a YAML text from which `load_config` reads an equal config."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, width=120)


def flatten(config: Any) -> dict[str, Any]:
    """Return dotted name -> plain value for every setting of a dataclass.

    A mapping with keys of the user (`value_map`, `color_map`, `init_args`) is one value, because stores do not accept every
    text as a name.

    >>> flatten(load_config())["trainer.max_epochs"]
    20
    """
    plain = config_to_dict(config)
    flat: dict[str, Any] = {}
    for key in _field_types(type(config)):
        value: Any = plain
        for name in key.split("."):
            value = value[name]
        flat[key] = value
    return flat


def replace(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return `config` with some settings changed (dotted name -> value), and check it again.

    >>> replace(load_config(), {"seed": 3}).seed
    3
    """
    settings = config_to_dict(config)
    for key, value in overrides.items():
        _set_dotted(settings, key, value)
    return _checked(Config, settings)


def known_keys(cls: type = Config) -> list[str]:
    """Return the dotted names of all settings."""
    return list(_field_types(cls))


def scalar(text: Any, key: str) -> Any:
    """Parse a text as the value of setting `key` on a command line; other values are returned unchanged."""
    return _scalar(text, key, Config)


def _load(
    cls: type[Settings],
    file: str | Path | None,
    overrides: Mapping[str, Any] | None,
    translated: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings,
) -> Settings:
    settings = _read_yaml(file) if file is not None else {}
    for key, value in (overrides or {}).items():
        _set_dotted(settings, key, _scalar(value, key, cls))
    return _checked(cls, translated(settings))


def _checked(cls: type[Settings], settings: dict[str, Any]) -> Settings:
    settings = with_whole_terms(settings)
    _refuse_unknown_keys(cls, settings)
    check_label_keys(settings)
    return _build(cls, _with_typed_domains(settings))


def _with_typed_domains(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which the values of named domains (`data.source.domains`) have the types of a domain's settings."""
    data = settings.get("data")
    if not isinstance(data, Mapping):
        return settings
    for role in DOMAINS:
        group = data.get(role)
        if not isinstance(group, Mapping) or not isinstance(named := group.get("domains"), Mapping):
            continue
        typed: dict[str, Any] = {}
        for name, given in named.items():
            key = f"data.{role}.domains.{name}"
            if isinstance(name, bool) or name is None:
                raise InputError(
                    f"data.{role}.domains has the key {name!r}, as YAML reads names such as no, yes and null; write it in quotes."
                )
            if not isinstance(given, Mapping):
                raise InputError(f"{key} is {_shown(given)}; give a mapping of the settings of this domain.")
            try:
                _refuse_unknown_keys(DomainDataConfig, given)
                built = _build(DomainDataConfig, dict(given))
            except InputError as error:
                raise InputError(f"{key}: {error}") from None
            typed[str(name)] = {one: plain_values(getattr(built, one)) for one in given}
        data = {**data, role: {**group, "domains": typed}}
    return {**settings, "data": data}


def _read_yaml(file: str | Path) -> dict[str, Any]:
    path = local_path(file, "config file")
    try:
        with open(path, encoding="utf-8") as opened:
            text = opened.read(MOST_LETTERS + 1)
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist{near_name(path)}.") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise InputError(f"config file {path} cannot be read: {error}") from None
    if len(text) > MOST_LETTERS:
        raise InputError(f"config file {path} has more than {MOST_LETTERS} characters; is it a file of settings?")
    try:
        settings = yaml.load(text, PlainLoader)  # noqa: S506  (a SafeLoader: builds plain values only)
    except YAML_ERRORS as error:
        what = "" if isinstance(error, yaml.YAMLError) else "a value cannot be read: "
        raise InputError(f"config file {path} is not valid YAML: {what}{' '.join(str(error).split())}") from None
    if values_in(settings) > MOST_VALUES:
        raise InputError(
            f"config file {path} is too large because of its aliases (*), or contains itself; write it out."
        )
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise InputError(f"config file {path} holds {type(settings).__name__}; give a mapping of settings.")
    return settings


def _scalar(value: Any, key: str, cls: type) -> Any:
    """Parse a text of a command line as YAML, except for settings that are texts (a run may be named 2026)."""
    if not isinstance(value, str):
        return value
    wanted = _field_types(cls).get(key)
    if wanted is str or (wanted == str | None and value not in ("null", "~", "")):
        return value
    try:
        meant = yaml.load(value, PlainLoader)  # noqa: S506
    except SameKey as error:
        raise InputError(f"{key} is {_shown(value)}, in which {error.problem}; give each key once.") from None
    except YAML_ERRORS:
        return value
    if values_in(meant) > MOST_VALUES:  # it contains itself or is too large: keep the text
        return value
    parts = typing.get_args(wanted) if typing.get_origin(wanted) in (types.UnionType, typing.Union) else (wanted,)
    if str in parts and any(typing.get_origin(part) is list for part in parts):  # a text or a list of texts
        return meant if isinstance(meant, list) or (meant is None and type(None) in parts) else value
    of_numbers = any(typing.get_args(part) and set(typing.get_args(part)) <= {int, float} for part in parts)
    return _listed(meant, parts) if of_numbers else meant


def _listed(meant: Any, parts: tuple[Any, ...]) -> Any:
    """Return `1,2,3` as a list of numbers, and a single number as a list of one if the setting takes only lists."""
    if isinstance(meant, str) and re.fullmatch(r"[-+.\w\s]+(,[-+.\w\s]+)+", meant):
        numbers = yaml.load(f"[{meant}]", PlainLoader)  # noqa: S506
        return numbers if all(isinstance(number, (int, float)) for number in numbers) else meant
    alone = isinstance(meant, (int, float)) and not isinstance(meant, bool) and not {int, float} & set(parts)
    return [meant] if alone else meant


def _set_dotted(settings: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    node = settings
    for depth, group in enumerate(groups, start=1):
        inner = node.get(group)
        if inner is not None and not isinstance(inner, dict):
            raise InputError(
                f"{key} cannot be set, because {'.'.join(groups[:depth])} is {_shown(inner)}; give a mapping there, or remove it."
            )
        node[group] = node = dict(inner or {})
    node[name] = value


def _refuse_unknown_keys(cls: type, settings: Mapping[str, Any]) -> None:
    known = _field_types(cls)
    groups = _groups(cls)

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in groups:
                if value is not None and not isinstance(value, Mapping):
                    raise InputError(f"{key} is {_shown(value)}; it is a group of settings, give a mapping.")
                walk(value or {}, f"{key}.")
            elif key not in known:
                ends = {other: other.rpartition(".")[2] for other in known}
                close = nearest(str(name).rpartition(".")[2], sorted(set(ends.values())), least=0.75)
                alike = [other for other in known if ends[other] == close]
                near = meant(key, alike, least=0.0) if alike else meant(key, known, least=0.55)
                raise InputError(f"unknown setting {_shown(key)}{near or '; `--help` lists all.'}")
            elif value is None and type(None) not in typing.get_args(known[key]):
                raise InputError(f"{key} is null, but needs a value; leave it out to use its default.")
            elif any(
                isinstance(item, int) and abs(item) >= 2**63 for item in (value if isinstance(value, list) else [value])
            ):
                raise InputError(f"{key} holds an integer of more than 63 bits; give a smaller one.")
            elif not all(map(_storable, _texts(value))):
                raise InputError(
                    f"{key} is {_shown(value)}; tracking stores keep neither NUL nor what is not UTF-8; give another one."
                )

    walk(settings, "")


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(item)


def _storable(text: str) -> bool:
    # Python reads bytes of the command line that are not UTF-8 as surrogates
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _shown(value: Any) -> str:
    """Return a value as text for a message, cut if it is long."""
    try:
        text = repr(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text)} letters)"


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    """Return dotted name -> type of every setting."""
    return {field.name: field.type for field in settings_of(cls)}


@functools.cache
def _parser(cls: type):
    from jsonargparse import ArgumentParser, set_parsing_settings

    # otherwise jsonargparse would import X from any mapping {class_path: X} in the values
    # jsonargparse builds the items of a list by their class's path
    terms = [f"{kind.__module__}.{kind.__qualname__}" for kind in TERMS.values()]
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=terms, instantiate_subclass_spec_in_any=False
    )
    parser = ArgumentParser(exit_on_error=False, prog="settings", usage="")
    parser.add_class_arguments(cls, nested_key=None)
    return parser


def _build(cls: type[Settings], settings: dict[str, Any]) -> Settings:
    from jsonargparse import ArgumentError

    parser = _parser(cls)
    try:
        given = _without_empty_groups(settings, _groups(cls))
        # without defaults if they are not needed: they take most of the time, and a sweep changes settings dozens of times
        parsed = parser.parse_object(given, defaults=not _is_complete(cls, given))
        return cls(**vars(parser.instantiate_classes(parsed)))
    except InputError:
        raise
    except (ArgumentError, TypeError, ValueError, OverflowError, RecursionError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(_readable(cls, str(error), settings)) from None


def _is_complete(cls: type, settings: Mapping[str, Any]) -> bool:
    """Return whether every setting is set."""
    for key in _field_types(cls):
        node: Any = settings
        for name in key.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return False
            node = node[name]
    return True


def _without_empty_groups(settings: Mapping[str, Any], groups: set[str], prefix: str = "") -> dict[str, Any]:
    """Return settings without empty groups. An empty group (only `data:`, or null) means its defaults."""
    kept = {}
    for key, value in settings.items():
        if f"{prefix}{key}" in groups:
            if value is not None:
                kept[key] = _without_empty_groups(value, groups, f"{prefix}{key}.")
        else:
            kept[key] = value
    # a mapping with only class_path and init_args would look like jsonargparse's own notation
    if prefix == "domain_adaptation.method.":
        kept.setdefault("name", MethodConfig.name)
    return kept


def _groups(cls: type) -> set[str]:
    parts = [key.split(".")[:-1] for key in _field_types(cls)]
    return {".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)}


def _readable(cls: type, message: str, settings: dict[str, Any]) -> str:
    found = re.search(r'[Kk]ey "([^"]+)"', message)
    reason = " ".join(message.split())
    if not found:
        return reason[:MOST_SHOWN] or "the settings are nested too deeply."
    key = found.group(1)
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else value
    wanted, shown = _field_types(cls).get(key), _shown(value)
    return (
        f"{key} is {shown}: {reason[:MOST_SHOWN]}"
        if wanted is None
        else f"{key} is {shown}, but must be {type_name(wanted)}."
    )
