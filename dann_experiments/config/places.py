"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """`text` with `~` and `~USER` put in. Never raises, as `Path.expanduser` does for a user that is not there."""
    return Path(os.path.expanduser(text))
