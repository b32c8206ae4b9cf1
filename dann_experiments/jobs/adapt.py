"""The main job: adapts a source model to the unlabelled target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
from torch import nn

from dann_experiments.config import Config, replace
from dann_experiments.jobs import setup
from dann_experiments.jobs.alignment import Alignment
from dann_experiments.jobs.batch_size import with_batch_sizes
from dann_experiments.jobs.memory import memory_explained
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.resume import AUTO, as_the_run, checkpoint_to_go_on_from, folder_of_runs, run_to_go_on
from dann_experiments.jobs.source_model import (
    chosen_by_target_labels,
    find_or_make_source_model,
    load_source_model,
)
from dann_experiments.jobs.training import describe_run, final_metrics, train
from dann_experiments.models.taps import Tap
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import Store, local_artifact_folder, open_store


def method_name(config: Config) -> str:
    """What the run is called after: dann, lambda_zero, source_only, or the class of a user's own method."""
    method = config.domain_adaptation.method
    return method.name if method.class_path is None else method.class_path.rpartition(".")[2]


def prepare(config: Config, store: Store, data: setup.Data | None = None) -> Config:
    """All that `adapt` does before it adapts: files (`data` if they are loaded already), network and method are checked, and the
    source model is found or trained. Returns the settings with that source model in `pretrained_checkpoint.path`; raises what
    `adapt` raises."""
    with setup.seeded(config):
        return _prepared(config, store, *_found(config, data))[0]


def adapt(
    config: Config,
    callbacks: Sequence[pl.Callback] = (),
    tags: Mapping[str, str] | None = None,
    resume: str | None = None,
) -> RunResult:
    """Adapt the source model to the target by the method of `domain_adaptation`, tracked as one MLflow run.

    The source model is `pretrained_checkpoint.path`, else the newest finished pretraining run of the same network and
    source data, else it is trained first, as a run of its own. `callbacks` join Lightning's (sweeps prune by one); `tags`
    are added to the run's own, or replace them. `resume`: the id of a killed run, which goes on (docs/resume.md), or `auto`:
    the newest of these settings, or its pretraining, or a new run. Raises InputError for what the user can mend, before a run
    is started where it can be seen before (all files, if `data.keep_in_memory`).
    """
    store = None
    if callbacks:
        setup.refuse_several_processes(config, "callbacks")
    if resume not in (None, AUTO):
        store = open_store(config.tracking.uri, config.tracking.experiment)
        config = as_the_run(store, resume, "adapt", config)
    with setup.seeded(config):
        data, network = _found(config)  # before a store is made: what is refused here leaves nothing behind
        store = store or open_store(config.tracking.uri, config.tracking.experiment)
        config, taps = _prepared(config, store, data, network, AUTO if resume == AUTO else None)
        source_model = config.domain_adaptation.pretrained_checkpoint.path
        assert source_model is not None
        source_run_id, digest_of_source = load_source_model(config, network, source_model, store)
        setup.reseed(config)  # the same numbers whether the source model was just trained or found
        method = setup.make_method(config, taps)
        config = with_batch_sizes(config, network, method, taps, data)
        digest = setup.run_digest("adapt", config, data.digests, digest_of_source)
        resumed = run_to_go_on(store, "adapt", resume, digest, config)
        own_tags = {
            "dann.job": "adapt",
            "dann.method": method_name(config),
            "dann.source": setup.domain_name(config, "source"),
            "dann.target": setup.domain_name(config, "target"),
            "dann.source_digest": setup.source_digest(config, data),
            "dann.digest": digest,
            "dann.selected_with_target_labels": str(
                config.monitor.uses_target_labels or chosen_by_target_labels(store, source_run_id)
            ).lower(),
            "seed": config.seed,
        }
        if source_run_id is not None:
            own_tags["dann.source_run_id"] = source_run_id
        name, folder = (
            f"{method_name(config)} seed {config.seed}",
            folder_of_runs(store, resumed, config.tracking.folder),
        )
        all_tags = {**own_tags, **(tags or {})}
        with (
            tracked_run(store, config.tracking.run_name, name, all_tags, folder, True, resumed) as run,
            memory_explained(config, data),
        ):
            go_on_from = None if resumed is None else checkpoint_to_go_on_from(store, run.run_id, run.folder)
            describe_run(run, config, data)
            used = [tap for tap in taps if tap.name in method.feature_layers]
            outcome = train(
                config, run, network, method, taps, data, callbacks,
                alignment=Alignment(config, data, network, used), go_on_from=go_on_from,
            )  # fmt: skip
    folder = local_artifact_folder(store, run.run_id)
    return RunResult(
        job="adapt",
        run_id=run.run_id,
        experiment_id=store.experiment_id,
        tracking_uri=store.uri,
        metrics=outcome.metrics(config.class_names),
        baseline=final_metrics(outcome.before, config.class_names),
        source_run_id=source_run_id,
        artifacts=None if folder is None else str(folder),
    )


def _found(config: Config, data: setup.Data | None = None) -> tuple[setup.Data, nn.Module]:
    """The data, by their headers, and the network without its weights: what takes little time."""
    every_weight_comes = config.domain_adaptation.pretrained_checkpoint.strict_loading
    data = data or setup.load_data(config)
    return data, setup.make_network(config, with_weights=False, drawn=not every_weight_comes)


def _prepared(
    config: Config, store: Store, data: setup.Data, network: nn.Module, resume_pretraining: str | None = None
) -> tuple[Config, list[Tap]]:
    """Settings with their source model, and the network's taps."""
    setup.check_data(config, data, network)
    taps = setup.make_taps(config, network)
    setup.make_method(config, taps)  # refuse a wrong method before hours of pretraining
    source_model = find_or_make_source_model(config, store, data, resume_pretraining)
    return replace(config, {"domain_adaptation.pretrained_checkpoint.path": source_model}), taps
