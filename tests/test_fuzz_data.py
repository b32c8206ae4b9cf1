"""Damaged manifests, images, masks and settings: exit code 2, the culprit by name, no traceback, nothing left in the store.

Every case is one damaged file in an otherwise good small data set, made by a fixed seed, and goes through the real command.
Exit code 0 is right only where the damage is harmless, which each case proves in its own way, without our readers.
"""

from __future__ import annotations

import csv
import importlib
import io
import multiprocessing
import os
import re
import resource
import sqlite3
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from conftest import small_settings, write_domain, write_raster
from PIL import Image

from dann_experiments.__main__ import main
from dann_experiments.config.parsing import known_keys

MANIFEST = "image,mask\n" + "".join(f"source/images/{n}.png,source/masks/{n}.png\n" for n in range(3))


@dataclass
class Case:
    """One damaged file."""

    name: str
    path: str
    """Which file, relative to the data."""
    content: bytes
    harmless: Callable[[Path], bool] = lambda path: False
    """Whether exit code 0 is right."""
    command: str = "check-data"
    settings: tuple[tuple[str, Any], ...] = ()
    instead_of: str | None = None
    """A file that gives way to it."""

    def __str__(self) -> str:
        return self.name


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with good data, whose store has been made (that takes seconds)."""
    place = tmp_path_factory.mktemp("fuzz")
    write_domain(place / "data" / "source", 3, seed=1)
    write_domain(place / "data" / "source_val", 2, seed=2)
    write_domain(place / "data" / "target", 3, seed=3, inverted=True, masks=False)
    write_domain(place / "data" / "target_val", 2, seed=4, inverted=True)
    (place / "data" / "source.csv").write_text(MANIFEST)
    return place


@pytest.fixture
def place(good: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(good)
    job = importlib.import_module("dann_experiments.jobs.check_data")
    monkeypatch.setattr(job, "draw_domains", lambda *_: None)  # the pictures of harmless cases: only time
    return good


def config_text(place: Path, settings: dict[str, Any]) -> str:
    nested: dict[str, Any] = {}
    own = small_settings(place / "data", data__target__test=[], monitor__metric=None)
    for key, value in (own | settings).items():
        *groups, name = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return yaml.safe_dump(nested, sort_keys=False)


def runs_in(place: Path) -> int:
    if not (place / "mlflow.db").exists():
        return 0
    with sqlite3.connect(place / "mlflow.db") as connection:
        return connection.execute("select count(*) from runs").fetchone()[0]


def files_in(place: Path) -> list[str]:
    """All but the store's own files (a run's artifacts: no run, no artifacts)."""
    own = ("mlruns", "mlflow.db", "mlflow.db.lock", "mlflow.db-journal")
    kept = [path for path in place.iterdir() if path.name not in own]
    return sorted(str(file) for path in kept for file in (path, *path.rglob("*")) if file.is_file())


def told(place: Path, command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and messages of a command; nothing may be left behind where it is not 0."""
    runs, files = runs_in(place), files_in(place)
    capsys.readouterr()
    code = main([command, "--config", str(place / "config.yaml")])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert code in (0, 2)
    if code == 2:
        assert captured.err.startswith("Error: ")
        assert runs_in(place) == runs
        assert files_in(place) == files
    return code, captured.err


