"""Reads image lists and CSV manifests: text files with one image, or an image and its mask, per line."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import local_path, local_text, remote_address, user_path
from dann_experiments.data import remote
from dann_experiments.data.stacks import stack

STACKED = "image_"  # start of the names of columns whose files are the bands of one image
Pair = tuple[Path, Path | None]  # an image and its mask, if any


def lines_of(path: Path, key: str) -> list[str]:
    """Return the lines of a list file without blank lines and comments (#)."""
    lines = (line.strip() for line in _text(path, f"{key}: list").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte-order mark, or in UTF-16 with one, as spreadsheets write."""
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} cannot be read: {error}; save it as UTF-8 text (CSV UTF-8).") from None


def pairs_of(path: Path, root: Path, key: str) -> list[Pair]:
    """Return the pairs in a list file: per line an image and, after a tab, semicolon, comma or spaces, its mask if any."""
    return [_pair(path.parent, line, root, f"{key}: a line of {path}") for line in lines_of(path, key)]


def _pair(folder: Path, line: str, root: Path, place: str) -> Pair:
    if remote_address(line.split()[0], place) is None:
        whole = beside(folder, line, root, place)
        if is_file(whole):  # names may contain spaces and commas
            return whole, None
    elif not re.search(r"[\s;,]", line):
        return beside(folder, line, root, place, image=True), None
    line = line.rstrip(" \t;,")
    for separator in "\t;,":
        image, found, mask = line.partition(separator)
        if found and mask.strip() and separator not in mask:
            return beside(folder, image, root, place, image=True), beside(folder, mask, root, place)
    halves = [(line[: blank.start()], line[blank.end() :]) for blank in re.finditer(r"\s+", line)]
    paths = [
        (beside(folder, image, root, place, image=True), beside(folder, mask, root, place)) for image, mask in halves
    ]
    there = [pair for pair in paths if is_file(pair[0]) and is_file(pair[1])]
    found = there or paths  # if no file exists, report one as missing
    return found[0] if found else (beside(folder, line, root, place), None)


def manifest_pairs(path: Path, root: Path, key: str, with_masks: bool, report: Callable[[str], None]) -> list[Pair]:
    """Return the pairs in a CSV manifest; report bad rows. A column `split` selects rows by the last part of `key`."""
    split = key.rpartition(".")[2]
    text = _text(path, f"{key}: manifest")
    try:
        reader = _manifest_reader(text)
        header = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        twice = [name for number, name in enumerate(header) if name and name in header[:number]]
        if twice:
            raise InputError(f"{key}: manifest {path} has two columns called {twice[0]!r}; keep one.")
        columns = ["image"] if "image" in header else [name for name in header if name.startswith(STACKED)]
        if not columns:
            raise InputError(
                f"{key}: manifest {path} has columns {header}; it needs one called image, or several called image_NAME."
            )
        if with_masks and set(header) - {*columns, "split", ""} and "mask" not in header:
            raise InputError(
                f"{key}: manifest {path} has columns {header}; the one with the masks must be called mask."
            )
        pairs, splits, folder = [], set(), path.parent
        for row in reader:
            surplus: Any = row.get(None)  # pyright: ignore[reportArgumentType, reportCallIssue]
            if any(text.strip() for text in surplus or ()):
                report(f"{key}: manifest {path}, line {reader.line_num} has more fields than the header names.")
                continue
            if not any((text or "").strip() for name, text in row.items() if isinstance(name, str)):
                continue  # spreadsheets append rows that hold only separators
            empty = [name for name in columns if not (row[name] or "").strip()]
            if empty:
                report(f"{key}: manifest {path}, line {reader.line_num}: the {empty[0]} is empty.")
                continue
            if "split" in header:
                splits.add((row["split"] or "").strip())
                if (row["split"] or "").strip() != split:
                    continue
            mask = (row.get("mask") or "").strip() if with_masks else ""
            line = f"{key}: manifest {path}, line {reader.line_num}"
            try:
                images = [beside(folder, row[name], root, line, image=True) for name in columns]
                image = images[0] if columns == ["image"] else stack(images)
                pairs.append((image, beside(folder, mask, root, line) if mask else None))
            except InputError as error:
                report(str(error) if columns == ["image"] else f"{line}: {error}")
        if splits and not pairs:
            raise InputError(f"{key}: manifest {path} has no rows with split {split}; it has {sorted(splits)}.")
        return pairs
    except InputError:
        raise
    except (csv.Error, ValueError) as error:
        raise InputError(f"{key}: manifest {path} cannot be read: {error}") from None


def _manifest_reader(text: str) -> csv.DictReader[str]:
    """Return a reader with the separator that yields a column called image in the first line.

    Spreadsheets write semicolons in locales with decimal commas, and tabs as "Unicode text". Excel may put a line `sep=;` first.
    """
    lines = io.StringIO(text, newline="")
    first = lines.readline()
    if first.strip().lower().startswith("sep="):
        text = text[len(first) :]
        first = lines.readline()
    columns = {separator: [name.strip(' \t\r\n"').lower() for name in first.split(separator)] for separator in ",;\t|"}
    separator = next((one for one, names in columns.items() if len(names) > 1 and _has_images(names)), ",")
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)


def _has_images(names: Sequence[str]) -> bool:
    return any(name == "image" or name.startswith(STACKED) for name in names)


def is_file(path: Path) -> bool:
    """Return True for a file; unlike `Path.is_file`, never raise for names that are too long or folders without access."""
    return os.path.isfile(path)


def under(root: Path, name: str, key: str | None = None) -> Path:
    """Return a user's path (`~` allowed) relative to `root`. With `key`, raises InputError for a remote address in it."""
    path = user_path(name) if key is None else local_path(name, key)
    return path if path.is_absolute() else root / path


def beside(folder: Path, name: str, root: Path, place: str, image: bool = False) -> Path:
    """Return a path from a list or manifest in `folder`, relative to that folder or else to the domain's `root`.

    An `image` may be at a remote address. If no such file exists, backslashes are tried as separators, and then without a leading
    slash. `place` names the line in messages. Raises InputError for any other remote address.
    """
    name = name.strip().strip("\"'")
    address = remote_address(name, place) if image else None
    if address is not None:
        return remote.view(address, place)
    name = local_text(name, place)
    slashed = name.replace("\\", "/")
    texts = dict.fromkeys((name, slashed, slashed.lstrip("/")))
    places = (Path(base, text) for text in texts for base in (folder, root))  # an absolute path stays as it is
    return next((place for place in places if is_file(place)), Path(folder, name))
