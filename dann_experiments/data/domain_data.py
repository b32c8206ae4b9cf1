"""Builds the image sets of a job from plain settings.

data = DomainData(plan, names)  # files found, headers checked
sets = data.read()              # images read up to the memory limit, normalization measured
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.data import shared_cache
from dann_experiments.data.augmentation import Strength
from dann_experiments.data.checks import check_sizes, unit_problems
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.digests import Digests
from dann_experiments.data.digits import EmbeddedName, build_digits
from dann_experiments.data.headers import read_headers
from dann_experiments.data.image_sets import ImageSets, digests_of
from dann_experiments.data.labels import LabelMap
from dann_experiments.data.lasting_cache import LastingCache
from dann_experiments.data.lists import under
from dann_experiments.data.memory import Arrays, Memory
from dann_experiments.data.rasters import Header, many_files
from dann_experiments.data.reading import Normalization, Reading, largest_value
from dann_experiments.data.remarks import Problems
from dann_experiments.data.remembered import Facts, States, place
from dann_experiments.data.samples import Sample, files_of, find_samples, refuse
from dann_experiments.data.statistics import measure, normalization_from
from dann_experiments.data.virtual import user_cache
from dann_experiments.data.weak_masks import with_masks_of
from dann_experiments.data.windows import Piece
from dann_experiments.names import (
    SOURCE_TRAIN,
    SOURCE_VAL,
    TARGET_LABELLED,
    TARGET_TEST,
    TARGET_TRAIN,
    TARGET_VAL,
    TARGET_WEAK,
    OneDomain,
    SetName,
    Split,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainImages:
    """Location of a domain's images, and how they are read."""

    entries: Mapping[Split, Sequence[Any]]
    """Entries for `find_samples`, per split; a split may be absent."""
    reading: Reading
    labels: LabelMap
    augmentation: Strength = "none"
    root: str | None = None
    """Folder that the entries are relative to; None = the plan's `root`."""
    preset: str | None = None
    """Name of the preset that the entries come from, for messages."""
    labelled_count: int | None = None
    """Number of images of the split train_labelled to use; None = all."""


@dataclass(frozen=True)
class Cut:
    """How images become items (see `SegmentationDataset` and `windows`)."""

    window_size: int | None = None
    random_windows: bool = False
    """Draw the places of training windows at random."""
    window_count: int | None = None
    crop_size: int | None = None
    pad_to_crop: bool = False
    seed: int = 0


