"""Identifies runs: their names, their settings as a store may show them, and the digests by which equal runs are found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from dann_experiments.checkpoints.encoder_file import digest_of_file
from dann_experiments.config import Config, config_to_dict, replace
from dann_experiments.config.comparison import ARM_NAMES
from dann_experiments.config.data import DomainDataConfig
from dann_experiments.names import (
    DOMAINS,
    SOURCE_TRAIN,
    SOURCE_VAL,
    TARGET_LABELLED,
    TARGET_VAL,
    Domain,
    Job,
    Metric,
    Tag,
)
from dann_experiments.tracking.store import without_secrets

METHOD_WORDS = {
    "source_only": ARM_NAMES["source_only"],
    "lambda_zero": ARM_NAMES["control"],
    "dann": ARM_NAMES["adapted"],
}
"""Names of the built-in methods in tables and run names, in the order of tables."""
LONGEST_PART = 70  # of a run's name, so that study, method, target and seed fit into LONGEST_RUN_NAME
WHERE_FILES_ARE = ("name", "preset", "scene", "root", "train", "val", "test", "train_labelled", "weak_labels")
"""Settings whose files data digests cover."""
_OF_OPTIMIZERS = ("power", "factor", "patience", "warmup_steps", "lr_factors", "freeze", "freeze_epochs")
LATER = (
    "loss", "class_weights", "test_batchnorm", "monitor.patience", "monitor.expected_shares", "monitor.on_guard",
    "domain_adaptation.companions",
    "domain_adaptation.pretrained_checkpoint.source_prefix",
    *(f"trainer.{name}" for name in (
        "devices", "channels_last", "compile", "auto_batch_size", "accumulate_grad_batches", "ema_decay",
    )),
    *(f"{prefix}optimizer.{name}" for prefix in ("", "pretraining.") for name in _OF_OPTIMIZERS),
)  # fmt: skip
"""Settings that came after the first version and change results only if they do not have their defaults."""


LATER_OF_DOMAINS = (
    "nodata_bands", "sampling", "sampling_temperature", "labelled_count", "labelled_batch_size",
    "label_attribute", "label_map", "label_background", "label_all_touched",
)  # fmt: skip
"""The same of a domain."""


def method_name(config: Config) -> str:
    """Return the method's name in tags: dann, lambda_zero, source_only, or the class name of a user's own method."""
    method = config.domain_adaptation.method
    return method.name if method.class_path is None else method.class_path.rpartition(".")[2]


def run_name(job: str, config: Config, arm: str | None = None) -> str:
    """Return the name of a run: of `arm`, else of its method, then the target and the seed.

    A pretraining names the source, on which it trains: source model mnist seed 0. A comparison and a check of data have no seed.
    A number of labeled target images that was set is added: DANN mnist-m 5 labels seed 0.
    """
    domain = _brief(domain_name(config, "source" if job == Job.PRETRAIN and arm is None else "target"))
    count = config.data.target.labelled_count
    labels = "" if count is None else f" {count} labels{' per domain' if config.data.target.domains else ''}"
    if job in (Job.COMPARE, Job.CHECK_DATA):
        return f"{job} {domain}{labels}"
    if arm is None:
        method = method_name(config)
        companions = "".join(f" + {term.name.replace('_', ' ')}" for term in config.domain_adaptation.companions)
        arm = "source model" if job == Job.PRETRAIN else METHOD_WORDS.get(method, method) + companions
    return f"{_brief(arm)} {domain}{'' if job in (Job.PRETRAIN, Job.EVALUATE) else labels} seed {config.seed}"


def evaluation_name(config: Config, model_tags: Mapping[str, str]) -> str:
    """Return the name of a run of `evaluate`: evaluation of DANN mnist-m seed 0, or with AdaBN or TTA:
    evaluation of DANN with d4 TTA mnist-m seed 0.

    `model_tags`: tags of the run that made the model, whose method and seed it names; empty if that run is not known.
    """
    method = model_tags.get(Tag.METHOD)
    named = "" if method is None else f" of {_brief(METHOD_WORDS.get(method, method))}"
    ways = [ARM_NAMES["statistics"]] if config.domain_adaptation.batchnorm == "target_stats" else []
    ways += [ARM_NAMES["test_statistics"]] if config.test_batchnorm == "images" else []
    ways += [f"{config.tta} TTA"] if config.tta != "none" else []
    if ways:
        named += f" with {' and '.join(ways)}"
    seed = model_tags.get("seed", config.seed)
    return f"evaluation{named} {_brief(domain_name(config, 'target'))} seed {seed}"


def trial_name(study: str, number: int, config: Config) -> str:
    """Return the name of a trial's run: digits16 trial 3, DANN mnist-m seed 0."""
    return f"{_brief(study)} trial {number}, {run_name(Job.TRIAL, config)}"


