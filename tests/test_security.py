"""Files, settings and stores of strangers: they run no code here, leave their folder for no other, and learn no password."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import pickle
import re
import resource
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import small_settings, squares_in
from test_sweep_cluster import start_server, stop_server

from dann_experiments import InputError, load_config
from dann_experiments.__main__ import main
from dann_experiments.adaptation.own_class import find_class
from dann_experiments.checkpoints.saved_model import save_model
from dann_experiments.checkpoints.weights import read_weights
from dann_experiments.command_line import _print_error, warn_of_stored_secrets
from dann_experiments.comparison.collect import config_of
from dann_experiments.config import config_to_yaml, replace
from dann_experiments.data.neon_trees import TILES, build_neon_trees
from dann_experiments.jobs.load_model import load_model
from dann_experiments.prediction.partial_map import PartialMap
from dann_experiments.tracking.store import open_store, remember_secrets, without_secrets
from sweeps.cli import main as sweeps_main
from sweeps.definition import describe, slots_of, stored_settings
from sweeps.driver import resume_sweep
from sweeps.objective import run_trial
from sweeps.settings import SweepConfig
from sweeps.space import read_space
from sweeps.study import DEFINITION, SETTINGS, Slot, Sweep, flags_of, open_storage

PROJECT = Path(__file__).parents[1]
METHOD = "domain_adaptation.method"
CANARY = "hush-7f3a"

# the source itself

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = re.compile(
    r"(eval|exec|compile|__import__|os\.system|os\.popen|subprocess\.getoutput|subprocess\.getstatusoutput|"
    r"yaml\.(unsafe_load|full_load|unsafe_load_all|load_all)|torch\.hub\..*|torch\.jit\.load|torch\.package\..*|"
    r"(pd|pandas)\.read_pickle|mlflow\.\w+\.load_model|.*\.load_from_checkpoint|.*\.extractall|.*\.extract|.*unpack_archive)"
)
IMPORTERS = {  # names that stand in our own source, and own_class, which checks what it imports
    "dann_experiments/__init__.py", "sweeps/__init__.py", "dann_experiments/adaptation/own_class.py",
    "dann_experiments/workers/preloaded.py",
}  # fmt: skip


def harmful(source: str, name: str = "x.py") -> Iterator[str]:
    """What in a source text would run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {one}" for one in names if one.split(".")[0] in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if FORBIDDEN_CALLS.fullmatch(called) and called != "re.compile":
            yield called
        if called == "yaml.load" and [ast.unparse(one) for one in node.args][1:] != ["PlainLoader"]:
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield called
        if "ckpt_path" in given and given["ckpt_path"] != "None" and given.get("weights_only") != "True":
            yield f"{called}(ckpt_path=...)"
        if called.endswith("np.load") and given.get("allow_pickle") != "False":
            yield called
        if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
            yield called
        if called.endswith("import_module") and name not in IMPORTERS:
            yield called


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "eval(x)", "exec(x)", "yaml.load(x, yaml.Loader)", "yaml.full_load(x)",
        "torch.load(x)", "torch.load(x, weights_only=False)", "trainer.fit(m, ckpt_path=p)", "np.load(p)",
        "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)", "os.system(c)", "importlib.import_module(n)",
        "mlflow.pytorch.load_model(u)", "zip.extractall(d)",
    ],
)  # fmt: skip
def test_the_search_of_the_source_finds_what_it_is_for(line):
    assert list(harmful(line))


