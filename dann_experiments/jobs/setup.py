"""From settings to objects: the one place that unpacks a Config for the layers below."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from dann_experiments.adaptation.build import build_method, build_schedule, load_own_method
from dann_experiments.adaptation.method import DomainAdaptationMethod
from dann_experiments.config import Config, InputError, config_to_dict, replace
from dann_experiments.config.names import labels_in_store
from dann_experiments.config.presets import IGNORED, filled
from dann_experiments.config.schema import DomainDataConfig, OptimizerConfig, TrainerConfig
from dann_experiments.data import decoded, early
from dann_experiments.data.dataset import SegmentationDataset, check_sizes, unit_problems
from dann_experiments.data.looking import Ahead, Arrays, Memory
from dann_experiments.data.reading import Header, Normalisation, largest_value, many_files, reading_facts
from dann_experiments.data.samples import SETS, Sample, content_digest, file_digest, files_of, shared_images
from dann_experiments.data.sets import Looked, Problems, find_set, labels_of, reading_of
from dann_experiments.data.statistics import BandSums, measure, normalisation_from, range_remark
from dann_experiments.models.batchnorm import has_batchnorm
from dann_experiments.models.networks import build_network, output_stride
from dann_experiments.models.passes import check_joint
from dann_experiments.models.taps import Tap, resolve_taps
from dann_experiments.tracking.store import without_secrets
from dann_experiments.training.optimizers import build_optimizer
from dann_experiments.training.selection import PREFIX, SCORES
from dann_experiments.workers.processes import available_cores, visible_gpus

log = logging.getLogger(__name__)
LARGEST_BLANK = 1024  # pixels; divisible by every network's stride
LOOKED_AT_FOR_RANGE = 16  # training windows, by which a range that does not suit is seen
MOST_STANDING_IN = 200  # training images that stand in for validation images that no domain has


@dataclass(eq=False)
class Data:
    """The data sets of a job by name (`source_train`, ...); one that is not given is absent."""

    sets: Mapping[str, SegmentationDataset]
    _digests: dict[Path, bytes] = dataclasses.field(default_factory=dict)

    def digest_of(self, path: Path) -> bytes:
        """Of one file's bytes, read once."""
        if path not in self._digests:
            self._digests[path] = file_digest(path)
        return self._digests[path]

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Of each set, over the bytes of its files, and over what is read of them otherwise than in version 0.1, so that numbers
        of before are not taken for those of now."""
        digests = {}
        for name, dataset in self.sets.items():
            digest, rules = content_digest(dataset.samples, self.digest_of), dataset.later_rules
            if rules:
                digest = hashlib.blake2b(f"{digest} {rules}".encode(), digest_size=16).hexdigest()
            digests[name] = digest
        return digests

    def get(self, name: str) -> SegmentationDataset | None:
        """The set, None if it is not given."""
        return self.sets.get(name)

    def labelled(self, name: str) -> SegmentationDataset | None:
        """The set if it is given and has masks."""
        found = self.sets.get(name)
        return found if found is not None and found.has_masks else None

    def held_out(self, domain: str) -> SegmentationDataset | None:
        """The domain's validation images, with or without masks. Where it has none: of its training images, as they are and
        without masks, about as many as the other domain has to validate on."""
        given, trained_on = self.get(f"{domain}_val"), self.get(f"{domain}_train")
        if given is not None or trained_on is None:
            return given
        others = [dataset for name, dataset in self.sets.items() if name.endswith("_val")]
        return trained_on.as_evaluated(max([len(dataset) for dataset in others], default=MOST_STANDING_IN))


@contextlib.contextmanager
def seeded(config: Config) -> Iterator[None]:
    """Seed everything random and set the threads; threads and determinism are given back as found."""
    exact: Any = torch.utils.deterministic
    filling = exact.fill_uninitialized_memory
    # that would write each new map once more than needed, to make it show where somebody reads what nobody wrote
    exact.fill_uninitialized_memory = False
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if config.threads is not None or config.trainer.devices > 1:
        torch.set_num_threads(config.threads or max(available_cores() // config.trainer.devices, 1))
    reseed(config)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        exact.fill_uninitialized_memory = filling


def reseed(config: Config) -> None:
    """Put all random states to `seed`; what follows does not depend on what ran before."""
    pl.seed_everything(config.seed, workers=True, verbose=False)


def load_data(config: Config, names: tuple[str, ...] = SETS) -> Data:
    """Find the named sets and look at every file's header: the fast part of `check-data`. Raises InputError for all that is
    wrong at once. Target training masks are never looked for."""
    memory, problems = Memory(config.data.memory_gb), Problems()
    ahead, begun = Ahead(memory), early.taken(config, names)
    missing = {name: Problems() for name in names}
    found = {name: find_set(config, name, missing[name].append) for name in names}
    if any(of_set.texts for of_set in missing.values()):  # it will be refused: nothing is read for nothing
        ahead.stop()
    sets = {}
    for name, samples in found.items():
        for text in missing[name].texts:
            problems.append(text)
        if samples is not None:
            dataset = _loaded(config, name, samples, memory, problems, ahead, begun)
            if dataset is not None:
                sets[name] = dataset
    for text in unit_problems(sets):
        problems.append(text)
    problems.refuse()
    for line in problems.remarks.lines():
        log.warning("%s", line)
    return Data(sets, ahead.digests)


def _loaded(
    config: Config, name: str, found: Sequence[Sample], memory: Memory, problems: Problems, ahead: Ahead,
    begun: early.Early | None,
) -> SegmentationDataset | None:  # fmt: skip
    """A set whose headers are right, None where none is. With processes that share what they read it comes filled."""
    shared = decoded.in_use()
    if shared is None or problems.texts:
        return _with_headers(config, name, found, memory, problems, ahead, begun)
    key = shared.key(found, **_decided_by(config, name))
    with shared.alone(key):
        index = shared.index(key)
        if index is not None:
            ahead.digests.update(shared.digests(index, found))
            dataset = as_dataset(config, name, found, memory, shared.headers(index))
            if not shared.give(key, index, dataset):
                ahead.stop()
            return dataset
        dataset = _with_headers(config, name, found, memory, problems, ahead, begun)
        if dataset is not None and not problems.texts:
            try:
                _fill(config, name, dataset)
                shared.put(key, dataset, ahead.digests)
            except InputError as error:
                problems.append(str(error))
        return dataset


def _with_headers(
    config: Config, name: str, found: Sequence[Sample], memory: Memory, problems: Problems, ahead: Ahead,
    begun: early.Early | None,
) -> SegmentationDataset | None:  # fmt: skip
    known, files = None if begun is None else begun.sets.get(name), files_of(found)
    as_found = known is not None and (len(known.headers), known.files) == (len(found), [str(path) for path in files])
    if begun is not None and known is not None and as_found:
        digests = {path: digest for path, digest in zip(files, known.digests, strict=True) if digest is not None}
        ahead.take_over(digests, known.read.values(), begun.all_read)
        looked = Looked(list(found), known.headers, known.read)
    else:
        with many_files():
            looked = problems.good(config, name, found, ahead)
    if looked.samples:
        try:
            return as_dataset(config, name, looked.samples, memory, looked.headers, looked.read)
        except InputError as error:  # a region beyond its image, a pixel size that is not known
            problems.append(str(error))
    return None


def _decided_by(config: Config, name: str) -> dict[str, Any]:
    """All settings on which the decoded windows of a set depend, beside its files."""
    data = config.data
    training = name.endswith("_train")
    return {
        "labels": labels_of(config, name),
        "reading": reading_of(config, name),
        "bands": config.model.in_channels,
        "cut": (training, data.crop_size if training else None, data.window_size),
        "random": (data.window_count, config.seed) if training and data.windows == "random" else None,
    }


def _fill(config: Config, name: str, dataset: SegmentationDataset) -> None:
    with many_files():
        followed(config, dataset.fill(), len(dataset), f"reading data.{name.replace('_', '.')}")


def as_dataset(
    config: Config, name: str, samples: Sequence[Sample], memory: Memory, headers: Sequence[Header] | None = None,
    read: Mapping[int, Arrays] | None = None,
) -> SegmentationDataset:  # fmt: skip
    """A set's samples, read as the settings say; `headers` and what is `read`, by the sample's number, where that is known."""
    domain_name, split = name.split("_")
    data, domain = config.data, filled(getattr(config.data, domain_name))
    return SegmentationDataset(
        samples, labels_of(config, name), fixed_normalisation(config, domain), reading_of(config, name), split == "train",
        data.crop_size, data.window_size, data.windows == "random", data.window_count, domain.augmentation, config.seed,
        memory, headers, read, data.pad_to_crop,
    )  # fmt: skip


def fixed_normalisation(config: Config, domain: DomainDataConfig) -> Normalisation:
    """What the settings alone say; `settle` puts in what has to be measured."""
    bands = config.model.in_channels
    low, high = domain.scale if isinstance(domain.scale, list) else (0.0, 1.0)
    own = config.data.normalization == "domain"
    mean, std = ([0.5] * bands, [0.25] * bands) if own else (config.data.mean, config.data.std)
    return Normalisation((low,) * bands, (high,) * bands, tuple(mean), tuple(std))


def check_data(config: Config, data: Data, network: nn.Module) -> None:
    """Read the files before anything trains, as far as they fit in memory; raises InputError for the first that is wrong,
    and for a useless monitor. Puts the measured normalisation into the sets."""
    for name, dataset in data.sets.items():
        _fill(config, name, dataset)
        if dataset.training:
            check_sizes(dataset, f"data.{name.replace('_', '.')}", output_stride(network))
    settle(config, data)
    _check_ranges(config, data)
    _check_classes(config, data)
    shared = shared_images({name: dataset.samples for name, dataset in data.sets.items()}, data.digest_of)
    if shared:
        name, image, other, _ = shared[0]
        log.warning(
            "%d images stand in two sets that should share none; the first is %s, in %s and %s. Scores on them say "
            "little about new images; `check-data` lists all.", len(shared), image, name, other,
        )  # fmt: skip
    if data.labelled("target_val") is not None and data.labelled("source_val") is None:
        raise InputError(
            "data.target.val has masks, but data.source.val is empty; give source images to validate on too."
        )
    if config.monitor.metric is not None:
        _check_monitor(config, data)
    accelerator = config.trainer.accelerator
    missing = {"gpu": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(accelerator):
        raise InputError(
            f"trainer.accelerator is {accelerator!r}, but there is none on this machine; give cpu or auto."
        )
    if config.trainer.devices > 1:
        _check_devices(config, data)


def refuse_several_processes(config: Config, what: str) -> None:
    """Raise InputError where `what` (callbacks, a sweep) would be known to one of several ranks alone."""
    if config.trainer.devices > 1:
        raise InputError(
            f"trainer.devices is {config.trainer.devices}, but {what} run in one process; give trainer.devices 1."
        )


def refuse_auto_batch_size(config: Config, what: str) -> None:
    """Raise InputError where each run of `what` would take the batches that fit at its time."""
    if config.trainer.auto_batch_size:
        raise InputError(
            f"trainer.auto_batch_size is true, but {what} must train with the same batches; set data.source.batch_size and "
            "data.target.batch_size instead."
        )


def _check_devices(config: Config, data: Data) -> None:
    """Every rank needs a device, and an image of each set."""
    devices, gpus = config.trainer.devices, len(visible_gpus(config.trainer.accelerator))
    on_mps = config.trainer.accelerator in ("auto", "mps") and torch.backends.mps.is_available()
    if on_mps or 0 < gpus < devices:
        there = "on mps there is one" if on_mps else f"this machine has {gpus}"
        raise InputError(f"trainer.devices is {devices}, but {there}; give fewer, or trainer.accelerator cpu.")
    for name, dataset in data.sets.items():
        if not name.endswith("_test") and len(dataset) < devices:
            raise InputError(
                f"trainer.devices is {devices}, but data.{name.replace('_', '.')} has {len(dataset)} images, fewer than one for "
                "each process; give fewer devices."
            )


def settle(config: Config, data: Data) -> None:
    """Measure the normalisation of each domain where the settings ask for it: over its training windows, or over its other
    images where it has none."""
    for domain_name in ("source", "target"):
        domain = filled(getattr(config.data, domain_name))
        mine = [dataset for name, dataset in data.sets.items() if name.startswith(domain_name)]
        own = config.data.normalization == "domain"
        if not mine or not (own or domain.scale == "percentiles"):
            continue
        measured = data.get(f"{domain_name}_train") or _unread_train_set(config, domain_name) or mine[0]
        ends = {largest_value(header) if domain.scale == "type" else 0.0 for header in measured.headers}
        types = sorted({header.dtype for header in measured.headers})
        if len(types) > 1 or len(ends) > 1:  # the sums of such values would mean nothing
            raise InputError(
                f"data.{domain_name} has images of {' and '.join(types)}, whose bands cannot be measured together; convert "
                "them to one type, or set data.normalization to fixed and scale to type or a range."
            )
        *_, sums = followed(config, measure(measured), len(measured), f"measuring the bands of data.{domain_name}")
        found = normalisation_from(sums.result(), measured.normalisation, domain.scale, ends.pop(), own)
        for dataset in mine:
            dataset.normalisation = found


def _unread_train_set(config: Config, domain_name: str) -> SegmentationDataset | None:
    if not filled(getattr(config.data, domain_name)).train:
        return None
    name = f"{domain_name}_train"
    return as_dataset(config, name, find_set(config, name) or [], Memory(0))


def followed(config: Config, steps: Iterable[Any], count: int, what: str) -> list[Any]:
    """The last of `steps`, in a list, after all of them; with a progress bar on a terminal where it takes long."""
    from rich.progress import track

    silent = not (config.trainer.enable_progress_bar and sys.stdout.isatty() and count > 200)
    last: list[Any] = []
    for step in track(steps, description=what, total=count, disable=silent, transient=True):
        last = [step]
    return last


def _check_ranges(config: Config, data: Data) -> None:
    """Say where a domain's `scale` does not suit its values, by a look at some of its training images."""
    for domain in ("source", "target"):
        dataset = data.get(f"{domain}_train")
        if dataset is None or config.data.normalization != "fixed" or dataset.reading.scale == "percentiles":
            continue
        sums = BandSums(dataset.in_channels)
        for index in np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT_FOR_RANGE).astype(int)):
            values, _, valid = dataset.read(int(index))
            sums.add(values, valid)
        text = range_remark(sums.result(), dataset.reading.scale, dataset.headers, f"data.{domain}")
        if text is not None:
            log.warning("%s", text)