def _brief(text: str) -> str:
    """Return a part of a run's name in one line; of a long one (a path), the end."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_PART else f"...{line[3 - LONGEST_PART :]}"


def domain_name(config: Config, domain: Domain, member: str | None = None) -> str:
    """Return the name of the source or target in runs: its `name`, else its preset, else its first training entry; with several
    domains, their names: summer + winter. `member`: the domain to name of several."""
    settings = getattr(config.data, domain)
    if settings.domains and (member is not None or not settings.name):
        names = settings.domains if member is None else [member]
        return " + ".join(settings.named(one).name or one for one in names)
    if settings.name or settings.preset:
        return settings.name or " ".join(filter(None, (settings.preset, settings.scene)))
    first: Any = settings.train[0] if settings.train else domain
    if isinstance(first, Mapping):
        first = first.get("images") or first["items"]
    while isinstance(first, list):  # of several files, the first one
        first = first[0]
    return str(first)


def domain_tags(config: Config) -> dict[str, str]:
    """Return the tags that name both domains."""
    return {f"dann.{domain}": domain_name(config, domain) for domain in DOMAINS}


def label_tags(job: str, config: Config, labelled: int) -> dict[str, Any]:
    """Return the tags that say what a training learns from beside source labels; `labelled`: number of labeled target images."""
    tags: dict[str, Any] = {Tag.TARGET_LABELS: labelled} if labelled else {}
    adaptation = config.domain_adaptation
    if job == Job.ADAPT and adaptation.companions:
        tags[Tag.COMPANIONS] = ", ".join(term.name for term in adaptation.companions)
    if job == Job.ADAPT and adaptation.uses_weak_labels:
        tags[Tag.WEAK_LABELS] = "true"
    return tags


def public_settings(config: Config, experiment: str) -> Config:
    """Return the settings for publication in a run of `experiment`: without a password in the tracking store's address."""
    uri = config.tracking.uri
    uri = None if uri is None else without_secrets(uri)
    tracking = dataclasses.replace(config.tracking, uri=uri, experiment=experiment)
    return dataclasses.replace(config, tracking=tracking)


def encoder_tags(config: Config) -> dict[str, str]:
    """Return the tag with the digest of the file in `model.encoder_weights`; empty if it names no file."""
    file = config.model.encoder_file
    return {} if file is None else {Tag.ENCODER_DIGEST: digest_of_file(file)}


def source_digest(config: Config, digests: Mapping[str, str], read_encoder: bool = True) -> str:
    """Return 32 hex digits: equal for equal network settings, equal source training data (`digests` of the sets, by name) and
    equal reading of it.

    A file in `model.encoder_weights` counts by its bytes. It must exist, unless `read_encoder` is False: then a file that is
    missing counts by its path, for a job that has no need of it.
    """
    kept = ("normalization", "mean", "std", "crop_size", "window_size", "windows", "window_count", "ignore_index")
    source = _reading_settings(config, "source")
    for settings in [source, *source.get("domains", {}).values()]:
        settings.pop("batch_size", None)
    model = dataclasses.asdict(config.model)
    file = config.model.encoder_file
    if file is not None and (read_encoder or os.path.isfile(file)):
        model["encoder_weights"] = digest_of_file(file)
    facts = {
        "model": model,
        "classes": config.class_names,
        "reading": {key: getattr(config.data, key) for key in kept} | source,
        "source": digests[str(SOURCE_TRAIN)],
    }
    return _digest(facts)


def as_pretrained(config: Config) -> Config:
    """Return the settings as pretraining uses them: it cannot choose by `select/...` if the target has no validation images."""
    by_target = (config.monitor.metric or "").startswith(Metric.SELECT)
    if by_target and not config.data.entries(TARGET_VAL) and config.data.entries(SOURCE_VAL):
        return replace(config, {"monitor.metric": Metric.SOURCE_VAL_IOU, "monitor.mode": None})
    return config


