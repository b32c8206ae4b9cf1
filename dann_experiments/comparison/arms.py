"""Turns settings into cells: the job and settings of each arm and seed, with a digest by which a finished run is found."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dann_experiments.comparison.result import Arm
from dann_experiments.config import Config, InputError, config_to_dict, replace
from dann_experiments.config.comparison import ARM_NAMES, DEFAULT_ARMS, NAMED_ARMS, CompareConfig
from dann_experiments.config.data import OF_ALL_DOMAINS, DomainDataConfig
from dann_experiments.config.parsing import known_keys
from dann_experiments.jobs.build import find_data, make_method, make_taps, network_to_adapt
from dann_experiments.jobs.checks import (
    checked_sets,
    idle_adversary,
    refuse_auto_batch_size,
    refuse_test_batchnorm,
    refuse_tta,
)
from dann_experiments.jobs.evaluate import STATISTICS_SET
from dann_experiments.jobs.evaluate_weak_labels import digests_of_weak_labels, find_weak_labels
from dann_experiments.jobs.identity import run_digest
from dann_experiments.jobs.precision import with_precision
from dann_experiments.names import (
    ALL_SETS,
    LAMBDA_ZERO,
    PRETRAINING_SETS,
    SCORED_SETS,
    TARGET_WEAK,
    Job,
    Key,
    OneDomain,
)

log = logging.getLogger(__name__)
JOBS = {
    "source_only": Job.PRETRAIN, "statistics": Job.EVALUATE, "test_statistics": Job.EVALUATE, "masks": Job.EVALUATE,
    "control": Job.ADAPT, "adapted": Job.ADAPT, "oracle": Job.PRETRAIN,
}  # fmt: skip
SOURCE_ONLY = ARM_NAMES["source_only"]
NO_CONTROL = "There is no lambda = 0 control, without which a gain cannot be attributed to adaptation."
ADVERSARY = ("domain_adaptation.method.", Key.FEATURE_LAYERS)
COMPANIONS = "domain_adaptation.companions"
SET_HERE = ("seed", "threads", "tracking.", Key.SOURCE_MODEL, Key.SOURCE_PREFIX, "data.oracle")
"""Settings that the comparison itself sets for all arms."""
ALIKE = (
    "model.", "data.class_names", "data.ignore_index", "data.source.val", "data.source.test", "data.target.val",
    "data.target.test", "data.source.domains", "data.target.domains",
)  # fmt: skip
"""Settings that all arms share: the network, since they start from one source model, and the images for scoring."""
MAKES_THE_KIND = {
    "control": (Key.METHOD, Key.CLASS_PATH, "domain_adaptation.method.lambda_da"),
    "statistics": ("domain_adaptation.batchnorm",),
    "test_statistics": ("test_batchnorm", "domain_adaptation.batchnorm"),
}  # fmt: skip
SETS = {Job.PRETRAIN: PRETRAINING_SETS, Job.ADAPT: ALL_SETS, Job.EVALUATE: (*SCORED_SETS, STATISTICS_SET)}


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: a run to find or to make."""

    arm: Arm
    seed: int
    job: str
    """pretrain, adapt or evaluate."""
    config: Config
    """Its settings, without the source model if that is the run of another cell."""
    digest: str
    needs_source: bool
    """True if it starts from the run of the source-only cell with this seed."""


def arms_of(settings: CompareConfig, config: Config) -> tuple[list[Arm], list[str]]:
    """Return the arms and notes about arms left out. `source only` is always added, because all others start from it."""
    notes = []
    given: Mapping[str, Mapping[str, Any] | None] = settings.arms or DEFAULT_ARMS
    arms = []
    for name, arm in given.items():
        overrides = _dotted({key: value for key, value in (arm or {}).items() if key != "kind"})
        arms.append(Arm(name, (arm or {}).get("kind", "adapted"), overrides))
    if not any(arm.kind == "source_only" for arm in arms):
        if SOURCE_ONLY in given:
            raise InputError(f"arms.{SOURCE_ONLY} is not of kind source_only, despite its name; give it another name.")
        arms.insert(0, Arm(SOURCE_ONLY, "source_only"))
    if not any(arm.kind == "control" for arm in arms):
        notes.append(NO_CONTROL)
    notes += [*_not_followed(arms), *transductive(arms)]
    kept: list[Arm] = []
    no_weak_labels: list[str] = []
    for arm in arms:
        if arm.kind == "source_only" and arm.overrides:
            raise InputError(
                f"arms.{arm.name} changes {sorted(arm.overrides)}, but all arms start from this one model; change the "
                "settings of the comparison instead."
            )
        _refuse_overrides(arm)
        if arm.kind == "oracle" and not config.data.oracle:
            if settings.arms and settings.arms not in NAMED_ARMS.values():
                raise InputError(f"arms.{arm.name} is an oracle, but data.oracle names no labeled target images.")
            notes.append("No oracle: data.oracle names no labeled training images of the target.")
            continue
        if settings.arms in NAMED_ARMS.values() and _lacks_weak_labels(arm, config):
            no_weak_labels.append(arm.name)
            continue
        if arm.kind == "masks" and not find_weak_labels(replace(config, arm.overrides)):
            why = (
                "data.target.weak_labels does not have a mask for every image of data.target.val or of data.target.test"
            )
            if settings.arms not in NAMED_ARMS.values():
                raise InputError(f"arms.{arm.name} scores weak labels, but {why}; add them there.")
            notes.append(f"Left out: {arm.name}, as {why}.")
            continue
        kept.append(arm)
    if no_weak_labels:
        notes.append(f"Left out: {', '.join(no_weak_labels)}, as data.target.weak_labels lists no masks.")
    return kept, notes


