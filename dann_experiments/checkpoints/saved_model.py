"""Writes and reads saved models: folders of safetensors and JSON, without pickles.

A saved model is a folder in the `save_pretrained` format of segmentation-models-pytorch (`config.json`, `model.safetensors`), so
that `smp.from_pretrained(folder)` reads it. An additional `dann.json` holds class names, the ignored id, and how the images of
each domain are read and normalized. `read_model_notes` reads both JSON files.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dann_experiments.checkpoints.weights import WEIGHTS_NAME
from dann_experiments.config.atomic_write import writing
from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import user_path
from dann_experiments.data.reading import Normalization, Reading, reading_from_facts
from dann_experiments.models.networks import build_network
from dann_experiments.names import DOMAINS, OneDomain

CONFIG_NAME = "config.json"
NOTES_NAME = "dann.json"
BASIC_ARGUMENTS = ("encoder_name", "in_channels", "classes")
# keys of config.json to skip: unrelated to weights, or a final activation, since our networks return logits
NO_ARGUMENTS = ("_model_class", "encoder_weights", "activation")


log = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass(frozen=True)
class ModelNotes:
    """Metadata of a saved model: the network, the classes, and how images are read."""

    arch: str
    """Architecture, a key of `smp.MODEL_ARCHITECTURES_MAPPING`."""
    arguments: Mapping[str, Any]
    """Arguments of `smp.create_model`: encoder_name, in_channels, classes and others that are not null."""
    class_names: tuple[str, ...] | None = None
    """Class names by class id; None if segmentation-models-pytorch saved the model."""
    ignore_index: int | None = None
    """Mask value that was ignored in training."""
    readings: Mapping[str, tuple[Reading, Normalization]] = field(default_factory=dict)
    """How images are read and normalized, by domain (source, target); domains without training images are absent."""

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self.arguments["classes"]

    @property
    def in_channels(self) -> int:
        """Number of bands per image."""
        return self.arguments["in_channels"]

    def build(self) -> nn.Module:
        """Return the network with uninitialized weights: load all of them before use. Raises InputError if it cannot be built."""
        own = {name: self.arguments[name] for name in self.arguments if name not in BASIC_ARGUMENTS}
        encoder = self.arguments["encoder_name"]
        return build_network(self.arch, encoder, None, self.in_channels, self.classes, own, drawn=False)


def default_domain(notes: ModelNotes) -> str:
    """Return the domain that a model's images are like unless another is asked for: the target, if it knows how to read it."""
    roles = {OneDomain.parse(domain).role for domain in notes.readings}
    return "source" if roles == {"source"} else "target"


def chosen_domain(wanted: str, known: Mapping[str, Found], where: str) -> Found:
    """Return the entry of `known`, by domain, for images like those of `wanted`: target, source, or target.NAME of several.

    `target` also stands for several domains whose entries are equal, and target.NAME for the only target. `where`: whose entries
    these are, for messages. Raises InputError, with the domains to choose from, for any other text.
    """
    if wanted in known:
        return known[wanted]
    of_role = {name: entry for name, entry in known.items() if name.partition(".")[0] == wanted}
    entries = list(of_role.values())
    if entries and all(entry == entries[0] for entry in entries):
        return entries[0]
    if entries:
        raise InputError(
            f"domain is {wanted!r}, but {where} reads images of its domains differently; give one of {', '.join(of_role)}."
        )
    role = wanted.partition(".")[0]
    if role in known:
        log.warning("%s has one %s, without a name: images of %s are read like those.", where, role, wanted)
        return known[role]
    raise InputError(f"domain is {wanted!r}, but {where} knows how to read images of {sorted(known)} only.")


def save_model(
    folder: str | Path, network: nn.Module, arch: str, arguments: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write `network` into `folder`; `arguments`: those of `smp.create_model`, `facts`: further content of `dann.json`.

    Raises NotWritten if the disk is full or not writable.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    config = {"_model_class": type(network).__name__, **arguments, "encoder_weights": None}
    with writing(folder, wanted=lambda: sum(tensor.nbytes for tensor in state.values())):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
        shutil.copymode(folder / CONFIG_NAME, folder / WEIGHTS_NAME)  # safetensors lets only the owner read its file
        (folder / NOTES_NAME).write_text(json.dumps({"arch": arch, **facts}, indent=1) + "\n")


def read_model_notes(path: str | Path, where: str | None = None) -> ModelNotes | None:
    """Read the notes of a saved model at `path` (its folder or weights file); return None for a checkpoint without notes.

    `where` names the model in errors if `path` is a copy. Without `dann.json`, only the network is known. Older models have
    one mean and std for both domains. Raises InputError if notes are damaged or name anything unknown to
    segmentation-models-pytorch; nothing is imported by name.
    """
    path = user_path(path)
    folder = path.parent if path.name == WEIGHTS_NAME and not path.is_dir() else path
    where = where or str(folder)
    if not (folder / CONFIG_NAME).is_file():
        if (folder / NOTES_NAME).is_file():
            raise InputError(
                f"model {where} has {NOTES_NAME} but no {CONFIG_NAME}; give the whole folder as it was saved."
            )
        return None
    config = _read_json(folder / CONFIG_NAME, where)
    has_notes = (folder / NOTES_NAME).is_file()
    if not has_notes and "_model_class" not in config:  # from another library
        return None
    facts = _read_json(folder / NOTES_NAME, where) if has_notes else {"arch": config["_model_class"]}
    check = _NoteChecker(where)
    arch = check.arch(facts.get("arch"))
    arguments = check.arguments(arch, config)
    return ModelNotes(
        arch,
        arguments,
        check.class_names(facts.get("class_names"), arguments["classes"]),
        check.ignore_index(facts.get("ignore_index")),
        check.readings(facts, arguments["in_channels"]),
    )


def _read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"model {where}: its {file.name} cannot be read ({error}); give a model as it was saved."
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"model {where}: its {file.name} holds {type(content).__name__}; give a model as it was saved."
        )
    return content