def check(case: Case, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "data" / case.path
    other = place / "data" / (case.instead_of or case.path)
    before = other.read_bytes()
    other.unlink()
    try:
        path.write_bytes(case.content)
        (place / "config.yaml").write_text(config_text(place, dict(case.settings)))
        code, errors = told(place, case.command, capsys)
        assert code == 2 or case.harmless(path)
        if code == 2:
            assert case.path in errors
    finally:
        path.unlink()
        other.write_bytes(before)


# --- how files are damaged ---


def cut_off(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(1, len(data))]


def flipped(data: bytes, rng: np.random.Generator, count: int = 3) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(changed)


def zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    start = rng.integers(len(data) - 16)
    length = rng.integers(16, 200)
    return (data[:start] + bytes(length) + data[start + length :])[: len(data)]


def shuffled(data: bytes, rng: np.random.Generator) -> bytes:
    """Two halves that changed places."""
    middle = rng.integers(8, len(data) - 8)
    return data[middle:] + data[:middle]


DAMAGES = {"cut_off": cut_off, "flipped": flipped, "zeroed": zeroed, "shuffled": shuffled}


def pixels(seed: int = 0, bands: int = 3) -> np.ndarray:
    """(32, 32, bands) uint8 of smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, bands)).repeat(4, 0).repeat(4, 1)
    return (small + np.random.default_rng(seed + 1).integers(-9, 9, small.shape)).clip(0, 255).astype(np.uint8)


def encoded(values: np.ndarray, suffix: str, **more: Any) -> bytes:
    """A file's bytes by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, suffix, **more)
    return buffer.getvalue()


def tiff(values: np.ndarray, **profile: Any) -> bytes:
    """A TIFF's bytes: values (bands, height, width)."""
    with rasterio.MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
        interleave = "pixel" if len(values) == 3 else "band"
        with memory.open(driver="GTiff", **{"interleave": interleave, **shape, **profile}) as file:
            file.write(values)
        return memory.read()


def tiff_of_palette(values: np.ndarray) -> bytes:
    """A TIFF's bytes: indices (height, width) into colours, 8 or 16 bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_raster(Path(folder) / "a.tif", values[None])
        with rasterio.open(path, "r+") as file:
            file.write_colormap(1, {index: (index % 256, 9, 9, 255) for index in range(400)})
        return path.read_bytes()


def same_as_before(values: np.ndarray) -> Callable[[Path], bool]:
    """Harmless if Pillow, which is none of our readers, gives the very pixels that the undamaged file held."""

    def harmless(path: Path) -> bool:
        try:
            with Image.open(path) as image:
                return np.array_equal(np.asarray(image), values)
        except Exception:
            return False

    return harmless


def images(where: str, suffix: str, number: int) -> dict[str, Any]:
    """Path of a damaged file, and which it replaces: masks only where they are read."""
    folder = {"image": ("source", "target", "target_val"), "mask": ("source", "source_val", "target_val")}[where]
    stem = f"{folder[number % 3]}/{where}s/1"
    return {"path": f"{stem}.{suffix}", "instead_of": f"{stem}.png"}


def damaged_files(where: str, formats: dict[str, tuple[bytes, np.ndarray]], count: int, seed: int) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    for kind, (data, held) in formats.items():
        suffix = kind.rpartition(".")[2]
        for name, damage in DAMAGES.items():
            # A JPEG has no checksum: bits that change pixels alone decode without an error, and nothing can see that. A bare
            # TIFF has none either, so it is only cut off. PNG and deflated TIFF have one (that of TIFF: only check-data).
            unseen = suffix == "jpg" and name in ("flipped", "zeroed")
            if kind == "bare.tif" and name in ("flipped", "zeroed"):
                continue
            for number in range(count):
                command = "adapt" if number == 1 and (suffix == "png" or name == "cut_off") else "check-data"
                harmless = (lambda path: True) if unseen else same_as_before(held)
                yield Case(
                    f"{where}-{kind}-{name}-{number}", content=damage(data, rng), harmless=harmless, command=command,
                    **images(where, suffix, number),
                )  # fmt: skip


def image_formats() -> dict[str, tuple[bytes, np.ndarray]]:
    values = pixels()
    bands = values.transpose(2, 0, 1)
    jpeg = encoded(values, "jpeg", quality=90)
    return {
        "png": (encoded(values, "png"), values),
        "jpg": (jpeg, np.asarray(Image.open(io.BytesIO(jpeg)))),
        "tif": (tiff(bands, compress="deflate", blockysize=8), values),
        "tiled.tif": (
            tiff(bands, compress="deflate", tiled=True, blockxsize=16, blockysize=16, predictor=2),
            values,
        ),
        "bare.tif": (tiff(bands), values),
    }


def mask_formats() -> dict[str, tuple[bytes, np.ndarray]]:
    values = np.random.default_rng(3).integers(0, 2, (32, 32), np.uint8)
    return {"png": (encoded(values, "png"), values), "tif": (tiff(values[None], compress="deflate"), values)}


FILES = [*damaged_files("image", image_formats(), 4, seed=11), *damaged_files("mask", mask_formats(), 3, seed=12)]


@pytest.mark.parametrize("case", FILES, ids=str)
def test_a_damaged_file_is_refused_by_name(case, place, capsys):
    check(case, place, capsys)


# --- files that are whole, but not what is wanted ---


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int, kind: int = 2) -> bytes:
    """Right in every checksum, with next to no pixels behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def tiff_that_claims(tag: int, value: int) -> bytes:
    """A whole TIFF in which one entry of the directory has another value."""
    data = bytearray(tiff(pixels().transpose(2, 0, 1)))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HII", data, entry + 2, 4, 1, value)
    return bytes(data)


def vrt(source: str, more: str = "") -> bytes:
    return (
        f'<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="Byte" band="1"{more}>'
        f"<SimpleSource><SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    ).encode()


RUNS_CODE = vrt("0.png", ' subClass="VRTDerivedRasterBand"').replace(
    b"<SimpleSource>",
    b"<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionCode>"
    b"<![CDATA[\nimport os\ndef f(*a, **k):\n    os.system('touch pwned')\n]]></PixelFunctionCode><SimpleSource>",
)


def in_any_format(values: np.ndarray) -> Callable[[Path], bool]:
    """Harmless if Pillow reads an RGB picture of the right size: another format under a wrong name is no damage."""

    def harmless(path: Path) -> bool:
        with Image.open(path) as image:
            return image.size == values.shape[1::-1]

    return harmless


def other_images() -> Iterator[Case]:
    values = pixels()
    bands = values.transpose(2, 0, 1)
    read = in_any_format(values)

    def holds_bare(path: Path) -> bool:  # the length of a bare strip can be worked out, and its pixels are there
        return values.tobytes() in path.read_bytes()

    cloud = np.full((3, 32, 32), np.nan, np.float32)
    kinds: dict[str, tuple[str, bytes] | tuple[str, bytes, Callable[[Path], bool]]] = {
        "no bytes": ("png", b""), "no bytes of a TIFF": ("tif", b""), "no bytes of a JPEG": ("jpg", b""),
        "text": ("png", b"hello\n"), "text in a TIFF": ("tif", b"hello\n"), "text in a JPEG": ("jpg", b"hello\n" * 999),
        "html": ("jpg", b"<!DOCTYPE html><html><body>404</body></html>"),
        "svg": ("png", b"<svg width='32' height='32'/>"),
        "zip": ("tif", b"PK\x03\x04" + bytes(99)), "pdf": ("png", encoded(values, "pdf")),
        "pointer of git-lfs": ("png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"),
        "random bytes": ("png", np.random.default_rng(1).bytes(2000)), "zeros": ("tif", bytes(2000)),
        "signature of a PNG": ("png", b"\x89PNG\r\n\x1a\n"), "signature of a TIFF": ("tif", b"II*\x00\x08\x00\x00\x00"),
        "signature of a JPEG": ("jpg", b"\xff\xd8\xff\xe0"),
        "array of numpy": ("png", b"\x93NUMPY\x01\x00v\x00{'descr'"),
        "ppm": ("png", encoded(values, "ppm")), "tga": ("png", encoded(values, "tga")),
        "ico": ("png", encoded(values, "ico")),
        "gif": ("png", encoded(values, "gif"), read), "gif in a TIFF": ("tif", encoded(values, "gif"), read),
        "png in a TIFF": ("tif", encoded(values, "png"), same_as_before(values)),
        "tiff in a JPEG": ("jpg", tiff(bands), same_as_before(values)),
        "jpeg in a PNG": ("png", encoded(values, "jpeg"), read), "webp": ("webp", encoded(values, "webp"), read),
        "animated webp cut off": ("webp", encoded(values, "webp")[:400]),
        "bmp cut off": ("bmp", encoded(values, "bmp")[:900]),
        "jpeg 2000 cut off": ("jp2", encoded(values, "jpeg2000")[:500]),
        "palette": ("png", encoded(np.asarray(Image.fromarray(values).quantize(9)), "png"), read),
        "one band": ("png", encoded(values[..., 0], "png"), read),  # grey among colours is repeated
        "alpha": ("png", encoded(pixels(bands=4), "png"), read),
        "two bands": ("tif", tiff(bands[:2])), "five bands": ("tif", tiff(np.concatenate([bands, bands[:2]]))),
        "float": ("tif", tiff(bands.astype(np.float32))), "NaN alone": ("tif", tiff(cloud)),
        "infinite": ("tif", tiff(cloud + np.inf)), "signed": ("tif", tiff(bands.astype(np.int16))),
        "complex": ("tif", tiff(bands.astype(np.complex64))),
        "complex of whole numbers": ("tif", tiff(bands, dtype="complex_int16")),
        "64 bit": ("tif", tiff(bands.astype(np.uint64))), "one pixel": ("png", encoded(values[:1, :1], "png")),
        "one row": ("png", encoded(values[:1], "png")), "one pixel less": ("tif", tiff(bands[:, :, 1:])),
        "a vast PNG": ("png", png_that_claims(2**31 - 1, 2**31 - 1)),
        "a large PNG": ("png", png_that_claims(60000, 60000)),
        "a PNG of no pixels": ("png", png_that_claims(0, 0)),
        "a vast TIFF": ("tif", tiff_that_claims(256, 2**31 - 1)),
        "a TIFF of no pixels": ("tif", tiff_that_claims(256, 0)),
        "a TIFF of many rows": ("tif", tiff_that_claims(257, 2**31 - 1)),
        "a TIFF of many bands": ("tif", tiff_that_claims(277, 60000)),
        "a TIFF of unknown compression": ("tif", tiff_that_claims(259, 34999)),
        "a TIFF of deflate that is none": ("tif", tiff_that_claims(259, 8)),
        "a TIFF of JPEG that is none": ("tif", tiff_that_claims(259, 7)),
        "a TIFF whose strip is elsewhere": ("tif", tiff_that_claims(273, 2**31)),
        "a TIFF whose strip is short": ("tif", tiff_that_claims(279, 7), holds_bare),
        "a TIFF of 77 bit": ("tif", tiff_that_claims(258, 77)),
        "a VRT of nothing": ("vrt", b"<VRTDataset/>"), "a VRT of no XML": ("vrt", b"<VRTDataset rasterXSize='32'"),
        "a VRT of a missing file": ("vrt", vrt("none.png")), "a VRT of itself": ("vrt", vrt("1.vrt")),
        "a VRT of a password file": ("vrt", vrt("/etc/passwd")),
        "a VRT of a remote file": ("vrt", vrt("/vsicurl/http://127.0.0.1:9/a.tif")),
        "a VRT that runs code": ("vrt", RUNS_CODE),
    }  # fmt: skip
    for number, (name, (suffix, content, *harmless)) in enumerate(kinds.items()):
        yield Case(
            f"image: {name}", content=content, harmless=harmless[0] if harmless else lambda path: False,
            command="adapt" if number % 8 == 7 and not harmless else "check-data",
            **images("image", suffix, 0 if name == "one pixel less" else number % 2),
        )  # fmt: skip


def other_masks() -> Iterator[Case]:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 2, (32, 32)).astype(np.uint8)
    one_wrong = ids.copy()
    one_wrong[-1, -1] = 2
    indexed = Image.fromarray(ids)
    buffer = io.BytesIO()
    indexed.putpalette([9, 9, 9, 200, 0, 0])
    indexed.save(buffer, "png")
    same = same_as_before(ids)
    kinds = {
        "no bytes": ("png", b""), "text": ("tif", b"hello"),
        "a vast PNG": ("png", png_that_claims(2**31 - 1, 2**31 - 1, 0)),
        "one wrong id": ("png", encoded(one_wrong, "png")),
        "ids to 255": ("png", encoded(rng.integers(0, 256, (32, 32)).astype(np.uint8), "png")),
        "254": ("png", encoded(ids + 253, "png")),
        "colours": ("png", encoded(pixels(), "png")), "grey with alpha": ("tif", tiff(np.stack([ids] * 2))),
        "16 bit": ("tif", tiff(ids[None].astype(np.uint16) + 256)),
        "negative": ("tif", tiff(-ids[None].astype(np.int16))),
        "huge": ("tif", tiff(np.full((1, 32, 32), 2**63, np.uint64))),
        "fractions": ("tif", tiff(ids[None] + np.float32(0.5))),
        "infinite": ("tif", tiff(np.full((1, 32, 32), -np.inf, np.float64))),
        "beyond 64 bit": ("tif", tiff(np.full((1, 32, 32), 1e300, np.float64))),
        "complex": ("tif", tiff(ids[None].astype(np.complex64))),
        "complex of whole numbers": ("tif", tiff(ids[None], dtype="complex_int16")),
        "a row less": ("png", encoded(ids[1:], "png")),
        "turned": ("png", encoded(np.repeat(ids, 2, 0), "png")), "one pixel": ("png", encoded(ids[:1, :1], "png")),
        "a jpeg": ("jpg", encoded(ids * 200, "jpeg", quality=70)),
        "a gif of colours": ("gif.png", encoded(pixels()[..., 0] | 4, "gif")),
        "whole numbers as float": ("tif", tiff(ids[None].astype(np.float32)), same),
        "palette": ("png", buffer.getvalue(), same),
        "64 bit": ("tif", tiff(ids[None].astype(np.int64)), lambda path: True),
        "three equal bands": ("tif", tiff(np.stack([ids] * 3)), lambda path: True),
        "a palette of 16 bit": ("tif", tiff_of_palette(ids.astype(np.uint16) + 300)),
    }  # fmt: skip
    for number, (name, (suffix, content, *harmless)) in enumerate(kinds.items()):
        yield Case(
            f"mask: {name}", content=content, harmless=harmless[0] if harmless else lambda path: False,
            command="adapt" if number % 8 == 6 and not harmless else "check-data",
            **images("mask", suffix.replace("gif.", ""), number),
        )  # fmt: skip


OTHERS = [*other_images(), *other_masks()]


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_a_file_that_is_something_else_is_refused_by_name(case, place, capsys):
    check(case, place, capsys)
    assert not (place / "pwned").exists()


# --- manifests ---


def lists_good_files(path: Path) -> bool:
    """Harmless if what is left names images and masks that are there, by Python's own reader of CSV."""
    try:
        rows = [row for row in csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")) if row]
    except (UnicodeDecodeError, csv.Error):
        return False
    header = [name.strip() for name in rows[0]] if rows else []
    good = len(rows) > 1 and header[:2] == ["image", "mask"]
    return good and all(
        len(row) >= 2 and all((path.parent / name.strip()).is_file() for name in row[:2])
        and row[0].strip().replace("images", "masks") == row[1].strip()
        for row in rows[1:]
    )  # fmt: skip


def manifest_cases() -> Iterator[Case]:
    rng = np.random.default_rng(21)
    whole = MANIFEST.encode()
    first = "source/images/0.png,source/masks/0.png\n"

    def table(*lines: str) -> bytes:
        return "\n".join(lines).encode() + b"\n"

    contents: dict[str, bytes] = {
        "no bytes": b"", "blank lines": b"\n\n\n", "byte order mark": b"\xef\xbb\xbf", "header alone": b"image,mask\n",
        "no header": first.encode(), "no image column": table("picture,mask", first),
        "no mask column": table("image,label", first),
        "image twice": table("image,image", first), "mask twice": table("image,mask,mask", first.strip() + ",x"),
        "header twice": MANIFEST.encode() + MANIFEST.encode(),
        "utf-32": MANIFEST.encode("utf-32"),
        "latin-1": table("image,mask", "Stra\u00dfe.png,m.png").decode().encode("latin-1"),
        "NUL in a name": MANIFEST.replace("images/1", "images\0/1").encode(),
        "NUL in the header": MANIFEST.replace("image,", "im\0age,").encode(),
        "all NUL": bytes(500), "a huge field": table("image,mask", "a" * 200_000 + ",m.png"),
        "a long name": table("image,mask", "a" * 5000 + ",m.png"),
        "many folders": table("image,mask", "a/" * 3000 + "b.png,m.png"),
        "a name too long": table("image,mask", "a" * 300 + ".png,m.png"),
        "short rows": table("image,mask", "source/images/0.png", "source/images/1.png"),
        "a long row": table("image,mask", first.strip() + ",surplus"),
        "a row without image": table("image,mask", ",source/masks/0.png"), "spaces": table("image,mask", "  ,  "),
        "a folder": table("image,mask", "source/images,source/masks"),
        "itself": table("image,mask", "source.csv,source.csv"),
        "a mask that is a folder": table("image,mask", "source/images/0.png,source"),
        "devices": table("image,mask", "/dev/null,/dev/zero"),
        "no such place": table("image,mask", "/nonsense/of/a/path.png,/nonsense/m.png"),
        "another system": table("image,mask", "C:\\data\\a.png,C:\\data\\b.png"),
        "the web": table("image,mask", "gs://bucket/a.png,gs://bucket/b.png"),
        "GDAL's own paths": table("image,mask", "/vsimem/a.tif,/vsicurl/http://127.0.0.1:9/a.tif"),
        "password file": table("image,mask", "/etc/passwd,/etc/passwd"),
        "climbing": table("image,mask", "../" * 40 + "a.png,b.png"),
        "home of nobody": table("image,mask", "~nobody_at_all/a.png,b.png"),
        "an open quote": MANIFEST.replace("source/images/1", '"source/images/1').encode(),
        "quotes": MANIFEST.replace("source/images/1.png", '"source/images/1.png"').encode(),
        "old line ends": MANIFEST.replace("\n", "\r").encode(),
        "pattern": table("image,mask", "source/images/*.png,source/masks/*.png"),
        "json": b'[{"image": "source/images/0.png"}]', "an image": encoded(pixels(), "png"),
        "no split of this name": table("image,mask,split", first.strip() + ",val"),
        "split of nothing": table("image,mask,split", first.strip() + ","),
    }  # fmt: skip
    for number in range(5):
        contents[f"random bytes {number}"] = rng.bytes(int(rng.integers(1, 600)))
        contents[f"random text {number}"] = bytes(rng.choice(list(b'image,mask\n\r"; /.png\0\xc3'), 300))
        contents[f"cut off {number}"] = cut_off(whole, rng)
        contents[f"flipped {number}"] = flipped(whole, rng, 2)
    for number, (name, content) in enumerate(contents.items()):
        settings = (("data.source.train", ["source.csv"]),)
        command = "adapt" if number % 9 == 8 and not name.startswith(("cut", "flip", "quot", "old")) else "check-data"
        yield Case(f"manifest: {name}", "source.csv", content, lists_good_files, command, settings)


@pytest.mark.parametrize("case", manifest_cases(), ids=str)
def test_a_damaged_manifest_is_refused_and_what_it_names_is_told(case, place, capsys):
    path = place / "data" / "source.csv"
    path.write_bytes(case.content)
    (place / "config.yaml").write_text(config_text(place, dict(case.settings)))
    code, errors = told(place, case.command, capsys)
    assert code == 2 or lists_good_files(path)
    if code == 2:  # the manifest, or a file that it names
        assert "data.source.train" in errors or "cannot be read as an image" in errors
        fields = re.split(r"[,\r\n]+", case.content.decode("utf-8", "replace"))
        assert "source.csv" in errors or any(field.strip() and field.strip() in errors for field in fields)


# --- settings ---

FOLDERS = {"data.source.train": ["source"], "data.source.val": ["source_val"]}


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]: node}
    return {key: value for name, inner in node.items() for key, value in leaves(inner, f"{prefix}{name}.").items()}


