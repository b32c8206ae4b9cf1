"""Runs a sweep: checks everything, makes the study, keeps workers going, and ends with a report whatever happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import Config, InputError, config_to_dict, flatten, replace
from dann_experiments.config.parsing import config_from_dict, load_settings
from dann_experiments.jobs import prepare
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import Store, open_store, without_secrets
from sweeps.launchers import Launcher, ProcessLauncher, RayLauncher
from sweeps.objective import check_objective
from sweeps.progress import Progress
from sweeps.reaping import Watch, reap_at_start, reap_dead_workers
from sweeps.report import baselines, links, top_trials, write_report
from sweeps.settings import SweepConfig
from sweeps.space import Space, read_space
from sweeps.study import (
    DEFINITION,
    HALT,
    SETTINGS,
    Slot,
    Sweep,
    is_journal,
    open_storage,
    process_name,
    storage_address,
    study_folder,
)
from sweeps.worker import Task

if TYPE_CHECKING:
    from dann_experiments.tracking.run import TrackedRun

log = logging.getLogger(__name__)
DEFAULT_TRIALS = 20
MOST_DEFAULT_WORKERS = 4
POLL_SECONDS = 1.0
DEATHS_IN_A_ROW = 3  # workers that die without finishing a trial: something is wrong with all of them
SOURCE_KEYS = ("model.", "data.", "domain_adaptation.pretrained_checkpoint.")  # searched, they change the source model
PATH = "domain_adaptation.pretrained_checkpoint.path"
CONTROL = {"domain_adaptation.method.name": "lambda_zero"}


class SweepFailed(RuntimeError):
    """The sweep was stopped because nothing works; the message names the common cause."""


@dataclass(frozen=True)
class SweepResult:
    """A sweep that ended."""

    sweep: Sweep
    """The study."""
    best: FrozenTrial | None
    """The best complete trial; None if there is none."""
    run_id: str
    """The sweep's own run."""
    experiment: str
    tracking_uri: str
    folder: Path
    """report.md, trials.csv, best_config.yaml, figures/, logs/."""
    links: Mapping[str, str]
    """Pages of the MLflow UI, beginning with `#`."""

    @property
    def study(self) -> str:
        """The study's name."""
        return self.sweep.name


def run_sweep(sweep: SweepConfig, config: Config) -> SweepResult:
    """Run a new study, or the missing trials of one that exists. Raises InputError, with nothing started, for what the
    user can mend; SweepFailed when `max_failures` trials failed in a row."""
    if sweep.study is None:
        raise InputError("study has no name; give one.")
    check_objective(sweep, config)
    space = read_space(sweep.space, config)
    _slots(sweep, space, config)  # refuse what has no grid before anything is opened
    address = storage_address(sweep.storage, sweep.study)
    _check_launcher(sweep, address)
    with only_driver(address, sweep.study):
        storage = open_storage(address)
        store = open_store(config.tracking.uri, config.tracking.experiment)
        config = in_store(config, store)
        study = Sweep.find(storage, sweep.study)
        slots = _slots(sweep, space, config)
        if study is None:
            shared = not any(parameter.key.startswith(SOURCE_KEYS) for parameter in space.parameters)
            prepared = prepare(config, store)
            if not slots[0].point:
                log.info("The settings' own values are not in the space: the sampler does not see their trial.")
            study = Sweep.create(storage, sweep.study, sweep.maximizes)
            _describe(study, sweep, space, _with_threads(prepared if shared else config, sweep), len(slots))
            study.add(slots)
        else:
            _refuse_changes(study, sweep, space, config)
            present = len(study.counted())
            wanted = sweep.n_trials or present
            if wanted < present:
                log.warning("study %r has %d trials in all already; n_trials %d is less.", study.name, present, wanted)
            study.add(_more(sweep, slots, present, wanted))
            study.set_attribute(SETTINGS, _stored_settings(sweep, max(present, wanted)))
            log.info("study %r exists: running what is missing of its %d trials.", study.name, max(present, wanted))
        return drive(study, sweep, config, store, address)