@dataclass(frozen=True)
class DataPlan:
    """All settings that decide the sets of a job, as plain values."""

    images: Mapping[OneDomain, DomainImages]
    """Of every domain, in the order of the labels of a domain classifier."""
    in_channels: int
    cut: Cut
    mean: tuple[float, ...]
    """Per band, of images scaled to 0..1."""
    std: tuple[float, ...]
    own_statistics: bool = False
    """Measure each domain's mean and standard deviation and use them in place of `mean` and `std`."""
    memory_gb: float = 0.0
    """Memory limit for decoded images, for all sets together."""
    disk_cache_gb: float = 0.0
    """Limit for decoded images in the user's cache, of all jobs together; 0 = keep none there."""
    root: str | None = None
    """Folder that the entries are relative to; None = the embedded data if set, else the current folder."""
    embedded: EmbeddedName | None = None
    embedded_seed: int = 0
    embedded_folder: str | None = None
    show_progress: bool = False
    masks_of_rule: bool = False
    """Read the weak labels of the target's validation and test images in place of their masks."""

    def parts(self, name: SetName) -> list[SetName]:
        """Return the set `name`, or one set per domain if the settings name several domains for it."""
        if name.member is not None:
            return [name]
        return [SetName(one.role, name.split, one.name) for one in self.images if one.role == name.domain]

    def find(self, name: SetName, report: Callable[[str], None] = refuse) -> list[Sample] | None:
        """Return the samples of one set, None if it has no entries; report problems, including a missing training set."""
        images = self.images[name.one]
        entries = images.entries.get(name.split, ())
        if not entries:
            if name.split == "train":
                report(f"{name.key} is empty; name a CSV manifest or a folder with images/ to train on.")
            return None
        # never look for masks of the target's training images
        needed = (SOURCE_TRAIN, SOURCE_VAL, TARGET_LABELLED, TARGET_WEAK)
        masks = "no" if name.whole == TARGET_TRAIN else "required" if name.whole in needed else "if present"

        def report_with_preset(text: str) -> None:
            report(text if images.preset is None else f"{text} (preset {images.preset})")

        found = find_samples(entries, self._root_of(name.one), name.key, masks, report_with_preset)
        if name.whole == TARGET_WEAK:  # the training set, so that its batches are the same with and without weak labels
            train = SetName(name.domain, "train", name.member)
            trained_on = self._as_listed(train)
            scored = [SetName(name.domain, one.split, name.member) for one in (TARGET_VAL, TARGET_TEST)]
            others = [sample for one in scored for sample in self._as_listed(one)]
            return with_masks_of(trained_on, found, name.key, train.key, report, others) if trained_on else None
        if self.masks_of_rule and name.whole in (TARGET_VAL, TARGET_TEST):
            weak = SetName(name.domain, "weak_labels", name.member)
            masks_of = find_samples(
                images.entries.get("weak_labels", ()), self._root_of(name.one), weak.key, "required", report
            )
            found = with_masks_of(found, masks_of, weak.key, name.key, lambda _: None)
            return found if all(sample.mask is not None for sample in found) else None
        if name.whole != TARGET_LABELLED or images.labelled_count is None:
            return found
        if len(found) < images.labelled_count:
            report(f"data.target.labelled_count is {images.labelled_count}, but {name.key} has {len(found)} images.")
        return found[: images.labelled_count] or None

    def _as_listed(self, name: SetName) -> list[Sample]:
        """Return the samples of a set as its entries name them; its problems are reported where the set itself is found."""
        return dataclasses.replace(self, masks_of_rule=False).find(name, lambda _: None) or []

    def dataset(
        self,
        name: SetName,
        samples: Sequence[Sample],
        headers: Sequence[Header] | None = None,
        memory: Memory | None = None,
        cut: Cut | None = None,
    ) -> SegmentationDataset:
        """Return a set by its headers, without reading pixels, with `fixed_normalization`.

        Raises InputError for a region beyond its image or an unknown pixel size.
        """
        images = self.images[name.one]
        return SegmentationDataset(
            samples, images.labels, self.fixed_normalization(name.one), images.reading, name.training,
            augmentation=images.augmentation, memory=memory, headers=headers, **dataclasses.asdict(cut or self.cut),
        )  # fmt: skip

    def fixed_normalization(self, domain: OneDomain) -> Normalization:
        """Return the normalization by settings only; `DomainData.normalization` measures the rest."""
        scale, bands = self.images[domain].reading.scale, self.in_channels
        low, high = scale if isinstance(scale, tuple) else (0.0, 1.0)
        mean, std = ((0.5,) * bands, (0.25,) * bands) if self.own_statistics else (self.mean, self.std)
        return Normalization((low,) * bands, (high,) * bands, mean, std)

    def _root_of(self, domain: OneDomain) -> Path:
        """Return the folder that a domain's entries are relative to; build the embedded data there if missing."""
        own = self.images[domain].root
        if own is not None:
            return under(Path(), own, f"{domain.key}.root")
        if self.root is not None:
            return under(Path(), self.root, "data.root")
        if self.embedded is None:
            return Path.cwd()
        folder = embedded_folder(self.embedded_folder)
        try:
            return build_digits(folder, self.embedded_seed, self.embedded)
        except OSError as error:
            raise InputError(f"data.embedded.folder is {folder}, where the data cannot be built ({error}).") from None


