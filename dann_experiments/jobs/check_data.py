"""Reads all data once and says what is wrong with it, and what both domains look like side by side."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dann_experiments.config import Config, InputError, config_to_yaml, flatten
from dann_experiments.data.dataset import Memory, SegmentationDataset, check_sizes, unit_problems
from dann_experiments.data.labels import read_mask
from dann_experiments.data.nodata import NodataBands, default_nodata_bands
from dann_experiments.data.reading import Header, Window, check_deflated, chosen_bands, read_header, read_pixels
from dann_experiments.data.samples import Sample, shared_images
from dann_experiments.data.sets import labels_of
from dann_experiments.data.statistics import BandStatistics, BandSums, range_remark
from dann_experiments.data.windows import default_size, grid
from dann_experiments.jobs import setup
from dann_experiments.reports.plots.domains import draw_domains
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import open_store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataReport:
    """What was found."""

    problems: list[str]
    """One sentence for each problem, with the file's name; empty = the data can be used."""
    remarks: list[str]
    """What is odd about the data and yet allowed, with the way out."""
    grids: list[str]
    """One line for each domain: the pixel size of its files with its unit, and what it is resampled to."""
    counts: pd.DataFrame
    """Index: set; columns: images, windows, pixels, the share without data, the share that is partly without data (in some bands
    and not in others), and the share of each class."""
    bands: pd.DataFrame
    """Index: (domain, band); columns: minimum, p2, mean, std, p98, maximum of the values as stored."""
    run_id: str | None
    """The run that holds tables and figure; None where there are problems."""


@dataclass
class _Set:
    """What reading one set gave."""

    dataset: SegmentationDataset
    """Its images in windows side by side, whatever training takes of them."""
    windows: int
    """Items of the set as the settings cut it."""
    sums: BandSums
    class_pixels: np.ndarray
    """(256,) pixels of each id of the network."""
    partly: int = 0
    """Pixels with nodata values in some of their bands, not in all."""

    @property
    def pixels(self) -> int:
        """All pixels of its images, at least 1."""
        found = self.sums.result()
        return max(found.pixels + found.nodata, 1)


def check_data(config: Config) -> DataReport:
    """Read every image and mask once; all problems at once, then counts, class shares and band statistics.

    Without problems, tables and figure are logged to a run of its own; with problems nothing is written to the store.
    """
    import pandas as pd

    data, problems = setup.Data({}), setup.Problems()
    samples: dict[str, Any] = {}
    sets: dict[str, _Set] = {}
    for name in setup.SETS:
        try:
            found = setup.find_set(config, name, problems.append)
        except InputError as error:
            problems.append(str(error))
            continue
        if found is None:
            continue
        samples[name], headers, _ = problems.good(config, name, found)
        for sample in found:
            if sample not in samples[name]:
                _check_mask(config, name, sample, problems)
        cut = _cut(config, name, samples[name], headers, problems)
        if cut is not None:
            sets[name] = _read(config, name, cut, problems)
    for name, image, other, twin in shared_images(samples, data.digest_of):
        same = "stands in" if image == twin else f"holds the same bytes as {twin} of"
        problems.append(
            f"data.{name.replace('_', '.')}: image {image} {same} data.{other.replace('_', '.')}{' as well' * (image == twin)}; "
            "an image may stand in one set alone, as scores on trained images say little: keep it in one, for example by names."
        )
    if "source_train" in sets and sets["source_train"].class_pixels.any():
        try:
            for text in setup.check_classes(config, sets["source_train"].class_pixels):
                problems.remarks.add("absent classes", text)
        except InputError as error:
            problems.append(str(error))
    for text in setup.label_map_remarks(config):
        problems.remarks.add(text, text)
    counts = pd.DataFrame.from_dict({name: _counts(config, found) for name, found in sets.items()}, orient="index")
    statistics = {
        domain: sums.result() for domain in ("source", "target") if (sums := _sums_of(sets, domain)) is not None
    }
    bands = _band_table(statistics)
    for text in unit_problems({name: found.dataset for name, found in sets.items()}):
        problems.append(text)
    for domain, found in statistics.items():
        dataset = next(known.dataset for name, known in sets.items() if name.startswith(domain))
        text = range_remark(found, dataset.reading.scale, dataset.headers, f"data.{domain}")
        if text is not None and config.data.normalization == "fixed":
            problems.remarks.add(f"range {domain}", text)
    for domain in ("source", "target"):
        text = _partly_remark(domain, {name: found for name, found in sets.items() if name.startswith(domain)})
        if text is not None:
            problems.remarks.add(f"partly {domain}", text)
    run_id = None if problems.texts else _log(config, counts, bands, statistics, sets)
    return DataReport(problems.texts, problems.remarks.lines(), _grid_lines(sets), counts, bands, run_id)


