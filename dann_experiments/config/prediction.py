"""All settings of `predict`: the model, the images, and the output of the class maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Literal

from dann_experiments.config import limits
from dann_experiments.config.data import BANDS, MOST_IMAGES, Entry, values_of_nodata
from dann_experiments.config.errors import InputError
from dann_experiments.config.limits import above, at_least, between, matching
from dann_experiments.config.run import MOST_PROCESSES, TrackingConfig
from dann_experiments.config.workers import MOST_GPUS, PoolSettings
from dann_experiments.names import VECTOR_SUFFIXES, Confidence, TestBatchnorm, Tta

DOMAIN = matching(r"(source|target)(\.[A-Za-z0-9][A-Za-z0-9_-]{0,49})?", "source, target, source.NAME or target.NAME")


@dataclass(frozen=True)
class PredictConfig:
    """Class maps of one raster of any size, or of many images."""

    model: str = ""
    """The model: a folder, a file, runs:/ID[/path] or models:/NAME@ALIAS. A checkpoint without the settings of its network needs
    them as a file of settings (`--config`)."""
    source_prefix: str | None = None
    """Prefix of the network's parameter names, such as model or ema_model, in a checkpoint that holds several networks; a full
    stop means names without a prefix. null: take the only network, refuse a file with several."""
    input: str | list[Entry] = ""
    """An image file, a folder (with its subfolders), a pattern such as 'scenes/*.tif', or a list of these. A single text may also
    be a list, separated by commas or blanks, if there is no file of that name. An item {images: [PATTERN, PATTERN]} stacks files
    to the bands of one image, {preset: NAME, root: FOLDER} names all scenes of a preset (docs/bands-in-files.md)."""
    output: str = ""
    """Path of the map: a .tif or .png file. For several images or an input folder: a folder, in which the maps are arranged like
    the images in their common folder."""
    domain: Annotated[str, DOMAIN] = "target"
    """Domain of the images, source or target: the model knows how bands, range and nodata of each are read. target.NAME names one
    of several domains (docs/several-domains.md)."""
    bands: Annotated[list[int] | None, *BANDS] = None
    """Bands to read, in this order, counted from 1 (1,2,3), if the images have other bands than those in training; null = as in
    training."""
    nodata: Literal["file"] | float | list[float] | None = None
    """Pixel value or values without data, which get no class; file: the nodata value of the file. The mask and alpha band of a
    file count as well; []: no values; null = as in training."""
    file_pixel_size: Annotated[float | None, above(0)] = None
    """Pixel size of images that are not georeferenced, for a model trained on pixels of one size; null = as in training."""
    tile_size: Annotated[int, between(16, 16384)] = 512
    """Side of the square, in pixels, that the network sees at a time; rounded up to a size that the network takes."""
    overlap: int | None = None
    """Pixels that neighboring tiles share, at most half a tile; null = a quarter of a tile. 0 = no blending."""
    batch_size: Annotated[int, between(1, MOST_IMAGES)] = 4
    """Tiles per forward pass; a CPU, which is quicker with few, takes no more than have 512 x 512 pixels together."""
    probabilities: bool = False
    """Also write OUTPUT_probabilities.tif, with one band per class: value / 254 = probability."""
    tta: Tta = "none"
    """Test-time augmentation: map the mean of the predictions for mirrored and turned copies of each tile. mirror: the tile and
    its mirror image (2 forward passes), for photographs, in which up is up; d4: all 8 quarter turns and mirror images (8
    forward passes), for images from above."""
    test_batchnorm: TestBatchnorm = "running"
    """BatchNorm statistics of the predictions. running: those of the model; images: those of each image itself, taken in one pass
    over tiles from all over it before its map is made (docs/batchnorm.md)."""
    confidence: Confidence | None = None
    """Also write OUTPUT_confidence.tif, one band of floating-point numbers from 0 to 1. max_probability: the probability of the
    mapped class, 1 = certain; entropy: of the probabilities, divided by its largest value, 0 = certain, 1 = all classes equally
    likely. null: no such file."""
    stac: bool = False
    """Also write OUTPUT.stac.json, a STAC item (version 1.1): place and time of the map, its files, its classes with their
    colors, and a link to the image."""
    stac_datetime: str | None = None
    """When the images were taken, for the STAC items: a date, a time (UTC) or a period (2026-05-01/2026-09-30). null: as the STAC
    item beside an image or its metadata say; an image without a time is refused."""
    vector: str | None = None
    """Also write the map as polygons, with class, area and mean confidence (docs/predict.md). gpkg or geojson: a GeoPackage, or
    GeoJSON in WGS 84, beside each map under its name; for one image also the path of a .gpkg or .geojson file. null: none. Needs
    the extra vector."""
    min_area: Annotated[float, at_least(0)] = 0.0
    """Leave out smaller polygons. In the unit of their column area: the squared unit of the CRS, such as square metres, or
    pixels without georeference. 0 = keep all."""
    simplify: Annotated[float, at_least(0)] = 0.0
    """Simplify outlines of polygons, without gaps and overlaps between neighbors: remove vertices whose triangle with the next
    vertices is smaller than this number of pixels, squared. 1 removes the steps of the pixels; 0 = outlines follow the pixels."""
    overwrite: bool = False
    """Replace an output that exists."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware to compute on; auto: a GPU if there is one."""
    workers: Annotated[int | None, between(1, MOST_PROCESSES)] = None
    """Images mapped at a time, by as many processes, which share the cores; each needs the memory of a prediction. null = one, in
    this process; with launcher ray, as many as fit on the cluster."""
    launcher: Literal["processes", "ray"] = "processes"
    """Where images are mapped. processes: on this machine; ray: on an existing Ray cluster, whose machines share the folders of
    images, maps and model."""
    ray_address: str = "auto"
    """Address of the Ray cluster; auto = the one that this machine belongs to."""
    cpus_per_trial: Annotated[float, above(0)] = 1.0
    """Cores of the Ray cluster per image."""
    gpus_per_trial: Annotated[float | None, between(0, MOST_GPUS)] = None
    """GPUs per image that is mapped; 0.5 = two images share one. null = 1; with launcher ray 0, and no GPU is seen."""
    progress: bool = True
    """Show progress: a bar on a terminal, else a line every 10 %."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def inputs(self) -> list[Entry]:
        """`input` as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    @property
    def nodata_values(self) -> Literal["file"] | tuple[float, ...] | None:
        """`nodata` as a tuple of values, or "file"; None = as in training."""
        return None if self.nodata is None else values_of_nodata(self.nodata)

    @property
    def shared(self) -> int:
        """Pixels that neighboring tiles share: `overlap`, or a quarter of a tile if it is null."""
        return self.tile_size // 4 if self.overlap is None else self.overlap

    @property
    def pool(self) -> PoolSettings:
        """The settings of the worker pool."""
        return PoolSettings(self.workers, self.launcher, self.ray_address, self.cpus_per_trial, self.gpus_per_trial)

    def __post_init__(self) -> None:
        for key, way_out in (
            ("model", "give a folder, a file, runs:/ID or models:/NAME@ALIAS"),
            ("input", "give an image file, a folder of images or a pattern"),
            ("output", "give a .tif or .png file, or a folder for several images"),
        ):
            value = getattr(self, key)
            if not value or (isinstance(value, list) and not all(value)):
                raise InputError(f"{key} is not set; {way_out}.")
        limits.check(self)
        if self.stac_datetime is not None and not self.stac:
            raise InputError("stac_datetime has no effect without stac; set stac to true, or leave it out.")
        self.pool.check_pool()
        formats = [suffix[1:] for suffix in VECTOR_SUFFIXES]
        if (
            self.vector is not None
            and PurePath(self.vector.lower()).suffix[1:] not in formats
            and self.vector.lower() not in formats
        ):
            raise InputError(
                f"vector is {self.vector!r}; give gpkg, geojson, or the path of a {' or '.join(VECTOR_SUFFIXES)} file."
            )
        for key in ("min_area", "simplify"):
            if getattr(self, key) and self.vector is None:
                raise InputError(f"{key} has no effect without vector; remove it, or set vector: gpkg.")
        if not 0 <= self.shared <= self.tile_size // 2:
            raise InputError(
                f"overlap is {self.overlap}; give 0 to {self.tile_size // 2}, half of tile_size ({self.tile_size})."
            )
