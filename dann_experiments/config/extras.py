"""Names the command that installs an optional part of this project (the extras of pyproject.toml)."""

from __future__ import annotations

import shlex
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, for a message: in a clone, whose folder pip must know, another
    than for an installed wheel.

    >>> install_command("vector").startswith("pip install ")
    True
    """
    if (PROJECT / "pyproject.toml").is_file():
        return f"pip install --editable {shlex.quote(f'{PROJECT}[{extra}]')}"
    return f"pip install 'dann-experiments[{extra}]'"
