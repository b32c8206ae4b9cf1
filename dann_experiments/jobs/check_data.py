"""Reads all data once, reports its problems, and compares both domains."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dann_experiments.config import Config, InputError, config_to_yaml, flatten
from dann_experiments.data.checks import absent_classes, check_sizes, labelled_pixels, unit_problems
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.domain_data import DataPlan, followed
from dann_experiments.data.headers import read_headers
from dann_experiments.data.labels import LabelMap, UnnamedValues
from dann_experiments.data.nodata import NodataBands, default_nodata_bands
from dann_experiments.data.overlaps import shared_images
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Header, check_deflated
from dann_experiments.data.reading import chosen_bands
from dann_experiments.data.remarks import Problems
from dann_experiments.data.samples import Sample, file_digest
from dann_experiments.data.statistics import BandStatistics, BandSums, range_remark
from dann_experiments.data.vector_files import is_vector
from dann_experiments.data.vector_report import vector_report
from dann_experiments.data.virtual import addresses, files_behind, is_ours
from dann_experiments.jobs.build import data_plan
from dann_experiments.jobs.checks import may_share, remarks_on_label_maps
from dann_experiments.jobs.identity import domain_tags, public_settings, run_name
from dann_experiments.names import ALL_SETS, SOURCE_TRAIN, Job, OneDomain, SetName, Tag
from dann_experiments.reports.plots.domains import draw_domains
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import local_artifact_folder, open_store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataReport:
    """The result of `check_data`."""

    problems: list[str]
    """One sentence per problem, with the file's name; empty if the data can be used."""
    remarks: list[str]
    """One sentence per property of the data that is unusual but allowed, with what to do about it."""
    grids: list[str]
    """One line per domain: the pixel size of its files with its unit, and what it is resampled to."""
    polygons: list[str]
    """One line per file of polygons: its features per class, and those that are not used."""
    counts: pd.DataFrame
    """Index: set; columns: images, windows, pixels, and shares (0..1): of pixels without data, of pixels with data in some bands
    only, and of each class."""
    bands: pd.DataFrame
    """Index: (domain, band); columns: minimum, p2, mean, std, p98, maximum of the values as stored."""
    run_id: str | None
    """The run with the tables and the figure; None if there are problems."""
    tracking_uri: str = field(default="", repr=False)
    """The store's address, including a password in it; not shown in repr."""
    artifacts: str | None = None
    """Folder of the run's files; None if there is no run, or the folder is not on this machine."""


@dataclass
class _Set:
    """The result of reading one set."""

    dataset: SegmentationDataset
    """The complete images in adjacent windows, even if training uses only parts of them."""
    windows: int
    """Number of items of the set as the settings cut it."""
    sums: BandSums
    class_pixels: np.ndarray
    """(256,) number of pixels per class id."""
    partly: int = 0
    """Number of pixels with nodata values in some of their bands, but not in all."""

    @property
    def pixels(self) -> int:
        """Number of pixels of the set's images, at least 1."""
        found = self.sums.result()
        return max(found.pixels + found.nodata, 1)


