"""How the files of one domain become numbers: bands, scale, nodata, resolution. Windows are read, never a large raster whole.

Letters: B bands, h x w pixels of a window. Every window is one of the *working grid*: the file's own pixels, or, where
`pixel_size` asks for it, the grid that they are resampled to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from dann_experiments.config.errors import InputError
from dann_experiments.data.georeference import unit_of
from dann_experiments.data.nodata import NodataBands, all_valid_behind, default_nodata_bands, hides, pixels_behind
from dann_experiments.data.orientation import TURNS, Turn, orientation_of

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# in small letters; the texts of the last two may be compressed
WORDS_OF_A_TURN = (b"exif", b"orientation", b"itxt", b"ztxt")
DRIVERS = ("GTiff", "PNG", "JPEG", "BMP", "WEBP", "GIF", "JP2OpenJPEG", "VRT")  # of GDAL's many
CACHE_MB = 128  # of decoded blocks that GDAL keeps; its own default is a share of the machine's memory
LARGEST_SIDE, MOST_PIXELS, MOST_BANDS = 10**7, 10**12, 4096  # a header that claims more is damaged
LARGEST_CHANGE = 100.0  # of a pixel's side by resampling, either way: more is a mistake in the unit
BLOCK_BYTES = 64 * 2**20  # of full-size pixels that are held at a time to make smaller ones of them
Image.MAX_IMAGE_PIXELS = None  # aerial mosaics are larger than Pillow's guard against decompression bombs
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": CACHE_MB,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a cut off JPEG is an error, not a grey area
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",  # side files are looked for by name; listing a large folder each time is slow
}
TYPE_RANGES = {"uint8": 255.0, "uint16": 65535.0}


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Header:
    """What a raster says of itself before a pixel is read."""

    height: int
    width: int
    bands: int
    """Without an alpha band."""
    dtype: str
    nodata: tuple[float | None, ...]
    """The file's own nodata value of each band, an alpha band included."""
    masked: bool
    """Whether an alpha band or an internal mask says which pixels hold data."""
    pixel_size: float | None
    """Side of a pixel in units of the file's CRS; None = not georeferenced."""
    palette: bool
    """One band of indices into a colour table."""
    unit: str | None = None
    """Unit of `pixel_size`, such as metre or degree; None = not known."""
    orientation: int = 1
    """EXIF orientation, 1 to 8. Height and width are those of the picture as it is shown."""
    bits: int | None = None
    """Bits of a value where they are fewer than its type has (1, 2 and 4 bit PNG, 12 bit TIFF); None = all."""
    alpha: int = 0
    """Number of its alpha band, from 1; 0 = none."""

    @property
    def count(self) -> int:
        """Bands, an alpha band included."""
        return self.bands + (self.alpha > 0)

    @property
    def data_bands(self) -> list[int]:
        """Numbers of the bands without the alpha band, from 1."""
        return [band for band in range(1, self.count + 1) if band != self.alpha]

    @property
    def turn(self) -> Turn:
        """How the stored pixels are turned to be shown."""
        return TURNS[self.orientation]


