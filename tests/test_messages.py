"""What messages say: only settings that the job at hand has, of the domain concerned; and addresses, without their passwords."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import small_settings, squares_in, write_raster
from PIL import Image
from test_predict import BYTES, save
from test_predict import make_network as new_network

from dann_experiments.__main__ import main
from dann_experiments.config import Config, InputError, load_config
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import known_keys, load_settings
from dann_experiments.config.paths import local_path, local_text
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.config.weak_labels import WeakLabelsConfig
from dann_experiments.data.reading import Reading, reading_facts, reading_from_facts
from dann_experiments.data.samples import find_samples
from dann_experiments.jobs.predict import predict
from sweeps.cli import main as sweeps_main
from sweeps.settings import SweepConfig

JOBS = {
    "pretrain": [Config],
    "adapt": [Config],
    "check-data": [Config],
    "evaluate": [Config],
    "compare": [Config, CompareConfig],
    "sweep": [Config, SweepConfig],
    "layers": [Config],
    "predict": [PredictConfig],
    "weak-labels": [WeakLabelsConfig],
}
FLAGS = {"config", "source_checkpoint", "input", "resume", "runs", "arms", "space", "study", "help"}
GROUPS = {key.partition(".")[0] for key in known_keys(Config) if "." in key}


make_network = functools.cache(new_network)  # never changed here


def settings_in(message: str) -> set[str]:
    """Every dotted name of a setting, or group of them, and every flag."""
    dotted = {name.rstrip(".") for name in re.findall(r"(?<![\w/.])[a-z_]+(?:\.[a-z_]+)+", message)}
    flags = {name.rstrip(".") for name in re.findall(r"(?<!\w)--([\w.]+)", message)}
    return {name for name in dotted - {"model.safetensors"} if name.partition(".")[0] in GROUPS} | flags


def foreign_to(job: str, message: str) -> set[str]:
    """What a message names that the job does not have."""
    known = {key for kind in JOBS[job] for key in known_keys(kind)}
    groups = {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 1)}
    wrong = settings_in(message) - known - groups - FLAGS
    if Config not in JOBS[job]:  # names without their group
        leaves = {key.rpartition(".")[2] for key in known_keys(Config)} - {key.rpartition(".")[2] for key in known}
        wrong |= {leaf for leaf in leaves if "_" in leaf and re.search(rf"(?<![\w./]){leaf}(?!\w)", message)}
    return wrong


def test_the_walk_sees_a_setting_of_another_job():
    message = "image a.tif has 4 bands; choose with data.source.bands, or set model.in_channels or --data.target.bands"
    assert foreign_to("predict", message) == {"data.source.bands", "model.in_channels", "data.target.bands"}
    assert foreign_to("predict", "checkpoint x: set strict_loading to false") == {"strict_loading"}
    assert foreign_to("adapt", message) == set()
    assert foreign_to("adapt", "choose with --bands 1,2,3") == {"bands"}


Change = Callable[[Path, dict[str, object]], None]


def four_bands(folder: Path, _: dict[str, object]) -> None:
    replaced(folder, lambda image: np.concatenate([image, image[:1]]))


def two_bands(folder: Path, _: dict[str, object]) -> None:
    replaced(folder, lambda image: image[:2])


def floats(folder: Path, _: dict[str, object]) -> None:
    replaced(folder, lambda image: image.astype(np.float32) / 255)


def complex_values(folder: Path, _: dict[str, object]) -> None:
    replaced(folder, lambda image: image.astype(np.complex64))


def damaged(folder: Path, _: dict[str, object]) -> None:
    for path in (folder / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])


def no_pixel_size(_: Path, settings: dict[str, object]) -> None:
    settings["pixel_size"] = 0.5


def absent_bands(_: Path, settings: dict[str, object]) -> None:
    settings["bands"] = [1, 2, 5]


def nothing(folder: Path, settings: dict[str, object]) -> None:
    settings["nodata"] = 7
    shutil.rmtree(folder.with_name(folder.name.removesuffix("_val")) / "images")
    shutil.copytree(folder / "images", folder.with_name(folder.name.removesuffix("_val")) / "images")
    replaced(folder.with_name(folder.name.removesuffix("_val")), lambda image: np.full_like(image, 7))


def wrong_ids(folder: Path, _: dict[str, object]) -> None:
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((32, 32), 9, np.uint8)).save(path)


def unmapped_ids(folder: Path, settings: dict[str, object]) -> None:
    settings["value_map"] = {1: "ground", 2: "square"}
    wrong_ids(folder, settings)


def masks_in_colours(folder: Path, settings: dict[str, object]) -> None:
    settings["color_map"] = {"1,2,3": "ground", "4,5,6": "square"}
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(path)


def grey_masks_for_colours(folder: Path, settings: dict[str, object]) -> None:
    settings["color_map"] = {"1,2,3": "ground", "4,5,6": "square"}


def masks_of_two_bands(folder: Path, _: dict[str, object]) -> None:
    for path in (folder / "masks").iterdir():
        write_raster(path.with_suffix(".tif"), np.ones((2, 32, 32), np.uint8))
        path.unlink()


def replaced(folder: Path, changed: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in sorted((folder / "images").iterdir()):
        image = np.array(Image.open(path)).transpose(2, 0, 1)
        path.unlink()
        write_raster(path.with_suffix(".tif"), changed(image), crs="EPSG:32633")


FAULTS: list[Change] = [
    four_bands, two_bands, floats, complex_values, damaged, no_pixel_size, absent_bands, nothing, wrong_ids, unmapped_ids,
    masks_in_colours, grey_masks_for_colours, masks_of_two_bands,
]  # fmt: skip
DATA_JOBS = ["check-data", "pretrain", "adapt", "evaluate", "compare", "sweep"]


def start(job: str, settings: dict[str, object], *more: str) -> int:
    Path("given.yaml").write_text(yaml.safe_dump(nested(settings)))
    if job == "sweep":
        Path("space.yaml").write_text(
            "{space: {optimizer.lr: {type: float, low: 1e-4, high: 1e-2, log: true}}, n_trials: 1, study: s}\n"
        )
        return sweeps_main(["run", "--space", "space.yaml", "--config", "given.yaml", *more])
    return main([job, "--config", "given.yaml", *more])


def nested(settings: dict[str, object]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        node = result
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return result


@pytest.fixture
def data(workplace: Path) -> Path:
    return squares_in(workplace / "data")


CASES = [("check-data", domain, fault) for domain in ("source", "target") for fault in FAULTS]
CASES += [(job, "target", fault) for job in DATA_JOBS[2:] for fault in (four_bands, floats, unmapped_ids)]
CASES += [("evaluate", "source", fault) for fault in FAULTS if fault is not nothing] + [("pretrain", "source", nothing)]


@pytest.mark.parametrize(
    ("job", "domain", "fault"), CASES, ids=[f"{job}, {domain}, {fault.__name__}" for job, domain, fault in CASES]
)
def test_what_is_wrong_with_data_names_settings_of_that_domain_alone(job, domain, fault, data, capsys):
    folder = data / ("target_val" if domain == "target" else "source_val")
    given: dict[str, object] = {}
    fault(folder, given)
    settings = small_settings(data) | {f"data.{domain}.{key}": value for key, value in given.items()}
    if job == "evaluate":
        save("model", make_network(classes=2))
        settings["domain_adaptation.pretrained_checkpoint.path"] = "model"
        if {"value_map", "color_map"} & set(given):
            settings["data.class_names"] = None
            settings[f"data.{domain}.{'value_map' if 'value_map' in given else 'color_map'}"] = (
                {1: "ground", 2: "roof"} if "value_map" in given else {"1,2,3": "ground", "4,5,6": "roof"}
            )
    assert start(job, settings) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert foreign_to(job, said) == set()
    other = "target" if domain == "source" else "source"
    if fault is not no_pixel_size:
        assert f"data.{other}." not in said, said


PREDICT_FAULTS = [four_bands, two_bands, floats, complex_values, damaged, no_pixel_size, absent_bands]


@pytest.mark.parametrize("fault", PREDICT_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("way", ["saved", "config"])
def test_what_predict_refuses_names_its_own_settings_alone(way, fault, data, capsys):
    given: dict[str, object] = {}
    fault(data / "target_val", given)
    reading = Reading(
        bands=(1, 2, 5) if fault is absent_bands else None, pixel_size=0.5 if fault is no_pixel_size else None
    )
    network = make_network(classes=2)
    save("model", network, reading)
    torch.save(network.state_dict(), "weights.pt")
    settings = small_settings(data) | {f"data.target.{key}": value for key, value in given.items()}
    Path("given.yaml").write_text(yaml.safe_dump(nested(settings)))
    model = ["--model", "model"] if way == "saved" else ["--model", "weights.pt", "--config", "given.yaml"]
    image = sorted((data / "target_val" / "images").iterdir())[0]
    assert main(["predict", *model, "--input", str(image), "--output", "map.tif", "--accelerator", "cpu"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert foreign_to("predict", said) == set(), said
    assert image.name in said


def absent_model(_: Path) -> str:
    return "absent"


def no_weights(folder: Path) -> str:
    (folder / "empty").mkdir()
    return "empty"


def no_checkpoint(folder: Path) -> str:
    (folder / "text.ckpt").write_text("no checkpoint")
    return "text.ckpt"


def other_network(folder: Path) -> str:
    save("other", make_network(classes=2))
    arguments = (folder / "other" / "config.json").read_text()
    (folder / "other" / "config.json").write_text(arguments.replace("tu-test_resnet", "tu-resnet18"))
    return "other"


def nothing_in_common(_: Path) -> str:
    torch.save({"layer.weight": torch.zeros(3)}, "strange.pt")
    return "strange.pt"


def of_another_library(_: Path) -> str:
    torch.save({"a": "no tensor"}, "plain.pt")
    return "plain.pt"


def other_classes(_: Path) -> str:
    torch.save(make_network(classes=5).state_dict(), "five.pt")
    return "five.pt"


def broken_notes(folder: Path) -> str:
    save("notes", make_network(classes=2))
    (folder / "notes" / "dann.json").write_text('{"arch": "unet", "reading": {"target": {"bands": [0]}}}')
    return "notes"


def half_a_model(folder: Path) -> str:
    save("half", make_network(classes=2))
    (folder / "half" / "config.json").unlink()
    return "half"


MODELS = [
    absent_model, no_weights, no_checkpoint, other_network, nothing_in_common, of_another_library, other_classes, broken_notes,
    half_a_model,
]  # fmt: skip


CASES = [(job, make) for job in ("evaluate", "predict", "predict --config") for make in MODELS]
CASES += [("adapt", absent_model), ("adapt", other_classes), ("sweep", absent_model), ("sweep", other_classes)]


@pytest.mark.parametrize(("job", "make"), CASES, ids=[f"{job}, {make.__name__}" for job, make in CASES])
def test_what_is_wrong_with_a_model_names_settings_of_the_job_alone(job, make, data, capsys):
    settings = small_settings(data)
    model = make(Path.cwd())
    if job.startswith("predict"):
        Path("given.yaml").write_text(yaml.safe_dump(nested(settings)))
        image = sorted((data / "target_val" / "images").iterdir())[0]
        more = ["--config", "given.yaml"] if "config" in job else []
        code = main(
            ["predict", "--model", model, "--input", str(image), "--output", "map.tif", "--accelerator", "cpu", *more]
        )
    else:
        code = start(job, settings, "--source_checkpoint", model)
    said = " ".join(capsys.readouterr().err.split())
    assert code == (1 if job == "sweep" else 2), said
    assert foreign_to(job.partition(" ")[0], said) == set(), said


def test_the_settings_of_config_are_called_those_of_config_in_predict(workplace, capsys):
    torch.save(make_network().state_dict(), "weights.pt")
    Path("given.yaml").write_text("model: {encoder_name: nobody, encoder_weights: null, classes: 3}\n")
    write_raster(Path("a.tif"), np.zeros((3, 32, 32), np.uint8))
    assert (
        main(["predict", "--model", "weights.pt", "--config", "given.yaml", "--input", "a.tif", "--output", "b.tif"])
        == 2
    )
    assert "in the settings of --config" in " ".join(capsys.readouterr().err.split())


def test_names_of_settings_are_no_part_of_how_images_are_read():
    named = Reading(settings="data.target.")
    assert named == Reading()
    assert repr(named) == repr(Reading())
    assert hash(named) == hash(Reading())
    assert "settings" not in reading_facts(named, BYTES)
    facts = reading_facts(named, BYTES) | {"settings": "of a stranger"}
    assert reading_from_facts(facts)[0].settings == ""


# Addresses


SECRETS = ["hunter2", "AKIDEXAMPLE", "deadbeef"]
ADDRESSES = {
    "https://host.org/a.tif": "curl",
    "HTTP://host.org/a.tif": "curl",
    "https://user:hunter2@host.org/a.tif": "host.org/a.tif",
    "https://user:hun@hunter2/x@host.org/a.tif": "host.org/a.tif",
    "https://host.org/a.tif?X-Amz-Credential=AKIDEXAMPLE&X-Amz-Signature=deadbeef": "host.org/a.tif",
    "https://blob.org/a.tif?sv=2020&sig=deadbeef": "blob.org/a.tif",
    "s3://bucket/a.tif": "aws s3 cp",
    "s3://AKIDEXAMPLE:hunter2@bucket/*.tif": "aws s3 cp",
    "gs://bucket/a.tif": "gcloud storage cp",
    "az://container/a.tif": "azcopy",
    "abfss://container@account/a.tif": "azcopy",
    "ftp://user:hunter2@host/a.tif": "curl",
    "sftp://host/a.tif": "scp",
    "hdfs://node/a.tif": "hdfs dfs",
    "strange+thing://host/a.tif": "download it first",
    "/vsicurl/https://user:hunter2@host.org/a.tif": "curl",
    "/vsicurl?header.Authorization=hunter2&url=https%3A%2F%2Fhost": "curl",
    "/vsis3/bucket/a.tif": "aws s3 cp",
    "/vsigs/bucket/a.tif": "gcloud storage cp",
    "/vsizip/scenes.zip/a.tif": "unpack",
    "https:/host.org/a.tif": "curl",
    "s3:/bucket/a.tif": "aws s3 cp",
    " https://host.org/a.tif": "curl",
    "file://elsewhere/a.tif": "another machine",
}


def check_told(said: str, address: str, written: bool = False) -> None:
    assert ("files are written only to the disk" if written else ADDRESSES[address]) in said, said
    assert not any(secret in said for secret in SECRETS), said
    assert "does not exist" not in said


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path_and_is_shown_without_its_passwords(address):
    with pytest.raises(InputError, match=r"^input is ") as error:
        local_path(address, "input")
    check_told(str(error.value), address)


@pytest.mark.parametrize("address", ["https://user:hunter2@host.org/a.tif", "/vsigs/bucket/a.tif"])
def test_an_address_is_told_as_one_without_its_passwords_wherever_a_path_is_taken(address, workplace, capsys):
    shutil.copytree(save("model", make_network()), "kept")
    write_raster(Path("a.tif"), np.zeros((3, 32, 32), np.uint8))
    squares_in(Path("data"))
    Path("given.yaml").write_text(yaml.safe_dump(nested(small_settings(Path.cwd() / "data"))))
    before = sorted(Path().iterdir())
    model, check = ["--model", "model"], ["check-data", "--config", "given.yaml"]
    commands = {
        "input": ["predict", *model, "--input", address, "--output", "map.tif"],
        "inputs": ["predict", *model, "--input", "a.tif", address, "--output", "maps"],
        "output": ["predict", *model, "--input", "a.tif", "--output", address],
        "model": ["predict", "--model", address, "--input", "a.tif", "--output", "map.tif"],
        "config of predict": ["predict", *model, "--input", "a.tif", "--output", "map.tif", "--config", address],
        "config": ["adapt", "--config", address],
        "source_checkpoint": ["evaluate", "--config", "given.yaml", "--source_checkpoint", address],
        "arms": ["compare", "--arms", address],
        "folder": ["adapt", "--tracking.folder", address],
        "root": [*check, "--data.root", address],
        "root of a domain": [*check, "--data.target.root", address],
        "embedded": ["check-data", "--data.embedded.folder", address],
        "data": [*check, "--data.target.train", f"['{address}']"],
        "mapping": [*check, "--data.target.train", f"[{{images: '{address}', masks: '{address}'}}]"],
    }
    for name, arguments in commands.items():
        assert main(arguments) == 2, name
        check_told(" ".join(capsys.readouterr().err.split()), address, name in ("output", "folder", "embedded"))
    assert sweeps_main(["run", "--space", address]) == 2
    check_told(" ".join(capsys.readouterr().err.split()), address)
    left = {path.name for path in set(Path().iterdir()) - set(before)}
    assert not {name for name in left if ":" in name or "vsi" in name}, left


@pytest.mark.parametrize("address", ["gs://bucket/a.tif", "s3://KEY:hunter2@bucket/a.tif"])
def test_an_address_in_a_manifest_or_a_list_is_told_by_its_line(address, tmp_path):
    write_raster(tmp_path / "b.tif", np.zeros((3, 8, 8), np.uint8))
    (tmp_path / "m.csv").write_text(f"image,mask\nb.tif,\n{address},\n")
    (tmp_path / "l.txt").write_text(f"b.tif\n{address}\n")
    for name, place in (("m.csv", r"m\.csv, line 3"), ("l.txt", r"l\.txt")):
        with pytest.raises(InputError, match=rf"data\.source\.train.*{place}.*address") as error:
            find_samples([name], tmp_path, "data.source.train", "no")
        check_told(str(error.value), address) if address in ADDRESSES else None
        assert "hunter2" not in str(error.value)
        assert "cannot be read" not in str(error.value)


def test_a_file_address_of_this_machine_is_its_path(workplace):
    assert local_path("file:///a/b%20c.tif", "input") == Path("/a/b c.tif")
    assert local_text("file://localhost/a", "input") == "/a"
    here = Path.cwd()
    save("model", make_network())
    Path("my scenes").mkdir()
    write_raster(Path("my scenes/a.tif"), np.zeros((3, 32, 32), np.uint8))
    settings = {
        "model": f"file://{here}/model", "input": f"file://{here}/my%20scenes", "output": f"file://{here}/maps",
        "accelerator": "cpu", "progress": False,
    }  # fmt: skip
    predict(load_settings(PredictConfig, None, settings))
    assert Path("maps/a.tif").is_file()
    found = find_samples([f"file://{here}/my%20scenes/*.tif"], Path("/nowhere"), "data.target.train", "no")
    assert [sample.image.name for sample in found] == ["a.tif"]
    Path("given.yaml").write_text("seed: 7\n")
    assert load_config(f"file://{here}/given.yaml").seed == 7


@pytest.mark.parametrize(
    "text", ["a.tif", "a:b/c.tif", "C:/a.tif", "/vsi.tif", "~/a.tif", "a//b.tif", "./https", "x.y/z", ""]
)
def test_a_path_is_no_address(text):
    assert local_text(text, "input") == text


def test_passwords_in_a_value_of_the_wrong_kind_are_not_shown(workplace, capsys):
    assert main(["check-data", "--data.target.pixel_size", "https://user:hunter2@host.org/?token=deadbeef"]) == 2
    said = capsys.readouterr().err
    assert "data.target.pixel_size" in said
    assert not any(secret in said for secret in SECRETS)
