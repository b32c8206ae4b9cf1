"""Turns texts of users into different names that a tracking store accepts, and into values that fit.

MLflow accepts letters of any script, digits, _ - . / : and blanks in the names of metrics, params and tags, up to 250
characters, if the name is a normalized path. Its tables hold texts up to the lengths below.
"""

from __future__ import annotations

import functools
import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Sequence

LONGEST_KEY = 250
LONGEST_RUN_NAME = 250
LONGEST_DATA_SET = 500
LONGEST_PARAM = 6000
LONGEST_TAG = 5000
"""MLflow accepts 8000 characters, but a database created by an earlier version only 5000."""
LONGEST_SOURCE = 10_000
"""MLflow accepts 65,535 characters of JSON, in which one letter may become six characters."""
LONGEST_EXPERIMENT = 500
LONGEST_LABEL = 225
"""Longest name of a class or an arm, so that `compare/source_test/LABEL/mean` is not too long."""
_KEY = re.compile(r"[\w\-. :/]+")


@functools.lru_cache(maxsize=10_000)
def is_key(name: str) -> bool:
    """Return whether the store accepts `name` for a metric, a param or a tag."""
    is_shortest = posixpath.normpath(name) == name and not name.startswith(("/", ".."))
    return len(name) <= LONGEST_KEY and _KEY.fullmatch(name) is not None and is_shortest and name != "."


def labels_in_store(labels: Sequence[str]) -> dict[str, str]:
    """Return label (of a class or an arm) -> its name in metrics; all names are different.

    ASCII letters, digits, blanks and _ - . are kept; other characters become _. If two names would then be equal, those that
    differ from their label keep letters of any script, and get a digest if they still differ from it.
    """
    plain = {label: _replaced(label, ascii_only=True) for label in labels}
    counts = Counter(plain.values())
    named = {
        label: name
        for label, name in plain.items()
        if _fits(name) and (name == label or (counts[name] == 1 and any(map(str.isalnum, name))))
    }
    for label in plain:
        if label not in named:
            named[label] = _distinct(label, taken=set(named.values()) | (set(plain) - {label}))
    return {label: named[label] for label in labels}


def shortened(value: object, longest: int) -> str:
    """Return `value` as a text of at most `longest` characters.

    A text that is cut ends with a note and a digest, so that different texts stay different.
    """
    text = str(value)
    if len(text) <= longest:
        return text
    end = f" ... (cut: {len(text)} letters, digest {_digest(text)})"
    return text[: longest - len(end)] + end


def _replaced(label: str, ascii_only: bool) -> str:
    return "".join(
        letter if (letter.isalnum() and (letter.isascii() or not ascii_only)) or letter in "_-. " else "_"
        for letter in label
    )


def _fits(name: str) -> bool:
    return 0 < len(name) <= LONGEST_LABEL and name not in (".", "..")


def _distinct(label: str, taken: set[str]) -> str:
    """Return a name for a label whose plain form cannot be used."""
    name = _replaced(label, ascii_only=False)
    if name == label and _fits(name):
        return name
    digest = _digest(label)
    while (found := f"{name[: LONGEST_LABEL - len(digest) - 1]}-{digest}") in taken:
        digest = _digest(found)
    return found


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
