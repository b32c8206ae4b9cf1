"""Finds images and masks: CSV manifests and folder pairs in, checked lists of files out."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dann_experiments.config.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class Sample:
    """One image file and, where there is one, its mask."""

    image: Path
    mask: Path | None


def find_samples(entries: Sequence[str], root: Path, key: str, masks: str = "if present") -> list[Sample]:
    """All samples that `entries` name, in a fixed order.

    An entry is a CSV manifest (columns `image` and optionally `mask`, paths relative to the manifest) or a folder with
    `images/` and optionally `masks/` of equal stems; both relative to `root`. `masks`: "required", "if present" or "no"
    (masks are then not even looked for). `key` names the setting in errors. Raises InputError for what is missing.
    """
    samples: list[Sample] = []
    for entry in entries:
        path = Path(entry).expanduser()
        path = path if path.is_absolute() else root / path
        if path.is_dir():
            found = _from_folder(path, key, with_masks=masks != "no")
        elif path.is_file():
            found = _from_manifest(path, key, with_masks=masks != "no")
        else:
            raise InputError(f"{key} names {path}, which does not exist; give a CSV manifest or a folder with images/.")
        if not found:
            raise InputError(f"{key} names {path}, which holds no images.")
        samples += found
    for sample in samples:
        if not sample.image.is_file():
            raise InputError(f"{key}: image {sample.image} does not exist.")
        if sample.mask is not None and not sample.mask.is_file():
            raise InputError(f"{key}: mask {sample.mask} of image {sample.image} does not exist.")
        if sample.mask is None and masks == "required":
            raise InputError(f"{key}: image {sample.image} has no mask, but this set needs one for each image.")
    if any(sample.mask is None for sample in samples) and any(sample.mask is not None for sample in samples):
        without = next(sample.image for sample in samples if sample.mask is None)
        raise InputError(f"{key}: image {without} has no mask, but others of this set have; give all or none.")
    return samples


def content_digest(samples: Sequence[Sample]) -> str:
    """32 hex digits over the bytes of all files in order: equal data, wherever it stands, has equal digests."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        for path in (sample.image, sample.mask):
            if path is not None:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
            digest.update(b"|")
    return digest.hexdigest()


def _from_manifest(path: Path, key: str, with_masks: bool) -> list[Sample]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            if "image" not in header:
                raise InputError(f"{key}: manifest {path} has columns {header}; it needs one called image.")
            if with_masks and len(header) > 1 and "mask" not in header:
                raise InputError(
                    f"{key}: manifest {path} has columns {header}; the one with the masks must be called mask."
                )
            samples = []
            for row in reader:
                if not row["image"]:
                    raise InputError(f"{key}: manifest {path}, line {reader.line_num}: the image is empty.")
                mask = row.get("mask") if with_masks else None
                samples.append(Sample(_beside(path, row["image"]), _beside(path, mask) if mask else None))
            return samples
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{key}: manifest {path} cannot be read: {error}") from None


def _from_folder(path: Path, key: str, with_masks: bool) -> list[Sample]:
    images = _by_stem(path / "images", key)
    if not images or not with_masks or not (path / "masks").is_dir():
        return [Sample(image, None) for _, image in sorted(images.items())]
    masks = _by_stem(path / "masks", key)
    for stem in images:
        if stem not in masks:
            raise InputError(f"{key}: image {images[stem]} has no mask of the same stem in {path / 'masks'}.")
    for stem in masks:
        if stem not in images:
            raise InputError(f"{key}: mask {masks[stem]} has no image of the same stem in {path / 'images'}.")
    return [Sample(image, masks[stem]) for stem, image in sorted(images.items())]


def _by_stem(folder: Path, key: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{key}: folder {folder} does not exist; put the images into {folder}.")
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
            if file.stem in files:
                raise InputError(f"{key}: {files[file.stem]} and {file} have the same stem; keep one.")
            files[file.stem] = file
    return files


def _beside(manifest: Path, name: str) -> Path:
    path = Path(name.strip())
    return path if path.is_absolute() else manifest.parent / path