@dataclass(frozen=True)
class Reading:
    """How the images of one domain are read."""

    bands: tuple[int, ...] | None = None
    """Which bands in which order, from 1; None = all."""
    scale: Literal["type", "percentiles"] | tuple[float, float] = "type"
    """What becomes 0..1: the type's range, the 2nd to 98th percentile of the training windows a band, or a range."""
    nodata: Literal["file"] | tuple[float, ...] = "file"
    """Values that mean "no data": the file's own (value, mask or alpha), or these. NaN always does."""
    pixel_size: float | None = None
    """Side of a pixel of the working grid; None = the file's pixels."""
    file_pixel_size: float | None = None
    """Side of the files' pixels, same unit; None = from their georeference."""
    nodata_bands: NodataBands | None = None
    """Whether a pixel lacks data where any of its bands holds a nodata value, or where all do; None = by the type."""
    unit: str | None = None
    """Unit of `pixel_size`: that of the files it was set for; None = not known yet, or no georeference has to tell."""
    settings: str = field(default="", compare=False, repr=False)
    """What stands before the names of these settings in the job at hand, for messages: data.target., or nothing where a
    finished model is only used. No part of how images are read."""

    @property
    def is_finished(self) -> bool:
        """Whether a finished model is used, whose network and scale nothing changes any more."""
        return not self.settings

    def factor(self, header: Header, path: Path) -> float:
        """File pixels a pixel of the working grid, along a side."""
        if self.pixel_size is None:
            return 1.0
        own = self.file_pixel_size or header.pixel_size
        if own is None:
            raise InputError(
                f"image {path} has no georeference that tells its pixel size, but {self._working_size()}; give "
                f"{self.settings}file_pixel_size, the side of its pixels."
            )
        unit = None if self.file_pixel_size else header.unit
        shown = f"{own:g} {unit}" if unit else f"{own:g}"
        if self.unit is not None and unit is not None and self.unit != unit:
            raise InputError(
                f"image {path} has pixels of {shown}, but {self._working_size()}, set for files in {self.unit}; reproject the "
                "files to one CRS (for example with gdalwarp)."
            )
        if not own / LARGEST_CHANGE <= self.pixel_size <= own * LARGEST_CHANGE:
            ratio = max(own / self.pixel_size, self.pixel_size / own)
            made = "each would be cut into" if self.pixel_size < own else "one would be made of"
            wrong = "file_pixel_size" if self.is_finished or self.file_pixel_size else "pixel_size"
            raise InputError(
                f"image {path} has pixels of {shown}, but {self._working_size()}: {made} {ratio:.4g} along a side, more than "
                f"{LARGEST_CHANGE:g}. Give {self.settings}{wrong} in the unit of the file's CRS{f', {unit}' if unit else ''}."
            )
        return self.pixel_size / own

    def _working_size(self) -> str:
        if self.is_finished:
            return f"the model works on pixels of {self.pixel_size:g}"
        return f"{self.settings}pixel_size is {self.pixel_size:g}"

    def grid_size(self, header: Header, path: Path) -> tuple[int, int]:
        """(height, width) of the working grid."""
        factor = self.factor(header, path)
        return max(round(header.height / factor), 1), max(round(header.width / factor), 1)

    def may_lack_data(self, header: Header) -> bool:
        """Whether pixels without data are possible, so that validity has to be read."""
        if header.dtype.startswith("float"):
            return True
        if self.nodata == ():
            return False
        return header.masked or self.nodata != "file" or any(value is not None for value in header.nodata)

    def nodata_of(self, header: Header, bands: Sequence[int]) -> list[list[float]]:
        """Return the nodata values of each of `bands` (from 1), NaN aside, which always is one."""
        if self.nodata != "file":
            return [[value for value in self.nodata if value == value]] * len(bands)
        own = [header.nodata[band - 1] for band in bands]
        return [[] if value is None or value != value else [value] for value in own]


