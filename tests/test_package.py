"""The package outside of its checkout: a wheel in a new environment, and `mlflow run` on a git address."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import small_settings

import dann_experiments
from dann_experiments.config import config_to_yaml, load_config
from dann_experiments.config.recipes import RECIPES

PROJECT = Path(__file__).parents[1]
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--pretraining.max_epochs=1")
pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program that ends with `code`, without what this process has in PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository of what git would commit here now."""
    folder = tmp_path_factory.mktemp("git") / "dann"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=PROJECT).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(PROJECT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name, follow_symlinks=False)
    author = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    for words in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "all")):
        run("git", *words, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def programs(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment: of the project it has a wheel, made from a source distribution, and it
    shares all other packages with the environment of this process."""
    built, environment = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("environment")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, built, cwd=checkout)
    (source,) = built.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", built, source, cwd=built)
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=built)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=built)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=built).stdout.strip()
    # the path alone: its own .pth files, an editable installation of the project among them, are not read
    Path(packages, "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment / "bin"


def test_the_wheel_holds_recipes_spaces_presets_and_types_and_nothing_but_the_package(programs, empty_place):
    show = "import dann_experiments, sweeps; print(dann_experiments.__file__, sweeps.__file__, sep='\\n')"
    package, sweeps = map(Path, run(programs / "python", "-c", show, cwd=empty_place).stdout.split())
    assert programs.parent in package.parents
    for ours, installed in ((RECIPES.parent, package.parent), (PROJECT / "sweeps", sweeps.parent)):
        names = {
            str(path.relative_to(ours))
            for path in ours.rglob("*")
            if path.suffix in (".py", ".yaml", ".typed", ".j2", ".css")
        }
        assert names == {
            str(path.relative_to(installed))
            for path in installed.rglob("*")
            if path.is_file() and path.suffix not in (".pyc",)
        }
    beside = {path.name.split("-")[0] for path in package.parents[1].iterdir()} - {"__pycache__"}
    assert beside == {"dann_experiments", "sweeps", "shared.pth"}
    version = "import importlib.metadata as m; print(m.version('dann-experiments'))"
    assert run(programs / "python", "-c", version, cwd=empty_place).stdout.strip() == dann_experiments.__version__


@pytest.fixture
def squares_here(squares, empty_place) -> Path:
    """The current folder, with images/ and mine.yaml, which names them by relative paths."""
    shutil.copytree(squares, empty_place / "images")
    (empty_place / "mine.yaml").write_text(config_to_yaml(load_config(None, small_settings(Path("images")))))
    return empty_place


def test_an_installed_package_adapts_in_an_empty_folder(programs, empty_place):
    shown = run(programs / "dann", "config", cwd=empty_place)
    assert yaml.safe_load(shown.stdout)["model"]["arch"] == "pspnet"
    assert "recipe 'digits'" in shown.stderr
    module = (programs / "python", "-m", "dann_experiments")
    assert run(*module, "config", "--config", "digits", cwd=empty_place).stdout == shown.stdout
    assert "--seeds" in run(programs / "dann", "compare", "--help", cwd=empty_place).stdout
    assert "did you mean" in run(programs / "dann", "config", "--sed", "1", cwd=empty_place, code=2).stderr
    adapted = run(programs / "dann", "adapt", *SHORT, cwd=empty_place)
    assert "iou/target_test" in adapted.stdout


def test_an_installed_package_searches_a_space_of_its_own(programs, squares_here):
    assert "dann, ladder, wide" in run(programs / "dann-sweep", "run", "--space", "x", cwd=squares_here, code=2).stderr
    words = ("run", "--config", "mine.yaml", "--n_trials", "1", "--workers", "1", "--trainer.max_epochs", "1")
    run(programs / "dann-sweep", *words, cwd=squares_here)
    assert (squares_here / "studies" / "dann-mine").is_dir()


def test_mlflow_runs_a_git_address_with_paths_relative_to_where_the_user_is(checkout, squares_here):
    variables = {
        # MLflow takes a file:// address for a local folder; git itself reads this https:// one from a folder
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{checkout.parent}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://git.example/",
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = run("mlflow", "run", "https://git.example/dann", "-e", "adapt", "--env-manager", "local",
               "-P", "config=mine.yaml", cwd=squares_here, **variables)  # fmt: skip
    assert f"Relative paths are those of {squares_here}" in done.stderr
    client = mlflow.MlflowClient(f"sqlite:///{squares_here}/mlflow.db")
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert {one.info.status for one in found} == {"FINISHED"}
    assert any("iou/target_test" in one.data.metrics for one in found)