class DomainData:
    """Finds the files of a job's sets and checks their headers; `read` returns the sets ready to use.

    Workers of one sweep or comparison share decoded images (`shared_cache`). Raises InputError that lists all problems.
    """

    def __init__(self, plan: DataPlan, names: Iterable[SetName]) -> None:
        self.plan = plan
        self._memory = Memory(plan.memory_gb)
        folder = place()
        self._facts, self._states = Facts(folder), States()
        self._lasting = LastingCache(folder, plan.disk_cache_gb * 1e9) if folder and plan.disk_cache_gb > 0 else None
        self._file_digests = Digests(self._facts, self._states)
        self._sets: dict[SetName, SegmentationDataset] = {}
        problems = Problems()
        for name in (part for whole in names for part in plan.parts(whole)):
            samples = plan.find(name, problems.append)
            dataset = None if samples is None else self._with_headers(name, samples, problems)
            if dataset is not None:
                self._sets[name] = dataset
        for text in unit_problems(self._sets):
            problems.append(text)
        problems.refuse()
        for line in problems.remarks.lines():
            log.warning("%s", line)
        self._file_digests.recall(path for dataset in self._sets.values() for path in files_of(dataset.samples))
        self._facts.flush()

    @property
    def labelled(self) -> frozenset[SetName]:
        """Names of the sets that have masks; with several domains, also that of the whole if one of its sets has."""
        names = [name for name, dataset in self._sets.items() if dataset.has_masks]
        return frozenset([*names, *(name.whole for name in names)])

    @property
    def names(self) -> list[SetName]:
        """Names of all sets."""
        return list(self._sets)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Digest of each set, by its name as a string; equal for files with equal bytes that are read by equal rules."""
        found = digests_of(self._sets, self.digest_of)
        self._facts.flush()
        return found

    def digest_of(self, path: Path) -> bytes:
        """Return the digest of a file's bytes; read them only once, and not if it is known from an earlier job."""
        return self._file_digests.of(path)

    def read(
        self,
        names: Iterable[SetName] | None = None,
        stride: int | None = None,
        known: Mapping[OneDomain, Normalization] | None = None,
        ahead: bool = True,
    ) -> ImageSets:
        """Return the sets `names` (None = all), ready to use.

        `stride`: stride of the network to train, which the size of training images must fit; None = do not check. `known`:
        normalizations that need not be measured. `ahead`: read files now, up to the memory limit, not when an item is asked for.
        Raises InputError for the first bad file.
        """
        wanted = set(self._sets if names is None else names)
        chosen = [name for name in self._sets if name in wanted or name.whole in wanted]
        for name in chosen:
            dataset = self._sets[name]
            if not ahead:
                self._on_disk(name, dataset, write=False)
                continue
            self._fill(name, dataset)
            if stride is not None and dataset.training:
                check_sizes(dataset, name.key, stride)
        normalizations = {
            domain: (known or {}).get(domain) or self.normalization(domain, chosen)
            for domain in self.plan.images if any(name.one == domain for name in chosen)
        }  # fmt: skip
        return ImageSets(
            {name: self._sets[name].with_normalization(normalizations[name.one]) for name in chosen}, self.digest_of,
            tuple(self.plan.images),
        )  # fmt: skip

    def normalization(self, domain: OneDomain, names: Iterable[SetName] | None = None) -> Normalization:
        """Return the normalization of a domain, measured if the settings ask for it.

        It is measured over the training windows or, without a training set, over the first set of the domain in `names`
        (None = all). Raises InputError if images of different types cannot be measured together.
        """
        scale, own = self.plan.images[domain].reading.scale, self.plan.own_statistics
        fixed = self.plan.fixed_normalization(domain)
        if not (own or scale == "percentiles"):
            return fixed
        name = SetName(domain.role, "train", domain.name)
        measured = self._sets.get(name) or self._unread(name)
        if measured is None:
            name = next(name for name in names or self._sets if name.one == domain)
            measured = self._sets[name]
        ends = {largest_value(header) if scale == "type" else 0.0 for header in measured.headers}
        types = sorted({header.dtype for header in measured.headers})
        if len(types) > 1 or len(ends) > 1:  # sums over different types are meaningless
            raise InputError(
                f"{domain.key} has images of {' and '.join(types)}, whose bands cannot be measured together; convert "
                "them to one type, or set data.normalization to fixed and scale to type or a range."
            )

        def measure_all() -> dict[str, Any]:
            what = f"measuring the bands of {domain.key}"
            *_, sums = followed(measure(measured), len(measured), what, self.plan.show_progress)
            return dataclasses.asdict(normalization_from(sums.result(), fixed, scale, ends.pop(), own))

        rules = {**self._decided_by(name), "fixed": fixed, "scale": scale, "own": own}
        found = self._facts.known_or("normalization", measured.samples, rules, measure_all, self._states)
        return Normalization(**{side: tuple(values) for side, values in found.items()})

    def _unread(self, train: SetName) -> SegmentationDataset | None:
        """Return a training set that the job does not use otherwise, to measure it; None if it has no entries."""
        if not self.plan.images[train.one].entries["train"]:
            return None
        return self.plan.dataset(train, self.plan.find(train) or [])

    def _with_headers(self, name: SetName, found: Sequence[Sample], problems: Problems) -> SegmentationDataset | None:
        """Return a set without its bad images, None if none is left; with a shared cache, it is already read."""
        shared = shared_cache.in_use()
        if shared is None or problems.texts:
            return self._from_files(name, found, problems)
        key = shared.key(found, **self._decided_by(name))
        with shared.alone(key):
            index = shared.index(key)
            if index is not None:
                self._file_digests.update(shared.digests(index, found))
                dataset = self.plan.dataset(name, found, shared.headers(index), self._memory)
                shared.load(key, index, dataset)
                return dataset
            dataset = self._from_files(name, found, problems)
            if dataset is not None and not problems.texts:
                try:
                    self._fill(name, dataset)
                    shared.store(key, dataset, self.digest_of)
                except InputError as error:
                    problems.append(str(error))
            return dataset

    def _from_files(self, name: SetName, found: Sequence[Sample], problems: Problems) -> SegmentationDataset | None:
        images = self.plan.images[name.one]
        samples, headers = read_headers(
            found, images.reading, self.plan.in_channels, images.labels, problems, self._facts, self._states
        )
        if samples:
            try:
                return self.plan.dataset(name, samples, headers, self._memory)
            except InputError as error:  # a region beyond its image, an unknown pixel size
                problems.append(str(error))
        return None

    def _decided_by(self, name: SetName) -> dict[str, Any]:
        """Return everything but the files that the decoded windows of a set depend on."""
        images, cut, training = self.plan.images[name.one], self.plan.cut, name.training
        return {
            "labels": images.labels,
            "reading": images.reading,
            "bands": self.plan.in_channels,
            "cut": (training, cut.crop_size if training else None, cut.window_size),
            "random": (cut.window_count, cut.seed) if training and cut.random_windows else None,
        }

    def _fill(self, name: SetName, dataset: SegmentationDataset) -> None:
        if not self._on_disk(name, dataset):
            self._decode(name, dataset)

    def _decode(
        self, name: SetName, dataset: SegmentationDataset, keep: Callable[[Piece, Arrays], None] | None = None
    ) -> None:
        with many_files():
            followed(dataset.fill(keep), len(dataset), f"reading {name.key}", self.plan.show_progress)

    def _on_disk(self, name: SetName, dataset: SegmentationDataset, write: bool = True) -> bool:
        """Map a large set from the user's cache, where it is written if it is not there. Return False if it is not kept there."""
        if dataset.is_filled or self._lasting is None:
            return False
        decode = functools.partial(self._decode, name, dataset) if write else None
        return self._lasting.use(dataset, self._states, self._decided_by(name), decode)


def embedded_folder(folder: str | None) -> Path:
    """Return the folder to build embedded data in: `folder` if set, else one in the user's cache."""
    return under(Path(), folder, "data.embedded.folder") if folder is not None else user_cache()


def followed(steps: Iterable[Any], count: int, what: str, shown: bool) -> list[Any]:
    """Exhaust `steps` and return a list of the last one, or [] if there is none.

    `shown`: show a progress bar if stdout is a terminal and `count` is above 200.
    """
    from rich.progress import track

    silent = not (shown and sys.stdout.isatty() and count > 200)
    last: list[Any] = []
    for step in track(steps, description=what, total=count, disable=silent, transient=True):
        last = [step]
    return last
