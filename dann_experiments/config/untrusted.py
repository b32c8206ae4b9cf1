"""Handles settings read from a store of runs or studies: write access there must not decide which code is imported here."""

from __future__ import annotations

from collections.abc import Collection

from dann_experiments.config.errors import InputError
from dann_experiments.config.parsing import replace
from dann_experiments.config.schema import Config
from dann_experiments.names import Key


def refuse_stored_code(named: str | None, allowed: Collection[str], where: str) -> None:
    """Raise InputError if settings from a store name a class (`class_path`) that the caller has not allowed by name."""
    if named is not None and named not in allowed:
        raise InputError(
            f"{where} names code, {Key.CLASS_PATH} {named!r}, which is not imported because a store says so; if it is yours, "
            f"give --allow_class_path {named}."
        )


def without_code(config: Config) -> Config:
    """Return `config` without a method of the user's own, for code that only reads the settings of a run."""
    if config.domain_adaptation.method.class_path is None:
        return config
    return replace(config, {Key.CLASS_PATH: None, Key.INIT_ARGS: {}})