class _NoteChecker:
    """Validates the notes of a saved model; raises InputError that names the model for invalid ones."""

    def __init__(self, where: str) -> None:
        self.where = where

    def refused(self, key: str, value: Any, wanted: str, file: str = NOTES_NAME) -> InputError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        return InputError(f"model {self.where}: {key} in its {file} is {shown}; it must be {wanted}.")

    def arch(self, value: Any) -> str:
        import segmentation_models_pytorch as smp

        known = smp.MODEL_ARCHITECTURES_MAPPING
        if not isinstance(value, str) or value.lower() not in known:
            raise self.refused("arch", value, f"one of {sorted(known)}")
        return value.lower()

    def arguments(self, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
        import segmentation_models_pytorch as smp

        found = {name: value for name, value in config.items() if name not in NO_ARGUMENTS and value is not None}
        encoder = found.get("encoder_name")
        # a colon (hf-hub:, local-dir:) would make timm download or read other files, which notes must not cause
        if not isinstance(encoder, str) or ":" in encoder:
            raise self.refused("encoder_name", encoder, "an encoder of segmentation-models-pytorch", CONFIG_NAME)
        for name, least in (("in_channels", 1), ("classes", 2)):
            if not _is_whole(found.get(name)) or found[name] < least:
                raise self.refused(name, found.get(name), f"a whole number of at least {least}", CONFIG_NAME)
        accepted = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[arch].__init__).parameters
        for name in found:
            if name not in accepted or name in ("self", "kwargs", "aux_params"):
                raise self.refused(name, found[name], f"left out, as {arch} is built without it", CONFIG_NAME)
        return found

    def class_names(self, value: Any, classes: int) -> tuple[str, ...] | None:
        if value is None:
            return None
        texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not texts or not len(value) == len(set(value)) == classes:
            raise self.refused("class_names", value, f"{classes} different names, one per class")
        return tuple(value)

    def ignore_index(self, value: Any) -> int | None:
        if value is not None and not (_is_whole(value) and 0 <= value <= 255):
            raise self.refused("ignore_index", value, "a whole number from 0 to 255")
        return value

    def readings(self, facts: Mapping[str, Any], bands: int) -> dict[str, tuple[Reading, Normalization]]:
        if "reading" in facts:
            found = facts["reading"]
            if not isinstance(found, dict):
                raise self.refused("reading", found, "a mapping of source and target")
            return {domain: self.reading(domain, found[domain], bands) for domain in found if _is_domain(domain)}
        if "mean" not in facts and "std" not in facts:
            return {}
        older = {"low": [0.0] * bands, "high": [255.0] * bands, "mean": facts.get("mean"), "std": facts.get("std")}
        return dict.fromkeys(DOMAINS, self.reading("", older, bands))

    def reading(self, domain: str, facts: Any, bands: int) -> tuple[Reading, Normalization]:
        prefix = f"reading.{domain}." if domain else ""
        try:
            reading, normalization = reading_from_facts(facts)
        except InputError:
            raise self.refused(
                prefix.rstrip("."), facts, "low, high, mean and std, each with one number per band"
            ) from None
        for key in ("low", "high", "mean", "std"):
            value = getattr(normalization, key)
            if not _are_numbers(value, bands):
                raise self.refused(prefix + key, value, f"{bands} numbers, one per band (in_channels)")
        if min(normalization.std) <= 0:
            raise self.refused(f"{prefix}std", normalization.std, "above 0 for each band")
        if any(low >= high for low, high in zip(normalization.low, normalization.high, strict=True)):
            raise self.refused(f"{prefix}high", normalization.high, f"above low, {normalization.low}")
        wanted = {
            "bands": (_are_bands(reading.bands, bands), f"null or {bands} band numbers counted from 1"),
            "scale": (_is_scale(reading.scale), "type, percentiles or [LOW, HIGH]"),
            "nodata": (_is_nodata(reading.nodata), "file or a list of numbers"),
            "pixel_size": (_is_size(reading.pixel_size), "null or a number above 0"),
            "file_pixel_size": (_is_size(reading.file_pixel_size), "null or a number above 0"),
            "nodata_bands": (reading.nodata_bands in (None, "any", "all"), "null, any or all"),
            "unit": (reading.unit is None or isinstance(reading.unit, str), "null or a text"),
        }
        for key, (right, what) in wanted.items():
            if not right:
                raise self.refused(prefix + key, getattr(reading, key), what)
        return reading, normalization


def _is_domain(text: str) -> bool:
    try:
        OneDomain.parse(text)
    except ValueError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple) and len(value) == count and all(_is_number(one) for one in value)


def _are_bands(value: Any, count: int) -> bool:
    whole = isinstance(value, tuple) and all(_is_whole(one) and one >= 1 for one in value)
    return value is None or (whole and len(value) == count)


def _is_scale(value: Any) -> bool:
    return value in ("type", "percentiles") or (_are_numbers(value, 2) and value[0] < value[1])


def _is_nodata(value: Any) -> bool:
    numbers = isinstance(value, tuple) and all(isinstance(one, float) or _is_whole(one) for one in value)  # NaN too
    return value == "file" or numbers


def _is_size(value: Any) -> bool:
    return value is None or (_is_number(value) and value > 0)
