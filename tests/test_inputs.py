"""The page of all inputs: complete, and true: every case of its tables is given again."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from conftest import small_settings

from benchmarks import inputs, settings
from benchmarks.pages import DOCS
from dann_experiments.__main__ import main
from dann_experiments.config import Config, InputError, load_config
from dann_experiments.config.parsing import known_keys

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / inputs.PAGE).read_text()


def table_of(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name}: start -->\n(.*)<!-- {name}: end -->", page, re.DOTALL)
    assert found is not None, name
    return found.group(1)


def test_the_page_of_settings_is_up_to_date_and_has_each_of_them():
    assert settings.PAGE.read_text() == settings.page(), "run python -m benchmarks.settings"
    for cls, prefixes in settings.CHAPTERS.values():
        for groups in settings.groups_of(cls, prefixes).values():
            assert all(f"`{one.key}`" in settings.page() for one in groups[0].settings)
    chapters = {cls: [prefix for of, all_ in settings.CHAPTERS.values() if of is cls for prefix in all_]
                for cls in inputs.KINDS.values()}  # fmt: skip
    for key in known_keys():
        assert key.startswith(tuple(filter(None, chapters[Config]))) or "." not in key, f"{key} has no chapter"


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_every_setting_stands_in_the_table_of_its_kind(page, kind):
    table = table_of(page, kind)
    for key in known_keys(inputs.KINDS[kind]):
        assert f"\n| `{key}` | " in table, f"{key}: run python -m benchmarks.inputs --write"


def test_every_command_flag_and_entry_point_stands_on_the_page(page):
    assert table_of(page, "all commands").split() == "\n".join(inputs.commands_table()).split()
    assert table_of(page, "entry points").split() == "\n".join(inputs.entry_points_table()).split()
    for entry in yaml.safe_load((PROJECT / "MLproject").read_text())["entry_points"].values():
        assert all(f"`{parameter}`" in page for parameter in entry["parameters"])


def test_every_environment_variable_of_the_code_stands_on_the_page(page):
    table = table_of(page, "variables")
    found = set()
    for file in [*PROJECT.glob("dann_experiments/**/*.py"), *PROJECT.glob("sweeps/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                known = re.fullmatch(r"(MLFLOW|CUDA|XDG|DANN|OMP)_[A-Z_]+", node.value)
                found |= {node.value} if known else set()
    assert "MLFLOW_TRACKING_URI" in found
    for name in found:
        assert f"| `{name}` |" in table, name


def check_settings(cases: list[inputs.Case]) -> None:
    for case in cases:
        message = case.give()  # any other exception than InputError comes through
        key = case.input.rpartition(".")[2]
        assert message == inputs.TAKEN or key in message, (case.input, case.wrong, message)
        assert len(message) < 1000 or case.wrong == "10000 letters", (case.input, case.wrong, message)


@pytest.mark.slow
def test_wrong_values_of_every_setting_are_taken_or_refused_by_its_name():
    check_settings(list(inputs.setting_cases())[::22])  # every key once, each with the next of 21 values


@pytest.mark.parametrize(
    "kind", ["compare", *(pytest.param(kind, marks=pytest.mark.slow) for kind in inputs.KINDS if kind != "compare")]
)
def test_the_page_says_what_is_said_now_to_every_wrong_value(page, kind):
    cls = inputs.KINDS[kind]
    asked = known_keys(cls)[:: 4 if kind == "settings" else 1]  # all of them take two minutes
    cases = [case for case in inputs.setting_cases() if case.page == kind and case.input in asked]
    answers = {(case.page, case.input, case.wrong): case.give() for case in cases}
    shown = table_of(page, kind).splitlines()
    for line in inputs.settings_table(answers, kind, cls):
        assert line in shown, "run python -m benchmarks.inputs --write"


@pytest.mark.slow
def test_every_wrong_command_file_and_variable_ends_with_code_2_and_one_message(workplace):
    cases = [*inputs.command_cases(), *inputs.file_cases(workplace), *inputs.environment_cases()]
    for case in cases:
        assert case.give() != inputs.TAKEN or case.wrong == "empty", (case.input, case.wrong)
    assert len(cases) > 150


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["adapt", "--data.source.train", "[none]"], "data.source.train"),
        (["pretrain", "--data.source.train", "[none]"], "data.source.train"),
        (["compare", "--arms", "arms.yaml"], "arms.a"),
    ],
)
def test_what_the_fast_checks_refuse_leaves_no_store_behind(words, named, squares, empty_place):
    (empty_place / "arms.yaml").write_text("arms: {a: {seed: 3}}\n")
    flags = [word for key, value in small_settings(squares).items() if key not in words[1]
             for word in (f"--{key}", "null" if value is None else str(value).replace("'", ""))]  # fmt: skip
    assert named in inputs.answer(main, words[0], *flags, *words[1:])
    assert not (empty_place / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody_at_all/x", "/dev/null/x"])
def test_a_name_that_no_file_can_have_is_refused_as_one_that_is_not_there(name, workplace):
    from dann_experiments.tracking.fetch_model import fetched
    from sweeps.driver import find_study, only_driver

    message = inputs.answer(main, "predict", "--model", "m", "--input", name, "--output", "o.png")
    assert "input is" in message
    assert "does not exist" in message
    with pytest.raises(InputError, match="does not exist"), fetched(name, None):  # pyright: ignore[reportArgumentType]
        pass
    with pytest.raises(InputError, match="there is no"):
        find_study("s", name)
    if "nobody" not in name:
        with pytest.raises(InputError, match="cannot be written"), only_driver(f"{name}/journal.log", "s"):
            pass


def test_a_network_that_refuses_a_blank_image_is_refused_by_size():
    from dann_experiments.jobs.build import blank_size, make_network
    from dann_experiments.models.taps import list_layers

    small = {"model.encoder_name": "resnet18", "model.encoder_weights": None, "data.crop_size": 10**9}
    config = load_config(None, small)
    with pytest.raises(InputError, match="blank image of 64 x 64 pixels"):
        list_layers(make_network(config), 5, 64)
    assert blank_size(config) == 1024