def test_no_line_of_the_program_unpickles_evaluates_or_gives_a_shell_what_it_reads():
    files = [
        path for folder in ("dann_experiments", "sweeps", "benchmarks") for path in (PROJECT / folder).rglob("*.py")
    ]
    assert len(files) > 80
    found = {str(path): list(harmful(path.read_text(), path.relative_to(PROJECT).as_posix())) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


# settings


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder on Python's path with modules that say so when they are imported; the file that says it."""
    folder, marker = tmp_path / "installed", tmp_path / "executed"
    (folder / "trap_package").mkdir(parents=True)
    sign = f"open({str(marker)!r}, 'w').close()\n"
    (folder / "trap.py").write_text(sign + "class Method: pass\n")
    (folder / "trap_package" / "__init__.py").write_text(sign)
    (folder / "trap_package" / "inner.py").write_text(sign + "class Method: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    yield marker
    for name in [name for name in sys.modules if name.startswith("trap")]:
        del sys.modules[name]


OWN = {"class_path": "trap.Method", "init_args": {}}
NAMES_CODE = [
    {"domain_adaptation": {"method": OWN}},
    {"domain_adaptation": {"method": {"class_path": "x.Y", "init_args": {"a": OWN, "b": [OWN], "c": "trap.Method"}}}},
    {"domain_adaptation": {"method": {"class_path": "x.Y", "init_args": OWN}}},
    {"domain_adaptation": {"method": {"class_path": "x.Y", "init_args": {"a": yaml.safe_dump(OWN)}}}},
    {"domain_adaptation": {"method": {"class_path": "x.Y", "init_args": yaml.safe_dump({"a": OWN})}}},
    {"domain_adaptation": {"method": {"lambda_schedule": OWN}}},
    {"domain_adaptation": {"method": {"_target_": "trap.Method"}}},
    {"domain_adaptation": {"_target_": "trap.Method", "method": {"lambda_schedule": {"_target_": "trap.Method"}}}},
    {"domain_adaptation": {"callbacks": [{"_target_": "trap.Method"}]}},
    {"model": {"_target_": "trap.Method"}},
    {"model": {"_target_": "trap.Unet"}},
    {"model": {"decoder_use_norm": OWN}},
    {"model": OWN},
    {"data": {"source": {"train": [{"images": OWN}], "value_map": OWN}}},
    {"data": {"source": {"train": [OWN]}}},
    OWN,
]


@pytest.mark.parametrize("settings", NAMES_CODE, ids=str)
def test_reading_settings_imports_nothing_that_they_name(trap, tmp_path, settings):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    with contextlib.suppress(InputError):
        load_config(tmp_path / "c.yaml")
    assert not trap.exists()
    assert "trap" not in sys.modules


def test_a_method_of_ones_own_needs_no_other_key_and_its_arguments_stay_as_they_are(tmp_path):
    arguments = {"net": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "x"]}}, "weight": 2}
    method = {"class_path": "mine.Method", "init_args": arguments}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"domain_adaptation": {"method": method}}))
    read = load_config(tmp_path / "c.yaml").domain_adaptation.method
    assert (read.class_path, read.init_args) == ("mine.Method", arguments)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("trap.Other", "has no class Other"), ("trap_package.inner.Other", "has no class Other"),
        ("trap_package.Method", "has no class Method"), ("trap_package.none.Method", "no module named"),
        ("none.Method", "no module named"), ("math.Method", "."), ("Method", "does not have the form"),
        ("a b.c", "does not have the form"),
        ("..trap.Method", "does not have the form"), ("antigravity.Method", "has no class Method"),
    ],
)  # fmt: skip
def test_a_module_without_the_class_is_not_imported_and_neither_are_the_packages_around_it(trap, path, reason):
    before = set(sys.modules)
    with pytest.raises(ImportError, match=reason):
        find_class(path)
    assert not trap.exists()
    assert not {"trap", "trap_package", "antigravity"} & (set(sys.modules) - before)


def test_an_installed_class_is_found(trap):
    assert find_class("trap.Method").__name__ == "Method"
    assert find_class("trap_package.inner.Method").__module__ == "trap_package.inner"


def test_a_module_that_only_lies_in_the_current_folder_is_imported_if_pythonpath_says_so(trap, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "trap_here.py").write_text((tmp_path / "installed" / "trap.py").read_text())
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "here"))  # as `python -m` does
    with pytest.raises(ImportError, match="only found in the current folder"):
        find_class("trap_here.Method")
    assert not trap.exists()
    monkeypatch.setenv("PYTHONPATH", ".")
    assert find_class("trap_here.Method").__name__ == "Method"


# studies


def study_of(config: Any, space: dict[str, Any]) -> tuple[Sweep, SweepConfig]:
    sweep = SweepConfig(space=space, study="s", n_trials=3, storage="journal.log")
    read = read_space(sweep.space, config)
    study = Sweep.create(open_storage("journal.log"), "s", sweep.maximizes)
    describe(study, sweep, read, config, 3)
    study.add(slots_of(sweep, read, config))
    return study, sweep


