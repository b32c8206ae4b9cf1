"""The definition of a study, which is stored with it: space, objective, fixed settings and trials."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from typing import Any

from dann_experiments.config import Config, InputError, config_to_dict, flatten
from dann_experiments.config.parsing import config_from_dict, load_settings
from dann_experiments.config.workers import RAY_ONLY
from dann_experiments.names import LAMBDA_ZERO, Key
from sweeps.sampling import PARTS
from sweeps.settings import QUESTION, SweepConfig
from sweeps.space import Space
from sweeps.study import DEFINITION, SETTINGS, Slot, Sweep

log = logging.getLogger(__name__)
DEFAULT_TRIALS = 20
PARTS_OF_RUN = "parts"
# not stored with the settings of a sweep
NOT_STORED = ("space", "study", "storage", "objective", "direction", "n_trials", "timeout", "allow_class_path")


def classes_named(space: Mapping[str, Any], config: Config) -> list[str]:
    """Return every `class_path` named in the settings or in the space, which is written as in its file or `Space.described`."""
    entry = space.get(Key.CLASS_PATH)
    choices = entry.get("choices") or [] if isinstance(entry, Mapping) else []
    return [str(name) for name in (config.domain_adaptation.method.class_path, *choices) if name is not None]


def slots_of(sweep: SweepConfig, space: Space, config: Config) -> list[Slot]:
    """Return all trials of the budget: the values of the recipe, the control, and the trials of the search.

    Raises InputError if the sampler is `grid` and the space has no grid.
    """
    point = space.values_of(config)
    known = [Slot("recipe", {}, point) if point is not None else Slot("recipe", {}, reference=True)]
    known.append(Slot("control", LAMBDA_ZERO, reference=True))
    if sweep.sampler == "grid":
        points = (found for found in space.grid() if found != point)
        slots = itertools.chain(known, (Slot("search", {}, found) for found in points))
        return list(itertools.islice(slots, sweep.n_trials))
    total = sweep.n_trials or DEFAULT_TRIALS
    return [*known, *(Slot("search", {}) for _ in range(total - len(known)))][:total]


def missing_slots(sweep: SweepConfig, slots: list[Slot], present: int, wanted: int) -> list[Slot]:
    """Return the trials that a study with `present` trials still needs to have `wanted`."""
    drawn = 0 if sweep.sampler == "grid" else max(0, wanted - len(slots))
    return [*slots, *(Slot("search", {}) for _ in range(drawn))][present:wanted]


def describe(study: Sweep, sweep: SweepConfig, space: Space, config: Config, n_trials: int) -> None:
    """Store the definition with a new study."""
    settings = config_to_dict(config)
    del settings["tracking"]
    store_settings(study, sweep, n_trials)
    study.set_attribute(  # last: a study with a definition is complete
        DEFINITION,
        {
            "space": space.described(),
            "objective": sweep.objective,
            "direction": "maximize" if sweep.maximizes else "minimize",
            "config": settings,
            PARTS_OF_RUN: PARTS,
        },
    )


def store_settings(study: Sweep, sweep: SweepConfig, n_trials: int) -> None:
    """Store the settings of the sweep with the study, so that `resume` can use them."""
    kept = {key: value for key, value in config_to_dict(sweep).items() if key not in NOT_STORED}
    study.set_attribute(SETTINGS, kept | {"n_trials": n_trials, "pruner": sweep.pruner_used})


def _as_stored(sweep: SweepConfig, key: str) -> Any:
    return sweep.pruner_used if key == "pruner" else getattr(sweep, key)


def stored_settings(study: Sweep, overrides: Mapping[str, Any]) -> SweepConfig:
    """Return the settings stored with a study, with `overrides` taking precedence."""
    definition, stored = study.attribute(DEFINITION), dict(study.attribute(SETTINGS))
    stored.pop("allow_class_path", None)  # a storage cannot give permission to import code
    if not stored.get("gpus_per_trial"):  # the default of earlier versions, in which processes could not share a GPU
        stored.pop("gpus_per_trial", None)
    if overrides.get("launcher") == "processes":
        stored = {key: value for key, value in stored.items() if key not in RAY_ONLY}
    plain = {  # null marks what is not set in the file
        key: {name: value for name, value in entry.items() if value is not None}
        for key, entry in definition["space"].items()
    }
    question = {"space": plain, "objective": definition["objective"], "direction": definition["direction"]}
    return load_settings(SweepConfig, None, {**stored, **question, "study": study.name, **overrides})


def parts_of_run(study: Sweep) -> int | None:
    """Return the parts of a run by which `halving` counts in a study; None in one of an earlier version, which counts epochs."""
    return study.attribute(DEFINITION).get(PARTS_OF_RUN)


def refuse_changes(study: Sweep, sweep: SweepConfig, space: Space, config: Config) -> None:
    """Raise InputError, with the differences, if space, objective, sampler or fixed settings differ from the study's."""
    definition, settings = study.attribute(DEFINITION), study.attribute(SETTINGS)
    changes: dict[str, tuple[Any, Any]] = {}
    direction = "maximize" if sweep.maximizes else "minimize"
    asked = {"objective": sweep.objective, "direction": direction}
    by_default = SweepConfig()  # for settings that a study of an earlier version does not have
    stored = {key: definition.get(key, settings.get(key, _as_stored(by_default, key))) for key in QUESTION}
    asked |= {key: _as_stored(sweep, key) for key in QUESTION if key not in definition}
    for key, new in asked.items():
        old = stored[key]
        if old != new:
            changes[key] = (old, new)
    before, after = definition["space"], json.loads(json.dumps(space.described()))
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            changes[f"space: {key}"] = (before.get(key, "not searched"), after.get(key, "not searched"))
    old, new = flatten(config_from_dict(definition["config"])), flatten(config)
    for key in {**old, **new}:
        ours = key.startswith("tracking.") or key == "threads" or (key == Key.SOURCE_MODEL and new.get(key) is None)
        if not ours and old.get(key) != new.get(key):
            changes[key] = (old.get(key), new.get(key))
    if changes:
        shown = "; ".join(f"{key}: {old!r} in the study, now {new!r}" for key, (old, new) in changes.items())
        raise InputError(
            f"study {study.name!r} has other settings ({shown}); go back to its settings or name a new study."
        )