def data_digest(digests: Mapping[str, str]) -> str:
    """Return 32 hex digits, the tag `dann.data_digest`: equal for equal images and masks of all sets (`digests`, by name)."""
    return _digest(digests)


def run_digest(job: str, config: Config, digests: Mapping[str, str], source_model: str | None = None) -> str:
    """Return 32 hex digits, the tag `dann.digest`: equal for runs of `job` that give the same numbers.

    Such runs have equal settings, equal data (`digests` of the sets that they use, by name), an equal source model (the digest
    of its run) and, where `job` trains it, equal bytes of the file in `model.encoder_weights`. The digest
    does not cover where results and files are kept, how fast data are read, and the number of threads.
    """
    settings = config_to_dict(as_pretrained(config) if job == Job.PRETRAIN else config)
    del settings["tracking"], settings["threads"], settings["data"]["root"], settings["data"]["embedded"]
    if config.model.encoder_file is not None:  # other jobs get every weight from the source model
        bytes_ = digest_of_file(config.model.encoder_file) if job == Job.PRETRAIN else None
        settings["model"]["encoder_weights"] = bytes_
    del settings["trainer"]["enable_progress_bar"], settings["data"]["memory_gb"], settings["data"]["num_workers"]
    del settings["data"]["oracle"], settings["data"]["disk_cache_gb"]
    _leave_out_later_settings(settings)
    if settings["data"]["pad_to_crop"]:  # data that it changes were refused before this setting existed
        del settings["data"]["pad_to_crop"]
    if settings["monitor"]["probe"] or job != Job.ADAPT:  # older runs were made without it; only `adapt` probes
        del settings["monitor"]["probe"]
    if job == Job.EVALUATE:
        settings.pop("loss", None)
        settings.pop("class_weights", None)
    for key in ("checkpoint_every_n_steps", "checkpoint_every_minutes", "checkpoints_kept"):
        del settings["trainer"][key]
    checkpoint = settings["domain_adaptation"]["pretrained_checkpoint"]
    checkpoint["path"] = source_model
    for domain in DOMAINS:
        settings["data"][domain] = _reading_settings(config, domain)
    if job != Job.ADAPT:  # only `adapt` trains on labeled target images
        target = settings["data"]["target"]
        for one in [target, *target.get("domains", {}).values()]:
            for key in ("labelled_count", "labelled_batch_size"):
                one.pop(key, None)
    if job == Job.PRETRAIN:
        del settings["domain_adaptation"], settings["optimizer"], settings["trainer"]["max_epochs"]
    else:
        del settings["pretraining"]
    if settings["tta"] == "none":  # older runs were made without it; only `evaluate` takes another
        del settings["tta"]
    if job == Job.EVALUATE:
        del settings["optimizer"], settings["trainer"]["max_epochs"], settings["domain_adaptation"]["method"]
        settings["domain_adaptation"].pop("companions", None)
    return _digest({"job": job, "settings": settings, "data": dict(digests)})


def _leave_out_later_settings(settings: dict[str, Any]) -> None:
    """Remove those of LATER that have their defaults: older runs were made without them, and have the same digest."""
    defaults = config_to_dict(Config())
    for key in LATER:
        *groups, name = key.split(".")
        mine, default = settings, defaults
        for group in groups:
            mine, default = mine[group], default[group]
        if mine[name] == default[name]:
            del mine[name]


def _reading_settings(config: Config, domain: Domain) -> dict[str, Any]:
    """Return the settings of a domain without those that the digests of its files cover."""
    own = {one.name: _plain_reading(config, settings) for one, settings in config.data.of_role(domain).items()}
    return own.get(None, {"domains": own})


def _plain_reading(config: Config, of_domain: DomainDataConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(of_domain)
    for key in (*WHERE_FILES_ARE, "domains"):
        del settings[key]
    defaults = dataclasses.asdict(DomainDataConfig())
    if not config.data.entries(TARGET_LABELLED):
        settings |= {key: defaults[key] for key in ("labelled_count", "labelled_batch_size")}
    for key in LATER_OF_DOMAINS:
        if settings[key] == defaults[key]:
            del settings[key]
    return settings


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
