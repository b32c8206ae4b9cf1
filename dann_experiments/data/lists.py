"""Reads lists and manifests of images: text files with a path, or an image and its mask, per line."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dann_experiments.config.errors import InputError
from dann_experiments.config.paths import local_path, local_text, user_path

Pair = tuple[Path, Path | None]  # an image, and its mask where there is one


def lines_of(path: Path, key: str) -> list[str]:
    """The lines of a list file, without blank ones and comments (#)."""
    lines = (line.strip() for line in _text(path, f"{key}: list").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _text(path: Path, what: str) -> str:
    """A text file of any of the encodings that spreadsheets write: UTF-8 or UTF-16, with or without a byte-order mark."""
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} cannot be read: {error}; save it as UTF-8 text (CSV UTF-8).") from None


def pairs_of(path: Path, root: Path, key: str) -> list[Pair]:
    """An image on each line, or an image and its mask, separated by a tab, semicolon, comma or blanks."""
    return [_pair(path.parent, line, root, f"{key}: a line of {path}") for line in lines_of(path, key)]


def _pair(folder: Path, line: str, root: Path, place: str) -> Pair:
    whole = beside(folder, line, root, place)
    if is_file(whole):  # a name may hold blanks and commas
        return whole, None
    line = line.rstrip(" \t;,")
    for separator in "\t;,":
        image, found, mask = line.partition(separator)
        if found and mask.strip() and separator not in mask:
            return beside(folder, image, root, place), beside(folder, mask, root, place)
    halves = [(line[: blank.start()], line[blank.end() :]) for blank in re.finditer(r"\s+", line)]
    paths = [(beside(folder, image, root, place), beside(folder, mask, root, place)) for image, mask in halves]
    there = [pair for pair in paths if is_file(pair[0]) and is_file(pair[1])]
    return next(iter(there or paths), (whole, None))  # where none is there, one is named as missing


def manifest_pairs(path: Path, root: Path, key: str, with_masks: bool, report: Callable[[str], None]) -> list[Pair]:
    split = key.rpartition(".")[2]
    text = _text(path, f"{key}: manifest")
    try:
        reader = _manifest_reader(text)
        header = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        twice = [name for number, name in enumerate(header) if name and name in header[:number]]
        if twice:
            raise InputError(f"{key}: manifest {path} has two columns called {twice[0]!r}; keep one.")
        if "image" not in header:
            raise InputError(f"{key}: manifest {path} has columns {header}; it needs one called image.")
        if with_masks and set(header) - {"image", "split", ""} and "mask" not in header:
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
                continue  # spreadsheets end with rows of separators alone
            if not (row["image"] or "").strip():
                report(f"{key}: manifest {path}, line {reader.line_num}: the image is empty.")
                continue
            if "split" in header:
                splits.add((row["split"] or "").strip())
                if (row["split"] or "").strip() != split:
                    continue
            mask = (row.get("mask") or "").strip() if with_masks else ""
            line = f"{key}: manifest {path}, line {reader.line_num}"
            try:
                image = beside(folder, row["image"], root, line)
                pairs.append((image, beside(folder, mask, root, line) if mask else None))
            except InputError as error:
                report(str(error))
        if splits and not pairs:
            raise InputError(f"{key}: manifest {path} has no rows with split {split}; it has {sorted(splits)}.")
        return pairs
    except InputError:
        raise
    except (csv.Error, ValueError) as error:
        raise InputError(f"{key}: manifest {path} cannot be read: {error}") from None


def _manifest_reader(text: str) -> csv.DictReader[str]:
    """A reader whose separator is the one that makes a column called image of the first line: spreadsheets write semicolons
    where the comma is for decimals, and tabs as "Unicode text". A line `sep=;` before it is Excel's own."""
    lines = io.StringIO(text, newline="")
    first = lines.readline()
    if first.strip().lower().startswith("sep="):
        text = text[len(first) :]
        first = lines.readline()
    columns = {separator: [name.strip(' \t\r\n"').lower() for name in first.split(separator)] for separator in ",;\t|"}
    separator = next((one for one, names in columns.items() if "image" in names and len(names) > 1), ",")
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)


def is_file(path: Path) -> bool:
    """Never raises, as `Path.is_file` does for names that are too long and for folders that may not be entered."""
    return os.path.isfile(path)


def under(root: Path, name: str, key: str | None = None) -> Path:
    """A path as a user writes it, `~` included, relative to `root`. Raises InputError for an address as the setting `key`."""
    path = user_path(name) if key is None else local_path(name, key)
    return path if path.is_absolute() else root / path


def beside(folder: Path, name: str, root: Path, place: str) -> Path:
    """A path as a list or manifest in `folder` writes it: relative to that folder, or else to the domain's `root`.

    Separators of Windows, and a slash before a path that is relative all the same, are understood where only so a file is there.
    `place`: the line, for messages. Raises InputError for an address.
    """
    name = local_text(name.strip().strip("\"'"), place)
    slashed = name.replace("\\", "/")
    texts = dict.fromkeys((name, slashed, slashed.lstrip("/")))
    places = [Path(base, text) for text in texts for base in (folder, root)]  # an absolute path stays as it is
    return next((place for place in places if is_file(place)), places[0])