def _check_classes(config: Config, data: Data) -> None:
    """Say which classes a side lacks; masks of 0 and 255 would train on nothing, as 255 is ignored by default."""
    for text in label_map_remarks(config):
        log.warning("%s", text)
    dataset = data.labelled("source_train")
    if dataset is not None and dataset.class_pixels is not None:
        for text in check_classes(config, dataset.class_pixels):
            log.warning("%s", text)


def label_map_remarks(config: Config) -> list[str]:
    """Sentences on label maps that name other classes than the network has, or lack some of them."""
    names, remarks = config.class_names, []
    for domain_name in ("source", "target"):
        settings = getattr(config.data, domain_name)
        mapped = filled(settings).class_names
        if mapped is None:
            continue
        lacking = [name for name in names if name not in mapped]
        more = [name for name in mapped if name not in names and name != IGNORED]
        own = settings.preset is None or settings.value_map is not None or settings.color_map is not None
        if more and own:  # a preset knows all classes of its set, of which a network may have some
            near = {name: difflib.get_close_matches(name, lacking or names, n=1) for name in more}
            hint = "".join(f"; did you mean {found[0]!r} by {name!r}?" for name, found in near.items() if found)
            remarks.append(
                f"data.{domain_name}: its label map names {more}, which are none of the network's classes {names} and count "
                f"nowhere (write {IGNORED} if that is meant){hint}"
            )
        if lacking:
            remarks.append(f"data.{domain_name}: its label map has no class {lacking}.")
    return remarks


