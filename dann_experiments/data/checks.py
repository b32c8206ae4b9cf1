"""Checks image sets before training: sizes, units, value ranges, classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.config.nearest import nearest
from dann_experiments.config.presets import IGNORED
from dann_experiments.data.dataset import MOST_PADDED, SegmentationDataset
from dann_experiments.data.samples import Sample
from dann_experiments.data.statistics import BandSums, range_remark
from dann_experiments.data.vector_files import is_vector
from dann_experiments.names import OneDomain, SetName

LOOKED_AT_FOR_RANGE = 16  # windows to check the range of values on


def range_of_some(dataset: SegmentationDataset, key: str) -> str | None:
    """Return a remark if a set's `scale` does not suit the values of a sample of its windows, else None.

    `key`: prefix of the domain's settings, such as data.source.
    """
    if dataset.reading.scale == "percentiles":
        return None
    sums = BandSums(dataset.in_channels)
    for index in np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT_FOR_RANGE).astype(int)):
        values, _, valid = dataset.read(int(index))
        sums.add(values, valid)
    return range_remark(sums.result(), dataset.reading.scale, dataset.headers, key)


def label_map_remarks(
    class_names: Sequence[str], mapped: Mapping[OneDomain, Sequence[str]], own_maps: Iterable[OneDomain]
) -> list[str]:
    """Return remarks on label maps that name classes the network does not have, or that lack some of its classes.

    `mapped`: class names in each domain's label map, if it has one. `own_maps`: domains whose map the user wrote; only these are
    checked for surplus classes, since a preset's map names all classes of its data set.
    """
    remarks = []
    for domain, names in mapped.items():
        lacking = [name for name in class_names if name not in names]
        more = [name for name in names if name not in class_names and name != IGNORED]
        if more and domain in own_maps:
            near = {name: nearest(name, lacking or class_names) for name in more}
            hint = "".join(
                f"; did you mean {found!r} by {name!r}?" for name, found in near.items() if found is not None
            )
            remarks.append(
                f"{domain.key}: its label map names {more}, which are not among the network's classes {list(class_names)} and "
                f"are ignored (write {IGNORED} if that is intended){hint}"
            )
        if lacking:
            remarks.append(f"{domain.key}: its label map has no class {lacking}.")
    return remarks


def absent_classes(
    class_pixels: np.ndarray,
    class_names: Sequence[str],
    ignore_index: int,
    map_remarks: Sequence[str],
    samples: Iterable[Sample],
) -> str | None:
    """Return a remark on classes that no mask of data.source.train contains, else None.

    `class_pixels`: (256,) number of pixels per id; `samples`: those of the set. Raises InputError, with the remarks on label
    maps, if fewer than two classes are present; masks of 0 and 255, for example, leave one class, as 255 is ignored by default.
    """
    found = np.flatnonzero(class_pixels).tolist()
    classes = [value for value in found if value != ignore_index]
    if len(classes) < 2:
        ignored = f", of which {ignore_index} is ignored (data.ignore_index)" if len(classes) < len(found) else ""
        fits = len(found) == len(class_names) > 1
        polygons = any(sample.mask is not None and is_vector(sample.mask) for sample in samples)
        outside = " (of polygons: what is outside them in data.source.label_background)" * polygons
        example = ", ".join(f"{value}: {name}" for value, name in zip(found, class_names, strict=True)) if fits else ""
        raise InputError(
            f"data.source.train: the masks hold the ids {found}{ignored}; that leaves {len(classes)} "
            f"class{'es' * (not classes)} to learn. Write the classes as 0 to {len(class_names) - 1}, or name the masks' values "
            f"in data.source.value_map{f' ({{{example}}})' * fits}{outside}."
            + "".join(f" {text}" for text in map_remarks)
        )
    absent = [name for index, name in enumerate(class_names) if index not in classes]
    return f"data.source.train: no mask holds the classes {absent}." if absent else None


def labelled_pixels(class_pixels: np.ndarray, classes: int, ignore_index: int) -> np.ndarray:
    """Return the number of labeled pixels per class (K,) from that per mask value (256,)."""
    pixels = class_pixels.copy()
    pixels[ignore_index] = 0
    return pixels[:classes]


def check_sizes(dataset: SegmentationDataset, name: str, stride: int = 1) -> None:
    """Raise InputError if training items cannot be batched for a network of this stride.

    Items must be at least as large as the crop (or be padded to it) or, without crops, all of one size. The sides of the crop or
    the items must be divisible by `stride`. `name`: the set's name in messages.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for piece in dataset.pieces:
        sizes.setdefault((piece.window.height, piece.window.width), dataset.samples[piece.sample].image)
    if dataset.crop_size is not None:
        for size, path in sizes.items():
            if min(size) < dataset.crop_size and not dataset.pads(*size):
                or_else = f" ({MOST_PADDED} times its side at most)" if dataset.pad_to_crop else ""
                raise InputError(
                    f"{name}: image {path} is {size[0]} x {size[1]} pixels, smaller than data.crop_size "
                    f"{dataset.crop_size}; give a smaller one{or_else or ', or set data.pad_to_crop to true'}."
                )
        if dataset.crop_size % stride:
            raise InputError(f"data.crop_size is {dataset.crop_size}; this network needs a multiple of {stride}.")
        return
    if len(sizes) > 1:
        (one, first), (two, second) = list(sizes.items())[:2]
        raise InputError(
            f"{name}: images differ in size ({first}: {one[0]} x {one[1]}, {second}: {two[0]} x {two[1]}); "
            "set data.crop_size to train on crops."
        )
    for (height, width), path in sizes.items():
        if height % stride or width % stride:
            raise InputError(
                f"{name}: image {path} is {height} x {width} pixels; this network needs sides divisible by {stride}: "
                "set data.crop_size to a multiple of it."
            )


def unit_problems(sets: Mapping[SetName, SegmentationDataset]) -> list[str]:
    """Return a message per set whose `pixel_size` is used with two different units."""
    first: dict[tuple[OneDomain, float], tuple[SetName, str, Path]] = {}
    problems = []
    for name, dataset in sets.items():
        size, unit = dataset.reading.pixel_size, dataset.reading.unit
        if size is None or unit is None:
            continue
        path = next(s.image for s, h in zip(dataset.samples, dataset.headers, strict=True) if h.unit == unit)
        domains = dict.fromkeys([name.one, *(other.one for other in sets)])  # its own domain first
        for other in domains:
            known, its_unit, its_path = first.get((other, size), (name, unit, path))
            if its_unit != unit:
                problems.append(
                    f"{name.key}: pixel_size {size:g} means {unit} for image {path}, but {its_unit} for image {its_path} of "
                    f"{known.key}; reproject the files to one CRS, or give each domain's pixel_size in the unit of its files."
                )
                break
        first.setdefault((name.one, size), (name, unit, path))
    return problems