@dataclass(frozen=True)
class Normalisation:
    """From stored values to what the network sees: (value - low) / (high - low), within 0..1, then (x - mean) / std.

    One number a band in each.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """(B, h, w) float32 in 0..1 from stored values; NaN stays NaN."""
        low, high = (np.array(side, np.float32)[:, None, None] for side in (self.low, self.high))
        result = values.astype(np.float32)
        result -= low
        result /= high - low
        return np.clip(result, 0.0, 1.0, out=result)

    def __call__(self, values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """(B, h, w) float32 for the network; pixels that are not `valid` (h, w) become 0, the mean."""
        result = self.scaled(values)
        result -= np.array(self.mean, np.float32)[:, None, None]
        result /= np.array(self.std, np.float32)[:, None, None]
        if valid is not None:
            result[:, ~valid] = 0.0
        return result


def for_file(normalisation: Normalisation, reading: Reading, header: Header) -> Normalisation:
    """With the range of the file's values as low and high, where `scale` says that the file's type tells it."""
    if reading.scale != "type":
        return normalisation
    bands = len(normalisation.mean)
    return dataclasses.replace(normalisation, low=(0.0,) * bands, high=(largest_value(header),) * bands)


def largest_value(header: Header) -> float:
    """Return the end of the range that `scale: type` means: of 1, 2 and 4 bit images 1, 3 and 15, else that of the type."""
    few = header.bits is not None and header.bits < 8 and not header.palette
    return float(2**header.bits - 1) if few and header.bits is not None else TYPE_RANGES[header.dtype]


def reading_facts(reading: Reading, normalisation: Normalisation) -> dict[str, Any]:
    """Both as plain values, to be kept with a model."""
    return plain_reading(reading) | dataclasses.asdict(normalisation)


def plain_reading(reading: Reading) -> dict[str, Any]:
    """All that decides how images are read."""
    return {name: value for name, value in dataclasses.asdict(reading).items() if name != "settings"}


def reading_from_facts(facts: Mapping[str, Any]) -> tuple[Reading, Normalisation]:
    """What `reading_facts` took apart. Raises InputError for anything else."""

    def made(cls: Any) -> Any:
        names = {item.name for item in dataclasses.fields(cls)} - {"settings"}
        return cls(**{
            name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name in names
        })  # fmt: skip

    try:
        facts = {"nodata_bands": "all", **facts}  # as models read their images before there was a choice
        return made(Reading), made(Normalisation)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the model's notes on how its images are read cannot be used: {error}") from None


class Pixels(NamedTuple):
    """What a window holds."""

    values: np.ndarray
    """(B, h, w) as stored."""
    valid: np.ndarray | None
    """(h, w) bool, True where there is data; None = everywhere."""


def read_header(path: Path) -> Header:
    """Size, bands, type, nodata and resolution, without reading pixels. Raises InputError for what is no image."""
    with open_raster(path) as file:
        return header_of(file, path)


def header_of(file: DatasetReader, path: Path, content: bytes | None = None) -> Header:
    """`read_header` of a file that is open; `content`: its bytes, if somebody has them."""
    if file.driver == "PNG" and not (content is not None and _is_whole(io.BytesIO(content))):
        try:
            _verify(path)
        except Exception as error:  # Pillow raises many kinds for broken files
            raise InputError(f"{path} cannot be read as an image: {error}") from None
    # metadata of cameras and scanners has one of these words; to look for them takes less than to open the file once more
    upright = content is not None and file.driver != "GTiff"
    if content is not None and upright:
        small = content.lower()
        upright = not any(word in small for word in WORDS_OF_A_TURN)
    return _header(file, upright)


def _verify(stored: Path | io.BytesIO) -> None:
    """GDAL fills what a cut off PNG lacks without a word; Pillow raises."""
    with Image.open(stored, formats=["PNG"]) as image:
        image.verify()


def _is_whole(stored: io.BytesIO) -> bool:
    try:
        _verify(stored)
    except Exception:  # told by the file's name, by whoever asks again
        return False
    return True


def read_pixels(
    path: Path, in_channels: int, reading: Reading, window: Window | None = None, header: Header | None = None,
    file: DatasetReader | None = None,
) -> Pixels:  # fmt: skip
    """A window of the working grid (None = all of it) with the bands that `reading` chooses; `header` if it is known, `file` if
    it is open.

    Raises InputError for an unreadable file, for bands that are not there, and for another number of them than
    `in_channels`. One grey band among colour images is repeated to three; a palette becomes its colours.
    """
    with _opened(path, file) as file:
        header = header or _header(file)
        chosen = chosen_bands(path, header, reading, in_channels)
        height, width = reading.grid_size(header, path)
        window = window or Window(0, 0, height, width)
        factor = reading.factor(header, path)
        values = _read(file, chosen, window, factor, header, smooth=True)
        valid = _valid(file, header, chosen, reading, window, factor, values)
        if header.palette and in_channels == 3 and reading.bands is None:
            values = colours_of(values[0], file.colormap(1))
        elif len(chosen) == 1 and in_channels == 3 and reading.bands is None:
            values = values.repeat(3, axis=0)
    return Pixels(np.ascontiguousarray(values), valid)


class StoredLabels(NamedTuple):
    """What a mask file holds."""

    values: np.ndarray
    """(bands, h, w) as stored."""
    palette: dict[int, Any] | None
    """Its color table."""
    hidden: np.ndarray | None
    """(h, w) bool, True where the file says that there is no label: its nodata value, its mask or alpha band, NaN; None =
    nowhere."""
    transparent: bool
    """Whether `hidden` is the transparency of a picture (PNG, GIF, WebP), which may be there for looks alone."""


def read_labels(
    path: Path, window: Window | None = None, factor: float = 1.0, header: Header | None = None,
    file: DatasetReader | None = None,
) -> StoredLabels:  # fmt: skip
    """A window of a mask, of which the nearest pixel is taken. `factor`: file pixels a pixel of the working grid. `header` if it
    is known, `file` if it is open."""
    with _opened(path, file) as file:
        header = header or _header(file)
        if header.bands > 4:
            raise InputError(f"mask {path} has {header.bands} bands; masks hold one class id a pixel, or a colour.")
        whole = Window(0, 0, max(round(header.height / factor), 1), max(round(header.width / factor), 1))
        window = window or whole
        bands = header.data_bands
        values = _read(file, bands, window, factor, header, smooth=False)
        return StoredLabels(
            values, file.colormap(1) if header.palette else None, _hidden(file, header, values, window, factor),
            file.driver in ("PNG", "GIF", "WEBP"),
        )  # fmt: skip


def changes_values(file: DatasetReader) -> bool:
    """Whether the file is compressed with loss, as far as it says so."""
    facts = file.tags(ns="IMAGE_STRUCTURE")
    of_jpeg = facts.get("COMPRESSION", "") in ("JPEG", "YCbCr JPEG")
    said = facts.get("COMPRESSION_REVERSIBILITY", "").startswith("LOSSY") or float(facts.get("MAX_Z_ERROR", 0)) > 0
    return file.driver == "JPEG" or of_jpeg or said


def _hidden(
    file: DatasetReader, header: Header, values: np.ndarray, window: Window, factor: float
) -> np.ndarray | None:
    """Where a mask itself says that there is no label."""
    hidden = np.zeros(values.shape[1:], bool)
    if values.dtype.kind == "f":
        hidden |= np.isnan(values).all(0)  # an infinite id is a mistake, not a hole
    own = [[] if value is None else [value] for value in (header.nodata[band - 1] for band in header.data_bands)]
    if any(own):
        hidden |= hides(values, own, "all")
    if header.masked:
        hidden |= _masked(file, header, window, factor)
    return hidden if hidden.any() else None


def check_deflated(path: Path) -> None:
    """Raises InputError for a deflated TIFF that fails its own checksums. GDAL does not look at them: it reads whatever a
    damaged stream gives."""
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
                if start is None or length is None:  # a sparse file leaves out blocks of zeros
                    continue
                stored.seek(int(start))
                try:
                    zlib.decompress(stored.read(int(length)))
                except zlib.error as error:
                    raise InputError(
                        f"{path} cannot be read as an image: damaged after byte {start}: {error}"
                    ) from None


def colours_of(indices: np.ndarray, palette: Mapping[int, Sequence[int]]) -> np.ndarray:
    """(3, h, w) uint8: what a palette's indices (h, w; 8 or 16 bit) stand for; black where it names none."""
    table = np.zeros((max(256, *palette, int(indices.max(initial=0)) + 1) + 1, 3), np.uint8)
    for index, colour in palette.items():
        table[index] = colour[:3]
    return table[indices].transpose(2, 0, 1)


