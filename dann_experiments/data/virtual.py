"""Virtual rasters (GDAL's VRT): small XML files in the user's cache that stand for rasters which are not one local file.

Everything after the search for files works with their paths, as with any image. A folder is named by the digest of its contents,
so equal rasters are written once, and processes that write at the same time do not disturb each other.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path

from dann_experiments.config import atomic_write
from dann_experiments.config.errors import InputError

SUFFIX = ".vrt"
SOURCES = ("SourceFilename", "SourceDataset")  # elements that name a file
LARGEST_BYTES = 64 * 2**20  # a larger VRT is not looked into


def user_cache() -> Path:
    """Return the program's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dann_experiments"


def cache_folder() -> Path:
    """Return the folder of the virtual rasters that this program writes."""
    return user_cache() / "virtual"


def keep(files: Mapping[str, str], first: str) -> Path:
    """Write a virtual raster and the files it refers to; return the path of `first`.

    `files`: file name -> XML, in which other files of the same raster are named relative to it. Raises InputError if the cache
    cannot be written to.
    """
    digest = hashlib.blake2b(repr(sorted(files.items())).encode(errors="surrogateescape"), digest_size=12).hexdigest()
    folder = cache_folder() / digest
    if folder.is_dir():  # complete, because it appears under this name only when it is
        return folder / first
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            for name, text in files.items():
                (unfinished / name).parent.mkdir(exist_ok=True)
                (unfinished / name).write_bytes(text.encode(errors="surrogateescape"))
            try:
                os.rename(unfinished, folder)
            except OSError:
                if not folder.is_dir():  # otherwise, another process was faster
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({atomic_write.reason(error, folder)}); images in several files need a small file "
            "there. Set the environment variable XDG_CACHE_HOME to a folder that can be written to."
        ) from None
    return folder / first


def is_virtual(path: Path) -> bool:
    """Return True if the name is that of a virtual raster, the user's or ours."""
    return path.suffix.lower() == SUFFIX


def files_behind(path: Path) -> list[Path]:
    """Return the local files that an image is read from: itself and, for a virtual raster, the files it names, however deep.

    Files that do not exist are left out: opening the raster reports them.
    """
    found: dict[str, Path] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop(0)
        if os.path.realpath(file) not in found:
            found[os.path.realpath(file)] = file
            waiting = [
                source for _, source in _sources(file) if source.is_file()
            ] + waiting  # in the order of the bands
    return list(found.values())


def all_local(path: Path) -> bool:
    """Return True if an image is read from local files alone: it is one, or a virtual raster that names nothing else, such as an
    address or a missing file."""
    if not is_virtual(path):
        return True
    trees = [(file, _parsed(file)) for file in files_behind(path) if is_virtual(file)]
    return all(tree is not None and all(source.is_file() for _, source in _sources(file, tree)) for file, tree in trees)


def is_ours(path: Path) -> bool:
    """Return True for a virtual raster that this program wrote."""
    return is_virtual(path) and path.is_relative_to(cache_folder())


def state_of(path: Path) -> tuple[int, int]:
    """Return (size, modification time in ns) of a file; zeros for a virtual raster of ours, whose path changes with its content.

    It may have been deleted and written again.
    """
    if is_ours(path):
        return 0, 0
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def origins(path: Path) -> list[Path]:
    """Return the user's files behind an image: itself if it is one."""
    return [file for file in files_behind(path) if not is_ours(file)]


def addresses(path: Path) -> list[str]:
    """Return what an image is read from, as its user names it: itself or, for a virtual raster of ours, paths of files and
    addresses (https://, s3://)."""
    if not is_ours(path):
        return [str(path)]
    found: dict[str, None] = {}
    for element, source in _sources(path):
        text = (element.text or "").strip()
        if text.startswith("/vsi"):
            found[text.removeprefix("/vsicurl/").replace("/vsis3/", "s3://", 1)] = None
        else:
            found |= dict.fromkeys(addresses(source))
    return list(found) or [str(path)]


def shown(path: Path) -> str:
    """Return an image as its user names it, for tables: the first of `addresses`, and how many there are besides."""
    first, *others = addresses(path)
    return f"{first} and {len(others)} more" if others else first


def place_of_origin(path: Path) -> Path:
    """Return where an image seems to be for its user: for a virtual raster of ours, the folder of its first file, with the stem.

    Outputs are named by it. Other images are where their path says.
    """
    if not is_ours(path):
        return path
    first = next((source for _, source in _sources(path)), path)
    return first.parent / f"{path.stem}.tif"


def digest_with_sources(path: Path, digest_of: Callable[[Path], bytes]) -> bytes:
    """Return the digest of a virtual raster: of its XML, with the digests of files in place of their names.

    Equal rasters in other folders thus have the same digest, and a changed source has another one. `digest_of` is called for each
    source. A source that is missing, or the raster itself, counts by its name.
    """
    tree = _parsed(path)
    if tree is None:
        return hashlib.blake2b(path.read_bytes()).digest()
    known = os.path.realpath(path)
    for element, source in _sources(path, tree):
        if source.is_file() and known not in map(
            os.path.realpath, files_behind(source)
        ):  # a raster may refer to itself
            element.text = digest_of(source).hex()
            element.attrib.pop("relativeToVRT", None)
    return hashlib.blake2b(ET.tostring(tree)).digest()


def _sources(path: Path, tree: ET.Element | None = None) -> list[tuple[ET.Element, Path]]:
    """Return the elements of a virtual raster that name files, with these; [] for other files."""
    tree = _parsed(path) if tree is None else tree
    if tree is None:
        return []
    named = []
    for element in tree.iter():
        text = (element.text or "").strip()
        if element.tag in SOURCES and text and not text.startswith("<") and "\0" not in text:
            named.append((element, path.parent / text if element.get("relativeToVRT") == "1" else Path(text)))
    return named


def _parsed(path: Path) -> ET.Element | None:
    """Return the XML of a virtual raster; None for other files and for what cannot be read (which opening it reports)."""
    try:
        if not is_virtual(path) or path.stat().st_size > LARGEST_BYTES:
            return None
        content = _content(str(path), path.stat().st_mtime_ns, path.stat().st_size)
        # without a DOCTYPE there are no entities, with which a small file could fill the memory
        return None if b"<!DOCTYPE" in content else ET.fromstring(content)  # noqa: S314
    except (OSError, ET.ParseError, ValueError):
        return None


@functools.lru_cache(64)
def _content(path: str, _time: int, _size: int) -> bytes:
    return Path(path).read_bytes()
