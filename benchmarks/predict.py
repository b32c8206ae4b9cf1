"""What `predict` costs beside the network alone, and that its memory does not grow with the raster.

    python benchmarks/predict.py [--write] [--speed-only | --memory-only | --tta-only]
    python benchmarks/predict.py --against-earlier 4000 12000 [--monai FOLDER] [--turns 3] [--write]

Whole predictions in a temporary folder with its own store; about 12 minutes on two idle cores, of which the 12,000 pixels
square take most. --write puts the tables into docs/performance.md. --against-earlier maps rasters of these sizes in turn with the
commit from which the goals are counted, and with --monai, the folder of `pip install --no-deps --target FOLDER monai`, with
MONAI's sliding_window_inference as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import segmentation_models_pytorch as smp
import torch
from earlier import BEFORE, earlier_version, environment_of
from pages import circumstances, put
from rasterio.windows import Window

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from dann_experiments.checkpoints.saved_model import save_model  # noqa: E402
from dann_experiments.config.parsing import load_settings  # noqa: E402
from dann_experiments.config.prediction import PredictConfig  # noqa: E402
from dann_experiments.data.reading import Normalization, Reading, reading_facts  # noqa: E402
from dann_experiments.jobs.predict import predict  # noqa: E402
from dann_experiments.prediction.tiling import Plan, grid_stride, plan_tiles  # noqa: E402

THIN = "Unet resnet18, 3 stages"
NETWORKS = {
    "Unet resnet18": {"encoder_name": "resnet18"},
    THIN: {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8]},
}
CLASSES = 4
SPEED_SIZE, ROUNDS = 2000, 3
MEMORY_SIZES = (4000, 12_000)
TTA_SIZE = 1000
TTA_WAYS: list[dict[str, str]] = [
    {"tta": "none"}, {"tta": "none", "confidence": "entropy"}, {"tta": "mirror"}, {"tta": "d4"},
]  # fmt: skip
CHILD = "import sys; sys.path[:0] = {paths}; from predict import measured; measured({size})"


def save_networks() -> None:
    """Random weights: what they say does not matter here."""
    normalisation = Normalization((0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    for name, arguments in NETWORKS.items():
        torch.manual_seed(0)
        arguments = {**arguments, "in_channels": 3, "classes": CLASSES}
        network = smp.create_model("unet", encoder_weights=None, **arguments)
        facts = {
            "class_names": [f"class_{index}" for index in range(CLASSES)],
            "ignore_index": 255,
            "reading": {"target": reading_facts(Reading(), normalisation)},
        }
        save_model(name, network, "unet", arguments, facts)


def write_raster(size: int) -> None:
    """A GeoTIFF of noise in 8 pixel patches, written strip by strip."""
    rng = np.random.default_rng(0)
    with rasterio.open(
        f"{size}.tif", "w", driver="GTiff", height=size, width=size, count=3, dtype="uint8", tiled=True, blockxsize=512,
        blockysize=512, compress="deflate", crs="EPSG:32633", transform=rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6),
    ) as file:  # fmt: skip
        for top in range(0, size, 512):
            height = min(512, size - top)
            patches = rng.integers(0, 256, (3, -(-height // 8), -(-size // 8)), dtype=np.uint8)
            file.write(patches.repeat(8, 1).repeat(8, 2)[:, :height, :size], window=Window(0, top, size, height))  # pyright: ignore[reportCallIssue]


def run(network: str, size: int, **more: str) -> float:
    """Pixels a second of a whole prediction: reading, forwarding, blending and writing, without loading the model."""
    given = {
        "model": network,
        "input": f"{size}.tif",
        "output": f"{size}_map.tif",
        "overwrite": True,
        "progress": False,
        **more,
    }
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return predict(load_settings(PredictConfig, None, given)).metrics["predict/pixels_per_second"]


def plan_of(network: torch.nn.Module, size: int) -> tuple[Plan, int]:
    """The tiles of a square raster by default, and the default size of a batch."""
    settings = PredictConfig(model="-", input="-", output="-")
    return plan_tiles(size, size, settings.tile_size, settings.shared, grid_stride(network)), settings.batch_size


def bare_seconds(network: torch.nn.Module, size: int, device: torch.device) -> float:
    """The forwards that a prediction takes, of the same number of tiles in the same batches, and nothing else."""
    plan, batch_size = plan_of(network, size)
    rows, columns = len(plan.rows.starts), len(plan.columns.starts)
    batches = [min(batch_size, columns - start) for start in range(0, columns, batch_size)] * rows
    images = torch.randn(batch_size, 3, plan.rows.tile, plan.columns.tile, device=device)
    network.eval().to(device)
    with torch.inference_mode():
        network(images)
        start = time.perf_counter()
        for batch in batches:
            network(images[:batch])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def speed() -> str:
    """Rounds of both, one after the other, so that what else the machine does meets both."""
    write_raster(SPEED_SIZE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, arguments in NETWORKS.items():
        network = smp.create_model("unet", encoder_weights=None, in_channels=3, classes=CLASSES, **arguments)
        run(name, SPEED_SIZE)  # whatever is imported or compiled at first use
        whole, bare = [], []
        for _ in range(ROUNDS):
            whole.append(SPEED_SIZE**2 / run(name, SPEED_SIZE))
            bare.append(bare_seconds(network, SPEED_SIZE, device))
        ratios = [alone / all_of_it for alone, all_of_it in zip(bare, whole, strict=True)]
        rows.append(
            f"| {name} | {SPEED_SIZE**2 / statistics.median(whole) / 1e6:.2f} | {statistics.median(bare):.1f} | "
            f"{statistics.median(whole):.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
        print(rows[-1], flush=True)
    head = "| network | million pixels a second | bare forwards, s | predict, s | ratio (spread) |\n|---|---|---|---|---|\n"
    return (
        f"**predict against the bare network**, {SPEED_SIZE} x {SPEED_SIZE} pixels on {device.type}, median of {ROUNDS} "
        "rounds\n\n" + head + "\n".join(rows)
    )


def tta() -> str:
    """Rounds of all ways, one after the other; each is divided by the first of its round."""
    write_raster(TTA_SIZE)
    name = THIN
    run(name, TTA_SIZE)
    seconds = np.array([[TTA_SIZE**2 / run(name, TTA_SIZE, **way) for way in TTA_WAYS] for _ in range(ROUNDS)])
    ratios = seconds / seconds[:, :1]
    rows = [
        f"| {', '.join(f'`{key}: {value}`' for key, value in way.items())} | {np.median(seconds[:, index]):.1f} | "
        f"{np.median(ratios[:, index]):.2f} ({ratios[:, index].min():.2f} to {ratios[:, index].max():.2f}) |"
        for index, way in enumerate(TTA_WAYS)
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = "| settings | predict, s | ratio (spread) |\n|---|---|---|\n"
    return (
        f"**Test-time augmentation and confidence**, {name}, {TTA_SIZE} x {TTA_SIZE} pixels on {device}, median of {ROUNDS} "
        "rounds\n\n" + head + "\n".join(rows)
    )


def measured(size: int) -> None:
    """In a process of its own: predict, and print its peak memory (MB) and speed."""
    report(run(THIN, size))


def measured_monai(size: int, folder: str) -> None:
    """The same with MONAI at our tiles: the raster is read at once, and its map is not written."""
    sys.path.append(folder)
    from monai.inferers.utils import sliding_window_inference  # pyright: ignore[reportMissingImports]

    network = smp.create_model("unet", encoder_weights=None, in_channels=3, classes=CLASSES, **NETWORKS[THIN]).eval()
    plan, batch_size = plan_of(network, size)
    start = time.perf_counter()
    with rasterio.open(f"{size}.tif") as file, torch.inference_mode():
        image = torch.from_numpy(file.read()).float()[None].div_(255).sub_(0.5).div_(0.25)
        tile = (plan.rows.tile, plan.columns.tile)
        shared = PredictConfig(model="-", input="-", output="-").shared
        logits = sliding_window_inference(
            image, tile, batch_size, network, [shared / side for side in tile], "gaussian"
        )
        assert isinstance(logits, torch.Tensor)
        logits.max(1).indices.to(torch.uint8).numpy()
    report(size**2 / (time.perf_counter() - start))


def report(pixels: float) -> None:
    # getrusage would count the process that started this one, too
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(json.dumps([int(peak.group(1)) / 1024, pixels]))


def in_child(environment: dict[str, str], code: str) -> tuple[float, float]:
    """Peak memory (MB) and pixels a second that a child prints."""
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    peak, pixels = json.loads(done.stdout.splitlines()[-1])
    return peak, pixels


def against_others(sizes: list[int], turns: int, monai: Path | None) -> str:
    """Ours, the earlier commit and MONAI, one after the other in each turn, a process each."""
    rows = []
    with earlier_version() as earlier:
        sides = {
            "ours": (environment_of(PROJECT), "from predict import measured; measured({size})"),
            f"at {BEFORE}": (environment_of(earlier), "from predict import measured; measured({size})"),
        }
        if monai is not None:
            code = f"from predict import measured_monai; measured_monai({{size}}, {str(monai)!r})"
            sides["MONAI"] = (environment_of(PROJECT), code)
        for size in sizes:
            write_raster(size)
            found = {name: [] for name in sides}
            for _ in range(turns):
                for name, (environment, code) in sides.items():
                    found[name].append(in_child(environment, code.format(size=size)))
                    print(size, name, found[name][-1], flush=True)
            for name, pairs in found.items():
                ratios = [mine[1] / other[1] for mine, other in zip(found["ours"], pairs, strict=True)]
                rows.append(
                    f"| {size:,} x {size:,} | {name} | {statistics.median(pair[1] for pair in pairs) / 1e6:.3f} | "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
                    f"{statistics.median(pair[0] for pair in pairs):.0f} |"
                )
            Path(f"{size}.tif").unlink()
    head = "| raster | side | million pixels a second | ours / this side (spread) | peak memory, MB |\n|---|---|---|---|---|\n"
    return f"**Default settings**, {THIN}, {turns} turn(s)\n\n" + head + "\n".join(rows)


def memory() -> str:
    """Peak resident memory of a process that predicts, a raster each."""
    rows, peaks = [], []
    for size in MEMORY_SIZES:
        write_raster(size)
        code = CHILD.format(paths=[str(PROJECT), str(PROJECT / "benchmarks")], size=size)
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        peak, pixels = json.loads(done.stdout.splitlines()[-1])
        peaks.append(peak)
        rows.append(f"| {size:,} x {size:,} | {peak:.0f} | {size**2 / pixels:.0f} |")
        print(rows[-1], flush=True)
        Path(f"{size}.tif").unlink()
    head = "| raster | peak memory, MB | s |\n|---|---|---|\n"
    grown = f"\n\n{MEMORY_SIZES[1]:,} pixels square take {100 * (peaks[1] / peaks[0] - 1):+.1f} % of the memory of "
    return "**Memory**, Unet resnet18 of 3 stages\n\n" + head + "\n".join(rows) + grown + f"{MEMORY_SIZES[0]:,}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--speed-only", action="store_true", help="leave the memory out")
    parser.add_argument("--memory-only", action="store_true", help="leave the speed out")
    parser.add_argument("--tta-only", action="store_true", help="only test-time augmentation and confidence")
    parser.add_argument(
        "--against-earlier", type=int, nargs="+", metavar="SIZE", help="only sides in turn at these sizes"
    )
    parser.add_argument("--monai", type=Path, metavar="FOLDER", help="where MONAI is installed, for --against-earlier")
    parser.add_argument("--turns", type=int, default=3, help="of --against-earlier")
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        save_networks()
        if arguments.against_earlier:
            text = against_others(arguments.against_earlier, arguments.turns, arguments.monai)
            text += "\n\n" + circumstances("torch", "segmentation-models-pytorch", "rasterio")
            print(text)
            if arguments.write:
                put("performance.md", "predict earlier", text)
            return
        tables = [] if arguments.memory_only or arguments.tta_only else [speed()]
        tables += [] if arguments.speed_only or arguments.tta_only else [memory()]
        augmented = "" if arguments.memory_only or arguments.speed_only else tta()
    settings = PredictConfig(model="-", input="-", output="-")
    where = circumstances("torch", "segmentation-models-pytorch", "rasterio")
    how = f"\n\nTiles of {settings.tile_size} pixels that share {settings.shared}, batches of {settings.batch_size}. {where}"
    for name, text in (("predict", "\n\n".join(tables)), ("predict tta", augmented)):
        if text:
            print(text + how)
            if arguments.write:
                put("performance.md", name, text + how)


if __name__ == "__main__":
    main()
