"""Finds the images to map, from files, folders and patterns, and the output path of each map."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dann_experiments.config import InputError
from dann_experiments.config.paths import is_remote, local_path, local_text, remote_address, user_path
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.data import remote
from dann_experiments.data.rasters import many_files
from dann_experiments.data.samples import IMAGE_SUFFIXES
from dann_experiments.data.virtual import files_behind, place_of_origin
from dann_experiments.names import VECTOR_SUFFIXES
from dann_experiments.prediction.inputs import Input, as_mapping, stacked_inputs
from dann_experiments.prediction.partial_map import PARTIAL_SUFFIX
from dann_experiments.prediction.rasters import MAP_SUFFIXES, SIGNATURE_TAG, TIFF_SUFFIXES, read_tags

PROBABILITIES, CONFIDENCE, STAC = "probabilities", "confidence", "stac"


class _Found(NamedTuple):
    """The images of one input."""

    images: list[Path]
    root: Path
    """The folder whose structure the maps repeat: the input folder, or the folder at the start of a pattern."""
    is_folder: bool = False


def find_work(
    inputs: Sequence[Input], output: str, beside: Sequence[str], overwrite: bool, vector: str | None = None
) -> list[tuple[Path, Path]]:
    """Return pairs of image and map.

    `inputs`: files, folders, patterns, and mappings whose files are stacked (`stacked_inputs`); `output`: a file, or a folder for
    several images; `beside`: what is written next to each map, PROBABILITIES, CONFIDENCE or STAC; `overwrite`: True if existing
    maps may be replaced; `vector`: the setting. The only image may have a map whose polygons are missing. Raises InputError for
    inputs that are missing and outputs that exist or cannot be written.
    """
    target = local_path(output, "output")
    found = _find(inputs, target)
    images = _each_once(image for one in found for image in one.images)
    if len(images) == 1 and not any(one.is_folder for one in found) and not _is_folder(output):
        return [_one(images[0], target, beside, overwrite, vector)]
    if target.is_file() or target.suffix.lower() in MAP_SUFFIXES:
        what = (
            f"input {found[0].root} is a folder"
            if len(found) == 1 and found[0].is_folder
            else f"input names {len(images)} images"
        )
        raise InputError(f"{what}, but output is {target}; name a folder, for a map of each image.")
    if vector is not None and not _is_format(vector):
        raise InputError(
            f"vector is {vector}, but there may be several images; give {user_path(vector).suffix[1:].lower()} alone, for a file "
            "beside each map."
        )
    pairs = _mirrored(images, _common_root(found), target)
    _check_apart(pairs, output, beside)
    for folder in sorted({path.parent for _, path in pairs}):
        _check_writable(folder)
    return pairs


def find_partners(images: Sequence[Path], others: Sequence[Input], output: str, key: str) -> dict[Path, Path]:
    """Return image -> its partner among the images that `others` name: the one of equal stem; one image and one partner are a
    pair in any case.

    `output`: as in `find_work`; `key`: setting of `others`, for messages. Raises InputError for partners that are missing or not
    unique.
    """
    found = _find(others, local_path(output, "output"), key)
    partners = _each_once(image for one in found for image in one.images)
    if len(images) == len(partners) == 1:
        return {images[0]: partners[0]}
    known = _by_stem(partners, key, key)
    _by_stem(images, "input", key)
    lacking = [path for path in images if path.stem not in known]
    if lacking:
        more = f" The same holds for {len(lacking) - 1} more." if len(lacking) > 1 else ""
        raise InputError(f"{key} has no image with the stem {lacking[0].stem!r}, the partner of {lacking[0]}.{more}")
    return {path: known[path.stem] for path in images}


def _by_stem(paths: Sequence[Path], what: str, key: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise InputError(
                f"{what}: {found[path.stem]} and {path} have the same stem, by which {key} and input are paired; keep one."
            )
        found[path.stem] = path
    return found


def path_beside(output: Path, what: str) -> Path:
    """Return the file next to a map for its probabilities, confidence or STAC item (`what`)."""
    if what == STAC:
        return output.with_name(f"{output.stem}.stac.json")
    return output.with_name(f"{output.stem}_{what}.tif")


def vector_path(output: Path, vector: str) -> Path:
    """Return the file for the polygons of a map; `vector`: the setting, gpkg, geojson or a path."""
    return output.with_suffix(f".{vector.lower()}") if _is_format(vector) else local_path(vector, "vector")


def asked_beside(settings: PredictConfig) -> list[str]:
    """Return what the settings write next to each map: PROBABILITIES, CONFIDENCE, STAC."""
    asked = {
        PROBABILITIES: settings.probabilities,
        CONFIDENCE: settings.confidence is not None,
        STAC: settings.stac,
    }
    return [what for what, wanted in asked.items() if wanted]


def files_of_map(output: Path, settings: PredictConfig) -> list[Path]:
    """Return a map and the files that the settings write beside it: `asked_beside`, polygons, and the style that QGIS reads, of
    those that exist."""
    beside = [path_beside(output, what) for what in asked_beside(settings)]
    beside += [] if settings.vector is None else [vector_path(output, settings.vector)]
    return [output, *(path for path in (*beside, output.with_suffix(".qml")) if path.exists())]


def _is_format(vector: str) -> bool:
    return f".{vector.lower()}" in VECTOR_SUFFIXES


def _is_folder(text: str) -> bool:
    """Return whether an output means a folder: it exists as one, ends with a slash, or has no suffix."""
    path = user_path(text)
    return path.is_dir() or text.endswith(("/", os.sep)) or not path.suffix


def _one(source: Path, target: Path, beside: Sequence[str], overwrite: bool, vector: str | None) -> tuple[Path, Path]:
    if target.suffix.lower() not in MAP_SUFFIXES:
        raise InputError(
            f"output is {target}; a class map is written as {', '.join(MAP_SUFFIXES)} (JPEG would change the classes)."
        )
    if target.exists() and any(file.samefile(target) for file in files_behind(source)):
        raise InputError(f"output is {target}, which is the input; name another file.")
    maps = (target, *(path_beside(target, what) for what in beside))
    polygons = None if vector is None else vector_path(target, vector)
    lacks_polygons = target.exists() and polygons is not None and not polygons.exists()  # made of the existing map
    for path in () if lacks_polygons else (*maps, *([polygons] if polygons else [])):
        if path.exists() and not overwrite:
            raise InputError(f"output {path} exists; name another, or set overwrite to true.")
    for folder in {target.parent} | ({polygons.parent} if polygons else set()):
        _check_writable(folder)
    return source, target


def _find(inputs: Sequence[Input], target: Path, key: str = "input") -> list[_Found]:
    """Return the images of each input, in order. Raises one InputError for all inputs without images; `key`: their setting."""
    texts: list[Input] = [
        (remote_address(text, key) or local_text(text, key)) if isinstance(text, str) else text
        for text in map(as_mapping, inputs)
    ]
    if len(texts) == 1 and isinstance(texts[0], str) and not (is_remote(texts[0]) or _names_something(texts[0])):
        texts = list(_listed(texts[0], key))
    found, problems = [], []
    with many_files():
        for text in texts:
            try:
                found.append(_named(text, target, key))
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return found


def _named(text: Input, target: Path, key: str) -> _Found:
    if not isinstance(text, str) or is_remote(text):
        images = list(remote.images(text, key).values()) if isinstance(text, str) else stacked_inputs(text, key)
        return _Found(images, Path(os.path.commonpath([place_of_origin(image).parent.absolute() for image in images])))
    path = user_path(text)
    if os.path.isdir(path):  # these never raise, for any name
        if target.exists() and path.samefile(target):
            raise InputError(f"output is {target}, the folder of the images; name another.")
        images = _unmade(_walk(path, target))
        if not images:
            raise InputError(
                f"{key} folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}), its subfolders included; maps "
                "and masks that this program wrote do not count."
            )
        return _Found(images, path, is_folder=True)
    if os.path.exists(path):
        return _Found([path], path.parent)
    if glob.has_magic(text):
        images, root = _matching(str(path), target)
        if not images:
            raise InputError(f"{key} is the pattern {text}, which matches no image ({', '.join(IMAGE_SUFFIXES)}).")
        return _Found(images, root)
    raise InputError(f"{key} is {text}, which does not exist; give an image file, a folder of images or a pattern.")


def _names_something(text: str) -> bool:
    path = user_path(text)
    return os.path.exists(path) or (glob.has_magic(text) and next(_glob(str(path)), None) is not None)


def _listed(text: str, key: str) -> list[str]:
    """Split a text that names no file into a list if there is exactly one way; otherwise return it as the only item.

    `mlflow run -P input=...` passes several images as one text. Raises InputError if there are several ways.
    """
    inner = re.sub(r"^\[(.*)\]$", r"\1", text.strip(), flags=re.DOTALL)
    ways = {tuple(part.strip() for part in re.split(by, inner) if part.strip()) for by in (",", r"\s+", r"[,\s]+")}
    ways |= {tuple(part.strip("'\"") for part in way) for way in ways}
    whole = {way for way in ways if way and all(_names_something(local_text(part, key)) for part in way)}
    if len(whole) > 1:
        shown = " or ".join(str(list(way)) for way in sorted(whole))
        raise InputError(f"{key} is {text!r}, which can be read in two ways, {shown}; give the images one by one.")
    return [local_text(part, key) for part in whole.pop()] if whole else [text]


def _walk(folder: Path, target: Path) -> Iterator[Path]:
    """Yield the image files of a folder and its subfolders in a fixed order; links are followed."""
    own, seen = os.path.realpath(target), set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not _is_ours(name) and os.path.realpath(Path(place, name)) != own
        )
        if os.path.realpath(place) in seen:  # a link to a folder that was visited
            folders[:] = []
            continue
        seen.add(os.path.realpath(place))
        yield from (Path(place, name) for name in sorted(files) if _is_image_name(name))


def _matching(pattern: str, target: Path) -> tuple[list[Path], Path]:
    """Return the images that match, and the folder at the start of the pattern."""
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    own = Path(os.path.realpath(target))
    is_below = own != Path(os.path.realpath(root)) and own.is_relative_to(os.path.realpath(root))
    images = [
        path
        for path in _glob(pattern)
        if not any(map(_is_ours, path.parts[fixed:-1]))
        and not (is_below and Path(os.path.realpath(path)).is_relative_to(own))
    ]
    return _unmade(images), root


def _glob(pattern: str) -> Iterator[Path]:
    """Yield image files; hidden ones only if the pattern names them, as in a shell."""
    with contextlib.suppress(OSError, ValueError, re.error):  # a pattern that cannot be searched for matches nothing
        for name in sorted(glob.glob(pattern, recursive=True)):
            if _is_image_name(os.path.basename(name)) and os.path.isfile(name):
                yield Path(name)


def _is_ours(folder: str) -> bool:
    """Return whether a folder of that name holds an unfinished map or MLflow's files, whose previews must not be mapped."""
    return folder.endswith(PARTIAL_SUFFIX) or folder in ("mlruns", "mlartifacts")


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _unmade(images: Iterator[Path] | Sequence[Path]) -> list[Path]:
    """Leave out maps that `predict` wrote, by their metadata."""
    return [path for path in images if path.suffix.lower() not in MAP_SUFFIXES or not _is_map(path)]