def resume_sweep(study_name: str, storage: str | None, overrides: Mapping[str, Any], config: Config) -> SweepResult:
    """Run the missing trials of a study by what is stored with it. `overrides` change how (workers, timeout, launcher,
    n_trials ...), `config` gives the tracking store where it was named."""
    address = storage_address(storage, study_name)
    study = find_study(study_name, address)
    stored = load_settings(
        SweepConfig, None, {**study.attribute(SETTINGS), "objective": study.attribute(DEFINITION)["objective"]}
    )
    sweep = load_settings(
        SweepConfig, None, {**config_to_dict(stored), **overrides, "study": study_name, "storage": storage}
    )
    definition = study.attribute(DEFINITION)
    base = replace(config_from_dict(definition["config"]), {"tracking": config_to_dict(config)["tracking"]})
    if sweep.objective != definition["objective"]:
        _refuse(study, {"objective": (definition["objective"], sweep.objective)})
    return run_sweep(_with_space(sweep, definition["space"]), base)


def find_study(name: str, address: str) -> Sweep:
    """A study that is there; raises InputError if it is not."""
    if is_journal(address) and not Path(address).expanduser().exists():
        raise InputError(f"study {name!r}: there is no {address}; name its storage with --storage.")
    study = Sweep.find(open_storage(address), name)
    if study is None or study.attribute(DEFINITION) is None:
        raise InputError(f"study {name!r} is not in {without_secrets(address)}; `run` makes one.")
    return study


def drive(
    study: Sweep,
    sweep: SweepConfig,
    config: Config,
    store: Store,
    address: str,
    report: Callable[[Sweep, Store, Path], None] = write_report,
) -> SweepResult:
    """Keep workers going until no trial is left, in the sweep's own run; the report is written however it ends."""
    folder = study_folder(study.name)
    folder.mkdir(parents=True, exist_ok=True)
    tags = {
        "dann.job": "sweep",
        "dann.study": study.name,
        "dann.driver": process_name(),
        "dann.objective": sweep.objective,
        "dann.selected_with_target_labels": str(sweep.uses_target_labels).lower(),
    }
    reap_at_start(study, store, is_journal(address))
    runs = Path(config.tracking.folder)
    with tracked_run(store, config.tracking.run_name, f"sweep {study.name}", tags, runs, use_claimed=True) as run:
        run.log_params({f"sweep.{key}": value for key, value in study.attribute(SETTINGS).items()})
        try:
            _keep_going(study, sweep, config, store, address, run)
        finally:
            report(study, store, folder)
            _into_run(folder, run.folder)
            best = study.best()
            if best is not None:
                run.log_metrics({f"best/{sweep.objective}": best.value}, step=len(study.counted()))
    shown = [*baselines(study), *top_trials(study)]
    pages = links(store, study, list({trial.number: trial for trial in shown}.values()))
    return SweepResult(study, best, run.run_id, config.tracking.experiment, store.uri, folder, pages)


def _keep_going(study: Sweep, sweep: SweepConfig, config: Config, store: Store, address: str, run: TrackedRun) -> None:
    study.set_attribute(HALT, None)
    launcher, count = _launcher(sweep, config)
    deadline = None if sweep.timeout is None else time.time() + sweep.timeout
    started = {trial.number for trial in study.trials() if trial.state.is_finished()}
    watch, deaths, finished = Watch(study, store), 0, len(started)
    try:
        with Progress(study, count, deadline) as progress:
            while True:
                for token, reason in launcher.wait(POLL_SECONDS).items():
                    how = f"its worker was {reason}" if reason else "its worker ended"
                    reap_dead_workers(study, store, [token], how)
                    deaths = deaths + 1 if reason else 0
                    if reason:
                        log.warning("worker %s: %s", token, reason)
                watch.look()
                progress.update()
                counts = study.counts()
                now_finished = sum(counts[state] for state in ("complete", "pruned", "fail"))
                if now_finished > finished:
                    deaths, finished = 0, now_finished
                    _log_counts(run, study, sweep, counts)
                cause = _hopeless(study, started, sweep.max_failures)
                if cause is None and deaths > DEATHS_IN_A_ROW:
                    logs = study_folder(study.name) / "logs"
                    cause = (
                        f"{deaths} workers in a row died without finishing a trial; the newest file in {logs} says more"
                    )
                if cause is not None:
                    study.set_attribute(HALT, cause)
                    raise SweepFailed(cause)
                over = deadline is not None and time.time() >= deadline
                open_trials = counts["running"] + (0 if over else counts["waiting"])
                if not open_trials and not launcher.alive:
                    break
                for _ in range(0 if over else min(count, open_trials) - len(launcher.alive)):
                    launcher.start(_task(study, config, store, address, run.run_id, deadline))
            if over and counts["waiting"]:
                log.warning("timeout: %d trials have not been run; `resume` runs them.", counts["waiting"])
    finally:
        tokens = launcher.alive
        launcher.stop()
        reap_dead_workers(study, store, tokens, "stopped with its worker")


