"""Reads all data once and says what is wrong with it, and what both domains look like side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dann_experiments.config import Config, InputError, config_to_yaml, flatten
from dann_experiments.data.dataset import Memory, SegmentationDataset
from dann_experiments.data.samples import shared_images
from dann_experiments.data.statistics import BandStatistics, BandSums
from dann_experiments.jobs import setup
from dann_experiments.tracking.figures import draw_domains
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.store import open_store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataReport:
    """What was found."""

    problems: list[str]
    """One sentence a problem, with the file's name; empty = the data can be used."""
    counts: pd.DataFrame
    """Index: set; columns: images, windows, pixels, the share without data, and the share of each class."""
    bands: pd.DataFrame
    """Index: (domain, band); columns: minimum, p2, mean, std, p98, maximum of the values as stored."""
    run_id: str | None
    """The run that holds tables and figure; None where there are problems."""


@dataclass
class _Set:
    """What reading one set gave."""

    dataset: SegmentationDataset
    sums: BandSums
    class_pixels: np.ndarray


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
        samples[name], headers = problems.good(config, name, found)
        if samples[name]:
            sets[name] = _read(config, name, samples[name], headers, problems)
    for name, image, other, twin in shared_images(samples, data.digest_of):
        problems.append(
            f"data.{name.replace('_', '.')}: image {image} holds the same bytes as {twin} of "
            f"data.{other.replace('_', '.')}; an image may stand in one set alone."
        )
    for name in ("source_train",):
        if name in sets:
            try:
                setup.check_classes(config, sets[name].class_pixels)
            except InputError as error:
                problems.append(str(error))
    counts = pd.DataFrame({name: _counts(config, found) for name, found in sets.items()}).T
    statistics = {
        domain: sums.result() for domain in ("source", "target") if (sums := _sums_of(sets, domain)) is not None
    }
    bands = _band_table(statistics)
    run_id = None if problems.texts else _log(config, counts, bands, statistics, sets)
    return DataReport(problems.texts, counts, bands, run_id)


def _read(config: Config, name: str, samples: Any, headers: Any, problems: setup.Problems) -> _Set:
    """Every item of a set, read once; those that cannot be are noted and left out."""
    try:
        dataset = setup.as_dataset(config, name, samples, Memory(0), headers)
    except InputError as error:  # a region beyond its image
        problems.append(str(error))
        dataset = setup.as_dataset(config, name, [], Memory(0), [])
    found = _Set(dataset, BandSums(config.model.in_channels), np.zeros(256, np.int64))

    def steps():
        for index in range(len(dataset)):
            try:
                values, mask, valid = dataset.read(index)
                found.sums.add(values, valid)
                if mask is not None:
                    found.class_pixels += np.bincount(mask.ravel(), minlength=256)
            except InputError as error:
                problems.append(str(error))
            yield index

    setup.followed(config, steps(), len(dataset), f"reading data.{name.replace('_', '.')}")
    return found


def _counts(config: Config, found: _Set) -> dict[str, Any]:
    result = found.sums.result()
    pixels = result.pixels + result.nodata
    row: dict[str, Any] = {
        "images": len(found.dataset.samples),
        "windows": len(found.dataset),
        "pixels": pixels,
        "without data": result.nodata / max(pixels, 1),
    }
    labelled = found.class_pixels[: len(config.class_names)]
    for name, count in zip(config.class_names, labelled, strict=True):
        row[name] = count / labelled.sum() if labelled.sum() else float("nan")
    if found.dataset.has_masks:
        row["not labelled"] = 1 - labelled.sum() / max(pixels, 1)
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
    shares = {name: found.class_pixels[: len(config.class_names)] for name, found in sets.items()}
    with tracked_run(
        store, config.tracking.run_name, "check-data", tags, Path(config.tracking.folder), use_claimed=True
    ) as run:
        public = setup.public_settings(config)
        run.log_params(flatten(public))
        (run.folder / "config.yaml").write_text(config_to_yaml(public))
        (run.folder / "tables").mkdir()
        counts.to_csv(run.folder / "tables" / "counts.csv", index_label="set")
        bands.to_csv(run.folder / "tables" / "bands.csv")
        drawn = {domain: found.drawn for domain, found in statistics.items()}
        draw_domains(run.folder / "figures" / "domains.png", shares, config.class_names, drawn)
    return run.run_id