def _partly_remark(domain: str, sets: dict[str, _Set]) -> str | None:
    if any(found.dataset.reading.nodata_bands is not None for found in sets.values()):
        return None  # the user has decided; the table has the share
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
        "all": "they count as data, fill values included (nodata_bands all)",
    }
    shown = ", ".join(f"{share:.1%} of {name.split('_')[1]}" for name, share in shares.items())
    return (
        f"data.{domain}: some pixels hold a nodata value in some bands and not in others ({shown}); "
        f"{' or '.join(meaning[way] for way in sorted(ways))}. data.{domain}.nodata_bands chooses."
    )


def _grid_lines(sets: dict[str, _Set]) -> list[str]:
    """One line for each domain whose files tell the size of their pixels."""
    lines = []
    for domain in ("source", "target"):
        mine = [found.dataset for name, found in sets.items() if name.startswith(domain)]
        sizes = sorted(
            {(h.unit or "units of no CRS", h.pixel_size) for d in mine for h in d.headers if h.pixel_size is not None}
        )
        if not sizes:
            continue
        shown = ", ".join(
            f"{low:.6g} {unit}" if low == high else f"{low:.6g} to {high:.6g} {unit}"
            for unit in dict.fromkeys(unit for unit, _ in sizes)
            for low, high in [(min(s for u, s in sizes if u == unit), max(s for u, s in sizes if u == unit))]
        )
        wanted = mine[0].reading.pixel_size
        how = "read as they are" if wanted is None else f"resampled to {wanted:g} {mine[0].reading.unit or ''}".rstrip()
        lines.append(f"{domain}: pixels of {shown}, {how}.")
    return lines


def _cut(
    config: Config, name: str, samples: Sequence[Sample], headers: Sequence[Header], problems: setup.Problems
) -> _Set | None:
    """A set, not read yet, without the images that the settings do not fit; None if none is left."""
    everything = dataclasses.replace(config, data=dataclasses.replace(config.data, windows="grid", window_count=None))
    kept: list[tuple[Sample, Header]] = []
    for sample, header in zip(samples, headers, strict=True):
        try:
            setup.as_dataset(everything, name, [sample], Memory(0), [header])
            kept.append((sample, header))
        except InputError as error:  # a region beyond its image, a pixel size that is not known
            problems.append(str(error))
            _check_mask(config, name, sample, problems)
    if not kept:
        return None
    files = ([sample for sample, _ in kept], Memory(0), [header for _, header in kept])
    as_trained = setup.as_dataset(config, name, *files)
    if as_trained.training:
        try:
            check_sizes(as_trained, f"data.{name.replace('_', '.')}")
        except InputError as error:
            problems.append(str(error))
    dataset = setup.as_dataset(everything, name, *files)
    return _Set(dataset, len(as_trained), BandSums(config.model.in_channels), np.zeros(256, np.int64))


