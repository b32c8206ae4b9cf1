"""Finds images and masks by manifests, folders, patterns and lists, and checks that the files exist."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import is_remote, local_text, near_name, remote_address
from dann_experiments.data import remote
from dann_experiments.data.annotations import side_files
from dann_experiments.data.lists import beside, is_file, lines_of, manifest_pairs, pairs_of, under
from dann_experiments.data.patterns import IMAGE_SUFFIXES, expression_of
from dann_experiments.data.stac_items import SUFFIXES as ITEM_SUFFIXES
from dann_experiments.data.stac_items import item_pairs
from dann_experiments.data.stacked_entries import is_stacked, stacked
from dann_experiments.data.vector_files import GEO_SUFFIXES, LABEL_SUFFIXES, is_vector
from dann_experiments.data.virtual import digest_with_sources, is_virtual

log = logging.getLogger(__name__)
Key = tuple[str, ...]  # pairs an image with its mask


@dataclass(frozen=True)
class Sample:
    """An image file and its mask, if any."""

    image: Path
    mask: Path | None
    region: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) in file pixels: the part of the image that belongs to the set; None = all."""
    layer: str | None = None
    """Layer of `mask`, a file of polygons; None = its only one."""
    area: Path | None = None
    """File of polygons outside of which nothing is labeled; None = no limit."""

    @property
    def label_files(self) -> list[Path]:
        """The mask with its side files, and the area with its own; none without a mask."""
        found = [path for path in (self.mask, self.area) if path is not None and self.mask is not None]
        return [one for path in found for one in (path, *(side_files(path) if is_vector(path) else ()))]


def refuse(message: str) -> None:
    """Raise InputError. This is the default `report`; `check-data` collects the messages instead."""
    raise InputError(message)


def find_samples(
    entries: Sequence[Any], root: Path, key: str, masks: str = "if present", report: Callable[[str], None] = refuse
) -> list[Sample]:
    """Return all samples that `entries` name, in a fixed order.

    Entries take the forms of `data.source.train` (see its help), relative to `root`. From a manifest with a column `split`, take
    the rows whose split is the last part of `key`, the name of the setting, which also appears in messages. `masks`: "required",
    "if present" or "no" (do not look for masks). For each missing file, call `report` with a message (by default, it raises
    InputError) and leave out the sample.
    """
    samples: list[Sample] = []
    for entry in entries:
        try:
            entry = _on_disk(entry, key)
            if isinstance(entry, Mapping):
                found = _from_mapping(entry, root, key, masks, report)
            else:
                found = _from_text(str(entry), root, key, masks, report)
        except InputError as error:
            report(str(error))
            continue
        if not found:
            report(f"{key} names {_shown(entry, root)}, which holds no images{_kinds_there(entry, root)}.")
        samples += found
    good: list[Sample] = []
    first: dict[tuple[Path, Any], Sample] = {}
    for sample in samples:
        other = first.setdefault((sample.image, sample.region), sample)
        if (other.mask, other.layer, other.area) != (sample.mask, sample.layer, sample.area):
            report(f"{key}: image {sample.image} has two masks, {_labels(other)} and {_labels(sample)}; keep one.")
            continue
        if not is_file(sample.image):
            report(f"{key}: image {sample.image} {_lacking(sample.image)}.")
        elif sample.mask is not None and not is_file(sample.mask):
            report(f"{key}: mask {sample.mask} of image {sample.image} {_lacking(sample.mask)}.")
        elif sample.area is not None and not is_file(sample.area):
            report(f"{key}: area {sample.area} of image {sample.image} {_lacking(sample.area)}.")
        elif sample.mask is None and masks == "required":
            report(f"{key}: image {sample.image} has no mask, but this set needs one per image.")
        else:
            good.append(sample)
    labelled = [sample for sample in good if sample.mask is not None]
    if not labelled or len(labelled) == len(good):
        return good
    for sample in good:
        if sample.mask is None:
            report(
                f"{key}: image {sample.image} has no mask, but others of this set have one; give masks for all or none."
            )
    return labelled


def _labels(sample: Sample) -> str:
    return f"{sample.mask}" + "".join(f" ({part})" for part in (sample.layer, sample.area) if part is not None)