GAMMA = {f"{METHOD}.lambda_schedule.gamma": {"type": "float", "low": 1, "high": 20}}
CLASSES = {f"{METHOD}.class_path": {"type": "categorical", "choices": [None, "trap.Method"]}}


@pytest.mark.parametrize(("changes", "space"), [({"class_path": "trap.Method"}, GAMMA), ({}, CLASSES)])
def test_a_studys_storage_names_no_code_unless_the_caller_names_it_too(trap, workplace, changes, space):
    study, _ = study_of(load_config(None, small_settings(Path("nowhere"))), GAMMA)
    definition = study.attribute(DEFINITION)
    definition["config"]["domain_adaptation"]["method"] |= changes
    study.set_attribute(DEFINITION, definition | {"space": space})
    study.set_attribute(SETTINGS, study.attribute(SETTINGS) | {"allow_class_path": "trap.Method"})
    assert stored_settings(study, {}).allow_class_path is None
    for allowed in ({}, {"allow_class_path": "trap.Other"}):
        with pytest.raises(InputError, match=r"give --allow_class_path trap\.Method"):
            resume_sweep("s", "journal.log", allowed)
    assert not trap.exists()
    with pytest.raises(InputError, match="not a subclass of"):  # on to the class itself
        resume_sweep("s", "journal.log", {"allow_class_path": "trap.Method"})


def test_a_trial_that_somebody_put_into_the_storage_runs_no_class_of_its_own(trap, workplace):
    config = load_config(None, small_settings(Path("nowhere")))
    study, sweep = study_of(config, GAMMA)
    for trial in iter(lambda: study.claim("machine:1:0", "t"), None):
        study.give_back(trial, "not this one")
    study.add([Slot("search", {f"{METHOD}.class_path": "trap.Method"}, reference=True)])
    slot = study.claim("machine:1:0", "t")
    assert slot is not None
    run_trial(study, read_space(sweep.space, config), sweep, config, slot, "run")
    error = study.trials()[slot.number].user_attrs["error"]
    assert "names code" in error
    assert not trap.exists()


# checkpoints


class Runs:
    """Pickles to a call that leaves a marker."""

    def __init__(self, marker: Path, how: str) -> None:
        self.how, self.text = how, f"open({str(marker)!r}, 'w').close()"
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "os":
            return os.system, (self.command,)
        if self.how == "subprocess":
            return subprocess.getoutput, (self.command,)
        return (eval if self.how == "eval" else exec), (self.text,)


def evil_files(folder: Path, marker: Path) -> Iterator[Path]:
    """Malicious files in every format and place that a checkpoint can have."""
    folder.mkdir()
    weights = {"a": torch.zeros(1)}
    for how in ("os", "subprocess", "eval", "exec"):
        evil = Runs(marker, how)
        contents = {
            "whole": evil, "beside": {"state_dict": weights, "hyper_parameters": evil},
            "among": {"a": torch.zeros(1), "b": evil}, "key": {"pytorch-lightning_version": "2", "state_dict": evil},
        }  # fmt: skip
        for name, content in contents.items():
            for modern in (True, False):
                path = folder / f"{how}_{name}_{modern}.{'ckpt' if name == 'beside' else 'pt'}"
                torch.save(content, path, _use_new_zipfile_serialization=modern)
                yield path
        for suffix in ("pkl", "pt", "ckpt", "bin", "safetensors"):
            path = folder / f"{how}_pickle.{suffix}"
            path.write_bytes(pickle.dumps({"state_dict": evil}, protocol=2 if suffix == "pt" else 4))
            yield path


def test_no_malicious_checkpoint_runs_and_each_is_refused(tmp_path):
    marker = tmp_path / "executed"
    count = 0
    for path in evil_files(tmp_path / "files", marker):
        count += 1
        with pytest.raises(InputError, match=re.escape(path.name)):
            read_weights(path)
        assert not marker.exists(), path
    assert count == 52
    pickle.loads((tmp_path / "files" / "exec_pickle.pkl").read_bytes())
    assert marker.exists(), "the samples must be able to run"