def check_classes(config: Config, class_pixels: np.ndarray) -> list[str]:
    """Refuse source masks (256 counts of ids) that leave fewer than two classes; says which classes no mask holds."""
    ignored, names = config.data.ignore_index, config.class_names
    found = np.flatnonzero(class_pixels).tolist()
    classes = [value for value in found if value != ignored]
    if len(classes) < 2:
        raise InputError(
            f"data.source.train: the masks hold the ids {found}, of which {ignored} is ignored (data.ignore_index); that "
            f"leaves {len(classes)} class to learn. Write the classes as 0 to {len(names) - 1}, or name the masks' values "
            "in data.source.value_map." + "".join(f" {text}" for text in label_map_remarks(config))
        )
    absent = [name for index, name in enumerate(names) if index not in classes]
    return [f"data.source.train: no mask holds the classes {absent}."] if absent else []


def _check_monitor(config: Config, data: Data) -> None:
    metric = config.monitor.metric
    assert metric is not None
    known = validation_metrics(config)
    if metric not in known:
        raise InputError(f"monitor.metric is {metric!r}; it is one of {known}.")
    if metric in SCORES and data.labelled("source_val") is None:
        raise InputError(
            f"monitor.metric is {metric!r}, which is measured beside the source's validation; give labelled images in "
            "data.source.val, or null to keep the last checkpoint alone."
        )
    _refuse_unlabelled(
        data, "monitor.metric", metric, "choose another metric, or null to keep the last checkpoint alone"
    )