def _on_disk(entry: Any, key: str, images: bool = True) -> Any:
    """Return an entry without `file://`. Raises InputError if anything but images is at a remote address."""
    if isinstance(entry, Mapping):
        return {name: _on_disk(value, key, images and name in ("images", "quality")) for name, value in entry.items()}
    if isinstance(entry, list):
        return [_on_disk(value, key, images) for value in entry]
    if not isinstance(entry, str):
        return entry
    return (remote_address(entry, key) if images else None) or local_text(entry, key)


def files_of(samples: Sequence[Sample]) -> list[Path]:
    """Return the paths of images and label files, in order."""
    return [path for sample in samples for path in (sample.image, *sample.label_files)]


def content_digest(samples: Sequence[Sample], digest_of: Callable[[Path], bytes] | None = None) -> str:
    """Return 32 hex digits over the bytes of all files in order, so that equal data in other folders has the same digest."""
    digest_of = digest_of or file_digest
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(digest_of(sample.image) + b"|")
        for path in sample.label_files:
            digest.update(digest_of(path))
        digest.update(b"|")
        if sample.layer is not None:
            digest.update(sample.layer.encode())
        if sample.region is not None:
            digest.update(repr(sample.region).encode())
    return digest.hexdigest()


def file_digest(path: Path, digest_of: Callable[[Path], bytes] | None = None) -> bytes:
    """Return the BLAKE2b digest of a file's bytes; of a virtual raster, also of the files that it shows."""
    if is_virtual(path):
        return digest_with_sources(path, digest_of or file_digest)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _from_text(entry: str, root: Path, key: str, masks: str, report: Callable[[str], None]) -> list[Sample]:
    if is_remote(entry):
        return [Sample(image, None) for image in remote.images(entry, key).values()]
    path = under(root, entry)
    if os.path.isdir(path):
        return _from_folder(path, key, masks != "no", report)
    if is_file(path):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return [Sample(path, None)]
        if path.suffix.lower() == ".txt":
            pairs = pairs_of(path, root, key)
            return [Sample(image, mask if masks != "no" else None) for image, mask in pairs]
        if path.suffix.lower() in ITEM_SUFFIXES:
            return [Sample(*pair) for pair in item_pairs(path, None, None, key, report)]
        return [Sample(*pair) for pair in manifest_pairs(path, root, key, masks != "no", report)]
    if glob.has_magic(entry):
        return [Sample(image, None) for image in _globbed(entry, root, key)]
    raise InputError(
        f"{key} names {path}, which does not exist{near_name(path)}; give a CSV manifest, a folder with images/, a pattern, a "
        "list (.txt) or a mapping of images and masks."
    )


def _from_mapping(
    entry: Mapping[str, Any], root: Path, key: str, masks: str, report: Callable[[str], None]
) -> list[Sample]:
    if "items" in entry:
        path, mask = under(root, str(entry["items"])), entry.get("mask") if masks != "no" else None
        return [Sample(*pair) for pair in item_pairs(path, entry.get("assets"), mask, key, report)]
    named = entry.get("names") is not None

    def locate(part: Any) -> dict[Key, Path]:
        return _located(part, root, key, report)

    def kept(images: dict[Key, Path]) -> dict[Key, Path]:
        return _named(images, entry["names"], root, key) if named else images

    several = is_stacked(entry, root)
    images = stacked(entry, root, key, report, locate, kept) if several else kept(locate(entry["images"]))
    where = entry.get("masks") if masks != "no" else None
    region = None if entry.get("region") is None else tuple(entry["region"])
    pairs: Iterable[tuple[Path, Path | None]] = [(image, None) for image in images.values()]
    if where is not None:
        of_all = _file_of_polygons(where, root)
        if of_all is not None:
            pairs = [(image, of_all) for image in images.values()]
        else:
            located = _located(where, root, key, report, LABEL_SUFFIXES)
            pairs = _paired(images, located, entry, key, report, all_masks=not named)
    layer, area = (entry.get(part) if where is not None else None for part in ("layer", "area"))
    area = None if area is None else under(root, str(area))
    return [Sample(image, mask, region, layer, area) for image, mask in pairs]  # pyright: ignore[reportArgumentType]


