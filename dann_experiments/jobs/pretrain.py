"""Trains the source model on labeled source images. The target is used for validation scores only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pytorch_lightning as pl

from dann_experiments.adaptation.dann import SourceOnly
from dann_experiments.config import Config
from dann_experiments.jobs.build import find_data, make_network, seeded
from dann_experiments.jobs.checks import checked_sets, refuse_several_processes, refuse_test_batchnorm, refuse_tta
from dann_experiments.jobs.identity import as_pretrained, encoder_tags, run_digest, run_name, source_digest
from dann_experiments.jobs.precision import with_precision
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.resume import as_the_run, run_to_go_on
from dann_experiments.jobs.run_training import Parts, tracked_training
from dann_experiments.names import PRETRAINING_SETS, RESUME_AUTO, SOURCE_VAL, Job, Tag
from dann_experiments.tracking.store import Store, open_store

log = logging.getLogger(__name__)


def pretrain(
    config: Config,
    callbacks: Sequence[pl.Callback] = (),
    tags: Mapping[str, str] | None = None,
    resume: str | None = None,
) -> RunResult:
    """Train on the source only, by the settings under `pretraining`; `adapt` starts from the resulting model.

    `callbacks` are added to Lightning's; `tags` are added to the run's own, or replace them. `resume`: the id of a killed run to
    resume (docs/resume.md), or `auto` for the newest unfinished run with these settings, else a new one. Raises InputError for
    invalid settings or data, TrainingFailed and NotStored."""
    store = None
    if resume not in (None, RESUME_AUTO):
        store = open_store(config.tracking.uri, config.tracking.experiment)
        config = as_the_run(store, resume, Job.PRETRAIN, config)
    config = with_precision(config)
    return pretrain_with(config, store, main_job=True, callbacks=callbacks, more_tags=tags, resume=resume)


def pretrain_with(
    config: Config,
    store: Store | None,
    main_job: bool,
    callbacks: Sequence[pl.Callback] = (),
    more_tags: Mapping[str, str] | None = None,
    resume: str | None = None,
) -> RunResult:
    """Do the work of `pretrain` in `store`, which is opened after the data were found if None. `main_job`: whether this is the
    main job of an `mlflow run`."""
    if callbacks:
        refuse_several_processes(config, "callbacks")
    refuse_tta(config, "trainings")
    refuse_test_batchnorm(config, "trainings")
    with seeded(config):
        data = find_data(config, PRETRAINING_SETS)
        network = make_network(config)  # before a store is created: weights that are refused leave nothing behind
        store = store or open_store(config.tracking.uri, config.tracking.experiment)
        digest = run_digest(Job.PRETRAIN, config, data.digests)
        by_target, config = config.monitor, as_pretrained(config)
        if config.monitor != by_target:
            log.info("Pretraining reads no target images; its best checkpoint is chosen by iou/%s.", SOURCE_VAL)
        resumed = run_to_go_on(store, Job.PRETRAIN, resume, digest, config)
        parts = Parts(network, SourceOnly(), [], checked_sets(config, data, network))
        tags = {
            Tag.METHOD: "source_only",
            Tag.SOURCE_DIGEST: source_digest(config, data.digests),
            Tag.DIGEST: digest,
            Tag.SELECTED_WITH_TARGET_LABELS: str(config.monitor.uses_target_labels).lower(),
            **encoder_tags(config),
            **(more_tags or {}),
        }
        name = run_name(Job.PRETRAIN, config)
        return tracked_training(Job.PRETRAIN, config, store, parts, name, tags, resumed, callbacks, main_job=main_job)