def validation_metrics(config: Config) -> list[str]:
    """The names of all by which a checkpoint or a trial can be chosen, where both domains have labelled images."""
    known = ["iou/gap_source_minus_target", "iou/source_drop_from_baseline"]
    for domain in ("source", "target"):
        known += [f"iou/{domain}_val", f"loss/val_{domain}"]
        known += [f"class_iou/{domain}_val/{name}" for name in labels_in_store(config.class_names).values()]
    return known + list(SCORES)


def check_labels(data: Data, key: str, metric: str) -> None:
    """Refuse setting `key` = `metric` (one of `validation_metrics`) where the labels that it needs are not there."""
    _refuse_unlabelled(data, key, metric, "or choose another metric")


def _refuse_unlabelled(data: Data, key: str, metric: str, way_out: str) -> None:
    for domain in ("source", "target"):
        if domain in metric and data.labelled(f"{domain}_val") is None:
            raise InputError(
                f"{key} is {metric!r}, which needs labelled images in data.{domain}.val; give them, {way_out}."
            )


def public_settings(config: Config, experiment: str) -> Config:
    """The settings as a run of `experiment` may show them: without a password in the tracking store's address."""
    uri = config.tracking.uri
    uri = None if uri is None else without_secrets(uri)
    tracking = dataclasses.replace(config.tracking, uri=uri, experiment=experiment)
    return dataclasses.replace(config, tracking=tracking)


