"""Reads the headers of images and masks before training, and checks that they fit the settings and each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dann_experiments.config.errors import InputError
from dann_experiments.data.georeference import FARTHEST, Place, described, pixels_apart, place_of
from dann_experiments.data.labels import LabelMap
from dann_experiments.data.rasters import Header, header_from, many_files, open_raster, verified_header
from dann_experiments.data.reading import Reading, check_type, chosen_bands
from dann_experiments.data.remarks import AllRemarks, Problems, Remarks, image_remarks, mask_remarks
from dann_experiments.data.remembered import Facts, States, key_of_samples
from dann_experiments.data.samples import Sample
from dann_experiments.data.vector_files import is_vector
from dann_experiments.data.vector_masks import check_vectors


def checked_header(
    sample: Sample,
    reading: Reading,
    in_channels: int,
    labels: LabelMap | None = None,
    remarks: Remarks | None = None,
) -> Header:
    """Return the image's header; add anything unusual but allowed to `remarks`.

    Raises InputError for a file that is not an image, bands or a type that do not fit, or a mask of another size or place.
    """
    with open_raster(sample.image) as file:
        header = verified_header(file, sample.image)
        chosen_bands(sample.image, header, reading, in_channels)
        check_type(sample.image, header, reading)
        place = place_of(file)
        if remarks is not None:
            remarks.take(sample.image, image_remarks(file, sample.image, header, reading, in_channels))
    if sample.mask is None:
        return header
    check_vectors(sample, labels, header)
    if is_vector(sample.mask):
        return header
    with open_raster(sample.mask) as file:
        of_mask = verified_header(file, sample.mask)
        if (of_mask.height, of_mask.width) != (header.height, header.width):
            raise InputError(
                f"image {sample.image} is {header.height} x {header.width} pixels, its mask {sample.mask} "
                f"{of_mask.height} x {of_mask.width}; they must have the same size."
            )
        _check_same_place(sample, place, place_of(file))
        if remarks is not None and labels is not None:
            remarks.take(sample.mask, mask_remarks(file, of_mask, labels))
    return header


def read_headers(
    samples: Sequence[Sample],
    reading: Reading,
    in_channels: int,
    labels: LabelMap,
    problems: Problems,
    facts: Facts | None = None,
    states: States | None = None,
) -> tuple[list[Sample], list[Header]]:
    """Return the samples with valid headers, and those headers; add what is wrong with the others to `problems`.

    `facts`: knows the headers of files that have not changed since an earlier run; `states`: how they are now.
    """
    kept, headers = [], []
    equal: dict[Header, Header] = {}  # share one object between equal headers, as most are
    facts, states = facts or Facts(None), states or States()
    rules = {"reading": (reading, reading.settings), "bands": in_channels, "labels": labels}
    files = [states.of_samples([sample]) if facts.kept else None for sample in samples]
    keys = [
        None if own is None else key_of_samples("header", own, [sample], rules)
        for sample, own in zip(samples, files, strict=True)
    ]
    known = facts.get([key for key in keys if key is not None])
    with many_files():
        for sample, own, key in zip(samples, files, keys, strict=True):
            remarks = AllRemarks()
            if key in known:
                header, remarks.found = header_from(known[key]["header"]), known[key]["remarks"]
            else:
                try:
                    header = checked_header(sample, reading, in_channels, labels, remarks)
                except InputError as error:
                    problems.append(str(error))
                    problems.remarks.extend(remarks.found)
                    continue
                if key is not None and own is not None and states.certain(own):
                    facts.put(key, {"header": dataclasses.asdict(header), "remarks": remarks.found})
            problems.remarks.extend(remarks.found)
            kept.append(sample)
            headers.append(equal.setdefault(header, header))
    return kept, headers


def _check_same_place(sample: Sample, image: Place | None, mask: Place | None) -> None:
    """Raise InputError if both files are georeferenced but show different places."""
    if image is None or mask is None:
        return
    apart = pixels_apart(image, mask)
    if apart is not None and not apart <= FARTHEST:
        raise InputError(
            f"image {sample.image} and its mask {sample.mask} are in different places, {apart:.4g} pixels apart (image: "
            f"{described(image)}; mask: {described(mask)}); pair files of the same place, or correct the wrong georeference."
        )
