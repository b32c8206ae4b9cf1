"""Checks the MLmodel file beside a saved model: it must name our own loader module, and is never used to import anything here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dann_experiments.config.errors import InputError

MLMODEL = "MLmodel"
LOADER_MODULE = "dann_experiments.prediction.pyfunc_model"
"""The module that MLflow imports to load our models. It is written into users' stores: do not move it."""
LARGEST_BYTES = 2**20
MOST_SHOWN = 80  # characters of a stranger's text in a message


def check_mlmodel(folder: Path, where: str) -> None:
    """Raise InputError if `folder` has an MLmodel file that names another loader than ours, or code to add to Python's path.

    `where`: the model's address, for messages. A folder without that file, as older runs made, passes."""
    file = folder / MLMODEL
    if not file.is_file():
        return
    flavors = _flavors(file, where)
    loader = flavors.get("python_function")
    named = loader.get("loader_module") if isinstance(loader, dict) else None
    if named != LOADER_MODULE or not isinstance(loader, dict):
        # only texts are shown, and cut: aliases in a file of bytes may stand for gigabytes
        shown = f" {named[:MOST_SHOWN]!r}" if isinstance(named, str) else ""
        raise InputError(
            f"model {where}: its MLmodel file names another loader{shown} than {LOADER_MODULE}, so another program made it; its "
            "code is not run here. Give its weights as .safetensors, or as .pt with --config."
        )
    for key in ("code", "model_code_path"):
        if loader.get(key):
            raise InputError(
                f"model {where}: its MLmodel file brings code ({key}), which our models never do; give a model as it was saved."
            )


def _flavors(file: Path, where: str) -> dict[str, Any]:
    try:
        if file.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"it has more than {LARGEST_BYTES} bytes")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        flavors = content.get("flavors") if isinstance(content, dict) else None
        if not isinstance(flavors, dict):
            raise TypeError("it has no mapping of flavors")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0][:MOST_SHOWN]
        raise InputError(
            f"model {where}: its MLmodel file cannot be read ({reason}); give a model as it was saved."
        ) from None
    return flavors
