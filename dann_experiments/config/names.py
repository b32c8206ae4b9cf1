"""What texts of a user are called in a tracking store: names that it takes, no two alike, and values that fit.

MLflow takes letters of any script, digits, and _ - . / : and blanks in the names of metrics, params and tags, up to 250
of them, if the name is a path in its shortest form. Its tables keep texts up to the lengths below.
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
"""MLflow takes 8000, a database that an earlier version made 5000."""
LONGEST_SOURCE = 10_000
"""MLflow takes 65,535 of the source as JSON, where a letter may become six."""
LONGEST_EXPERIMENT = 500
LONGEST_LABEL = 225
"""Of a class or an arm: `compare/source_test/LABEL/mean` is then as long as a name may be."""
_KEY = re.compile(r"[\w\-. :/]+")


@functools.lru_cache(maxsize=10_000)
def is_key(name: str) -> bool:
    """Whether the store takes `name` as that of a metric, a param or a tag."""
    is_shortest = posixpath.normpath(name) == name and not name.startswith(("/", ".."))
    return len(name) <= LONGEST_KEY and _KEY.fullmatch(name) is not None and is_shortest and name != "."


def labels_in_store(labels: Sequence[str]) -> dict[str, str]:
    """Label (of a class, of an arm) -> what it is called within the names of metrics, where no two are called alike.

    ASCII letters, digits, blanks and _ - . stay as they are; anything else becomes _. Where labels would then be called alike,
    those that are not called by their own text keep letters of any script, and get a digest if that is not their text either.
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
    """`value` as a text of at most `longest` letters. A longer one says at its end that it was cut, and has a digest there, by
    which different texts stay different."""
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
    """A name for a label that cannot be called by its plain form."""
    name = _replaced(label, ascii_only=False)
    if name == label and _fits(name):
        return name
    digest = _digest(label)
    while (found := f"{name[: LONGEST_LABEL - len(digest) - 1]}-{digest}") in taken:
        digest = _digest(found)
    return found


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
