"""Patterns of file names, with what their wildcards match, by which images and masks are paired."""

from __future__ import annotations

import re

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".vrt")


def expression_of(pattern: str) -> str:
    """Return the regular expression of a glob pattern, with one group per wildcard."""
    parts = []
    for part in re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", pattern.replace("\\", "/")):
        if part == "**/":
            parts.append("((?:.*/)?)")
        elif part == "*":
            parts.append("([^/]*)")
        elif part == "?":
            parts.append("([^/])")
        elif part.startswith("[") and part.endswith("]"):
            parts.append(f"({part.replace('[!', '[^', 1)})")
        else:
            parts.append(re.escape(part))
    return "".join(parts)