def means_the_same_or_less(text: bytes, whole: str) -> bool:
    """Harmless if PyYAML reads settings that are known, of the types they had before: then it is another good file."""
    try:
        found, before = leaves(yaml.safe_load(text.decode())), leaves(yaml.safe_load(whole))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return False
    return all(key == "" or value is None or type(value) is type(before.get(key)) for key, value in found.items())


@pytest.mark.slow
def test_a_damaged_settings_file_is_refused_by_file_or_key(place, capsys):
    """Lines dropped, doubled, moved in or out; signs changed."""
    rng = np.random.default_rng(31)
    whole = config_text(place, {})
    lines = whole.splitlines()
    texts: list[bytes] = [
        b"\0", b"\xff\xfe", whole.encode("utf-16"), b"- a\n- b\n", b"42\n", b"data\n", b"data: 5\n", b"data: [1]\n",
        b"? {a: b}\n: c\n", b"data: {source: {train: {images: [}}\n", b"%YAML 9.9\n---\na: b\n", b"\t\tdata: x\n",
        b"--- \n...\n---\ndata:\n", b"data: !!set {a, b}\n", b"1: 2\n", b"null: 2\n", b"2020-01-01: 2\n", b"true: 2\n",
    ]  # fmt: skip
    for _ in range(20):
        place_of = int(rng.integers(len(lines)))
        sign = rng.choice(list("[]{}:,&*!|>%@`#'\"\t\\-?"))
        line = lines[place_of]
        column = int(rng.integers(len(line) + 1))
        for changed in ([], [line, line], [" " + line], [line.strip()], [line[:column] + sign + line[column:]]):
            if rng.random() < 0.5:
                texts.append("\n".join([*lines[:place_of], *changed, *lines[place_of + 1 :]]).encode())
    refused = 0
    for text in texts:
        (place / "config.yaml").write_bytes(text)
        code, errors = told(place, "check-data", capsys)
        assert code == 2 or means_the_same_or_less(text, whole), text
        refused += code == 2
        if code == 2:
            names = {part for key in known_keys() for part in key.split(".")} | {"config.yaml", str(place / "data")}
            assert any(name in errors for name in names) or "unknown setting" in errors, (text, errors)
    assert len(texts) > 60
    assert refused > 30