def chosen_bands(path: Path, header: Header, reading: Reading, in_channels: int) -> list[int]:
    """Indices from 1 of the bands to read; raises InputError where they are not there or not `in_channels` many."""
    chosen = list(reading.bands or header.data_bands)
    has = f"image {path} has {header.bands} band{'s' * (header.bands != 1)}"
    if header.alpha:
        has += " and an alpha band"
    key = "--bands" if reading.is_finished else f"{reading.settings}bands"
    total = header.count
    if max(chosen) > total:
        its = "the bands to read are" if reading.is_finished else f"{key} is"
        raise InputError(f"{has}, but {its} {chosen}; choose from 1 to {total} with {key}.")
    if reading.bands is None and header.bands == 1 and in_channels == 3:
        return chosen
    if len(chosen) != in_channels:
        read = "" if reading.bands is None else f", of which {chosen} are read"
        takes = f"the {'model' if reading.is_finished else 'network'} takes {in_channels}"
        if reading.bands is None and in_channels == 3 and _is_cmyk(path):
            raise InputError(f"image {path} is in CMYK, the inks of print, but {takes} bands; convert it to RGB.")
        way_out = f"choose {in_channels} of them with {key}"
        if in_channels <= 8:
            example = range(1, in_channels + 1)
            way_out += f" {','.join(map(str, example))}" if reading.is_finished else f", for example {list(example)}"
        if header.alpha and total == in_channels:
            every = range(1, total + 1)
            given = ",".join(map(str, every)) if reading.is_finished else str(list(every))
            way_out = (
                f"if band {header.alpha} holds data and is only marked as alpha, as many writers mark a fourth 8 bit "
                f"band, name all with {key} {given}; else {way_out}"
            )
        elif header.bands < in_channels:
            way_out = "give images with all bands" + " that it was trained on" * reading.is_finished
        if not reading.is_finished:
            way_out += f", or train a network of {len(chosen)} (model.in_channels {len(chosen)})"
        raise InputError(f"{has}{read}, but {takes}; {way_out}.")
    return chosen


