"""Gives images of a training set the masks that weak labels list for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dann_experiments.data.samples import Sample, refuse


def with_masks_of(
    samples: Sequence[Sample],
    labelled: Sequence[Sample],
    key: str,
    of: str,
    report: Callable[[str], None] = refuse,
    others: Sequence[Sample] = (),
) -> list[Sample]:
    """Return `samples` in their order, each with the mask that `labelled` has for its image, or None.

    A mask is that of a whole image, so it belongs to every region of the image; if `labelled` names a region, it must be one of
    `samples`. `key`, `of`: the settings of `labelled` and `samples`, for messages. Calls `report` for an image that is not
    among `samples`, or only in other regions; not for one of `others`, which may have masks but get none here, as long as any
    of `samples` has one.
    """
    regions: dict[Path, list[Any]] = {}
    for sample in samples:
        regions.setdefault(sample.image.resolve(), []).append(sample.region)
    masks: dict[tuple[Path, Any], Sample] = {}
    elsewhere = {(sample.image.resolve(), region) for sample in others for region in (sample.region, None)}
    none_here = not any(sample.image.resolve() in regions for sample in labelled)
    for sample in labelled:
        image = sample.image.resolve()
        there, is_elsewhere = regions.get(image), (image, sample.region) in elsewhere
        if there is None:
            if none_here or not is_elsewhere:
                report(
                    f"{key}: image {sample.image} is not in {of}, whose images these masks belong to; add it there, or take it "
                    "out."
                )
        elif sample.region is None or sample.region in there:
            masks[image, sample.region] = sample
        elif not is_elsewhere:
            report(
                f"{key}: image {sample.image} has the region {list(sample.region)}, which {of} does not have; leave region out "
                f"here, as those of {of} count."
            )
    found = []
    for sample in samples:
        image = sample.image.resolve()
        own = masks.get((image, sample.region), masks.get((image, None)))
        parts = (None, None, None) if own is None else (own.mask, own.layer, own.area)
        found.append(dataclasses.replace(sample, mask=parts[0], layer=parts[1], area=parts[2]))
    return found