def check_data(config: Config) -> DataReport:
    """Read every image and mask once, and return all problems, counts, class shares and band statistics.

    If there are no problems, logs tables and a figure to a new run; otherwise writes nothing to the store.
    """
    import pandas as pd

    plan, problems = data_plan(config, unused=True), Problems()
    log.info("Reading all images and masks ...")
    samples: dict[str, list[Sample]] = {}
    sets: dict[SetName, _Set] = {}
    incomplete: set[SetName] = set()  # by what could not be read, so that classes may be missing in their counts
    for name in (part for whole in ALL_SETS for part in plan.parts(whole)):
        known = len(problems.texts)
        try:
            found = plan.find(name, problems.append)
        except InputError as error:
            problems.append(str(error))
            found = None
        if len(problems.texts) > known:
            incomplete.add(name)
        if found is None:
            continue
        images = plan.images[name.one]
        good, headers = read_headers(found, images.reading, plan.in_channels, images.labels, problems)
        samples[str(name)] = good
        _note_stacks(name, good, problems)
        for sample in found:
            if sample not in good:
                _check_mask(sample, images.labels, problems)
        cut = _cut(plan, name, good, headers, problems)
        if cut is not None:
            sets[name] = cut
        if cut is None or not _read(cut, name, plan, problems) or len(cut.dataset.samples) < len(found):
            incomplete.add(name)
    for found in sets.values():
        problems.unnamed.add_classes(found.dataset.labels, np.flatnonzero(found.class_pixels))
    for text in problems.unnamed.texts():
        problems.append(text)
    for text, image, other, twin in shared_images(samples, functools.cache(file_digest)):
        if may_share(text, other):
            continue
        same = "is in" if image == twin else f"holds the same bytes as {twin} of"
        problems.append(
            f"{SetName.parse(text).key}: image {image} {same} {SetName.parse(other).key}{' as well' * (image == twin)}; "
            "an image may be in one set only, as scores on training images say little: keep it in one, for example by names."
        )
    map_remarks, names, ignored = remarks_on_label_maps(config), config.class_names, config.data.ignore_index
    of_training = [found for name, found in sets.items() if name.whole == SOURCE_TRAIN]
    trained_on = [found.class_pixels for found in of_training]
    all_read = all(name.whole != SOURCE_TRAIN for name in incomplete)
    if trained_on and np.sum(trained_on, 0).any() and all_read:
        try:
            files = [sample for found in of_training for sample in found.dataset.samples]
            text = absent_classes(np.sum(trained_on, 0), names, ignored, map_remarks, files)
            if text is not None:
                problems.remarks.add("absent classes", text)
        except InputError as error:
            problems.append(str(error))
    for text in map_remarks:
        problems.remarks.add(text, text)
    shares = {name: labelled_pixels(found.class_pixels, len(names), ignored) for name, found in sets.items()}
    rows = {str(name): _counts(found, names, shares[name]) for name, found in sets.items()}
    counts = pd.DataFrame.from_dict(rows, orient="index")
    by_domain: dict[OneDomain, list[_Set]] = {
        one: [found for name, found in sets.items() if name.one == one] for one in config.data.domains
    }
    # of the domain's training images, else of its first other set
    statistics: dict[OneDomain, BandStatistics] = {
        domain: mine[0].sums.result() for domain, mine in by_domain.items() if mine
    }
    bands = _band_table(statistics)
    for text in unit_problems({name: found.dataset for name, found in sets.items()}):
        problems.append(text)
    for domain, found in statistics.items():
        dataset = by_domain[domain][0].dataset
        text = range_remark(found, dataset.reading.scale, dataset.headers, domain.key)
        if text is not None and config.data.normalization == "fixed":
            problems.remarks.add(f"range {domain}", text)
    for domain in by_domain:
        text = _partly_remark(domain, {name: found for name, found in sets.items() if name.one == domain})
        if text is not None:
            problems.remarks.add(f"partly {domain}", text)
    polygons, vector_remarks = vector_report({name: found.dataset for name, found in sets.items()})
    for text in vector_remarks:
        problems.remarks.add(text, text)
    logged = (None, "", None) if problems.texts else _log(config, counts, bands, statistics, shares)
    grids = [line for domain, mine in by_domain.items() if (line := _grid_line(domain, mine)) is not None]
    return DataReport(problems.texts, problems.remarks.lines(), grids, polygons, counts, bands, *logged)


def _partly_remark(domain: OneDomain, sets: dict[SetName, _Set]) -> str | None:
    if any(found.dataset.reading.nodata_bands is not None for found in sets.values()):
        return None  # the user has set it; the table shows the share
    shares = {name: found.partly / found.pixels for name, found in sets.items() if found.partly}
    if not shares:
        return None
    ways = {
        found.dataset.reading.nodata_bands or default_nodata_bands(header.dtype)
        for name, found in sets.items() if name in shares
        for header in found.dataset.headers
    }  # fmt: skip
    meaning = {
        "any": "they count as without data (nodata_bands any)",
        "all": "they count as data, including the fill values (nodata_bands all)",
    }
    shown = ", ".join(f"{share:.1%} of {name.split}" for name, share in shares.items())
    return (
        f"{domain.key}: some pixels hold a nodata value in some bands and not in others ({shown}); "
        f"{' or '.join(meaning[way] for way in sorted(ways))}. Set {domain.key}.nodata_bands to decide."
    )


