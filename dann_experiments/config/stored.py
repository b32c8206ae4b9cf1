"""Settings that come out of a store (of runs, of studies): who can write there must not choose code that is imported here."""

from __future__ import annotations

from collections.abc import Collection

from dann_experiments.config.errors import InputError
from dann_experiments.config.parsing import replace
from dann_experiments.config.schema import Config

CLASS_PATH = "domain_adaptation.method.class_path"


def refuse_stored_code(named: str | None, allowed: Collection[str], where: str) -> None:
    """Raises InputError if settings of a store name a class (`class_path`) that the caller does not allow by name."""
    if named is not None and named not in allowed:
        raise InputError(
            f"{where} names code, {CLASS_PATH} {named!r}, which is not imported because a store says so; if it is yours, give "
            f"--allow_class_path {named}."
        )


def without_code(config: Config) -> Config:
    """`config` without a method of somebody's own: for reading what a run was about, which needs no method."""
    if config.domain_adaptation.method.class_path is None:
        return config
    return replace(config, {CLASS_PATH: None, "domain_adaptation.method.init_args": {}})
