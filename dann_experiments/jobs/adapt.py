"""Adapts a source model to the unlabeled target: the main job."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
from torch import nn

from dann_experiments.config import Config
from dann_experiments.data.domain_data import DomainData
from dann_experiments.jobs.build import find_data, make_method, make_taps, network_to_adapt, seeded
from dann_experiments.jobs.checks import (
    checked_sets,
    refuse_several_processes,
    refuse_test_batchnorm,
    refuse_tta,
    warn_of_a_single_step,
    warn_of_idle_adversary,
    warn_of_unused_weak_labels,
)
from dann_experiments.jobs.identity import data_digest, domain_name, method_name, run_digest, run_name, source_digest
from dann_experiments.jobs.precision import with_precision
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.resume import as_the_run, run_to_go_on
from dann_experiments.jobs.run_training import Parts, tracked_training, with_batch_sizes
from dann_experiments.jobs.source_model import (
    chosen_by_target_labels,
    find_or_make_source_model,
    load_source_model,
)
from dann_experiments.names import DOMAINS, RESUME_AUTO, Job, Tag
from dann_experiments.reports.mlflow_views import views_of_adaptation
from dann_experiments.tracking.notes import escaped
from dann_experiments.tracking.registry import register
from dann_experiments.tracking.saved_views import write_views
from dann_experiments.tracking.store import Store, open_store
from dann_experiments.training.random_states import reseed


def adapt(
    config: Config,
    callbacks: Sequence[pl.Callback] = (),
    tags: Mapping[str, str] | None = None,
    resume: str | None = None,
) -> RunResult:
    """Adapt the source model to the target with the method of `domain_adaptation`, tracked as one MLflow run.

    The source model is `pretrained_checkpoint.path`, else that of the newest finished pretraining run with the same network and
    source data; if there is none, it is trained first, in a separate run. `callbacks` are added to Lightning's (sweeps use one
    for pruning); `tags` are added to the run's own, or replace them. `resume`: the id of a killed run to resume (docs/resume.md),
    or `auto` for the newest unfinished run with these settings, or its unfinished pretraining, else a new run. Raises InputError
    for errors that the user can correct, if possible before a run is started (for all files that fit into `data.memory_gb`);
    TrainingFailed and NotStored.
    """
    store = None
    if callbacks:
        refuse_several_processes(config, "callbacks")
    refuse_tta(config, "trainings")
    refuse_test_batchnorm(config, "trainings")
    if resume not in (None, RESUME_AUTO):
        store = open_store(config.tracking.uri, config.tracking.experiment)
        config = as_the_run(store, resume, Job.ADAPT, config)
    config = with_precision(config)
    with seeded(config):
        warn_of_idle_adversary(config)  # before the source model is trained
        data, network = _found(config)  # before a store is created: settings that are refused leave nothing behind
        store = store or open_store(config.tracking.uri, config.tracking.experiment)
        config, parts = _prepared(config, store, data, network, RESUME_AUTO if resume == RESUME_AUTO else None)
        source_run_id, source = load_source_model(config, network, _source_model(config), store)
        reseed(config.seed)  # same random numbers whether the source model was just trained or found
        parts = dataclasses.replace(parts, method=make_method(config, parts.taps))
        config = with_batch_sizes(config, parts)
        digest = run_digest(Job.ADAPT, config, data.digests, source)
        resumed = run_to_go_on(store, Job.ADAPT, resume, digest, config)
        name = run_name(Job.ADAPT, config)
        all_tags = {**_tags(config, store, data, digest, source_run_id), **(tags or {})}
        views = {}
        if tags is None:  # a sweep or a comparison has a view of its own for all its runs
            warn_of_unused_weak_labels(config)
            views = write_views(
                store,
                views_of_adaptation(
                    {domain: domain_name(config, domain) for domain in DOMAINS}, all_tags[Tag.DATA_DIGEST]
                ),
            )
        result = tracked_training(
            Job.ADAPT, config, store, parts, name, all_tags, resumed, callbacks, source_run_id=source_run_id
        )  # fmt: skip
        if config.tracking.registered_model_name is not None:
            register(store, config.tracking.registered_model_name, result.run_id, f"Trained by {escaped(name)}.")
        return dataclasses.replace(result, views=views)


def prepare(config: Config, store: Store, data: DomainData | None = None) -> Config:
    """Do the work of `adapt` before the adaptation itself: check files (`data` if they were found already), network and method,
    and find or train the source model. Return the settings with that source model in `pretrained_checkpoint.path`; raise the same
    errors as `adapt`."""
    with seeded(config):
        return _prepared(config, store, *_found(config, data))[0]


def _found(config: Config, data: DomainData | None = None) -> tuple[DomainData, nn.Module]:
    """Return the data, with checked headers, and the network without its weights, which both takes little time."""
    every_weight_comes = config.domain_adaptation.pretrained_checkpoint.strict_loading
    data = data or find_data(config)
    return data, network_to_adapt(config, initialize=not every_weight_comes)


def _prepared(
    config: Config, store: Store, data: DomainData, network: nn.Module, resume_pretraining: str | None = None
) -> tuple[Config, Parts]:
    """Return the settings with their source model, and the parts of the training."""
    sets = checked_sets(config, data, network)
    taps = make_taps(config, network)
    parts = Parts(network, make_method(config, taps), taps, sets)  # refuses a wrong method before hours of pretraining
    warn_of_a_single_step(config, sets)
    source_model = find_or_make_source_model(config, store, data.digests, resume_pretraining)
    if source_model == config.domain_adaptation.pretrained_checkpoint.path:
        return config, parts
    return _starting_from(config, source_model), parts


def _starting_from(config: Config, source_model: str) -> Config:
    """Return the settings with a source model, checked again. `replace` would parse all of them: a tenth of a second."""
    adaptation = config.domain_adaptation
    checkpoint = dataclasses.replace(adaptation.pretrained_checkpoint, path=source_model)
    return dataclasses.replace(
        config, domain_adaptation=dataclasses.replace(adaptation, pretrained_checkpoint=checkpoint)
    )


def _source_model(config: Config) -> str:
    path = config.domain_adaptation.pretrained_checkpoint.path
    assert path is not None
    return path


def _tags(config: Config, store: Store, data: DomainData, digest: str, source_run_id: str | None) -> dict[str, str]:
    by_target_labels = config.monitor.uses_target_labels or chosen_by_target_labels(store, source_run_id)
    tags = {
        Tag.METHOD: method_name(config),
        Tag.SOURCE_DIGEST: source_digest(config, data.digests, read_encoder=False),
        Tag.DIGEST: digest,
        Tag.DATA_DIGEST: data_digest(data.digests),
        Tag.SELECTED_WITH_TARGET_LABELS: str(by_target_labels).lower(),
    }
    return tags if source_run_id is None else tags | {Tag.SOURCE_RUN_ID: source_run_id}