def make_network(config: Config, with_weights: bool = True, drawn: bool = True) -> nn.Module:
    """The network of `model`; `with_weights` False leaves the encoder's weights out, as a checkpoint will bring them. With
    `drawn` False all weights are anything: a checkpoint must bring each of them."""
    model = config.model
    weights = model.encoder_weights if with_weights else None
    return build_network(
        model.arch, model.encoder_name, weights, model.in_channels, model.classes, model.network_arguments(), drawn
    )


def make_taps(config: Config, network: nn.Module) -> list[Tap]:
    """The layers of `domain_adaptation`, looked up in the network."""
    batchnorm = config.domain_adaptation.batchnorm
    if batchnorm in ("source_only", "target_stats") and not has_batchnorm(network):
        raise InputError(
            f"domain_adaptation.batchnorm is {batchnorm!r}, but this network has no BatchNorm; give separate."
        )
    if config.domain_adaptation.method.name == "source_only" and config.domain_adaptation.method.class_path is None:
        return []
    size = blank_size(config)
    taps = resolve_taps(network, config.domain_adaptation.layers, config.model.in_channels, size)
    if batchnorm == "joint":
        check_joint([tap for tap in taps if tap.name in config.domain_adaptation.method.layers])
    return taps


def blank_size(config: Config) -> int:
    """Side of the blank image by which layers are looked up, in pixels: that of the crops, as far as memory surely goes."""
    return min(config.data.crop_size or 64, LARGEST_BLANK)


def make_method(config: Config, taps: list[Tap]) -> DomainAdaptationMethod:
    """The adaptation method that the settings name."""
    method = config.domain_adaptation.method
    channels = {tap.name: tap.channels for tap in taps}
    if method.class_path is not None:
        own = load_own_method(method.class_path, method.init_args, channels)
        missing = [layer for layer in own.feature_layers if layer not in channels]
        if missing:
            raise InputError(
                f"domain_adaptation.feature_layers captures {list(channels)}, but {method.class_path} needs {missing}; "
                "add them to domain_adaptation.feature_layers."
            )
        return own
    if method.name == "lambda_zero":
        log.info("lambda_zero: lambda is 0 throughout; lambda_da and lambda_schedule have no effect.")
    return build_method(
        method.name,
        method.layers,
        channels,
        method.in_channels,
        build_schedule(method.lambda_schedule.kind, method.lambda_schedule.gamma),
        classifier=method.classifier,
        hidden_size=method.hidden_size,
        discriminator_lr=method.discriminator_lr,
        lambda_da=method.lambda_da,
        step_mode=method.step_mode,
    )


def optimizer_maker(optimizer: OptimizerConfig, precision: str):
    """A function from parameter groups to an optimizer, which is fused where it can be: Lightning does not clip the gradients
    of a fused one under the scaler of 16-mixed."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return build_optimizer(
            groups, optimizer.name, optimizer.lr, optimizer.betas, optimizer.momentum, optimizer.weight_decay,
            fused=precision != "16-mixed",
        )  # fmt: skip

    return make


def model_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `smp.create_model`, without the architecture's name."""
    model = config.model
    common = {"encoder_name": model.encoder_name, "in_channels": model.in_channels, "classes": model.classes}
    return {**common, **model.network_arguments()}


