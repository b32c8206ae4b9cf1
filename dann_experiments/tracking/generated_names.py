"""Tells a run name that MLflow made up from one that a user gave."""

from __future__ import annotations

import inspect
import re


def is_generated(name: str) -> bool:
    """Return whether MLflow made up this run name (`marvelous-moth-442`), as it does for a run that is created without one.

    MLflow cuts such a name after 20 letters. Its words are internal to it: if a version keeps them elsewhere, no name counts as
    generated.
    """
    try:
        from mlflow.utils import name_utils

        predicates, nouns = name_utils._GENERATOR_PREDICATES, name_utils._GENERATOR_NOUNS
        longest = inspect.signature(name_utils._generate_random_name).parameters["max_length"].default
    except (ImportError, AttributeError, KeyError):
        return False
    words = [f"{predicate}-{noun}-".lower() for predicate in predicates for noun in nouns if predicate[0] == name[:1]]
    for start in words:
        if name.startswith(start) and re.fullmatch(r"\d{1,4}", name[len(start) :], re.ASCII):
            return True
        if len(name) == longest and start.startswith(name):  # cut
            return True
    return False