def _task(study: Sweep, config: Config, store: Store, address: str, sweep_run_id: str, deadline: float | None) -> Task:
    token = uuid.uuid4().hex[:8]
    tracking = config_to_dict(config)["tracking"] | {"uri": store.uri}
    logs = str((study_folder(study.name) / "logs" / f"worker-{token}.log").resolve())
    return Task(address, study.name, tracking, sweep_run_id, token, os.getcwd(), logs, deadline)


def _launcher(sweep: SweepConfig, config: Config) -> tuple[Launcher, int]:
    if sweep.launcher == "ray":
        launcher = RayLauncher(sweep.ray_address, sweep.cpus_per_trial, sweep.gpus_per_trial)
        return launcher, sweep.workers or max(1, launcher.capacity)
    gpus = _gpus(config)
    return ProcessLauncher(gpus), _worker_count(sweep, gpus)


def _gpus(config: Config) -> list[str]:
    """The GPUs that trials may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if config.trainer.accelerator not in ("auto", "gpu") or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def _worker_count(sweep: SweepConfig, gpus: list[str]) -> int:
    if sweep.workers is not None:
        return sweep.workers
    return len(gpus) or min(_cores(), MOST_DEFAULT_WORKERS)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_threads(config: Config, sweep: SweepConfig) -> Config:
    """The cores shared among the workers. Stored with the study: the last digits of a result depend on it."""
    if sweep.launcher == "ray":
        share = max(1, int(sweep.cpus_per_trial))
    else:
        share = max(1, _cores() // _worker_count(sweep, _gpus(config)))
    if config.threads is not None and config.threads <= share:
        return config
    log.info("threads: %d for each trial, so that the workers share the cores.", share)
    return replace(config, {"threads": share})


def in_store(config: Config, store: Store) -> Config:
    """Under `mlflow run`, store and experiment are those of its run: the trials belong there too."""
    name = store.client.get_experiment(store.experiment_id).name
    return replace(config, {"tracking.uri": store.uri, "tracking.experiment": name})


def _check_launcher(sweep: SweepConfig, address: str) -> None:
    if sweep.launcher == "ray" and (is_journal(address) or address.startswith("sqlite")):
        raise InputError(
            f"launcher is 'ray', but storage is {without_secrets(address)!r}, which other machines cannot share; give a "
            "server's address, such as postgresql://USER:PASSWORD@HOST/DATABASE."
        )


@contextlib.contextmanager
def only_driver(address: str, study: str) -> Iterator[None]:
    """Hold the study on this machine; raises InputError if another driver does."""
    from filelock import FileLock, Timeout

    if is_journal(address):
        path = Path(address).expanduser().with_suffix(".driver")
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        digest = hashlib.blake2b(f"{address} {study}".encode(), digest_size=8).hexdigest()
        path = Path(tempfile.gettempdir()) / f"dann-sweep-{digest}.driver"
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise InputError(
            f"study {study!r} is being run by another process of this machine; wait for it or stop it."
        ) from None


# what a study is, and whether it still is


def _slots(sweep: SweepConfig, space: Space, config: Config) -> list[Slot]:
    """All trials of the budget: the recipe's own values, the control, and those that the search will fill."""
    point = space.values_of(config)
    known = [Slot("recipe", {}, point) if point is not None else Slot("recipe", {}, reference=True)]
    if point is None:
        log.info(
            "The settings' own values are not in the space: their trial is shown, and the sampler does not see it."
        )
    known.append(Slot("control", CONTROL, reference=True))
    if sweep.sampler == "grid":
        points = [found for found in space.grid() if found != point]
        return [*known, *(Slot("search", {}, found) for found in points)][: sweep.n_trials]
    total = sweep.n_trials or DEFAULT_TRIALS
    return [*known, *(Slot("search", {}) for _ in range(total - len(known)))][:total]