def _grid_line(domain: OneDomain, sets: Sequence[_Set]) -> str | None:
    """Return a line on the pixel sizes of a domain's files; None if no file records one."""
    sizes = sorted(
        {
            (header.unit or "units of no CRS", header.pixel_size)
            for found in sets for header in found.dataset.headers if header.pixel_size is not None
        }
    )  # fmt: skip
    if not sizes:
        return None
    ends: dict[str, list[float]] = {}
    for unit, size in sizes:
        ends.setdefault(unit, []).append(size)
    shown = ", ".join(
        f"{of_unit[0]:.6g} {unit}" if len(of_unit) == 1 else f"{of_unit[0]:.6g} to {of_unit[-1]:.6g} {unit}"
        for unit, of_unit in ends.items()
    )
    reading = sets[0].dataset.reading
    wanted = reading.pixel_size
    how = "read as they are" if wanted is None else f"resampled to {wanted:g} {reading.unit or ''}".rstrip()
    return f"{domain.words}: pixels of {shown}, {how}."


def _cut(
    plan: DataPlan, name: SetName, samples: Sequence[Sample], headers: Sequence[Header], problems: Problems
) -> _Set | None:
    """Return a set, not read yet, without the images to which the settings cannot be applied; None if none is left."""
    everything = dataclasses.replace(plan.cut, random_windows=False, window_count=None)
    kept: list[tuple[Sample, Header]] = []
    for sample, header in zip(samples, headers, strict=True):
        try:
            plan.dataset(name, [sample], [header], cut=everything)
            kept.append((sample, header))
        except InputError as error:  # such as a region outside its image, or an unknown pixel size
            problems.append(str(error))
            _check_mask(sample, plan.images[name.one].labels, problems)
    if not kept:
        return None
    files = ([sample for sample, _ in kept], [header for _, header in kept])
    as_trained = plan.dataset(name, *files)
    if as_trained.training:
        try:
            check_sizes(as_trained, name.key)
        except InputError as error:
            problems.append(str(error))
    dataset = plan.dataset(name, *files, cut=everything)
    return _Set(dataset, len(as_trained), BandSums(plan.in_channels), np.zeros(256, np.int64))


def _check_deflated(path: Path) -> None:
    """Raise InputError if an image, or a file that a virtual raster shows, has damaged data."""
    check_deflated(path)
    for file in files_behind(path)[1:]:
        try:
            check_deflated(file)
        except InputError as error:
            raise InputError(f"{path} shows a file that cannot be read: {error}") from None


def _note_stacks(name: SetName, samples: Sequence[Sample], problems: Problems) -> None:
    """Say how many images of a set are made of several files, and which those of the first are."""
    stacks = [found for sample in samples if is_ours(sample.image) and len(found := addresses(sample.image)) > 1]
    if stacks:
        parts = [file.split("/") for file in stacks[0]]
        unlike = len({names[-1] for names in parts}) == len(parts)
        first = (
            -1
            if unlike
            else next(place for place, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1)
        )
        files = ", ".join("/".join(names[first:]) for names in parts)
        text = f"{name.key}: {len(stacks)} of {len(samples)} images are made of several files; the first of {files}."
        problems.remarks.add(f"stacks of {name}", text)


def _read(found: _Set, name: SetName, plan: DataPlan, problems: Problems) -> bool:
    """Read and count every pixel of a set once; stop reading an image at its first problem. Return whether there was none."""
    dataset = found.dataset
    begun: set[Path] = set()
    broken: set[int] = set()

    def steps():
        for index, piece in enumerate(dataset.pieces):
            if piece.sample not in broken:
                try:
                    sample = dataset.samples[piece.sample]
                    for path in (sample.image, sample.mask):
                        if path is not None and path not in begun and not is_vector(path):
                            begun.add(path)
                            _check_deflated(path)
                    values, mask, valid = dataset.read(index)
                except InputError as error:
                    broken.add(piece.sample)
                    if not isinstance(error, UnnamedValues):  # which are collected over all masks
                        problems.append(str(error))
                    _check_mask(dataset.samples[piece.sample], dataset.labels, problems)
                else:
                    own = (slice(piece.counted_rows, None), slice(piece.counted_columns, None))
                    found.partly += _partly(dataset, index, own)
                    found.sums.add(values[:, *own], None if valid is None else valid[own])
                    if mask is not None:
                        found.class_pixels += np.bincount(mask[own].ravel(), minlength=256)
            yield index

    followed(steps(), len(dataset), f"reading {name.key}", plan.show_progress)
    if not broken and not found.sums.result().pixels:
        problems.append(
            f"{name.key}: image {dataset.samples[0].image} and the others of its set have no data: every pixel is nodata "
            f"({dataset.reading.settings}nodata is {dataset.reading.nodata})."
        )
    return not broken