def _file_of_polygons(where: Any, root: Path) -> Path | None:
    """Return the one file of polygons that an entry names for all of its images; None if it names something else."""
    path = None if isinstance(where, list) else under(root, str(where))
    return path if path is not None and path.suffix.lower() in GEO_SUFFIXES and is_file(path) else None


def _located(
    where: Any, root: Path, key: str, report: Callable[[str], None], also: Sequence[str] = ()
) -> dict[Key, Path]:
    """Return the files that `where` (a folder, a pattern, a list file, a file, or a list of files) names, by pairing key.

    `also`: suffixes of files in a folder or of a pattern, besides those of images. The key is the text matched by a pattern's
    wildcards, the position in a list, or the stem.
    Lines of a list of images may be remote addresses.
    """
    if isinstance(where, list):
        return {
            ("#", str(number)): remote.view(str(name), key) if is_remote(str(name)) else under(root, str(name))
            for number, name in enumerate(where)
        }
    text = str(where)
    if is_remote(text):
        return remote.images(text, key)
    path = under(root, text)
    if os.path.isdir(path):
        return {(stem,): file for stem, file in _by_stem(path, key, report, also).items()}
    if is_file(path):
        if path.suffix.lower() == ".txt":
            return {
                ("#", str(number)): beside(path.parent, line, root, f"{key}: a line of {path}", image=not also)
                for number, line in enumerate(lines_of(path, key))
            }
        return {("#", "0"): path}
    if glob.has_magic(text):
        return {wildcards: file for file, wildcards in _globbed(text, root, key, also).items()}
    raise InputError(
        f"{key} names {path}, which does not exist{near_name(path)}; give a folder, a pattern, a list (.txt) or a file."
    )


def _paired(
    images: Mapping[Key, Path],
    masks: Mapping[Key, Path],
    entry: Mapping[str, Any],
    key: str,
    report: Callable[[str], None],
    all_masks: bool,
) -> list[tuple[Path, Path | None]]:
    """Return each image with its mask; report images without a mask and, with `all_masks`, masks without an image."""
    if images and masks and len(next(iter(images))) != len(next(iter(masks))):
        raise InputError(
            f"{key}: images {entry['images']} and masks {entry['masks']} cannot be paired; give both as folders of equal "
            "stems, as patterns with as many wildcards, or as lists of equal length."
        )
    for one, other, kind in ((images, masks, "image"), (masks if all_masks else {}, images, "mask")):
        partner = "mask" if kind == "image" else "image"
        for lonely in (name for name in one if name not in other):
            report(
                f"{key}: {kind} {one[lonely]} has no {partner} ({partner}s: {entry[f'{partner}s']}; they are paired by "
                "stem, by the text that wildcards match, or by position in a list). To use only some of the images, list them in "
                "names."
            )
    return [(image, masks[name]) for name, image in images.items() if name in masks]


def _named(images: Mapping[Key, Path], names: Any, root: Path, key: str) -> dict[Key, Path]:
    """Return the images whose file name, stem or wildcard text equals one of `names` or matches it as a shell pattern."""
    if not isinstance(names, list):  # YAML reads a text of digits as a number
        path = under(root, str(names))
        if not is_file(path):
            raise InputError(
                f"{key}: the file of names {path} does not exist; for a single name give a list, [{names}]."
            )
        names = lines_of(path, key)
    wanted = [str(name).replace("\\", "/").rpartition("/")[2] for name in names]
    there = {text for key_, image in images.items() for text in (image.name, image.stem, *key_)}
    plain = set(wanted)  # a name that exists is not a pattern, even with wildcard characters
    patterns = [name for name in wanted if glob.has_magic(name) and name not in there]
    kept: dict[Key, Path] = {}
    matched: set[str] = set()
    for wildcards, image in images.items():
        texts = {image.name, image.stem, *wildcards}
        found = plain & texts
        found |= {name for name in patterns if any(fnmatch.fnmatchcase(text, name) for text in texts)}
        if found:
            kept[wildcards] = image
            matched |= found
    lonely = [name for name in dict.fromkeys(wanted) if name not in matched]
    if images and not kept:
        example = next(iter(images.values())).name
        raise InputError(
            f"{key}: no file matches names {_some(lonely)}; names are file names (such as {example}), stems, the texts that "
            "wildcards match, or shell patterns for these."
        )
    if lonely:
        log.warning("%s: no file matches %d of the names: %s.", key, len(lonely), _some(lonely))
    return kept


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _globbed(pattern: str, root: Path, key: str, also: Sequence[str] = ()) -> dict[Path, Key]:
    """Return the image files (or those with a suffix in `also`) that match, each with the texts its wildcards matched."""
    try:
        expression = re.compile(expression_of(pattern))
        found = sorted(glob.glob(pattern, root_dir=root, recursive=True))
    except (OSError, ValueError, re.error) as error:
        raise InputError(f"{key} names the pattern {pattern}, which cannot be searched for: {error}") from None
    files: dict[Path, Key] = {}
    for name in found:
        path = under(root, name)
        match = expression.fullmatch(name.replace("\\", "/"))
        if is_file(path) and path.suffix.lower() in (*IMAGE_SUFFIXES, *also) and match:
            files[path] = tuple(text or "" for text in match.groups())
    if not files:
        raise InputError(f"{key} names the pattern {root / pattern}, which matches no image.")
    return files