def _is_cmyk(path: Path) -> bool:
    """Whether the first bands of a file are inks; of 8 bit GDAL makes colours of them by itself."""
    from rasterio.enums import ColorInterp

    with open_raster(path) as file:
        return ColorInterp.cyan in file.colorinterp


def check_type(path: Path, header: Header, reading: Reading) -> None:
    """Raises InputError for values whose range nobody said, and for types that hold no image."""
    if not header.dtype.startswith(("uint", "int", "float")):  # GDAL has types that numpy lacks
        raise InputError(f"image {path} holds {header.dtype} values; whole and floating point numbers are read.")
    if reading.scale == "type" and header.dtype not in TYPE_RANGES:
        if reading.is_finished:
            raise InputError(
                f"image {path} holds {header.dtype} values, but the model was trained on images of 8 or 16 bit, read by the "
                "range of that type; convert the image to what the training images were."
            )
        raise InputError(
            f"image {path} holds {header.dtype} values, whose range is not known; set {reading.settings}scale to "
            "[LOW, HIGH] or percentiles."
        )


class _Held(threading.local):
    """Whether GDAL's settings stand already in this thread."""

    options = False


_held = _Held()


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Around the reading of many files: GDAL's settings are made once, not for each file, which takes longer than to read a
    small one."""
    if _held.options:
        yield
        return
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings(), rasterio.Env(**GDAL_OPTIONS):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        _held.options = True
        try:
            yield
        finally:
            _held.options = False


@contextlib.contextmanager
def open_raster(path: Path) -> Iterator[DatasetReader]:
    """A raster open for reading; whatever goes wrong in the block is an InputError that names the file."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError
    from rasterio.io import DatasetReader as Reader  # `rasterio.open` makes GDAL's settings anew at each call

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


def _opened(path: Path, file: DatasetReader | None) -> contextlib.AbstractContextManager[DatasetReader]:
    """The file, which stays open if it is."""
    return open_raster(path) if file is None else contextlib.nullcontext(file)


def _header(file: DatasetReader, upright: bool = False) -> Header:
    """`upright`: it is known to have no orientation tag."""
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
    orientation = 1 if upright else orientation_of(file)
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


