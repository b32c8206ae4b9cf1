"""The sets that the settings name: which files, how they are read, and what is wrong with them.

Neither torch nor Lightning is needed here: a process of its own looks at the files while another imports those (`early.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dann_experiments.config import Config, InputError
from dann_experiments.config.data import DomainDataConfig
from dann_experiments.config.presets import filled
from dann_experiments.data.digits import build_digits, digits_folder, is_built
from dann_experiments.data.labels import LabelMap, label_map
from dann_experiments.data.looking import Ahead, Arrays, looked_at
from dann_experiments.data.reading import Header, Reading
from dann_experiments.data.remarks import Remarks
from dann_experiments.data.samples import Sample, find_samples, refuse, under

PROBLEMS_SHOWN = 20


class Looked(NamedTuple):
    """What a look at the files of a set gave."""

    samples: list[Sample]
    """Those with which nothing is wrong."""
    headers: list[Header]
    read: dict[int, Arrays]
    """What was read ahead, by the sample's number."""


class Problems:
    """What is wrong with the files, collected."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.remarks = Remarks()
        """What is odd and yet allowed."""

    def append(self, text: str) -> None:
        """Note a problem, once."""
        if text not in self.texts:
            self.texts.append(text)

    def good(self, config: Config, name: str, samples: Sequence[Sample], ahead: Ahead | None = None) -> Looked:
        """The samples whose headers are right, these, and what was read `ahead`; what is wrong with the others is noted."""
        data = config.data
        reading, labels = reading_of(config, name), labels_of(config, name)
        at_random = data.windows == "random" and name.endswith("_train")
        if ahead is not None and (at_random or data.window_size is not None or reading.pixel_size is not None):
            ahead.stop()  # its windows are not known yet
        kept, headers, read = [], [], {}
        equal: dict[Header, Header] = {}  # most are: one of them is enough
        for sample in samples:
            if ahead is not None and (sample.region is not None or self.texts):
                ahead.stop()
            try:
                header, arrays = looked_at(sample, reading, config.model.in_channels, labels, ahead, self.remarks)
            except InputError as error:
                self.append(str(error))
                continue
            if arrays is not None:
                read[len(kept)] = arrays
            kept.append(sample)
            headers.append(equal.setdefault(header, header))
        return Looked(kept, headers, read)

    def refuse(self) -> None:
        """Raise InputError that lists the problems, if there are any."""
        if len(self.texts) == 1:
            raise InputError(self.texts[0])
        if self.texts:
            shown = "".join(f"\n  - {text}" for text in self.texts[:PROBLEMS_SHOWN])
            more = len(self.texts) - PROBLEMS_SHOWN
            raise InputError(
                f"{len(self.texts)} problems with the data:{shown}"
                + (f"\n  and {more} more; `check-data` lists all." if more > 0 else "")
            )


def find_set(config: Config, name: str, report: Callable[[str], None] = refuse) -> list[Sample] | None:
    """The samples of one set, None if it is not given; a training set must be given."""
    domain_name, split = name.split("_")
    key = f"data.{domain_name}.{split}"
    domain = filled(getattr(config.data, domain_name))
    entries = getattr(domain, split)
    if not entries:
        if split == "train":
            report(f"{key} is empty; name a CSV manifest or a folder with images/ to train on.")
        return None
    masks = "no" if name == "target_train" else "required" if name in ("source_train", "source_val") else "if present"
    preset = getattr(config.data, domain_name).preset

    def report_with_preset(text: str) -> None:
        report(text if preset is None else f"{text} (preset {preset})")

    return find_samples(
        entries, domain_root(config, domain, f"data.{domain_name}.root"), key, masks, report_with_preset
    )


def data_root(config: Config) -> Path:
    """The folder that the data lists are relative to; builds the embedded data if it is asked for and not there yet."""
    embedded = config.data.embedded
    if config.data.root is not None:
        return under(Path(), config.data.root, "data.root")
    if embedded.name is None:
        return Path.cwd()
    folder = embedded_folder(embedded.folder)
    try:
        return build_digits(folder, embedded.seed, embedded.name)
    except OSError as error:
        raise InputError(f"data.embedded.folder is {folder}, where the data cannot be built ({error}).") from None


def is_there(config: Config) -> bool:
    """Whether `data_root` has nothing to build."""
    embedded = config.data.embedded
    if config.data.root is not None or embedded.name is None:
        return True
    return is_built(digits_folder(embedded_folder(embedded.folder), embedded.seed, embedded.name))


def embedded_folder(folder: str | None) -> Path:
    """Where embedded data are built: `folder`, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dann_experiments"
    return under(Path(), folder, "data.embedded.folder") if folder is not None else cache


def domain_root(config: Config, domain: DomainDataConfig, key: str) -> Path:
    """The folder that a domain's entries are relative to; `key` is the setting that names it."""
    return data_root(config) if domain.root is None else under(Path(), domain.root, key)


def reading_of(config: Config, name: str) -> Reading:
    """How the files of a set, or of a domain, are read."""
    domain_name = name.split("_")[0]
    domain = filled(getattr(config.data, domain_name))
    return Reading(
        None if domain.bands is None else tuple(domain.bands),
        (domain.scale[0], domain.scale[1]) if isinstance(domain.scale, list) else domain.scale,
        domain.nodata_values,
        domain.pixel_size,
        domain.file_pixel_size,
        domain.nodata_bands,
        settings=f"data.{domain_name}.",
    )


def labels_of(config: Config, name: str) -> LabelMap:
    """What the masks of a set, or of a domain, mean."""
    domain_name = name.split("_")[0]
    domain = filled(getattr(config.data, domain_name))
    return label_map(
        config.class_names, config.data.ignore_index, domain.value_map, domain.colors, domain.ignore_values,
        f"data.{domain_name}.",
    )  # fmt: skip
