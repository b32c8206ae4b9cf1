"""Runs a sweep: checks the input, creates the study, runs the workers, and always writes a report at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from dann_experiments.config import Config, InputError, config_to_dict, replace
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.config.paths import user_path
from dann_experiments.config.untrusted import refuse_stored_code
from dann_experiments.data.domain_data import DomainData
from dann_experiments.jobs import checks, prepare
from dann_experiments.jobs.build import find_data
from dann_experiments.jobs.precision import with_precision
from dann_experiments.jobs.shared_data import shared_by
from dann_experiments.names import SOURCE_TEST, SOURCE_VAL, TARGET_TEST, Job, Tag
from dann_experiments.reports.mlflow_views import view_of_sweep
from dann_experiments.tracking.run import PARAM_PREFIX, tracked_run
from dann_experiments.tracking.saved_views import write_views
from dann_experiments.tracking.store import Store, open_store, without_secrets
from dann_experiments.workers.pool import Pool, open_pool, refuse_unshared
from sweeps.cleanup import clean_up_at_start, close_runs
from sweeps.definition import (
    classes_named,
    describe,
    missing_slots,
    refuse_changes,
    slots_of,
    store_settings,
    stored_settings,
)
from sweeps.errors import SweepFailed
from sweeps.objective import check_objective, score_source_model
from sweeps.report import baselines, links, sweep_note, top_trials, write_report
from sweeps.scheduler import run_trials
from sweeps.settings import SweepConfig, storage_address, study_folder
from sweeps.space import Space, read_space
from sweeps.study import (
    DEFINITION,
    SETTINGS,
    SOURCE_WANTED,
    SWEEP_RUNS,
    TRACKING,
    Slot,
    Sweep,
    is_journal,
    open_storage,
)
from sweeps.worker import work

__all__ = ["SweepFailed", "SweepResult", "drive", "find_study", "resume_sweep", "run_sweep", "study_config"]
log = logging.getLogger(__name__)
SOURCE_KEYS = ("model.", "data.", "domain_adaptation.pretrained_checkpoint.")  # searched, they change the source model


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    sweep: Sweep
    """The study."""
    settings: SweepConfig
    best: FrozenTrial | None
    """The best complete trial (`sweeps.ranking`), which forgot the source only if all did; None if there is none."""
    run_id: str
    """The sweep's own run."""
    experiment: str
    tracking_uri: str = field(repr=False)  # it may hold a password
    folder: Path
    """Folder with report.md, trials.csv, best_config.yaml, figures/ and logs/."""
    links: Mapping[str, str]
    """Pages of the MLflow UI, as fragments that start with `#`."""

    @property
    def study(self) -> str:
        """The study's name."""
        return self.sweep.name


def run_sweep(sweep: SweepConfig, config: Config) -> SweepResult:
    """Run a new study, or the missing trials of an existing one.

    Raises InputError, before any trial starts, for input that the user can correct; SweepFailed if `max_failures` trials in a
    row, or all trials, failed.
    """
    named = classes_named(sweep.space, config)  # named by the caller, and so allowed
    sweep = dataclasses.replace(sweep, allow_class_path=list(dict.fromkeys([*sweep.allowed_classes, *named])))
    if sweep.study is None:
        raise InputError("study has no name; give one.")
    checks.refuse_several_processes(config, "the trials of a sweep")
    checks.refuse_auto_batch_size(config, "the trials of a sweep")
    checks.refuse_tta(config, "the trials of a sweep")
    checks.refuse_test_batchnorm(config, "the trials of a sweep")
    config = with_precision(config)  # all trials alike
    space = read_space(sweep.space, config)
    log.info("Looking at the settings and the data ...")
    address = storage_address(sweep.storage, sweep.study)
    with shared_by(sweep.launcher, Path(config.tracking.folder)) as decoded:
        data = find_data(config)  # reports all problems with the files before a study is created
        check_objective(sweep, config, data.labelled)
        checks.warn_of_idle_adversary(config)  # trials warn in the log files of their workers alone
        checks.warn_of_unused_weak_labels(config)
        slots_of(sweep, space, config)  # refuses a space without a grid before anything is opened
        refuse_unshared(sweep, "storage", address)
        with only_driver(address, sweep.study), open_workers(sweep, config) as pool:
            storage = open_storage(address)
            store = open_store(config.tracking.uri, config.tracking.experiment)
            refuse_unshared(sweep, "tracking.uri", store.uri)
            config = in_store(config, store)
            study = Sweep.find(storage, sweep.study)
            if study is not None and study.attribute(DEFINITION) is None and study.trials():
                raise InputError(f"study {study.name!r} was not made by this program; give another name.")
            slots = slots_of(sweep, space, config)
            if (
                study is None or study.attribute(DEFINITION) is None
            ):  # without a definition: its driver died while creating it
                study = study or Sweep.create(storage, sweep.study, sweep.maximizes)
                _begin(study, sweep, space, config, store, slots, data, pool.threads)
            else:
                refuse_changes(study, sweep, space, config)
                _go_on(study, sweep, slots, store, address)
            base = replace(study_config(study, {}), {"tracking": config_to_dict(config)["tracking"]})
            return drive(study, sweep, base, store, address, pool, decoded)