WRONG_FOR_ALL = [{"a": {"b": [1]}}, [[[[[]]]]]]


@pytest.mark.slow
def test_every_data_setting_refuses_values_of_another_kind_by_its_name(place, capsys):
    for key in (key for key in known_keys() if key.startswith("data.")):
        for value in WRONG_FOR_ALL:
            (place / "config.yaml").write_text(config_text(place, {key: value}))
            code, errors = told(place, "check-data", capsys)
            assert code == 2, (key, value)
            assert key in errors or f"{key.rpartition('.')[2]} " in errors, (key, value, errors)


LONG, DEEP = "a" * 5000, "a/" * 2000
IMAGES = {"images": "source/images", "masks": "source/masks"}
WRONG = [
    ("root", "\0", "data.root"), ("root", LONG, LONG), ("root", "/nonsense", "/nonsense/source"),
    ("root", "nonsense", "nonsense/source"),
    ("source.root", DEEP, "source"), ("source.preset", "nonsense", "preset"), ("source.preset", "", "preset"),
    ("source.scene", "Urban", "scene"),
    ("source.train", [], "data.source.train"), ("source.train", [""], "data.source.train"),
    ("source.train", ["\0"], "data.source.train"),
    ("source.train", [LONG], LONG), ("source.train", ["[z-a]*"], "[z-a]*"), ("source.train", ["**/**/none*"], "none*"),
    ("source.train", ["[!*"], "[!*"), ("source.train", ["*.png"], "*.png"), ("source.train", ["/"], "/images"),
    ("source.train", ["config.yaml"], "config.yaml"),
    ("source.train", ["~nobody_at_all/x"], "nobody_at_all"),
    ("source.train", ["source", "none", "nothing"], "data/nothing"),
    ("source.train", [{"masks": "source/masks"}], "images"), ("source.train", [{**IMAGES, "mask": 1}], "mask"),
    ("source.train", [{**IMAGES, "images": LONG}], LONG),
    ("source.train", [{**IMAGES, "images": "none"}], "data/none"), ("source.train", [{**IMAGES,
    "masks": "source/ma*/*.png"}], "cannot be paired"),
    ("source.train", [{**IMAGES, "masks": ["source/masks/0.png"]}], "cannot be paired"), ("source.train", [{**IMAGES,
    "images": []}], "images"),
    ("source.train", [{**IMAGES, "names": "none.txt"}], "none.txt"), ("source.train", [{**IMAGES,
    "names": "source/images/0.png"}], "0.png"),
    ("source.train", [{**IMAGES, "names": ["x"]}], "no file matches names x"), ("source.train", [{**IMAGES,
    "region": [0, 0, 8]}], "region"),
    ("source.train", [{**IMAGES, "region": [0, 0, 10**30, 10**30]}], "images/0.png"), ("source.train", [{**IMAGES,
    "region": [9, 0, 8, 8]}], "region"),
    ("source.bands", [0, 1, 2], "bands"), ("source.bands", [1, 2], "bands"),
    ("source.bands", [1, 2, 10**12], "images/0.png"), ("source.bands", [], "bands"),
    ("source.scale", [1, 0], "scale"), ("source.scale", [1], "scale"), ("source.scale", "nonsense", "scale"),
    ("source.scale", [float("nan")] * 2, "scale"),
    ("source.nodata", "none", "nodata"), ("source.ignore_values", [0.5], "ignore_values"),
    ("source.value_map", {}, "value_map"),
    ("source.value_map", {"a": "b"}, "value_map"), ("source.value_map", {0: "ground"}, "masks/0.png"),
    ("source.color_map", {"0,0": "a"}, "color_map"),
    ("source.color_map", {"0,0,256": "a"}, "color_map"), ("source.color_map", {"0,0,0": "ground"}, "masks/0.png"),
    ("source.pixel_size", 0.0, "pixel_size"),
    ("source.pixel_size", 0.5, "images/0.png"), ("source.file_pixel_size", 1.0, "file_pixel_size"),
    ("source.augmentation", "much", "augmentation"),
    ("source.batch_size", 0, "batch_size"), ("target.train", ["source_val"], "an image may be in one set"),
    ("target.val", ["source"], "an image may be in one set"),
    ("class_names", ["a"], "class_names"), ("class_names", ["a", "a"], "class_names"),
    ("ignore_index", 256, "ignore_index"), ("ignore_index", 1, "data.source.train"),
    ("normalization", "none", "normalization"), ("mean", [0.5], "mean"), ("std", [0.0, 0.0, 0.0], "std"),
    ("window_size", 3, "window_size"),
    ("windows", "nonsense", "windows"), ("window_count", 5, "window_count"), ("crop_size", -8, "crop_size"),
    ("crop_size", 10**9, "images/0.png"),
    ("eval_batch_size", 0, "eval_batch_size"), ("num_workers", -1, "num_workers"),
    ("memory_gb", float("nan"), "memory_gb"), ("embedded.name", "nonsense", "embedded.name"),
]  # fmt: skip


