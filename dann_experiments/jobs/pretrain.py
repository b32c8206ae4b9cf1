"""Trains the source model: the network on labelled source images, nothing of the target but its validation scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pytorch_lightning as pl

from dann_experiments.adaptation.dann import SourceOnly
from dann_experiments.config import Config
from dann_experiments.data.samples import PRETRAINING_SETS
from dann_experiments.jobs import setup
from dann_experiments.jobs.memory import memory_explained
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.resume import AUTO, as_the_run, checkpoint_to_go_on_from, folder_of_runs, run_to_go_on
from dann_experiments.jobs.training import describe_run, final_metrics, train
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import Store, local_artifact_folder, open_store

log = logging.getLogger(__name__)


def pretrain(
    config: Config,
    callbacks: Sequence[pl.Callback] = (),
    tags: Mapping[str, str] | None = None,
    resume: str | None = None,
) -> RunResult:
    """Train on the source alone, by the settings under `pretraining`; the run's model is what `adapt` starts from. `tags` are
    added to the run's own, or replace them. `resume`: the id of a killed run, which goes on (docs/resume.md), or `auto`: the
    newest of these settings, or a new one."""
    store = None
    if resume not in (None, AUTO):
        store = open_store(config.tracking.uri, config.tracking.experiment)
        config = as_the_run(store, resume, "pretrain", config)
    return pretrain_with(config, store, use_claimed=True, callbacks=callbacks, more_tags=tags, resume=resume)


def pretrain_with(
    config: Config,
    store: Store | None,
    use_claimed: bool,
    callbacks: Sequence[pl.Callback] = (),
    more_tags: Mapping[str, str] | None = None,
    resume: str | None = None,
) -> RunResult:
    """`pretrain` in an open store, or one that is opened when the data are found; `use_claimed`: whether it is the main job of
    an `mlflow run`."""
    if callbacks:
        setup.refuse_several_processes(config, "callbacks")
    with setup.seeded(config):
        data = setup.load_data(config, PRETRAINING_SETS)
        store = store or open_store(config.tracking.uri, config.tracking.experiment)
        digest = setup.run_digest("pretrain", config, data.digests)
        by_target, config = config.monitor, setup.as_pretrained(config)
        if config.monitor != by_target:
            log.info("Pretraining reads no target images: its best checkpoint is chosen by iou/source_val.")
        resumed = run_to_go_on(store, "pretrain", resume, digest, config)
        network = setup.make_network(config)
        setup.check_data(config, data, network)
        tags = {
            "dann.job": "pretrain",
            "dann.method": "source_only",
            "dann.source": setup.domain_name(config, "source"),
            "dann.target": setup.domain_name(config, "target"),
            "dann.source_digest": setup.source_digest(config, data),
            "dann.digest": digest,
            "dann.selected_with_target_labels": str(config.monitor.uses_target_labels).lower(),
            "seed": config.seed,
            **(more_tags or {}),
        }
        name = config.tracking.run_name if use_claimed else None
        folder = folder_of_runs(store, resumed, config.tracking.folder)
        with (
            tracked_run(store, name, f"pretrain seed {config.seed}", tags, folder, use_claimed, resumed) as run,
            memory_explained(config, data),
        ):
            go_on_from = None if resumed is None else checkpoint_to_go_on_from(store, run.run_id, run.folder)
            describe_run(run, config, data)
            setup.reseed(config)
            outcome = train(
                config, run, network, SourceOnly(), [], data, callbacks, pretraining=True, go_on_from=go_on_from,
            )  # fmt: skip
    folder = local_artifact_folder(store, run.run_id)
    return RunResult(
        job="pretrain",
        run_id=run.run_id,
        experiment_id=store.experiment_id,
        tracking_uri=store.uri,
        metrics=outcome.metrics(config.class_names),
        baseline=final_metrics(outcome.before, config.class_names),
        artifacts=None if folder is None else str(folder),
    )