def _more(sweep: SweepConfig, slots: list[Slot], present: int, wanted: int) -> list[Slot]:
    if wanted <= present:
        return []
    return slots[present:wanted] if sweep.sampler == "grid" else [Slot("search", {}) for _ in range(wanted - present)]


def _stored_settings(sweep: SweepConfig, n_trials: int) -> dict[str, Any]:
    hidden = ("space", "study", "storage", "objective", "n_trials", "timeout", "confirm_top", "ray_address")
    return {key: value for key, value in config_to_dict(sweep).items() if key not in hidden} | {"n_trials": n_trials}


def _describe(study: Sweep, sweep: SweepConfig, space: Space, config: Config, n_trials: int) -> None:
    settings = config_to_dict(config)
    del settings["tracking"]
    study.set_attribute(
        DEFINITION,
        {
            "space": space.described(),
            "objective": sweep.objective,
            "direction": "maximize" if sweep.maximizes else "minimize",
            "config": settings,
        },
    )
    study.set_attribute(SETTINGS, _stored_settings(sweep, n_trials))


def _refuse_changes(study: Sweep, sweep: SweepConfig, space: Space, config: Config) -> None:
    """A study is one question; another space, objective or base is another study."""
    definition = study.attribute(DEFINITION)
    if definition is None:
        raise InputError(f"study {study.name!r} was not made by this program; give another name.")
    changes: dict[str, tuple[Any, Any]] = {}
    direction = "maximize" if sweep.maximizes else "minimize"
    for key, new in (("objective", sweep.objective), ("direction", direction)):
        if definition[key] != new:
            changes[key] = (definition[key], new)
    before, after = definition["space"], json.loads(json.dumps(space.described()))
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            changes[f"space: {key}"] = (before.get(key, "not searched"), after.get(key, "not searched"))
    old, new = flatten(config_from_dict(definition["config"])), flatten(config)
    for key in {**old, **new}:
        ours = key.startswith("tracking.") or key == "threads" or (key == PATH and new.get(key) is None)
        if not ours and old.get(key) != new.get(key):
            changes[key] = (old.get(key), new.get(key))
    if changes:
        _refuse(study, changes)


def _refuse(study: Sweep, changes: Mapping[str, tuple[Any, Any]]) -> None:
    shown = "; ".join(f"{key}: {old!r} in the study, now {new!r}" for key, (old, new) in changes.items())
    raise InputError(
        f"study {study.name!r} asks something else ({shown}); go back to its settings or name a new study."
    )


def _with_space(sweep: SweepConfig, space: Mapping[str, Any]) -> SweepConfig:
    plain = {key: {name: value for name, value in entry.items() if value is not None} for key, entry in space.items()}
    return load_settings(SweepConfig, None, {**config_to_dict(sweep), "space": plain})


# watching


def _hopeless(study: Sweep, before: set[int], max_failures: int) -> str | None:
    """Why the sweep should stop: the last `max_failures` trials failed."""
    ended = [t for t in study.counted() if t.state.is_finished() and t.number not in before and t.datetime_complete]
    ended.sort(key=lambda trial: trial.datetime_complete or 0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    last = ended[-max_failures:]
    if len(last) < max_failures or any(trial.state != TrialState.FAIL for trial in last):
        return None
    reasons = Counter(str(trial.user_attrs.get("error", "unknown")) for trial in last)
    reason, count = reasons.most_common(1)[0]
    return f"the last {max_failures} trials failed, {count} of them with: {reason}"


def _log_counts(run: TrackedRun, study: Sweep, sweep: SweepConfig, counts: Mapping[str, int]) -> None:
    done = counts["complete"] + counts["pruned"] + counts["fail"]
    values: dict[str, float] = {f"trials/{state}": counts[state] for state in ("complete", "pruned", "fail")}
    best = study.best()
    if best is not None and best.value is not None:
        values[f"best/{sweep.objective}"] = best.value
    run.log_metrics(values, step=done)


def _into_run(folder: Path, run_folder: Path) -> None:
    import shutil

    for item in folder.iterdir():
        if item.is_dir():
            shutil.copytree(item, run_folder / item.name, dirs_exist_ok=True)
        elif item.suffix not in (".driver", ".lock"):
            shutil.copy(item, run_folder / item.name)
