"""Reads untrusted `torch.save` files: tensors and plain values, never code.

Training frameworks save their own objects, mostly hyperparameters, together with the weights. torch refuses such files.
Here, inert placeholders replace these objects without importing their classes, so that the tensors can be read.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from dann_experiments.config.errors import InputError

log = logging.getLogger(__name__)
# no checkpoint needs these modules: a file that names them was made to run code
RUNS_CODE = {
    "_pickle", "builtins", "code", "commands", "ctypes", "importlib", "multiprocessing", "nt", "operator", "os",
    "pickle", "posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys", "webbrowser",
}  # fmt: skip
PLAIN = {
    f"builtins.{name}"
    for name in ("bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set", "slice",
                 "str", "tuple", "type")
}  # fmt: skip
MAPPINGS = {
    "collections.defaultdict", "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict",
}  # fmt: skip
SLACK_BYTES = 2**20  # tolerated excess of the unpacked size over the file's size


class ForeignObject:
    """A placeholder for an object whose class is not imported; accepts any arguments and state, and ignores them."""

    def __new__(cls, *_: Any) -> ForeignObject:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _ForeignMapping:
    """A placeholder for a foreign mapping; it creates an OrderedDict, one of the few types that torch sets items of."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def load_tensors(path: Path) -> dict[str, Any]:
    """Read the mapping in a `torch.save` file, with placeholders for foreign objects.

    Raises InputError if the file names code to run, holds a pickled network, or is not such a file.
    """
    try:
        foreign = _foreign_names(path)
        stand_ins = [(_ForeignMapping if name in MAPPINGS else ForeignObject, name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins):  # pyright: ignore[reportArgumentType]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises many types, all for files that it cannot read
        found = re.search(
            r"WeightsUnpickler error:\s*(.*)|(Trying to load .* is blocked)|(a torchscript checkpoint)", str(error)
        )
        if found and _may_hold_code(path):
            raise InputError(
                f"checkpoint {path} holds more than tensors and plain values ({_first_sentence(found[1] or found[0])}); it was "
                "not loaded, as that could run foreign code. Save only its state_dict."
            ) from None
        raise InputError(
            f"checkpoint {path} is not a checkpoint that torch can read ({type(error).__name__})."
        ) from None
    if isinstance(content, ForeignObject):
        raise InputError(
            f"checkpoint {path} is a whole pickled object ({_listed(foreign)}); loading it would run foreign code. Save only "
            "its state_dict."
        )
    if not isinstance(content, dict):
        raise InputError(
            f"checkpoint {path} holds {type(content).__name__}; give a state dict or a Lightning checkpoint."
        )
    if foreign:
        log.warning("checkpoint %s: only its tensors are read, not its objects of %s.", path, _listed(foreign))
    return content


def _may_hold_code(path: Path) -> bool:
    """Return True if the file begins like an archive or a pickle, unlike a text."""
    with open(path, "rb") as file:
        return file.read(1) in (b"P", b"\x80")


def _foreign_names(path: Path) -> list[str]:
    """Return the names that the file would import, except those that torch considers safe.

    [] for torch's older format, in which torch itself refuses such names. Raises InputError for names that run code.
    """
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as package:
        if sum(member.file_size for member in package.infolist()) > path.stat().st_size + SLACK_BYTES:
            raise InputError(
                f"checkpoint {path} is compressed, which torch.save never does; it may be meant to exhaust the memory."
            )
    foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    runs = [name for name in foreign if name.split(".")[0] in RUNS_CODE and name not in PLAIN]
    if runs:
        raise InputError(
            f"checkpoint {path} holds more than tensors and plain values: it names {_listed(runs)}, which runs code. It was not "
            "loaded; do not trust it."
        )
    return foreign


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].strip()[:200].rstrip(".")