def _from_folder(path: Path, key: str, with_masks: bool, report: Callable[[str], None]) -> list[Sample]:
    if not (path / "images").is_dir():
        alone = _by_stem(path, key, report)
        if alone:  # a folder that holds only images
            return [Sample(image, None) for _, image in sorted(alone.items())]
    images = _by_stem(path / "images", key, report)
    if not images or not with_masks or not (path / "masks").is_dir():
        return [Sample(image, None) for _, image in sorted(images.items())]
    masks = _by_stem(path / "masks", key, report, LABEL_SUFFIXES)
    others = {file.stem: file for file in sorted((path / "masks").iterdir()) if file.stem not in masks}
    for stem in images:
        if stem not in masks:
            hint = f"; {others[stem].name} is not an image ({_READ})" if stem in others else ""
            report(
                f"{key}: image {images[stem]} has no mask of the same stem in {path / 'masks'}{hint}. Masks of other names are "
                'paired by patterns: {images: "images/*.png", masks: "masks/*_mask.png"}.'
            )
    for stem in masks:
        if stem not in images:
            report(f"{key}: mask {masks[stem]} has no image of the same stem in {path / 'images'}.")
    return [Sample(image, masks[stem]) for stem, image in sorted(images.items()) if stem in masks]


def _by_stem(folder: Path, key: str, report: Callable[[str], None], also: Sequence[str] = ()) -> dict[str, Path]:
    """Return the images of a folder by stem or, if it holds none, its files with a suffix in `also`."""
    if not os.path.isdir(folder):
        raise InputError(f"{key}: folder {folder} does not exist{near_name(folder)}; put the images into {folder}.")
    files: dict[str, Path] = {}
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{key}: folder {folder} cannot be read: {error}") from None
    images = any(file.suffix.lower() in IMAGE_SUFFIXES for file in found)
    for file in found:
        if file.suffix.lower() in (IMAGE_SUFFIXES if images else also) and not file.name.startswith("."):
            if file.stem in files:
                report(f"{key}: {files[file.stem]} and {file} have the same stem; keep one.")
            files.setdefault(file.stem, file)
    return files


_READ = f"{', '.join(IMAGE_SUFFIXES)} are read"


def _kinds_there(entry: Any, root: Path) -> str:
    """Describe, for a message, the file suffixes in a folder without images, and the suffixes that are read."""
    if isinstance(entry, Mapping) or is_remote(str(entry)):
        return ""
    folder = under(root, str(entry))
    folder = folder / "images" if os.path.isdir(folder / "images") else folder
    with contextlib.suppress(OSError):
        suffixes = {file.suffix.lower() for file in folder.iterdir() if file.is_file() and file.suffix}
        if suffixes and not suffixes & set(IMAGE_SUFFIXES):
            return f" but {', '.join(sorted(suffixes)[:5])} files ({_READ})"
    return ""


def _lacking(path: Path) -> str:
    return "is not a file" if os.path.exists(path) else "does not exist"


def _shown(entry: Any, root: Path) -> str:
    if isinstance(entry, Mapping):
        return str(dict(entry))
    return str(entry) if is_remote(str(entry)) else str(under(root, str(entry)))