def _read(
    file: DatasetReader, bands: Sequence[int], window: Window, factor: float, header: Header, smooth: bool
) -> np.ndarray:
    """(bands, h, w) of a window of the working grid."""
    from rasterio.enums import Resampling

    bands = list(bands)
    if factor == 1.0:
        return _stored(file, bands, window, header)
    way = Resampling.nearest
    if smooth and not header.palette:
        way = Resampling.average if factor > 1 else Resampling.bilinear
    shape = (window.height, window.width)
    box = header.turn.stored(_span(window, factor, header), header.height, header.width)
    # reduced copies inside or beside the file (overviews, wavelets of JPEG 2000) need not be averages of its pixels, and those
    # of a mask can hold ids that are not in it; a VRT asks its sources for theirs, whatever it says of itself
    own_sizes = factor > 1 and (file.driver == "VRT" or bool(file.overviews(bands[0])))
    # GDAL would leave out of an average what the file hides, which may count as data: `nodata` and `nodata_bands` decide that
    hiding = way != Resampling.nearest and (header.masked or any(value is not None for value in header.nodata))
    if own_sizes or hiding:
        values = _reduced(file, bands, header, box, header.turn.size(*shape), way)
    else:
        values = file.read(
            bands, window=_box(*box), out_shape=(len(bands), *header.turn.size(*shape)), resampling=way
        )  # fmt: skip
    return header.turn.shown(values)


def _span(window: Window, factor: float, header: Header) -> tuple[float, float, float, float]:
    """(top, left, height, width) in pixels of the file of a window of the working grid, whose last row and column end with it."""
    top, left = window.top * factor, window.left * factor
    return (
        top, left, min(window.height * factor, header.height - top), min(window.width * factor, header.width - left)
    )  # fmt: skip


def _stored(file: DatasetReader, bands: list[int], window: Window, header: Header) -> np.ndarray:
    """(bands, h, w) of the file's own pixels, as they are shown."""
    if window == (0, 0, header.height, header.width):  # what rasterio does about windows takes time
        return header.turn.shown(file.read(bands))
    return header.turn.shown(file.read(bands, window=_box(*header.turn.stored(window, header.height, header.width))))


def _masked(file: DatasetReader, header: Header, window: Window, factor: float) -> np.ndarray:
    """(h, w) bool of the working grid, nearest pixel: where an alpha band is 0 or a mask inside the file hides pixels.

    The alpha band itself is read: GDAL passes it over in a file that has a nodata value as well.
    """
    if factor != 1.0:
        box = _span(window, factor, header)
        rows, columns = (
            np.minimum((box[side] + (np.arange(count) + 0.5) * box[side + 2] / count).astype(int), size - 1)
            for side, count, size in ((0, window.height, header.height), (1, window.width, header.width))
        )
        top, left = int(rows[0]), int(columns[0])
        around = Window(top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1)
        return _masked(file, header, around, 1.0)[np.ix_(rows - top, columns - left)]
    if header.alpha:
        return _stored(file, [header.alpha], window, header)[0] == 0
    box = header.turn.stored(window, header.height, header.width)
    return header.turn.shown(file.read_masks(1, window=_box(*box))) == 0


