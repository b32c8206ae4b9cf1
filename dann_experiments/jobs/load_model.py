"""Loads a trained model, with the settings stored with it or those of a config."""

from __future__ import annotations

import dataclasses
from typing import cast

from dann_experiments.checkpoints.saved_model import ModelNotes, read_model_notes
from dann_experiments.checkpoints.trained_model import Model, model_digest
from dann_experiments.checkpoints.weights import listed, load_into, read_weights
from dann_experiments.config import Config, InputError
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.jobs.build import data_plan, find_data, make_network
from dann_experiments.names import Domain, SetName
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
        weights = read_weights(local)
    if notes is not None and notes.class_names is not None:
        network, names, in_channels = notes.build(), notes.class_names, notes.in_channels
        reading, normalization = _noted_reading(notes, where, domain)
    elif config is not None:
        names, in_channels = config.class_names, config.model.in_channels
        try:
            network = make_network(config, with_weights=False)
            reading, normalization = _reading_of_settings(config, domain)
        except InputError as error:  # it names settings in the file, which are not settings of the job
            raise InputError(f"in the settings of --config: {error}") from None
    else:
        raise InputError(
            f"model is {where!r}, which has no settings of its network next to it (config.json and dann.json); provide them "
            "with --config, for example the config.yaml of the run that made it, or use the run's model: runs:/ID."
        )
    # load_into would suggest strict_loading, which makes no sense for a finished model
    problems = load_into(network, weights, False, where, source_prefix, "source_prefix")
    if problems:
        raise InputError(
            f"model is {where!r}, whose weights do not fit its network ({listed(problems)}); use its own settings."
        )
    if not 2 <= len(names) <= NODATA:
        raise InputError(f"model is {where!r} with {len(names)} classes; maps can have 2 to {NODATA}.")
    return Model(network, names, in_channels, reading, normalization, model_digest(network, names), run_id)


def _noted_reading(notes: ModelNotes, where: str, domain: str) -> tuple[Reading, Normalization]:
    if domain not in notes.readings:
        raise InputError(
            f"domain is {domain!r}, but model {where} knows how to read images of {sorted(notes.readings)} only."
        )
    return notes.readings[domain]


def _reading_of_settings(config: Config, domain: str) -> tuple[Reading, Normalization]:
    name = SetName(cast(Domain, domain), "train")
    plan = data_plan(config)
    reading = plan.images[name.domain].reading
    if plan.own_statistics or reading.scale == "percentiles":  # measured over the training images
        normalization = find_data(config, (name,)).normalization(name.domain)
    else:
        normalization = plan.fixed_normalization(name.domain)
    return dataclasses.replace(reading, settings=""), normalization
