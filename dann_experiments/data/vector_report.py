"""Counts polygons for `check-data`: per class, outside every image, mended, overlapping; and images without any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.presets import IGNORED
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.vector_files import FEATURES_AT_A_TIME, Polygons, is_vector, some
from dann_experiments.data.vector_masks import box_around, class_ids, contested, polygons_of, to_pixels
from dann_experiments.names import SetName

MOST_LINES = 5  # files with a line of their own; more are counted together


@dataclass
class _File:
    """What is known of the features of one label file, by id."""

    classes: dict[Any, str] = field(default_factory=dict)
    touched: set[Any] = field(default_factory=set)
    empty: dict[Any, None] = field(default_factory=dict)
    mended: dict[Any, None] = field(default_factory=dict)


def vector_report(sets: Mapping[SetName, SegmentationDataset]) -> tuple[list[str], list[str]]:
    """Return lines on the files of polygons of all sets together, and remarks on images and pixels; both may be empty.

    Images whose polygons cannot be used are left out.
    """
    files: dict[Any, _File] = {}
    remarks = []
    for name, dataset in sets.items():
        bare, overlaps = [], 0
        for number, sample in enumerate(dataset.samples):
            if sample.mask is None or not is_vector(sample.mask):
                continue
            header = dataset.headers[number]
            try:
                polygons, place = polygons_of(sample, dataset.labels, header)
                ids = class_ids(polygons, dataset.labels, sample)
            except InputError:  # reported with the image
                continue
            found = files.setdefault((str(sample.mask), sample.layer), _File())
            names = [_name_of(int(index), dataset) for index in ids]
            own = place is None  # the ids of annotations count per image
            keys = [(sample.image, one) if own else one for one in polygons.ids.tolist()]
            found.classes |= {key: names[value] for key, value in zip(keys, polygons.value_of.tolist(), strict=True)}
            found.empty |= dict.fromkeys(polygons.empty)
            found.mended |= dict.fromkeys(polygons.mended)
            left, top, right, bottom = sample.region or (0, 0, header.width, header.height)
            touching = {keys[one] for one in _touching(polygons, place, (top, left, bottom - top, right - left))}
            found.touched |= touching
            if not touching:
                bare.append(sample.image)
        for piece in dataset.pieces:
            sample = dataset.samples[piece.sample]
            if sample.mask is not None and is_vector(sample.mask):
                header = dataset.headers[piece.sample]
                overlap = contested(sample, dataset.labels, dataset.reading, header, piece.window)
                overlaps += int(overlap[piece.counted_rows :, piece.counted_columns :].sum())
        remarks += _remarks(name, bare, overlaps)
    return list(_lines(files)), [*remarks, *_unused(sets)]


def _unused(sets: Mapping[SetName, SegmentationDataset]) -> Iterator[str]:
    """Yield a remark for each domain whose settings for polygons have no effect, because all of its masks are images."""
    by_domain: dict[str, list[SegmentationDataset]] = {}
    for name, dataset in sets.items():
        by_domain.setdefault(name.one.key, []).append(dataset)
    for key, datasets in by_domain.items():
        rules = datasets[0].labels.vector
        masks = [sample.mask for dataset in datasets for sample in dataset.samples if sample.mask is not None]
        given = {
            "label_attribute": rules.attribute is not None,
            "label_map": rules.texts is not None,
            "label_background": rules.background is not None,
            "label_all_touched": rules.all_touched,
        }
        if masks and any(given.values()) and not any(map(is_vector, masks)):
            named = " and ".join(name for name, is_set in given.items() if is_set)
            has = "has" if sum(given.values()) == 1 else "have"
            yield f"{key}: {named} {has} no effect, because no mask is a file of polygons."


def _name_of(index: int, dataset: SegmentationDataset) -> str:
    return IGNORED if index == dataset.labels.ignore_index else dataset.labels.class_names[index]


def _touching(polygons: Polygons, place: Any, box: tuple[float, float, float, float]) -> set[int]:
    """Return the positions of the features that touch a box (top, left, height, width) of pixels."""
    import shapely

    top, left, height, width = box
    area = shapely.box(left, top, left + width, top + height)
    chosen = polygons.within(*box_around(box, place))
    found: set[int] = set()
    for start in range(0, len(chosen), FEATURES_AT_A_TIME):
        block = chosen[start : start + FEATURES_AT_A_TIME]
        shapes = to_pixels(shapely.from_wkb(polygons.wkb[block]), place)
        found |= set(polygons.feature[block][shapely.intersects(shapes, area)].tolist())
    return found


def _remarks(name: SetName, bare: Sequence[Path], overlaps: int) -> Iterator[str]:
    if bare:
        count = len(bare)
        yield (
            f"{name.key}: no polygon touches {count} image{'s' * (count > 1)}, the first of which is {bare[0]}; if there should "
            "be some, compare the places and the CRS of both files."
        )
    if overlaps:
        yield (
            f"{name.key}: {overlaps} pixels are in polygons of several classes; the later one in the file counts, as with "
            "gdal_rasterize. Sort the features if another one should."
        )


def _lines(files: Mapping[Any, _File]) -> Iterator[str]:
    if len(files) > MOST_LINES:
        first = next(iter(files))[0]
        yield _line(f"{len(files)} files of polygons, such as {first}", files.values())
        return
    for (path, layer), found in files.items():
        yield _line(path if layer is None else f"{path}, layer {layer}", [found])


def _line(what: str, files: Iterable[_File]) -> str:
    counts: Counter[str] = Counter()
    outside: list[Any] = []
    empty: list[Any] = []
    mended: list[Any] = []
    for found in files:
        counts.update(found.classes.values())
        empty += found.empty
        mended += found.mended
        outside += [_id(key) for key in found.classes if key not in found.touched and _id(key) not in found.empty]
    by_class = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    total = sum(counts.values())
    parts = [f"{what}: {total} feature{'s' * (total != 1)}" + f" ({by_class})" * bool(counts)]
    for ids, words in (
        (outside, "outside every image"),
        (empty, "without any area, not used"),
        (mended, "invalid, such as crossing itself, and mended"),
    ):
        if ids:
            parts.append(f"{len(ids)} {words} (ids {some(ids)})")
    return "; ".join(parts) + "."


def _id(key: Any) -> Any:
    return key[1] if isinstance(key, tuple) else key