def _lacks_weak_labels(arm: Arm, config: Config) -> bool:
    needed = arm.kind == "masks" or "weak_labels" in str(arm.overrides.get(COMPANIONS, ""))
    return needed and not config.data.entries(TARGET_WEAK)


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> value; an arm may nest its settings like a config file."""
    leaves = known_keys()
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in leaves:
            found |= _dotted(value, f"{key}.")
        else:
            found[key] = value
    return found


def _refuse_overrides(arm: Arm) -> None:
    """Raise InputError for settings that would have no effect in an arm, or that contradict its kind."""
    for key in arm.overrides:
        where = f"arms.{arm.name} sets {key} to {arm.overrides[key]!r}, but"
        if key.startswith(SET_HERE):
            raise InputError(f"{where} all arms share it; set it in the config of the comparison.")
        if key.startswith(ALIKE):
            raise InputError(
                f"{where} arms start from one source model and are scored on the same images; set it in the config, or make "
                "a separate comparison."
            )
        if key in MAKES_THE_KIND.get(arm.kind, ()):
            raise InputError(
                f"{where} this is what makes an arm of kind {arm.kind}; leave it out, or use kind adapted."
            )


def _not_followed(arms: Sequence[Arm]) -> Iterator[str]:
    """Yield notes about adapted arms that differ from the control in more than the adversary."""
    control = next((arm.overrides for arm in arms if arm.kind == "control"), None)
    with_companions: list[str] = []
    for arm in arms:
        if arm.kind == "adapted" and control is not None:
            more = [
                key
                for key, value in arm.overrides.items()
                if not key.startswith(ADVERSARY) and control.get(key) != value
            ]
            if more == [COMPANIONS]:
                with_companions.append(arm.name)
            elif more:
                yield (
                    f"{arm.name} differs from the control in more than the adversary ({', '.join(more)}): what it gains over the "
                    "control may be due to that."
                )
    if with_companions:
        yield (
            f"Other companions than the control: {', '.join(with_companions)}. What these arms gain over the control is not the "
            "adversary's alone; the table of parts says which part adds what."
        )


def transductive(arms: Sequence[Arm]) -> Iterator[str]:
    """Yield a note for arms that read the scored images before they are scored."""
    named = [arm.name for arm in arms if arm.kind == "test_statistics"]
    if named:
        yield (
            f"{', '.join(named)}: the BatchNorm statistics are those of the scored images themselves (not their masks), which "
            "other arms do not read in advance. Such a score is that of mapping images at hand, not of images to come."
        )


def check_arms(cells: Sequence[Cell]) -> None:
    """Read the data and build network and method of every adapting arm once, as its job will.

    Raises InputError for wrong input, before any source model is trained.
    """
    checked_data, checked = set(), set()
    for cell in cells:
        if cell.job != Job.ADAPT or cell.arm.name in checked:
            continue
        checked.add(cell.arm.name)
        config = cell.config
        try:
            with torch.random.fork_rng(devices=[]):  # some encoders draw random numbers all the same
                network = network_to_adapt(config, initialize=False)
            weak = config.domain_adaptation.uses_weak_labels
            key = repr((SETS[cell.job], weak, config.data, config.model, config.monitor, config.trainer.accelerator))
            if key not in checked_data:
                checked_sets(config, find_data(config, SETS[cell.job]), network)
                checked_data.add(key)
            with torch.random.fork_rng(devices=[]):
                make_method(config, make_taps(config, network))
        except InputError as error:
            raise _of_arm(cell.arm, error) from None


def warn_of_idle(cells: Sequence[Cell]) -> None:
    """Warn of adversaries that do nothing in all or half of the epochs; each run warns as well, but in its log file alone."""
    for text in {idle_adversary(cell.config) for cell in cells if cell.job == Job.ADAPT} - {None}:
        log.warning("%s", text)


def _of_arm(arm: Arm, error: InputError) -> InputError:
    """Return `error`, with the name of the arm if its own settings may have caused it."""
    return InputError(f"arms.{arm.name}: {error}") if arm.overrides or arm.kind == "oracle" else error


def cells_of(arms: Sequence[Arm], seeds: Sequence[int], config: Config, source_digest: str | None) -> list[Cell]:
    """Return one cell per arm and seed, source models first. Check all settings and find all data; raises InputError.

    `source_digest`: digest of the source model that the settings name; None if one is trained per seed.
    """
    config, digests = with_precision(config), _Digests()
    given = config.domain_adaptation.pretrained_checkpoint.path
    cells: list[Cell] = []
    for seed in seeds:
        source = source_digest or digests.of(Job.PRETRAIN, replace(config, {"seed": seed}), None)
        for arm in sorted(arms, key=lambda arm: arm.kind != "source_only"):
            job = Job.EVALUATE if arm.kind == "source_only" and given is not None else JOBS[arm.kind]
            own = _settings(arm, config, seed)
            _refuse_in_comparisons(arm, own)  # before files are read
            from_source = job != Job.PRETRAIN and arm.kind != "masks"
            try:
                digest = digests.of(job, own, source if from_source else None, arm.kind == "masks")
            except InputError as error:
                raise _of_arm(arm, error) from None
            cells.append(Cell(arm, seed, job, own, digest, from_source and given is None))
    return cells


def _refuse_in_comparisons(arm: Arm, config: Config) -> None:
    """Raise InputError for settings with which scores of arms cannot be compared."""
    refuse_auto_batch_size(config, "the runs of a comparison")
    refuse_tta(config, "the runs of a comparison")
    if arm.kind != "test_statistics":
        refuse_test_batchnorm(config, "the runs of a comparison")


def _settings(arm: Arm, config: Config, seed: int) -> Config:
    changes: dict[str, Any] = {"seed": seed}
    if arm.kind == "control":
        changes |= LAMBDA_ZERO
    elif arm.kind == "statistics":
        changes["domain_adaptation.batchnorm"] = "target_stats"
    elif arm.kind == "test_statistics":
        changes |= {"test_batchnorm": "images", "domain_adaptation.batchnorm": "separate"}
    elif arm.kind == "oracle":
        changes |= _trained_on_the_target(config)
    try:
        return with_precision(replace(config, changes | dict(arm.overrides)))
    except InputError as error:
        raise _of_arm(arm, error) from None


def _trained_on_the_target(config: Config) -> dict[str, Any]:
    """Return the changes that train the source model on labeled target images instead."""
    source, data = config.data.source, config.data
    training = {
        "batch_size": source.batch_size,
        "sampling": source.sampling,
        "sampling_temperature": source.sampling_temperature,
    }
    augmentation = next(iter(data.of_role("source").values())).augmentation

    def labelled(one: OneDomain, entries: Sequence[Any]) -> dict[str, Any]:
        return config_to_dict(
            dataclasses.replace(
                data.domains[one], preset=None, scene=None, train=list(entries), train_labelled=[], weak_labels=[],
                labelled_count=None, augmentation=augmentation, **training,
            )
        )  # fmt: skip

    if isinstance(data.oracle, dict):
        named = {name: labelled(OneDomain("target", name), entries) for name, entries in data.oracle.items()}
        own = {
            name: {key: value for key, value in one.items() if key not in OF_ALL_DOMAINS} for name, one in named.items()
        }
        changes = {**config_to_dict(DomainDataConfig(**training)), "domains": own}
    else:
        changes = labelled(OneDomain("target"), data.oracle)
    return {
        "data.source": changes,
        "data.class_names": list(config.class_names),
        "data.oracle": [],
        Key.SOURCE_MODEL: None,
        Key.SOURCE_PREFIX: None,
    }


class _Digests:
    """Computes digests of runs; files are read once for all cells with the same data settings."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, str]] = {}

    def of(self, job: str, config: Config, source: str | None, masks_alone: bool = False) -> str:
        """Return the digest of a run that starts from `source`; `masks_alone`: it scores weak labels, without a network."""
        weak = config.domain_adaptation.uses_weak_labels
        key = repr((SETS[job], weak, masks_alone, config.data, config.model.in_channels, config.model.classes))
        if key not in self._found:
            found = digests_of_weak_labels(config) if masks_alone else find_data(config, SETS[job]).digests
            self._found[key] = found
        return run_digest(job, config, self._found[key], source)