def resume_sweep(
    name: str,
    storage: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    tracking: Mapping[str, Any] | None = None,
) -> SweepResult:
    """Run the missing trials of a study with the settings stored in it.

    `overrides`: settings of the sweep that may change (workers, timeout, launcher, n_trials, ...); `tracking`: dotted
    `tracking.*`, the store of its runs. Raises the same errors as `run_sweep`.
    """
    study = find_study(name, storage_address(storage, name))
    sweep = stored_settings(study, {**(overrides or {}), "storage": storage})
    config = study_config(study, tracking or {})
    for named in classes_named(sweep.space, config):
        refuse_stored_code(named, sweep.allowed_classes, f"study {name!r}")
    return run_sweep(sweep, config)


def find_study(name: str, address: str) -> Sweep:
    """Return an existing study. Raises InputError if there is none of this name at `address`."""
    if is_journal(address) and not os.path.exists(user_path(address)):
        raise InputError(
            f"study {name!r}: there is no {address}. If it was stopped before its first trial, repeat `run`; if it has another "
            "storage, name that with --storage."
        )
    study = Sweep.find(open_storage(address), name)
    if study is None or study.attribute(DEFINITION) is None:
        raise InputError(f"study {name!r} is not in {without_secrets(address)}; `run` makes one.")
    return study


def study_config(study: Sweep, tracking: Mapping[str, Any]) -> Config:
    """Return the settings of a study with the tracking store of its runs; `tracking` (dotted `tracking.*`) takes precedence."""
    place = {f"tracking.{key}": value for key, value in (study.attribute(TRACKING) or {}).items()}
    return replace(config_from_dict(study.attribute(DEFINITION)["config"]), {**place, **tracking})


def drive(
    study: Sweep,
    sweep: SweepConfig,
    config: Config,
    store: Store,
    address: str,
    pool: Pool,
    decoded: Path | None,
    report: Callable[[Sweep, Store, Path], None] = write_report,
) -> SweepResult:
    """Run workers until no trial is left, inside the run of the sweep. The report is written even after an error."""
    folder = study_folder(study.name)
    folder.mkdir(parents=True, exist_ok=True)
    tags = {
        Tag.JOB: Job.SWEEP,
        Tag.STUDY: study.name,
        Tag.OBJECTIVE: sweep.objective,
        Tag.SELECTED_WITH_TARGET_LABELS: str(sweep.uses_target_labels).lower(),
    }
    close_runs(study, store)
    runs = Path(config.tracking.folder)
    searched = [PARAM_PREFIX + key for key in study.attribute(DEFINITION)["space"]]
    views = write_views(store, [view_of_sweep(study.name, sweep.objective, sweep.maximizes, searched)])
    with tracked_run(store, config.tracking.run_name, f"sweep {study.name}", tags, runs, use_claimed=True) as run:
        study.set_attribute(SWEEP_RUNS, [*(study.attribute(SWEEP_RUNS) or []), run.run_id])
        run.log_params({f"sweep.{key}": value for key, value in study.attribute(SETTINGS).items()})
        try:
            run_trials(study, sweep, config, store, address, run, pool, decoded)
            score_source_model(study, config)  # if no worker has done so
        finally:
            report(study, store, folder)
            _into_run(folder, run.folder)
            best = study.best()
            if best is not None:
                run.log_metrics({"sweep/best": best.value}, step=len(study.counted()))
            run.set_tags({Tag.NOTE: sweep_note(study, store, run.run_id, best)})
    shown = [*baselines(study), *top_trials(study)]
    pages = {**views, **links(store, study, list({trial.number: trial for trial in shown}.values()))}
    return SweepResult(study, sweep, best, run.run_id, store.experiment, store.uri, folder, pages)


