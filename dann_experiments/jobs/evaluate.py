"""Scores a model on every labelled set of the settings, in a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dann_experiments.config import Config, InputError
from dann_experiments.data.dataset import eval_loader
from dann_experiments.jobs import setup
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.source_model import chosen_by_target_labels, load_source_model
from dann_experiments.jobs.training import describe_run, final_metrics
from dann_experiments.tracking.figures import draw_confusion
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import local_artifact_folder, open_store
from dann_experiments.training.scores import score_set

SETS = ("source_val", "source_test", "target_val", "target_test")


def evaluate(config: Config, tags: Mapping[str, str] | None = None) -> RunResult:
    """IoU a class and confusion matrix of the model at `pretrained_checkpoint.path` on the val and test lists.

    `tags` are added to the run's own, or replace them. Raises InputError without a model or without labelled images.
    """
    path = config.domain_adaptation.pretrained_checkpoint.path
    if path is None:
        raise InputError(
            "evaluate needs a model: give source_checkpoint (a file, a folder, runs:/ID or models:/NAME@ALIAS)."
        )
    store = open_store(config.tracking.uri, config.tracking.experiment)
    with setup.seeded(config):
        data = setup.load_data(config, SETS)
        labelled = {name: dataset for name, dataset in data.sets.items() if dataset.has_masks}
        if not labelled:
            raise InputError("evaluate needs labelled images in data.source or data.target, under val or test.")
        network = setup.make_network(config, with_weights=False)
        model_run_id = load_source_model(config, network, path, store)
        network.to("cuda" if torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu") else "cpu")
        own_tags = {
            "dann.job": "evaluate",
            "dann.source": setup.domain_name(config, "source"),
            "dann.target": setup.domain_name(config, "target"),
            "dann.selected_with_target_labels": str(chosen_by_target_labels(store, model_run_id)).lower(),
            "seed": config.seed,
        }
        if model_run_id is not None:
            own_tags["dann.source_run_id"] = model_run_id
        all_tags = {**own_tags, **(tags or {})}
        folder = Path(config.tracking.folder)
        with tracked_run(store, config.tracking.run_name, "evaluate", all_tags, folder, use_claimed=True) as run:
            describe_run(run, config, data)
            scores = {}
            for set_name, dataset in labelled.items():
                loader = eval_loader(dataset, config.data.eval_batch_size or config.data.source.batch_size)
                scores[set_name] = found = score_set(network, loader, config.model.classes, config.data.ignore_index)
                title = f"{set_name.replace('_', ' ')}: mean IoU {found.iou:.3f}"
                path_of_figure = run.folder / "figures" / f"confusion_{set_name}.png"
                draw_confusion(path_of_figure, found.confusion, config.class_names, title)
            metrics = final_metrics(scores, config.class_names)
            run.log_metrics(metrics, step=0)
    folder = local_artifact_folder(store, run.run_id)
    return RunResult(
        job="evaluate", run_id=run.run_id, experiment_id=store.experiment_id, tracking_uri=store.uri,
        metrics=metrics, source_run_id=model_run_id, artifacts=None if folder is None else str(folder),
    )  # fmt: skip
