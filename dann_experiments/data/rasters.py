"""Opens image files with GDAL, reads their headers, and checks for damage.

Any failure to open or read a file raises an InputError that names it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from dann_experiments.config.errors import InputError
from dann_experiments.data.endpoints import s3_endpoint
from dann_experiments.data.georeference import unit_of
from dann_experiments.data.orientation import TURNS, Turn, orientation_of

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

DRIVERS = ("GTiff", "PNG", "JPEG", "BMP", "WEBP", "GIF", "JP2OpenJPEG", "VRT")  # accepted drivers of GDAL
CACHE_MB = 128  # GDAL's cache of decoded blocks; its own default is a share of the machine's memory
LARGEST_SIDE, MOST_PIXELS, MOST_BANDS = 10**7, 10**12, 4096  # a header that claims more is damaged
Image.MAX_IMAGE_PIXELS = None  # aerial mosaics are larger than Pillow's guard against decompression bombs
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": CACHE_MB,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a truncated JPEG is an error, not a gray area
    # of remote files; times in seconds
    "GDAL_HTTP_MAX_RETRY": 3,
    "GDAL_HTTP_RETRY_DELAY": 0.5,  # the first; then longer ones
    "GDAL_HTTP_RETRY_CODES": "429,500,502,503,504",
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_TIMEOUT": 120,
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",  # look for side files by name; listing large folders is slow
}


class Window(NamedTuple):
    """A rectangle, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Header:
    """Properties of a raster that are known before any pixel is read."""

    height: int
    width: int
    bands: int
    """Number of bands without the alpha band."""
    dtype: str
    nodata: tuple[float | None, ...]
    """The file's nodata value per band, including the alpha band."""
    masked: bool
    """True if an alpha band or an internal mask marks the pixels that hold data."""
    pixel_size: float | None
    """Side length of a pixel in the unit of the file's CRS; None = not georeferenced."""
    palette: bool
    """True if the only band holds indices into a color table."""
    unit: str | None = None
    """Unit of `pixel_size`, such as metre or degree; None = unknown."""
    orientation: int = 1
    """EXIF orientation, 1 to 8. `height` and `width` are those of the image as displayed."""
    bits: int | None = None
    """Bits per value if fewer than the type has (1, 2 and 4 bit PNG, 12 bit TIFF); None = all."""
    alpha: int = 0
    """Number of the alpha band, from 1; 0 = none."""

    @property
    def count(self) -> int:
        """Number of bands, including the alpha band."""
        return self.bands + (self.alpha > 0)

    @property
    def data_bands(self) -> list[int]:
        """Numbers (from 1) of all bands except the alpha band."""
        return [band for band in range(1, self.count + 1) if band != self.alpha]

    @property
    def turn(self) -> Turn:
        """The transform from stored to displayed pixels."""
        return TURNS[self.orientation]


def header_from(facts: Mapping[str, Any]) -> Header:
    """Rebuild a header from the plain values of `dataclasses.asdict`, as JSON gives them back."""
    return Header(**{**facts, "nodata": tuple(facts["nodata"])})


def read_header(path: Path) -> Header:
    """Return the header of an image file without reading pixels. Raises InputError if it is not an image."""
    with open_raster(path) as file:
        return verified_header(file, path)


def verified_header(file: DatasetReader, path: Path) -> Header:
    """Return the header of an open file. Raises InputError for a damaged PNG, whose missing pixels GDAL would silently fill."""
    if file.driver == "PNG":
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.verify()
        except Exception as error:  # Pillow raises many types for damaged files
            raise InputError(f"{path} cannot be read as an image: {error}") from None
    return header_of(file)


def changes_values(file: DatasetReader) -> bool:
    """Return True if the file declares a lossy compression."""
    facts = file.tags(ns="IMAGE_STRUCTURE")
    of_jpeg = facts.get("COMPRESSION", "") in ("JPEG", "YCbCr JPEG")
    said = facts.get("COMPRESSION_REVERSIBILITY", "").startswith("LOSSY") or float(facts.get("MAX_Z_ERROR", 0)) > 0
    return file.driver == "JPEG" or of_jpeg or said


