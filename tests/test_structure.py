"""The shape of the project: imports point one way, versions agree, MLproject and the command line know each other."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from dann_experiments.cli import COMMANDS, PROGRAM, main
from dann_experiments.command_line import SCRIPTS, SHORT_NAMES, Request
from dann_experiments.config import load_config
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import known_keys
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.names import SOURCE_TRAIN
from sweeps.cli import PROGRAM as SWEEPS
from sweeps.settings import SweepConfig

PROJECT = Path(__file__).parents[1]
LAYERS = [
    "names",
    "environment",
    "config",
    "data",
    "models",
    "adaptation",
    "scores",
    "checkpoints",
    "training",
    "tracking",
    "workers",
    "prediction",
    "reports",
    "jobs",
    "command_line",
    "comparison",
    "cli",
    "__main__",
]
ROOMS = [layer for layer in LAYERS if list((PROJECT / "dann_experiments").glob(f"{layer}*"))]


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("layer", ROOMS)
def test_no_layer_imports_one_to_its_right(layer):
    root = PROJECT / "dann_experiments"
    files = [root / f"{layer}.py"] if (root / f"{layer}.py").exists() else sorted((root / layer).rglob("*.py"))
    assert files
    right = LAYERS[LAYERS.index(layer) + 1 :]
    for file in files:
        for name in imports_of(file):
            assert not name.startswith("sweeps"), f"{file} imports {name}"
            for other in right:
                assert not re.match(rf"dann_experiments\.{other}(\.|$)", name), f"{file} imports {name}"


def test_only_config_knows_jsonargparse_and_only_tracking_and_jobs_know_mlflow():
    for file in (PROJECT / "dann_experiments").rglob("*.py"):
        folder = file.relative_to(PROJECT / "dann_experiments").parts[0]
        names = {name.split(".")[0] for name in imports_of(file)}
        assert "jsonargparse" not in names or file.name == "parsing.py", file
        served = file.name == "pyfunc_model.py"  # MLflow calls it, and takes its errors for its own
        assert "mlflow" not in names or folder in ("tracking", "jobs") or served, file


TAKE_CONFIG = ("config", "jobs", "comparison", "command_line", "cli", "__main__")  # and the sweeps, beside the package


def names_of(annotation: ast.expr | None) -> set[str]:
    """The names in an annotation, also where it is written as text."""
    if annotation is None:
        return set()
    found: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= names_of(ast.parse(node.value, mode="eval").body)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def test_only_settings_jobs_comparison_and_the_command_line_take_the_whole_config():
    package = PROJECT / "dann_experiments"
    for file in package.rglob("*.py"):
        if file.relative_to(package).parts[0].removesuffix(".py") in TAKE_CONFIG:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                arguments = node.args
                for one in (
                    *arguments.posonlyargs,
                    *arguments.args,
                    *arguments.kwonlyargs,
                    arguments.vararg,
                    arguments.kwarg,
                ):
                    assert one is None or "Config" not in names_of(one.annotation), f"{file}:{node.lineno} {one.arg}"
            elif isinstance(node, ast.AnnAssign):
                assert "Config" not in names_of(node.annotation), f"{file}:{node.lineno}"


def test_set_names_are_spelled_and_taken_apart_in_one_file_alone():
    spliced = re.compile(
        r'f"\{(?:name|domain|self\.domain|side)\}_(?:train|val|test)\b|\.(?:split|partition)\("_"\)|\.replace\("_", "[. ]"\)'
    )
    for file in [*(PROJECT / "dann_experiments").rglob("*.py"), *(PROJECT / "sweeps").rglob("*.py")]:
        if file.name in ("names.py", "terminal.py"):  # the latter has names of columns, not of sets
            continue
        found = spliced.search(file.read_text())
        assert found is None, f"{file}: {found}"


def pins(lines: Iterable[str]) -> dict[str, str]:
    """Package -> version of lines like `ray[default]==2.0  # why`."""
    found = {}
    for line in lines:
        name, _, version = line.partition("#")[0].partition("==")
        assert version, f"{line} is not pinned"
        found[Requirement(name).name] = version.strip()
    return found


def test_conda_yaml_and_the_installed_versions_are_those_of_constraints_txt():
    pinned = pins(line for line in (PROJECT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"]]
    extras = [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    assert {one.name for one in (*wanted, *extras)} - {project["name"]} == set(pinned)
    for one in (*wanted, *extras):
        assert one.name == project["name"] or one.specifier.contains(pinned[one.name]), one
    assert all(one.specifier for one in wanted), "the package needs a lower bound for each"
    conda = yaml.safe_load((PROJECT / "conda.yaml").read_text())["dependencies"]
    in_conda = pins(next(item["pip"] for item in conda if isinstance(item, dict)))
    assert in_conda == {one.name: pinned[one.name] for one in wanted}
    needed = {
        one.name
        for lines in ("dev", "docs", "export", "ray", "postgresql", "s3", "vector")
        for one in map(Requirement, project["optional-dependencies"][lines])
    }
    for name in ({one.name for one in wanted} | needed) - {project["name"]}:
        assert importlib.metadata.version(name).partition("+")[0] == pinned[name], name
    python = next(item.partition("=")[2] for item in conda if isinstance(item, str) and item.startswith("python="))
    assert tuple(map(int, python.split(".")[:2])) >= (3, 11)


def test_the_page_of_the_installation_says_what_each_dependency_is_for():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \|", (PROJECT / "docs" / "install.md").read_text(), re.MULTILINE)
    wanted = [Requirement(line) for line in project["dependencies"]]
    assert {name: versions for name, versions in rows if name in {one.name for one in wanted}} == {
        one.name: str(one.specifier).removeprefix(">=") for one in wanted
    }


def entry_points() -> dict:
    return yaml.safe_load((PROJECT / "MLproject").read_text())["entry_points"]


@pytest.mark.parametrize("name", ["main", "adapt", "pretrain", "evaluate"])
def test_each_entry_point_uses_every_parameter_and_its_command_parses(name):
    from mlflow.projects._project_spec import load_project

    entry = load_project(str(PROJECT)).get_entry_point(name)
    resumable = set() if name == "evaluate" else {"resume"}
    assert set(entry.parameters) == {"config", *SHORT_NAMES} | resumable
    assert all(f"{{{parameter}}}" in entry.command for parameter in entry.parameters)
    empty = shlex.split(entry.compute_command({}, None))
    assert empty[:3] == ["python", "-m", "dann_experiments"]
    request = PROGRAM.parse(empty[3:])
    assert request.command == ("adapt" if name == "main" else name)
    assert request.options == request.settings == request.overrides() == {}
    values = {"gamma": "2.5", "hidden_size": "32", "discriminator_lr": "3e-4", "feature_layer": "decoder", "max_epochs": "3",
              "seed": "7", "source_checkpoint": "my model; rm -rf /", "optimizer.lr": "1e-3"}  # fmt: skip
    given = shlex.split(entry.compute_command(values | dict.fromkeys(resumable, "a run"), None))
    request = PROGRAM.parse(given[3:])
    assert name == "evaluate" or request.options["resume"] == "a run"
    config = load_config(None, request.overrides())
    method = config.domain_adaptation.method
    assert (method.lambda_schedule.gamma, method.hidden_size, method.discriminator_lr) == (2.5, 32, 3e-4)
    assert (method.feature_layer, config.domain_adaptation.layers) == ("decoder", ["decoder"])
    assert (config.pretraining if name == "pretrain" else config.trainer).max_epochs == 3
    assert (config.seed, config.optimizer.lr) == (7, 1e-3)
    assert config.domain_adaptation.pretrained_checkpoint.path == "my model; rm -rf /"


def test_the_entry_points_are_the_commands_of_the_programs():
    assert set(entry_points()) <= {"main", "sweep", *COMMANDS}


def test_check_data_and_predict_use_every_parameter_and_their_commands_parse():
    from mlflow.projects._project_spec import load_project

    project = load_project(str(PROJECT))
    entry = project.get_entry_point("predict")
    assert set(entry.parameters) <= {"config", *known_keys(PredictConfig)}
    given = {"model": "models:/a@champion", "input": "my scene.tif", "output": "map.tif", "tile_size": "256"}
    request = PROGRAM.parse(shlex.split(entry.compute_command(given, None))[3:])
    assert (request.command, request.options) == ("predict", {"input": ["my scene.tif"]})
    assert request.settings | {"input": "my scene.tif"} == given
    entry = project.get_entry_point("check-data")
    request = PROGRAM.parse(shlex.split(entry.compute_command({"config": "a b"}, None))[3:])
    assert (request.command, request.options, request.overrides()) == ("check-data", {"config": "a b"}, {})


def test_the_compare_entry_point_uses_every_parameter_and_its_command_parses():
    from mlflow.projects._project_spec import load_project

    entry = load_project(str(PROJECT)).get_entry_point("compare")
    assert set(entry.parameters) <= {"config", *known_keys(CompareConfig), *SHORT_NAMES}
    assert all(f"{{{parameter}}}" in entry.command for parameter in entry.parameters)
    given = {"runs": "a1 b2", "arms": "my arms.yaml", "seeds": "3", "workers": "2", "optimizer.lr": "1e-3"}
    request = PROGRAM.parse(shlex.split(entry.compute_command(given, None))[3:])
    assert (request.command, request.options) == ("compare", {"runs": ["a1 b2"], "arms": "my arms.yaml"})
    assert request.settings == {"seeds": "3", "workers": "2", "optimizer.lr": "1e-3"}


def test_the_sweep_entry_point_uses_every_parameter_and_its_command_parses():
    from mlflow.projects._project_spec import load_project

    entry = load_project(str(PROJECT)).get_entry_point("sweep")
    assert set(entry.parameters) <= {"config", "space", *known_keys(SweepConfig), *SHORT_NAMES}
    assert all(f"{{{parameter}}}" in entry.command for parameter in entry.parameters)
    empty = shlex.split(entry.compute_command({}, None))
    assert empty[:4] == ["python", "-m", "sweeps", "run"]
    assert SWEEPS.parse(empty[3:]) == Request("run", {}, {})
    values = {"n_trials": "3", "study": "my study; rm -rf /", "objective": "loss/val_source", "optimizer.lr": "1e-3"}
    assert SWEEPS.parse(shlex.split(entry.compute_command(values, None))[3:]).settings == values


@pytest.mark.parametrize("recipe", sorted((PROJECT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads_and_says_how_to_run_it(recipe):
    config = load_config(recipe)
    assert config.data.entries(SOURCE_TRAIN)
    header = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"recipes/{recipe.name}" in header


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dann_experiments", *arguments], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "--trainer.max_epoch", "3"], "did you mean 'trainer.max_epochs'"),
        (["adapt", "--trainer.max_epochs"], "has no value"),
        (["adapt", "stray"], "unexpected argument 'stray'"),
        (["adpt"], "unknown command 'adpt'; did you mean 'adapt'? give one of check-data"),
        (["adapt", "--gamma", "--seed", "3"], "--gamma has no value"),
        (["layers", "--all=3"], "--all takes no value"),
        (["adapt", "--config", "none.yaml"], "none.yaml does not exist"),
        (["evaluate"], "evaluate needs a model"),
        (["runs"], "has no finished adaptation run"),
    ],
)
def test_wrong_words_on_the_command_line_end_with_code_2_and_one_message(arguments, message, workplace, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "options", "settings"),
    [
        (["adapt", "--config", "a.yaml", "--optimizer.lr=-1"], {"config": "a.yaml"}, {"optimizer.lr": "-1"}),
        (["adapt", "--optimizer.lr", "-1", "--gamma=2"], {}, {"optimizer.lr": "-1", "gamma": "2"}),
        (["adapt", "--config", "", "--gamma", "None", "--seed", ""], {}, {}),
        (["adapt", "--data.root", "", "--model.encoder_weights", "None"], {},
         {"data.root": "", "model.encoder_weights": "None"}),
        (["adapt", "--tracking.run_name=--x", "--seed=1=2"], {}, {"tracking.run_name": "--x", "seed": "1=2"}),
        (["layers", "--all"], {"all": True}, {}),
        (["predict", "--overwrite", "--output", "a"], {}, {"overwrite": "true", "output": "a"}),
        (["adapt", "--trainer.channels_last"], {}, {"trainer.channels_last": "true"}),
        (["predict", "--input", "a", "", "b", "--output", "c", "--input=d"], {"input": ["a", "b", "d"]}, {"output": "c"}),
    ],
)  # fmt: skip
def test_a_command_line_is_taken_apart_and_what_mlflow_left_empty_is_dropped(words, options, settings):
    assert PROGRAM.parse(words) == Request(words[0], options, settings)


def test_a_short_name_of_the_layer_moves_the_captured_layers_with_it():
    request = PROGRAM.parse(["pretrain", "--feature_layer", "decoder", "--max_epochs", "3", "--optimizer.lr", "1"])
    assert request.overrides() == {
        "domain_adaptation.method.feature_layer": "decoder", "domain_adaptation.feature_layers": None,
        "pretraining.max_epochs": "3", "optimizer.lr": "1",
    }  # fmt: skip


def test_the_process_ends_with_the_code_of_its_command(workplace):
    done = cli("adapt", "stray", cwd=workplace)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: unexpected argument 'stray'")


def test_help_config_and_layers_teach(workplace, capsys):
    def shown(*arguments: str) -> str:
        with contextlib.suppress(SystemExit):  # argparse leaves by one after help
            assert main(arguments) == 0
        return capsys.readouterr().out

    assert "adapt" in shown("--help")
    text = shown("adapt", "--help")
    assert "--domain_adaptation.method.lambda_da" in text
    assert "--gamma" in text
    config = yaml.safe_load(shown("config", "--gamma", "3"))
    assert config["domain_adaptation"]["method"]["lambda_schedule"]["gamma"] == 3.0
    (workplace / "unet.yaml").write_text("model: {arch: unet, encoder_name: resnet18, encoder_weights: null}\n")
    layers = shown("layers", "--config", "unet.yaml")
    assert re.search(r"encoder.layer4\D+512\D+32\D+yes", layers), layers


@pytest.mark.parametrize(
    ("started", "shown"), [("/usr/bin/dann", "dann"), ("x/__main__.py", "python -m dann_experiments")]
)
def test_help_shows_the_command_that_the_user_typed(started, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started, "adapt", "--help"])
    assert PROGRAM.help().startswith(f"usage: {shown} COMMAND")
    assert PROGRAM.help_of("adapt").startswith(f"usage: {shown} adapt ")


def test_every_console_script_is_known_to_the_help():
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    assert tuple(scripts) == SCRIPTS


def test_files_of_the_project_name_no_machine_paths():
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True).stdout.split()
    pattern = re.compile(r"/(wor[k]|roo[t]|home/[a-z]+)/")
    for name in tracked:
        path = PROJECT / name
        if path.suffix in (".png", ".jpg") or not path.is_file():
            continue
        assert not pattern.search(path.read_text(errors="ignore")), name


SOURCES = sorted([*(PROJECT / "dann_experiments").rglob("*.py"), *(PROJECT / "sweeps").rglob("*.py")])


def test_no_file_is_longer_than_400_lines():
    assert {str(file) for file in SOURCES if len(file.read_text().splitlines()) > 400} == set()


@pytest.mark.parametrize(
    "module",
    [
        ".".join(file.relative_to(PROJECT).with_suffix("").parts)
        for file in SOURCES
        if re.search(r"^\s*>>> ", file.read_text(), re.MULTILINE)
    ],
)
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0