def test_no_malicious_file_runs_as_a_model_of_a_run_a_registry_or_a_folder(tmp_path, workplace):
    marker = tmp_path / "executed"
    files = list(evil_files(tmp_path / "files", marker))
    store = open_store(None, "evil")
    run_id = store.client.create_run(store.experiment_id).info.run_id
    network = torch.nn.Linear(1, 1)
    save_model(tmp_path / "model", network, "unet", {"encoder_name": "resnet18", "in_channels": 3, "classes": 2}, {})
    (tmp_path / "model" / "model.safetensors").write_bytes(files[0].read_bytes())
    (tmp_path / "model" / "python_model.pkl").write_bytes((tmp_path / "files" / "exec_pickle.pkl").read_bytes())
    loader = "flavors: {python_function: {loader_module: os, python_model: python_model.pkl}}\n"
    (tmp_path / "model" / "MLmodel").write_text(loader)
    store.client.log_artifacts(run_id, str(tmp_path / "model"), "model")
    store.client.log_artifact(run_id, str(files[2]), "checkpoints")
    store.client.create_registered_model("evil")
    store.client.create_model_version("evil", f"{store.client.get_run(run_id).info.artifact_uri}/model", run_id)
    places = [
        f"runs:/{run_id}",
        f"runs:/{run_id}/checkpoints/{files[2].name}",
        "models:/evil/1",
        str(tmp_path / "model"),
    ]
    for where in places:
        with pytest.raises(InputError):
            load_model(where, "target", load_config(None, small_settings(workplace)), store)
        assert not marker.exists(), where


class Mine:
    """A class that a stranger's checkpoint may hold."""

    def __init__(self) -> None:
        self.value = 1


def foreign_objects() -> dict[str, Any]:
    from lightning_fabric.utilities.data import AttributeDict

    return {
        "own class": Mine(), "namespace": argparse.Namespace(lr=1), "numpy scalar": np.float64(1.5), "numpy": np.ones(3),
        "path": Path("a"), "attributes": AttributeDict(lr=1, inner=Mine()), "class": Mine, "function": torch.nn.functional.relu,
        "all": [Mine(), {"a": np.float32(1)}, argparse.Namespace(b=Mine())],
    }  # fmt: skip


@pytest.mark.parametrize("name", foreign_objects())
def test_a_checkpoint_with_foreign_hyperparameters_loads_by_its_tensors_alone(tmp_path, name, caplog):
    content = {"state_dict": {"a": torch.arange(3.0)}, "hyper_parameters": foreign_objects()[name]}
    torch.save(content | {"pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    weights = read_weights(tmp_path / "a.ckpt")
    assert list(weights) == ["a"]
    assert torch.equal(weights["a"], torch.arange(3.0))
    if name == "own class":
        assert f"not its objects of {__name__}.Mine" in caplog.text


def test_a_whole_pickled_network_is_refused_with_its_class(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(1, 1)), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"whole pickled object .*Linear.* Save only its state_dict"):
        read_weights(tmp_path / "a.pt")


def safetensors_file(path: Path, header: Any, length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 12)
    return path


def absurd_files(folder: Path) -> Iterator[Path]:
    shapes = [([10**12], 4 * 10**12), ([2**62, 4], 12), ([10**9, 10**9], 12), ([10**30], 12), ([-3], 12), ([3], 8)]
    for number, (shape, end) in enumerate(shapes):
        header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        yield safetensors_file(folder / f"shape{number}.safetensors", header)
    for length in (2**63, 10**10, 99_000_000):
        yield safetensors_file(folder / f"length{length}.safetensors", {}, length)
    torch.save({"a": torch.ones(3)}, folder / "good.pt")
    for kind in ("numel", "bomb"):
        path = folder / f"{kind}.pt"
        compression = zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / "good.pt") as good, zipfile.ZipFile(path, "w", compression) as made:
            for name in good.namelist():
                data = good.read(name)
                if kind == "numel" and name.endswith("data.pkl"):
                    data = data.replace(b"K\x03", b"J" + struct.pack("<i", 2**31 - 1))  # 8 GB declared, 12 bytes there
                made.writestr(name, data + (b"\0" * 40_000_000 if kind == "bomb" and name.endswith("data/0") else b""))
        yield path
    torch.save({"a": torch.empty(10**6, 10**6, device="meta")}, folder / "meta.pt")
    yield folder / "meta.pt"


