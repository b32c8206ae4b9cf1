"""Finds images that two sets share, which must not: scores on training images say little."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dann_experiments.data.samples import Sample


def shared_images(
    sets: Mapping[str, Sequence[Sample]], digest_of: Callable[[Path], bytes]
) -> list[tuple[str, Path, str, Path]]:
    """Return (set, image, other set, its image) for each image with equal bytes in two of `sets`, which must not share images.

    Regions of one image that do not overlap may be in different sets.
    """
    found: list[tuple[str, Path, str, Path]] = []
    seen: dict[bytes, list[tuple[str, Sample]]] = {}
    for name, samples in sets.items():
        for sample in samples:
            same = seen.setdefault(digest_of(sample.image), [])
            other = next(((its, one) for its, one in same if its != name and _overlap(one, sample)), None)
            if other is not None:
                found.append((name, sample.image, other[0], other[1].image))
            same.append((name, sample))
    return found


def _overlap(one: Sample, other: Sample) -> bool:
    if one.region is None or other.region is None:
        return True
    a, b = one.region, other.region
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