def _reduced(
    file: DatasetReader, bands: list[int], header: Header, box: tuple[float, float, float, float],
    shape: tuple[int, int], way: Any,
) -> np.ndarray:  # fmt: skip
    """(bands, *shape) of a stored box (top, left, height, width), made of the pixels at full size, some rows at a time."""
    from rasterio.io import MemoryFile

    top, left, height, width = box
    step = height / shape[0]
    margin = 0 if step >= 1 else 2  # pixels that smaller ones are interpolated from as well
    first_column = max(int(left) - margin, 0)
    last_column = min(int(np.ceil(left + width - 1e-9)) + margin, file.width)
    line = len(bands) * np.dtype(header.dtype).itemsize * (last_column - first_column) * step
    rows_at_a_time = max(int(BLOCK_BYTES / line), 1)
    parts = []
    for row in range(0, shape[0], rows_at_a_time):
        rows = min(rows_at_a_time, shape[0] - row)
        begin, end = top + row * step, top + (row + rows) * step
        first, last = max(int(begin) - margin, 0), min(int(np.ceil(end - 1e-9)) + margin, file.height)
        pixels = file.read(bands, window=_box(first, first_column, last - first, last_column - first_column))
        profile = {
            "driver": "GTiff", "count": len(bands), "height": pixels.shape[1], "width": pixels.shape[2],
            "dtype": pixels.dtype, "photometric": "MINISBLACK", "BIGTIFF": "IF_SAFER",
        }  # fmt: skip
        with MemoryFile() as memory:
            with memory.open(**profile) as copy:
                copy.write(pixels)
            with memory.open() as copy:
                inside = (begin - first, left - first_column, min(end, last) - begin, min(width, last_column - left))
                parts.append(copy.read(window=_box(*inside), out_shape=(len(bands), rows, shape[1]), resampling=way))
    return np.concatenate(parts, axis=1)


def _box(top: float, left: float, height: float, width: float) -> Any:
    from rasterio.windows import Window as FileWindow

    return FileWindow(left, top, width, height)  # pyright: ignore[reportCallIssue]


def _valid(
    file: DatasetReader, header: Header, bands: Sequence[int], reading: Reading, window: Window, factor: float,
    values: np.ndarray,
) -> np.ndarray | None:  # fmt: skip
    """Where there is data: not where a band is NaN or infinite, nor where bands hold nodata values (`nodata_bands`: any or all
    of them), nor where the file's own mask or alpha band hides a pixel."""
    if not reading.may_lack_data(header):
        return None
    if factor == 1.0:
        valid = _holds_data(file, header, bands, reading, window, values)
        return None if valid.all() else valid
    # Validity of the file's pixels: a resampled one is valid only if all that it is made of are. Some rows at a time, as the
    # file's pixels may be many for each of the working grid's.
    top, left = max(int(window.top * factor) - 1, 0), max(int(window.left * factor) - 1, 0)
    bottom = min(int(np.ceil((window.top + window.height) * factor)) + 1, header.height)
    right = min(int(np.ceil((window.left + window.width) * factor)) + 1, header.width)
    box = _span(window, factor, header)
    begins, ends = pixels_behind(box[0], box[2], window.height, top, bottom)
    columns = pixels_behind(box[1], box[3], window.width, left, right)
    columns = columns[0] - left, columns[1] - left
    rows_at_a_time = max(int(BLOCK_BYTES / (values.itemsize * len(bands) * (right - left) * factor)), 1)
    parts = []
    for row in range(0, window.height, rows_at_a_time):
        begin, end = begins[row : row + rows_at_a_time], ends[row : row + rows_at_a_time]
        around = Window(int(begin[0]), left, int(end[-1] - begin[0]), right - left)
        own = _holds_data(file, header, bands, reading, around, _stored(file, list(bands), around, header))
        parts.append(all_valid_behind(own, (begin - around.top, end - around.top), columns))
    valid = np.concatenate(parts)
    return None if valid.all() else valid


def _holds_data(
    file: DatasetReader, header: Header, bands: Sequence[int], reading: Reading, window: Window, own: np.ndarray
) -> np.ndarray:
    """(h, w) bool of a window of the file's own pixels (bands, h, w): where there is data."""
    valid = np.ones(own.shape[1:], bool)
    if own.dtype.kind == "f":
        valid &= np.isfinite(own).all(0)
    alpha_is_data = header.alpha in bands
    if header.masked and not alpha_is_data and reading.nodata != ():
        valid &= ~_masked(file, header, window, 1.0)
    nodata = reading.nodata_of(header, bands)
    if any(nodata):
        valid &= ~hides(own, nodata, reading.nodata_bands or default_nodata_bands(header.dtype))
    return valid
