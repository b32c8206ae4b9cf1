"""Registers models of runs by name, and moves the alias `champion` to one that is better by one stated rule."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from mlflow.exceptions import MlflowException

from dann_experiments.config.errors import StoreAway
from dann_experiments.names import TARGET_TEST, TARGET_VAL, Metric
from dann_experiments.tracking.logged_model import logged_model
from dann_experiments.tracking.notes import link, run_page
from dann_experiments.tracking.store import Store, in_one_line

log = logging.getLogger(__name__)
CHAMPION = "champion"
SCORE, VALUE, DATA = "dann.score", "dann.score_value", "dann.score_data"
"""Tags of a version: the metric by which versions are compared, its value, and the digest of the data set."""
CLASSES = "dann.score_classes"
"""Tag of a version: the classes over which the score is the mean, in a JSON list."""
LEADS = "dann.leads"
"""Tag of a version that was to become champion when it was registered."""
AT_ONCE_MS = 60_000
"""Versions that were made so shortly before another may have been compared with the same champion."""
VERSIONS_OF_MODEL = "mlflow.modelVersions"  # tag of a logged model
JUDGED = (Metric.iou(TARGET_TEST), Metric.iou(TARGET_VAL))
"""The first score that a model has counts."""


def register(
    store: Store, name: str, run_id: str, about: str, tags: Mapping[str, str] | None = None, may_lead: bool = True
) -> str:
    """Register the model of a run as a new version of `name`, and return its address: that of the champion if it became it.

    The rule: the version becomes `champion` if there is no champion, or if both have the same score (the mean IoU of the
    target's test set, else of its validation set) over the same classes of the same data and the new one's is higher. `may_lead`
    False: it does not. Raises StoreAway if the store does not answer; the run is finished all the same.
    The version says this score, its data, `about` (Markdown) and `tags`. A run that is registered under `name` already gets no
    second version.
    """
    try:
        return _registered(store, name, run_id, about, tags or {}, may_lead)
    except Exception as error:
        if not isinstance(error, (MlflowException, OSError, StoreAway)):  # OSError: those of HTTP clients too
            raise
        raise StoreAway(
            f"run {run_id} is finished, but its model is not registered as {name!r} ({in_one_line(error)}). Register it when the "
            "store answers: by the button of the model's page in MLflow, or in Python with "
            f"mlflow.register_model('runs:/{run_id}/model', {name!r})."
        ) from None


def _registered(
    store: Store, name: str, run_id: str, about: str, tags: Mapping[str, str], may_lead: bool
) -> str:  # fmt: skip
    run = store.client.get_run(run_id)
    _make(store, name)
    version = _version_of(store, name, run_id)
    if version is None:
        model = logged_model(store.client, run.info.experiment_id, run_id)
        source = (
            f"{run.info.artifact_uri}/model" if model is None else source_of(store, model)
        )  # None: of an older version
        page = link(run.info.run_name or run_id, run_page(run.info.experiment_id, run_id))
        own = {**_score(run, model), **tags}
        version = store.client.create_model_version(
            name, source, run_id, tags=own, description=f"{about}\n\n{page}",
            model_id=None if model is None else model.model_id,
        )  # fmt: skip
        if model is not None:
            _link_back(store, model, version)
    champion = _champion(store, name)
    if champion is None or champion.version != version.version:
        why = _why_not(version, champion) if may_lead else "it is not one to recommend"
        if why:
            log.info(
                "The model is registered as models:/%s/%s; %s stays as it is: %s.", name, version.version, CHAMPION, why
            )
            return f"models:/{name}/{version.version}"
        version = _lead(store, name, version)
    log.info("The model is registered as models:/%s/%s, which is models:/%s@%s.", name, version.version, name, CHAMPION)
    return f"models:/{name}@{CHAMPION}"


def source_of(store: Store, model: Any) -> str:
    """Return the address of a logged model to register it by.

    A server looks models up by id in its own store. For a database MLflow would look in the store of the process, which may be
    another one, so there it is the place of the files."""
    return f"models:/{model.model_id}" if store.uri.startswith("http") else model.artifact_location


def _link_back(store: Store, model: Any, version: Any) -> None:
    """Let the model's page name the version, as MLflow's own function for registering does."""
    known = json.loads(model.tags.get(VERSIONS_OF_MODEL, "[]"))
    entry = {"name": version.name, "version": version.version}
    if entry not in known:
        store.client.set_logged_model_tags(model.model_id, {VERSIONS_OF_MODEL: json.dumps([*known, entry])})


def _make(store: Store, name: str) -> None:
    try:
        store.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(store: Store, name: str, run_id: str) -> Any | None:
    found = store.client.search_model_versions(f"run_id = '{run_id}'")
    return next((version for version in found if version.name == name), None)


def _champion(store: Store, name: str) -> Any | None:
    version = store.client.get_registered_model(name).aliases.get(CHAMPION)
    return None if version is None else store.client.get_model_version(name, version)


def _lead(store: Store, name: str, version: Any) -> Any:
    """Make a version the champion, or the better one of those that were registered at the same moment; return the champion.

    MLflow has no "set this alias if it is still that version". So each process says that its version leads before it sets the
    alias, and looks afterwards whether a better one said so: whichever process is last to set the alias has seen them all.
    """
    store.client.set_model_version_tag(name, version.version, LEADS, "true")
    best = version
    while True:
        store.client.set_registered_model_alias(name, CHAMPION, best.version)
        others = store.client.search_model_versions(f"name = '{name}'")
        since = version.creation_timestamp - AT_ONCE_MS
        leading = [one for one in others if one.tags.get(LEADS) == "true" and one.creation_timestamp >= since]
        better = max(leading, key=lambda one: float(one.tags.get(VALUE, "-inf")), default=best)
        if better.version == best.version or _why_not(better, best):
            return best
        best = better


def _score(run: Any, model: Any | None) -> dict[str, str]:
    """Return the tags of the score by which a run's model is compared; none without target labels."""
    of_the_model = [] if model is None else model.metrics or []
    digests = {metric.key: metric.dataset_digest for metric in of_the_model}
    for metric in JUDGED:
        if metric in run.data.metrics:
            prefix = Metric.class_iou(metric.removeprefix(Metric.IOU), "")
            classes = sorted(name.removeprefix(prefix) for name in run.data.metrics if name.startswith(prefix))
            return {
                SCORE: metric, VALUE: repr(run.data.metrics[metric]), DATA: digests.get(metric) or "",
                CLASSES: json.dumps(classes),
            }  # fmt: skip
    return {}


def _why_not(version: Any, champion: Any | None) -> str:
    """Return why a version does not replace the champion; an empty text if it does."""
    if champion is None:
        return ""
    new, old = version.tags, champion.tags
    if SCORE not in new:
        return "the new model has no score on labeled target images"
    if any(new.get(key) != old.get(key) for key in (SCORE, DATA)) or not new.get(DATA):
        return f"version {champion.version} was not scored by {new[SCORE]} on the same data"
    if old.get(CLASSES, new[CLASSES]) != new[CLASSES]:  # versions of before do not say
        return f"version {champion.version} has other classes ({old[CLASSES]})"
    if not float(new[VALUE]) > float(old[VALUE]):
        return f"{new[SCORE]} is {float(new[VALUE]):.4f}, that of version {champion.version} {float(old[VALUE]):.4f}"
    return ""
