"""Imports the class that `class_path` names, after checks, since importing a module runs its code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


def find_class(class_path: str) -> Any:
    """Return the object that `package.module.Class` names; its type is not checked. Raises ImportError.

    A module that is not imported yet must be Python source that defines or imports the name, and must not be importable only
    because it is in the current folder: untrusted settings often come with files next to them.
    """
    module_name, _, class_name = class_path.rpartition(".")
    if not all(part.isidentifier() for part in class_path.split(".")) or not module_name:
        raise ImportError("it does not have the form package.module.Class")
    if module_name not in sys.modules:
        _check_source(module_name, class_name)
        importlib.import_module(module_name)
    try:
        return getattr(sys.modules[module_name], class_name)
    except AttributeError as error:
        raise ImportError(str(error)) from None


def _check_source(module_name: str, class_name: str) -> None:
    """Check the module's source without importing anything, not even its parent packages."""
    spec = _spec_of(module_name)
    if spec is None:
        raise ImportError(f"no module named {module_name!r}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ImportError(f"module {module_name} is not a Python source file")
    if _only_in_current_folder(Path(spec.origin), module_name):
        raise ImportError(
            f"{spec.origin} is not installed and only found in the current folder; if it is yours, set PYTHONPATH=."
        )
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise ImportError(f"{spec.origin} cannot be read: {error}") from None
    if not {class_name, "*"} & _names_in(tree):
        raise ImportError(f"{spec.origin} has no class {class_name}")


def _spec_of(module_name: str) -> ModuleSpec | None:
    top, *inner = module_name.split(".")
    spec = sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)
    for number, _ in enumerate(inner, start=2):
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = ".".join(module_name.split(".")[:number])
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec


def _only_in_current_folder(file: Path, module_name: str) -> bool:
    """Return True if the module is found only because `python -m` puts the current folder first on the path."""
    here = Path.cwd().resolve()
    depth = module_name.count(".") + (file.name == "__init__.py")
    if file.resolve().parents[depth] != here:
        return False
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return here not in [Path(entry).resolve() for entry in (*sys.path[1:], *asked) if entry]


def _names_in(tree: ast.Module) -> set[str]:
    """Return the names of all classes and imports in a module."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
    return names