def _is_map(path: Path) -> bool:
    try:
        return SIGNATURE_TAG in read_tags(path)
    except InputError:  # reported when this image is read
        return False


def _each_once(images: Iterator[Path]) -> list[Path]:
    return list({os.path.normpath(os.path.abspath(path)): path for path in images}.values())


def _common_root(found: Sequence[_Found]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(one.root) for one in found]))


def _mirrored(images: Sequence[Path], root: Path, target: Path) -> list[tuple[Path, Path]]:
    pairs: dict[Path, tuple[Path, Path]] = {}
    for path in images:
        shown = place_of_origin(path)
        suffix = shown.suffix if shown.suffix.lower() in TIFF_SUFFIXES else ".png"
        output = (target / os.path.relpath(os.path.abspath(shown), root)).with_suffix(suffix)
        name = output.with_suffix("")
        if name in pairs:
            raise InputError(
                f"input: {pairs[name][0]} and {path} have the same stem, so they would have the same map; keep one."
            )
        pairs[name] = (path, output)
    return list(pairs.values())


def _check_apart(pairs: Sequence[tuple[Path, Path]], output: str, beside: Sequence[str]) -> None:
    """Raise InputError if a map would replace an image, or the probabilities or confidence of another map."""
    outputs = {os.path.realpath(path): path for _, path in pairs}
    for source, _ in pairs:
        if any(os.path.realpath(file) in outputs for file in files_behind(source)):
            raise InputError(f"output is {output}, where the map of {source} would be the image itself; name another.")
    for what in beside:
        taken = set(outputs.values()) & {path_beside(path, what) for path in outputs.values()}
        if taken:
            raise InputError(f"output {min(taken)} would be both a map and the {what} of another; rename an image.")


def _check_writable(folder: Path) -> None:
    """Raise InputError if no file can be created in the nearest existing folder.

    Permissions would not show a read-only disk, and mislead for root.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"output folder {there} cannot be written to ({error}); choose another output.") from None
