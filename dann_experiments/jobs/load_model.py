"""Loads a trained model, with the settings stored with it or those of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from dann_experiments.checkpoints.saved_model import chosen_domain, read_model_notes
from dann_experiments.checkpoints.trained_model import Model, fill, model_digest, noted_model
from dann_experiments.checkpoints.weights import read_weights
from dann_experiments.config import Config, InputError
from dann_experiments.data.domain_data import DataPlan
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.jobs.build import data_plan, find_data, make_network
from dann_experiments.names import OneDomain, SetName
from dann_experiments.prediction.rasters import NODATA
from dann_experiments.tracking.fetch_model import fetched
from dann_experiments.tracking.store import Store


def load_model(where: str, domain: str, config: Config | None, store: Store, source_prefix: str | None = None) -> Model:
    """Load the model at `where` (folder, file, runs:/, models:/), set to read images like those of `domain`.

    The network is built from the settings stored with the model; for a checkpoint without them, from those of `config`.
    `source_prefix` chooses one of several networks in a checkpoint. Raises InputError if there are no settings, if the weights do
    not fit, or if they may belong to several networks.
    """
    with fetched(where, store, key="model") as (local, run_id):
        notes = read_model_notes(local, where)
        if notes is not None and notes.class_names is not None:
            model = noted_model(local, notes, where, domain, source_prefix, run_id)
        elif config is not None:
            model = _model_of_settings(config, read_weights(local), where, domain, source_prefix, run_id)
        else:
            raise InputError(
                f"model is {where!r}, which has no settings of its network next to it (config.json and dann.json); provide them "
                "with --config, for example the config.yaml of the run that made it, or use the run's model: runs:/ID."
            )
    if not 2 <= len(model.class_names) <= NODATA:
        raise InputError(f"model is {where!r} with {len(model.class_names)} classes; maps can have 2 to {NODATA}.")
    return model


def _model_of_settings(
    config: Config,
    weights: Mapping[str, Tensor],
    where: str,
    domain: str,
    source_prefix: str | None,
    run_id: str | None,
) -> Model:
    """Return the model of a checkpoint that is stored without its settings."""
    try:
        network = make_network(config, with_weights=False, initialize=False)
        reading, normalization = _reading_of_settings(config, domain)
    except InputError as error:  # it names settings in the file, which are not settings of the job
        raise InputError(f"in the settings of --config: {error}") from None
    fill(network, weights, where, source_prefix)
    names = config.class_names
    digest = model_digest(network, names)
    return Model(network, names, config.model.in_channels, reading, normalization, digest, run_id)


def _chosen(plan: DataPlan, domain: str) -> OneDomain:
    """Return the domain of the settings whose images are read; several of one role stand for each other if read alike."""
    alike = {str(one): (images.reading, str(one)) for one, images in plan.images.items()}
    return OneDomain.parse(chosen_domain(domain, alike, "the file of settings")[1])


def _reading_of_settings(config: Config, domain: str) -> tuple[Reading, Normalization]:
    plan = data_plan(config)
    one = _chosen(plan, domain)
    name = SetName(one.role, "train", one.name)
    reading = plan.images[one].reading
    if plan.own_statistics or reading.scale == "percentiles":  # measured over the training images
        normalization = find_data(config, (name,)).normalization(one)
    else:
        normalization = plan.fixed_normalization(one)
    return dataclasses.replace(reading, settings=""), normalization
