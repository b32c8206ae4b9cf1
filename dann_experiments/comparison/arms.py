"""From settings to cells: which job with which settings an arm is for a seed, and the digest by which it is found again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dann_experiments.comparison.result import Arm
from dann_experiments.config import Config, InputError, config_to_dict, replace
from dann_experiments.config.comparison import DEFAULT_ARMS, CompareConfig
from dann_experiments.config.presets import filled
from dann_experiments.jobs import setup
from dann_experiments.jobs.evaluate import SETS as SCORED_SETS
from dann_experiments.jobs.evaluate import STATISTICS_SET
from dann_experiments.jobs.pretrain import SETS as PRETRAINING_SETS

log = logging.getLogger(__name__)
PATH = "domain_adaptation.pretrained_checkpoint.path"
JOBS = {
    "source_only": "pretrain", "statistics": "evaluate", "control": "adapt", "adapted": "adapt", "oracle": "pretrain",
}  # fmt: skip
SETS = {"pretrain": PRETRAINING_SETS, "adapt": setup.SETS, "evaluate": (*SCORED_SETS, STATISTICS_SET)}


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: a run to be found or made."""

    arm: Arm
    seed: int
    job: str
    """pretrain, adapt or evaluate."""
    config: Config
    """Without its source model where that is another cell's run."""
    digest: str
    needs_source: bool
    """Whether it starts from the run of the source-only cell with this seed."""


def arms_of(settings: CompareConfig, config: Config) -> tuple[list[Arm], list[str]]:
    """The arms, with `source only` in any case, as all others start from it; and notes about what was left out."""
    notes = []
    given: Mapping[str, Mapping[str, Any]] = settings.arms or DEFAULT_ARMS
    arms = [
        Arm(name, arm.get("kind", "adapted"), {key: value for key, value in arm.items() if key != "kind"})
        for name, arm in given.items()
    ]
    if not any(arm.kind == "source_only" for arm in arms):
        arms.insert(0, Arm("source only", "source_only"))
    if not any(arm.kind == "control" for arm in arms):
        notes.append("There is no lambda = 0 control, without which no help can be claimed.")
    kept = []
    for arm in arms:
        if arm.kind == "source_only" and arm.overrides:
            raise InputError(
                f"arms.{arm.name} changes {sorted(arm.overrides)}, but all arms start from this one model; change the "
                "settings of the comparison instead."
            )
        if arm.kind == "oracle" and not config.data.oracle:
            if settings.arms:
                raise InputError(f"arms.{arm.name} is an oracle, but data.oracle names no labelled target images.")
            notes.append("No oracle: data.oracle names no labelled training images of the target.")
            continue
        kept.append(arm)
    return kept, notes


def cells_of(arms: Sequence[Arm], seeds: Sequence[int], config: Config, source_digest: str | None) -> list[Cell]:
    """Every arm with every seed, source models first. All settings are checked and all data found; raises InputError.

    `source_digest`: the digest of the source model that the settings name; None where it is trained, once a seed.
    """
    digests = _Digests()
    given = config.domain_adaptation.pretrained_checkpoint.path
    cells: list[Cell] = []
    for seed in seeds:
        source = source_digest or digests.of("pretrain", replace(config, {"seed": seed}), None)
        for arm in sorted(arms, key=lambda arm: arm.kind != "source_only"):
            job = "evaluate" if arm.kind == "source_only" and given is not None else JOBS[arm.kind]
            own = _settings(arm, config, seed)
            from_source = job != "pretrain"
            digest = digests.of(job, own, source if from_source else None)
            cells.append(Cell(arm, seed, job, own, digest, from_source and given is None))
    return cells


def _settings(arm: Arm, config: Config, seed: int) -> Config:
    changes: dict[str, Any] = {"seed": seed}
    if arm.kind == "control":
        changes |= {
            "domain_adaptation.method.name": "lambda_zero",
            "domain_adaptation.method.class_path": None,
            "domain_adaptation.method.init_args": {},
        }
    elif arm.kind == "statistics":
        changes["domain_adaptation.batchnorm"] = "target_stats"
    elif arm.kind == "oracle":
        changes |= _trained_on_the_target(config)
    try:
        return replace(config, changes | dict(arm.overrides))
    except InputError as error:
        raise InputError(f"arms.{arm.name}: {error}") from None


def _trained_on_the_target(config: Config) -> dict[str, Any]:
    """The source model's own training, with labelled target images in the source's place."""
    source = filled(config.data.source)
    target = dataclasses.replace(
        filled(config.data.target), preset=None, scene=None, train=list(config.data.oracle),
        augmentation=source.augmentation, batch_size=source.batch_size,
    )  # fmt: skip
    return {
        "data.source": config_to_dict(target),
        "data.class_names": list(config.class_names),
        "data.oracle": [],
        PATH: None,
    }


class _Digests:
    """Digests of runs; files are read once for all cells with the same data settings."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, str]] = {}

    def of(self, job: str, config: Config, source: str | None) -> str:
        key = repr((SETS[job], config.data, config.model.in_channels, config.model.classes))
        if key not in self._found:
            self._found[key] = setup.load_data(config, SETS[job]).digests
        digests = self._found[key]
        return setup.run_digest(job, config, digests, source)