@pytest.mark.slow
def test_every_nonsense_in_data_settings_is_refused_by_key_or_file(place, capsys):
    for key, value, named in WRONG:
        (place / "config.yaml").write_text(config_text(place, {f"data.{key}": value}))
        code, errors = told(place, "check-data", capsys)
        assert code == 2, (key, value)
        assert named in errors, (key, value, errors)


@pytest.mark.parametrize(
    "key",
    ["source.train", "target.test", "source.scale", "source.nodata", "source.ignore_values", "source.batch_size",
     "source.augmentation", "ignore_index", "normalization", "mean", "std", "windows", "memory_gb"],
)  # fmt: skip
def test_null_is_refused_where_a_value_must_be(place, capsys, key):
    (place / "config.yaml").write_text(config_text(place, {f"data.{key}": None}))
    code, errors = told(place, "check-data", capsys)
    assert code == 2
    assert f"data.{key}" in errors


@pytest.mark.parametrize(
    ("key", "value"),
    [("root", "~nobody_at_all"), ("source.root", "~nobody_at_all"), ("mean", [10**400] * 3), ("std", [10**400] * 3),
     ("memory_gb", 10**400), ("mean", [float("nan")] * 3), ("std", [float("inf")] * 3), ("std", [float("nan")] * 3),
     ("source.scale", [0.0, float("inf")])],
)  # fmt: skip
def test_numbers_and_folders_that_are_none_are_refused(place, capsys, key, value):
    (place / "config.yaml").write_text(config_text(place, {f"data.{key}": value}))
    code, errors = told(place, "check-data", capsys)
    assert code == 2
    assert key.rpartition(".")[2] in errors or "~nobody_at_all" in errors