def _read(config: Config, name: str, found: _Set, problems: setup.Problems) -> _Set:
    """Every pixel of a set, read and counted once; an image is left at the first thing that is wrong with it."""
    dataset, key = found.dataset, f"data.{name.replace('_', '.')}"
    begun: set[Path] = set()
    broken: set[int] = set()

    def steps():
        for index, piece in enumerate(dataset.pieces):
            if piece.sample not in broken:
                try:
                    sample = dataset.samples[piece.sample]
                    for path in (sample.image, sample.mask):
                        if path is not None and path not in begun:
                            begun.add(path)
                            check_deflated(path)
                    values, mask, valid = dataset.read(index)
                except InputError as error:
                    broken.add(piece.sample)
                    problems.append(str(error))
                    _check_mask(config, name, dataset.samples[piece.sample], problems)
                else:
                    own = (slice(piece.counted_rows, None), slice(piece.counted_columns, None))
                    found.partly += _partly(dataset, index, own)
                    found.sums.add(values[:, *own], None if valid is None else valid[own])
                    if mask is not None:
                        found.class_pixels += np.bincount(mask[own].ravel(), minlength=256)
            yield index

    setup.followed(config, steps(), len(dataset), f"reading {key}")
    if not broken and not found.sums.result().pixels:
        problems.append(
            f"{key}: image {dataset.samples[0].image} and the others of its set hold no data: every pixel is nodata "
            f"({dataset.reading.settings}nodata is {dataset.reading.nodata})."
        )
    return found


def _partly(dataset: SegmentationDataset, index: int, own: tuple[slice, slice]) -> int:
    """Pixels of an item that hold nodata values in some of their bands, not in all."""
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


def _check_mask(config: Config, name: str, sample: Sample, problems: setup.Problems) -> None:
    """Note what is wrong with the mask of an image that cannot be used itself."""
    if sample.mask is None:
        return
    try:
        header = read_header(sample.mask)
        labels = labels_of(config, name)
        size = default_size(header.height, header.width, None, None)
        for piece in grid(0, Window(0, 0, header.height, header.width), size):
            read_mask(sample.mask, labels, piece.window)
    except InputError as error:
        problems.append(str(error))


def _labelled(config: Config, found: _Set) -> np.ndarray:
    """(K,) pixels of each class."""
    pixels = found.class_pixels.copy()
    pixels[config.data.ignore_index] = 0
    return pixels[: len(config.class_names)]


def _counts(config: Config, found: _Set) -> dict[str, Any]:
    result = found.sums.result()
    row: dict[str, Any] = {
        "images": len(found.dataset.samples),
        "windows": found.windows,
        "pixels": result.pixels + result.nodata,
        "without data": result.nodata / found.pixels,
        "partly without data": found.partly / found.pixels,
    }
    labelled = _labelled(config, found)
    for name, count in zip(config.class_names, labelled, strict=True):
        row[name] = count / labelled.sum() if labelled.sum() else float("nan")
    if found.dataset.has_masks:
        row["not labelled"] = 1 - labelled.sum() / found.pixels
    return row


def _sums_of(sets: dict[str, _Set], domain: str) -> BandSums | None:
    """Of the domain's training images, else of the first other set it has."""
    return next((found.sums for name, found in sets.items() if name.startswith(domain)), None)


def _band_table(statistics: dict[str, BandStatistics]) -> pd.DataFrame:
    import pandas as pd

    rows = {
        (domain, band + 1): {
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
    statistics: dict[str, BandStatistics],
    sets: dict[str, _Set],
) -> str:
    store = open_store(config.tracking.uri, config.tracking.experiment)
    tags = {
        "dann.job": "check-data",
        "dann.source": setup.domain_name(config, "source"),
        "dann.target": setup.domain_name(config, "target"),
    }
    shares = {name: _labelled(config, found) for name, found in sets.items()}
    with tracked_run(
        store, config.tracking.run_name, "check-data", tags, Path(config.tracking.folder), use_claimed=True
    ) as run:
        public = setup.public_settings(config, store.experiment)
        run.log_params(flatten(public))
        (run.folder / "config.yaml").write_text(config_to_yaml(public))
        (run.folder / "tables").mkdir()
        counts.to_csv(run.folder / "tables" / "counts.csv", index_label="set")
        bands.to_csv(run.folder / "tables" / "bands.csv")
        drawn = {domain: found.drawn for domain, found in statistics.items()}
        draw_domains(run.folder / "figures" / "domains.png", shares, config.class_names, drawn)
    return run.run_id
