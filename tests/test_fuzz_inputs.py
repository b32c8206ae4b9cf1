"""Drawn inputs: settings files, command lines, arms, spaces, lists and manifests. Each is taken, or refused with exit code 2
and one message; nothing is trained, imported or run by what a file says."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.inputs import TAKEN, WRONG, answer
from dann_experiments.__main__ import main
from dann_experiments.command_line import SHORT_NAMES
from dann_experiments.config import Config, InputError, config_to_yaml, load_config
from dann_experiments.config.comparison import KINDS, CompareConfig
from dann_experiments.config.parsing import known_keys, load_settings
from dann_experiments.config.target_dialect import METHODS, MONITORS, NETWORKS, SCHEDULES
from dann_experiments.data.samples import find_samples
from sweeps.settings import SweepConfig

MANY = max(1, int(150 * Fraction(os.environ.get("CHAOS_SHARE", "1"))))  # examples of a slow test


def drawn(count: int, **strategies: st.SearchStrategy) -> Callable:
    """Run a test with `count` drawn examples, always the same ones; its attribute `many` runs it with many, drawn anew."""

    def decorate(test: Callable) -> Callable:
        rules = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
        few = settings(rules, max_examples=count, derandomize=True)(given(**strategies)(test))
        few.many = settings(rules, max_examples=MANY, derandomize=False)(given(**strategies)(test))
        return few

    return decorate


@functools.cache
def folder() -> Path:
    """Where the drawn files lie; one for the whole module."""
    place = tempfile.TemporaryDirectory()
    PLACES.append(place)
    return Path(place.name)


PLACES: list[tempfile.TemporaryDirectory] = []


@pytest.fixture(scope="module", autouse=True)
def _no_file_is_left():
    yield
    for place in PLACES:
        place.cleanup()


def written(content: str | bytes, name: str = "drawn.yaml") -> Path:
    path = folder() / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# --- what is drawn ---

PARTS = sorted({part for key in known_keys() for part in key.split(".")})
near = st.builds(
    lambda key, at, letter: key[:at] + letter + key[at + 1 :],
    st.sampled_from(known_keys()),
    st.integers(0, 30),
    st.sampled_from(["", ".", "x", "_", " ", "\0"]),
)
scalars = (
    st.sampled_from([value for value in WRONG.values() if not isinstance(value, (list, dict))])
    | st.text(max_size=8)
    | st.integers()
    | st.floats()
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PARTS) | scalars, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(known_keys()) | near | st.sampled_from(PARTS)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as a settings file nests them."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        node = found
        for group in groups:
            inner = node.get(group)
            node[group] = node = inner if isinstance(inner, dict) else {}
        node[name] = value
    return found


files = st.dictionaries(keys, values, max_size=5).map(lambda flat: yaml.dump(nested(flat), Dumper=yaml.SafeDumper))
LINES = [
    "seed: 1", "seed: 2", "model: &m {arch: unet}", "model: *m", "<<: *m", "data: &d", "  <<: *d", "  root: x",
    "\troot: y", "- a", "data: {source: {train: [a]}}", "? [a, b]\n: c", "? {a: b}\n: c",
    "seed: !!python/object/apply:os.system ['touch pwned']", "seed: !!python/name:os.system", "seed: !!bool perhaps",
    "seed: !!int ''", "seed: !!float x", "seed: !!timestamp x", "seed: !!binary '*'", "seed: !!set {1, 2}",
    "seed: !!omap [a: 1]", "seed: !!null 5", "seed: 2020-13-45", "seed: 0001-01-01T00:00:00+23:59", "seed: 190:20:30",
    "seed: 0b2", "seed: 0x", "seed: 1_000", "seed: .inf", "seed: ~", "seed: " + "9" * 5000, "---", "...", "%YAML 9.9",
    "%TAG ! tag:x,2000:", "seed: |", "seed: >", "  text", "# note", "'", "\"", "{", "}", "[" * 500, "a: " * 500,
    "&a [*a]", "data: &x {root: *x}", "trainer:", "  max_epochs: 3", "  max_epochs: 4", "x: \u0007", "x: \ufeff",
]  # fmt: skip
scraps = st.lists(st.sampled_from(LINES), max_size=6).map("\n".join)


def is_told(path: Path) -> str:
    """`config --config FILE`; a file that is taken shows settings that load again to the same."""
    message = answer(main, "config", "--config", str(path))
    assert not (Path.cwd() / "pwned").exists()
    if message == TAKEN:
        config = load_config(path)
        assert config == load_config(written(config_to_yaml(config), "again.yaml"))
    return message


# --- settings files ---


@drawn(40, text=files)
def test_a_drawn_settings_file_is_taken_or_refused_with_one_message(text):
    is_told(written(text))


@drawn(60, text=scraps)
@example(text="seed: 1\nseed: 2")
@example(text="seed: !!bool perhaps")
@example(text="seed: !!int ''")
@example(text="seed: !!timestamp x")
@example(text="seed: 0001-01-01T00:00:00+23:59")
def test_scraps_of_yaml_are_taken_or_refused_with_one_message(text):
    is_told(written(text))


@drawn(20, content=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-16")))
def test_bytes_that_are_no_text_are_taken_or_refused_with_one_message(content):
    is_told(written(content))


def test_a_key_that_stands_twice_is_refused_and_a_merged_one_is_not():
    assert "'seed' appears twice" in is_told(written("seed: 1\ndata: {root: a}\nseed: 2\n"))
    assert "'root' appears twice" in is_told(written("data: {root: a, root: b}\n"))
    merged = written("model: &m {arch: unet, classes: 2}\npretraining: {max_epochs: 2}\n")
    assert is_told(merged) == TAKEN
    text = "trainer: {max_epochs: 1}\ndata: {source: &s {train: [a], batch_size: 2}, target: {<<: *s, batch_size: 3}}\n"
    config = load_config(written(text))
    assert (config.data.target.train, config.data.target.batch_size, config.data.source.batch_size) == (["a"], 3, 2)


def test_a_file_without_an_end_is_refused():
    assert "characters" in answer(main, "config", "--config", "/dev/zero")


# --- command lines ---

words = st.sampled_from(
    ["--", "-", "--=", "--.", "--seed", "--seed=", "--config=", "stray", "-x", "--seed=1=2", "=", ""]
)
flags = st.builds(
    lambda key, glue, value: [f"--{key}{glue}{value}"] if glue else [f"--{key}", value],
    keys | st.sampled_from(sorted(SHORT_NAMES)),
    st.sampled_from(["", "="]),
    st.text(max_size=8)
    | scalars.map(str)
    | st.sampled_from(["[", "{a: b", "'", '"', "!!bool x", "&a [*a]", "\udcff", "None"]),
)
lines = st.lists(flags | words.map(lambda word: [word]), max_size=4).map(
    lambda parts: [word for part in parts for word in part]
)


@drawn(60, words=lines)
@example(words=["--data", "5", "--data.root", "x"])
@example(words=["--config"])
@example(words=["--model.arch", "&a [*a]"])
@example(words=["--domain_adaptation.method.init_args", "{a: &a [*a]}"])
@example(words=["--config", "~nobody_at_all/x"])
@example(words=["--data.root", "a\udcff"])
def test_a_drawn_command_line_is_taken_or_refused_with_one_message(words):
    if not {"-h", "--help"} & set(words):
        answer(main, "config", *words)


def test_a_setting_below_one_that_is_no_group_is_refused_not_dropped():
    assert "data is [1]" in answer(main, "config", "--config", str(written("data: [1]\n")), "--data.root", "x")


# --- the `_target_` spelling ---

targets = st.sampled_from([*METHODS, *SCHEDULES, *NETWORKS, *MONITORS, "os.system", "", "antigravity.fly", "a.Unet"])
classes = st.fixed_dictionaries(
    {},
    optional={
        "_target_": targets | scalars,
        "num_classes": scalars,
        "class_names": values,
        "gamma": scalars,
        "lambda_schedule": scalars,
        "hidden_size": scalars,
    },
)
dialect = st.fixed_dictionaries(
    {},
    optional={
        "model": classes | scalars,
        "monitor": classes | scalars,
        "data": scalars,
        "callbacks": st.lists(classes | scalars, max_size=2) | scalars,
        "domain_adaptation": scalars
        | st.fixed_dictionaries(
            {},
            optional={
                "_target_": targets,
                "method": classes | scalars,
                "callbacks": st.lists(classes, max_size=2) | scalars,
            },
        ),
    },
)
MONITOR = {"_target_": "a.DomainAdaptationMonitorCallback", "num_classes": 2}


@drawn(40, content=dialect)
@example(content={"model": 5, "callbacks": [MONITOR]})
@example(content={"monitor": [1], "callbacks": MONITOR})
def test_a_drawn_file_in_the_target_spelling_is_taken_or_refused_with_one_message(content):
    import sys

    is_told(written(yaml.dump(content, Dumper=yaml.SafeDumper)))
    assert "antigravity" not in sys.modules


# --- arms and spaces ---

arms = st.fixed_dictionaries(
    {},
    optional={
        "arms": values
        | st.dictionaries(
            st.text(max_size=4),
            values
            | st.fixed_dictionaries(
                {"kind": st.sampled_from([*KINDS, None]) | values},
                optional={"seed": scalars, "optimizer": values, "optimizer.lr": scalars},
            ),
            max_size=3,
        ),
        "seeds": values,
        "workers": scalars,
        "runs": values,
        "arm": scalars,
    },
)


@drawn(25, content=arms)
def test_drawn_arms_are_taken_or_refused(content):
    from dann_experiments.comparison.arms import arms_of

    path = written(yaml.dump(content, Dumper=yaml.SafeDumper))
    with contextlib.suppress(InputError):
        arms_of(load_settings(CompareConfig, path, {}), small_config())


ranges = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["float", "int", "categorical"]) | values,
        "low": scalars,
        "high": scalars,
        "step": scalars,
        "log": scalars,
        "choices": values,
        "when": values | st.dictionaries(keys, values, max_size=2),
        "more": scalars,
    },
)
SMALL = {
    "model.encoder_name": "resnet18",
    "model.encoder_weights": None,
    "model.encoder_depth": 3,
    "model.decoder_channels": [8, 8, 8],
}


@functools.cache
def small_config() -> Config:
    return load_config(None, SMALL)


SEARCHED = ["domain_adaptation.method.lambda_da", "optimizer.lr", "domain_adaptation.method.hidden_size", "seed"]
spaces = st.dictionaries(st.sampled_from(SEARCHED) | near | scalars, ranges | values, max_size=3)
LR = "optimizer.lr"


@drawn(15, space=spaces)
@example(space={LR: {"type": ["float"], "low": 1, "high": 2}})
@example(space={LR: {"type": "float", "low": 1, "high": 2, 5: 6, "more": 7}})
@example(space={LR: {"type": "float", "low": 1, "high": 10**400}})
def test_a_drawn_space_is_taken_or_refused(space):
    from sweeps.space import read_space

    path = written(yaml.dump({"space": space}, Dumper=yaml.SafeDumper))
    with contextlib.suppress(InputError):
        read_space(load_settings(SweepConfig, path, {}).space, small_config())


def test_a_grid_without_end_is_refused():
    from sweeps.space import read_space

    entry = {"type": "float", "low": 1e-3, "high": 1.0, "step": 1e-12}
    with pytest.raises(InputError, match="larger step"):
        next(read_space({LR: entry}, small_config()).grid())


# --- lists of images ---

rows = st.lists(
    st.sampled_from(
        [
            "image,mask",
            "image",
            "image,mask,split",
            "a.png,b.png",
            "a.png",
            ",",
            '"',
            "a.png,,train",
            "\0",
            "é.png",
            "~nobody/x.png",
            "/dev/null",
            ".",
            "..",
            "a" * 300,
            "a;b",
            "\ufeffimage",
        ]
    )
    | st.text(max_size=8),
    max_size=5,
)


@drawn(
    60,
    lines=rows,
    end=st.sampled_from(["\n", "\r", "\r\n", "\0"]),
    suffix=st.sampled_from(["csv", "txt", "png", "odd"]),
)
def test_a_drawn_list_or_manifest_names_files_that_are_there_or_is_refused(lines, end, suffix):
    path = written(end.join(lines), f"list.{suffix}")
    told: list[str] = []
    for entry in (path.name, {"images": path.name, "masks": path.name}, {"images": "list.*", "names": path.name}):
        found = find_samples([entry], folder(), "data.source.train", report=told.append)
        assert all(sample.image.is_file() for sample in found)
    assert all("data.source.train" in message for message in told)


@drawn(
    20,
    entry=st.text(max_size=12)
    | st.fixed_dictionaries({"images": values}, optional={"masks": values, "names": values, "region": values}),
)
def test_a_drawn_entry_names_files_that_are_there_or_is_refused(entry):
    with contextlib.suppress(InputError):
        config = load_config(None, {"data.source.train": [entry]})
        found = find_samples(config.data.source.train, folder(), "data.source.train")
        assert all(sample.image.is_file() for sample in found)


# --- more of the same ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "test",
    [
        test_a_drawn_settings_file_is_taken_or_refused_with_one_message,
        test_scraps_of_yaml_are_taken_or_refused_with_one_message,
        test_a_drawn_command_line_is_taken_or_refused_with_one_message,
        test_a_drawn_file_in_the_target_spelling_is_taken_or_refused_with_one_message,
        test_drawn_arms_are_taken_or_refused,
        test_a_drawn_list_or_manifest_names_files_that_are_there_or_is_refused,
        test_a_drawn_entry_names_files_that_are_there_or_is_refused,
    ],
    ids=lambda test: test.__name__,
)
def test_many_more_drawn_inputs_end_as_well(test):
    test.many()