def test_more_random_windows_than_fit_in_memory_are_refused(place, capsys):
    many = {"data.windows": "random", "data.window_count": 10**12, "data.window_size": 16}
    (place / "config.yaml").write_text(config_text(place, many))
    code, errors = told(place, "check-data", capsys)
    assert code == 2
    assert "window_count" in errors


# --- YAML that wants to do harm ---


def bomb(use: str) -> str:
    """9 ** 12 words in two lines, put in the place of BOMB."""
    text = "&x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"
    for level in range(1, 12):
        text = f"&x{level} [{text}" + f", *x{level - 1}" * 8 + "]"
    return use.replace("BOMB", text) + "\n"


HARMFUL = {
    "python object": "data: !!python/object/apply:os.system ['touch pwned']\n",
    "python module": "data: {root: !!python/module:os}\n",
    "python name": "data: {root: !!python/name:os.system}\n",
    "python new": "seed: !!python/object/new:os.system ['touch pwned']\n",
    "python in a list": "data: {source: {train: [!!python/object/apply:subprocess.check_call [['touch', 'pwned']]]}}\n",
    "python key": "? !!python/object/apply:os.system ['touch pwned']\n: 1\n",
    "target that is a function": "model: {_target_: os.system, command: touch pwned}\n",
    "method that is a function": "domain_adaptation: {method: {_target_: subprocess.check_call, args: [touch, pwned]}}\n",
    "class that is a function": "domain_adaptation: {method: {class_path: os.system, init_args: {command: touch pwned}}}\n",
    "list of itself": "data: {source: {train: &a [*a]}}\n",
    "mapping of itself": "data: &d {source: *d}\n",
    "setting of itself": "model: &m {arch: *m}\n",
    "merge of itself": "data: &a {<<: *a, root: 5}\n",
    "callbacks of itself": "callbacks: &i [*i]\n",
    "deep list": "data: " + "[" * 3000 + "]" * 3000 + "\n",
    "deep mapping": "data: " + "{a: " * 900 + "1" + "}" * 900 + "\n",
    "deep entry": "data: {source: {train: " + "[" * 400 + "]" * 400 + "}}\n",
    "a number of a million digits": "seed: 1" + "0" * 1_000_000 + "\n",
    "a number of hexadecimal digits": "seed: 0x" + "f" * 100_000 + "\n",
    "a number in base 60": "seed: " + "1:" * 5000 + "1\n",
    "a long key": "a" * 1_000_000 + ": 1\n",
    "many keys": "".join(f"k{n}: 1\n" for n in range(3000)),
    "bomb in no setting": "x: 1\n" + bomb("y: BOMB"),
}
BOMBS = {
    "entries": bomb("data: {source: {train: BOMB}}"),
    "group": bomb("model: BOMB"),
    "number": bomb("seed: BOMB"),
    "map": bomb("data: {source: {value_map: {0: BOMB}}}"),
    "callbacks": bomb("callbacks: BOMB"),
}