def test_sizes_that_a_file_only_claims_are_refused_without_taking_the_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in absurd_files(tmp_path):
        with pytest.raises(InputError, match=path.name):
            read_weights(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


# the shell


@pytest.mark.parametrize(
    "entry", ["main", "adapt", "pretrain", "evaluate", "check-data", "predict", "weak-labels", "compare", "sweep"]
)
def test_every_parameter_of_mlproject_reaches_the_program_as_one_word(entry, empty_place):
    from mlflow.projects._project_spec import load_project

    point = load_project(str(PROJECT)).get_entry_point(entry)
    nasty = ["; touch executed", "$(touch executed)", "`touch executed`", "a\ntouch executed", "'; touch executed; '", '"$HOME"',
             "&& touch executed", "| touch executed", "> executed", "{0}", "\\", "*", "~"]  # fmt: skip
    names = [*point.parameters, "data.root"]
    for start in range(0, len(nasty), len(names)):
        values = dict(zip(names, nasty[start:], strict=False))
        shell = f"python() {{ printf '%s\\0' \"$@\"; }}; {point.compute_command(values, None)}"
        done = subprocess.run(["bash", "-c", shell], cwd=empty_place, capture_output=True, text=True, check=True)
        words = done.stdout.split("\0")
        for name, value in values.items():
            assert words[words.index(f"--{name}") + 1] == value
    assert not list(empty_place.iterdir())


def test_what_is_shown_to_be_typed_is_quoted():
    assert flags_of("s", "a'; touch x; '.log") == "--study s --storage 'a'\"'\"'; touch x; '\"'\"'.log'"


# folders


def test_members_of_a_zip_file_go_where_we_say(tmp_path):
    annotation = "<xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax>"
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "t.png")
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as package:
        for tile in TILES:
            package.writestr(f"deepforest/data/{tile}.xml", annotation)
            package.writestr(f"deepforest/data/{tile}.png", (tmp_path / "t.png").read_bytes())
        for name in ("../outside", "/outside", "../../outside", "deepforest/data/../../outside"):
            package.writestr(name, "x")
    (tmp_path / "in").mkdir()
    build_neon_trees(tmp_path / "w.whl", tmp_path / "in" / "deep")
    assert {path.name for path in tmp_path.iterdir()} == {"t.png", "w.whl", "in"}
    assert len(list(tmp_path.rglob("*.png"))) == 1 + 2 * len(TILES)
    assert not list(tmp_path.rglob("outside"))
    with zipfile.ZipFile(tmp_path / "big.whl", "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr(f"deepforest/data/{next(iter(TILES))}.xml", b"\0" * (65 * 2**20))
    with pytest.raises(InputError, match="bytes"):
        build_neon_trees(tmp_path / "big.whl", tmp_path / "in" / "deep")


@pytest.mark.parametrize("carry", ["../outside.npy", "/outside.npy", "sub/../../outside.npy"])
def test_a_half_made_map_reads_no_file_outside_its_folder(tmp_path, carry):
    np.save(tmp_path / "outside.npy", np.zeros(1))
    with PartialMap(tmp_path / "m.partial", {"a": 1}) as partial:
        partial.start()
        partial.checkpoint(1, np.zeros(1))
    state = json.loads((tmp_path / "m.partial" / "state.json").read_text())
    place = carry.replace("/outside", str(tmp_path / "outside")) if carry.startswith("/") else carry
    (tmp_path / "m.partial" / "sub").mkdir()
    (tmp_path / "m.partial" / "state.json").write_text(json.dumps(state | {"carry": place}))
    with PartialMap(tmp_path / "m.partial", {"a": 1}) as partial:
        rows, found, reason = partial.start()
        assert (rows, found) == (0, None)
        assert reason == "files are missing or cut off"


def test_settings_that_a_run_keeps_bring_no_class(trap, workplace):
    store = open_store(None, "x")
    run_id = store.client.create_run(store.experiment_id).info.run_id
    config = replace(load_config(None, small_settings(workplace)), {f"{METHOD}.class_path": "trap.Method"})
    store.client.log_text(run_id, config_to_yaml(config), "config.yaml")
    read = config_of(store, run_id)
    assert read is not None
    assert read.domain_adaptation.method.class_path is None
    assert read.model == config.model
    assert not trap.exists()


# passwords


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"http://me:{CANARY}@host:5000", "cannot reach {}"),
        (f"postgresql+psycopg2://me:{CANARY}@host/db", "Error('{}')"),
        ("postgresql://me:p%40ss%2Fword@host/db", "invalid password p@ss/word of {}"),
        ('postgresql://me:it\'s "mine" <1>@host/db', "{} failed"),
        (f"mysql://host/db?user=me&password={CANARY}&ssl=1", "{}"),
        (f"postgresql://host/db?sslpassword={CANARY}", "({})"),
        (f"https://host/api?api_key={CANARY}&x=1", "GET {}"),
        (f"https://host/a?X-Amz-Signature={CANARY}&access_token=zz{CANARY}", "GET {}, retried: {}"),
    ],
)
def test_no_password_of_an_address_stays_in_a_message(address, message):
    remember_secrets(address)
    shown = without_secrets(message.replace("{}", address))
    for part in (CANARY, "p%40ss", "p@ss", "word of", "mine", "<1>"):
        assert part not in shown.replace("password of", "")
    assert "host" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["adapt", "--tracking.uri", f"http://me:{CANARY}@127.0.0.1:9"],
        ["runs", "--tracking.uri", f"sqlite:///x.db?password={CANARY}"],
        ["runs", "--tracking.uri", f"oracle://me:{CANARY}@host/x"],
        ["status", "--study", "s", "--storage", f"postgresql://me:{CANARY}@127.0.0.1:9/x"],
        ["status", "--study", "s", "--storage", f"oracle://me:{CANARY}@127.0.0.1:9/x"],
    ],
    ids=lambda words: words[-1],
)
def test_a_store_that_cannot_be_used_is_told_without_its_password(words, workplace, capfd, caplog):
    assert (sweeps_main if words[0] == "status" else main)(words) == 2
    told = "".join(capfd.readouterr())
    assert "Error: " in told
    assert CANARY not in told + caplog.text
    assert_nowhere(workplace)