def check_deflated(path: Path) -> None:
    """Raise InputError for a deflate-compressed TIFF with damaged data; GDAL does not check the checksums."""
    with open_raster(path) as file:
        if file.driver != "GTiff" or file.profile.get("compress") != "deflate":
            return
        height, width = file.block_shapes[0]
        places = [
            f"{column}_{row}" for row in range(-(-file.height // height)) for column in range(-(-file.width // width))
        ]
        bands = [1] if file.profile.get("interleave") == "pixel" else file.indexes
        with open(path, "rb") as stored:
            for band, place in itertools.product(bands, places):
                start, length = (file.get_tag_item(f"BLOCK_{key}_{place}", "TIFF", band) for key in ("OFFSET", "SIZE"))
                if start is None or length is None:  # sparse files omit blocks of zeros
                    continue
                stored.seek(int(start))
                try:
                    zlib.decompress(stored.read(int(length)))
                except zlib.error as error:
                    raise InputError(
                        f"{path} cannot be read as an image: damaged after byte {start}: {error}"
                    ) from None


class _Held(threading.local):
    """Records, per thread, that GDAL's options are set."""

    options = False


_held = _Held()


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Set GDAL's options once for all files read in the block; setting them per file takes longer than reading a small one."""
    if _held.options:
        yield
        return
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    options: dict[str, Any] = {**GDAL_OPTIONS, **s3_endpoint()}
    with warnings.catch_warnings(), rasterio.Env(**options):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        _held.options = True
        try:
            yield
        finally:
            _held.options = False


@contextlib.contextmanager
def open_raster(path: Path | str) -> Iterator[DatasetReader]:
    """Open a raster for reading; turn errors in the block into an InputError that names the file.

    `path`: a text is the name of a remote file for GDAL.
    """
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError
    from rasterio.io import DatasetReader as Reader  # `rasterio.open` sets GDAL's options on each call

    try:
        with many_files(), Reader(str(path)) as file:
            if file.driver not in DRIVERS or file.count == 0:
                raise InputError(f"{path} cannot be read as an image: {file.driver} files are not read.")
            yield file
    except InputError:
        raise
    except (
        RasterioError,
        CPLE_BaseError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        MemoryError,
        OverflowError,
    ) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise InputError(f"{path} cannot be read as an image: {reason}") from None


def header_of(file: DatasetReader) -> Header:
    """Return the header of an open file. Raises InputError if it is damaged or the bands have different types."""
    from rasterio.enums import ColorInterp, MaskFlags

    side, pixels = max(file.height, file.width), file.height * file.width
    if side > LARGEST_SIDE or pixels > MOST_PIXELS or file.count > MOST_BANDS:
        raise InputError(
            f"{file.name} cannot be read as an image: it claims {file.count} bands of {file.height} x {file.width} pixels, "
            "so its header is damaged."
        )
    if len(set(file.dtypes)) > 1:
        raise InputError(
            f"{file.name} has bands of several types ({', '.join(dict.fromkeys(file.dtypes))}), which have no common range; "
            "write them with one type, for example with gdal_translate -ot."
        )
    alpha = file.colorinterp.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in file.colorinterp[1:] else 0
    flags = file.mask_flag_enums[0]
    transform = file.transform
    georeferenced = file.crs is not None or not transform.is_identity
    orientation = 1 if georeferenced else orientation_of(file)
    height, width = TURNS[orientation].size(file.height, file.width)
    bits = file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    return Header(
        height=height,
        width=width,
        bands=file.count - (alpha > 0),
        dtype=file.dtypes[0],
        nodata=tuple(file.nodatavals),
        masked=alpha > 0 or (MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags),
        pixel_size=float(abs(transform.a * transform.e - transform.b * transform.d) ** 0.5) if georeferenced else None,
        palette=file.count - (alpha > 0) == 1 and file.colorinterp[0] == ColorInterp.palette,
        unit=unit_of(file.crs) if georeferenced else None,
        orientation=orientation,
        bits=int(bits) if bits else None,
        alpha=alpha,
    )