def _begin(
    study: Sweep, sweep: SweepConfig, space: Space, config: Config, store: Store, slots: list[Slot], data: DomainData,
    threads: int,
) -> None:  # fmt: skip
    """Train the source model if needed and add the trials to the study; `threads`: each worker's share of the cores."""
    shared = not any(parameter.key.startswith(SOURCE_KEYS) for parameter in space.parameters)
    prepared = prepare(config, store, data)
    if slots and slots[0].reference:
        log.info(
            "%s in the settings is outside the space: their trial is run and shown, but the sampler does not see it.",
            space.outside(config),
        )
    scored_on = map(config.data.entries, (SOURCE_VAL, SOURCE_TEST, TARGET_TEST))
    study.set_attribute(SOURCE_WANTED, shared and any(scored_on))
    _free_gpu_memory()  # the workers need it
    experiment = config.tracking.experiment
    secret = without_secrets(store.uri) != store.uri
    study.set_attribute(TRACKING, {"uri": None if secret else store.uri, "experiment": experiment})
    describe(study, sweep, space, with_threads(prepared if shared else config, threads), len(slots))
    study.add(slots)


def _go_on(study: Sweep, sweep: SweepConfig, slots: list[Slot], store: Store, address: str) -> None:
    """Add the missing trials to an existing study."""
    place = study.attribute(TRACKING) or {}
    if place.get("uri") not in (None, store.uri):
        log.warning("The earlier runs of this study are in %s, but new ones go to another store.", place["uri"])
    clean_up_at_start(study, store, is_journal(address))
    present = len(study.counted())
    wanted = sweep.n_trials or study.attribute(SETTINGS)["n_trials"]
    if wanted < present:
        log.warning("study %r already has %d trials, more than n_trials %d.", study.name, present, wanted)
    store_settings(study, sweep, max(present, wanted))
    study.add(missing_slots(sweep, slots, present, wanted))
    log.info("study %r exists: running the missing ones of its %d trials.", study.name, max(present, wanted))


def _free_gpu_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_store(config: Config, store: Store) -> Config:
    """Return the settings with the store and experiment in use; under `mlflow run` these are those of its run."""
    return replace(config, {"tracking.uri": store.uri, "tracking.experiment": store.experiment})


def open_workers(sweep: SweepConfig, config: Config) -> contextlib.AbstractContextManager[Pool]:
    """Open the pool of the sweep's workers."""
    return open_pool(work, sweep, config.trainer.accelerator)


def with_threads(config: Config, share: int) -> Config:
    """Limit the threads of a trial to its share of the cores. Stored with the study, because results depend on it slightly."""
    if config.threads is not None and config.threads <= share:
        return config
    log.info("threads: %d for each trial, so that the workers share the cores.", share)
    return replace(config, {"threads": share})


@contextlib.contextmanager
def only_driver(address: str, study: str) -> Iterator[None]:
    """Lock the study on this machine. Raises InputError if another driver is running it."""
    from filelock import FileLock, Timeout

    if is_journal(address):
        path = user_path(address).parent / f"{study}.driver"
    else:
        digest = hashlib.blake2b(f"{address} {study}".encode(), digest_size=8).hexdigest()
        path = Path(tempfile.gettempdir()) / f"dann-sweep-{digest}.driver"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:  # must come first: it is also an OSError
        raise InputError(
            f"study {study!r} is being run by another process of this machine; wait for it or stop it."
        ) from None
    except OSError as error:
        raise InputError(f"storage is {without_secrets(address)!r}, which cannot be written ({error}).") from None
    try:
        yield
    finally:
        lock.release()


def _into_run(folder: Path, run_folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_dir():
            shutil.copytree(item, run_folder / item.name, dirs_exist_ok=True)
        elif item.suffix not in (".driver", ".lock"):
            shutil.copy(item, run_folder / item.name)