def in_child(place: Path, text: str) -> tuple[int | None, str]:
    """Exit code and messages of check-data in a process with 4 s and 4 GB more; None if it needed more."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (4, 4))
        with open("messages.txt", "w") as messages:
            os.dup2(messages.fileno(), 2)
            sys.stderr = messages
            code = main(["check-data", "--config", "config.yaml"])
            messages.flush()
        os._exit(code)

    (place / "config.yaml").write_text(text)
    try:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        process.kill()
        return (None if process.exitcode is None or process.exitcode < 0 else process.exitcode), (
            place / "messages.txt"
        ).read_text()
    finally:
        (place / "messages.txt").unlink(missing_ok=True)


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_settings_file_is_refused_and_runs_nothing(place, capsys, name):
    (place / "config.yaml").write_text(HARMFUL[name])
    code, errors = told(place, "adapt" if "class" in name else "check-data", capsys)
    assert code == 2
    assert not (place / "pwned").exists()
    assert errors.strip()


@pytest.mark.parametrize("name", BOMBS)
def test_a_settings_file_that_grows_without_end_is_refused_at_once(place, name):
    runs = runs_in(place)
    code, errors = in_child(place, BOMBS[name])
    assert code == 2
    assert "config.yaml" in errors
    assert "Traceback" not in errors
    assert runs_in(place) == runs