def _partly(dataset: SegmentationDataset, index: int, own: tuple[slice, slice]) -> int:
    """Return the number of pixels of an item with nodata values in some of their bands, but not in all."""
    piece = dataset.pieces[index]
    path, header = dataset.samples[piece.sample].image, dataset.headers[piece.sample]
    bands = chosen_bands(path, header, dataset.reading, dataset.in_channels)
    if len(bands) < 2 or not any(dataset.reading.nodata_of(header, bands)):
        return 0

    def valid(way: NodataBands) -> np.ndarray:
        reading = dataclasses.replace(dataset.reading, nodata_bands=way)
        found = read_pixels(path, dataset.in_channels, reading, piece.window, header).valid
        return np.ones(piece.window[2:], bool) if found is None else found

    return int((valid("all") & ~valid("any"))[own].sum())


def _check_mask(sample: Sample, labels: LabelMap, problems: Problems) -> None:
    """Add the problems of a mask whose image cannot be used."""
    if sample.mask is None or is_vector(sample.mask):  # polygons are checked by the image that they lie on
        return
    try:
        problems.unnamed.check(sample.mask, labels)
    except InputError as error:
        problems.append(str(error))


def _counts(found: _Set, class_names: Sequence[str], labelled: np.ndarray) -> dict[str, Any]:
    result = found.sums.result()
    row: dict[str, Any] = {
        "images": len(found.dataset.samples),
        "windows": found.windows,
        "pixels": result.pixels + result.nodata,
        "without data": result.nodata / found.pixels,
        "partly without data": found.partly / found.pixels,
    }
    for name, count in zip(class_names, labelled, strict=True):
        row[name] = count / labelled.sum() if labelled.sum() else float("nan")
    if found.dataset.has_masks:
        row["not labelled"] = 1 - labelled.sum() / found.pixels
    return row


def _band_table(statistics: Mapping[OneDomain, BandStatistics]) -> pd.DataFrame:
    import pandas as pd

    rows = {
        (str(domain), band + 1): {
            "minimum": found.minimum[band], "p2": found.low[band], "mean": found.mean[band], "std": found.std[band],
            "p98": found.high[band], "maximum": found.maximum[band],
        }
        for domain, found in statistics.items()
        for band in range(len(found.mean))
    }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    if len(table):
        table.index = pd.MultiIndex.from_tuples(table.index, names=["domain", "band"])
    return table


def _log(
    config: Config,
    counts: pd.DataFrame,
    bands: pd.DataFrame,
    statistics: Mapping[OneDomain, BandStatistics],
    shares: Mapping[SetName, np.ndarray],
) -> tuple[str, str, str | None]:
    """Return the id of the new run, the store's address, and the folder of the run's files if it is on this machine."""
    store = open_store(config.tracking.uri, config.tracking.experiment)
    tags = {Tag.JOB: Job.CHECK_DATA, **domain_tags(config)}
    name, folder = run_name(Job.CHECK_DATA, config), Path(config.tracking.folder)
    with tracked_run(store, config.tracking.run_name, name, tags, folder, use_claimed=True) as run:
        public = public_settings(config, store.experiment)
        run.log_params(flatten(public))
        (run.folder / "config.yaml").write_text(config_to_yaml(public))
        (run.folder / "tables").mkdir()
        counts.to_csv(run.folder / "tables" / "counts.csv", index_label="set")
        bands.to_csv(run.folder / "tables" / "bands.csv")
        drawn: dict[str, np.ndarray] = {str(domain): found.drawn for domain, found in statistics.items()}
        by_name = {str(name): pixels for name, pixels in shares.items()}
        draw_domains(run.folder / "figures" / "domains.png", by_name, config.class_names, drawn)
    artifacts = local_artifact_folder(store, run.run_id)
    return run.run_id, store.uri, None if artifacts is None else str(artifacts)