def model_facts(config: Config, data: Data) -> dict[str, Any]:
    """What a user of the saved model needs beside its weights."""
    return {
        "class_names": config.class_names,
        "ignore_index": config.data.ignore_index,
        "reading": {
            domain: reading_facts(dataset.reading, dataset.normalisation_of(0))
            for domain in ("source", "target")
            for dataset in [data.get(f"{domain}_train") or data.get(f"{domain}_val") or data.get(f"{domain}_test")]
            if dataset is not None
        },
    }


def source_digest(config: Config, data: Data) -> str:
    """Equal for equal network settings, equal source training data and equal reading of it: 32 hex digits."""
    kept = ("normalization", "mean", "std", "crop_size", "window_size", "windows", "window_count", "ignore_index")
    unread = {"name", "preset", "scene", "root", "train", "val", "test", "batch_size"}
    source = {key: value for key, value in dataclasses.asdict(filled(config.data.source)).items() if key not in unread}
    if source["nodata_bands"] is None:  # as before there was the setting
        del source["nodata_bands"]
    facts = {
        "model": dataclasses.asdict(config.model),
        "classes": config.class_names,
        "reading": {key: getattr(config.data, key) for key in kept} | source,
        "source": data.digests["source_train"],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def as_pretrained(config: Config) -> Config:
    """The settings that count in pretraining, which has no unlabelled scores of a target without images to validate on."""
    by_target = (config.monitor.metric or "").startswith(PREFIX)
    if by_target and not filled(config.data.target).val and filled(config.data.source).val:
        return replace(config, {"monitor.metric": "iou/source_val", "monitor.mode": None})
    return config


def run_digest(job: str, config: Config, digests: Mapping[str, str], source_model: str | None = None) -> str:
    """Equal for runs of `job` that give the same numbers: equal settings, equal data (`digests` of the sets it uses, by the
    bytes of their files) and an equal source model (its run's own digest). Where results and files are kept, how fast the
    data come and the number of threads do not count: 32 hex digits, tag `dann.digest` of a run."""
    settings = config_to_dict(as_pretrained(config) if job == "pretrain" else config)
    del settings["tracking"], settings["threads"], settings["data"]["root"], settings["data"]["embedded"]
    del settings["trainer"]["enable_progress_bar"], settings["data"]["memory_gb"], settings["data"]["num_workers"]
    del settings["data"]["oracle"]
    defaults = dataclasses.asdict(TrainerConfig())
    for key in ("devices", "channels_last", "compile", "auto_batch_size"):  # as before there was the setting
        if settings["trainer"][key] == defaults[key]:
            del settings["trainer"][key]
    if settings["data"]["pad_to_crop"]:  # data that it changes were refused before there was the setting
        del settings["data"]["pad_to_crop"]
    for key in ("checkpoint_every_n_steps", "checkpoint_every_minutes", "checkpoints_kept"):
        del settings["trainer"][key]
    checkpoint = settings["domain_adaptation"]["pretrained_checkpoint"]
    checkpoint["path"] = source_model
    if checkpoint["source_prefix"] is None:  # as before there was the setting
        del checkpoint["source_prefix"]
    for domain in ("source", "target"):
        reading = dataclasses.asdict(filled(getattr(config.data, domain)))
        for key in ("name", "preset", "scene", "root", "train", "val", "test"):  # the digests tell
            del reading[key]
        if reading["nodata_bands"] is None:
            del reading["nodata_bands"]
        settings["data"][domain] = reading
    if job == "pretrain":
        del settings["domain_adaptation"], settings["optimizer"], settings["trainer"]["max_epochs"]
    else:
        del settings["pretraining"]
    if job == "evaluate":
        del settings["optimizer"], settings["trainer"]["max_epochs"], settings["domain_adaptation"]["method"]
    facts = {"job": job, "settings": settings, "data": dict(digests)}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def domain_name(config: Config, domain: str) -> str:
    """What runs call a domain."""
    settings = getattr(config.data, domain)
    if settings.name or settings.preset:
        return settings.name or " ".join(filter(None, (settings.preset, settings.scene)))
    first = settings.train[0] if settings.train else domain
    return first if isinstance(first, str) else str(first["images"])