def test_an_error_that_nobody_expected_is_told_without_passwords(capsys):
    try:
        raise ValueError(f"postgresql://me:{CANARY}@host/x")
    except ValueError as error:
        _print_error(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert told.endswith("ValueError: postgresql://host/x\n")
    assert "Traceback" in told


def assert_nowhere(*folders: Path) -> None:
    """No file has the password in its name or its bytes."""
    for path in (path for folder in folders for path in folder.rglob("*")):
        assert CANARY not in str(path)
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_whole_run_leaves_its_password_nowhere(workplace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = small_settings(squares_in(workplace / "data"), tracking__uri=f"http://me:{CANARY}@127.0.0.1:{port}")
    server = start_server(folder, port)
    try:
        given = tmp_path_factory.mktemp("given") / "c.yaml"
        given.write_text(config_to_yaml(load_config(None, settings)))
        command = [sys.executable, "-m", "dann_experiments", "adapt", "--config", str(given)]
        environ = {**os.environ, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=workplace, env=environ)
        assert done.returncode == 0, done.stderr
        failing = [*command, "--source_checkpoint", "runs:/none"]
        failed = subprocess.run(failing, capture_output=True, text=True, cwd=workplace, env=environ)
        assert failed.returncode == 2, failed.stderr
    finally:
        stop_server(server)
    assert CANARY not in done.stdout + done.stderr + failed.stdout + failed.stderr
    assert_nowhere(workplace, folder)


def test_a_parameter_with_a_password_is_told_where_mlflow_run_keeps_it(workplace, monkeypatch, capsys):
    given = {"tracking.uri": f"http://me:{CANARY}@host", "seed": "1"}
    warn_of_stored_secrets(given)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MLFLOW_RUN_ID", "1")
    warn_of_stored_secrets(given)
    told = capsys.readouterr().err
    assert "`tracking.uri`" in told
    assert CANARY not in told
