"""Compare exported files with the networks: largest difference of a logit, and pixels of another class, on drawn and real tiles.

python -m benchmarks.export [--trees FOLDER] [--networks unet/resnet18 ...]    # 4 min on one core
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch import Tensor

from dann_experiments.checkpoints.trained_model import Model, model_digest
from dann_experiments.config import InputError
from dann_experiments.data.reading import Normalization, Reading
from dann_experiments.models.networks import build_network, logits_of_any_size
from dann_experiments.prediction import standalone_files as files
from dann_experiments.prediction.standalone import Standalone, stride_of

NETWORKS = (
    "unet/resnet18", "unetplusplus/resnet18", "manet/resnet18", "linknet/resnet18", "deeplabv3/resnet18",
    "deeplabv3plus/mobilenet_v2", "fpn/tu-mobilenetv3_small_050", "pspnet/resnet18", "upernet/tu-convnext_atto",
    "segformer/mit_b0", "pan/resnet18", "dpt/tu-vit_tiny_patch16_224",
)  # fmt: skip
SIZES = ((1, 64, 64), (3, 96, 160), (2, 256, 128))
REAL_SIZES = ((128, 128), (320, 256))
FIXED = 224
BYTES = Normalization((0.0,) * 3, (255.0,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Logits(Standalone):
    """As exported, but for the softmax."""

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trees", type=Path, help="folder of shared/data/neon_trees, for real tiles")
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | stride | file | sizes | largest logit | largest difference | other class | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in given.networks:
        arch, _, encoder = name.partition("/")
        torch.manual_seed(0)
        network = build_network(arch, encoder, None, 3, 4, {}).eval()
        names = ("a", "b", "c", "d")
        model = Model(network, names, 3, Reading(), BYTES, model_digest(network, names), None)
        for suffix in (".onnx", ".pt2"):
            print(row(name, model, suffix, given.trees), flush=True)


def row(name: str, model: Model, suffix: str, trees: Path | None) -> str:
    """Return a line of the table: of a file for any size or, if that cannot be, for one."""
    try:
        return _row(name, model, suffix, trees, None)
    except InputError:
        return _row(name, model, suffix, trees, FIXED)


def _row(name: str, model: Model, suffix: str, trees: Path | None, tile: int | None) -> str:
    start = time.perf_counter()
    graph = files.traced(Logits(model, tile is None), 3, tile, stride_of(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        if suffix == ".onnx":
            files.write_onnx(graph, path, {}, {})
            run = files.opened_onnx(path)
        else:
            files.write_pt2(graph, path, {})
            run = files.opened_pt2(path)
        seconds = time.perf_counter() - start
        farthest = largest = 0.0
        other = seen = 0
        for images in _tiles(model, trees, tile):
            with torch.no_grad():
                normalized = np.stack([model.normalisation(image) for image in images])
                expected = logits_of_any_size(model.network, torch.from_numpy(normalized)).numpy()
            found = run(images)
            farthest = max(farthest, float(np.abs(found - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
            other += int((found.argmax(1) != expected.argmax(1)).sum())
            seen += expected[:, 0].size
    sizes = "any" if tile is None else f"{tile} x {tile}"
    facts = (
        name,
        stride_of(model),
        suffix,
        sizes,
        f"{largest:.2g}",
        f"{farthest:.1e}",
        f"{other} of {seen}",
        f"{seconds:.0f}",
    )
    return f"| {' | '.join(map(str, facts))} |"


def _tiles(model: Model, trees: Path | None, tile: int | None) -> Iterator[np.ndarray]:
    yield from files.drawn_images(model, SIZES if tile is None else [(2, tile, tile)], 16)
    if trees is None:
        return
    for height, width in REAL_SIZES if tile is None else ((tile, tile),):
        tiles = []
        for path in sorted(trees.glob("*/images/*.png")):
            with rasterio.open(path) as file:
                tiles.append(file.read([1, 2, 3], window=((0, height), (0, width))))
        yield np.stack(tiles).astype(np.float32)


if __name__ == "__main__":
    main()
